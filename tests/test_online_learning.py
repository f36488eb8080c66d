"""A model in service takes up new plans, gives them up again, and goes on where a process has ended."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import models
import pytest
import torch
from in_service import scripted
from test_refresh import Fake, served
from torch import Tensor

import offramp
import offramp.online_model as module
from offramp.artifact import load_onto, save
from offramp.errors import ArtifactError, InputError, StorageError
from offramp.ladder import BYPASSED, CERTIFIED, RESTING, TIGHTENED
from offramp.model import CachedModel
from offramp.online_model import OnlineModel, online
from offramp.refresh import Candidate, Refresh
from offramp.splitting import split

CALM = 1e-9  # a share of sampled requests at which nothing raises an alarm: these caches are untrained
POLICY = Refresh(train_rows=50, certify_rows=30, drift_rows=10, growth=1.5, keep=3)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.refresh._Process", Fake)
    monkeypatch.setattr(module, "UPKEEP_S", 0.005)
    monkeypatch.setattr(module, "SAVED_S", 0.02)


def until(true: Callable[[], object], most_s: float = 60) -> None:
    deadline = time.monotonic() + most_s
    while not true():
        assert time.monotonic() < deadline, "it has not come to that"
        time.sleep(0.005)


def traffic(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


def learn_once(model: OnlineModel) -> None:
    """Traffic until a refit has brought a new plan."""
    before, refresher = model.report()["plan"], model._refresher
    assert refresher is not None
    seed = 0

    def fits() -> bool:
        nonlocal seed
        seed += 1
        model(traffic(10, seed))
        return refresher._process is not None

    until(fits)
    cast(Fake, refresher._process).succeed()
    until(lambda: model.report()["plan"] > before)


def with_threshold(threshold: float) -> CachedModel:
    torch.manual_seed(0)
    cached = served()
    plan = replace(cached.plan, caches=tuple(replace(one, threshold=threshold) for one in cached.plan.caches))
    return CachedModel(
        cached.split_model,
        list(cached.caches),  # type: ignore[arg-type]
        plan,
        cached.certificate,
        cached.costs,
        task=cached.task,
        summary={},
    )


# --- plans take each other's place ----------------------------------------------------------------


def test_from_a_bare_model_to_a_plan_and_back(tmp_path: Path) -> None:
    with online(served(0), refresh=POLICY, seed=0, shadow=CALM) as model:
        assert set(model.predict(traffic(20)).left_at_B.tolist()) == {0}, "the backbone's exit is the first"
        learn_once(model)
        report = model.report()
        assert (report["rung"], report["plan"], report["earlier_plans"]) == (CERTIFIED, 1, [0])
        assert model.rung.model.plan.caches
        assert report["steps"][-1]["reason"].startswith("a new plan: ")
        assert report["steps"][-1]["evidence"]["cost"] == 0.4
        learn_once(model)
        assert model.report()["earlier_plans"] == [0, 1]
        assert model.roll_back("it was slow")
        assert (model.report()["plan"], model.report()["earlier_plans"]) == (1, [0])
        assert model.roll_back()
        assert not model.rung.model.plan.caches
        assert not model.roll_back()
        assert model.report()["steps"][-1]["reason"] == "back to plan 0: asked for"


def test_only_so_many_plans_are_kept(tmp_path: Path) -> None:
    with online(served(0), refresh=replace(POLICY, keep=2), state=tmp_path / "state", shadow=CALM) as model:
        for _ in range(4):
            learn_once(model)
        assert (model.report()["plan"], model.report()["earlier_plans"]) == (4, [2, 3])
        until(lambda: {path.name for path in (tmp_path / "state" / "plans").iterdir()} == {"0002", "0003", "0004"})


def test_stored_answers_of_the_plan_before_are_not_given(tmp_path: Path) -> None:
    cached = served(0)
    cached.result_cache = offramp.ResultCache(1 << 20)
    x = traffic(20)
    with online(cached, refresh=POLICY, shadow=CALM) as model:
        model(x)
        learn_once(model)
        expected = model.rung.model
        assert expected.result_cache is cached.result_cache
        plain = load_onto_same(expected, tmp_path)
        assert torch.equal(model(x), plain(x))


def load_onto_same(cached: CachedModel, folder: Path) -> CachedModel:
    save(cached, folder / "copy")
    return load_onto(folder / "copy", cached.split_model)


def test_sixteen_threads_while_a_thousand_plans_are_swapped() -> None:
    plans = [with_threshold(threshold) for threshold in (0.40, 0.45, 0.5, 0.6, 0.9, 2.0)]
    x = traffic(64)
    answers = {tuple(cached.predict(x).left_at_B.tolist()) for cached in plans}
    assert len(answers) > 2, "the plans differ"
    over = threading.Event()
    with online(plans[0], refresh=replace(POLICY, train_rows=10**9), shadow=0.05, seed=0) as model:

        def call() -> set[tuple[int, ...]]:
            found = set()
            while not over.is_set():
                found.add(tuple(model.predict(x).left_at_B.tolist()))
            return found

        with ThreadPoolExecutor(16) as pool:
            callers = [pool.submit(call) for _ in range(16)]
            for swap in range(1000):
                model._adopt(Candidate(plans[swap % len(plans)], "a test", {}))
            over.set()
            found = set.union(*(caller.result(60) for caller in callers))
        assert found <= answers, "each call was answered by one plan as a whole"
        assert model.report()["plan"] == 1000


# --- a flood of misses ----------------------------------------------------------------------------


def test_a_flood_that_never_hits_makes_caches_rest_and_they_return() -> None:
    from in_service import SURE_A, SURE_B
    from in_service import traffic as scripted_traffic

    misses, hits = scripted_traffic(3000, 1), scripted_traffic(3000, 2)
    misses[:, [SURE_A, SURE_B]] = 0.0
    hits[:, SURE_A] = 1.0
    with online(scripted(cache_ms=0.1), shadow=1.0, seed=0) as model:
        for rows in misses.split(10):
            model(rows)
            model.settle()
            if model.rung.name == RESTING:
                break
        assert model.rung.name == RESTING
        asked = model.rung.model._lookups[0][0][1]
        assert asked is not None
        assert set(model.predict(hits[:5]).left_at_B.tolist()) == {2}
        for rows in hits.split(10):
            model(rows)
            model.settle()
            if model.rung.name == CERTIFIED:
                break
        assert set(model.predict(hits[:5]).left_at_B.tolist()) == {0}
        assert [step["after"] for step in model.report()["steps"]] == [RESTING, CERTIFIED]


# --- what outlives a process ----------------------------------------------------------------------


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    state, x = tmp_path / "state", traffic(40, 99)
    with online(served(0), refresh=replace(POLICY, on_alarm=False), state=state, shadow=CALM, seed=0) as model:
        learn_once(model)
        model(x)
        model.step_back("a test")
        expected, before = model.predict(x).left_at_B, model.report()
        kept = model.reservoir.inputs() if model.reservoir else None
    with online(served(0), refresh=replace(POLICY, on_alarm=False), state=state, shadow=CALM, seed=0) as model:
        after = model.report()
        for name in ("rung", "plan", "earlier_plans", "requests", "shadowed", "steps", "reservoir"):
            assert json.dumps(after[name]) == json.dumps(before[name]), name
        assert after["refresh"]["budget"] == before["refresh"]["budget"]
        assert len(after["refresh"]["attempts"]) == 1
        assert torch.equal(model.predict(x).left_at_B, expected)
        assert kept is not None
        assert model.reservoir is not None
        assert model.roll_back()
        assert model.report()["plan"] == 0


def test_the_state_of_another_backbone_is_refused(tmp_path: Path) -> None:
    online(served(0), state=tmp_path).close()
    torch.manual_seed(1)
    other = models.cached_model(split(models.mlp().eval(), torch.randn(4, 6)))
    with pytest.raises(InputError, match="the state is that of another backbone .* another folder"):
        online(other, state=tmp_path)
    with pytest.raises(InputError, match="the state is that of another backbone"):
        online(other, state=tmp_path, keep="activations")
    assert list((tmp_path / "inputs").iterdir()), "nothing is lost by the mistake"
    online(served(0), state=tmp_path).close()


def test_a_damaged_state_is_told_and_kept(tmp_path: Path) -> None:
    online(served(0), state=tmp_path).close()
    (tmp_path / "state.json").write_text('{"cut off')
    threads = threading.active_count()
    with pytest.raises(ArtifactError, match="cannot be read"):
        online(served(0), state=tmp_path)
    assert (tmp_path / "state.json").read_text() == '{"cut off'
    assert threading.active_count() == threads


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_a_plan_that_cannot_be_read_gives_way_to_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    state, x = tmp_path / "state", traffic(40, 99)
    with online(served(0), refresh=POLICY, state=state, seed=0, shadow=CALM) as model:
        learn_once(model)
        expected = model.rung.model.predict(x).left_at_B
        learn_once(model)
    weights = state / "plans" / "0002" / "caches.safetensors"
    weights.unlink() if damage == "missing" else weights.write_bytes(weights.read_bytes()[:100])
    with online(served(0), refresh=POLICY, state=state, seed=0, shadow=CALM) as model:
        assert model.report()["plan"] == 1
        assert torch.equal(model.predict(x).left_at_B, expected)
        assert "back to the one before" in model.report()["steps"][-1]["reason"]
    assert "plan 2 cannot be served again" in caplog.text


def test_without_any_plan_the_backbone_answers(tmp_path: Path) -> None:
    online(served(1), state=tmp_path).close()
    (tmp_path / "plans" / "0000" / "manifest.json").unlink()
    x = traffic(20)
    with online(served(1), state=tmp_path) as model:
        assert model.rung.name == BYPASSED
        assert torch.allclose(model(x), models.plain(served(1), x))


def test_a_full_disk_stops_nothing_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with online(served(1), state=tmp_path, refresh=POLICY, seed=0, shadow=CALM) as model:
        model(traffic(10))
        until(lambda: json.loads((tmp_path / "state.json").read_text())["counts"]["requests"] == 10)
        with monkeypatch.context() as patched:

            def full(_file: Path, _data: bytes) -> None:
                raise StorageError("could not write state.json: No space left on device")

            patched.setattr("offramp.state.write_whole", full)
            for seed in range(20):
                assert len(model(traffic(10, seed))) == 10
                time.sleep(0.02)
            assert model.report()["refresh"]["budget"]["spends"] == []
        assert caplog.text.count("cannot be written down; answering goes on") == 1
        until(lambda: json.loads((tmp_path / "state.json").read_text())["counts"]["requests"] == 210)


def test_a_new_plan_that_cannot_be_kept_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with online(served(0), state=tmp_path, refresh=replace(POLICY, train_rows=10**9)) as model:

        def full(*_: object) -> None:
            raise StorageError("cannot save: No space left on device")

        monkeypatch.setattr(module, "save", full)
        model._adopt(Candidate(with_threshold(0.5), "a test", {}))
        assert model.report()["plan"] == 0
        assert not model.rung.model.plan.caches


SERVE = """
import sys, time
sys.path.insert(0, "tests")
import torch, test_online_learning as here, offramp.online_model as module
from offramp.refresh import Candidate
plans = [here.with_threshold(t) for t in (0.4, 0.5, 0.6)]
never = here.replace(here.POLICY, train_rows=10**9)
model = module.online(plans[0], state=sys.argv[1], refresh=never, shadow=here.CALM)
started = requests = 0
while True:
    model(here.traffic(10, requests))
    requests += 10
    print(time.time(), model.report()["requests"], model.report()["plan"], flush=True)
    if requests % 50 == 0:
        model._adopt(Candidate(plans[requests // 50 % 3], "a test", {}))
"""


@pytest.mark.parametrize("kill_after_s", [0.2, 1.3, 1.7])
def test_kill_9_loses_a_second_of_counts_and_no_plan(tmp_path: Path, kill_after_s: float) -> None:
    """Plans are swapped all the time, so the process is killed somewhere in a swap."""
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or []))
    reader.start()
    time.sleep(kill_after_s)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    reader.join()
    process.stdout.close()
    seen = [line.split() for line in lines if len(line.split()) == 3]
    killed_at = float(seen[-1][0])
    safe = max((int(requests) for at, requests, _ in seen if float(at) < killed_at - 1.5), default=0)
    plan = int(seen[-1][2])
    with online(with_threshold(0.4), state=tmp_path, refresh=POLICY) as model:
        report = model.report()
        assert report["requests"] >= safe
        assert abs(report["plan"] - plan) <= 1
        assert report["rung"] in (CERTIFIED, TIGHTENED, BYPASSED, RESTING)
        assert len(model(traffic(5))) == 5
        assert report["earlier_plans"] or plan <= 1


def test_a_process_may_not_share_the_folder_of_another(tmp_path: Path) -> None:
    with online(served(0), state=tmp_path), pytest.raises(InputError, match="in use by another process"):
        online(served(0), state=tmp_path)
    online(served(0), state=tmp_path).close()


# --- arguments ------------------------------------------------------------------------------------


def test_what_makes_no_sense_together_is_refused() -> None:
    with pytest.raises(InputError, match="keep is 'outputs'; expected one of 'inputs', 'activations', 'nothing'"):
        online(served(0), keep="outputs")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="refresh learns from recent requests, and keep='nothing'"):
        online(served(0), refresh=POLICY, keep="nothing")
    with online(served(0)) as model, pytest.raises(InputError, match="this model does not learn"):
        model.refresh()


def test_no_input_is_kept_where_activations_are(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with online(served(0), keep="inputs", state=state, shadow=1.0) as model:
        model(traffic(20))
    assert list((state / "inputs").iterdir())
    (state / "refit").mkdir(exist_ok=True)
    (state / "refit" / "train.safetensors").write_bytes(b"inputs")
    with online(served(0), keep="activations", refresh=POLICY, state=state, shadow=0.5, seed=0) as model:
        assert not (state / "inputs").exists(), "nor those that were kept before"
        assert not (state / "refit").exists()
        model.settle()
        x = traffic(200, 1)
        answer = model(x)
        model.settle()
        assert model.reservoir is not None
        held = model.reservoir.requests()
        assert 60 < len(held) < 140, "of the sampled requests"
        *features, digest_N2, logits_NC, cost_N = held.args
        assert len(features) == len(model.rung.model.split_model.points) - 1
        assert (cost_N == 1).all(), "there are no caches yet"
        row = int((answer == logits_NC[0]).all(1).nonzero()[0])
        assert torch.equal(features[0][0], model.rung.model.split_model.stages[0](x[row : row + 1])[0].half()[0])
        assert len(set(map(tuple, digest_N2.tolist()))) == len(held)
        files = [file for file in state.rglob("*") if file.is_file() and "plans" not in file.parts]
        assert not any(x[0].numpy().tobytes() in file.read_bytes() for file in files)


def test_an_observed_request_says_what_it_has_cost() -> None:
    cached = served(0)
    cached.result_cache = offramp.ResultCache(1 << 20)
    x = traffic(20)
    with online(cached, keep="activations", shadow=1.0) as model:
        for _ in range(2):
            model(x)
            model.settle()
        assert model.reservoir is not None
        assert model.reservoir.requests().args[-1].tolist() == [1.0] * 20 + [0.0] * 20, "run, and stored"


def test_activations_bring_a_plan_too(tmp_path: Path) -> None:
    with online(served(0), keep="activations", refresh=POLICY, shadow=1.0, queue_size=10**6) as model:
        learn_once(model)
        assert model.report()["plan"] == 1


def test_asked_for_by_hand(tmp_path: Path) -> None:
    with online(served(0), refresh=replace(POLICY, train_rows=10**9)) as model:
        model(traffic(60))
        assert model.refresh("I know better")
        assert not model.refresh("twice")


@pytest.fixture
def example() -> Tensor:
    return traffic(4)


def test_uncached_is_the_backbone_itself(example: Tensor) -> None:
    torch.manual_seed(0)
    backbone = models.mlp().eval()
    cached = offramp.uncached(backbone, example, tolerance=0.03, confidence_level=0.9)
    x = traffic(20)
    with torch.no_grad():
        assert torch.equal(cached(x), backbone(x))
    assert (cached.certificate.tolerance, cached.certificate.confidence_level) == (0.03, 0.9)
    assert cached.certificate.within_tolerance
    assert not cached.plan.caches
    assert cached.plan.reason == "nothing has been learned yet"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"example": []}, "batch"), ({"tolerance": 0.0}, "tolerance"), ({"backbone": 3}, "expected a torch.nn.Module")],
)
def test_uncached_refuses_what_makes_no_sense(example: Tensor, arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"backbone": models.mlp().eval(), "example": example} | arguments
    with pytest.raises(offramp.OfframpError, match=message):
        offramp.uncached(given.pop("backbone"), given.pop("example"), **given)


def test_what_was_said_is_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="offramp"), online(served(0), refresh=POLICY, shadow=CALM) as model:
        learn_once(model)
    assert "certified -> certified: a new plan: there is more traffic to learn from" in caplog.text
