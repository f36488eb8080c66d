"""A setting of torch that all who look into a model need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def unfused_transformer_layers() -> Iterator[None]:
    """Inside, nn.TransformerEncoderLayer runs as its parts.

    In eval mode torch runs it as one operation, which counts no FLOPs and which no other runtime has.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
