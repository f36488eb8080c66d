"""Where bfloat16 pays: to learn by. What is tuned, certified and served stays in the backbone's own precision, up to
the rounding that is told here."""

from __future__ import annotations

import torch
from torch import Tensor


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 matrices in hardware; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # the oldest torch that we support
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def rounding(tensor: Tensor) -> float:
    """How far results like this one may be apart, relative to the largest: other kernels, and other batch sizes, sum in
    another order, and a GPU multiplies float32 as TF32 where torch allows it."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return 2e-2
    return 5e-3 if tensor.is_cuda and torch.backends.cudnn.allow_tf32 else 1e-4
