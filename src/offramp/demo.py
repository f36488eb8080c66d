"""The whole job on data that ships with scikit-learn: 1,797 real handwritten digits, 8x8 pixels.

A small residual network is trained on some of them, with labels. Then offramp learns caches from unlabelled images,
certifies a plan on others and compares cached and full model on the rest. The parts are disjoint real images: nothing
that is tuned, certified or evaluated on is a shifted copy of another image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional

from offramp.errors import MissingExtraError, OfframpError, StorageError
from offramp.progress import bar

BACKBONE, TRAFFIC, CERTIFY = 500, 350, 600  # images per part; the rest is for evaluation
TOLERANCE = 0.02
EPOCHS, BATCH = 30, 50
WIDTH = 48

MODEL_FILE = '''"""The demo's full model, for `offramp eval` and `offramp predict`."""

from pathlib import Path

from offramp.demo import load_backbone


def build():
    return load_backbone(Path(__file__).parent / "backbone.safetensors")
'''


class Block(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        same = channels_in == channels
        self.skip: nn.Module = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.skip(x))


class DigitsNet(nn.Module):
    """A residual network for 8x8 images: about 620,000 parameters, 25 MFLOP per image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        wide = 2 * WIDTH
        blocks = [Block(WIDTH, WIDTH), Block(WIDTH, WIDTH), Block(WIDTH, WIDTH)]
        blocks += [Block(WIDTH, wide), Block(wide, wide), Block(wide, wide)]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(wide, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        for index, block in enumerate(self.blocks):
            if index == len(self.blocks) // 2:
                x = functional.max_pool2d(x, 2)
            x = block(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Digits:
    """Disjoint parts of the digits: images (N, 1, 8, 8) in [0, 1] and labels (N,)."""

    backbone: tuple[Tensor, Tensor]
    traffic: tuple[Tensor, Tensor]
    certify: tuple[Tensor, Tensor]
    evaluate: tuple[Tensor, Tensor]


def run(folder: Path, *, seed: int = 0, show: Callable[[RenderableType], None], quick: bool = False) -> dict[str, Any]:
    """The demo: train, fit, certify, compare, save. Returns the evaluation and where things lie.

    quick: a few steps of everything, to try the code rather than to show the result.
    """
    from offramp import report
    from offramp.artifact import save
    from offramp.evaluation import evaluate
    from offramp.fitting import fit

    digits = load_digits(seed)
    show(_parts(digits))
    backbone = train_backbone(digits.backbone, epochs=2 if quick else EPOCHS, seed=seed)
    show(Text("\nLearning caches from images alone, tuning and certifying on images the model has never seen."))
    cached = fit(
        backbone,
        [*_batches(digits.backbone[0]), *_batches(digits.traffic[0])],
        certify=_batches(digits.certify[0]),
        tolerance=TOLERANCE,
        seed=seed,
        time_budget_s=15.0 if quick else 75.0,
    )
    evaluation = evaluate(
        cached,
        list(zip(_batches(digits.evaluate[0]), _batches(digits.evaluate[1]), strict=True)),
        latency_budget_s=0.5 if quick else 4.0,
    )
    cached.summary["backbone"]["name"] = "DigitsNet on handwritten digits"
    cached.summary["source"] = {"model": f"{folder.resolve() / 'model.py'}:build"}
    document = {**cached.report(), "evaluation": evaluation.to_json()}
    show(Text())
    show(report.terminal(document))
    _save(folder, backbone, digits.evaluate)
    save(cached, folder / "cached")
    files = {"artifact": str(folder / "cached"), "report": _page(document, folder / "report.html", show)}
    show(_closing(folder, page=files["report"] is not None))
    return {
        "evaluation": document["evaluation"],
        "certificate": document["certificate"],
        "plan": document["plan"],
        **files,
    }


def load_digits(seed: int) -> Digits:
    """scikit-learn's digits, shuffled and cut into disjoint parts."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise MissingExtraError(
            "the demo uses scikit-learn's digits, which are not installed; run: pip install 'offramp[demo]'"
        ) from error
    images, labels = load(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images_N = torch.from_numpy(images[order]).float().view(-1, 1, 8, 8) / 16
    labels_N = torch.from_numpy(labels[order]).long()
    cuts = [BACKBONE, TRAFFIC, CERTIFY, len(order) - BACKBONE - TRAFFIC - CERTIFY]
    return Digits(*zip(_parts_of(images_N, cuts), _parts_of(labels_N, cuts), strict=True))


def train_backbone(part: tuple[Tensor, Tensor], *, epochs: int, seed: int) -> DigitsNet:
    """The full model, trained with labels; images are shifted by up to one pixel and made noisy on the way."""
    images, labels = part
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet()
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    with bar("training the full model", epochs, show=True) as running:
        for _ in range(epochs):
            for rows in _parts_of(torch.randperm(len(images), generator=generator), BATCH):
                loss = functional.cross_entropy(
                    model(_varied(images[rows], generator)), labels[rows], label_smoothing=0.05
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            running.advance()
    return model.eval()


def load_backbone(path: Path) -> DigitsNet:
    """The full model as the demo saved it."""
    from safetensors.torch import load_file

    model = DigitsNet()
    model.load_state_dict(load_file(path))
    return model.eval()


def _varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to one pixel, with a little noise."""
    down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
    padded = functional.pad(images, (1, 1, 1, 1))
    shifted = padded[..., 1 + down : 9 + down, 1 + right : 9 + right]
    return shifted + 0.05 * torch.randn(shifted.shape, generator=generator)


def _batches(tensor: Tensor) -> list[Tensor]:
    return _parts_of(tensor, 64)


def _parts_of(tensor: Tensor, sizes: int | list[int]) -> list[Tensor]:
    return list(tensor.split(sizes))


def _save(folder: Path, backbone: DigitsNet, evaluate: tuple[Tensor, Tensor]) -> None:
    from safetensors.torch import save_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()},
            folder / "backbone.safetensors",
        )
        (folder / "model.py").write_text(MODEL_FILE, encoding="utf-8")
        np.savez(folder / "evaluate.npz", images=evaluate[0].numpy(), labels=evaluate[1].numpy())
    except OSError as error:
        raise StorageError(f"the demo could not write to {folder}: {error}") from error


def _page(document: dict[str, Any], path: Path, show: Callable[[RenderableType], None]) -> str | None:
    from offramp import report

    try:
        return str(report.write_html(document, path))
    except MissingExtraError as error:
        show(Text(str(error), style="yellow"))
    except OfframpError as error:
        show(Text(str(error), style="red"))
    return None


def _parts(digits: Digits) -> RenderableType:
    return Text(
        "scikit-learn's 1,797 handwritten digits, in disjoint parts of real images:\n"
        f"  {len(digits.backbone[0])} with labels, to train the full model; without, they also train the caches\n"
        f"  {len(digits.traffic[0])} more without labels, to train the caches\n"
        f"  {len(digits.certify[0])} to tune and certify the plan (a third, two thirds)\n"
        f"  {len(digits.evaluate[0])} to compare the cached with the full model at the end"
    )


def _closing(folder: Path, *, page: bool) -> RenderableType:
    lines = ["", f"Saved in {folder}{'/' if str(folder) != '.' else ''}. Next:"]
    if page:
        lines.append(f"  open {folder / 'report.html'} in a browser")
    lines.append(f"  offramp eval {folder / 'cached'} {folder / 'evaluate.npz'}")
    lines.append(f"  offramp predict {folder / 'cached'} {folder / 'evaluate.npz'} --limit 20")
    return Text("\n".join(lines))
