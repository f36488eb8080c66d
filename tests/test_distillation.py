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
from offramp.distillation import (
    Recipe,
    Stop,
    Training,
    TrainingLog,
    cache_logits,
    distillation_loss,
    graceful_stop,
    labelled,
    recipe_loss,
)
from offramp.errors import InputError
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


def sequences() -> Recording:
    random = np.random.default_rng(1)
    feature = random.standard_normal((ROWS, 3, FEATURES)).astype(np.float16)
    logits = feature[:, 0, :CLASSES].astype(np.float32)
    return cast(Recording, SimpleNamespace(features=[feature], logits_NC=logits, free_augmentations=()))


def make_over_positions() -> LearnedCache:
    torch.manual_seed(3)
    return LearnedCache("c", "p", CacheShape("mlp", 32), (3, FEATURES), CLASSES, reduction=Reduction())


def learn(cache: LearnedCache, recording: Recording, rows: int = 6000, **changed: Any) -> TrainingLog:
    seed = changed.pop("seed", 0)
    recipe = Recipe(rows=rows, batch_size=50, learning_rate=1e-2)
    return run(training(cache, recording, recipe, seed), **changed)


def training(cache: LearnedCache, recording: Recording, recipe: Recipe, seed: int = 0) -> Training:
    return Training(cache, recording, 0, np.arange(1600), recipe, seed=seed, device=torch.device("cpu"))


def run(training: Training, **changed: Any) -> TrainingLog:
    arguments: dict[str, Any] = {"time_limit_s": None, "stop": Stop(), "progress": Ticks(), **changed}
    return training.run(**arguments)


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


def test_what_a_cache_reads_is_no_part_of_its_training(recording: Recording) -> None:
    alone, reading = make(), make(reads="first")
    for cache in (alone, reading):
        learn(cache, recording, rows=1000)
    state = reading.state_dict()
    assert reading.blend == (1, 0)
    assert all(torch.equal(value, state[name]) for name, value in alone.state_dict().items())


def test_a_reading_cache_is_given_the_rows_that_it_is_asked_about(recording: Recording) -> None:
    cache, rows = make(reads="first").eval(), np.array([3, 1600, 7])
    cache.blend = (0.0, 1.0)
    every_NC = torch.from_numpy(recording.logits_NC)
    logits = cache_logits(cache, recording, 0, rows, lambda some: every_NC[some], torch.device("cpu"))
    torch.testing.assert_close(logits, every_NC[rows].log_softmax(1).clamp(min=-10))


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


def test_the_estimate_tells_the_first_pass_over_the_rows_from_later_ones(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([9.0, 1.0, 3.0, 2.0, 0.5, 0.5, 0.4])  # one step to warm up, three on new rows, three on the same again
    seen: list[tuple[int, ...]] = []
    clock = [0.0]

    def step(self: Training, index: Any, done: float) -> float:
        clock[0] += next(times)
        seen.append(tuple(index))
        return 0.0

    monkeypatch.setattr(distillation, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(Training, "step", step)
    # 1,600 rows in batches of 16: 100 steps are a pass, and 50 more follow.
    assert training(make(), recording, Recipe(rows=2400, batch_size=16)).estimated_seconds() == 2.0 * 100 + 0.5 * 50
    assert seen[1:4] == seen[4:]
    assert len(set(seen)) == 4


def test_rows_are_condensed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    condensed: list[int] = []
    condense = LearnedCache.condense

    def counted(self: LearnedCache, feature: Tensor) -> Tensor:
        condensed.append(len(feature))
        return condense(self, feature)

    monkeypatch.setattr(LearnedCache, "condense", counted)
    inputs = training(make_over_positions(), sequences(), Recipe(rows=100)).inputs
    assert inputs[np.array([3])].shape == (1, 2 * FEATURES), "mean and maximum"
    assert torch.equal(inputs[np.array([3, 5])], inputs[np.array([3, 5])])
    assert torch.equal(inputs[np.array([3, 4, 5])][[0, 2]], inputs[np.array([3, 5])])
    assert condensed == [1, 1, 1]


def test_what_does_not_fit_into_memory_is_condensed_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    once = learn(make_over_positions(), sequences())
    monkeypatch.setattr(distillation, "CONDENSED_LIMIT", 0)
    assert training(make_over_positions(), sequences(), Recipe(rows=100)).inputs.table is None
    each = learn(make_over_positions(), sequences())
    assert each.final_loss == pytest.approx(once.final_loss, rel=1e-6), "the same training"


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


# --- bfloat16 -------------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, **capabilities: Any) -> None:
    """A CPU with these capabilities."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


def test_a_recipe_may_do_without_bfloat16(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, amx_bf16=True)
    quick, full = make(), make()
    learn(quick, recording)
    run(training(full, recording, Recipe(rows=6000, batch_size=50, learning_rate=1e-2, bfloat16=False)))
    assert not torch.equal(quick.head.weight, full.head.weight)
    pretend(monkeypatch, amx_bf16=False)
    slow = make()
    learn(slow, recording)
    assert torch.equal(full.head.weight, slow.head.weight)


def test_training_in_bfloat16_leaves_float32_weights_that_agree(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 is for the steps alone: weights, the optimizer's state and all that a cache says stay float32."""
    heads: list[torch.dtype] = []
    states: list[torch.dtype] = []
    inner = Training.step

    def noted(self: Training, index: Any, done: float) -> float:
        hook = self.cache.head.register_forward_hook(lambda module, given, out: heads.append(out.dtype))
        loss = inner(self, index, done)
        hook.remove()
        states.extend(v.dtype for state in self.optimizer.state.values() for v in state.values() if v.ndim)
        return loss

    monkeypatch.setattr(Training, "step", noted)
    caches, logs = [], []
    for fast in (False, True):
        pretend(monkeypatch, amx_bf16=fast)
        heads.clear()
        caches.append(make())
        logs.append(learn(caches[-1], recording))
        assert set(heads) == {torch.bfloat16 if fast else torch.float32}
    slow, quick = caches
    assert set(states) == {torch.float32}
    assert {value.dtype for value in quick.state_dict().values()} == {torch.float32}
    assert not torch.equal(quick.head.weight, slow.head.weight), "it was trained another way"
    fresh = np.arange(1600, ROWS)
    assert cache_logits(quick, recording, 0, fresh, None, torch.device("cpu")).dtype == torch.float32
    assert agreement(quick, recording) > 0.9
    assert agreement(quick, recording) > agreement(slow, recording) - 0.03
    assert logs[1].final_loss == pytest.approx(logs[0].final_loss, rel=0.5)


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


# --- the losses of the published recipes ------------------------------------------------------------


def log_softmax(row: list[float], temperature: float) -> list[float]:
    total = math.log(sum(math.exp(value / temperature) for value in row))
    return [value / temperature - total for value in row]


def loss_by_hand(logits: Tensor, target: Tensor, hard: Tensor, alpha: float, temperature: float) -> float:
    total = 0.0
    for row, target_row, answer in zip(logits.tolist(), target.tolist(), hard.tolist(), strict=True):
        q, p = log_softmax(row, temperature), log_softmax(target_row, temperature)
        total += alpha * temperature**2 * sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        total -= (1 - alpha) * log_softmax(row, 1.0)[answer]
    return total / len(logits)


@pytest.mark.parametrize(
    ("alpha", "temperature"),
    [(0.5, 6.0), (1.0, 1.0), (0.0, 2.0), (0.3, 1.5)],
    ids=["gati", "selfxit", "branchynet", "-"],
)
def test_the_losses_of_the_papers_by_hand(alpha: float, temperature: float) -> None:
    random = torch.Generator().manual_seed(0)
    logits, target = (3 * torch.randn(7, CLASSES, generator=random) for _ in range(2))
    hard = torch.randint(0, CLASSES, (7,), generator=random)
    recipe = Recipe(100, alpha=alpha, temperature=temperature)
    expected = loss_by_hand(logits, target, hard, alpha, temperature)
    assert float(recipe_loss(logits, target, hard, recipe)) == pytest.approx(expected, rel=1e-5)


def test_our_own_recipe_is_distillation_alone() -> None:
    logits, target, nowhere = torch.randn(7, CLASSES), torch.randn(7, CLASSES), torch.full((7,), -1)
    recipe = Recipe(100)
    assert torch.equal(recipe_loss(logits, target, nowhere, recipe), distillation_loss(logits, target, 2.0))
    assert not recipe.on_labels


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_a_weight_that_is_no_share_is_refused(alpha: float) -> None:
    with pytest.raises(InputError, match="alpha weighs two losses"):
        Recipe(100, alpha=alpha)


def with_labels(recording: Recording, label_N: Any) -> Recording:
    return cast(Recording, SimpleNamespace(**vars(recording) | {"label_N": label_N}))


def test_labels_are_learned_from_the_rows_that_have_one(recording: Recording) -> None:
    """The labels are the answers, one class on; rows without one would teach something else."""
    label_N = (recording.logits_NC.argmax(1) + 1) % CLASSES
    label_N[::2] = -1
    given = with_labels(recording, label_N)
    recipe = Recipe(rows=6000, batch_size=50, learning_rate=1e-2, alpha=0.0, hard="label")
    assert recipe.on_labels
    cache = make()
    learning = training(cache, given, recipe)
    assert learning.rows.rows.tolist() == list(range(1, 1600, 2))
    for _ in range(recipe.steps):
        learning.step(learning.rows.next(), 0.3)
    fresh = np.arange(1600, ROWS)
    answer_N = cache_logits(cache.eval(), given, 0, fresh, None, torch.device("cpu")).argmax(1).numpy()
    assert (answer_N == (recording.logits_NC[fresh].argmax(1) + 1) % CLASSES).mean() > 0.9


def test_a_mixed_loss_learns_the_backbones_answer(recording: Recording) -> None:
    """Without labels: the recording has none to look at."""
    recipe = Recipe(rows=6000, batch_size=50, learning_rate=1e-2, alpha=0.5, temperature=6.0)
    cache = make()
    assert not recipe.on_labels
    run(training(cache, recording, recipe))
    assert agreement(cache, recording) > 0.9


def test_labels_that_cannot_be_learned_are_refused(recording: Recording) -> None:
    rows = np.arange(10)
    with pytest.raises(InputError, match="not every recorded input has one"):
        labelled(with_labels(recording, None), rows)
    with pytest.raises(InputError, match="0 training inputs have a label; expected whole numbers from 0 to 2"):
        labelled(with_labels(recording, np.full(ROWS, -1)), rows)
    with pytest.raises(InputError, match="10 training inputs have a label; the largest is 3; expected .* from 0 to 2"):
        labelled(with_labels(recording, np.full(ROWS, 3)), rows)
