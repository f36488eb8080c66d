"""The backbone as an ONNX file, for the runtimes."""

from __future__ import annotations

import inspect
import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from offramp.streams import Batch


def export(backbone: nn.Module, example: Batch, file: Path) -> Path:
    """Write `file`, with inputs named as the backbone's arguments and a free batch size."""
    signature = inspect.signature(backbone.forward)
    bound = signature.bind(*example.args, **example.kwargs).arguments
    rows = torch.export.Dim("rows")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp.onnx")
    # The exporter speaks of operators of torchvision that no model here has, and of deprecations inside of torch.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            backbone,
            example.args,
            temporary,
            kwargs=dict(example.kwargs),
            input_names=list(bound),
            dynamic_shapes={name: {0: rows} for name in bound},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return temporary.replace(file)
