"""The process that learns: its job, its share of the processor, and how it ends."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import models
import pytest
import torch
from test_candidates import POINTS, image_recording, make_candidates
from torch import Tensor

import offramp
import offramp.refresh as refresh_module
from offramp.artifact import load, save
from offramp.caches import CacheShape
from offramp.evaluation import evaluate
from offramp.methods.offramp import Offramp
from offramp.observing import Observer
from offramp.refitting import Continued, as_stream, old_name, refit, renamed
from offramp.refresh import CERTIFY, CURRENT, EXAMPLE, JOB, RESULT, TRAIN, Refresh, _store
from offramp.splitting import split
from offramp.streams import Batch
from offramp.tasks import Classification


def backbone() -> torch.nn.Module:
    """Trained a little, so that it is sure of most inputs: caches can learn that."""
    torch.manual_seed(0)
    model = models.PlainCNN().eval()
    with torch.no_grad():
        model.head.weight.mul_(20)
    return model


class Slow(torch.nn.Module):
    """A backbone with much work in its middle that hardly matters: caches pay on any machine, whatever else it does."""

    def __init__(self, backbone: torch.nn.Module) -> None:
        super().__init__()
        widths = [3, *[64] * 6, 3]
        convolutions = [torch.nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)]
        self.work = torch.nn.Sequential(*(layer for one in convolutions for layer in (one, torch.nn.ReLU())))
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.backbone(images + 1e-3 * self.work(images))
        return logits


def easy(rows: int, seed: int) -> Tensor:
    """Images of one of five brightnesses, and noise."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(5, (rows, 1, 1, 1), generator=generator).float()
    return level - 2 + 0.02 * torch.randn(rows, 3, 16, 16, generator=generator)


def job(folder: Path, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    _store(Batch((easy(1500, 1),)), folder / TRAIN)
    _store(Batch((easy(1500, 2),)), folder / CERTIFY)
    document = {
        "tolerance": 0.02,
        "confidence_level": 0.975,
        "answers_from": [],
        "device": "cpu",
        "observed": False,
        "cpu_share": 1.0,
        "time_budget_s": 10.0,
        "method": "offramp",
        "seed": 0,
    }
    (folder / JOB).write_text(json.dumps(document | more))
    return folder


def test_inputs_become_a_stream_as_a_user_would_write_it() -> None:
    x, mask = torch.randn(300, 2), torch.ones(300)
    by_position = as_stream(Batch((x, mask)))
    assert [len(batch[0]) for batch in by_position] == [128, 128, 44]
    assert torch.equal(torch.cat([batch[0] for batch in by_position]), x)
    by_name = as_stream(Batch((), {"x": x, "mask": mask}))
    assert list(by_name[0]) == ["x", "mask"]


def test_old_caches_keep_their_names_and_get_older() -> None:
    assert old_name("input/student16x1") == "input/student16x1@1"
    assert old_name("input/student16x1@1") == "input/student16x1@2"


def test_caches_that_serve_join_unless_what_they_read_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = make_candidates(image_recording(40))
    student = candidates.build(POINTS[0], CacheShape("student", 8))
    reader, orphan = (candidates.build(POINTS[1], CacheShape("conv", width), student) for width in (8, 16))
    orphan.reads = "input/student24x1@1"
    monkeypatch.setattr(Offramp, "learn", lambda *_: None)
    Continued(base=Offramp(), serving=[student, reader, orphan]).learn(candidates, 0.02)
    assert [trained.cache.name for trained in candidates.trained] == [student.name, reader.name]


@pytest.mark.slow
def test_a_refit_learns_certifies_and_takes_the_serving_caches_along(tmp_path: Path) -> None:
    model = backbone()
    first = refit(job(tmp_path / "first"), model)
    assert first["certified"], first
    assert first["tested"]
    assert first["cost"] < first["cost_now"] == 1.0
    cached = load(tmp_path / "first" / RESULT, model)
    assert cached.certificate.confidence_level == 0.975
    assert cached.certificate.within_tolerance
    assert cached.certificate.n <= 1500
    x = easy(2000, 3)
    with torch.no_grad():
        differ = (cached(x).argmax(1) != model(x).argmax(1)).double().mean()
    assert differ <= 0.04, "on inputs that nobody has seen"
    again = job(tmp_path / "again", answers_from=[cache.threshold for cache in cached.plan.caches])
    save(cached, again / CURRENT)
    second = refit(again, model)
    assert second["cost_now"] == pytest.approx(first["cost"], abs=0.05), "the same plan, on the same kind of traffic"
    if not second["certified"]:
        assert second["cost"] >= second["cost_now"] or not second["caches"]
    names = [cache.name for cache in renamed(cached)]
    assert all(name.endswith("@1") for name in names)


@pytest.mark.slow
def test_a_refit_from_activations_alone(tmp_path: Path) -> None:
    """No input is in the folder, so none of the caches is on the input."""
    model = backbone()
    folder = job(tmp_path, observed=True, time_budget_s=20.0)
    split_model = split(model, Batch((easy(4, 0),)))
    observe = Observer(split_model, Classification())
    observe._secret = bytes(16)  # it decides which of the newer ones certify
    lots = {TRAIN: easy(1500, 1), CERTIFY: torch.cat([easy(1480, 2), easy(20, 1)])}  # the last 20 trained as well
    for lot, x in lots.items():
        _store(observe(Batch((x,)), torch.full((len(x),), 0.9)), folder / lot)
    _store(split_model.example, folder / EXAMPLE)
    outcome = refit(folder, model)
    assert outcome["certified"], outcome
    assert outcome["cost"] < outcome["cost_now"] == pytest.approx(0.9)
    assert not any(name.startswith("input/") for name in outcome["caches"])
    cached = load(folder / RESULT, model)
    assert cached.certificate.within_tolerance
    assert cached.certificate.n < 1000
    x = easy(2000, 3)
    with torch.no_grad():
        assert (cached(x).argmax(1) != model(x).argmax(1)).double().mean() <= 0.04, "on inputs that nobody has seen"
    assert evaluate(cached, [x], batch_sizes=()).flops_ratio == pytest.approx(outcome["cost"], abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["inputs", "activations"])
def test_from_live_traffic_to_a_served_plan(tmp_path: Path, keep: Literal["inputs", "activations"]) -> None:
    """Everything for real: the process, its certificate, and the swap."""
    model = Slow(backbone()).eval()
    policy = Refresh(train_rows=1000, certify_rows=1200, time_budget_s=10, cpu_share=1.0)
    cached = offramp.uncached(model, easy(4, 0), tolerance=0.02)
    shadow = 0.01 if keep == "inputs" else 1.0
    with offramp.online(cached, refresh=policy, keep=keep, shadow=shadow, state=tmp_path, seed=0) as served:
        deadline, seed = time.monotonic() + 240, 10
        while served.report()["plan"] == 0:
            assert time.monotonic() < deadline, served.report()["refresh"]
            seed += 1
            served(easy(20, seed))
            # While the other process measures times, this one leaves it the processors.
            time.sleep(0.5 if served.report()["refresh"]["state"] == "fitting" else 0.01)
        report = served.report()
        assert report["refresh"]["attempts"][0]["outcome"] == "taken into service"
        assert report["refresh"]["budget"]["confidence_for_life"] == pytest.approx(0.95)
        x = easy(2000, 5)
        with torch.no_grad():
            assert (served(x).argmax(1) != model(x).argmax(1)).double().mean() <= 0.04
    assert (tmp_path / "plans" / "0001").is_dir()
    assert (tmp_path / "inputs").exists() == (keep == "inputs")


@pytest.mark.slow
def test_a_first_method_and_the_refit_that_follows_it_for_real() -> None:
    """Whether their plans pay on so small a model hangs on measured times; that both refits come to an end does not."""
    policy = Refresh(
        train_rows=500, certify_rows=600, growth=1e6, time_budget_s=10, cpu_share=1.0, first_method="freeze"
    )
    cached = offramp.uncached(backbone(), easy(4, 0), tolerance=0.02)
    with offramp.online(cached, refresh=policy, seed=0) as served:
        deadline, seed, attempts = time.monotonic() + 240, 10, list[Any]()
        while len(attempts) < 2 or attempts[-1]["outcome"] == "running":
            assert time.monotonic() < deadline, attempts
            seed += 1
            served(easy(20, seed))
            time.sleep(0.05)
            attempts = served.report()["refresh"]["attempts"]
    assert all(attempt["detail"] is not None for attempt in attempts), "what the process said, not how it broke"
    assert [attempt["detail"]["n"] > 200 for attempt in attempts] == [True, True]


@pytest.mark.slow
def test_a_refit_that_is_killed_brings_no_plan_and_disturbs_nobody(tmp_path: Path) -> None:
    model = backbone()
    policy = Refresh(train_rows=200, certify_rows=200, time_budget_s=60)
    with offramp.online(offramp.uncached(model, easy(4, 0), tolerance=0.02), refresh=policy, seed=0) as served:
        seed = 0
        while served._refresher is None or served._refresher._process is None:
            seed += 1
            served(easy(20, seed))
            time.sleep(0.01)
        os.kill(served._refresher._process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not (attempts := served.report()["refresh"]["attempts"]) or attempts[0]["outcome"] == "running":
            assert time.monotonic() < deadline
            assert len(served(easy(20, 1))) == 20
            time.sleep(0.01)
        assert "ended with code -9" in attempts[0]["outcome"]
        assert served.report()["plan"] == 0


@pytest.mark.slow
def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "import test_refitting as here, offramp\n"
        "from offramp.refresh import _Process\n"
        "cached = offramp.uncached(here.backbone(), here.easy(4, 0))\n"
        "process = _Process(here.job(Path(sys.argv[1]), time_budget_s=300.0), cached.split_model)\n"
        "print(process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(8)
    assert _lives(child), (tmp_path / refresh_module.LOG).read_text()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while _lives(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_the_share_of_the_processors_is_kept() -> None:
    code = (
        "import time, torch\nfrom offramp.refitting import keeping_to_share\n"
        "began, used = time.monotonic(), time.process_time()\n"
        "x = torch.randn(200, 200)\n"
        "with keeping_to_share(0.2):\n    while time.monotonic() - began < 4:\n        x @ x\n"
        "print((time.process_time() - used) / (time.monotonic() - began))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    processors = len(os.sched_getaffinity(0))
    assert float(result.stdout) <= 1.25 * 0.2 * processors
