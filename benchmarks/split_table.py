"""Which backbones are split, where, how and how fast: one row per family, each proved on fresh inputs.

    python benchmarks/split_table.py [family ...] [--out benchmarks/results/split_table.json]

A family whose extra is not installed is skipped with the reason; one that fails is a row with the reason. The last line
on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import common
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from offramp.errors import MissingExtraError, OfframpError
from offramp.splitting import SplitModel, split
from offramp.streams import as_batch
from offramp.torchvision_shim import import_torchvision

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT.parent / "shared" / "models" / "zoo.py"
Made = tuple[nn.Module | ExportedProgram, Any]
SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}


@dataclass
class Row:
    """One family: what was found, or why nothing was."""

    family: str
    status: str = "ok"
    points: int = 0
    names: tuple[str, ...] = ()
    method: str = ""
    proved: bool = False
    parameters: int = 0
    split_seconds: float = 0.0
    reason: str = ""


class Skipped(Exception):
    """The family needs something that is not here."""


def main(only: list[str], out: Path | None) -> None:
    console = Console(stderr=False, width=150)
    table = Table("family", "points", "method", "proved", "seconds", "names, or the reason")
    rows = []
    for family, make in families().items():
        if not only or family in only:
            row = examine(family, make)
            rows.append(row)
            shown = row.reason or ", ".join(row.names)
            proved = {"ok": "yes", "skipped": "-"}.get(row.status, "no")
            table.add_row(family, str(row.points), row.method, proved, f"{row.split_seconds:.1f}", shown[:240])
    console.print(table)
    common.finish(common.document("Split points found", [asdict(row) for row in rows]), out)


def examine(family: str, make: Callable[[], Made]) -> Row:
    torch.manual_seed(0)
    row = Row(family)
    try:
        backbone, raw = make()
        started = time.perf_counter()
        model = split(backbone, raw)
        row.split_seconds = round(time.perf_counter() - started, 2)
        row.names = tuple(point.name for point in model.points)
        row.points, row.method = len(model.points), model.method
        row.parameters = sum(parameter.numel() for parameter in model.backbone.parameters())
        row.proved = agrees(model, raw)
        row.status = "ok" if row.proved else "failed"
    except (Skipped, MissingExtraError) as error:
        row.status, row.reason = "skipped", str(error)
    except OfframpError as error:
        row.status, row.reason = "failed", f"{type(error).__name__}: {error}"
    return row


def agrees(model: SplitModel, raw: Any) -> bool:
    """Whether, on all given rows, the stages with every other row dropped on the way give the backbone's answers."""
    batch = as_batch(raw)
    kept = torch.arange(len(batch))
    live = model.flatten(batch)
    with torch.inference_mode():
        expected = tensors(model.backbone(*batch.args, **batch.kwargs))
        for position, stage in enumerate(model.stages):
            if len(kept) > 1 and position:
                kept, index = kept[::2], torch.arange(0, len(kept), 2)
                live = tuple(value.index_select(0, index) for value in live)
            live = stage(*live)
    pairs = zip(live, [leaf for leaf in expected if leaf.ndim and len(leaf) == len(batch)], strict=True)
    return all(
        torch.allclose(one, other[kept], rtol=1e-4, atol=1e-4 * float(other.abs().max())) for one, other in pairs
    )


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def families() -> dict[str, Callable[[], Made]]:
    return {
        "plain CNN": lambda: (toys().PlainCNN().eval(), torch.randn(8, 3, 16, 16)),
        "residual net": lambda: (toys().ResidualNet().eval(), torch.randn(8, 3, 16, 16)),
        "masked transformer": lambda: (toys().MaskedEncoder().eval(), sentences(50)),
        "zoo resnet18_cifar10": lambda: zoo("resnet18_cifar10", 32),
        "zoo resnet56_cifar100": lambda: zoo("resnet56_cifar100", 32),
        "zoo mobilenet_v2_imagenet": lambda: zoo("mobilenet_v2_imagenet", 224),
        **{f"hf {name}": make for name, make in hugging_face()},
        "torchvision resnet18": lambda: vision("resnet18", 64),
        "torchvision mobilenet_v3_small": lambda: vision("mobilenet_v3_small", 64),
        "torchvision vit_b_16": lambda: vision("vit_b_16", 224),
        "timm resnet18": lambda: timm("resnet18", 64),
        "timm vit_tiny_patch16_224": lambda: timm("vit_tiny_patch16_224", 224),
        ".pt2 file": exported,
    }


def toys() -> ModuleType:
    """The small models of the tests."""
    return load("offramp_test_models", ROOT / "tests" / "models.py")


def zoo(name: str, size: int) -> Made:
    if not ZOO.exists():
        raise Skipped("the folder ../shared/models is not here")
    builder = getattr(load("zoo", ZOO), name)
    return builder(), torch.randn(4, 3, size, size)


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def sentences(vocabulary: int) -> dict[str, Tensor]:
    lengths = torch.randint(3, 17, (8, 1))
    mask = (torch.arange(16) < lengths).long()
    return {"input_ids": torch.randint(1, vocabulary, (8, 16)), "attention_mask": mask}


def hugging_face() -> Iterator[tuple[str, Callable[[], Made]]]:
    """Models of transformers, small and from a config: (name, builder)."""

    def pixels(size: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(8, 3, size, size)}

    def made(kind: str, head: str, raw: Callable[[], Any], **config: Any) -> Callable[[], Made]:
        def make() -> Made:
            hf = transformers()
            return getattr(hf, f"{kind}{head}")(getattr(hf, f"{kind}Config")(**config)).eval(), raw()

        return make

    image, text = "ForImageClassification", "ForSequenceClassification"
    resnet = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [2, 2, 2], "layer_type": "basic"}
    yield "ResNet", made("ResNet", image, lambda: pixels(64), **resnet)
    yield "ViT", made("ViT", image, lambda: pixels(32), image_size=32, patch_size=8, **SMALL)
    convnext = {"hidden_sizes": [16, 32, 64, 128], "depths": [2, 2, 2, 2]}
    yield "ConvNeXt", made("ConvNext", image, lambda: pixels(64), **convnext)
    yield "BERT", made("Bert", text, lambda: sentences(100), vocab_size=100, **SMALL)
    distilbert = {"vocab_size": 100, "dim": 64, "n_layers": 4, "n_heads": 4, "hidden_dim": 128}
    yield "DistilBERT", made("DistilBert", text, lambda: sentences(100), **distilbert)
    yolos = {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 10, **SMALL}
    yield "YOLOS", made("Yolos", "ForObjectDetection", lambda: pixels(32), **yolos)
    yield "DETR", lambda: (detr(resnet), pixels(64))


def detr(trunk: dict[str, Any]) -> nn.Module:
    hf = transformers()
    sides = ("encoder", "decoder")
    config = hf.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=hf.ResNetConfig(**trunk, out_features=["stage3"]),
        d_model=64,
        num_queries=20,
        **{f"{side}_layers": 3 for side in sides},
        **{f"{side}_attention_heads": 4 for side in sides},
        **{f"{side}_ffn_dim": 256 for side in sides},
    )
    model: nn.Module = hf.DetrForObjectDetection(config).eval()
    return model


def transformers() -> Any:
    with suppress(MissingExtraError):
        import_torchvision()  # transformers imports it where it is installed, and would fail with it
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise Skipped(f"transformers is not installed (extra `hf`): {error}") from error


def vision(name: str, size: int) -> Made:
    models = import_torchvision().models
    return models.get_model(name, weights=None).eval(), torch.randn(4, 3, size, size)


def timm(name: str, size: int) -> Made:
    import_torchvision()
    try:
        library = importlib.import_module("timm")
    except ImportError as error:
        raise Skipped(f"timm is not installed (extra `vision`): {error}") from error
    return library.create_model(name, pretrained=False).eval(), torch.randn(4, 3, size, size)


def exported() -> Made:
    program = torch.export.export(
        toys().ResidualNet().eval(), (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: Dim("batch")},)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        torch.export.save(program, path)
        return torch.export.load(path), torch.randn(8, 3, 16, 16)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    main(chosen.family, chosen.out)
