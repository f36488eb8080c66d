"""Distillation: the loss, learning an easy teacher, the same weights from the same seed, ending early."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import threading
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from offramp import distillation
from offramp.caches import CacheShape, LearnedCache, Reduction
from offramp.distillation import Recipe, Stop, TrainingLog, cache_logits, distillation_loss, graceful_stop, train
from offramp.recording import Recording

FEATURES, CLASSES, ROWS = 8, 3, 2000


@pytest.fixture(scope="module")
def recording() -> Recording:
    """Activations whose answer is a linear function of them."""
    random = np.random.default_rng(0)
    feature = random.standard_normal((ROWS, FEATURES)).astype(np.float16)
    logits = (4 * feature.astype(np.float32)) @ random.standard_normal((FEATURES, CLASSES)).astype(np.float32)
    return cast(Recording, SimpleNamespace(features=[feature], logits_NC=logits, free_augmentations=()))


class Ticks:
    """A progress bar that counts, and may do something at each step."""

    def __init__(self, stop: Stop | None = None, after: int = 0) -> None:
        self.stop, self.after, self.done, self.steps = stop, after, 0.0, 0

    def advance(self, units: float = 1) -> None:
        self.done += units
        self.steps += 1
        if self.stop is not None and self.steps == self.after:
            self.stop.requested = True

    def note(self, text: str) -> None:
        pass


def make(*, reads: str | None = None) -> LearnedCache:
    torch.manual_seed(3)
    shape = CacheShape("mlp", 32)
    return LearnedCache("c", "p", shape, (FEATURES,), CLASSES, reduction=Reduction(), reads=reads)


def learn(cache: LearnedCache, recording: Recording, rows: int = 6000, **changed: Any) -> TrainingLog:
    arguments: dict[str, Any] = {
        "seed": 0,
        "time_limit_s": None,
        "device": torch.device("cpu"),
        "stop": Stop(),
        "progress": Ticks(),
        **changed,
    }
    read_NC = arguments.pop("read_NC", None)
    recipe = Recipe(rows=rows, batch_size=50, learning_rate=1e-2)
    return train(cache, recording, 0, np.arange(1600), read_NC, recipe, **arguments)


def agreement(cache: LearnedCache, recording: Recording) -> float:
    """On the rows that training did not see."""
    fresh = np.arange(1600, ROWS)
    logits = cache_logits(cache, recording, 0, fresh, None, torch.device("cpu"))
    return float((logits.argmax(1).numpy() == recording.logits_NC[fresh].argmax(1)).mean())


def test_the_loss_is_the_divergence_by_hand() -> None:
    logits, target = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    temperature = 2.0
    by_hand = 0.0
    for row, target_row in zip(logits.tolist(), target.tolist(), strict=True):
        q = [math.exp(value / temperature) for value in row]
        p = [math.exp(value / temperature) for value in target_row]
        by_hand += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    expected = temperature**2 * by_hand / 2
    assert float(distillation_loss(logits, target, temperature)) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_loss(target, target, temperature)) == pytest.approx(0.0, abs=1e-6)


def test_a_cache_learns_an_easy_teacher(recording: Recording) -> None:
    cache, progress = make(), Ticks()
    before = agreement(make().eval(), recording)
    log = learn(cache, recording, progress=progress)
    assert agreement(cache, recording) > max(0.9, before + 0.2)
    assert log.steps == 120
    assert progress.done == pytest.approx(1)
    untrained = cache_logits(make().eval(), recording, 0, np.arange(1600), None, torch.device("cpu"))
    assert log.final_loss < 0.3 * distillation_loss(untrained, torch.from_numpy(recording.logits_NC[:1600]), 2.0)
    assert not cache.training
    assert cache.folded
    assert not any(parameter.requires_grad for parameter in cache.parameters())


def test_the_same_seed_gives_the_same_weights(recording: Recording) -> None:
    caches = [make(), make(), make()]
    for cache, seed in zip(caches, (0, 0, 1), strict=True):
        learn(cache, recording, rows=1000, seed=seed)
    one, same, other = ([*cache.state_dict().values()] for cache in caches)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_reading_cache_is_given_the_rows_of_its_batch(recording: Recording) -> None:
    cache = make(reads="first")
    read_NC = torch.from_numpy(recording.logits_NC)
    log = learn(cache, recording, rows=3000, read_NC=read_NC)
    rows = np.arange(1600, ROWS)
    logits = cache_logits(cache, recording, 0, rows, read_NC[1600:], torch.device("cpu"))
    assert float((logits.argmax(1) == read_NC[1600:].argmax(1)).double().mean()) > 0.9
    assert math.isfinite(log.final_loss)


def test_a_stop_ends_training_with_what_there_is(recording: Recording) -> None:
    stop = Stop()
    cache = make()
    log = learn(cache, recording, stop=stop, progress=Ticks(stop, after=7))
    assert log.steps == 7
    assert not cache.training
    assert cache.folded
    assert learn(make(), recording, stop=stop).steps == 0
    assert math.isnan(learn(make(), recording, stop=stop).final_loss)


def test_a_time_limit_shortens_the_schedule(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock takes a second; the learning rate still falls to its end."""
    clock = itertools.count()
    monkeypatch.setattr(distillation, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    rates: list[float] = []
    real = distillation._schedule

    def noted(done: float, warm_up: float) -> float:
        rates.append(done)
        return real(done, warm_up)

    monkeypatch.setattr(distillation, "_schedule", noted)
    log = learn(make(), recording, time_limit_s=20.0)
    assert log.steps == 19
    assert rates == pytest.approx([step / 20 for step in range(1, 20)])


def test_the_schedule_rises_then_falls_to_nothing() -> None:
    factors = [distillation._schedule(done / 100, 0.2) for done in range(101)]
    assert factors.index(max(factors)) == 20
    assert factors[:21] == sorted(factors[:21])
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert factors[-1] == pytest.approx(0)


def test_every_row_is_seen_once_per_pass() -> None:
    rows = distillation._Rows(np.arange(10, 30), 5, seed=0)
    for _ in range(3):
        seen = np.concatenate([rows.next() for _ in range(4)])
        assert sorted(seen.tolist()) == list(range(10, 30))
    assert len(distillation._Rows(np.arange(3), 128, seed=0).next()) == 3, "fewer rows than a batch"


def test_logits_of_recorded_rows_do_not_depend_on_the_chunks(recording: Recording) -> None:
    cache = make().eval()
    every = cache_logits(cache, recording, 0, np.arange(ROWS), None, torch.device("cpu"))
    some: Tensor = cache_logits(cache, recording, 0, np.array([3, 299, 300]), None, torch.device("cpu"))
    torch.testing.assert_close(every[[3, 299, 300]], some)


# --- Ctrl-C ---------------------------------------------------------------------------------------


def test_the_first_interrupt_asks_and_the_second_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with graceful_stop() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_handler_is_restored_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with contextlib.suppress(RuntimeError), graceful_stop():
        assert signal.getsignal(signal.SIGINT) is not before
        raise RuntimeError("inside")
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_signals_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def inside() -> None:
        with graceful_stop() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [(False, True)]
