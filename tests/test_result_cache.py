"""Answers given before: repeats get them bit for bit, near repeats by a frozen table; any failure is a miss."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import logging
import pickle
import sys
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from models import (
    ALWAYS,
    NEVER,
    Counting,
    FixedCache,
    bare,
    cached_model,
    close,
    constant,
    images,
    in_a_dict,
    in_a_tuple,
    learned,
    plain,
    say_class,
    thresholds_at,
)
from torch import Tensor
from torch.utils import _pytree as pytree

from offramp import ResultCache, load, save
from offramp.caches import KeyCache, LearnedCache, build_cache
from offramp.caches.result import ENTRY_BYTES, KEY_BYTES, Recalled, _majorities, row_keys
from offramp.errors import InputError
from offramp.model import BACKBONE, RESULT, CachedModel
from offramp.splitting import SplitModel, split
from offramp.types import Plan

LOGITS = torch.empty(0, 5)


@pytest.fixture(scope="module")
def two(cnn: SplitModel) -> list[LearnedCache]:
    torch.manual_seed(1)
    return [learned(cnn.points[0], 5, "student"), learned(cnn.points[2], 5, "mlp")]


def remembering(cnn: SplitModel, two: list[LearnedCache], max_bytes: int = 1 << 20) -> CachedModel:
    """Some rows leave at either cache, some at the backbone."""
    cached = cached_model(cnn, two, thresholds_at(cnn, two, [0.3, 0.4]))
    cached.result_cache = ResultCache(max_bytes=max_bytes)
    return cached


def results(cached: CachedModel) -> ResultCache:
    assert isinstance(cached.result_cache, ResultCache)
    return cached.result_cache


def exits(cached: CachedModel, x: Tensor) -> list[str]:
    return [cached.exits[left] for left in cached.predict(x).left_at_B.tolist()]


def recall(cache: ResultCache, x: Tensor) -> Recalled:
    recalled = cache.recall((x,), "test", LOGITS)
    assert recalled is not None
    return recalled


def ask(cache: ResultCache, *numbers: int) -> list[bool]:
    """One row per number, asked and answered one by one; which of them were hits."""
    found = []
    for number in numbers:
        recalled = recall(cache, torch.tensor([[float(number)]]))
        found.append(len(recalled.logits_HC) == 1)
        answers = torch.full((len(recalled.run_A), 5), float(number))
        cache.remember(recalled, answers, torch.ones(len(answers)))
    return found


# --- exact repeats --------------------------------------------------------------------------------


def test_a_repeat_gets_its_answer_bit_for_bit_however_it_comes(cnn: SplitModel, two: list[LearnedCache]) -> None:
    cached = remembering(cnn, two)
    x = images(12)
    first = cached.predict(x)
    assert len(set(first.left_at_B.tolist())) == 3, "all exits should be used, or the test shows little"
    order = torch.tensor([7, 0, 11, 3])
    repeat = cached.predict(x[order].to(memory_format=torch.channels_last))
    assert torch.equal(repeat.output, first.output[order])
    assert torch.equal(repeat.confidence_B, first.confidence_B[order])
    assert torch.equal(repeat.answer_B, first.answer_B[order])
    assert [cached.exits[left] for left in repeat.left_at_B] == [RESULT] * 4
    for row in range(12):
        assert torch.equal(cached(x[row : row + 1]), first.output[row : row + 1])


def test_first_answers_are_those_without_a_result_cache(cnn: SplitModel, two: list[LearnedCache]) -> None:
    cached = remembering(cnn, two)
    x = images(12)
    with_cache = cached.predict(x)
    cached.result_cache = None
    without = cached.predict(x)
    assert torch.equal(with_cache.output, without.output)
    assert torch.equal(with_cache.left_at_B, without.left_at_B)
    assert torch.equal(with_cache.confidence_B, without.confidence_B)


def test_known_rows_leave_and_the_rest_runs_as_a_smaller_batch(cnn: SplitModel) -> None:
    cache = FixedCache(cnn.points[1], 5, say_class(3), constant(0.0))
    cached = cached_model(cnn, [cache], [0.5])
    cached.result_cache = ResultCache()
    known, new = images(3, 5), images(4, 6)
    before = cached(known)
    mixed = torch.stack([new[0], known[2], new[1], new[2], known[0], new[3]])
    with Counting(cnn) as rows:
        prediction = cached.predict(mixed)
    assert rows == [[4]] * len(cnn.stages)
    assert cache.calls == [3, 4]
    assert [cached.exits[left] for left in prediction.left_at_B] == [
        *(BACKBONE, RESULT, BACKBONE, BACKBONE, RESULT, BACKBONE)
    ]
    assert torch.equal(prediction.output[[1, 4]], before[[2, 0]])
    close(prediction.output[[0, 2, 3, 5]], plain(cached, new))


def test_equal_rows_of_a_batch_run_once(cnn: SplitModel, two: list[LearnedCache]) -> None:
    cached = remembering(cnn, two)
    x = images(3)
    with Counting(cnn) as rows:
        prediction = cached.predict(x[[0, 1, 0, 2, 1, 0]])
    assert rows[0][0] <= 3
    close(prediction.output, plain_or_cached(cached, x)[[0, 1, 0, 2, 1, 0]])
    for one, other in ((0, 2), (0, 5), (1, 4)):
        assert torch.equal(prediction.output[one], prediction.output[other])
        assert prediction.left_at_B[one] == prediction.left_at_B[other]
    totals = results(cached).totals()
    assert (totals.rows, totals.hits, totals.run, totals.entries) == (6, 0, 3, 3)


def plain_or_cached(cached: CachedModel, x: Tensor) -> Tensor:
    """What the model answers without its result cache."""
    kept, cached.result_cache = cached.result_cache, None
    output: Tensor = cached(x)
    cached.result_cache = kept
    return output


def test_all_rows_known_runs_nothing(cnn: SplitModel, two: list[LearnedCache]) -> None:
    cached = remembering(cnn, two)
    x = images(5)
    first = cached(x)
    with Counting(cnn) as rows:
        assert torch.equal(cached(x), first)
    assert rows == [[]] * len(cnn.stages)


@pytest.mark.parametrize("form", [bare, in_a_tuple, in_a_dict])
@pytest.mark.parametrize("threshold", [ALWAYS, NEVER])
def test_the_output_has_the_backbones_type(form: Callable[[Tensor, Tensor], object], threshold: float) -> None:
    torch.manual_seed(0)
    backbone = models.Wrapped(form).eval()
    x = torch.randn(5, 6)
    split_model = split(backbone, x)
    cached = cached_model(split_model, [learned(split_model.points[0], 3)], [threshold])
    expected = cached(x)
    cached.result_cache = ResultCache()
    for rows in (x[:2], x, x):  # nothing known, a part, everything
        output = cached(rows)
        assert type(output) is type(expected)
        leaves, expected_leaves = pytree.tree_leaves(output), pytree.tree_leaves(expected)
        assert [type(leaf) for leaf in leaves] == [type(leaf) for leaf in expected_leaves]
        close(leaves[0], expected_leaves[0][: len(rows)])


def test_a_model_of_transformers_keeps_its_output_type_and_heeds_all_inputs() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `hf`)")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    backbone = transformers.BertForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.randint(1, 40, (6, 7)), "attention_mask": torch.ones(6, 7, dtype=torch.long)}
    split_model = split(backbone, inputs)
    cached = cached_model(split_model, [learned(split_model.points[1], 3, "mlp")], [0.5])
    cached.result_cache = ResultCache()
    first = cached(**{name: value[:4] for name, value in inputs.items()})
    output = cached(**inputs)
    assert type(output) is type(backbone(**inputs))
    assert torch.equal(output.logits[:4], first.logits)
    inputs["attention_mask"][0, 4:] = 0
    assert cached.exits[cached.predict(**inputs).left_at_B[0]] != RESULT, "the mask is part of the input"
    assert cached.exits[cached.predict(**inputs).left_at_B[1]] == RESULT


def test_arguments_by_position_or_by_name_are_the_same_input() -> None:
    torch.manual_seed(0)
    ids, mask = torch.randint(0, 50, (6, 9)), torch.ones(6, 9, dtype=torch.long)
    cached = cached_model(split(models.MaskedEncoder().eval(), (ids, mask)))
    cached.result_cache = ResultCache()
    first = cached(ids, mask)
    for other in (cached.predict(ids, attention_mask=mask), cached.predict(attention_mask=mask, input_ids=ids)):
        assert torch.equal(other.output, first)
        assert [cached.exits[left] for left in other.left_at_B] == [RESULT] * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 6).to(dtype)
    cached = cached_model(split(models.mlp().to(dtype).eval(), x))
    cached.result_cache = ResultCache()
    first = cached(x)
    repeat = cached(x[[5, 0]])
    assert repeat.dtype == dtype
    assert torch.equal(repeat.view(torch.uint8), first[[5, 0]].view(torch.uint8))


def test_the_share_of_disagreements_is_that_of_the_plan(cnn: SplitModel, two: list[LearnedCache]) -> None:
    """Over traffic with repeats, request by request: what the certificate's bound rests on."""
    pool, seed = images(40), np.random.default_rng(0)
    traffic = pool[torch.from_numpy(seed.zipf(1.5, 300) % 40)]
    cached = remembering(cnn, two, max_bytes=10 * (ENTRY_BYTES + 20))  # with evictions
    answers = torch.cat([cached(batch).argmax(1) for batch in traffic.split(7)])
    assert results(cached).totals().hits > 50
    assert results(cached).totals().evictions > 10
    disagrees = answers != plain(cached, traffic).argmax(1)
    expected = plain_or_cached(cached, traffic).argmax(1) != plain(cached, traffic).argmax(1)
    assert expected.any()
    assert torch.equal(disagrees, expected)


# --- where it stands among the rest ---------------------------------------------------------------


def test_without_it_the_exits_are_the_caches_and_the_backbone(cnn: SplitModel, two: list[LearnedCache]) -> None:
    cached = remembering(cnn, two)
    names = tuple(cache.name for cache in two)
    assert cached.exits == (*names, BACKBONE, RESULT)
    cached.result_cache = None
    assert cached.exits == (*names, BACKBONE)
    assert cached_model(cnn, two, [0.5, 0.5]).result_cache is None


def test_a_bypassed_or_empty_plan_is_remembered_as_well(cnn: SplitModel, two: list[LearnedCache]) -> None:
    x = images(8)
    for cached in (cached_model(cnn), cached_model(cnn, two, [ALWAYS] * 2, bypass=(8,))):
        cached.result_cache = ResultCache()
        first = cached(x)
        close(first, plain(cached, x))
        assert torch.equal(cached(x), first)
        assert exits(cached, x) == [RESULT] * 8
        assert torch.equal(cached(x[:1]), first[:1]), "at a batch size that is not bypassed"


def test_another_plan_or_model_never_matches(cnn: SplitModel, two: list[LearnedCache]) -> None:
    cached = remembering(cnn, two)
    other = cached_model(cnn, two, [NEVER] * 2)
    other.result_cache = cached.result_cache
    x = images(4)
    cached(x)
    assert RESULT not in exits(other, x)
    assert exits(other, x) == exits(cached, x) == [RESULT] * 4
    close(other(x), plain(other, x))
    kept = cached.plan
    cached.plan = dataclasses.replace(kept, estimated_cost=0.123)
    assert RESULT not in exits(cached, x)
    cached.plan = kept
    assert exits(cached, x) == [RESULT] * 4


def test_it_is_not_saved_and_a_copy_begins_empty(cnn: SplitModel, two: list[LearnedCache], tmp_path: Path) -> None:
    cached = remembering(cnn, two, max_bytes=12_345)
    cached(images(4))
    save(cached, tmp_path / "model")
    assert load(tmp_path / "model", cnn.backbone).result_cache is None
    for copied in (copy.deepcopy(results(cached)), pickle.loads(pickle.dumps(results(cached)))):
        assert copied is not None
        assert (len(copied), copied.max_bytes, copied.on) == (0, 12_345, True)
    assert len(results(cached)) == 4


def test_a_copy_of_the_model_does_not_get_the_first_ones_answers(cnn: SplitModel, two: list[LearnedCache]) -> None:
    cached, x = remembering(cnn, two), images(4)
    cached(x)
    copied = copy.deepcopy(cached)
    copied.result_cache = cached.result_cache
    assert RESULT not in exits(copied, x)
    assert exits(cached, x) == [RESULT] * 4


def test_empty_batches_and_wrong_inputs_are_as_without(cnn: SplitModel, two: list[LearnedCache]) -> None:
    cached = remembering(cnn, two)
    assert cached(images(4)[:0]).shape == (0, 5)
    assert len(cached.predict(images(4)[:0]).left_at_B) == 0
    for call in (cached, cached.predict):
        with pytest.raises(InputError, match="expected"):
            call(torch.zeros(2, 3, 8, 8))
    assert results(cached).on


def test_under_inference_mode_and_with_gradients_on(cnn: SplitModel, two: list[LearnedCache]) -> None:
    cached = remembering(cnn, two)
    x = images(5)
    with torch.inference_mode():
        first = cached(x[:3])
    repeat = cached(x.clone().requires_grad_())
    assert torch.equal(repeat[:3], first)
    assert not repeat.requires_grad


# --- keys -----------------------------------------------------------------------------------------


def test_type_shape_and_every_byte_belong_to_the_key() -> None:
    zeros = torch.zeros(1, 6)
    rows = [
        zeros,
        zeros.reshape(1, 2, 3),
        zeros.reshape(1, 3, 2),
        zeros.int(),
        torch.zeros(1, 3, dtype=torch.float64),
        -zeros,
        zeros.index_fill(1, torch.tensor(5), 1e-30),
    ]
    keys = [row_keys((row,), "")[0] for row in rows]
    keys += [row_keys((zeros,), "another model")[0], row_keys((zeros, zeros), "")[0]]
    assert len(set(keys)) == len(keys)


def test_memory_layout_and_neighbours_do_not_belong_to_the_key() -> None:
    x = images(6)
    expected = row_keys((x,), "")
    assert len(set(expected)) == 6
    for form in (x.to(memory_format=torch.channels_last), torch.stack([x, x], dim=-1)[..., 0]):
        assert row_keys((form,), "") == expected
    assert row_keys((x[[4, 1]],), "") == [expected[4], expected[1]]
    pairs = [row_keys((x[row : row + 1], x[row : row + 1, 0]), "")[0] for row in range(6)]
    assert pairs == row_keys((x, x[:, 0]), "")
    assert len(row_keys((torch.zeros(3), torch.zeros(3, 0), torch.ones(3, dtype=torch.bool)), "")) == 3


# --- bounds, order, statistics --------------------------------------------------------------------


def test_the_least_recently_used_answer_leaves_first() -> None:
    cache = ResultCache(3 * (ENTRY_BYTES + 20))
    assert ask(cache, 1, 2, 3) == [False] * 3
    assert ask(cache, 1) == [True]
    assert ask(cache, 4) == [False]  # takes the place of 2
    assert ask(cache, 3, 1, 4) == [True] * 3
    assert ask(cache, 2) == [False]  # takes the place of 3
    assert ask(cache, 1, 4, 3) == [True, True, False]
    assert cache.totals().evictions == 3


def test_bytes_stay_within_the_bound() -> None:
    limit = 10 * ENTRY_BYTES
    cache = ResultCache(limit)
    for number in range(50):
        ask(cache, number)
        totals = cache.totals()
        assert totals.bytes <= limit
        assert totals.bytes == sum(entry.bytes for entry in cache.entries())
    assert totals.entries == limit // (ENTRY_BYTES + 20)
    tight = ResultCache(ENTRY_BYTES + 19)
    ask(tight, 1)
    assert (len(tight), tight.totals().evictions, tight.on) == (0, 0, True)


@pytest.mark.parametrize("count", [1500, 3000])
def test_what_an_entry_takes_is_estimated_honestly(count: int) -> None:
    cache = ResultCache(1 << 30)
    gc.collect()
    tracemalloc.start()
    for start in range(0, count, 50):
        recalled = recall(cache, torch.arange(start, start + 50.0)[:, None])
        cache.remember(recalled, torch.rand(50, 5), torch.rand(50))
    del recalled
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(cache) == count
    assert taken <= cache.totals().bytes <= 1.6 * taken


def test_statistics_of_entries_and_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100, 200))
    monkeypatch.setattr("offramp.caches.result.time.time", lambda: float(next(clock)))
    cache = ResultCache()
    ask(cache, 1)  # looked up at 100, stored at 101
    ask(cache, 2)
    ask(cache, 1, 1)  # 104 and, its empty rest stored at 105, 106
    first, second = cache.entries()
    assert (first.hits, first.stored, first.used) == (0, 103.0, 103.0)
    assert (second.hits, second.stored, second.used) == (2, 101.0, 106.0)
    totals = cache.totals()
    assert (totals.entries, totals.rows, totals.hits, totals.run, totals.evictions) == (2, 4, 2, 2, 0)
    assert totals.lookup_s > 0
    assert totals.saved_s > 0
    cache.clear()
    assert (len(cache), cache.totals().bytes, cache.totals().rows) == (0, 0, 4)


@pytest.mark.parametrize("max_bytes", [0, -1, ENTRY_BYTES, 1e9, True, "64 MiB", None])
def test_a_bound_that_holds_nothing_is_refused(max_bytes: Any) -> None:
    with pytest.raises(InputError, match=f"max_bytes is {max_bytes!r}; expected a whole number of bytes above"):
        ResultCache(max_bytes)


def test_what_is_no_result_cache_is_refused(cnn: SplitModel) -> None:
    with pytest.raises(InputError, match="result_cache is a dict; expected an offramp.ResultCache, a Recent"):
        cached_model(cnn).result_cache = {}  # type: ignore[assignment]


# --- threads --------------------------------------------------------------------------------------


def test_sixteen_threads_get_their_own_answers(cnn: SplitModel, two: list[LearnedCache]) -> None:
    cached = remembering(cnn, two, max_bytes=15 * (ENTRY_BYTES + 20))
    pool = images(30)
    expected = plain_or_cached(cached, pool)
    random = torch.Generator().manual_seed(0)
    requests = [torch.randint(0, 30, (1 + number % 5,), generator=random) for number in range(160)]

    def ask_model(rows: Tensor) -> Tensor:
        output: Tensor = cached(pool[rows])
        return output

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(16) as threads:
            answers = list(threads.map(ask_model, requests))
    finally:
        sys.setswitchinterval(interval)
    for rows, answer in zip(requests, answers, strict=True):
        close(answer, expected[rows])
    totals = results(cached).totals()
    assert results(cached).on
    assert totals.rows == sum(map(len, requests))
    assert totals.hits > 0
    assert totals.evictions > 0
    assert totals.bytes == sum(entry.bytes for entry in results(cached).entries()) <= 15 * (ENTRY_BYTES + 20)


def test_the_first_of_two_answers_to_one_input_stays() -> None:
    cache, x = ResultCache(), torch.zeros(1, 1)
    one, other = recall(cache, x), recall(cache, x)
    cache.remember(one, torch.full((1, 5), 1.0), torch.ones(1))
    cache.remember(other, torch.full((1, 5), 2.0), torch.ones(1))
    assert recall(cache, x).logits_HC.tolist() == [[1.0] * 5]


# --- fail closed ----------------------------------------------------------------------------------


def fails(*_: object, **__: object) -> None:
    raise RuntimeError("broken result cache")


def break_keys(cache: ResultCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.caches.result.row_keys", fails)


def break_storing(cache: ResultCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_store", fails)


def break_a_value(cache: ResultCache, monkeypatch: pytest.MonkeyPatch) -> None:
    next(iter(cache._entries.values())).value = b"damaged!"


@pytest.mark.parametrize("damage", [break_keys, break_storing, break_a_value])
def test_an_error_is_a_miss_and_switches_it_off(
    cnn: SplitModel,
    two: list[LearnedCache],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[ResultCache, pytest.MonkeyPatch], None],
) -> None:
    cached = remembering(cnn, two)
    x = images(6)
    cached(x[:3])
    damage(results(cached), monkeypatch)
    expected = plain_or_cached(cached, x)
    with caplog.at_level(logging.ERROR, logger="offramp"):
        for _ in range(3):
            close(cached(x), expected)
    assert [record.message for record in caplog.records] == ["the result cache failed; it is switched off"]
    assert caplog.records[0].exc_info is not None, "the log says why"
    assert (results(cached).on, len(results(cached))) == (False, 0)
    assert RESULT not in exits(cached, x)


def test_errors_of_the_model_are_not_swallowed(cnn: SplitModel, two: list[LearnedCache]) -> None:
    cached = remembering(cnn, two)
    handle = cnn.stages[0].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="broken"):
        cached(images(2))
    handle.remove()
    assert results(cached).on
    assert len(results(cached)) == 0


# --- approximate keys -----------------------------------------------------------------------------


def filled(
    feature_N: np.ndarray[Any, Any],
    answers: list[int],
    *,
    grid: int = 2,
    levels: int = 4,
    classes: int = 5,
    max_bytes: int = 1 << 20,
) -> KeyCache:
    cache = KeyCache("input/key", "input", feature_N.shape[1:], classes, grid=grid, levels=levels)
    cache.fill(feature_N, np.arange(len(feature_N)), np.array(answers), max_bytes)
    return cache.eval()


def blocks(count: int, seed: int = 0) -> Tensor:
    """Images of 2 x 2 blocks of brightness 0.5, 1.5, 2.5 or 3.5, far from the borders of four levels from 0 to 4."""
    level = torch.randint(0, 4, (count, 1, 2, 2), generator=torch.Generator().manual_seed(seed)) + 0.5
    return level.repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_majorities_are_those_of_a_slow_count() -> None:
    random = np.random.default_rng(0)
    for size in (1, 2, 7, 500):
        key_N, answer_N = random.integers(-4, 40, size), random.integers(0, 3, size)
        counts: dict[int, Counter[int]] = defaultdict(Counter)
        for key, answer in zip(key_N.tolist(), answer_N.tolist(), strict=True):
            counts[key][answer] += 1
        key_S, answer_S, agree_S, seen_S = _majorities(key_N, answer_N)
        assert key_S.tolist() == sorted(counts)
        for key, answer, agree, seen in zip(key_S.tolist(), answer_S, agree_S, seen_S, strict=True):
            most = max(counts[key].values())
            assert answer == min(a for a, count in counts[key].items() if count == most)
            assert (agree, seen) == (most, counts[key].total())


@torch.no_grad()
def test_a_key_answers_with_its_majority_and_its_smoothed_agreement() -> None:
    x = torch.tensor([[0.0], [0.1], [0.0], [9.0], [9.1], [9.0], [9.1]])
    cache = filled(x.numpy(), [1, 1, 2, 4, 4, 4, 4], grid=1, levels=3)
    assert cache.key_S.shape == (2,)
    logits = cache(torch.tensor([[0.05], [9.0], [4.5]]))
    assert logits.argmax(1).tolist()[:2] == [1, 4]
    expected = torch.tensor([(2 + 0.2) / 4, (4 + 0.2) / 5, 0.0])
    close(cache.confidence(logits), expected)
    assert float(cache.confidence(logits)[2]) == 0.0
    close(logits.softmax(1).sum(1), torch.ones(3))


@torch.no_grad()
def test_near_repeats_share_a_key_and_others_miss() -> None:
    x = blocks(300)
    answers = x.flatten(1).sum(1).long() % 5
    cache = filled(x.half().numpy(), answers.tolist())
    fresh = blocks(100, 1)
    near = fresh + 0.1 * torch.randn(fresh.shape, generator=torch.Generator().manual_seed(2))
    logits = cache(near)
    hit = cache.confidence(logits) > 0
    stored = {tuple(row) for row in x.flatten(1).tolist()}
    assert hit.tolist() == [tuple(row) in stored for row in fresh.flatten(1).tolist()]
    assert 0 < int(hit.sum()) < 100
    assert torch.equal(logits.argmax(1)[hit], (fresh.flatten(1).sum(1).long() % 5)[hit])
    close(cache(near[7:8]), logits[7:8])


@torch.no_grad()
def test_the_key_of_token_ids_is_their_prefix() -> None:
    ids = torch.randint(0, 1000, (50, 12), generator=torch.Generator().manual_seed(0))
    cache = filled(ids.numpy(), (ids[:, 0] % 5).tolist(), grid=3, levels=0)
    other_ends, other_starts = ids.clone(), ids.clone()
    other_ends[:, 3:] += 1
    other_starts[:, 2] += 1000
    assert torch.equal(cache(other_ends).argmax(1), ids[:, 0] % 5)
    assert bool((cache.confidence(cache(other_ends)) > 0.5).all())
    assert cache.confidence(cache(other_starts)).tolist() == [0.0] * 50
    assert len(cache.keys(ids).unique()) == len(ids[:, :3].unique(dim=0))


@torch.no_grad()
def test_different_keys_have_different_hashes() -> None:
    levels = torch.cartesian_prod(*[torch.arange(4.0)] * 6) + 0.5
    cache = KeyCache("input/key", "input", (6,), 5, grid=6, levels=4)
    assert len(cache.keys(levels).unique()) == 4**6


@torch.no_grad()
def test_one_that_knows_nothing_and_inputs_with_nan_are_misses() -> None:
    fresh = KeyCache("input/key", "input", (1, 8, 8), 5, grid=2, levels=4).eval()
    x = blocks(20)
    assert fresh.confidence(fresh(x)).tolist() == [0.0] * 20
    cache = filled(x.numpy(), [1] * 20)
    x[3, 0, 0, 0] = torch.nan
    assert (cache.confidence(cache(x)) == 0).nonzero().flatten().tolist() == [3]


def test_a_table_is_cut_to_its_bytes_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    x = np.repeat(np.arange(10.0), np.arange(1, 11))[:, None].astype(np.float32)  # key number k, k + 1 times
    with caplog.at_level(logging.INFO, logger="offramp"):
        cache = filled(x, [1] * len(x), grid=1, levels=1000, max_bytes=4 * KEY_BYTES + 3)
    assert [record.message for record in caplog.records] == ["cache input/key: cut from 10 to 4 keys, max_bytes=67"]
    assert (cache.describe()["keys"], cache.describe()["dropped"]) == (4, 6)
    assert sum(buffer.nbytes for buffer in (cache.key_S, cache.answer_S, cache.rate_S)) == 4 * KEY_BYTES
    confidence = cache.confidence(cache(torch.arange(10.0)[:, None]))
    assert (confidence > 0).tolist() == [False] * 6 + [True] * 4, "the most frequent stay"


def test_a_range_without_width_or_with_outliers_is_no_error() -> None:
    constant_rows = np.full((20, 3), 7.0, dtype=np.float32)
    cache = filled(constant_rows, [2] * 20, grid=3)
    assert bool((cache.confidence(cache(torch.full((2, 3), 7.0))) > 0.9).all())
    extreme = np.concatenate([constant_rows, np.full((1, 3), 65504.0, dtype=np.float32)])
    assert bool(torch.isfinite(filled(extreme, [2] * 21, grid=3)(torch.from_numpy(extreme))).all())


@torch.no_grad()
def test_described_and_built_again_it_is_the_same() -> None:
    x = blocks(60)
    ids = torch.randint(0, 9, (60, 12))
    for cache, rows in (
        (filled(x.numpy(), [k % 5 for k in range(60)], max_bytes=20 * KEY_BYTES), x),
        (filled(ids.numpy(), [k % 5 for k in range(60)], grid=2, levels=0), ids),
    ):
        built = build_cache(json.loads(json.dumps(cache.describe())))
        shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (built, cache)]
        assert shapes[0] == shapes[1]
        built.load_state_dict(cache.state_dict())
        assert built.describe() == cache.describe()
        assert torch.equal(built(rows), cache(rows))
        assert torch.equal(built.confidence(built(rows)), cache.confidence(cache(rows)))


def test_saved_and_loaded_it_answers_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 6)
    split_model = split(models.mlp().eval(), x[:4])
    cache = KeyCache("input/key2x4", split_model.points[0].name, (6,), 3, grid=2, levels=4)
    with torch.no_grad():
        cache.fill(x.numpy(), np.arange(30), split_model.backbone(x[:30]).argmax(1).numpy(), 1 << 20)
    cached = cached_model(split_model, [cache.eval()], [0.4])  # type: ignore[list-item]
    save(cached, tmp_path / "model")
    loaded, first = load(tmp_path / "model", split_model.backbone).predict(x), cached.predict(x)
    assert len(set(first.left_at_B.tolist())) == 2
    assert torch.equal(loaded.output, first.output)
    assert torch.equal(loaded.left_at_B, first.left_at_B)


@pytest.mark.parametrize(("grid", "levels"), [(0, 4), (2, 1), (2, -1), (-3, 0)])
def test_keys_without_a_resolution_are_refused(grid: int, levels: int) -> None:
    with pytest.raises(InputError, match=f"received grid {grid} and levels {levels}; an approximate key needs"):
        KeyCache("input/key", "input", (1, 8, 8), 5, grid=grid, levels=levels)


@pytest.mark.parametrize(("rows", "max_bytes"), [(0, 1000), (5, KEY_BYTES - 1)])
def test_nothing_to_store_or_no_room_is_refused(rows: int, max_bytes: int) -> None:
    with pytest.raises(InputError, match=f"given {rows} rows and {max_bytes} bytes.*expected at least one row and 16"):
        filled(blocks(rows).numpy(), [0] * rows, max_bytes=max_bytes)


def test_the_plan_of_a_model_can_be_hashed() -> None:
    """Stored answers are told apart by it."""
    plan = Plan(bypass_batch_sizes=(1,))
    assert hash(plan) == hash(Plan.from_json(json.loads(json.dumps(plan.to_json()))))
