"""ONNX Runtime on the CPU: float32, and INT8 as it advises: static QDQ per channel, dynamic for transformers.

Its official builds report to Microsoft unless told not to before they are loaded; here they are told.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.backends.base import Backend, Job, not_installed
from offramp.backends.exporting import attends
from offramp.backends.part import Program

_NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"


class OnnxRuntime(Backend):
    """The part as an ONNX model."""

    name = "onnxruntime"
    precisions = ("float32", "int8")
    only_on = "cpu"

    def missing(self) -> str | None:
        return not_installed(("onnxruntime", "onnx", "onnxscript"), extra="onnxruntime")

    def program(self, job: Job) -> Program:
        _load()
        exported = job.exported()
        names = [f"x{number}" for number in range(len(job.example))]
        converted: Any = torch.onnx.export(exported, dynamo=True, input_names=names, verbose=False)
        proto = converted.model_proto
        if job.precision == "int8":
            del proto.graph.value_info[:]  # the quantiser transposes weights, and trips over the shapes noted here
            return _Session(_quantised(proto.SerializeToString(), job, names, dynamic=attends(exported)))
        return _Session(proto.SerializeToString())


def _load() -> None:
    """The first import of ONNX Runtime, without its telemetry. Where it is imported already, it stays as it is."""
    before = os.environ.get(_NO_TELEMETRY)
    os.environ[_NO_TELEMETRY] = "1"
    try:
        importlib.import_module("onnxruntime")
    finally:
        if before is None:
            del os.environ[_NO_TELEMETRY]
        else:
            os.environ[_NO_TELEMETRY] = before


def session(model: bytes | Path) -> Any:
    """An `onnxruntime.InferenceSession` of an ONNX model or file, on the CPU and on as many threads as torch has."""
    _load()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Otherwise its threads keep the cores busy after a call, at the cost of whatever others run next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    given = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


class _Session:
    """An ONNX model as a program. Sessions may be run by several threads at once."""

    def __init__(self, model: bytes) -> None:
        self._session = session(model)
        self._inputs = [(given.name, int(given.name[1:])) for given in self._session.get_inputs()]
        self.stored_bytes = len(model)

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        # Inputs are read where they are. Each run returns arrays of their own, which nothing writes to later.
        outputs: list[Any] = self._session.run(
            None, {name: inputs[number].detach().contiguous().numpy() for name, number in self._inputs}
        )
        return [torch.from_numpy(output) for output in outputs]


def _quantised(model: bytes, job: Job, names: Sequence[str], *, dynamic: bool) -> bytes:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, quantised = (Path(folder, f"{step}.onnx") for step in ("plain", "prepared", "int8"))
        plain.write_bytes(model)
        # ONNX's own inference finds all shapes; ONNX Runtime's symbolic one fails on some operators.
        quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        quantize(prepared, quantised, None if dynamic else _reader(job, names))
        return quantised.read_bytes()


def quantize(prepared: Path, quantised: Path, reader: Any) -> None:
    """Write the INT8 model of a pre-processed one: static with a CalibrationDataReader, dynamic with None."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    # Below 8 bits where products of unsigned activations and signed weights would overflow 16 bits.
    reduce_range = not _has_vnni()
    if reader is None:
        quantize_dynamic(str(prepared), str(quantised), per_channel=True, reduce_range=reduce_range)
        return
    quantize_static(
        str(prepared),
        str(quantised),
        reader,
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _reader(job: Job, names: Sequence[str]) -> Any:
    """The calibration inputs in the form that the quantiser asks for."""
    from onnxruntime.quantization import CalibrationDataReader

    batches = iter(job.calibration_batches())

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
            return None if batch is None else {n: tensor.numpy() for n, tensor in zip(names, batch, strict=True)}

    return Reader()


def _has_vnni() -> bool:
    """Whether this CPU adds up 8-bit products in 32 bits."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_vnni") or found.get("avx_vnni") or found.get("amx_int8"))
