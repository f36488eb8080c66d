"""Stages and caches on other runtimes. One file per runtime; nothing of a runtime is imported before it is used.

A back end turns a module that maps tensors, batch first, to a tensor or a tuple of tensors into a `Part` with the
same call. Whether that is faster, and how far its outputs are from the module's, is for the caller to measure.
"""

from __future__ import annotations

from offramp.backends.base import Backend
from offramp.backends.comparing import Difference, check, compare
from offramp.backends.compiled import AotInductor, Compiled
from offramp.backends.cudagraphs import CudaGraphs
from offramp.backends.eager import Eager
from offramp.backends.onnxruntime import OnnxRuntime
from offramp.backends.openvino import OpenVino
from offramp.backends.part import Part
from offramp.errors import InputError

__all__ = ["BACKENDS", "Backend", "Difference", "Part", "backend_named", "check", "compare"]

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (Eager(), Compiled(), AotInductor(), OnnxRuntime(), OpenVino(), CudaGraphs())
}


def backend_named(name: str) -> Backend:
    """The back end of that name; an InputError lists the known ones."""
    if name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    return BACKENDS[name]
