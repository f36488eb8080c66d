"""One pass of the backbone over the traffic: what caches will read, and what the backbone answered.

Memory is bounded: everything is appended to files as half precision and mapped back read-only. Without a `workdir` the
files have no name from the start, so the system frees them when the process ends, however it ends. With one they are
kept until the fit is complete, and an interrupted recording goes on where it stopped.

Parts are disjoint by construction: the part of a row is decided by a digest of its inputs, so exact duplicates always
land on one side; a row of a separate certification stream that also occurs in the training stream is dropped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.augment import AUGMENTATIONS, is_image, mirror, shift
from offramp.caches import reduction_for
from offramp.caches.learned import Reduction
from offramp.errors import StorageError, StreamError
from offramp.progress import Bar, bar
from offramp.splitting import SplitModel
from offramp.streams import Batch, read_stream
from offramp.tasks import Classification

TRAIN, TUNE, CERTIFY = 0, 1, 2
SHARES_ONE_STREAM = (0.60, 0.15, 0.25)
SHARES_CERTIFY_STREAM = (0.0, 0.35, 0.65)

MAX_BATCH = 128
ASKED_ROWS = 8_000  # augmented copies are recorded until train holds about this many rows
MAX_COPIES = 8
SAMPLE_ROWS = 256
INVARIANCE_ROWS = 256
INVARIANT = 0.95  # an augmentation is free where the backbone keeps this share of its answers under it


class RecordingInterrupted(KeyboardInterrupt):
    """Ctrl-C while recording. `recorded` holds the inputs recorded so far; `fit` accepts it in place of a stream."""

    def __init__(self, message: str, recorded: Recording) -> None:
        super().__init__(message)
        self.recorded = recorded


@dataclass
class Recording:
    """N recorded rows, memory-mapped. `features[k]` is what caches at split point k read: (N, *reduced shape).

    `part_N` says train, tune or certify (0, 1, 2). `copy_N` marks augmented copies, which are only ever train rows.
    `free_augmentations` names the augmentations under which the backbone was measured to keep its answers.
    `sample` holds some tuning inputs whole, for timing and for show.
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

    def __len__(self) -> int:
        return len(self.part_N)

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
        part_N[held_out] = [_part(bytes(key), seed, shares) for key in self.keys_N[held_out]]
        return dataclasses.replace(self, part_N=part_N)

    def fingerprint(self, part: int) -> str:
        """Digest of the set of inputs of a part: the data a certificate rests on."""
        import hashlib

        rows = sorted(bytes(key) for key in self.keys_N[self.index(part)])
        return hashlib.sha256(b"".join(rows)).hexdigest()


def record(
    split: SplitModel,
    task: Classification,
    stream: Iterable[object],
    certify: Iterable[object] | None,
    *,
    seed: int,
    workdir: Path | None = None,
    time_limit_s: float | None = None,
    show: bool = False,
) -> Recording:
    """Run the backbone once over both streams; after `time_limit_s` the rest of `stream` is left out.

    Raises StreamError (empty, malformed, broken stream) or StorageError (full disk); both carry what was recorded until
    then as `error.recorded` where that is anything at all.
    """
    with torch.inference_mode(), closing(_Recorder(split, task, seed, workdir)) as recorder:
        try:
            shares = SHARES_ONE_STREAM if certify is None else (1.0, 0.0, 0.0)
            recorder.read(stream, shares, "recording", time_limit_s, show=show)
            if certify is not None:
                recorder.read(certify, SHARES_CERTIFY_STREAM, "recording (certify)", None, show=show)
            recorder.ask_again(show=show)
        except KeyboardInterrupt:
            raise RecordingInterrupted(recorder.kept_message("interrupted"), recorder.finish()) from None
        except (StreamError, StorageError) as error:
            raised = type(error)(f"{error} {recorder.kept_message('stopped')}")
            raised.recorded = recorder.finish() if recorder.rows else None
            raise raised from error
        recording = recorder.finish()
    if not len(recording):
        raise StreamError("the stream is empty: it yielded no inputs; expected at least a few hundred")
    return recording


class _Recorder:
    """Appends rows to one file per column; a journal says how many rows are complete."""

    def __init__(self, split: SplitModel, task: Classification, seed: int, workdir: Path | None) -> None:
        self.split, self.task, self.seed = split, task, seed
        self.reductions = [
            reduction_for(point.shape, is_input=position == 0) for position, point in enumerate(split.points)
        ]
        self.free_augmentations: tuple[str, ...] = ()
        self.folder = None if workdir is None else workdir / "recording"
        self.files: dict[str, IO[bytes]] = {}
        self.columns: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        self.rows = self.consumed = self.dropped = 0
        self.labelled = True
        self.train_keys: set[bytes] = set()
        self.sample: list[Batch] = []
        self.old_keys: list[bytes] = []  # rows of an earlier, interrupted recording: (consumed order)
        if self.folder is not None:
            self._resume()

    # -- reading -----------------------------------------------------------------------------------

    def read(
        self,
        stream: Iterable[object],
        shares: Sequence[float],
        description: str,
        time_limit_s: float | None,
        *,
        show: bool,
    ) -> None:
        started = time.monotonic()
        with bar(description, _length(stream), show=show) as progress:
            for batch in read_stream(stream, self.split.backbone):
                for start in range(0, len(batch), MAX_BATCH):
                    self._take(batch.rows(slice(start, start + MAX_BATCH)), shares)
                progress.advance()
                progress.note(f"{self.rows:,} inputs")
                if time_limit_s is not None and time.monotonic() - started > time_limit_s:
                    return

    def _take(self, batch: Batch, shares: Sequence[float]) -> None:
        keys = batch.row_keys()
        self._sample(batch, keys, shares)
        skip = self._already_recorded(keys)
        batch, keys = batch.rows(slice(skip, None)), keys[skip:]
        if not keys:
            return
        parts = [_part(key, self.seed, shares) for key in keys]
        # A separate certification stream must not repeat what trained the caches.
        fresh = [part == TRAIN or key not in self.train_keys for key, part in zip(keys, parts, strict=True)]
        self.train_keys.update(key for key, part in zip(keys, parts, strict=True) if part == TRAIN)
        self.dropped += len(keys) - sum(fresh)
        if any(fresh):
            rows = torch.tensor([i for i, keep in enumerate(fresh) if keep])
            kept = [i for i, keep in enumerate(fresh) if keep]
            self._write(batch.rows(rows), [keys[i] for i in kept], [parts[i] for i in kept], copy=False)
        self.consumed += len(keys)
        self._write_journal(keys)

    def _sample(self, batch: Batch, keys: list[bytes], shares: Sequence[float]) -> None:
        missing = SAMPLE_ROWS - sum(map(len, self.sample))
        rows = [i for i, key in enumerate(keys) if missing > 0 and _part(key, self.seed, shares) == TUNE][:missing]
        if rows:
            self.sample.append(batch.rows(torch.tensor(rows)).to("cpu"))

    def _write(self, batch: Batch, keys: list[bytes], parts: list[int], *, copy: bool) -> None:
        live = self.split.flatten(batch.to(self.split.device))
        columns: dict[str, NDArray[Any]] = {}
        for position, stage in enumerate(self.split.stages):
            feature = self.reductions[position](self.split.activation(position, live))
            columns[f"point_{position}"] = _storable(feature)
            live = stage(*live)
        logits_BC = self.task.logits(live).float()
        if not bool(torch.isfinite(logits_BC).all()):
            raise StreamError(
                f"the backbone answers NaN or infinity for inputs near number {self.rows}; find out which inputs "
                "do that and leave them out"
            )
        columns["logits"] = logits_BC.cpu().numpy()
        columns["part"] = np.array(parts, np.uint8)
        columns["copy"] = np.full(len(keys), copy, np.uint8)
        columns["key"] = np.frombuffer(b"".join(keys), np.dtype("V16"))
        labels = batch.labels_B
        self.labelled = self.labelled and (labels is not None or copy)
        columns["label"] = np.full(len(keys), -1, np.int64) if labels is None else labels.cpu().numpy().astype(np.int64)
        self._append(columns)
        self.rows += len(keys)

    # -- asking the backbone again -----------------------------------------------------------------

    def ask_again(self, *, show: bool) -> None:
        """While train rows are few, record augmented copies of them with the backbone's own answers to the copies."""
        point = self.split.points[0]
        if (
            not is_image(tuple(point.shape), floating=point.dtype.is_floating_point)
            or len(self.split.example.tensors) > 1
        ):
            return
        snapshot = self.finish()
        train = snapshot.index(TRAIN)
        if not len(train):
            return
        self.free_augmentations = self._free_augmentations(snapshot, train[:INVARIANCE_ROWS])
        if (snapshot.copy_N[train] != 0).any():  # an earlier run asked already
            return
        copies = min(MAX_COPIES, ASKED_ROWS // len(train))
        generator = torch.Generator().manual_seed(self.seed)
        with bar("asking about variations", copies * len(train), show=show and copies > 0) as progress:
            for _ in range(copies):
                for start in range(0, len(train), MAX_BATCH):
                    self._ask(snapshot.features[0], train[start : start + MAX_BATCH], generator, progress)

    def _ask(self, inputs: NDArray[Any], rows: NDArray[np.intp], generator: torch.Generator, progress: Bar) -> None:
        batch = self._as_inputs(shift(mirror(torch.from_numpy(inputs[rows]), generator), generator))
        self._write(batch, batch.row_keys(), [TRAIN] * len(rows), copy=True)
        progress.advance(len(rows))

    def _free_augmentations(self, snapshot: Recording, rows: NDArray[np.intp]) -> tuple[str, ...]:
        """The augmentations that leave at least INVARIANT of the backbone's answers as they are."""
        images, logits_NC = torch.from_numpy(snapshot.features[0][rows]), torch.from_numpy(snapshot.logits_NC[rows])
        answer_N = self.task.answer(logits_NC)
        free = []
        for name, augmentation in AUGMENTATIONS.items():
            generator = torch.Generator().manual_seed(self.seed)
            agreed = 0
            for start in range(0, len(rows), MAX_BATCH):
                batch = self._as_inputs(augmentation(images[start : start + MAX_BATCH], generator))
                answer_B = self.task.answer(self._answers(batch)).cpu()
                agreed += int(self.task.agree(answer_B, answer_N[start : start + MAX_BATCH]).sum())
            if agreed >= INVARIANT * len(rows):
                free.append(name)
        return tuple(free)

    def _answers(self, batch: Batch) -> Tensor:
        live = self.split.flatten(batch.to(self.split.device))
        for stage in self.split.stages:
            live = stage(*live)
        return self.task.logits(live)

    def _as_inputs(self, images_BCHW: Tensor) -> Batch:
        example = self.split.example
        images_BCHW = images_BCHW.to(example.tensors[0].dtype)
        return Batch((images_BCHW,)) if example.args else Batch((), {next(iter(example.kwargs)): images_BCHW})

    # -- files -------------------------------------------------------------------------------------

    def _append(self, columns: dict[str, NDArray[Any]]) -> None:
        try:
            for name, values in columns.items():
                self.columns.setdefault(name, (values.shape[1:], values.dtype))
                self._file(name).write(values.tobytes())
            for file in self.files.values():
                file.flush()
        except OSError as error:
            where = self.folder or tempfile.gettempdir()
            raise StorageError(
                f"could not write the recording to {where}: {error.strerror or error}. Free some space, or choose "
                "another place with `workdir=` (or TMPDIR)."
            ) from error

    def _file(self, name: str) -> IO[bytes]:
        if name not in self.files:
            if self.folder is None:
                self.files[name] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the recording
            else:
                self.files[name] = (self.folder / f"{name}.bin").open("ab+")
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
            label_N=np.array(maps["label"]) if self.labelled and self.rows else None,
            keys_N=np.array(maps.get("key", np.zeros(0, "V16"))),
            dropped_duplicates=self.dropped,
            sample=_concatenated(self.sample) if self.sample else self.split.example,
            free_augmentations=self.free_augmentations,
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

    def _resume(self) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = self.folder / "journal.json"
        state = json.loads(journal.read_text()) if journal.exists() else {}
        if state.get("backbone") != self.split.fingerprint or state.get("seed") != self.seed:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            return
        self.columns = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in state["columns"].items()}
        self.rows, self.dropped, self.labelled = state["rows"], state["dropped"], state["labelled"]
        for name, (shape, dtype) in self.columns.items():
            # A crash may have left part of a batch behind the last complete row.
            self._file(name).truncate(self.rows * int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        keys = (self.folder / "consumed.bin").read_bytes()[: 16 * state["consumed"]]
        self.old_keys = [keys[i : i + 16] for i in range(0, len(keys), 16)]
        with (self.folder / "consumed.bin").open("rb+") as file:
            file.truncate(len(keys))
        parts, row_keys = self._map("part"), self._map("key")
        self.train_keys = {bytes(key) for key, part in zip(row_keys, parts, strict=True) if part == TRAIN}

    def _already_recorded(self, keys: list[bytes]) -> int:
        """How many of these rows an earlier run recorded: the stream is read again from its start."""
        position = self.consumed
        old = self.old_keys[position : position + len(keys)]
        if old != keys[: len(old)]:
            raise StreamError(
                f"the stream differs from the one recorded in {self.folder} (input {position} onwards): resume needs "
                "the same inputs in the same order. Switch shuffling off, or delete that folder to start again."
            )
        self.consumed += len(old)
        return len(old)

    def _write_journal(self, keys: list[bytes]) -> None:
        if self.folder is None:
            return
        with (self.folder / "consumed.bin").open("ab") as file:
            file.write(b"".join(keys))
        state = {
            "backbone": self.split.fingerprint,
            "seed": self.seed,
            "rows": self.rows,
            "consumed": self.consumed,
            "dropped": self.dropped,
            "labelled": self.labelled,
            "columns": {name: (shape, dtype.str) for name, (shape, dtype) in self.columns.items()},
        }
        temporary = self.folder / "journal.json.tmp"
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self.folder / "journal.json")

    def kept_message(self, verb: str) -> str:
        if self.folder is not None:
            return f"Recording {verb} after {self.rows:,} inputs; they are kept in {self.folder}: call again to go on."
        return f"Recording {verb} after {self.rows:,} inputs; fit() accepts `error.recorded` in place of the stream."


def _part(key: bytes, seed: int, shares: Sequence[float]) -> int:
    """The part of a row, decided by its digest and the seed alone."""
    mixed = np.random.SeedSequence([seed, int.from_bytes(key[:8], "little")]).generate_state(1)[0]
    return int(np.searchsorted(np.cumsum(shares)[:-1], float(mixed) / 2**32, side="right"))


def _storable(feature: Tensor) -> NDArray[Any]:
    stored: NDArray[Any] = (feature if feature.is_floating_point() else feature.to(torch.int32)).cpu().numpy()
    return stored


def _concatenated(batches: Sequence[Batch]) -> Batch:
    args = tuple(torch.cat(column) for column in zip(*(batch.args for batch in batches), strict=True))
    names = list(batches[0].kwargs)
    return Batch(args, {name: torch.cat([batch.kwargs[name] for batch in batches]) for name in names})


def _length(stream: Iterable[object]) -> int | None:
    try:
        return len(stream)  # type: ignore[arg-type]
    except TypeError:
        return None
