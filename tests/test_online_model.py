"""A cached model in service: watched without being held up, and stepping back one whole rung at a time."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from in_service import NUMBER, SURE_A, SURE_B, differing, scripted, serve, traffic, watching
from torch import Tensor

import offramp
from offramp.caches.result import ResultCache
from offramp.errors import InputError
from offramp.ladder import Rung
from offramp.model import CachedModel
from offramp.monitoring import confidence_sequence, merge
from offramp.online_model import _Sampler, online
from offramp.splitting import split
from offramp.types import Plan

# --- the answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shadow", [0.01, 0.5, 1.0])
def test_it_answers_as_the_cached_model_does(shadow: float) -> None:
    cached, x = scripted(), traffic(60, 1, wrong_a=0.1)
    with watching(cached, shadow=shadow, run_length=1e9) as model:
        for rows in x.split(7):
            assert torch.equal(model(rows), cached(rows))
            one, other = model.predict(rows), cached.predict(rows)
            assert torch.equal(one.left_at_B, other.left_at_B)
            assert torch.equal(one.answer_B, other.answer_B)
            assert torch.equal(one.output, other.output)
        assert model.report()["requests"] == 120


def test_the_output_has_the_backbones_type() -> None:
    cached = scripted()
    assert cached.split_model.backbone(traffic(3, 0)).__class__ is Tensor
    torch.manual_seed(0)
    backbone = models.Wrapped(models.in_a_dict).eval()
    split_model = split(backbone, torch.randn(5, 6))
    wrapped = models.cached_model(split_model, [models.learned(split_model.points[0], 3)], [0.5])
    with watching(wrapped) as model:
        assert list(model(torch.randn(4, 6))) == ["logits", "loss"]


@pytest.mark.parametrize(
    "arguments", [(), ([1.0],), (torch.zeros(2, 5),), (torch.zeros(2, 6).double(),), (torch.tensor(1.0),)]
)
def test_wrong_inputs_raise_as_before(arguments: tuple[Any, ...]) -> None:
    cached = scripted()
    with watching(cached) as model:
        for wrapped, bare in ((model, cached), (model.predict, cached.predict)):
            with pytest.raises(InputError) as expected:
                bare(*arguments)
            with pytest.raises(InputError) as raised:
                wrapped(*arguments)
            assert str(raised.value) == str(expected.value)
        assert model.report()["requests"] == 0


def test_empty_batches_pass() -> None:
    with watching() as model:
        assert model(traffic(4, 0)[:0]).shape == (0, 3)
        assert model.report()["sampled"] == 0


def test_inference_mode_and_gradients() -> None:
    with watching() as model:
        with torch.inference_mode():
            model(traffic(5, 0))
        assert not model(traffic(5, 0).requires_grad_()).requires_grad
        model.settle()
        assert (model.report()["sampled"], model.report()["failed"]) == (10, 0)


# --- what is sampled ------------------------------------------------------------------------------


def sampled_numbers(x: Tensor, sizes: Sequence[int], seed: int) -> list[int]:
    seen: list[int] = []
    with watching(shadow=0.1, seed=seed, run_length=1e300) as model:
        judge = model._judge

        def spy(sampled: Any) -> None:
            seen.extend(sampled.batch.args[0][:, NUMBER].int().tolist())
            judge(sampled)

        model._judge = spy  # type: ignore[method-assign]
        for rows in x.split(list(sizes)):
            model(rows)
            model.settle()
        assert model.report()["sampled"] == len(seen)
    return seen


def test_what_is_sampled_depends_on_the_number_of_a_request_alone() -> None:
    sizes = [random.Random(3).randrange(1, 9) for _ in range(80)]
    rows = sum(sizes)
    calm, bad, misses = traffic(rows, 1), traffic(rows, 2, wrong_a=1.0, wrong_b=1.0), traffic(rows, 3)
    misses[:, [SURE_A, SURE_B]] = 0
    found = [sampled_numbers(x, sizes, 7) for x in (calm, bad, misses)]
    assert found[0] == found[1] == found[2]
    assert sampled_numbers(calm, [1] * rows, 7) == found[0], "nor on how requests come in batches"
    assert 0 < len(found[0]) < rows / 4
    assert sampled_numbers(calm, sizes, 8) != found[0]


@pytest.mark.parametrize("share", [0.003, 0.2, 0.9, 1.0])
def test_each_request_is_sampled_with_the_same_probability(share: float) -> None:
    rows, streams = 40, 3000
    counts = [0] * rows
    for seed in range(streams):
        sampler = _Sampler(share, seed)
        for first in range(0, rows, 5):
            for row in sampler.take(5):
                counts[first + row] += 1
    spread = math.sqrt(streams * share * (1 - share))
    assert all(abs(count - streams * share) <= 4.5 * spread for count in counts)


def test_the_disagreement_is_that_of_all_requests() -> None:
    cached, x = scripted(), traffic(2000, 1, wrong_a=0.02, wrong_b=0.05)
    differ = len(differing(cached, x))
    with watching(cached, run_length=1e9) as model:
        serve(model, x)
        report = model.report()
    said = report["disagreement"]
    assert (said["disagreements"], said["sampled"]) == (differ, 2000)
    assert said["interval"] == confidence_sequence(differ, 2000, 0.95)
    hits = torch.bincount(cached.predict(x).left_at_B, minlength=3).tolist()
    assert [report["caches"][name]["hits"] for name in "AB"] == hits[:2]
    assert report["shadowed"] == sum(hits[:2]), "what no cache answered costs nothing"
    assert report["caches"]["A"]["disagreements"] + report["caches"]["B"]["disagreements"] == differ


def test_stored_answers_are_watched_too() -> None:
    cached, x = scripted(), traffic(300, 1, wrong_a=0.1)
    cached.result_cache = ResultCache(1 << 20)
    differ = len(differing(cached, x))
    with watching(cached, run_length=1e9) as model:
        serve(model, x)
        report = model.report()
    assert report["caches"]["result"]["hits"] == 300, "all of them were asked before"
    assert report["disagreement"]["disagreements"] == differ > 0


# --- the ladder -----------------------------------------------------------------------------------


def test_a_restricted_model_disagrees_on_a_subset() -> None:
    cached, x = scripted(), traffic(3000, 5, wrong_a=0.2, wrong_b=0.3)
    before = differing(cached, x)
    left = cached.predict(x).left_at_B
    rng = random.Random(0)
    limits = [(math.inf, 0.5), (0.5, math.inf), (0.8, 0.5), (0.9, 0.7), (math.inf, math.inf)]
    limits += [(rng.uniform(0.5, 1), rng.uniform(0.5, 1)) for _ in range(10)]
    for answers_from in limits:
        model = cached.restricted(answers_from)
        after, now = differing(model, x), model.predict(x).left_at_B
        assert after < before
        for slot, limit in enumerate(answers_from):
            assert torch.equal(now == slot, (left == slot) & (x[:, (SURE_A, SURE_B)[slot]] >= limit))
    assert differing(cached, x) == before, "the model itself is as it was"


def test_switching_one_cache_off_alone_would_add_disagreements() -> None:
    cached, x = scripted(), traffic(3000, 5, wrong_a=0.2, wrong_b=0.3)
    alone = CachedModel(
        cached.split_model,
        [list(cached.caches)[1]],  # type: ignore[list-item]
        Plan(cached.plan.caches[1:]),
        cached.certificate,
        replace(cached.costs, caches=cached.costs.caches[1:], cache_points=(0,)),
        task=cached.task,
        summary={},
    )
    assert not differing(alone, x) <= differing(cached, x)
    assert differing(cached.restricted((math.inf, 0.5)), x) <= differing(cached, x)


@pytest.mark.parametrize("wrong", [(0.4, 0.5), (0.5,), (math.nan, 0.5), (0.5, 0.5, 0.5)])
def test_caches_cannot_be_loosened(wrong: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="restricted, never loosened"):
        scripted().restricted(wrong)


def test_the_ladder_is_climbed_down_with_evidence_and_disagreements_only_shrink(
    caplog: pytest.LogCaptureFixture,
) -> None:
    probe = traffic(3000, 99, wrong_a=0.1, wrong_b=0.6)
    with caplog.at_level(logging.WARNING, logger="offramp"), watching(scripted(cache_ms=0.01)) as model:
        serve(model, traffic(300, 1))
        assert not model.report()["steps"]
        differ = [differing(model.rung.model, probe)]
        for seed in range(100):
            before = model.rung
            serve(model, traffic(50, seed, wrong_a=0.1, wrong_b=0.6))
            if model.rung is not before:
                differ.append(differing(model.rung.model, probe))
            if model.rung.name == "bypassed":
                break
        report = model.report()
    steps = report["steps"]
    path = ["certified", "tightened", "one cache off", "bypassed"]
    assert [step["before"] for step in steps] == path[:-1]
    assert [step["after"] for step in steps] == path[1:]
    for step in steps:
        assert step["evidence"]["evidence"] >= step["evidence"]["run_length"] == 1000
        assert step["evidence"]["disagreement"]["disagreements"] >= 4
        assert step["reason"] == "more requests disagree than the tolerance allows"
    assert all(0.7 < limit < 0.83 for limit in steps[0]["answers_from"].values()), "about the surer half of each"
    assert steps[1]["answers_from"] == {"A": steps[0]["answers_from"]["A"], "B": None}, "B is the worst"
    assert differ[0] > differ[1] > differ[2] > differ[3] == set()
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"{before} -> {after}" for before, after in itertools.pairwise(path)
    ]


def test_calm_traffic_takes_no_step() -> None:
    with watching(run_length=10_000) as model:
        serve(model, traffic(4000, 1, wrong_a=0.01, wrong_b=0.01))
        assert model.rung.name == "certified"
        assert model.report()["evidence"]["alarm"] < 10_000


def test_the_plan_returns_by_itself_when_traffic_is_good_again() -> None:
    with watching() as model:
        for _ in range(3):
            model.step_back()
        assert model.rung.name == "bypassed"
        serve(model, traffic(1000, 1, wrong_a=0.1, wrong_b=0.1))
        assert model.rung.name == "bypassed", "what the plan would have said is still beyond the tolerance"
        assert model.report()["disagreement"]["disagreements"] == 0, "and nothing of it was served"
        serve(model, traffic(1500, 2))
        steps = model.report()["steps"]
    assert [step["after"] for step in steps][2:] == ["certified"]
    assert steps[-1]["reason"] == "the plan disagrees less than the tolerance allows"
    assert steps[-1]["evidence"]["evidence"] >= 1000


def test_evidence_for_the_way_back_does_not_count_bypassed_batches_as_calm() -> None:
    with watching(scripted(bypass=(1, 8, 32))) as model:
        model.step_back()
        serve(model, traffic(1000, 1, wrong_a=0.5, wrong_b=0.5))
        assert model.rung.name == "tightened"
        assert model.report()["evidence"]["recovery"] < 10


def test_steps_by_hand_go_down_and_back() -> None:
    with watching() as model:
        serve(model, traffic(200, 1))
        names = []
        for _ in range(4):
            model.step_back("a test")
            names.append(model.rung.name)
        assert names == ["tightened", "bypassed", "bypassed", "bypassed"], "no disagreement says which is the worst"
        model.restore("enough")
        model.restore("no effect")
        x = traffic(200, 2)
        assert torch.equal(model.predict(x).left_at_B, scripted().predict(x).left_at_B)
        assert [step["reason"] for step in model.report()["steps"]] == ["a test", "a test", "enough"]


def test_what_would_not_pay_is_bypassed_at_once() -> None:
    with watching(scripted(cache_ms=0.9)) as model:
        serve(model, traffic(200, 1))
        model.step_back()
        assert model.rung.name == "bypassed", "a quarter of the hits do not pay for looking up both caches"


def test_answers_stored_before_a_step_are_not_given_after_it() -> None:
    cached, x = scripted(), traffic(100, 1, wrong_a=1.0, wrong_b=1.0)
    cached.result_cache = ResultCache(1 << 20)
    with watching(cached, shadow=0.001) as model:
        assert differing(cached, x)
        model(x)
        for _ in range(3):
            model.step_back()
        with torch.no_grad():
            assert torch.equal(model(x).argmax(1), cached.split_model.backbone(x).argmax(1))


def test_a_call_is_answered_from_one_rung_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 threads call while steps are taken: where the rows of a call left is what one rung says of all of them."""
    with watching(scripted(cache_ms=0.01), shadow=0.05, run_length=1e12) as model:
        rungs: dict[tuple[float, ...], Rung] = {model.rung.answers_from: model.rung}
        enter = model._ladder.enter

        def noted(rung: Rung) -> None:
            rungs.setdefault(rung.answers_from, rung)
            enter(rung)

        monkeypatch.setattr(model._ladder, "enter", noted)
        x = traffic(40, 1, wrong_a=0.2, wrong_b=0.2)
        over, answered = threading.Event(), threading.Semaphore(0)

        def call() -> list[tuple[int, ...]]:
            left = []
            while not over.is_set():
                left.append(tuple(model.predict(x).left_at_B.tolist()))
                answered.release()
            return left

        def wait_for_a_call_that_begins_now() -> None:
            while answered.acquire(blocking=False):
                pass
            for _ in range(17):  # one more than can be under way
                assert answered.acquire(timeout=60)

        with ThreadPoolExecutor(16) as pool:
            callers = [pool.submit(call) for _ in range(16)]
            for taken in range(1, 16):
                (model.restore if taken % 3 == 0 else model.step_back)()
                wait_for_a_call_that_begins_now()
            over.set()
            calls = [left for caller in callers for left in caller.result(60)]
        assert len(set(calls)) > 1
        assert set(calls) <= {tuple(rung.model.predict(x).left_at_B.tolist()) for rung in rungs.values()}
        assert model.report()["requests"] == 40 * len(calls)


# --- nothing of it is in the caller's way ---------------------------------------------------------


class Held:
    """Holds the backbone up, in the shadow only, until it is told to go on."""

    def __init__(self, cached: CachedModel) -> None:
        self.go, self.entered = threading.Event(), threading.Event()
        cached.split_model.backbone.register_forward_pre_hook(self._wait)

    def _wait(self, *_: object) -> None:
        if threading.current_thread().name == "offramp-shadow":
            self.entered.set()
            assert self.go.wait(60)


def test_shadows_that_do_not_fit_are_dropped_and_counted() -> None:
    cached, x = scripted(), traffic(10, 1)
    x[:, SURE_A] = 1
    held = Held(cached)
    with watching(cached, queue_size=3) as model:
        model(x)
        assert held.entered.wait(60)
        for _ in range(8):
            assert len(model(x)) == 10
        assert model.report()["dropped"] == 5 * 10
        x[:, [SURE_A, SURE_B]] = 0
        model(x)
        assert model.report()["dropped"] == 6 * 10, "what no cache answered is dropped alike"
        held.go.set()
        model.settle()
        assert model.report()["sampled"] == 4 * 10


def test_a_shadow_that_fails_counts_as_a_disagreement(caplog: pytest.LogCaptureFixture) -> None:
    cached, x = scripted(), traffic(10, 1)
    x[:4, SURE_A] = 1
    x[4:, [SURE_A, SURE_B]] = 0

    def fail(*_: object) -> None:
        if threading.current_thread().name == "offramp-shadow":
            raise RuntimeError("out of memory")

    cached.split_model.backbone.register_forward_pre_hook(fail)
    with caplog.at_level(logging.CRITICAL, logger="offramp"), watching(cached, run_length=1e9) as model:
        assert len(model(x)) == 10
        model.settle()
        report = model.report()
        assert (report["failed"], report["sampled"], report["disagreement"]["disagreements"]) == (4, 10, 4)
        model.settle()


def test_the_watch_survives_its_own_failures(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with caplog.at_level(logging.ERROR, logger="offramp"), watching() as model:
        with monkeypatch.context() as patched:
            patched.setattr(model, "_heed", lambda _told: 1 / 0)
            model(traffic(5, 1))
            model.settle()
        model(traffic(5, 1))
        model.settle()
        assert model.report()["sampled"] == 5
    assert [record.message for record in caplog.records] == [
        "the watch over a cached model failed on a call; the next ones are watched again"
    ]


def test_a_broken_cache_is_a_miss_as_before(caplog: pytest.LogCaptureFixture) -> None:
    cached, x = scripted(), traffic(40, 1)
    cached.caches[1].say = lambda _x: 1 / 0  # type: ignore[assignment]
    nan = x.clone()
    nan[:, SURE_A] = torch.nan
    with caplog.at_level(logging.CRITICAL, logger="offramp"), watching(cached) as model:
        assert set(model.predict(x).left_at_B.tolist()) == {0, 2}
        assert set(model.predict(nan).left_at_B.tolist()) == {2}
        model.step_back()
        assert set(model.predict(x).left_at_B.tolist()) <= {0, 2}
        model.settle()


def test_the_inputs_of_a_shadow_are_those_of_the_call() -> None:
    cached, x = scripted(), traffic(20, 1)
    x[:, SURE_A] = 1
    held = Held(cached)
    with watching(cached) as model:
        model(x)
        x.fill_(1.0)  # the caller's tensor, used again
        held.go.set()
        model.settle()
        assert model.report()["disagreement"]["disagreements"] == 0


def test_many_threads_are_counted_once_each() -> None:
    with watching(shadow=0.3, run_length=1e9, queue_size=10_000) as model:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda seed: model(traffic(1 + seed % 4, seed)), range(200)))
        model.settle()
        report = model.report()
        rows = sum(1 + seed % 4 for seed in range(200))
        assert report["requests"] == report["reservoir"]["seen"] == rows
        assert report["sampled"] + report["dropped"] == len(_Sampler(0.3, 0).take(rows))


# --- what is kept ---------------------------------------------------------------------------------


def test_recent_inputs_are_kept_within_bounds_in_the_form_of_the_example() -> None:
    with watching(reservoir_bytes=2 * 10 * 24) as model:
        for rows in traffic(35, 1).split(3):
            model(input=rows)
        assert model.reservoir is not None
        held = model.reservoir.inputs()
        assert held.args[0][-10:, NUMBER].tolist() == list(range(25, 35))
        assert model.report()["reservoir"] == {"rows": 20, "bytes": 480, "seen": 35}


def test_nothing_is_kept_where_nothing_is_to_be_kept() -> None:
    with watching(keep="nothing") as model:
        model(traffic(30, 1))
        model.settle()
        assert model.reservoir is None
        assert model.report()["reservoir"] is None
        numbers = {30 * 6, 6}
        kept = [value for value in vars(model).values() if isinstance(value, Tensor) and value.numel() in numbers]
        assert not kept
        assert model._queue.empty()


def test_a_reservoir_that_fails_is_given_up(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with caplog.at_level(logging.CRITICAL, logger="offramp"), watching() as model:
        monkeypatch.setattr(model.reservoir, "add", lambda _batch: 1 / 0)
        assert len(model(traffic(3, 1))) == 3
        assert model.reservoir is None
        assert len(model(traffic(3, 1))) == 3


def test_the_report_is_json_and_complete() -> None:
    with watching() as model:
        serve(model, traffic(100, 1))
        model.step_back()
        report = json.loads(json.dumps(model.report(), allow_nan=False))
    assert report["rung"] == "tightened"
    assert report["latency_ms"]["p50"] <= report["latency_ms"]["p99"]
    assert {"requests", "shadow", "sampled", "shadowed", "dropped", "failed", "alarms", "steps"} <= report.keys()
    assert report["disagreement"]["interval"] == [0, 1], "the watch began anew with the step"


def test_what_two_models_saw_can_be_merged() -> None:
    with watching() as one, watching(seed=1) as other:
        serve(one, traffic(100, 1))
        serve(other, traffic(50, 2))
        assert merge(one.monitor(), other.monitor()).sampled == 150
        assert one.latency().merged(other.latency()).quantile(0.5) is not None
        one.monitor().observe("A")
        assert one.report()["sampled"] == 100, "a copy"


# --- beginning and end ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shadow": 0.0}, "shadow is 0.0; expected a share"),
        ({"shadow": 1.5}, "shadow is 1.5; expected a share"),
        ({"queue_size": 0}, "queue_size is 0"),
        ({"run_length": 0}, "run_length is 0"),
        ({"reservoir_bytes": 10}, "10 bytes have no room"),
    ],
)
def test_senseless_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    threads = threading.active_count()
    with pytest.raises(InputError, match=message):
        online(scripted(), **wrong)
    assert threading.active_count() == threads


def test_a_plan_without_caches_is_served_as_well() -> None:
    empty = models.cached_model(scripted().split_model)
    x = traffic(30, 1)
    with offramp.online(empty, shadow=1.0) as model:
        assert torch.equal(model(x), models.plain(empty, x))
        model.settle()
        assert model.report()["disagreement"]["disagreements"] == model.report()["shadowed"] == 0
        model.step_back()
        assert torch.equal(model(x), models.plain(empty, x))


def test_closing_ends_the_thread_and_not_the_answers() -> None:
    cached, x = scripted(), traffic(10, 1)
    x[:, SURE_A] = 1
    held = Held(cached)
    model = online(cached, shadow=1.0)
    for _ in range(5):
        model(x)
    assert held.entered.wait(60)
    closing = threading.Thread(target=model.close)
    closing.start()
    while not model._closed:
        time.sleep(0.001)
    held.go.set()
    closing.join(60)
    assert not model._thread.is_alive()
    model.close()
    model.settle()
    assert len(model(x)) == 10
    report = model.report()
    assert (report["requests"], report["sampled"], report["dropped"]) == (60, 10, 40), "those that waited are dropped"


def test_a_process_ends_without_being_asked_to_close() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import in_service as here, offramp\n"
        "model = offramp.online(here.scripted(), shadow=1.0)\n"
        "for seed in range(20):\n    model(here.traffic(20, seed))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")


# --- near repeats ---------------------------------------------------------------------------------


def test_a_recent_cache_in_service_answers_when_it_has_been_shown_to_agree() -> None:
    """A camera whose pictures hardly change: all that is needed is known before it answers for the first time."""
    cached = scripted()
    cached.result_cache = recents = offramp.RecentCache(margin=0.0)
    scene = traffic(1, 3)
    scene[:, [SURE_A, SURE_B]] = 0.0  # no cache of the plan answers
    generator = torch.Generator().manual_seed(0)
    with watching(cached, run_length=200) as model, recents.stream("camera"):
        for _ in range(3000):
            picture = scene + 1e-4 * torch.rand(1, 6, generator=generator)
            prediction = model.predict(picture)
            model.settle()
            if model.rung.name == "with recent answers":
                break
            assert prediction.left_at_B.tolist() == [2], "the backbone's exit"
        assert recents.totals().would_be > 0
        left = {model.predict(scene).left_at_B.item() for _ in range(20)}
        assert 3 in left, "the exit of stored answers"
        model.settle()
        assert model.report()["caches"]["result"]["hits"] > 0
    other = torch.rand(1, 6, generator=generator)
    assert torch.equal(model(other), scripted()(other)), "outside of any stream nothing is stored or given"
