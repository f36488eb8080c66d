"""Near repeats within a stream: what is near, audits, streams apart, silent until told; any failure is a miss."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import math
import pickle
import random
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import models
import numpy as np
import pytest
import torch
from models import Counting, cached_model, close, images, learned
from torch import Tensor

from offramp import RecentCache, online, profile
from offramp.caches import recent
from offramp.caches.recent import ENTRY_BYTES, STREAM_BYTES
from offramp.errors import InputError
from offramp.model import RESULT, CachedModel
from offramp.splitting import SplitModel, split
from offramp.streams import Batch

CLASSES = 3
QUICK: dict[str, Any] = {"distance": 0.1, "margin": 0.0, "agreements": 1, "max_gap": 16}


def answering(**settings: Any) -> RecentCache:
    cache = RecentCache(**(QUICK | settings))
    cache.answering = True
    return cache


def scene(number: int, shift: float = 0.0) -> Tensor:
    """(1, 16) numbers with a standard deviation of 1; scenes are far apart, `shift` is relative to that deviation."""
    x = torch.randn(16, generator=torch.Generator().manual_seed(number))
    return ((x - x.mean()) / x.std(correction=0) + shift)[None]


def sure(answer: int, confidence: float = 9.0) -> Tensor:
    """(1, C) logits."""
    return torch.eye(CLASSES)[answer][None] * confidence


class Served:
    """Puts rows to a cache with a model that answers `truth`; notes what was answered, and how."""

    def __init__(self, cache: RecentCache, key: object = "camera") -> None:
        self.cache, self.key = cache, key

    def __call__(self, x: Tensor, *answers: int, confidence: float = 9.0, context: str = "model") -> list[int | None]:
        """Per row the answer that the cache gave, or None where the row was run."""
        logits = torch.cat([sure(answer, confidence) for answer in answers])
        with self.cache.stream(self.key) if self.key is not None else nullcontext():
            recalled = self.cache.recall((x,), context, logits[:0])
        if recalled is None:
            return [None] * len(x)
        self.cache.remember(recalled, logits[recalled.run_A], torch.full((len(recalled.run_A),), 0.5))
        given = [*recalled.logits_HC.argmax(1).tolist(), *[None] * len(recalled.run_A)]
        return [given[at] for at in recalled.source_B.tolist()]


# --- what is near ---------------------------------------------------------------------------------


def test_a_new_entry_is_audited_first_and_then_answers() -> None:
    cache = answering(max_gap=64)
    serve = Served(cache)
    assert serve(scene(1), 2) == [None], "new"
    assert serve(scene(1), 2) == [None], "its audit"
    given = [serve(scene(1, 0.05), 2)[0] for _ in range(200)]
    assert given.count(2) > 180
    assert set(given) == {2, None}
    totals = cache.totals()
    assert (totals.rows, totals.hits, totals.run) == (202, given.count(2), 202 - given.count(2))
    assert (totals.audits, totals.audit_failures) == (1 + given.count(None), 0)


@pytest.mark.parametrize(("shift", "near"), [(0.0, True), (0.09, True), (0.11, False), (-0.5, False)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 255.0])
def test_the_distance_is_relative_to_the_contrast_of_the_entry(shift: float, near: bool, scale: float) -> None:
    cache = answering(distance=0.1)
    serve = Served(cache)
    serve(scale * scene(1), 0)
    serve(scale * scene(1, shift), 0)
    assert cache.totals().audits == near
    assert len(cache) == 2 - near


def test_the_nearest_entry_is_that_of_a_slow_search() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        entries = [
            recent._Entry(rng.normal(size=4).astype(np.float32), b"", float(rng.random()), b"", 0.0, 0, True, at, 1.0)
            for at in range(int(rng.integers(0, 6)))
        ]
        feature_S, distance = rng.normal(size=4).astype(np.float32), float(rng.random() * 3)
        (found,) = recent._nearest(feature_S[None], [1.0], [b""], entries, distance)
        best, expected = math.inf, None
        for entry in entries:
            apart = math.sqrt(
                sum((float(a) - float(b)) ** 2 for a, b in zip(entry.feature_S, feature_S, strict=True)) / 4
            )
            if apart < best:
                best, expected = apart, entry if apart <= distance * entry.contrast else None
        assert found is expected


def test_images_are_pooled_and_token_ids_must_be_equal() -> None:
    x = images(2)
    noisy = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    feature_BS, contrast_B, exact_B = recent._looked_at((x,))
    assert feature_BS.shape == (2, 3 * 64)
    assert exact_B == [b"", b""]
    assert contrast_B == pytest.approx(feature_BS.std(1).tolist(), rel=1e-5)
    cache = answering()
    serve = Served(cache)
    serve(x[:1], 0)
    serve(noisy[:1], 0)
    serve((x[:1] * 255).clamp(0, 255).byte(), 0)  # another type: another form
    assert (cache.totals().audits, len(cache)) == (1, 2)
    ids = torch.randint(0, 50, (1, 300), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, -1] += 1
    serve(ids, 0)
    serve(other, 0)
    assert cache.totals().audits == 1
    serve(ids.clone(), 0)
    assert cache.totals().audits == 2


def test_numbers_and_whole_numbers_have_to_fit_both() -> None:
    cache = answering()
    like = torch.empty(0, CLASSES)

    def put(x: Tensor, mask: Tensor) -> None:
        with cache.stream("s"):
            recalled = cache.recall((x, mask), "", like)
        assert recalled is not None
        cache.remember(recalled, sure(0), torch.ones(1))

    mask = torch.ones(1, 4, dtype=torch.bool)
    put(scene(1), mask)
    put(scene(1, 0.01), ~mask)
    put(scene(2), mask)
    assert cache.totals().audits == 0
    put(scene(1, 0.02), mask)
    put(scene(1, 0.02), ~mask)
    assert cache.totals().audits == 2


def test_what_is_constant_has_no_contrast_and_must_be_equal() -> None:
    cache = answering()
    serve = Served(cache)
    serve(torch.full((1, 16), 0.5), 0)
    serve(torch.full((1, 16), 0.5001), 0)
    assert cache.totals().audits == 0
    serve(torch.full((1, 16), 0.5), 0)
    assert cache.totals().audits == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_inputs_that_are_not_finite_are_neither_kept_nor_answered(bad: float) -> None:
    cache = answering(distance=1e6)
    serve = Served(cache)
    for shape in ((1, 400), (1, 3, 16, 16)):
        x = torch.randn(shape)
        x.view(-1)[300] = bad
        if bad == 3e38:
            x.view(-1)[::2] = bad  # finite, but its square is not
        for _ in range(3):
            assert serve(x, 0) == [None]
    assert (len(cache), cache.totals().audits, cache.on) == (0, 0, True)
    serve(torch.randn(shape), 0)
    assert serve(x, 0) == [None]
    assert (len(cache), cache.totals().audits) == (1, 0), "near to nothing, however far the distance reaches"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_not_kept_and_judge_nothing(bad: float) -> None:
    cache = answering()
    logits = torch.tensor([[0.0, bad, 1.0]])
    for _ in range(2):
        with cache.stream("s"):
            recalled = cache.recall((scene(1),), "", logits)
        assert recalled is not None
        cache.remember(recalled, logits, torch.ones(1))
        assert (len(cache), cache.totals().run > 0) == (0, True)
    serve = Served(cache, "s")
    serve(scene(1), 0, context="")
    with cache.stream("s"):
        recalled = cache.recall((scene(1),), "", logits[:0])
    assert recalled is not None
    cache.remember(recalled, logits, torch.ones(1))
    assert (len(cache), cache.totals().audits) == (1, 0)


# --- audits ---------------------------------------------------------------------------------------


class SlowOracle:
    """The rules once more, for one row at a time and scenes that are either the same or far apart."""

    def __init__(self, cache: RecentCache) -> None:
        self.cache, self.serial = cache, 0
        self.entries: list[dict[str, Any]] = []

    def __call__(self, number: int, answer: int, *, unsure: bool) -> int | None:
        entry = next((e for e in self.entries if e["scene"] == number), None)
        if entry is None:
            self._store(number, answer, unsure)
            return None
        self.entries.remove(entry)
        self.entries.insert(0, entry)
        drawn = recent._chance(self.cache.seed, entry["serial"], entry["hits"])
        if not entry["unsure"] and drawn >= 1 / entry["gap"]:
            entry["hits"] += 1
            given: int = entry["answer"]
            return given
        if answer == entry["answer"]:
            entry["hits"] += 1
            entry["gap"] = entry["gap"] if entry["unsure"] else min(entry["gap"] * 2, self.cache.max_gap)
            return None
        self.entries.remove(entry)
        self._store(number, answer, unsure)
        return None

    def _store(self, number: int, answer: int, unsure: bool) -> None:
        gap = 2.0 ** (1 - self.cache.agreements)
        self.entries.insert(
            0, {"scene": number, "answer": answer, "unsure": unsure, "gap": gap, "hits": 0, "serial": self.serial}
        )
        self.serial += 1
        del self.entries[self.cache.entries :]


@pytest.mark.parametrize("agreements", [1, 3])
@pytest.mark.parametrize("max_gap", [2, 8])
def test_a_replay_is_that_of_a_slow_oracle(agreements: int, max_gap: float) -> None:
    cache = answering(entries=5, agreements=agreements, max_gap=max_gap, margin=0.5, seed=7)
    serve, oracle = Served(cache), SlowOracle(cache)
    rng = random.Random(0)
    truth = [rng.randrange(CLASSES) for _ in range(8)]
    given = set()
    for _ in range(1000):
        number = min(int(rng.expovariate(0.4)), 7)
        if rng.random() < 0.03:
            truth[number] = rng.randrange(CLASSES)
        unsure = rng.random() < 0.1
        got = serve(scene(number, rng.uniform(-0.01, 0.01)), truth[number], confidence=0.2 if unsure else 9.0)
        assert got == [oracle(number, truth[number], unsure=unsure)]
        given.add(got[0])
    assert given == {None, *range(CLASSES)}, "all of it should happen, or the test shows little"
    assert cache.totals().audit_failures > 10
    assert cache.totals().evictions > 10


def test_disagreement_puts_the_new_answer_in_the_entrys_place_and_begins_anew() -> None:
    cache = answering(max_gap=64)
    serve = Served(cache)
    for _ in range(40):
        serve(scene(1), 0)
    given = [serve(scene(1), 1)[0] for _ in range(400)]
    change = given.index(None)
    assert set(given[:change]) <= {0}, "until the audit the old answer is given"
    assert given[change + 1] is None, "the new entry is audited first"
    assert set(given[change:]) == {1, None}
    assert (len(cache), cache.totals().audit_failures) == (1, 1)


def test_the_gap_is_bounded() -> None:
    cache = answering(max_gap=4)
    serve = Served(cache)
    for _ in range(10):
        serve(scene(1), 0)
    given = [serve(scene(1), 0)[0] for _ in range(1500)]
    assert given.count(None) / 1500 == pytest.approx(1 / 4, abs=0.04)
    never = answering(max_gap=1)
    assert {Served(never)(scene(1), 0)[0] for _ in range(50)} == {None}


def test_an_unsure_answer_is_not_given_however_often_it_agrees() -> None:
    cache = answering(margin=0.5)
    serve = Served(cache)
    given = [serve(scene(1), 0, confidence=0.3)[0] for _ in range(50)]
    assert given == [None] * 50
    assert cache.totals().audits == 49


def test_errors_are_estimated_without_bias() -> None:
    """Over many draws of the audits, for answers that change on their own: what was wrong, and what the audits say."""
    wrong, estimated = [], []
    for seed in range(40):
        cache = answering(max_gap=8, seed=seed)
        serve, rng = Served(cache), random.Random(0)
        errors = 0
        for _ in range(150):
            truth = int(rng.random() < 0.15)
            errors += serve(scene(1), truth)[0] not in (None, truth)
        wrong.append(errors)
        estimated.append(cache.totals().estimated_disagreements)
    error = np.std(np.subtract(estimated, wrong)) / math.sqrt(40)
    assert np.mean(wrong) > 5
    assert abs(np.mean(estimated) - np.mean(wrong)) < 3 * error


def test_an_audit_that_disagrees_stands_for_the_hits_that_were_not_audited() -> None:
    """Of the hits at a gap of g one in g is audited: itself, which got the right answer, and g - 1 others."""
    cache = answering(max_gap=2)
    serve = Served(cache)
    serve(scene(1), 0)
    serve(scene(1), 1)  # a gap of 1: every hit is audited
    assert cache.totals().estimated_disagreements == 0
    serve(scene(1), 1)  # agrees, so the gap is 2
    while serve(scene(1), 0)[0] is not None:
        pass
    assert cache.totals().audit_failures == 2
    assert cache.totals().estimated_disagreements == 1


def test_chance_is_uniform_and_independent() -> None:
    drawn = np.array([[recent._chance(0, serial, hits) for hits in range(50)] for serial in range(200)])
    assert 0 <= drawn.min() < drawn.max() < 1
    counts, _ = np.histogram(drawn, bins=20, range=(0, 1))
    assert abs(counts - 500).max() < 5 * math.sqrt(500)
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 0.04
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.04
    assert recent._chance(1, 0, 0) != recent._chance(0, 0, 0)


def test_rows_of_a_batch_learn_from_each_other() -> None:
    cache = answering(max_gap=64)
    serve = Served(cache)
    x = torch.cat([scene(1, 0.001 * row) for row in range(6)])
    assert serve(x, *[0] * 6) == [None] * 6
    assert (len(cache), cache.totals().audits) == (1, 5)
    assert serve(x, *[0] * 6).count(0) > 0


def test_equal_rows_of_a_batch_draw_one_after_the_other() -> None:
    answered = []
    for seed in range(20):
        cache = answering(seed=seed, max_gap=8)
        serve = Served(cache)
        serve(scene(1), 0)
        (entry,) = next(iter(cache._streams.values())).entries
        entry.gap = 8.0
        first = next(hits for hits in range(1000) if recent._chance(seed, entry.serial, hits) * 8 < 1)
        given = serve(scene(1).repeat(30, 1), *[0] * 30)
        assert given == [0] * first + [None] * (30 - first) if first < 30 else [0] * 30
        answered.append(first)
    assert len(set(answered)) > 5


def test_what_is_forgotten_between_look_up_and_decision_does_not_answer() -> None:
    cache = answering()
    known(cache, "camera")
    with cache.stream("camera"):
        stream = recent._stream_id("camera", (scene(1),), "model", torch.empty(0, CLASSES))
        seen = [row for _ in range(20) for row in cache._look_up(stream, (scene(1),))]
    assert any(row.answers for row in cache._decided(seen))
    cache.clear()
    assert not any(row.answers for row in cache._decided(seen))
    cache._learn(stream, seen[0], recent._Said(b"", 0.5, 1, True))
    assert (len(cache), cache.totals().audit_failures) == (1, 0)


def test_an_entry_that_is_due_is_due_for_all_rows_until_it_is_judged() -> None:
    cache = answering(seed=1)
    serve = Served(cache)
    serve(scene(1), 0)
    like = torch.empty(0, CLASSES)
    with cache.stream("camera"):
        pending = [cache.recall((scene(1).repeat(2, 1),), "model", like) for _ in range(3)]
    assert all(recalled is not None and len(recalled.run_A) == 2 for recalled in pending)
    for recalled in pending:
        assert recalled is not None
        cache.remember(recalled, sure(0).repeat(2, 1), torch.ones(2))
    (entry,) = cache._streams[next(iter(cache._streams))].entries
    assert (entry.gap, entry.hits) == (2.0, 1), "six audits of one hit count once"


# --- silent ---------------------------------------------------------------------------------------


def requests(seed: int, count: int) -> Iterator[tuple[Tensor, list[int]]]:
    rng = random.Random(seed)
    truth = [0] * 6
    for _ in range(count):
        numbers = [rng.randrange(6) for _ in range(rng.randrange(1, 4))]
        if rng.random() < 0.2:
            truth[rng.randrange(6)] = rng.randrange(CLASSES)
        yield torch.cat([scene(number) for number in numbers]), [truth[number] for number in numbers]


def test_silent_it_goes_the_same_way_and_counts_what_it_would_have_said() -> None:
    loud, silent = answering(seed=3), RecentCache(**QUICK, seed=3)
    assert not silent.answering
    hits = wrong = 0
    for x, truth in requests(0, 400):
        given = Served(loud)(x, *truth)
        assert Served(silent)(x, *truth) == [None] * len(x)
        hits += sum(answer is not None for answer in given)
        wrong += sum(answer not in (None, true) for answer, true in zip(given, truth, strict=True))
    one, other = loud.totals(), silent.totals()
    assert (other.hits, other.would_be, other.would_be_disagreements) == (0, hits, wrong)
    assert (one.hits, one.would_be, one.would_be_disagreements) == (hits, 0, 0)
    assert min(hits, wrong, other.audit_failures) > 10
    for name in ("entries", "bytes", "rows", "audits", "audit_failures", "estimated_disagreements", "evictions"):
        assert getattr(one, name) == getattr(other, name)
    assert (other.run, one.run) == (other.rows, one.rows - hits)


@pytest.mark.parametrize("speaks", [True, False])
def test_a_peek_tells_what_recall_would_say_and_changes_nothing(speaks: bool) -> None:
    cache, twin = answering(seed=5), answering(seed=5)
    cache.answering = speaks
    like, told = torch.empty(0, CLASSES), 0
    for x, truth in requests(1, 300):
        with cache.stream("camera"):
            peeked = [cache.peek((x,), "model", like) for _ in range(3)]
        expected = [None] * len(x)
        for found in peeked:
            assert found is not None
            answers = dict(zip(found.row_H.tolist(), found.logits_HC.argmax(1).tolist(), strict=True))
            assert found.confidence_H.tolist() == [0.5] * len(answers)
            expected = [answers.get(row) for row in range(len(x))]
            told += len(answers)
        assert Served(twin)(x, *truth) == expected
        Served(cache)(x, *truth)
    assert told > 30
    assert cache.totals().audits == twin.totals().audits


def test_a_peek_without_a_stream_a_model_without_one_and_one_of_another_kind() -> None:
    cache, x = answering(), scene(1)
    assert cache.peek((x,), "", torch.empty(0, CLASSES)) is None
    with cache.stream("s"):
        assert cache.peek((x[:0],), "", torch.empty(0, CLASSES)) is None
        found = cache.peek((x,), "", torch.empty(0, CLASSES))
    assert found is not None
    assert (found.row_H.tolist(), found.logits_HC.shape, found.confidence_H.shape) == ([], (0, CLASSES), (0,))


# --- streams --------------------------------------------------------------------------------------


def known(cache: RecentCache, key: object, number: int = 1) -> None:
    for _ in range(30):
        Served(cache, key)(scene(number), 0)


def hits(cache: RecentCache, key: object, number: int = 1, **more: Any) -> bool:
    return any(Served(cache, key)(scene(number), 0, **more) == [0] for _ in range(3))


def test_streams_and_models_do_not_see_each_other() -> None:
    cache = answering(max_gap=1e6)
    known(cache, "camera-7")
    assert hits(cache, "camera-7")
    assert Served(cache, "camera-8")(scene(1), 1) == [None]
    assert Served(cache, "camera-7")(scene(1), 1, context="another model") == [None]
    assert Served(cache, None)(scene(1), 1) == [None]
    assert hits(cache, "camera-7")
    totals = cache.totals()
    assert (totals.streams, totals.unkeyed, totals.audit_failures) == (3, 1, 0)


def test_the_innermost_stream_counts_and_holds_for_its_task_alone() -> None:
    cache = answering(max_gap=1e6)
    known(cache, "outer")
    trust(cache)

    def asked() -> bool:
        recalled = cache.recall((scene(1),), "model", torch.empty(0, CLASSES))
        return recalled is not None and len(recalled.logits_HC) == 1

    with RecentCache.stream("outer"):
        with pytest.raises(RuntimeError, match="inside"), cache.stream("inner"):
            assert not asked()
            raise RuntimeError("inside")
        assert asked()
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(asked).result(), "a new thread belongs to no stream"

    async def camera(key: str, others: asyncio.Barrier) -> bool:
        with cache.stream(key):
            await others.wait()
            return await asyncio.to_thread(asked)

    async def both() -> list[bool]:
        barrier = asyncio.Barrier(2)
        return list(await asyncio.gather(camera("outer", barrier), camera("elsewhere", barrier)))

    assert asyncio.run(both()) == [True, False]
    assert not asked()


@pytest.mark.parametrize(("key", "message"), [(None, "stream is None"), ([], "is a list, which cannot be hashed")])
def test_keys_that_tell_nothing_apart_are_refused(key: Any, message: str) -> None:
    with pytest.raises(InputError, match=message), RecentCache.stream(key):
        pass


# --- bounds ---------------------------------------------------------------------------------------


def test_a_stream_keeps_its_most_recently_used_entries() -> None:
    cache = answering(entries=3, max_gap=1e6)
    for number in (1, 2, 3):
        known(cache, "a", number)
    assert hits(cache, "a", 1)
    Served(cache, "a")(scene(4), 0)
    assert len(cache) == 3
    assert hits(cache, "a", 1)
    assert hits(cache, "a", 3)
    assert Served(cache, "a")(scene(2), 0) == [None]
    assert cache.totals().evictions == 2


def test_bytes_stay_within_the_bound_and_the_least_recently_used_stream_goes() -> None:
    entry = ENTRY_BYTES + 4 * 16 + 4 * CLASSES
    cache = answering(max_bytes=3 * (STREAM_BYTES + 60 + 2 * entry), max_gap=1e6)
    for key in "abc":
        known(cache, key, 1)
        known(cache, key, 2)
    assert cache.totals().streams == 3
    assert hits(cache, "a")
    known(cache, "d")
    assert [key for (key, _) in cache._streams] == ["c", "a", "d"]
    for number in range(300):
        Served(cache, number % 40)(scene(number), 0)
        totals = cache.totals()
        sizes = [stream.bytes for stream in cache._streams.values()]
        assert totals.bytes == sum(sizes) <= cache.max_bytes
        assert totals.entries == len(cache)
    alone = answering(max_bytes=STREAM_BYTES + 60 + 2 * entry)
    for number in range(5):
        Served(alone)(scene(number), 0)
    assert (len(alone), alone.totals().evictions) == (2, 3)
    tight = answering(max_bytes=entry)
    Served(tight)(scene(1), 0)
    assert (len(tight), tight.totals().bytes, tight.on) == (0, 0, True)


@pytest.mark.parametrize("per_stream", [1, 20])
def test_what_it_takes_is_estimated_honestly(per_stream: int) -> None:
    cache = answering(max_bytes=1 << 30)
    keys = [f"camera {number:06}" for number in range(1200 // per_stream)]
    numbers = iter(range(10**6))
    gc.collect()
    tracemalloc.start()
    for key in keys:
        x = torch.cat([scene(next(numbers)) for _ in range(per_stream)])
        Served(cache, key)(x, *[0] * per_stream)
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0] + sum(map(len, keys))
    tracemalloc.stop()
    assert len(cache) == 1200
    assert 0.8 * taken <= cache.totals().bytes <= 1.6 * taken


def test_clearing_forgets_and_the_totals_go_on() -> None:
    cache = answering()
    known(cache, "a")
    rows = cache.totals().rows
    cache.clear()
    assert (len(cache), cache.totals().bytes, cache.totals().streams, cache.totals().rows) == (0, 0, 0, rows)
    assert Served(cache, "a")(scene(1), 1) == [None]


def test_a_copy_begins_empty_and_silent_with_the_same_settings() -> None:
    cache = answering(max_bytes=99_999, distance=0.3, entries=7, margin=0.4, agreements=3, max_gap=5, seed=9)
    known(cache, "a")
    for copied in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (len(copied), copied.answering, copied.on) == (0, False, True)
        for name in ("max_bytes", "distance", "entries", "margin", "agreements", "max_gap", "seed"):
            assert getattr(copied, name) == getattr(cache, name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_bytes": 0}, "max_bytes is 0; expected a whole number of at least 1"),
        ({"max_bytes": 1e9}, "max_bytes is 1000000000.0; expected"),
        ({"entries": True}, "entries is True; expected"),
        ({"agreements": 0}, "agreements is 0; expected"),
        ({"distance": -0.1}, "distance -0.1"),
        ({"distance": math.nan}, "distance nan"),
        ({"margin": 1.1}, "margin 1.1"),
        ({"max_gap": 0.5}, "max_gap 0.5"),
        ({"max_gap": math.inf}, "max_gap inf"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RecentCache(**settings)


# --- in a model -----------------------------------------------------------------------------------


def remembering(cnn: SplitModel, **settings: Any) -> tuple[CachedModel, RecentCache]:
    """A cache at the second split point answers some rows."""
    torch.manual_seed(1)
    cached = cached_model(cnn, [learned(cnn.points[2], 5, "mlp")], [0.35])
    cached.result_cache = recents = answering(max_gap=1e6, **settings)
    return cached, recents


def trust(recents: RecentCache) -> None:
    """Hardly ever audit what is stored."""
    for stream in recents._streams.values():
        for entry in stream.entries:
            entry.gap = 1e9


def test_a_model_answers_near_repeats_of_the_stream_and_runs_the_rest(cnn: SplitModel) -> None:
    cached, recents = remembering(cnn)
    x, new = images(4), images(2, 9)
    with recents.stream("s"):
        first = cached.predict(x)
        trust(recents)
        near = x + 0.005 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        mixed = torch.stack([new[0], near[2], new[1], near[0]])
        with Counting(cnn) as rows:
            prediction = cached.predict(mixed)
    assert rows[0] == [2]
    assert [cached.exits[left] for left in prediction.left_at_B[[1, 3]]] == [RESULT] * 2
    assert RESULT not in [cached.exits[left] for left in prediction.left_at_B[[0, 2]]]
    assert torch.equal(prediction.output[[1, 3]], first.output[[2, 0]])
    assert torch.equal(prediction.confidence_B[[1, 3]], first.confidence_B[[2, 0]])
    cached.result_cache = None
    close(prediction.output[[0, 2]], cached(new))
    close(first.output, cached(x))


def test_without_a_stream_or_silent_a_model_answers_as_without_it(cnn: SplitModel) -> None:
    cached, recents = remembering(cnn)
    x = images(5)
    cached.result_cache = None
    expected = cached.predict(x)
    cached.result_cache = recents
    for _ in range(5):
        assert torch.equal(cached(x), expected.output)
    assert (len(recents), recents.totals().unkeyed) == (0, 25)
    recents.answering = False
    with recents.stream("s"):
        for _ in range(8):
            prediction = cached.predict(x)
            assert torch.equal(prediction.output, expected.output)
            assert torch.equal(prediction.left_at_B, expected.left_at_B)
        assert recents.totals().would_be > 10
        assert cached(x[:0]).shape == (0, 5)


def test_a_peek_through_the_model(cnn: SplitModel) -> None:
    cached, recents = remembering(cnn)
    x = images(3)
    batch = Batch((x,))
    with recents.stream("s"):
        prediction = cached.predict(x)
        trust(recents)
        peeked = cached.peek(batch)
        assert peeked is not None
        assert peeked.row_H.tolist() == [0, 1, 2]
        assert torch.equal(peeked.logits_HC, prediction.output)
        with pytest.raises(InputError, match="expected"):
            cached.peek(Batch((torch.zeros(2, 3, 8, 8),)))
    assert cached.peek(batch) is None
    cached.result_cache = None
    with recents.stream("s"):
        assert cached.peek(batch) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 6).to(dtype)
    cached = cached_model(split(models.mlp().to(dtype).eval(), x))
    cached.result_cache = recents = answering()
    with torch.inference_mode(), recents.stream("s"):
        first = cached(x)
        trust(recents)
        again = cached.predict(x)
    assert [cached.exits[left] for left in again.left_at_B] == [RESULT] * 6
    assert again.output.dtype == dtype
    assert torch.equal(again.output, first)
    with RecentCache.stream("s"):
        repeat = cached(x.clone().requires_grad_())
    assert not repeat.requires_grad


def test_a_profile_leaves_it_alone_and_the_service_asks_for_evidence(cnn: SplitModel) -> None:
    cached, recents = remembering(cnn)
    x = images(4)
    with recents.stream("s"):
        cached(x)
        trust(recents)
        totals = recents.totals()
        profile(cached, [x], batch_sizes=(2,), budget_s=0)
        assert recents.totals() == totals
        with online(cached, shadow=0.001) as served:
            assert RESULT not in [cached.exits[left] for left in served.predict(x).left_at_B]
            assert not recents.answering


def test_sixteen_threads_with_streams_of_their_own() -> None:
    cache = answering(entries=4, max_bytes=40_000)

    def camera(key: int) -> int:
        serve, given = Served(cache, key % 12), 0
        for turn in range(60):
            number = turn % 3
            answer = serve(scene(number), number)[0]
            assert answer in (None, number)
            given += answer is not None
        return given

    with ThreadPoolExecutor(16) as pool:
        given = sum(pool.map(camera, range(32)))
    totals = cache.totals()
    assert cache.on
    assert (totals.hits, totals.rows, totals.audit_failures) == (given, 32 * 60, 0)
    assert given > 100
    assert totals.bytes == sum(stream.bytes for stream in cache._streams.values()) <= 40_000


# --- fail closed ----------------------------------------------------------------------------------


def fails(*_: object, **__: object) -> None:
    raise RuntimeError("broken recent cache")


def break_looking(cache: RecentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "_looked_at", fails)


def break_storing(cache: RecentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_learn", fails)


def break_a_value(cache: RecentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in cache._streams.values():
        for entry in stream.entries:
            entry.value = b"damaged!"


def break_a_feature(cache: RecentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in cache._streams.values():
        stream.entries[0].feature_S = np.zeros(3, np.float32)


@pytest.mark.parametrize("damage", [break_looking, break_storing, break_a_value, break_a_feature])
def test_an_error_is_a_miss_and_switches_it_off(
    cnn: SplitModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[RecentCache, pytest.MonkeyPatch], None],
) -> None:
    cached, recents = remembering(cnn)
    x = images(5)
    cached.result_cache = None
    expected = cached(x)
    cached.result_cache = recents
    with recents.stream("s"), caplog.at_level(logging.ERROR, logger="offramp"):
        cached(x[:3])
        trust(recents)
        damage(recents, monkeypatch)
        for _ in range(3):
            close(cached(x), expected)
        assert cached.peek(Batch((x,))) is None
    assert [record.message for record in caplog.records] == ["the recent cache failed; it is switched off"]
    assert caplog.records[0].exc_info is not None, "the log says why"
    assert (recents.on, len(recents)) == (False, 0)


def test_a_failing_peek_is_no_error_either(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cache = answering()
    break_looking(cache, monkeypatch)
    with caplog.at_level(logging.ERROR, logger="offramp"), cache.stream("s"):
        assert cache.peek((scene(1),), "", torch.empty(0, CLASSES)) is None
    assert not cache.on
    assert len(caplog.records) == 1


def test_errors_of_the_model_are_not_swallowed(cnn: SplitModel) -> None:
    cached, recents = remembering(cnn)
    handle = cnn.stages[0].register_forward_pre_hook(fails)
    with recents.stream("s"), pytest.raises(RuntimeError, match="broken"):
        cached(images(2))
    handle.remove()
    assert (recents.on, len(recents)) == (True, 0)
