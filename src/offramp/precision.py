"""Where bfloat16 pays: to learn by. What is tuned, certified and served stays in the backbone's own precision."""

from __future__ import annotations

import torch


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 matrices in hardware; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # the oldest torch that we support
        return False
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
