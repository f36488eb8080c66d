"""ONNX Runtime on the CPU: float32, and INT8 as it advises (static QDQ per channel; dynamic for transformers)."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.backends.onnxruntime import quantize, session
from opponents.base import Built, Case, Opponent, numpy_inputs

CALIBRATION_BATCH = 20


class Session:
    """An ONNX file behind the backbone's call, on as many threads as torch has."""

    def __init__(self, file: Path) -> None:
        self._session = session(file)
        self._names = [given.name for given in self._session.get_inputs()]

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        outputs: list[Any] = self._session.run(None, numpy_inputs(args, kwargs, self._names))
        return torch.from_numpy(outputs[0])


def float32(case: Case, _tolerance: float | None) -> Built:
    (file, export_s), started = case.onnx, time.monotonic()
    session = Session(file)
    return Built(session, file.stat().st_size, export_s + time.monotonic() - started, flops_ratio=1.0)


def int8(case: Case, _tolerance: float | None) -> Built:
    (file, export_s), started = case.onnx, time.monotonic()
    quantised, scheme = quantise(case, file)
    session = Session(quantised)
    return Built(
        session, quantised.stat().st_size, export_s + time.monotonic() - started, details={"quantisation": scheme}
    )


def quantise(case: Case, file: Path) -> tuple[Path, str]:
    """The INT8 file beside `file`, and how it was made."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, quantised = file.with_suffix(".prepared.onnx"), file.with_suffix(".int8.onnx")
    dynamic = not case.split_model.points[0].dtype.is_floating_point
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises, through the root logger, what is done here
    try:
        quant_pre_process(str(file), str(prepared))
        quantize(prepared, quantised, None if dynamic else _reader(case, prepared))
    finally:
        root.setLevel(level)
    if dynamic:
        return quantised, "dynamic, per channel"
    return quantised, f"static QDQ, per channel, {len(case.calibration)} training inputs"


def _reader(case: Case, file: Path) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    names = Session(file)._names
    starts = iter(range(0, len(case.calibration), CALIBRATION_BATCH))

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            start = next(starts, None)
            if start is None:
                return None
            rows = case.calibration.rows(slice(start, start + CALIBRATION_BATCH))
            return numpy_inputs(rows.args, rows.kwargs, names)

    return Reader()


OPPONENTS = (
    Opponent("ONNX Runtime float32", "None stated; the same weights, other kernels.", float32),
    Opponent("ONNX Runtime INT8", "None.", int8),
)
