"""OpenVINO on the CPU: float32, bfloat16 by its precision hint, and INT8 by NNCF's post-training quantisation."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opponents.base import Built, Case, Opponent, numpy_inputs

PRECISION = "INFERENCE_PRECISION_HINT"


class Compiled:
    """A compiled model behind the backbone's call, in one stream on as many threads as torch has."""

    def __init__(self, model: Any, precision: str | None) -> None:
        import openvino

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        } | ({} if precision is None else {PRECISION: precision})
        self._model = openvino.Core().compile_model(model, "CPU", settings)
        self._names = [given.any_name for given in self._model.inputs]

    @property
    def precision(self) -> str:
        """What it computes in, which may not be what was asked for."""
        return str(self._model.get_property(PRECISION).to_string())

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """The logits; their memory is used again by the next call."""
        inputs = numpy_inputs(args, kwargs, self._names)
        return torch.from_numpy(self._model(inputs, share_inputs=True, share_outputs=True)[0])


def in_precision(precision: str, case: Case, _tolerance: float | None) -> Built:
    import openvino

    (file, export_s), started = case.onnx, time.monotonic()
    model = openvino.Core().read_model(file)
    compiled = Compiled(model, precision)
    build_s = export_s + time.monotonic() - started
    size = stored_bytes(model, file.with_suffix(".xml"))
    flops_ratio = 1.0 if precision == "f32" else None
    return Built(compiled, size, build_s, flops_ratio, details={"computes_in": compiled.precision})


def int8(case: Case, _tolerance: float | None) -> Built:
    logging.getLogger("nncf").setLevel(logging.ERROR)
    import nncf
    import openvino

    (file, export_s), started = case.onnx, time.monotonic()
    model = openvino.Core().read_model(file)
    names = [given.any_name for given in model.inputs]
    rows = [case.calibration.rows(slice(i, i + 1)) for i in range(len(case.calibration))]
    floating = case.split_model.points[0].dtype.is_floating_point
    quantised = nncf.quantize(
        model,
        nncf.Dataset([numpy_inputs(row.args, row.kwargs, names) for row in rows]),
        subset_size=len(rows),
        model_type=None if floating else nncf.ModelType.TRANSFORMER,
    )
    compiled = Compiled(quantised, None)
    build_s = export_s + time.monotonic() - started
    details = {
        "quantisation": f"nncf.quantize, {len(rows)} training inputs",
        "computes_the_rest_in": compiled.precision,
    }
    return Built(compiled, stored_bytes(quantised, file.with_suffix(".int8.xml")), build_s, details=details)


def stored_bytes(model: Any, file: Path) -> int:
    """Bytes of the weights as OpenVINO stores them, without its own compression to half precision."""
    import openvino

    openvino.save_model(model, file, compress_to_fp16=False)
    return file.with_suffix(".bin").stat().st_size


OPPONENTS = (
    Opponent(
        "OpenVINO float32",
        "None stated; the same weights, other kernels.",
        functools.partial(in_precision, "f32"),
    ),
    Opponent("OpenVINO bfloat16", "None.", functools.partial(in_precision, "bf16")),
    Opponent("OpenVINO INT8 (NNCF)", "None; its accuracy control (not used) watches a point estimate.", int8),
)
