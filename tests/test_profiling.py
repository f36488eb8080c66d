"""Profiles: every nanosecond has one owner, the counts are those of the exits, and the model does not notice."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import ALWAYS, NEVER, FixedCache, cached_model, constant, images, learned, say_class, thresholds_at
from torch import Tensor, nn

from offramp import profiling
from offramp.caches import LearnedCache
from offramp.caches.result import ResultCache
from offramp.errors import InputError, StorageError, StreamError
from offramp.flight import Flight
from offramp.model import CachedModel
from offramp.parts import Fastest
from offramp.profiling import LEAST_ROUNDS, TRACED_CALLS, CallTime, PartTime, Profile, profile
from offramp.splitting import SplitModel, split
from offramp.streams import Batch

ROWS = 24  # of the stream, which LEAST_ROUNDS batches of 4 go through several times


@pytest.fixture(scope="module")
def two(cnn: SplitModel) -> list[LearnedCache]:
    """A cache at the input, and one in the middle that reads it."""
    torch.manual_seed(1)
    first = learned(cnn.points[0], 5, "student")
    return [first, learned(cnn.points[2], 5, "mlp", first)]


@pytest.fixture
def cached(cnn: SplitModel, two: list[LearnedCache]) -> CachedModel:
    return cached_model(cnn, two, thresholds_at(cnn, two, [0.4, 0.4]))


def run(cached: CachedModel, *sizes: int, stream: Sequence[Tensor] | None = None) -> Profile:
    """As few rounds as there may be."""
    return profile(cached, images(ROWS).split(10) if stream is None else stream, batch_sizes=sizes, budget_s=0)


def parts(call: CallTime) -> dict[str, PartTime]:
    return {part.name: part for part in call.parts}


def ran(call: CallTime) -> set[str]:
    return {part.name for part in call.parts if part.runs}


def batches(size: int) -> Iterator[Tensor]:
    """What the watched model is called with."""
    whole = [batch for batch in images(ROWS).split(size) if len(batch) == size]
    return itertools.islice(itertools.cycle(whole), LEAST_ROUNDS)


# --- the time -------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when someone says so, some of it on a device that runs behind."""

    def __init__(self) -> None:
        self.now = self.queued = 0

    def wait(self) -> None:
        self.now, self.queued = self.now + self.queued, 0

    def perf_counter_ns(self) -> int:
        return self.now

    def perf_counter(self) -> float:
        return self.now / 1e9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(profiling, "time", clock)
    monkeypatch.setattr(profiling, "synchronizer", lambda device: clock.wait)
    return clock


class Slow(nn.Module):
    """The same module, which takes a while on the device and some time in Python."""

    def __init__(self, module: nn.Module, clock: Clock, device_ns: int) -> None:
        super().__init__()
        self.module, self.clock, self.device_ns = module, clock, device_ns
        self.training = False

    def forward(self, *live: Tensor) -> Any:
        self.clock.queued += self.device_ns
        self.clock.now += 1000
        return self.module(*live)


def test_time_on_the_device_is_charged_to_the_part_that_asked_for_it(cnn: SplitModel, clock: Clock) -> None:
    def sure(x: Tensor) -> Tensor:
        clock.queued += 7_000_000
        return torch.arange(len(x)) % 2.0

    stages = [Slow(stage, clock, 1_000_000 * number) for number, stage in enumerate(cnn.stages, 1)]
    slow = cnn.running_on(stages, Slow(cnn.backbone, clock, 50_000_000))
    cache = FixedCache(cnn.points[1], 5, say_class(3), sure)
    cached = cached_model(slow, [cache], [0.5])
    (call,) = run(cached, 4).sizes
    expected = {f"cache {cache.name}": 7.0}
    names = [*(point.name for point in cnn.points), "the end"]
    expected |= {f"{names[k]} to {names[k + 1]}": 1.0 * (k + 1) + 0.001 for k in range(len(stages))}
    assert {part.name: part.ms for part in call.parts if part.ms} == pytest.approx(expected)
    assert call.ms == call.plain_ms == pytest.approx(sum(expected.values()))
    assert call.full_ms == pytest.approx(50.001)


def test_decisions_and_hits_get_what_passes_between_the_parts(
    cnn: SplitModel, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = cached_model(cnn, [FixedCache(cnn.points[1], 5, say_class(3), constant(1.0))], [ALWAYS])
    write, decide = Flight.answer, Flight.hits

    def compared(*given: Any) -> list[int]:
        clock.now += 2_000_000
        return decide(*given)

    def written(*given: Any) -> None:
        clock.now += 3_000_000
        write(*given)

    monkeypatch.setattr(Flight, "hits", compared)
    monkeypatch.setattr(Flight, "answer", written)
    (call,) = run(cached, 4).sizes
    assert {part.kind: part.ms for part in call.parts if part.ms} == pytest.approx({"decision": 2.0, "hits": 3.0})


@pytest.mark.parametrize("size", [1, 5, 40])
def test_parts_add_up_to_the_call(cached: CachedModel, size: int) -> None:
    (call,) = run(cached, size).sizes
    assert math.isclose(sum(part.ms for part in call.parts), call.ms, rel_tol=1e-9)
    assert math.isclose(sum(part.share for part in call.parts), 1.0, rel_tol=1e-9)
    assert all(part.ms > 0 for part in call.parts if part.runs)
    assert min(call.plain_ms, call.full_ms) > 0
    assert (call.batch_size, call.calls) == (size, LEAST_ROUNDS)


# --- the counts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compaction", [True, False])
@pytest.mark.parametrize("size", [1, 4])
def test_calls_and_rows_of_each_part_are_those_that_the_exits_imply(
    cnn: SplitModel, two: list[LearnedCache], size: int, *, compaction: bool
) -> None:
    cached = cached_model(cnn, two, thresholds_at(cnn, two, [0.4, 0.4]), compaction=compaction)
    calls, runs, rows, exits = (Counter[str]() for _ in range(4))

    def expect(name: str, count: int) -> None:
        runs[name] += 1
        rows[name] += count

    points = [*(point.name for point in cnn.points), "the end"]
    for batch in batches(size):
        left = cached.predict(batch).left_at_B.tolist()
        exits.update(cached.exits[number] for number in left)
        before = runs.copy()
        expect("checks of the inputs", size)
        waiting = size
        for position, point in enumerate(cnn.points):
            for slot, cache in enumerate(two):
                if cache.point == point.name and waiting:
                    seen = waiting if compaction else size
                    expect(f"cache {cache.name}", seen)
                    expect("decision", seen)
                    hits = left.count(slot)
                    waiting -= hits
                    if hits:
                        expect("hits and compaction", hits)
            if waiting:
                expect(f"{point.name} to {points[position + 1]}", waiting if compaction else size)
        calls.update(set((runs - before).keys()) | {"rest (Python)"})
    runs["rest (Python)"], rows["rest (Python)"] = LEAST_ROUNDS, LEAST_ROUNDS * size
    (call,) = run(cached, size).sizes
    assert {part.name: (part.calls, part.runs, part.rows) for part in call.parts if part.runs} == {
        name: (calls[name], runs[name], rows[name]) for name in runs
    }
    assert call.exits == {name: exits[name] for name in cached.exits}
    assert len([name for name in cached.exits if call.exits[name]]) == 3, "or the test shows nothing"


def test_parts_that_nobody_reaches_are_listed_with_nothing(cnn: SplitModel) -> None:
    cache = FixedCache(cnn.points[1], 5, say_class(3), constant(1.0))
    (call,) = run(cached_model(cnn, [cache], [ALWAYS]), 3).sizes
    assert len(call.parts) == len(cnn.stages) + 6
    first = f"{cnn.points[0].name} to {cnn.points[1].name}"
    assert ran(call) == {
        "checks of the inputs", first, f"cache {cache.name}", "decision", "hits and compaction", "rest (Python)"
    }  # fmt: skip
    assert call.exits == {cache.name: 3 * LEAST_ROUNDS, "backbone": 0}


@pytest.mark.parametrize("optimized", [True, False])
def test_a_bypassed_batch_size_runs_the_full_model_alone(
    cnn: SplitModel, two: list[LearnedCache], *, optimized: bool
) -> None:
    split_model = cnn.running_on(cnn.stages, Fastest(cnn.backbone, cnn.backbone)) if optimized else cnn
    cached = cached_model(split_model, two, [ALWAYS] * 2, bypass=(1,))
    one, many = run(cached, 32, 1).sizes
    assert (one.batch_size, one.bypassed, many.batch_size, many.bypassed) == (1, True, 32, False)
    checks = set() if optimized else {"checks of the inputs"}  # elsewhere they are part of the full model's call
    assert ran(one) == {"full model", "rest (Python)"} | checks
    full = parts(one)["full model"]
    assert (full.calls, full.runs, full.rows) == (LEAST_ROUNDS,) * 3
    assert one.exits["backbone"] == LEAST_ROUNDS
    assert parts(many)["full model"].runs == 0
    assert many.exits[two[0].name] == 32 * LEAST_ROUNDS


def test_a_plan_without_caches(cnn: SplitModel) -> None:
    (call,) = run(cached_model(cnn), 2).sizes
    assert call.bypassed
    assert ran(call) == {"checks of the inputs", "full model", "rest (Python)"}
    assert call.exits == {"backbone": 2 * LEAST_ROUNDS}


def test_stages_on_other_back_ends(cnn: SplitModel, two: list[LearnedCache]) -> None:
    merged = cnn.merged([two[1].point])
    other = merged.running_on([Fastest(stage, stage) for stage in merged.stages], Fastest(cnn.backbone, cnn.backbone))
    (call,) = run(cached_model(other, two, [NEVER] * 2), 4).sizes
    stages = [part for part in call.parts if part.kind == "stage"]
    assert [part.name for part in stages] == [f"input to {two[1].point}", f"{two[1].point} to the end"]
    assert [part.rows for part in stages] == [4 * LEAST_ROUNDS] * 2


def test_inputs_by_name() -> None:
    torch.manual_seed(0)
    given = {"input_ids": torch.randint(0, 50, (6, 8)), "attention_mask": torch.ones(6, 8, dtype=torch.long)}
    cached = cached_model(split(models.MaskedEncoder().eval(), given))
    assert run(cached, 2, stream=[given]).sizes[0].exits == {"backbone": 2 * LEAST_ROUNDS}  # type: ignore[list-item]


# --- the model does not notice --------------------------------------------------------------------


def test_a_watched_model_gives_the_same_answers(cached: CachedModel) -> None:
    watched = profiling._Watched(cached, lambda: None)
    for size in (1, 7, 24):
        x = images(size, seed=3)
        call = watched.watch(Batch((x,)))
        prediction = cached.predict(x)
        assert torch.equal(watched(x), prediction.output)
        assert torch.equal(watched.predict(x).left_at_B, prediction.left_at_B)
        assert call.exits == Counter(prediction.left_at_B.tolist())


def test_the_model_is_untouched(cached: CachedModel) -> None:
    cached.result_cache = results = ResultCache()
    x = images(6, seed=8)
    before, stages = cached(x), cached.split_model.stages
    attributes, inner = dict(vars(cached)), dict(vars(cached.split_model))
    modules, totals = dict(cached.named_modules()), results.totals()
    state = {name: value.clone() for name, value in cached.state_dict().items()}
    run(cached, 1, 4, stream=[x])
    assert results.totals() == totals, "its result cache neither learns nor answers"
    assert vars(cached).keys() == attributes.keys()
    assert all(vars(cached)[name] is value for name, value in attributes.items())
    assert all(vars(cached.split_model)[name] is value for name, value in inner.items())
    assert cached.split_model.stages is stages
    assert dict(cached.named_modules()) == modules
    assert all(torch.equal(cached.state_dict()[name], value) for name, value in state.items())
    assert not any(module.training for module in (*cached.modules(), *stages))
    cached.result_cache = None
    assert torch.equal(cached(x), before)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_cache_that_fails_is_a_miss_and_the_model_is_not_told(
    cnn: SplitModel, two: list[LearnedCache], broken: int, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def fails_later(x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) > LEAST_ROUNDS:
            raise RuntimeError("out of order")
        return torch.zeros(len(x))

    caches: list[LearnedCache] = [
        FixedCache(cnn.points[k], 5, say_class(3), fails_later if k == broken else constant(0.0)) for k in range(2)
    ]
    cached = cached_model(cnn, caches, [0.5, 0.5])
    with caplog.at_level(logging.ERROR, logger="offramp"):
        (call,) = run(cached, 4).sizes
    assert "out of order" in caplog.text
    assert call.exits["backbone"] == 4 * LEAST_ROUNDS
    failing = parts(call)[f"cache {caches[broken].name}"]
    assert 0 < failing.calls < LEAST_ROUNDS
    assert parts(call)["decision"].runs == sum(p.calls for p in call.parts if p.kind == "cache") - 1
    assert parts(call)["full model"].calls == (LEAST_ROUNDS - failing.calls if broken == 0 else 0)
    assert not cached.bypasses(4), "the copies are switched off, the model that was passed is not"


# --- the result cache -----------------------------------------------------------------------------


def test_a_result_cache_answers_what_repeats_in_the_stream_itself(cached: CachedModel) -> None:
    cached.result_cache = ResultCache()
    row = images(1)
    stream = [torch.cat([row, images(7, seed=5), row, row])]
    (call,) = run(cached, 1, stream=stream).sizes
    found = parts(call)
    assert 2 * len(stream[0]) == LEAST_ROUNDS, "two passes, each with two repeats"
    assert call.exits["result"] == 4
    assert found["result cache, look-up"].rows == LEAST_ROUNDS
    assert found["result cache, storing"].rows == LEAST_ROUNDS - 4
    assert (found["checks of the inputs"].runs, found["checks of the inputs"].rows) == (
        2 * LEAST_ROUNDS,
        2 * LEAST_ROUNDS - 4,
    )
    assert found["hits and compaction"].rows == LEAST_ROUNDS - 4 - call.exits["backbone"]


def test_repeats_within_a_batch_are_counted_where_they_left_and_written_once(cnn: SplitModel) -> None:
    cache = FixedCache(cnn.points[0], 5, say_class(3), constant(1.0))
    cached = cached_model(cnn, [cache], [ALWAYS])
    cached.result_cache = ResultCache()
    (call,) = run(cached, 4, stream=[images(2)]).sizes
    assert call.exits[cache.name] == 4 * LEAST_ROUNDS
    assert parts(call)["hits and compaction"].rows == 2 * LEAST_ROUNDS


def test_a_result_cache_that_is_switched_off_stays_off(cached: CachedModel) -> None:
    cached.result_cache = ResultCache()
    cached.result_cache.on = False
    (call,) = run(cached, 1).sizes
    assert parts(call)["result cache, look-up"].runs == 0
    assert call.exits["result"] == 0


# --- the trace ------------------------------------------------------------------------------------


def spans(events: list[Any], track: int) -> list[tuple[float, float, Any]]:
    return [
        (event["ts"], event["ts"] + event["dur"], event)
        for event in events
        if event["ph"] == "X" and event["tid"] == track
    ]


def test_the_trace_has_what_perfetto_needs(cached: CachedModel, tmp_path: Path) -> None:
    found = run(cached, 1, 4)
    plain, packed = (
        found.write_trace(tmp_path / "trace.json"),
        found.write_trace(str(tmp_path / "deep" / "trace.json.gz")),
    )
    document = json.loads(plain.read_text(encoding="utf-8"))
    assert json.loads(gzip.decompress(packed.read_bytes())) == document == found.trace()
    events = document["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    names = {(event["name"], event["tid"]): event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {
        ("process_name", 0): "offramp: ResidualNet",
        ("thread_name", 1): "batch 1",
        ("thread_name", 2): "batch 1, full model",
        ("thread_name", 3): "batch 4",
        ("thread_name", 4): "batch 4, full model",
    }
    for event in events:
        if event["ph"] == "X":
            assert {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"} == event.keys()
            assert (event["ts"] >= 0, event["dur"] >= 0, event["args"]["rows"] > 0) == (True, True, True)
    assert len(spans(events, 1)) > len(spans(events, 2)) == LEAST_ROUNDS


def test_events_nest_and_do_not_overlap(cached: CachedModel) -> None:
    found = run(cached, 4)
    events = list(found.trace()["traceEvents"])
    calls = [span for span in spans(events, 1) if span[2]["cat"] == "call"]
    inner = [span for span in spans(events, 1) if span[2]["cat"] != "call"]
    for row in (calls, inner, spans(events, 2)):
        assert all(end <= start for (_, end, _), (start, _, _) in itertools.pairwise(row))
    owners = [
        [k for k, (start, end, _) in enumerate(calls) if start <= one and other <= end] for one, other, _ in inner
    ]
    assert all(len(owner) == 1 for owner in owners)
    assert len(inner) == sum(part.runs for part in found.sizes[0].parts if part.kind != "rest")


def test_a_call_in_the_trace_says_its_rows_hits_and_exits(cnn: SplitModel, two: list[LearnedCache]) -> None:
    cached = cached_model(cnn, two, [ALWAYS, NEVER])
    events = [event for _, _, event in spans(list(run(cached, 4).trace()["traceEvents"]), 1)][:4]
    assert [(event["name"], event["args"]) for event in events] == [
        ("call 1", {"rows": 4, "exits": {two[0].name: 4}}),
        ("checks of the inputs", {"rows": 4}),
        (f"cache {two[0].name}", {"rows": 4, "hits": 4}),
        ("decision", {"rows": 4}),
    ]


def test_the_trace_is_bounded(cached: CachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "LEAST_ROUNDS", TRACED_CALLS + 5)
    found = run(cached, 2)
    assert found.sizes[0].calls == TRACED_CALLS + 5
    assert sum(event["ph"] == "X" and event["cat"] == "call" for event in found.events) == TRACED_CALLS


def test_rounding_lets_no_event_end_after_the_next_began() -> None:
    times = [0, 1, 62, 63, 125, 187, 188, 10**15 + 1, 10**15 + 99]
    rounded = [profiling._microseconds(ns) for ns in times]
    assert rounded == sorted(rounded)
    assert all((one * 1000).is_integer() and abs(one * 1000 - ns) <= 63 for one, ns in zip(rounded, times, strict=True))


@pytest.mark.parametrize("name", ["taken", "file/trace.json"])
def test_a_trace_that_cannot_be_written_leaves_nothing(cached: CachedModel, tmp_path: Path, name: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("kept")
    found = run(cached, 1)
    with pytest.raises(StorageError, match=f"the trace could not be written to .*{name}: "):
        found.write_trace(tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "taken"]
    assert (tmp_path / "file").read_text() == "kept"


# --- what comes in and goes out -------------------------------------------------------------------


def test_only_the_first_rows_of_the_stream_are_read(cached: CachedModel) -> None:
    endless = (images(100, seed) for seed in itertools.count())
    assert run(cached, 1, stream=endless).sizes[0].calls == LEAST_ROUNDS  # type: ignore[arg-type]
    assert torch.equal(next(endless), images(100, 6)), "512 rows are six batches"


def test_to_json_is_json_without_the_trace(cached: CachedModel) -> None:
    found = run(cached, 1)
    document = json.loads(json.dumps(found.to_json()))
    assert set(document) == {"device", "threads", "sizes"}
    assert (document["device"], document["threads"]) == ("cpu", torch.get_num_threads())
    (size,) = document["sizes"]
    assert size["exits"] == found.sizes[0].exits
    assert [PartTime(**part) for part in size["parts"]] == list(found.sizes[0].parts)
    assert "traceEvents" not in document
    assert "perfetto" not in repr(found)


def test_bad_arguments_are_explained(cached: CachedModel) -> None:
    for sizes in [(0,), (), (1, -2), (True,), (2.0,)]:
        with pytest.raises(InputError, match="batch sizes must be whole numbers from 1"):
            profile(cached, [images(4)], batch_sizes=sizes)  # type: ignore[arg-type]
    with pytest.raises(StreamError, match="the stream to profile with is empty"):
        profile(cached, [])
    with pytest.raises(InputError, match="has shape"):
        profile(cached, [torch.zeros(4, 3, 5, 5)])
    with pytest.raises(InputError, match="a stream must yield batches"):
        profile(cached, images(4))


class Fails(nn.Module):
    def forward(self, *_live: Tensor) -> Tensor:
        raise RuntimeError("no memory left")


def test_an_error_of_the_backbone_reaches_the_caller(cached: CachedModel, cnn: SplitModel) -> None:
    cached.split_model = cnn.running_on([Fails()] * len(cnn.stages), Fails())
    with pytest.raises(RuntimeError, match="no memory left"):
        run(cached, 1)
