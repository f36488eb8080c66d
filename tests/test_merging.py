"""Calls from several threads whose misses run on together: everybody gets the model's own answers, and nobody waits in
vain. What runs when is fixed by events, not by time: a wait is either forbidden (0 ms) or longer than any test."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import models
import pytest
import torch
from models import Counting, FixedCache, cached_model, close, constant, images, learned, plain, say_class, thresholds_at
from torch import Tensor

from offramp import merging
from offramp.caches import LearnedCache
from offramp.caches.result import ResultCache
from offramp.errors import InputError
from offramp.merging import Merging, saved_ms
from offramp.model import CachedModel
from offramp.splitting import SplitModel
from offramp.types import Timing

FOREVER_MS = 60_000.0


@pytest.fixture(autouse=True)
def _pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting always pays, whatever the table says; `saved_ms` itself is imported by name above."""
    monkeypatch.setattr(merging, "saved_ms", lambda table, position, rows: FOREVER_MS + 1)


class Told(FixedCache):
    """Says what it is told, also to several threads at once."""

    def look_up(self, activation: Tensor, read_BC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.calls.append(len(activation))
        return self.say(activation), self.sure(activation)


class Reading(Told):
    """Keeps the first of the logits that it was given to read."""

    heard: list[float]

    def look_up(self, activation: Tensor, read_BC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert read_BC is not None
        self.heard = read_BC[:, 0].tolist()
        return super().look_up(activation)


def sure_of_positive(x: Tensor) -> Tensor:
    return (x.flatten(1).mean(1) > 0).float()


def at_the_input(cnn: SplitModel, confidence: Callable[[Tensor], Tensor] = sure_of_positive) -> CachedModel:
    return cached_model(cnn, [Told(cnn.points[0], 5, say_class(3), confidence)], [0.5])


class Together:
    """A cache's confidence, which none of so many calls is told before all have asked."""

    def __init__(self, calls: int) -> None:
        self.barrier = threading.Barrier(calls)

    def __call__(self, x: Tensor) -> Tensor:
        self.barrier.wait(30)
        return sure_of_positive(x)


def all_at_once(call: Callable[..., Any], inputs: list[Tensor]) -> list[Future[Any]]:
    with ThreadPoolExecutor(len(inputs)) as pool:
        return [pool.submit(call, x) for x in inputs]


def test_misses_of_all_calls_run_on_together(cnn: SplitModel) -> None:
    mixed = images(3, 4) + torch.tensor([-1.0, 1.0, -3.0]).view(3, 1, 1, 1)
    inputs = [-torch.ones(1, 3, 16, 16), mixed, -2 * torch.ones(2, 3, 16, 16)]
    cached = at_the_input(cnn, Together(3))
    with Counting(cnn) as rows:
        answers = all_at_once(Merging(cached, max_wait_ms=FOREVER_MS), inputs)
    assert rows == [[5]] * len(cnn.stages)
    for x, answer in zip(inputs, answers, strict=True):
        hit = sure_of_positive(x) == 1  # one of the six rows
        close(answer.result()[~hit], plain(cached, x)[~hit])
        assert answer.result()[hit].argmax(1).tolist() == [3] * int(hit.sum())


def test_a_call_on_its_own_does_not_wait(cnn: SplitModel) -> None:
    cached = at_the_input(cnn)
    merged = Merging(cached, max_wait_ms=FOREVER_MS)
    for x in (-torch.ones(2, 3, 16, 16), torch.ones(2, 3, 16, 16), images(5)):
        close(merged(x), cached(x))


def test_nobody_waits_for_a_call_that_finishes_elsewhere(cnn: SplitModel) -> None:
    """One misses and waits; the other is answered by the cache and leaves: the first goes on."""
    merged = Merging(at_the_input(cnn, Together(2)), max_wait_ms=FOREVER_MS)
    miss, hit = all_at_once(merged, [-torch.ones(1, 3, 16, 16), torch.ones(1, 3, 16, 16)])
    close(miss.result(30), plain(merged.cached, -torch.ones(1, 3, 16, 16)))
    assert hit.result(30).argmax(1).tolist() == [3]


def test_a_wait_ends(cnn: SplitModel) -> None:
    """The other call is held up in the cache, so only the time lets the first go on."""
    held, entered = threading.Event(), threading.Event()

    def confidence(x: Tensor) -> Tensor:
        if len(x) == 2:
            entered.set()
            held.wait(30)
        return torch.zeros(len(x))

    merged = Merging(at_the_input(cnn, confidence), max_wait_ms=1.0)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(merged, images(2))
        entered.wait(30)
        close(merged(images(1)), plain(merged.cached, images(1)))
        assert not late.done()
        held.set()
        close(late.result(30), plain(merged.cached, images(2)))


def test_no_more_than_max_rows_run_together(cnn: SplitModel) -> None:
    merged = Merging(at_the_input(cnn, Together(4)), max_wait_ms=FOREVER_MS, max_rows=4)
    with Counting(cnn) as rows:
        for answer in all_at_once(merged, [-torch.ones(n, 3, 16, 16) for n in (3, 3, 2, 5)]):
            answer.result(30)
    assert sum(rows[0]) == 13
    assert 5 in rows[0], "larger than allowed on its own, so it does not join"
    assert all(one <= 5 for one in rows[0])


def test_later_caches_answer_rows_that_run_together(cnn: SplitModel) -> None:
    """NaN of a first cache closes its row to them there too, and they read the logits of their own rows."""

    def nan_for_large(x: Tensor) -> Tensor:
        barrier.wait(30)
        return torch.where(x.flatten(1).mean(1) > 5, torch.nan, 0.0)

    barrier = threading.Barrier(2)
    first = Told(cnn.points[0], 5, lambda x: x[:, 0, 0, :5], nan_for_large)
    second = Reading(cnn.points[2], 5, say_class(4), constant(1.0))
    second.reads = first.name
    cached = cached_model(cnn, [first, second], [0.5, 0.5])
    inputs = [torch.full((1, 3, 16, 16), 9.0), torch.tensor([1.0, 9.0]).view(2, 1, 1, 1).expand(2, 3, 16, 16).clone()]
    large, mixed = (answer.result(30) for answer in all_at_once(Merging(cached, max_wait_ms=FOREVER_MS), inputs))
    close(large, plain(cached, inputs[0]))
    close(mixed[1:], plain(cached, inputs[1])[1:])
    assert mixed[0].argmax() == 4
    assert sorted(second.heard) == [1.0, 9.0, 9.0]


def test_many_threads_and_calls(cnn: SplitModel) -> None:
    torch.manual_seed(1)
    caches: list[LearnedCache] = [learned(cnn.points[0], 5, "student"), learned(cnn.points[2], 5, "mlp")]
    cached = cached_model(cnn, caches, thresholds_at(cnn, caches, [0.4, 0.5]))
    inputs = [images(1 + seed % 5, seed) for seed in range(320)]
    expected = [cached(x) for x in inputs]
    before = threading.active_count()
    for wait_ms in (0.0, 0.5):
        merged = Merging(cached, max_wait_ms=wait_ms, max_rows=12)
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(merged, inputs))
        for one, other in zip(answers, expected, strict=True):
            close(one, other)
        assert (merged._moving, merged._gatherings) == (0, {}), "nothing is left behind"
    assert threading.active_count() == before, "and no thread"


def test_modes_of_the_threads_do_not_mix(cnn: SplitModel) -> None:
    cached = at_the_input(cnn, Together(2))
    merged = Merging(cached, max_wait_ms=FOREVER_MS)

    def ask(inference: bool) -> Tensor:
        with torch.inference_mode(mode=inference):
            answer: Tensor = merged(-torch.ones(1, 3, 16, 16))
            return answer

    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, inference) for inference in (True, False)]
    weight = torch.ones(5, requires_grad=True)
    (answers[1].result() * weight).sum().backward()
    close(answers[0].result(), answers[1].result())


# --- errors ---------------------------------------------------------------------------------------


def test_wrong_input_fails_for_its_caller_alone(cnn: SplitModel) -> None:
    merged = Merging(at_the_input(cnn, Together(2)), max_wait_ms=FOREVER_MS)
    right = -torch.ones(1, 3, 16, 16)
    answers = all_at_once(merged, [right, torch.ones(1, 3, 8, 8), right, torch.zeros(1, 3, 16, 16).long()])
    close(answers[0].result(30), plain(merged.cached, right))
    close(answers[2].result(30), plain(merged.cached, right))
    for wrong in (answers[1], answers[3]):
        with pytest.raises(InputError, match="expected"):
            wrong.result(30)


def test_an_error_while_rows_run_together_reaches_everybody_and_nobody_later(cnn: SplitModel) -> None:
    merged = Merging(at_the_input(cnn, Together(3)), max_wait_ms=FOREVER_MS)
    handle = cnn.stages[1].register_forward_pre_hook(fails)
    try:
        answers = all_at_once(merged, [-torch.ones(1, 3, 16, 16)] * 3)
    finally:
        handle.remove()
    for answer in answers:
        with pytest.raises(RuntimeError, match="out of memory"):
            answer.result(30)
    for answer in all_at_once(merged, [-torch.ones(1, 3, 16, 16)] * 3):
        close(answer.result(30), plain(merged.cached, -torch.ones(1, 3, 16, 16)))


def fails(*_: object) -> None:
    raise RuntimeError("out of memory")


def test_when_the_call_that_leads_is_interrupted_the_others_go_on_alone(cnn: SplitModel) -> None:
    merged = Merging(at_the_input(cnn, Together(3)), max_wait_ms=FOREVER_MS)
    run = merged._run

    def interrupted(position: int, flights: list[Any]) -> None:
        raise KeyboardInterrupt

    merged._run = interrupted  # type: ignore[method-assign]
    answers = all_at_once(merged, [-torch.ones(1, 3, 16, 16)] * 3)
    merged._run = run  # type: ignore[method-assign]
    errors = [type(answer.exception()) for answer in answers]
    assert errors.count(KeyboardInterrupt) == 1
    for answer in answers:
        if answer.exception() is None:
            close(answer.result(), plain(merged.cached, -torch.ones(1, 3, 16, 16)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_wait_ms": -1.0}, "max_wait_ms is -1.0; expected milliseconds"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms is nan"),
        ({"max_rows": 1}, "max_rows is 1; expected at least 2"),
    ],
)
def test_arguments_that_do_not_fit(cnn: SplitModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Merging(at_the_input(cnn), **options)
    with pytest.raises(InputError, match="received a PlainCNN; expected the CachedModel"):
        Merging(models.PlainCNN())  # type: ignore[arg-type]


# --- where it pays --------------------------------------------------------------------------------


def priced(cnn: SplitModel, *times_ms: float) -> CachedModel:
    """Every stage takes this long at 1, 8 and 32 rows."""
    cached = at_the_input(cnn)
    times = {size: Timing(ms, ms, ms) for size, ms in zip((1, 8, 32), times_ms, strict=True)}
    stages = tuple(dataclasses.replace(stage, time_ms=times) for stage in cached.costs.stages)
    cached.costs = dataclasses.replace(cached.costs, stages=stages)
    return cached


def test_what_is_saved_is_the_fixed_share_of_the_later_stages(cnn: SplitModel) -> None:
    stages = len(cnn.stages)
    fixed = priced(cnn, 2.0, 2.0, 2.0).costs
    assert saved_ms(fixed, 0, 1) == pytest.approx(stages * 2 * 31 / 32)
    assert saved_ms(fixed, stages - 1, 8) == pytest.approx(2 * 24 / 32)
    assert saved_ms(priced(cnn, 1.0, 8.0, 32.0).costs, 0, 1) == pytest.approx(0), "as much per row as many"


def test_calls_wait_only_where_the_table_says_that_it_pays(cnn: SplitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "saved_ms", saved_ms)
    stages = len(cnn.stages)
    fixed = priced(cnn, 2.0, 2.0, 2.0)
    assert 1 in Merging(fixed, max_wait_ms=2.0)._pays[0]
    assert not Merging(fixed, max_wait_ms=2.0 * stages)._pays[0], "a wait costs more than it saves"
    assert not any(Merging(fixed, max_wait_ms=2.0)._pays[1:]), "no cache there: nobody gathers"
    assert not any(Merging(priced(cnn, 1.0, 8.0, 32.0), max_wait_ms=0.0)._pays)


def test_what_the_plan_bypasses_and_models_with_a_result_cache_go_to_the_model(cnn: SplitModel) -> None:
    cache = Told(cnn.points[0], 5, say_class(3), sure_of_positive)
    merged = Merging(cached_model(cnn, [cache], [0.5], bypass=(8,)), max_wait_ms=FOREVER_MS)
    assert torch.equal(merged(images(8)), plain(merged.cached, images(8)))
    assert merged(images(4)[:0]).shape == (0, 5)
    assert cache.calls == []
    repeats = at_the_input(cnn)
    repeats.result_cache = ResultCache(max_bytes=1 << 20)
    close(Merging(repeats, max_wait_ms=FOREVER_MS)(images(3)), repeats(images(3)))
