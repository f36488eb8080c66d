"""Where the time of a call goes: stages, caches, decisions, compaction, and the Python between them.

What is watched is a copy of the model, whose stages, look-ups and checks switch a stopwatch. The loop that calls them
is the model's own: it holds no line for profiling, and costs nothing more when no one profiles.
"""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from offramp.caches import Cache
from offramp.caches.result import Recalled, Results, ResultTotals
from offramp.cost import checked_sizes, synchronizer
from offramp.errors import StorageError, StreamError
from offramp.evaluation import KEPT_ROWS, rows_from
from offramp.flight import Flight
from offramp.model import CachedModel
from offramp.report.files import write_bytes
from offramp.splitting import SplitModel
from offramp.streams import Batch, concatenated, read_stream

WARM_UP_ROUNDS, LEAST_ROUNDS = 3, 20
PROCESS = 1  # of the trace
TRACED_CALLS = 50  # of each batch size: a trace is to be looked at

T = TypeVar("T")
Event = Mapping[str, Any]


# --- what a profile says --------------------------------------------------------------------------


@dataclass(frozen=True)
class PartTime:
    """What one part takes of a call, in the mean over all calls.

    kind: "flatten" (checks of the inputs), "stage", "cache" (a look-up, and the wait for its confidences),
    "decision" (comparing these with the threshold), "hits" (writing answers and dropping rows), "full" (the full model
    alone), "result" (the result cache) or "rest" (Python, and putting the answers in order). calls: those that
    reached it. runs: how often it ran in all, and rows: on how many rows; for "hits" the rows that were answered.
    """

    kind: str
    name: str
    share: float
    ms: float
    calls: int
    runs: int
    rows: int


@dataclass(frozen=True)
class CallTime:
    """The mean time of a call with `batch_size` rows, and its parts, which add up to `ms`.

    plain_ms and full_ms: the same calls unwatched, and by the full model, alternately in the same run; ms / plain_ms
    is what watching costs. bypassed: such a batch runs the full model alone. exits: how many rows left where.
    """

    batch_size: int
    bypassed: bool
    calls: int
    ms: float
    plain_ms: float
    full_ms: float
    exits: Mapping[str, int]
    parts: tuple[PartTime, ...]


@dataclass(frozen=True)
class Profile:
    """Where the time of a cached model's calls goes on this machine; `write_trace` shows single calls."""

    device: str
    threads: int
    sizes: tuple[CallTime, ...]
    events: tuple[Event, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the trace."""
        sizes = [asdict(size) for size in self.sizes]
        return {"device": self.device, "threads": self.threads, "sizes": sizes}

    def trace(self) -> dict[str, Any]:
        """The first calls of each batch size, in the JSON trace event format, which ui.perfetto.dev opens."""
        return {"traceEvents": list(self.events), "displayTimeUnit": "ms"}

    def write_trace(self, path: str | os.PathLike[str]) -> Path:
        """`trace()` as a file; compressed if its name ends in .gz. Raises StorageError when that fails."""
        target = Path(path)
        document = json.dumps(self.trace(), separators=(",", ":")).encode()
        try:
            write_bytes(target, gzip.compress(document) if target.suffix == ".gz" else document)
        except OSError as error:
            raise StorageError(f"the trace could not be written to {target}: {error}") from error
        return target


def profile(
    cached: CachedModel,
    stream: Iterable[object],
    *,
    batch_sizes: Sequence[int] = (1, 32),
    budget_s: float = 10.0,
) -> Profile:
    """Call the model on the first rows of `stream`, and say where the time of each call goes; `cached` stays as it is.

    Per batch size three calls take turns for `budget_s` seconds: the watched model, the same unwatched, and the full
    model. The device is synchronised wherever one part ends and another begins. The first 512 rows are used, over and
    over; a batch that is larger than the stream repeats its rows. A result cache begins each pass over them empty, so
    it answers what repeats in the stream itself; the model's own is left alone. All times are means: on a busy machine
    its interruptions fall on whatever part was running.

    Raises InputError for batch sizes that are none, StreamError when the stream is empty.
    """
    sizes = checked_sizes(batch_sizes)
    sample = _sample(cached, stream)
    origin = time.perf_counter_ns()
    traces = [_Trace(size, 2 * number + 1, origin) for number, size in enumerate(sizes)]
    with torch.inference_mode():
        pairs = zip(sizes, traces, strict=True)
        calls = tuple(_profile_at(cached, sample, size, budget_s, trace) for size, trace in pairs)
    process = _metadata("process_name", 0, f"offramp: {type(cached.split_model.backbone).__name__}")
    events = (process, *(event for trace in traces for event in trace.events))
    return Profile(str(cached.split_model.device), torch.get_num_threads(), calls, events)


def _sample(cached: CachedModel, stream: Iterable[object]) -> Batch:
    """The first rows of the stream, where the model is."""
    kept: list[Batch] = []
    for batch in read_stream(stream, cached.split_model.backbone):
        kept.append(batch.to(cached.split_model.device))
        if sum(map(len, kept)) >= KEPT_ROWS:
            break
    if not kept:
        raise StreamError("the stream to profile with is empty: it yielded no inputs")
    return concatenated(kept).rows(slice(0, KEPT_ROWS))


# --- the watched model ----------------------------------------------------------------------------


class _Part(NamedTuple):
    kind: str
    name: str


FLATTEN = _Part("flatten", "checks of the inputs")
DECISION = _Part("decision", "decision")
HITS = _Part("hits", "hits and compaction")
FULL = _Part("full", "full model")
RECALL = _Part("result", "result cache, look-up")
REMEMBER = _Part("result", "result cache, storing")
REST = _Part("rest", "rest (Python)")


class _Lap(NamedTuple):
    """Time, in nanoseconds, that was charged to one part. slot: the cache it was spent for, if any."""

    part: _Part
    rows: int
    slot: int | None
    start: int
    end: int


class _Stopwatch:
    """Charges all time from `start` to `stop` to one part after the other: to the one that it was last switched to."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def start(self) -> None:
        self._marks: list[tuple[_Part, int, int | None, int]] = []
        self.switch()

    def switch(self, part: _Part = REST, rows: int = 0, slot: int | None = None) -> None:
        self._wait()  # what the device still does belongs to the part that asked for it
        self._marks.append((part, rows, slot, time.perf_counter_ns()))

    def stop(self) -> list[_Lap]:
        self.switch()
        return [_Lap(*mark, following[-1]) for mark, following in itertools.pairwise(self._marks)]

    def charge(self, part: _Part, rows: int, call: Callable[[], T]) -> T:
        self.switch(part, rows)
        result = call()
        self.switch()
        return result


class _WatchedStage(nn.Module):
    def __init__(self, stage: nn.Module, part: _Part, watch: _Stopwatch) -> None:
        super().__init__()
        self._stage = (stage,)  # in a tuple: not a submodule, its mode is its owner's
        self._part, self._watch, self.training = part, watch, False

    def forward(self, *live: Tensor) -> Any:
        return self._watch.charge(self._part, len(live[0]), lambda: self._stage[0](*live))


class _WatchedSplit(SplitModel):
    """Shares everything with the split model that it watches but the modules that it calls as stages."""

    def __init__(self, split: SplitModel, stages: Sequence[_Part], watch: _Stopwatch) -> None:
        vars(self).update(vars(split))
        self._unwatched, self._watch = split, watch
        self.stages = tuple(_WatchedStage(*pair, watch) for pair in zip(split.stages, stages, strict=True))

    def flatten(self, batch: Batch) -> tuple[Tensor, ...]:
        return self._watch.charge(FLATTEN, len(batch), lambda: self._unwatched.flatten(batch))

    def full(self, *args: Any, **kwargs: Any) -> Any:
        return self._watch.charge(FULL, len(Batch(args, kwargs)), lambda: self._unwatched.full(*args, **kwargs))

    def full_leaves(self, batch: Batch) -> Sequence[Tensor]:
        return self._watch.charge(FULL, len(batch), lambda: self._unwatched.full_leaves(batch))


class _WatchedResults(Results):
    """A copy of the result cache that it stands for, as large and empty, and switched off where that is."""

    def __init__(self, results: Results, watch: _Stopwatch) -> None:
        super().__init__()
        self._copy, self._watch = copy.copy(results), watch
        self.on = self._copy.on = results.on

    def recall(self, inputs: Sequence[Tensor], context: Any, like: Tensor) -> Recalled | None:
        recalled = self._watch.charge(RECALL, len(inputs[0]), lambda: self._copy.recall(inputs, context, like))
        self.on = self._copy.on
        return recalled

    def remember(self, recalled: Recalled, logits_AC: Tensor, confidence_A: Tensor) -> None:
        self._watch.charge(REMEMBER, len(logits_AC), lambda: self._copy.remember(recalled, logits_AC, confidence_A))

    def clear(self) -> None:
        self._copy.clear()

    def totals(self) -> ResultTotals:
        return self._copy.totals()


class _Call(NamedTuple):
    """One call: its laps, how many rows left at each exit, and how many each cache answered (without repeats)."""

    laps: list[_Lap]
    exits: Counter[int]
    hits: Counter[int]

    @property
    def span(self) -> tuple[int, int]:
        return self.laps[0].start, self.laps[-1].end

    @property
    def ns(self) -> int:
        start, end = self.span
        return end - start

    def rows(self, lap: _Lap) -> int:
        """Those that it worked on; of writing hits, the hits."""
        return self.hits[lap.slot] if lap.part is HITS and lap.slot is not None else lap.rows


class _Watched(CachedModel):
    """Shares everything with the model that it is made from, but its calls switch a stopwatch."""

    def __init__(self, cached: CachedModel, wait: Callable[[], None]) -> None:
        self.__setstate__(vars(cached))
        self._watch = _Stopwatch(wait)
        names = [point.name for point in cached.split_model.points]
        ends = [*names[1:], "the end"]
        self._stage_parts = [_Part("stage", f"{start} to {end}") for start, end in zip(names, ends, strict=True)]
        self._cache_parts = [_Part("cache", f"cache {planned.name}") for planned in cached.plan.caches]
        self.split_model = _WatchedSplit(cached.split_model, self._stage_parts, self._watch)
        if cached.result_cache is not None:
            self.result_cache = _WatchedResults(cached.result_cache, self._watch)

    def parts(self) -> list[_Part]:
        """All that a call may reach, in this order, and last what is common to all."""
        parts = [FLATTEN] if self.result_cache is None else [FLATTEN, RECALL]
        for slots, stage in zip(self._lookups, self._stage_parts, strict=True):
            parts += [*(self._cache_parts[slot] for slot, _ in slots), stage]
        parts += [DECISION, HITS, FULL]
        return [*parts, REST] if self.result_cache is None else [*parts, REMEMBER, REST]

    def watch(self, batch: Batch) -> _Call:
        """One call, watched."""
        self._flight: Flight | None = None  # none where nothing is routed
        self._recalled: Tensor | None = None
        self._watch.start()
        self(*batch.args, **batch.kwargs)
        laps = self._watch.stop()
        routed = [len(self.plan.caches)] * len(batch) if self._flight is None else self._flight.exits()[0].tolist()
        left = routed if self._recalled is None else self._recalled.tolist()
        return _Call(laps, Counter(left), Counter(routed))

    def depart(self, batch: Batch) -> Flight:
        self._flight = _WatchedFlight(super().depart(batch), self._watch, len(self.plan.caches))
        return self._flight

    def _look_up(
        self, slot: int, cache: Cache, activation: Tensor, said: dict[str, Tensor]
    ) -> tuple[Tensor, list[float]] | None:
        rows = len(activation)
        self._watch.switch(self._cache_parts[slot], rows, slot)
        answered = super()._look_up(slot, cache, activation, said)
        if answered is None:
            self._watch.switch()
        else:
            self._watch.switch(DECISION, rows, slot)  # until rows leave or the next part begins
        return answered

    def _recall_or_route(self, batch: Batch, results: Results) -> Any:
        routed = super()._recall_or_route(batch, results)
        self._recalled = routed.left_at_B
        return routed


class _WatchedFlight(Flight):
    """Takes over a flight before it has moved."""

    def __init__(self, flight: Flight, watch: _Stopwatch, end: int) -> None:
        vars(self).update(vars(flight))
        self._watch, self._end = watch, end

    def answer(self, hits: Sequence[int], logits_LC: Tensor, left_at: int, confidence_L: Sequence[float]) -> None:
        if left_at != self._end:
            self._watch.switch(HITS, 0, left_at)  # until the next part begins: compaction follows
        super().answer(hits, logits_LC, left_at, confidence_L)

    def logits(self) -> Tensor:
        self._watch.switch()
        return super().logits()


# --- the run --------------------------------------------------------------------------------------


def _profile_at(cached: CachedModel, sample: Batch, size: int, budget_s: float, trace: _Trace) -> CallTime:
    """Watched, plain and full model in turn on the same rows; the result caches forget these after each pass."""
    wait = synchronizer(cached.split_model.device)
    watched, plain = _Watched(cached, wait), _with_empty_results(cached)
    calls: dict[str, Callable[[Batch], _Call]] = {
        "watched": watched.watch,
        "plain": lambda batch: _unwatched(plain, batch, wait),
        "full": lambda batch: _unwatched(cached.split_model.full, batch, wait),
    }
    orders = itertools.cycle(itertools.permutations(calls))  # none always follows the same other one
    tally, per_pass = _Tally(), max(1, len(sample) // size)
    started, turn = time.perf_counter(), -WARM_UP_ROUNDS
    while turn < LEAST_ROUNDS or time.perf_counter() - started < budget_s:
        number = max(turn, 0) % per_pass
        for results in (watched.result_cache, plain.result_cache):
            if results is not None and number == 0:
                results.clear()
        batch = rows_from(sample, number * size, size)
        made = {name: calls[name](batch) for name in next(orders)}
        if turn >= 0:
            tally.add(made)
            trace.add(made, cached.exits)
        turn += 1
    return tally.result(cached, size, watched.parts())


def _unwatched(model: Callable[..., Any], batch: Batch, wait: Callable[[], None]) -> _Call:
    watch = _Stopwatch(wait)
    watch.start()
    model(*batch.args, **batch.kwargs)
    return _Call(watch.stop(), Counter(), Counter())


def _with_empty_results(cached: CachedModel) -> CachedModel:
    model = copy.copy(cached)
    if cached.result_cache is not None:
        model.result_cache = copy.copy(cached.result_cache)
        model.result_cache.on = cached.result_cache.on
    return model


class _Tally:
    """Adds up calls, the times in whole nanoseconds."""

    def __init__(self) -> None:
        self.n = 0
        self.model_ns, self.exits = Counter[str](), Counter[int]()
        self.ns, self.calls, self.runs, self.rows = (Counter[_Part]() for _ in range(4))

    def add(self, made: Mapping[str, _Call]) -> None:
        self.n += 1
        self.model_ns.update({name: call.ns for name, call in made.items()})
        call = made["watched"]
        self.exits.update(call.exits)
        self.calls.update({lap.part for lap in call.laps})
        for lap in call.laps:
            self.ns[lap.part] += lap.end - lap.start
            self.runs[lap.part] += 1
            self.rows[lap.part] += call.rows(lap)

    def result(self, cached: CachedModel, size: int, parts: Sequence[_Part]) -> CallTime:
        self.runs[REST], self.rows[REST] = self.n, self.n * size  # it is one thing, though others interrupt it
        watched_ms, plain_ms, full_ms = (self._mean_ms(self.model_ns[name]) for name in ("watched", "plain", "full"))
        times = (
            PartTime(
                *part,
                share=self.ns[part] / self.model_ns["watched"],
                ms=self._mean_ms(self.ns[part]),
                calls=self.calls[part],
                runs=self.runs[part],
                rows=self.rows[part],
            )
            for part in parts
        )
        exits = {name: self.exits[number] for number, name in enumerate(cached.exits)}
        bypassed = cached.bypasses(size)
        return CallTime(size, bypassed, self.n, watched_ms, plain_ms, full_ms, exits, tuple(times))

    def _mean_ms(self, ns: int) -> float:
        return ns / self.n / 1e6


# --- the trace ------------------------------------------------------------------------------------


class _Trace:
    """The first calls of one batch size as events: two tracks, the watched model's and the full model's.

    origin: the time that is 0, in nanoseconds.
    """

    def __init__(self, size: int, track: int, origin: int) -> None:
        self._track, self._origin, self._calls = track, origin, 0
        names = f"batch {size}", f"batch {size}, full model"
        self.events = [_metadata("thread_name", track + number, name) for number, name in enumerate(names)]

    def add(self, made: Mapping[str, _Call], exits: Sequence[str]) -> None:
        if self._calls == TRACED_CALLS:
            return
        self._calls += 1
        call, full = made["watched"], made["full"]
        rows = call.exits.total()
        left = {exits[number]: count for number, count in sorted(call.exits.items())}
        self._event(0, f"call {self._calls}", "call", *call.span, {"rows": rows, "exits": left})
        for lap in call.laps:
            if lap.part is not REST:
                self._event(0, lap.part.name, lap.part.kind, lap.start, lap.end, _arguments(call, lap))
        self._event(1, FULL.name, FULL.kind, *full.span, {"rows": rows})

    def _event(self, track: int, name: str, category: str, start: int, end: int, arguments: Mapping[str, Any]) -> None:
        ts, end_ts = _microseconds(start - self._origin), _microseconds(end - self._origin)
        place = {"ph": "X", "ts": ts, "dur": end_ts - ts, "pid": PROCESS, "tid": self._track + track}
        self.events.append({"name": name, "cat": category, **place, "args": arguments})


def _arguments(call: _Call, lap: _Lap) -> dict[str, int]:
    arguments = {"rows": call.rows(lap)}
    if lap.part.kind == "cache" and lap.slot is not None:
        arguments["hits"] = call.hits[lap.slot]
    return arguments


def _microseconds(ns: int) -> float:
    """In eighths, which are exact in binary and whole in nanoseconds: no rounding makes two events overlap."""
    return round(ns / 125) / 8


def _metadata(what: str, track: int, name: str) -> Event:
    return {"name": what, "ph": "M", "pid": PROCESS, "tid": track, "args": {"name": name}}
