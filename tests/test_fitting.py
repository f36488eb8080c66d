"""fit() as a whole, on toy backbones: what it returns, what it refuses, and what it leaves alone."""

from __future__ import annotations

import copy
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_candidates import image_recording
from torch import Tensor, nn

from offramp import choosing, fitting, recording
from offramp.caches import CacheShape
from offramp.candidates import Candidates
from offramp.distillation import Recipe
from offramp.errors import InputError, SplitError, StreamError
from offramp.fitting import fit
from offramp.model import CachedModel
from offramp.recording import RecordingInterrupted
from offramp.search import Search


class Wide(nn.Module):
    """Easy to imitate and dear: the answer depends on the brightest of four quarters of the image."""

    quarters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4))
        self.register_buffer("quarters", torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        for block in self.blocks:
            y = torch.relu(block(y))
        hard = y.mean((1, 2, 3), keepdim=False)[:, None] * 1e-3
        means = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return 20 * means @ self.quarters + hard


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 16, 16, generator=generator) + torch.randn(count, 1, 2, 2, generator=generator).repeat(
        1, 1, 8, 8
    )


@pytest.fixture
def backbone() -> nn.Module:
    torch.manual_seed(0)
    return Wide().eval()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short trainings, few copies, short measurements: the code, not the saving."""
    monkeypatch.setattr(Search, "recipe", lambda self, cache: Recipe(rows=1500, batch_size=64, learning_rate=4e-3))
    monkeypatch.setattr("offramp.recording.ASKED_ROWS", 0)
    monkeypatch.setattr(fitting, "STAGES_S", 0.3)
    monkeypatch.setattr(fitting, "CACHES_S", 0.3)
    monkeypatch.setattr(choosing, "LATENCY_S", 0.05)


def quick_fit(backbone: nn.Module, **options: object) -> CachedModel:
    arguments: dict[str, object] = {"certify": list(images(400, 1).split(100)), "tolerance": 0.05, "progress": False}
    return fit(backbone, list(images(300, 0).split(100)), **(arguments | options))  # type: ignore[arg-type]


def test_the_result_is_certified_and_the_backbone_untouched(backbone: nn.Module) -> None:
    before = copy.deepcopy(backbone.state_dict())
    cached = quick_fit(backbone)
    certificate = cached.certificate
    assert certificate.bound <= 0.05
    assert certificate.n == cached.report()["fit"]["inputs"]["certify"]
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert not backbone.training
    assert not any(module._forward_hooks for module in backbone.modules())
    fresh = images(200, 2)
    answers = cached(fresh).argmax(1)
    disagreement = (answers != backbone(fresh).argmax(1)).double().mean()
    assert disagreement <= 0.15  # the certificate's tolerance, and what 200 inputs may stray


def test_the_same_seed_gives_the_same_caches(backbone: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "shares", lambda costs, weight_flops: fitting_flop_shares(costs))
    monkeypatch.setattr(choosing, "never_slower", lambda plan, latency: plan)  # measured as well
    first, second = quick_fit(backbone), quick_fit(backbone)
    assert [c.threshold for c in first.plan.caches] == [c.threshold for c in second.plan.caches]
    pairs = zip(first.caches.state_dict().items(), second.caches.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


def fitting_flop_shares(costs: object) -> object:
    """Costs without measured time, which would differ from run to run."""
    from offramp.cost import flop_shares

    return flop_shares(costs)  # type: ignore[arg-type]


def test_nothing_pays_is_a_plan_with_its_reason() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(256, 4)).eval()
    cached = quick_fit(backbone)
    assert cached.plan.caches == ()
    assert cached.plan.reason
    assert cached.certificate.bound == 0.0
    fresh = images(5, 3)
    assert torch.equal(cached(fresh), backbone(fresh))


def test_too_few_inputs_says_how_many(backbone: nn.Module) -> None:
    with pytest.raises(StreamError, match=r"takes at least 299 .* stream needs about \d"):
        quick_fit(backbone, tolerance=0.01, certify=list(images(100, 1).split(50)))


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -0.1, 2.0])
def test_a_tolerance_outside_0_1_is_refused(backbone: nn.Module, tolerance: float) -> None:
    with pytest.raises(InputError, match="tolerance"):
        quick_fit(backbone, tolerance=tolerance)


def test_a_level_outside_0_1_is_refused(backbone: nn.Module) -> None:
    with pytest.raises(InputError, match="confidence_level"):
        quick_fit(backbone, confidence_level=1.0)


def test_an_unknown_method_lists_the_known_ones(backbone: nn.Module) -> None:
    with pytest.raises(InputError, match=r"'magic'; known: offramp"):
        quick_fit(backbone, method="magic")


def test_an_unknown_task_lists_the_known_ones(backbone: nn.Module) -> None:
    with pytest.raises(InputError, match="classification"):
        quick_fit(backbone, task="detection")


def test_a_model_in_train_mode_costs_the_stream_nothing(backbone: nn.Module) -> None:
    stream = iter([images(10, 0)])
    with pytest.raises(SplitError, match="eval"):
        fit(backbone.train(), stream, progress=False)
    assert next(stream, None) is not None


def test_rows_that_depend_on_each_other_are_refused() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(256, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = x.flatten(1)
            out: Tensor = self.linear(y - y.mean(0, keepdim=True))
            return out

    with pytest.raises(SplitError, match="row"):
        quick_fit(Mixing().eval())


def test_a_tensor_is_not_a_stream(backbone: nn.Module) -> None:
    with pytest.raises(InputError, match=r"tensor\.split"):
        fit(backbone, images(10, 0), progress=False)


@pytest.mark.parametrize("method", ["offramp", "branchynet"])
def test_a_recording_is_no_certification_stream(backbone: nn.Module, method: str) -> None:
    recorded = image_recording()
    labelled = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in images(300, 0).split(100)]
    with pytest.raises(InputError, match="a stream must yield batches; received a Recording"):
        fit(backbone, labelled, certify=recorded, method=method, progress=False)  # type: ignore[arg-type]


def test_a_stream_that_breaks_keeps_what_was_recorded(backbone: nn.Module) -> None:
    def breaking() -> Iterator[Tensor]:
        yield from images(300, 0).split(100)
        raise OSError("the network went away")

    with pytest.raises(StreamError, match="network went away") as caught:
        fit(backbone, breaking(), certify=list(images(400, 1).split(100)), tolerance=0.05, progress=False)
    recorded = caught.value.recorded
    assert recorded is not None
    cached = quick_fit(backbone, certify=list(images(400, 1).split(100)))
    again = fit(
        backbone,
        recorded,  # type: ignore[arg-type]
        certify=list(images(400, 1).split(100)),
        tolerance=0.05,
        progress=False,
    )
    assert again.report()["fit"]["inputs"] == cached.report()["fit"]["inputs"]


def test_the_first_ctrl_c_ends_training_and_goes_on(backbone: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    inner = Candidates._train

    def interrupting(self: Candidates, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return inner(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Candidates, "_train", interrupting)
    cached = quick_fit(backbone)
    assert len(calls) == 2
    assert "interrupted" in cached.report()["advice"]


def test_a_second_ctrl_c_stops_and_keeps_the_recording(backbone: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupting(self: Candidates, *arguments: object) -> None:
        del self, arguments
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Candidates, "_train", interrupting)
    with pytest.raises(RecordingInterrupted) as caught:
        quick_fit(backbone)
    assert len(caught.value.recorded) > 300


def test_an_interrupted_fit_resumes_without_asking_the_backbone_again(
    backbone: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Search) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Search, "_reader", stop)
        with pytest.raises(KeyboardInterrupt):
            quick_fit(backbone, workdir=tmp_path)
    trained: list[CacheShape] = []
    inner = Candidates._train

    def counting(self: Candidates, cache: object, *arguments: object) -> object:
        trained.append(cache.shape)  # type: ignore[attr-defined]
        return inner(self, cache, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Candidates, "_train", counting)
    monkeypatch.setattr("offramp.recording._Recorder._run", lambda *_: pytest.fail("the backbone was asked again"))
    cached = quick_fit(backbone, workdir=tmp_path)
    assert all(shape.kind != "student" for shape in trained)
    assert cached.certificate.n > 0
    assert not list(tmp_path.iterdir())


def failing(*_: object, **__: object) -> None:
    raise RuntimeError("something else broke")


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (recording._Recorder, "ask_again"),
        (Search, "run"),
        (fitting, "measure_caches"),
        (choosing, "summarise"),
    ],
    ids=["recording", "training", "measuring", "choosing"],
)
def test_whatever_breaks_a_workdir_keeps_the_recording(
    backbone: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: object, name: str
) -> None:
    monkeypatch.setattr(Search, "run", lambda self: None)  # no caches: it is about the recording
    with monkeypatch.context() as patched:
        patched.setattr(where, name, failing)
        with pytest.raises(RuntimeError, match="something else broke"):
            quick_fit(backbone, workdir=tmp_path)
    monkeypatch.setattr(recording._Recorder, "_write", lambda *_, **__: pytest.fail("recorded again"))
    assert quick_fit(backbone, workdir=tmp_path).certificate.n > 0


def test_without_a_workdir_nothing_is_kept(
    backbone: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Search, "run", failing)
    with pytest.raises(RuntimeError, match="something else broke"):
        quick_fit(backbone)
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_users_own_in_the_workdir_is_touched(backbone: nn.Module, tmp_path: Path) -> None:
    for name in ("recording", "caches"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    quick_fit(backbone, workdir=tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.txt")) == [
        "caches/mine.txt",
        "recording/mine.txt",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"recording", "caches"}


def test_a_copy_of_a_cached_model_answers_as_the_first(backbone: nn.Module) -> None:
    cached, fresh = quick_fit(backbone), images(20, 3)
    assert torch.equal(copy.deepcopy(cached)(fresh), cached(fresh))
