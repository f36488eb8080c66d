"""Answers that were given before: exact repeats of an input, and inputs that are nearly the same.

`Results` is what a cached model asks before its first stage. `ResultCache` follows the traffic, which is safe because
all it says is what the certified model said to the very same input; `caches.recent` has another kind. `KeyCache`
answers for inputs that share a coarse key; whether it agrees is a matter of chance, so it is filled once, frozen, and
certified together with the caches behind it.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from offramp.caches.base import Cache
from offramp.caches.reduction import Reduction
from offramp.errors import InputError

log = logging.getLogger("offramp")

# --- what a cached model asks before its first stage ----------------------------------------------


@dataclass(frozen=True)
class ResultTotals:
    """What a result cache holds and has done. A row is a hit, or it was run; the others equalled a row beside them.

    lookup_s: seconds spent on keys, look-ups and storing. saved_s: hits times the mean seconds of a row that was run, a
    rough estimate because rows in larger batches are cheaper. It pays while saved_s exceeds lookup_s.
    """

    entries: int
    bytes: int
    rows: int
    hits: int
    run: int
    evictions: int
    lookup_s: float
    saved_s: float


@dataclass(frozen=True)
class Recalled:
    """What is known about the B rows of a batch: H of them have stored answers, A others have to be run.

    source_B numbers the answer of each row among the H known ones, followed by the A that are run. ready: when the
    look-up ended, on the clock of `time.perf_counter`. Each kind of result cache adds what it wants to know again when
    the answers to the A rows are there.
    """

    logits_HC: Tensor
    confidence_H: Tensor
    run_A: Tensor
    source_B: Tensor
    ready: float


class Results(ABC):
    """Answers that were given before: what `CachedModel.result_cache` takes.

    No error may leave `recall` or `remember`: it is a miss, is logged once, and sets `on` to False, after which
    neither of them does anything. May be used from many threads and by several models. A copy begins empty.
    """

    title = "result cache"

    def __init__(self) -> None:
        self.on = True
        self._lock = threading.Lock()

    @abstractmethod
    def recall(self, inputs: Sequence[Tensor], context: Hashable, like: Tensor) -> Recalled | None:
        """What is known about these rows; None where nothing can be, as when it is switched off.

        inputs: tensors of B rows each. context: whose answers these are. like: a tensor of logits, (any, C), whose
        width, type and device known answers get.
        """

    @abstractmethod
    def remember(self, recalled: Recalled, logits_AC: Tensor, confidence_A: Tensor) -> None:
        """Learn the answers to the rows that had to be run."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all answers; the totals go on."""

    @abstractmethod
    def totals(self) -> ResultTotals:
        """Counts and times since it was made."""

    def _switch_off(self) -> None:
        """To be called where an exception is handled."""
        with self._lock:
            first, self.on = self.on, False
        if first:
            log.exception("the %s failed; it is switched off", self.title)
            self.clear()


def logits_of(values: Sequence[bytes], like: Tensor) -> Tensor:
    """(H, C) logits from the bytes of their rows, with the width, type and device of `like`."""
    if not values:
        return like[:0]
    flat = torch.frombuffer(bytearray().join(values), dtype=like.dtype)
    return flat.reshape(len(values), like.shape[1]).to(like.device)


# --- exact repeats --------------------------------------------------------------------------------


@dataclass(slots=True)
class _Entry:
    value: bytes  # a row of logits
    confidence: float
    stored: float
    used: float
    hits: int = 0


_ITEM_BYTES = 160  # one item of an OrderedDict, with its share of the empty slots; a test measures it
ENTRY_BYTES = (
    _ITEM_BYTES
    + sys.getsizeof(_Entry(b"", 0.0, 0.0, 0.0))
    + sys.getsizeof(bytes(16))
    + sys.getsizeof(b"")
    + 4 * sys.getsizeof(0.0)
)  # what an entry takes besides its row of logits


@dataclass(frozen=True)
class EntryStatistics:
    """One stored answer: how often it was given again, and when (seconds since the epoch) it was stored and used."""

    hits: int
    stored: float
    used: float
    bytes: int


@dataclass(frozen=True)
class _Asked(Recalled):
    keys_A: list[bytes]


class ResultCache(Results):
    """Remembers the answers of a cached model and gives them again, bit for bit, to exact repeats of their inputs.

        cached.result_cache = offramp.ResultCache(max_bytes=64 << 20)

    A row's key is the 128-bit XXH3 hash of the type, shape and bytes of all its input tensors; rows that are equal to
    another one in the same batch are run once. Entries are dropped least recently used first. `max_bytes` covers keys,
    values and bookkeeping. Nothing is saved with the model, and a copy begins empty. May be used from many threads and
    by several models; entries of another model or plan never match.

    The certificate holds as it is. A stored answer was given to that input by the certified plan or, where that was
    bypassed or switched off, by the backbone; so a repeat disagrees only if the plan would have disagreed on it: over
    any traffic the answers that disagree are among those that disagree where the plan is bypassed at no batch size. The
    certificate bounds the share of those on one condition, the same with or without a result cache: an input that comes
    often in the traffic came as often among the inputs that it was certified on. Where certification inputs were
    stripped of repeats, a popular input weighs more in the traffic than in the bound.

    Every error in here is a miss, is logged, and switches the result cache off. Hash collisions have to be expected
    after some 2**64 different inputs; XXH3 does not withstand those who construct collisions on purpose.

    Raises InputError when `max_bytes` is not a whole number or has no room for one entry.
    """

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes <= ENTRY_BYTES:
            raise InputError(
                f"max_bytes is {max_bytes!r}; expected a whole number of bytes above {ENTRY_BYTES}, which one entry "
                "takes besides its answer. 64 << 20 (64 MiB) holds about a hundred thousand answers of ten classes."
            )
        super().__init__()
        self.max_bytes = max_bytes
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # least recently used first
        self._bytes = self._rows = self._hits = self._run = self._evictions = 0
        self._lookup_s = self._run_s = 0.0

    def __reduce__(self) -> tuple[type[Self], tuple[int]]:
        return type(self), (self.max_bytes,)

    def __len__(self) -> int:
        return len(self._entries)

    # -- for the model -----------------------------------------------------------------------------

    def recall(self, inputs: Sequence[Tensor], context: Hashable, like: Tensor) -> Recalled | None:
        """What is known about these rows; None once it is switched off."""
        if not self.on:
            return None
        started = time.perf_counter()
        try:
            return self._recall(row_keys(inputs, context), like, started)
        except Exception:  # fail closed: no error of a cache may reach the caller
            self._switch_off()
            return None

    def remember(self, recalled: Recalled, logits_AC: Tensor, confidence_A: Tensor) -> None:
        """Store the answers to the rows that had to be run."""
        try:
            assert isinstance(recalled, _Asked)
            rows = logits_AC.detach().cpu().contiguous().view(torch.uint8).numpy()
            values, confidences = [row.tobytes() for row in rows], confidence_A.tolist()
            ran = time.perf_counter()  # waiting for the copy is waiting for the device
            with self._lock:
                if not self.on:  # another thread has switched it off meanwhile
                    return
                now = time.time()
                for key, value, confidence in zip(recalled.keys_A, values, confidences, strict=True):
                    self._store(key, _Entry(value, confidence, now, now))
                self._run += len(values)
                self._run_s += ran - recalled.ready
                self._lookup_s += time.perf_counter() - ran
        except Exception:
            self._switch_off()

    # -- for its owner -----------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget all answers; the totals go on."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def entries(self) -> list[EntryStatistics]:
        """Statistics of all entries, least recently used first."""
        with self._lock:
            return [EntryStatistics(e.hits, e.stored, e.used, _size(e)) for e in self._entries.values()]

    def totals(self) -> ResultTotals:
        """Counts and times since it was made."""
        with self._lock:
            return ResultTotals(
                entries=len(self._entries),
                bytes=self._bytes,
                rows=self._rows,
                hits=self._hits,
                run=self._run,
                evictions=self._evictions,
                lookup_s=self._lookup_s,
                saved_s=self._hits * self._run_s / max(self._run, 1),
            )

    # -- inside ------------------------------------------------------------------------------------

    def _recall(self, keys: list[bytes], like: Tensor, started: float) -> _Asked:
        known: list[_Entry] = []
        run: dict[bytes, int] = {}  # the first row with each unknown key
        source: list[int] = []  # a place among the known, or one among those to run, inverted
        places: dict[bytes, int] = {}
        with self._lock:
            now = time.time()
            for row, key in enumerate(keys):
                entry = self._entries.get(key)
                if entry is None:
                    run.setdefault(key, row)
                    source.append(~places.setdefault(key, len(places)))
                else:
                    self._entries.move_to_end(key)
                    entry.hits, entry.used = entry.hits + 1, now
                    source.append(len(known))
                    known.append(entry)
            self._rows += len(keys)
            self._hits += len(known)
        return _Asked(
            logits_of([entry.value for entry in known], like),
            torch.tensor([entry.confidence for entry in known], dtype=torch.float32, device=like.device),
            torch.tensor(list(run.values()), dtype=torch.long, device=like.device),
            torch.tensor([at if at >= 0 else len(known) + ~at for at in source], dtype=torch.long, device=like.device),
            self._ready(started),
            list(run),
        )

    def _ready(self, started: float) -> float:
        now = time.perf_counter()
        with self._lock:
            self._lookup_s += now - started
        return now

    def _store(self, key: bytes, entry: _Entry) -> None:
        size = _size(entry)
        if key in self._entries or size > self.max_bytes:  # there already: another thread was asked the same
            return
        while self._bytes + size > self.max_bytes:
            self._bytes -= _size(self._entries.popitem(last=False)[1])
            self._evictions += 1
        self._entries[key] = entry
        self._bytes += size


def _size(entry: _Entry) -> int:
    return ENTRY_BYTES + len(entry.value)


def row_keys(inputs: Sequence[Tensor], context: Hashable) -> list[bytes]:
    """(B,) 16-byte keys, whatever the memory layout and device of the inputs."""
    form = ";".join(f"{tensor.dtype}{tuple(tensor.shape[1:])}" for tensor in inputs)
    seed = hash((context, form)) & (1 << 64) - 1
    columns = [_bytes_of_rows(tensor) for tensor in inputs]
    if len(columns) == 1:
        return [xxhash.xxh3_128_digest(row.data, seed=seed) for row in columns[0]]
    keys = []
    for rows in zip(*columns, strict=True):
        digest = xxhash.xxh3_128(seed=seed)
        for row in rows:
            digest.update(row.data)
        keys.append(digest.digest())
    return keys


def _bytes_of_rows(tensor: Tensor) -> NDArray[np.uint8]:
    rows = tensor.detach().cpu().reshape(len(tensor), math.prod(tensor.shape[1:])).contiguous()
    return np.asarray(rows.view(torch.uint8).numpy())


# --- near repeats ---------------------------------------------------------------------------------

KEY_BYTES = 16  # hash, answer and rate of one key
PRIOR_ROWS = 1.0  # how many imagined rows, answered at random, count beside those stored under a key
FILL_BATCH = 1024
RANGE_ROWS = 4096  # rows that the range of the levels is read off
RANGE_SHARES = (0.01, 0.99)  # quantiles that bound it


def agreement(logits_BC: Tensor) -> Tensor:
    """(B,) largest class probability, and 0 where the scores of all classes are equal: a key that was never seen."""
    unseen_B = logits_BC.amax(-1) == logits_BC.amin(-1)
    return logits_BC.softmax(-1).amax(-1).masked_fill(unseen_B, 0.0)


class KeyCache(Cache):
    """A frozen table from approximate keys of the input to answers (Finamore et al., INFOCOM 2022, arXiv 2112.06671).

    The key of an image is the image pooled to grid x grid and quantised to a few `levels` per number; that of anything
    else is its first `grid` numbers, quantised as well, or as they are where levels is 0 (token ids). Under a key stand
    the answer that the backbone gave most often and, as confidence, the share of stored rows with that answer,
    smoothed towards chance; a key that was never seen has confidence 0. The paper's table is refreshed while it serves
    (`offramp.methods.approximate_key.AutoRefresh`); a certificate cannot cover a table that changes.
    """

    kind = "key"
    suits_selector = False  # it would be sure of keys that were never seen

    key_S: Tensor  # (S,) int64, rising
    answer_S: Tensor  # (S,) int32
    rate_S: Tensor  # (S,) float32
    low_F1: Tensor
    width_F1: Tensor
    factor_FP: Tensor

    def __init__(
        self,
        name: str,
        point: str,
        activation_shape: tuple[int, ...],
        classes: int,
        *,
        grid: int,
        levels: int,
        keys: int = 1,
    ) -> None:
        if grid < 1 or levels < 0 or levels == 1:
            raise InputError(
                f"received grid {grid} and levels {levels}; an approximate key needs a grid of at least 1 and levels "
                "of at least 2, or 0 to take whole numbers as they are"
            )
        super().__init__(name, point, Reduction())
        self.activation_shape, self.classes = tuple(activation_shape), classes
        self.grid, self.levels = grid, levels
        self.dropped = 0
        self.pooled = len(self.activation_shape) == 3
        features = self.activation_shape[0] if self.pooled else min(grid, math.prod(self.activation_shape))
        positions = grid * grid if self.pooled else 1
        self.register_buffer("key_S", torch.zeros(keys, dtype=torch.long))
        self.register_buffer("answer_S", torch.zeros(keys, dtype=torch.int32))
        self.register_buffer("rate_S", torch.zeros(keys))  # 0: nothing is known yet
        self.register_buffer("low_F1", torch.zeros(features, 1))
        self.register_buffer("width_F1", torch.ones(features, 1))
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("factor_FP", torch.randint(-(2**62), 2**62, (features, positions), generator=generator))

    def fill(
        self, feature_N: NDArray[Any], rows: NDArray[np.intp], answer_N: NDArray[np.integer[Any]], max_bytes: int
    ) -> None:
        """Store the answers to these recorded rows; what exceeds `max_bytes` is cut, the rarest keys first.

        feature_N: recorded inputs. answer_N: (len(rows),) the backbone's answers to `rows`. Raises InputError where
        there is nothing to store or no room for a single key.
        """
        if not len(rows) or max_bytes < KEY_BYTES:
            raise InputError(
                f"cache {self.name} was given {len(rows)} rows and {max_bytes} bytes to store them; expected at least "
                f"one row and {KEY_BYTES} bytes"
            )
        if self.levels:
            self._set_range(feature_N[rows[:: -(-len(rows) // RANGE_ROWS)]])
        chunks = [rows[start : start + FILL_BATCH] for start in range(0, len(rows), FILL_BATCH)]
        key_N = np.concatenate([self.keys(torch.from_numpy(np.array(feature_N[chunk]))).numpy() for chunk in chunks])
        key_S, answer_S, agree_S, seen_S = _majorities(key_N, answer_N)
        kept = np.sort(np.argsort(-seen_S, kind="stable")[: max_bytes // KEY_BYTES])
        self.dropped = len(key_S) - len(kept)
        if self.dropped:
            log.info("cache %s: cut from %d to %d keys, max_bytes=%d", self.name, len(key_S), len(kept), max_bytes)
        rate_S = (agree_S + PRIOR_ROWS / self.classes) / (seen_S + PRIOR_ROWS)
        self.key_S = torch.from_numpy(key_S[kept])
        self.answer_S = torch.from_numpy(answer_S[kept].astype(np.int32))
        self.rate_S = torch.from_numpy(rate_S[kept].astype(np.float32)).clamp(max=1 - 1e-6)  # its logits stay finite

    def keys(self, feature: Tensor) -> Tensor:
        """(B,) int64 hashes of the approximate keys of these inputs."""
        # A random linear hash modulo 2**64: two different keys share theirs by chance alone.
        return (self._digits(feature) * self.factor_FP).flatten(1).sum(1)

    def from_feature(self, feature: Tensor, read_BC: Tensor | None = None) -> Tensor:
        del read_BC
        key_B = self.keys(feature)
        at_B = torch.searchsorted(self.key_S, key_B).clamp(max=len(self.key_S) - 1)
        rate_B1 = torch.where(self.key_S[at_B] == key_B, self.rate_S[at_B], 0.0)[:, None]
        others_B1 = torch.log((1 - rate_B1) / max(self.classes - 1, 1))
        logits_BC = others_B1.expand(-1, self.classes).scatter(1, self.answer_S[at_B].long()[:, None], rate_B1.log())
        return torch.where(rate_B1 > 0, logits_BC, 0.0)

    def confidences(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        return {"agreement": agreement}

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "activation_shape": list(self.activation_shape),
            "classes": self.classes,
            "grid": self.grid,
            "levels": self.levels,
            "keys": len(self.key_S),
            "dropped": self.dropped,
        }

    @classmethod
    def described(cls, description: Mapping[str, Any]) -> Self:
        cache = cls(
            description["name"],
            description["point"],
            tuple(description["activation_shape"]),
            description["classes"],
            grid=description["grid"],
            levels=description["levels"],
            keys=description["keys"],
        )
        cache.dropped = description["dropped"]
        return cache

    def _numbers(self, feature: Tensor) -> Tensor:
        """(B, F, P): channels by places of an image, or the first numbers of anything else."""
        if self.pooled:
            return F.adaptive_avg_pool2d(feature.float(), self.grid).flatten(2)
        return feature.reshape(len(feature), -1)[:, : self.grid, None]

    def _digits(self, feature: Tensor) -> Tensor:
        """(B, F, P) int64 levels; -1 for NaN, which no stored row has."""
        number = self._numbers(feature)
        if not self.levels:
            return number.long()
        level = ((number.float() - self.low_F1) / self.width_F1).floor().clamp(0, self.levels - 1)
        return level.nan_to_num(nan=-1.0).long()

    def _set_range(self, features: NDArray[Any]) -> None:
        number_FN = self._numbers(torch.from_numpy(np.array(features))).transpose(0, 1).flatten(1)
        low_F, high_F = np.quantile(number_FN.double().numpy(), RANGE_SHARES, axis=1)
        self.low_F1 = torch.from_numpy(low_F).float()[:, None]
        self.width_F1 = torch.from_numpy((high_F - low_F) / self.levels).float().clamp(min=1e-6)[:, None]


def _majorities(
    key_N: NDArray[np.int64], answer_N: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Per key, in rising order: the key, its most frequent answer (the smallest on a tie), the rows with that answer
    and all rows."""
    pair_P2, count_P = np.unique(np.stack([key_N, answer_N], axis=1), axis=0, return_counts=True)
    key_S, start_S = np.unique(pair_P2[:, 0], return_index=True)
    seen_S = np.add.reduceat(count_P, start_S)
    best_S = np.lexsort((-count_P, pair_P2[:, 0]))[start_S]  # sorting keeps every key's span in its place
    return key_S, pair_P2[best_S, 1], count_P[best_S], seen_S
