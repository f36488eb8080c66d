"""One pass of the backbone over the traffic: what caches will read, and what the backbone answered.

Memory is bounded: everything is appended to files as half precision and mapped back read-only. Without a `workdir` the
files have no name from the start, so the system frees them when the process ends, however it ends. With one they are
kept until the fit is complete, and an interrupted recording goes on where it stopped.

Parts are disjoint by construction: the part of a row is decided by a digest of its inputs, so exact duplicates always
land on one side; a row of a separate certification stream that also occurs in the training stream is dropped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import operator
import os
import shutil
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.augment import AUGMENTATIONS, is_image, mirror, shift
from offramp.caches import Reduction
from offramp.errors import InputError, StorageError, StreamError
from offramp.observing import activations, features_of, keys_of, logits_of, reductions_of
from offramp.precision import has_fast_bfloat16
from offramp.progress import bar
from offramp.splitting import SplitModel
from offramp.streams import Batch, check_stream, concatenated, read_stream
from offramp.tasks import Classification
from offramp.types import version

TRAIN, TUNE, CERTIFY = 0, 1, 2
SHARES_ONE_STREAM = (0.60, 0.15, 0.25)
SHARES_CERTIFY_STREAM = (0.0, 0.35, 0.65)

KEY = np.dtype("V16")  # a digest: see `Batch.row_keys`
MAX_BATCH = 128
ASKED_ROWS = 8_000  # augmented copies are recorded until train holds about this many rows
MAX_COPIES = 8
SAMPLE_ROWS = 256
INVARIANCE_ROWS = 512
INVARIANCE_BATCH = 32  # `shift` draws once per batch: small ones, so that many shifts are tried
INVARIANT = 0.95  # an augmentation is free where the backbone keeps this share of its answers under it
FAITHFUL = 0.98  # train rows are run in bfloat16 where the first of them keep this share of their answers


class RecordingInterrupted(KeyboardInterrupt):
    """Ctrl-C while recording, or later. `recorded` holds the inputs recorded so far; `fit` accepts it as a stream."""

    def __init__(self, message: str, recorded: Recording) -> None:
        super().__init__(message)
        self.recorded = recorded


@contextmanager
def keeping(recording: Recording) -> Iterator[None]:
    """Within: what was recorded leaves with a Ctrl-C and with a full disk."""
    try:
        yield
    except RecordingInterrupted:
        raise
    except KeyboardInterrupt:
        message = "interrupted after recording; fit() accepts `error.recorded` in place of the stream."
        raise RecordingInterrupted(message, recording) from None
    except StorageError as error:
        error.recorded = recording
        raise


@dataclass
class Recording:
    """N recorded rows, memory-mapped. `features[k]` is what caches at split point k read: (N, *reduced shape).

    `part_N` says train, tune or certify (0, 1, 2). `copy_N` marks augmented copies, which are only ever train rows.
    `free_augmentations` names the augmentations under which the backbone was measured to keep its answers.
    `sample` holds some tuning inputs whole, for timing and for show. `backbone` is the fingerprint of the one that was
    recorded; `separate` says that tune and certify rows come from a certification stream of their own.
    """

    features: list[NDArray[Any]]
    reductions: list[Reduction]
    logits_NC: NDArray[np.float32]
    part_N: NDArray[np.uint8]
    copy_N: NDArray[np.uint8]
    label_N: NDArray[np.int64] | None
    keys_N: NDArray[np.void]
    dropped_duplicates: int
    sample: Batch
    free_augmentations: tuple[str, ...] = ()
    backbone: str = ""
    separate: bool = False

    def __len__(self) -> int:
        return len(self.part_N)

    @property
    def has_inputs(self) -> bool:
        """Whether the inputs themselves were recorded; of traffic whose inputs may not be kept they were not."""
        return len(self.features[0]) > 0

    def index(self, part: int) -> NDArray[np.intp]:
        """Row numbers of a part."""
        return np.flatnonzero(self.part_N == part)

    def counts(self) -> dict[str, int]:
        """Recorded inputs per part (augmented copies apart), for messages and the report."""
        original = self.copy_N == 0
        parts = {
            name: int(np.sum(original & (self.part_N == i))) for i, name in enumerate(("train", "tune", "certify"))
        }
        return parts | {"augmented_copies": int(np.sum(~original)), "dropped_duplicates": self.dropped_duplicates}

    def dealt_again(self, seed: int) -> Recording:
        """The same recording with its tune and certify rows dealt anew between these two parts; train rows stay."""
        held_out = self.part_N != TRAIN
        total = SHARES_CERTIFY_STREAM[TUNE] + SHARES_CERTIFY_STREAM[CERTIFY]
        shares = [share / total for share in SHARES_CERTIFY_STREAM]
        part_N = self.part_N.copy()
        # By the half of the digest that did not decide on train or held out: with the first half, rows that are held
        # out under a seed would all fall to one part under the same seed.
        part_N[held_out] = [part_of(bytes(key)[8:], seed, shares) for key in self.keys_N[held_out]]
        tune = _Digests(self.keys_N[part_N == TUNE])
        still_tune = [row for row, key in enumerate(self.sample.row_keys()) if key in tune]
        return dataclasses.replace(self, part_N=part_N, sample=self.sample.rows(torch.tensor(still_tune or [0])))

    def fingerprint(self, part: int) -> str:
        """Digest of the set of inputs of a part: the data a certificate rests on."""
        return hashlib.sha256(np.sort(_comparable(self.keys_N[self.index(part)])).data).hexdigest()


def record(
    split: SplitModel,
    task: Classification,
    stream: Iterable[object] | Recording,
    certify: Iterable[object] | None,
    *,
    seed: int,
    workdir: Path | None = None,
    time_limit_s: float | None = None,
    show: bool = False,
    bfloat16: bool = True,
) -> Recording:
    """Run the backbone once over both streams; after `time_limit_s` the rest of `stream` is left out.

    bfloat16: train rows are run in it where the hardware multiplies it and the backbone keeps its answers. What is
    tuned and certified on is always what the backbone computes.

    A Recording in place of `stream` is taken over: what is added is `certify`, less the rows it already holds.

    Raises StreamError (empty, malformed, broken stream, inputs the backbone fails on), InputError (a recording of
    another backbone) or StorageError (full disk). The first and the last carry what was recorded until then as
    `error.recorded` where that is anything at all; so does RecordingInterrupted, on Ctrl-C.
    """
    if isinstance(stream, Recording):
        _check_recorded(split, stream)
        if certify is None:
            return stream
        workdir = None
    if certify is not None:
        check_stream(certify)
    deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
    with closing(_Recorder(split, task, seed, workdir, separate=certify is not None, bfloat16=bfloat16)) as recorder:
        with recorder.keeping():
            recorder.open()
            if isinstance(stream, Recording):
                recorder.adopt(stream)
            else:
                shares = SHARES_ONE_STREAM if certify is None else (1.0, 0.0, 0.0)
                recorder.read("stream", stream, shares, time_limit_s, show=show)
            if certify is not None:
                recorder.keep_apart()
                recorder.read("certify", certify, SHARES_CERTIFY_STREAM, None, show=show)
            recorder.ask_again(deadline, show=show)
        recording = recorder.finish()
    if not len(recording):
        raise StreamError("the stream is empty: it yielded no inputs; expected at least a few hundred")
    return recording


def recording_of(split: SplitModel, train: Batch, newer: Batch, seed: int) -> Recording:
    """A recording in which one lot of observed requests trains, and of the newer ones each tunes or certifies.

    Of the newer requests those that also occur in `train` are left out. Its `sample` is the split model's own example.
    """
    known, newer_keys = set(keys_of(train)), keys_of(newer)
    fresh = newer.rows(torch.tensor([row for row, key in enumerate(newer_keys) if key not in known], dtype=torch.long))
    rows = concatenated([train, fresh])
    parts = [TRAIN] * len(train) + [part_of(key, seed, SHARES_CERTIFY_STREAM) for key in keys_of(fresh)]
    no_input: NDArray[Any] = np.zeros((0, *split.points[0].shape), np.float32)
    return Recording(
        features=[no_input, *(feature.numpy() for feature in features_of(rows))],
        reductions=reductions_of(split),
        logits_NC=logits_of(rows).numpy(),
        part_N=np.array(parts, np.uint8),
        copy_N=np.zeros(len(parts), np.uint8),
        label_N=None,
        keys_N=np.frombuffer(b"".join(keys_of(rows)), KEY),
        dropped_duplicates=len(newer) - len(fresh),
        sample=split.example,
        backbone=split.fingerprint,
        separate=True,
    )


class _Recorder:
    """Appends rows to one file per column; a journal says how many rows are complete.

    The order of writing makes it safe to be stopped anywhere: columns, then the journal, then the counters in memory.
    Rows behind the journal are cut off on resuming, and nothing that was ever handed out covers them.
    """

    def __init__(
        self,
        split: SplitModel,
        task: Classification,
        seed: int,
        workdir: Path | None,
        *,
        separate: bool,
        bfloat16: bool = True,
    ) -> None:
        self.split, self.task, self.seed, self.separate = split, task, seed, separate
        self.reductions = reductions_of(split)
        self.folder = None if workdir is None else workdir / "recording"
        self.files: dict[str, IO[bytes]] = {}
        self.columns: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        self.state = _Journal()
        self.has_bfloat16 = bfloat16 and has_fast_bfloat16(split.device)
        self.trained = _Digests()  # what a certification stream must not repeat
        self.adopted = _Digests()  # held-out rows of a recording that was taken over
        self.sample: list[Batch] = []

    @property
    def rows(self) -> int:
        return self.state.rows

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Within: what was recorded leaves with the error."""
        try:
            yield
        except KeyboardInterrupt:
            raise RecordingInterrupted(self._kept_message("interrupted"), self.finish()) from None
        except (StreamError, StorageError) as error:
            raised = type(error)(f"{str(error).rstrip('.')}. {self._kept_message('stopped')}".strip())
            raised.recorded = self.finish() if self.rows else None
            raise raised from error

    # -- reading -----------------------------------------------------------------------------------

    def read(
        self,
        name: str,
        stream: Iterable[object],
        shares: Sequence[float],
        time_limit_s: float | None,
        *,
        show: bool,
    ) -> None:
        """Record the stream called `name`. Rows that an earlier run recorded are only compared, however long it takes;
        a stream that the earlier run was through with is not read any further than then."""
        reading = _Reading(name, self._old_keys(name), tuple(shares))
        through = name in self.state.through
        description = "recording" if name == "stream" else f"recording ({name})"
        limit_from = None if len(reading.old_keys) else time.monotonic()
        with bar(description, _length(stream), show=show) as progress:
            for batch in read_stream(stream, self.split.backbone):
                for start in range(0, len(batch), MAX_BATCH):
                    self._take(batch.rows(slice(start, start + MAX_BATCH)), reading, through=through)
                progress.advance()
                progress.note(f"{self.rows:,} inputs")
                if reading.position < len(reading.old_keys):
                    continue
                if through:
                    break
                limit_from = time.monotonic() if limit_from is None else limit_from
                if time_limit_s is not None and time.monotonic() - limit_from > time_limit_s:
                    break
        if reading.position < len(reading.old_keys):
            self._refuse(f"the stream ends after {reading.position} inputs, the one recorded in {self.folder} does not")
        if not through:
            self._commit(dataclasses.replace(self.state, through=(*self.state.through, name)))

    def _take(self, batch: Batch, reading: _Reading, *, through: bool) -> None:
        keys = batch.row_keys()
        self._sample(batch, keys, reading.shares)
        skip = self._already_recorded(keys, reading)
        batch, keys = batch.rows(slice(skip, None)), keys[skip:]
        if not keys or through:
            return
        parts = [part_of(key, self.seed, reading.shares) for key in keys]
        fresh = [part == TRAIN or key not in self.trained for key, part in zip(keys, parts, strict=True)]
        kept = [i for i, keep in enumerate(fresh) if keep and not self.adopted.take(keys[i])]
        state = dataclasses.replace(
            self.state,
            consumed=self.state.consumed | {reading.name: reading.position + len(keys)},
            dropped=self.state.dropped + len(keys) - sum(fresh),
        )
        if kept:
            rows, kept_keys = batch.rows(torch.tensor(kept)), [keys[i] for i in kept]
            state = self._write(state, rows, kept_keys, [parts[i] for i in kept], copy=False)
        if self.folder is not None:
            self._append({_consumed_file(reading.name): np.frombuffer(b"".join(keys), KEY)})
        self._commit(state)
        reading.position += len(keys)

    def _sample(self, batch: Batch, keys: list[bytes], shares: Sequence[float]) -> None:
        missing = SAMPLE_ROWS - sum(map(len, self.sample))
        rows = [i for i, key in enumerate(keys) if missing > 0 and part_of(key, self.seed, shares) == TUNE][:missing]
        if rows:
            self.sample.append(batch.rows(torch.tensor(rows)).to("cpu"))

    def _write(self, state: _Journal, batch: Batch, keys: list[bytes], parts: list[int], *, copy: bool) -> _Journal:
        """Append these rows to all columns; the state with them, to be committed."""
        train_B = np.array(parts) == TRAIN
        if self.has_bfloat16 and state.bfloat16 is None and train_B.any():
            state = dataclasses.replace(state, bfloat16=self._faithful_in_bfloat16(_chosen(batch, train_B)))
        low_precision = self.has_bfloat16 and state.bfloat16
        columns, logits_BC = self._run_mixed(batch, train_B) if low_precision else self._run(batch)
        if low_precision and not bool(torch.isfinite(logits_BC).all()):
            columns, logits_BC = self._run(batch)
        if not bool(torch.isfinite(logits_BC).all()):
            raise StreamError(
                f"the backbone answers NaN or infinity for inputs near number {self.rows}; find out which inputs "
                "do that and leave them out."
            )
        labels = batch.labels_B
        columns["logits"] = logits_BC.cpu().numpy()
        columns["part"] = np.array(parts, np.uint8)
        columns["copy"] = np.full(len(keys), copy, np.uint8)
        columns["key"] = np.frombuffer(b"".join(keys), KEY)
        columns["label"] = np.full(len(keys), -1, np.int64) if labels is None else labels.cpu().numpy().astype(np.int64)
        self._append(columns)
        labelled = state.labelled and (labels is not None or copy)
        return dataclasses.replace(state, rows=state.rows + len(keys), labelled=labelled)

    def _run_mixed(self, batch: Batch, low_B: NDArray[np.bool_]) -> tuple[dict[str, NDArray[Any]], Tensor]:
        """`_run`, with these rows in bfloat16."""
        if low_B.all() or not low_B.any():
            return self._run(batch, bfloat16=bool(low_B.any()))
        parts = [self._run(_chosen(batch, low_B), bfloat16=True), self._run(_chosen(batch, ~low_B))]
        place_B = np.argsort(np.argsort(~low_B, kind="stable"))  # of each row behind one another, low precision first
        columns = {name: np.concatenate([part[0][name] for part in parts])[place_B] for name in parts[0][0]}
        return columns, torch.cat([part[1] for part in parts])[torch.from_numpy(place_B)]

    def _faithful_in_bfloat16(self, batch: Batch) -> bool:
        """Whether the backbone keeps its answers to these rows in bfloat16."""
        return keeps_answers(lambda *, bfloat16: self._run(batch, bfloat16=bfloat16)[1], self.task)

    @torch.inference_mode()
    def _run(self, batch: Batch, *, bfloat16: bool = False) -> tuple[dict[str, NDArray[Any]], Tensor]:
        """What caches will read at each split point, and the backbone's logits."""
        try:
            features, logits_BC = activations(self.split, self.reductions, self.task, batch, bfloat16=bfloat16)
            return {f"point_{position}": _storable(feature) for position, feature in enumerate(features)}, logits_BC
        except Exception as error:
            raise StreamError(
                f"the backbone fails on inputs near number {self.rows}: {type(error).__name__}: {error}"
            ) from error

    # -- taking a recording over -------------------------------------------------------------------

    def adopt(self, recorded: Recording) -> None:
        """Begin with these rows. Without a certification stream of their own, all of them are for training now."""
        for start in range(0, len(recorded), MAX_BATCH):
            chunk = slice(start, start + MAX_BATCH)
            columns = {f"point_{i}": np.array(feature[chunk]) for i, feature in enumerate(recorded.features)}
            part_B = recorded.part_N[chunk]
            columns["logits"] = np.array(recorded.logits_NC[chunk])
            columns["part"] = part_B if recorded.separate else np.full_like(part_B, TRAIN)
            columns["copy"], columns["key"] = recorded.copy_N[chunk], recorded.keys_N[chunk]
            label_N = recorded.label_N
            columns["label"] = np.full(len(part_B), -1, np.int64) if label_N is None else label_N[chunk]
            self._append(columns)
            self._commit(dataclasses.replace(self.state, rows=self.rows + len(part_B)))
        if recorded.separate:
            self.adopted = _Digests(recorded.keys_N[recorded.part_N != TRAIN])
        asked = int(recorded.copy_N.sum())
        self._commit(dataclasses.replace(self.state, asked=asked, labelled=recorded.label_N is not None))

    def keep_apart(self) -> None:
        """Between the streams: a separate certification stream must not repeat what trained the caches."""
        if self.rows:
            self.trained = _Digests(self._map("key")[self._map("part") == TRAIN])

    # -- asking the backbone again -----------------------------------------------------------------

    def ask_again(self, deadline: float | None, *, show: bool) -> None:
        """While train rows are few, record augmented copies of them with the backbone's own answers to the copies."""
        if not takes_images(self.split):
            return
        snapshot = self.finish()
        train = np.flatnonzero((snapshot.part_N == TRAIN) & (snapshot.copy_N == 0))
        if not len(train):
            return
        if self.state.free is None:
            free = self._free_augmentations(snapshot, train[:INVARIANCE_ROWS])
            self._commit(dataclasses.replace(self.state, free=free))
        copies = min(MAX_COPIES, ASKED_ROWS // len(train))
        if not copies:
            return
        held_out = _Digests(snapshot.keys_N[snapshot.part_N != TRAIN])
        with bar("asking about variations", copies * len(train), show=show) as progress:
            for number in range(copies):
                for start in range(0, len(train), MAX_BATCH):
                    rows = train[start : start + MAX_BATCH]
                    if deadline is not None and time.monotonic() > deadline:
                        return
                    if number * len(train) + start >= self.state.asked:  # else an earlier run has asked
                        self._ask(snapshot.features[0], rows, held_out, (number, start))
                    progress.advance(len(rows))

    def _ask(self, inputs: NDArray[Any], rows: NDArray[np.intp], held_out: _Digests, chunk: tuple[int, int]) -> None:
        """Record one copy of each of these rows, except where it happens to equal a held-out row."""
        entropy = np.random.SeedSequence([self.seed, *chunk]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(entropy))
        batch = self.split.example.passing(shift(mirror(torch.from_numpy(inputs[rows]), generator), generator))
        keys = batch.row_keys()
        kept = [i for i, key in enumerate(keys) if key not in held_out]
        state = dataclasses.replace(self.state, asked=self.state.asked + len(rows))
        if kept:
            batch, keys = batch.rows(torch.tensor(kept)), [keys[i] for i in kept]
            state = self._write(state, batch, keys, [TRAIN] * len(kept), copy=True)
        self._commit(state)

    def _free_augmentations(self, snapshot: Recording, rows: NDArray[np.intp]) -> tuple[str, ...]:
        """The augmentations that leave at least INVARIANT of the backbone's answers as they are."""
        images, logits_NC = torch.from_numpy(snapshot.features[0][rows]), torch.from_numpy(snapshot.logits_NC[rows])
        answer_N = self.task.answer(logits_NC)
        free = []
        for name, augmentation in AUGMENTATIONS.items():
            generator = torch.Generator().manual_seed(self.seed)
            agreed = 0
            for start in range(0, len(rows), INVARIANCE_BATCH):
                chunk = slice(start, start + INVARIANCE_BATCH)
                copies = self.split.example.passing(augmentation(images[chunk], generator))
                answer_B = self.task.answer(self._run(copies)[1]).cpu()
                agreed += int(self.task.agree(answer_B, answer_N[chunk]).sum())
            if agreed >= INVARIANT * len(rows):
                free.append(name)
        return tuple(free)

    # -- files -------------------------------------------------------------------------------------

    def _append(self, columns: dict[str, NDArray[Any]]) -> None:
        with storing("the recording", self.folder):
            for name, values in columns.items():
                if not name.startswith("consumed"):
                    self.columns.setdefault(name, (values.shape[1:], values.dtype))
                write_all(self._file(name), values.tobytes())

    def _file(self, name: str) -> IO[bytes]:
        """Unbuffered: what a full disk refuses must not wait in a buffer for the file to be closed."""
        if name not in self.files:
            if self.folder is None:
                file: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as the recording
            else:
                file = (self.folder / f"{name}.bin").open("ab+", buffering=0)
            self.files[name] = file
        return self.files[name]

    def finish(self) -> Recording:
        """What is complete so far, mapped read-only."""
        maps = {name: self._map(name) for name in self.columns}
        empty: NDArray[Any] = np.zeros(0)
        return Recording(
            features=[maps.get(f"point_{i}", empty) for i in range(len(self.split.points))],
            reductions=self.reductions,
            logits_NC=maps.get("logits", empty),
            part_N=np.array(maps.get("part", empty), np.uint8),
            copy_N=np.array(maps.get("copy", empty), np.uint8),
            label_N=np.array(maps["label"]) if self.state.labelled and self.rows else None,
            keys_N=np.array(maps.get("key", np.zeros(0, KEY))),
            dropped_duplicates=self.state.dropped,
            sample=concatenated(self.sample) if self.sample else self.split.example,
            free_augmentations=self.state.free or (),
            backbone=self.split.fingerprint,
            separate=self.separate,
        )

    def close(self) -> None:
        """Close the files; what `finish` mapped stays readable."""
        for file in self.files.values():
            file.close()

    def _map(self, name: str) -> NDArray[Any]:
        shape, dtype = self.columns[name]
        if not self.rows:
            return np.zeros((0, *shape), dtype)
        return np.memmap(self._file(name), dtype=dtype, mode="r", shape=(self.rows, *shape))

    # -- resuming ----------------------------------------------------------------------------------

    def open(self) -> None:
        """Go on with the recording in the folder where it fits this call, else begin a new one there."""
        if self.folder is None:
            return
        with storing("the recording", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            document = _read_json(self.folder / "journal.json")
            if document.get("of") == self._identity() and self._complete(document):
                self._resume(document)
                return
            shutil.rmtree(self.folder)
            self.folder.mkdir()

    def _identity(self) -> dict[str, Any]:
        return {
            "offramp": version(),
            "backbone": self.split.fingerprint,
            "seed": self.seed,
            "separate": self.separate,
            "points": [point.name for point in self.split.points],
        }

    def _complete(self, document: dict[str, Any]) -> bool:
        """Whether the files hold at least what the journal says."""
        assert self.folder is not None
        sizes = {f"{name}.bin": _row_bytes(*column) * document["rows"] for name, column in document["columns"].items()}
        sizes |= {f"{_consumed_file(name)}.bin": 16 * count for name, count in document["consumed"].items()}
        paths = {name: self.folder / name for name in sizes}
        return all(path.exists() and path.stat().st_size >= sizes[name] for name, path in paths.items())

    def _resume(self, document: dict[str, Any]) -> None:
        self.columns = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in document["columns"].items()}
        names = [field.name for field in dataclasses.fields(_Journal)]
        state = {name: document[name] for name in names if name in document}
        free = state["free"]
        self.state = _Journal(
            **state | {"through": tuple(state["through"]), "free": None if free is None else tuple(free)}
        )
        for name, (shape, dtype) in self.columns.items():
            # A crash may have left part of a batch behind the last complete row.
            self._file(name).truncate(self.rows * _row_bytes(shape, dtype))
        for name, count in self.state.consumed.items():
            self._file(_consumed_file(name)).truncate(16 * count)

    def _old_keys(self, name: str) -> NDArray[np.void]:
        """Digests of the rows of this stream that an earlier run consumed, in order."""
        count = self.state.consumed.get(name, 0)
        if not count or self.folder is None:
            return np.zeros(0, KEY)
        return np.fromfile(self.folder / f"{_consumed_file(name)}.bin", KEY, count)

    def _already_recorded(self, keys: list[bytes], reading: _Reading) -> int:
        """How many of these rows an earlier run recorded: the stream is read again from its start."""
        old = reading.old_keys[reading.position : reading.position + len(keys)]
        if old.tobytes() != b"".join(keys[: len(old)]):
            self._refuse(
                f"the stream differs from the one recorded in {self.folder} (from input {reading.position} onwards)"
            )
        reading.position += len(old)
        return len(old)

    def _refuse(self, what: str) -> None:
        raise StreamError(
            f"{what}: to resume needs the same inputs in the same order. Switch shuffling off, or delete that folder "
            "to start again."
        )

    def _commit(self, state: _Journal) -> None:
        """Make `state` the one that counts."""
        if self.folder is not None:
            columns = {name: (shape, dtype.str) for name, (shape, dtype) in self.columns.items()}
            document = {"of": self._identity(), "columns": columns, **dataclasses.asdict(state)}
            temporary = self.folder / "journal.json.tmp"
            with storing("the recording", self.folder):
                temporary.write_text(json.dumps(document))
                os.replace(temporary, self.folder / "journal.json")
        self.state = state

    def _kept_message(self, verb: str) -> str:
        if not self.rows:
            return ""
        if self.folder is not None:
            return f"Recording {verb} after {self.rows:,} inputs; they are kept in {self.folder}: call again to go on."
        return f"Recording {verb} after {self.rows:,} inputs; fit() accepts `error.recorded` in place of the stream."


@dataclass(frozen=True)
class _Journal:
    """How far a recording has come. `rows` counts copies, `consumed` is per stream, `through` names finished streams,
    `asked` counts rows that copies were asked about, `free` the measured free augmentations and `bfloat16` whether
    train rows keep their answers in it (None: not measured)."""

    rows: int = 0
    consumed: dict[str, int] = dataclasses.field(default_factory=dict)
    through: tuple[str, ...] = ()
    dropped: int = 0
    labelled: bool = True
    asked: int = 0
    free: tuple[str, ...] | None = None
    bfloat16: bool | None = None


@dataclass
class _Reading:
    """One stream while it is read: the next input's number, and the digests of those recorded by an earlier run."""

    name: str
    old_keys: NDArray[np.void]
    shares: tuple[float, ...]
    position: int = 0


class _Digests:
    """Digests with their numbers of occurrences. Sorted arrays: a set or a dict takes several times the memory."""

    def __init__(self, keys_N: NDArray[np.void] | None = None) -> None:
        keys_N = np.zeros(0, KEY) if keys_N is None else keys_N
        self._keys, self._left = np.unique(_comparable(keys_N), return_counts=True)

    def __contains__(self, key: bytes) -> bool:
        return self._position(key) is not None

    def take(self, key: bytes) -> bool:
        """Whether there is (still) such a digest; if so, there is one less from now on."""
        at = self._position(key)
        if at is None or self._left[at] == 0:
            return False
        self._left[at] -= 1
        return True

    def _position(self, key: bytes) -> int | None:
        at = int(np.searchsorted(self._keys, np.bytes_(key)))
        # numpy leaves out zero bytes at the end of a string.
        return at if at < len(self._keys) and self._keys[at].ljust(KEY.itemsize, b"\0") == key else None


def _comparable(keys_N: NDArray[np.void]) -> NDArray[np.bytes_]:
    """As strings of bytes, which numpy can sort."""
    return np.ascontiguousarray(keys_N).view(f"S{KEY.itemsize}")


def _check_recorded(split: SplitModel, recorded: Recording) -> None:
    if recorded.backbone != split.fingerprint or len(recorded.features) != len(split.points):
        raise InputError(
            "the recording passed in place of the stream was made with another backbone (or with other weights or an "
            "input of another shape); pass the stream itself to record this one"
        )


def takes_images(split: SplitModel) -> bool:
    """Whether its inputs are images and nothing else."""
    point = split.points[0]
    return is_image(tuple(point.shape), floating=point.dtype.is_floating_point) and len(split.example.tensors) == 1


def keeps_answers(logits: Callable[..., Tensor], task: Classification) -> bool:
    """Whether a backbone keeps its answers in bfloat16; not where it fails in it, whatever it raises. logits(bfloat16=)
    are those of some inputs, in it or not."""
    try:
        low_BC = logits(bfloat16=True)
    except Exception:
        return False
    if not bool(torch.isfinite(low_BC).all()):
        return False
    agree_B = task.agree(task.answer(low_BC), task.answer(logits(bfloat16=False)))
    return int(agree_B.sum()) >= FAITHFUL * len(agree_B)


def part_of(key: bytes, seed: int, shares: Sequence[float]) -> int:
    """The part of a row, decided by its digest and the seed alone."""
    mixed = np.random.SeedSequence([seed, int.from_bytes(key[:8], "little")]).generate_state(1)[0]
    return bisect_right(list(itertools.accumulate(shares))[:-1], float(mixed) / 2**32)


def _chosen(batch: Batch, chosen_B: NDArray[np.bool_]) -> Batch:
    return batch.rows(torch.from_numpy(np.flatnonzero(chosen_B)))


def _storable(feature: Tensor) -> NDArray[Any]:
    stored: NDArray[Any] = (feature if feature.is_floating_point() else feature.to(torch.int32)).cpu().numpy()
    return stored


@contextmanager
def storing(what: str, folder: Path | None) -> Iterator[None]:
    """Within: an OSError is a StorageError. folder: where it is written; None is the system's place for such files."""
    try:
        yield
    except StorageError:  # is an OSError, and has said so already
        raise
    except OSError as error:
        raise StorageError(
            f"could not write {what} to {folder or tempfile.gettempdir()}: {error.strerror or error}. Free some space, "
            "or choose another place with `workdir=` (or TMPDIR)."
        ) from error


@contextmanager
def unnamed_file(what: str, folder: Path | None) -> Iterator[IO[bytes]]:
    """An unbuffered file that the system frees once nobody has it open or mapped, however the process ends."""
    with storing(what, folder):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(buffering=0, dir=folder) as file:
            yield file


def write_all(file: IO[bytes], data: bytes) -> None:
    """All of it, also where an unbuffered file takes a part at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _consumed_file(name: str) -> str:
    return f"consumed_{name}"


def _row_bytes(shape: Sequence[int], dtype: np.dtype[Any] | str) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _length(stream: Iterable[object]) -> int | None:
    """Number of batches, where the stream knows it."""
    try:
        return operator.length_hint(stream) or None
    except TypeError:
        return None
