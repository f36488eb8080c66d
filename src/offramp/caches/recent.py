"""Near repeats within one stream of requests, such as the frames of one camera: `RecentCache`.

Shape suffixes: B rows of a batch, H rows with a (would-be) answer, A rows that are run, E entries of a stream, S
numbers of a feature, C classes.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from offramp.caches.result import Recalled, Results, ResultTotals, logits_of, row_keys
from offramp.errors import InputError
from offramp.tasks import Classification

FloatArray = NDArray[np.float32]

GRID = 8  # an image is pooled to so many places a side
NUMBERS = 256  # of anything else that many leading numbers are looked at

# One for all recent caches: the stream belongs to the request, whichever models it is passed through.
_STREAM: ContextVar[tuple[Hashable] | None] = ContextVar("offramp_stream", default=None)
_TASK = Classification()


@dataclass(slots=True, eq=False)
class _Entry:
    """A recent input with the answer to it. A would-be hit is audited with probability 1 / gap."""

    feature_S: FloatArray
    exact: bytes  # digest of the inputs that must be equal
    contrast: float
    value: bytes  # a row of logits
    confidence: float
    answer: int
    sure: bool
    serial: int
    gap: float
    hits: int = 0  # would-be hits so far, audits included
    live: bool = True


@dataclass(slots=True)
class _Stream:
    entries: list[_Entry] = field(default_factory=list)  # most recently used first
    bytes: int = 0


class _Row(NamedTuple):
    """What is looked at of a row of the inputs, the entry that it is near with its hits by then, and whether that may
    answer."""

    feature_S: FloatArray
    exact: bytes
    contrast: float
    near: _Entry | None
    hits: int = 0
    answers: bool = False


class _Said(NamedTuple):
    """The model's answer to a row that was run."""

    value: bytes
    confidence: float
    answer: int
    sure: bool


_StreamId = tuple[Hashable, int]  # the key, and a hash of whose answers these are and of the form of the inputs

ENTRY_BYTES = (
    8  # its place in the list
    + sys.getsizeof(_Entry(np.zeros(0, np.float32), b"", 0.0, b"", 0.0, 0, True, 0, 0.0))
    + sys.getsizeof(np.zeros(0, np.float32))
    + sys.getsizeof(b"")
    + sys.getsizeof(bytes(16))
    + 3 * sys.getsizeof(0.0)
    + 3 * sys.getsizeof(1 << 29)
)  # what an entry takes besides its feature and its row of logits
STREAM_BYTES = (
    160  # an item of an OrderedDict, as in `ResultCache`
    + sys.getsizeof(_Stream())
    + sys.getsizeof([])
    + sys.getsizeof(("key", 0))
    + 2 * sys.getsizeof(1 << 62)
)  # what a stream takes besides its key and its entries


@dataclass(frozen=True)
class RecentTotals(ResultTotals):
    """What a RecentCache holds and has done; the first fields as for a ResultCache, bytes and entries over all streams.

    streams: held now. unkeyed: rows that came outside any stream; they are no part of `rows`. hits: rows that it
    answered. would_be: rows that it would have answered, had it been allowed to, and of these would_be_disagreements
    got another answer when they ran. audits: rows that ran although an entry was near, and of these audit_failures got
    another answer. estimated_disagreements: how many of the hits and would-be hits disagreed, estimated from the audits
    alone, each weighted by its inverse probability (Horvitz and Thompson, 1952): without bias, whatever the traffic.
    """

    streams: int
    unkeyed: int
    would_be: int
    would_be_disagreements: int
    audits: int
    audit_failures: int
    estimated_disagreements: float


class Peeked(NamedTuple):
    """Would-be answers to a batch: their rows in rising order, logits and confidence."""

    row_H: Tensor
    logits_HC: Tensor
    confidence_H: Tensor


@dataclass(frozen=True)
class _Asked(Recalled):
    stream: _StreamId
    rows_A: list[_Row]


class RecentCache(Results):
    """Answers for inputs that are nearly the same as a recent one of the same stream: a camera, a user, a session.

        cached.result_cache = recents = offramp.RecentCache()
        with recents.stream("camera-7"):
            y = cached(frame)

    Which stream a request belongs to is said by the caller, with `stream`; a request without one is a miss, and nothing
    is kept of it. A stream keeps its `entries` most recently used inputs, each as a small feature with the model's
    answer. What is near: an image is pooled to 8 x 8 per channel, of other numbers the first 256 are taken, and the
    root mean square of the difference to the nearest entry must be at most `distance` times the standard deviation
    within that entry, so the scale of the inputs does not matter. Whole numbers, such as token ids, must be equal, all
    of them; 8-bit images count as images. A small object may vanish in the pooling, which is one reason for audits.

    Audits with back-off (Finamore et al., INFOCOM 2022, arXiv 2112.06671), per entry: a would-be hit is run in any case
    with probability 1 / gap. When the model's answer agrees the gap doubles, up to `max_gap`; when it does not, the
    new answer takes the entry's place. The gap begins so small that the first `agreements` would-be hits are all
    audited. An entry whose two likeliest classes were less than `margin` apart in probability, by the model's own
    softmax, never answers: the next frame often tips such an answer. By chance instead of by a counter, as in
    `offramp.methods.approximate_key.AutoRefresh`, so that answers that change in step with the audits do not stay
    unnoticed, and the audits add up to an unbiased estimate.

    What holds, and what does not. A request that is not answered here gets the model's answer, under the model's
    certificate. What is answered here is covered by no certificate: that is about single inputs, this is about how they
    follow one another, and the entries change with the traffic. Audits bound nothing; they make errors rarer and say
    how many to expect (`totals().estimated_disagreements`). They compare with what the cached model says, so where a
    layer cache errs twice in the same way they agree. When the answers of a stream change without its inputs leaving
    the distance, each entry gives a wrong answer until its next audit, on average up to `max_gap` would-be hits away.
    When the scene drifts slowly entries do not drift with it: each keeps the feature that its answer was given for.

    So `answering` is False at first: every request runs, and it is only noted which ones would have been answered. That
    changes nothing else: entries, audits and chance go the same way in both modes, so `totals` and `peek` tell what
    would happen if it answered. Whoever has evidence sets `answering`; it counts from the next request on.

    distance, margin, agreements, max_gap: see above; the defaults were chosen on one half of two clips and measured on
    the other (`benchmarks/recent.py`). entries: at most that many per stream. max_bytes: of everything,
    over all streams; the least recently used stream goes first. Of a key only its own size counts, not that of objects
    that it refers to. seed: of the audits. Nothing is saved with the model; a copy begins empty and does not answer.
    May be used from many threads and by several models: entries of another model or plan never match. Inputs and logits
    that are not finite are neither kept nor answered. Every error in here is a miss, is logged, and switches it off.

    Raises InputError for arguments that make no sense.
    """

    title = "recent cache"

    def __init__(
        self,
        max_bytes: int = 64 << 20,
        *,
        distance: float = 0.05,
        entries: int = 32,
        margin: float = 0.2,
        agreements: int = 3,
        max_gap: float = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("max_bytes", max_bytes, 1), ("entries", entries, 1), ("agreements", agreements, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}; expected a whole number of at least {least}")
        if not (0 <= distance < math.inf and 0 <= margin <= 1 and 1 <= max_gap < math.inf):
            raise InputError(
                f"received distance {distance!r}, margin {margin!r} and max_gap {max_gap!r}; expected a distance of at "
                "least 0, relative to the input's own contrast, a margin from 0 to 1 and a gap of at least 1 hit"
            )
        self.max_bytes, self.distance, self.entries, self.margin = max_bytes, float(distance), entries, float(margin)
        self.agreements, self.max_gap, self.seed = agreements, float(max_gap), seed
        self.answering = False
        self._streams: OrderedDict[_StreamId, _Stream] = OrderedDict()  # least recently used first
        self._count = Counter[str]()
        self._bytes = self._serial = 0
        self._errors = self._lookup_s = self._run_s = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        settings = ("max_bytes", "distance", "entries", "margin", "agreements", "max_gap", "seed")
        return partial(type(self), **{name: getattr(self, name) for name in settings}), ()

    def __len__(self) -> int:
        return sum(len(stream.entries) for stream in list(self._streams.values()))

    # -- for its owner -----------------------------------------------------------------------------

    @staticmethod
    @contextmanager
    def stream(key: Hashable) -> Iterator[None]:
        """Calls inside belong to this stream, whichever models and recent caches they reach.

        Holds for this thread or asynchronous task, and for tasks that are made inside; a new thread belongs to no
        stream. The innermost one counts. All rows of a batch belong to it, in their order. InputError for a key that is
        None or cannot be hashed.
        """
        try:
            hash(key)
        except TypeError as error:
            raise InputError(f"the key of a stream is a {type(key).__name__}, which cannot be hashed") from error
        if key is None:
            raise InputError("the key of a stream is None; expected what tells streams apart, such as a camera's name")
        token = _STREAM.set((key,))
        try:
            yield
        finally:
            _STREAM.reset(token)

    def clear(self) -> None:
        """Forget all streams; the totals go on."""
        with self._lock:
            for stream in self._streams.values():
                for entry in stream.entries:
                    entry.live = False
            self._streams.clear()
            self._bytes = 0

    def totals(self) -> RecentTotals:
        """Counts and times since it was made."""
        with self._lock:
            count = self._count
            return RecentTotals(
                entries=len(self),
                bytes=self._bytes,
                rows=count["rows"],
                hits=count["hits"],
                run=count["run"],
                evictions=count["evictions"],
                lookup_s=self._lookup_s,
                saved_s=count["hits"] * self._run_s / max(count["run"], 1),
                streams=len(self._streams),
                unkeyed=count["unkeyed"],
                would_be=count["would_be"],
                would_be_disagreements=count["would_be_disagreements"],
                audits=count["audits"],
                audit_failures=count["audit_failures"],
                estimated_disagreements=self._errors,
            )

    # -- for the model -----------------------------------------------------------------------------

    def peek(self, inputs: Sequence[Tensor], context: Hashable, like: Tensor) -> Peeked | None:
        """What `recall` would answer to these rows if it came next and might answer; None where it knows nothing.

        Changes and counts nothing, whether it is answering or not, so it tells the would-be answers of sampled requests
        before they are put to the model. Pass whole batches: whether a row is audited depends on the rows before it.
        Another thread's request to the same stream may come between. Arguments as for `recall`.
        """
        key = _STREAM.get()
        if not self.on or key is None or not len(inputs[0]):
            return None
        try:
            stream = _stream_id(key[0], inputs, context, like)
            seen = self._look_up(stream, inputs)
            with self._lock:
                rows = self._decided(seen)
            found = [at for at, row in enumerate(rows) if row.answers]
            return Peeked(torch.tensor(found, dtype=torch.long, device=like.device), *_answers(rows, found, like))
        except Exception:  # fail closed: no error of a cache may reach the caller
            self._switch_off()
            return None

    def recall(self, inputs: Sequence[Tensor], context: Hashable, like: Tensor) -> Recalled | None:
        """What is known about these rows; None when it is switched off, or no stream is in force."""
        if not self.on or not len(inputs[0]):
            return None
        started, key, answering = time.perf_counter(), _STREAM.get(), self.answering
        try:
            if key is None:
                with self._lock:
                    self._count["unkeyed"] += len(inputs[0])
                return None
            stream = _stream_id(key[0], inputs, context, like)
            seen = self._look_up(stream, inputs)
            with self._lock:
                rows = self._decided(seen)
                self._note(stream, rows, answering=answering)
            return self._recalled(stream, rows, like, started, answering=answering)
        except Exception:
            self._switch_off()
            return None

    def remember(self, recalled: Recalled, logits_AC: Tensor, confidence_A: Tensor) -> None:
        """Store and audit by the answers to the rows that had to be run."""
        try:
            assert isinstance(recalled, _Asked)
            made = _said(logits_AC.detach(), confidence_A, self.margin)
            ran = time.perf_counter()  # waiting for the copy is waiting for the device
            with self._lock:
                if not self.on:  # another thread has switched it off meanwhile
                    return
                for row, said in zip(recalled.rows_A, made, strict=True):
                    if said is not None and math.isfinite(row.contrast):
                        self._learn(recalled.stream, row, said)
                self._count["run"] += len(made)
                self._run_s += ran - recalled.ready
                self._lookup_s += time.perf_counter() - ran
        except Exception:
            self._switch_off()

    # -- inside ------------------------------------------------------------------------------------

    def _look_up(self, stream_id: _StreamId, inputs: Sequence[Tensor]) -> list[_Row]:
        """Each row with the entry that it is near, if any."""
        feature_BS, contrast_B, exact_B = _looked_at(inputs)
        with self._lock:
            stream = self._streams.get(stream_id)
            entries = [] if stream is None else list(stream.entries)
        near_B = _nearest(feature_BS, contrast_B, exact_B, entries, self.distance)
        return [_Row(*row) for row in zip(feature_BS, exact_B, contrast_B, near_B, strict=True)]

    def _decided(self, seen: Sequence[_Row]) -> list[_Row]:
        """Which rows may be answered, in their order. Changes nothing.

        An entry that is due for an audit stays due until the audit is judged: for the rows behind it, and for the calls
        of other threads.
        """
        ahead = Counter[int]()
        rows = []
        for row in seen:
            if (entry := row.near) is None:
                rows.append(row)
                continue
            hits = entry.hits + ahead[entry.serial]
            answers = entry.live and entry.sure and _chance(self.seed, entry.serial, hits) * entry.gap >= 1
            ahead[entry.serial] += answers
            rows.append(row._replace(hits=hits, answers=answers))
        return rows

    def _note(self, stream_id: _StreamId, rows: Sequence[_Row], *, answering: bool) -> None:
        """Count would-be hits, and the stream and its entries as used."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._streams.move_to_end(stream_id)
            for row in rows:
                if row.near is not None and row.near.live:
                    stream.entries.remove(row.near)
                    stream.entries.insert(0, row.near)
        for row in rows:
            if row.near is not None:
                row.near.hits += row.answers
        self._count["rows"] += len(rows)
        self._count["hits" if answering else "would_be"] += sum(row.answers for row in rows)

    def _recalled(
        self, stream_id: _StreamId, rows: Sequence[_Row], like: Tensor, started: float, *, answering: bool
    ) -> _Asked:
        known = [at for at, row in enumerate(rows) if row.answers and answering]
        run = sorted(set(range(len(rows))) - set(known))
        source_B = torch.empty(len(rows), dtype=torch.long)
        source_B[torch.tensor(known + run, dtype=torch.long)] = torch.arange(len(rows))
        answers = _answers(rows, known, like)
        run_A = torch.tensor(run, dtype=torch.long, device=like.device)
        now = time.perf_counter()
        with self._lock:
            self._lookup_s += now - started
        return _Asked(*answers, run_A, source_B.to(like.device), now, stream_id, [rows[at] for at in run])

    def _learn(self, stream_id: _StreamId, row: _Row, said: _Said) -> None:
        if row.answers:  # not answering: what follows is as if it had been answered
            self._count["would_be_disagreements"] += row.near is not None and said.answer != row.near.answer
            return
        entry, asked = row.near, True
        if entry is None or not entry.live:  # what was learnt meanwhile may be near: from this batch, or other threads
            entry, asked = self._near_now(stream_id, row), False
        if entry is None:
            self._store(stream_id, row, said)
            return
        self._count["audits"] += 1
        first = not asked or row.hits == entry.hits  # of the audits that were due at the same time, one counts
        if said.answer == entry.answer:
            entry.hits += first
            if first and entry.sure:
                entry.gap = min(2 * entry.gap, self.max_gap)
            return
        self._count["audit_failures"] += 1
        self._errors += max(entry.gap - 1, 0.0) if asked and first else 0.0  # the others were run in any case
        self._drop(stream_id, entry)
        self._store(stream_id, row, said)

    def _near_now(self, stream_id: _StreamId, row: _Row) -> _Entry | None:
        stream = self._streams.get(stream_id)
        if stream is None:
            return None
        return _nearest(row.feature_S[None], [row.contrast], [row.exact], stream.entries, self.distance)[0]

    def _drop(self, stream_id: _StreamId, entry: _Entry) -> None:
        stream, size = self._streams[stream_id], _size(entry)
        stream.entries.remove(entry)
        entry.live = False
        stream.bytes -= size
        self._bytes -= size

    def _store(self, stream_id: _StreamId, row: _Row, said: _Said) -> None:
        gap = min(2.0 ** (1 - self.agreements), self.max_gap)
        feature_S = row.feature_S.copy()  # not the whole batch
        entry = _Entry(feature_S, row.exact, row.contrast, *said, self._serial, gap)
        self._serial += 1
        size, empty_size = _size(entry), STREAM_BYTES + sys.getsizeof(stream_id[0])
        if empty_size + size > self.max_bytes:
            return
        if stream_id not in self._streams:
            self._streams[stream_id] = _Stream(bytes=empty_size)
            self._bytes += empty_size
        self._streams.move_to_end(stream_id)
        stream = self._streams[stream_id]
        while len(stream.entries) >= self.entries:
            self._evict(stream_id)
        while self._bytes + size > self.max_bytes:
            self._evict(next(iter(self._streams)))
        stream.entries.insert(0, entry)
        stream.bytes += size
        self._bytes += size

    def _evict(self, stream_id: _StreamId) -> None:
        """Take a whole stream out or, of the one in use, the least recently used entry."""
        stream = self._streams[stream_id]
        if stream_id == next(reversed(self._streams)):
            self._drop(stream_id, stream.entries[-1])
            self._count["evictions"] += 1
            return
        for entry in stream.entries:
            entry.live = False
        self._count["evictions"] += len(stream.entries)
        self._bytes -= self._streams.pop(stream_id).bytes


def _size(entry: _Entry) -> int:
    return ENTRY_BYTES + entry.feature_S.nbytes + len(entry.value)


def _stream_id(key: Hashable, inputs: Sequence[Tensor], context: Hashable, like: Tensor) -> _StreamId:
    form = tuple((tensor.dtype, tensor.shape[1:]) for tensor in inputs)
    return key, hash((context, form, like.dtype, like.shape[1:]))


def _chance(seed: int, serial: int, hits: int) -> float:
    """A number in [0, 1) that these determine, and look as if drawn: `peek` and `recall` draw the same (SplitMix64,
    Steele, Lea and Flood, OOPSLA 2014)."""
    mask = (1 << 64) - 1
    state = seed
    for number in (serial, hits):
        state = (state ^ number) + 0x9E3779B97F4A7C15 & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


def _looked_at(inputs: Sequence[Tensor]) -> tuple[FloatArray, list[float], list[bytes]]:
    """Of each row the feature (B, S), its standard deviation, and a digest of the inputs that must be equal.

    The deviation is not finite where the inputs are not, or are too large to have one; such rows are near to nothing.
    """
    numbers, equal = [], []
    with torch.no_grad():
        for tensor in inputs:
            if tensor.ndim == 4 and (tensor.is_floating_point() or tensor.dtype == torch.uint8):
                numbers.append(F.adaptive_avg_pool2d(tensor.detach().float(), GRID).flatten(1).cpu())
            elif tensor.is_floating_point():
                flat = tensor.detach().reshape(len(tensor), -1)
                bad_B1 = ~flat.isfinite().all(1, keepdim=True)
                numbers.append(flat[:, :NUMBERS].float().masked_fill(bad_B1, math.nan).cpu())
            else:
                equal.append(tensor)
        rows = len(inputs[0])
        feature_BS = torch.cat(numbers, 1) if numbers else torch.zeros(rows, 1)
        contrast_B = feature_BS.std(1, correction=0)
        feature_BS = feature_BS.nan_to_num(0.0, 0.0, 0.0)
    return feature_BS.numpy(), contrast_B.tolist(), row_keys(equal, "") if equal else [b""] * rows


def _nearest(
    feature_BS: FloatArray,
    contrast_B: Sequence[float],
    exact_B: Sequence[bytes],
    entries: Sequence[_Entry],
    distance: float,
) -> list[_Entry | None]:
    """Per row the nearest entry, the most recently used among equals, if that is within the distance."""
    if not entries:
        return [None] * len(feature_BS)
    feature_ES = np.stack([entry.feature_S for entry in entries])
    contrast_E = np.array([entry.contrast for entry in entries])
    near: list[_Entry | None] = []
    for feature_S, contrast, exact in zip(feature_BS, contrast_B, exact_B, strict=True):
        with np.errstate(over="ignore"):
            apart_E = np.sqrt(np.square(feature_ES - feature_S).mean(1, dtype=np.float64))
        if exact:
            apart_E[[entry.exact != exact for entry in entries]] = math.inf
        at = int(apart_E.argmin())
        within = math.isfinite(contrast) and apart_E[at] <= distance * contrast_E[at]
        near.append(entries[at] if within else None)
    return near


def _said(logits_AC: Tensor, confidence_A: Tensor, margin: float) -> list[_Said | None]:
    """What the model answered; None where it is not finite."""
    logits_AC = logits_AC.cpu().contiguous()
    likeliest_A2 = logits_AC.float().softmax(-1).topk(min(2, logits_AC.shape[1]), -1).values
    sure_A = likeliest_A2[:, 0] - likeliest_A2[:, 1:].sum(1) >= margin
    columns = (
        [row.tobytes() for row in logits_AC.view(torch.uint8).numpy()],
        confidence_A.tolist(),
        _TASK.answer(logits_AC).tolist(),
        sure_A.tolist(),
    )
    finite_A = logits_AC.isfinite().all(1).tolist()
    return [_Said(*row) if finite else None for finite, *row in zip(finite_A, *columns, strict=True)]


def _answers(rows: Sequence[_Row], found: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """(H, C) logits and (H,) confidence of the entries that these rows are near."""
    entries = [entry for at in found if (entry := rows[at].near) is not None]
    confidence_H = torch.tensor([entry.confidence for entry in entries], dtype=torch.float32, device=like.device)
    return logits_of([entry.value for entry in entries], like), confidence_H
