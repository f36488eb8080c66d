"""What the full model says to every request of a stream, and every cache of a plan beside it: offline, kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.caches import Cache
from offramp.evaluation import say_all
from offramp.model import CachedModel
from offramp.streams import Batch
from offramp.types import Records
from replay.traffic import Stream

ROWS_AT_ONCE = 100
Inputs = Callable[[NDArray[np.uint8]], Tensor]  # uint8 NCHW pictures -> what the model is called with


def answers(model: CachedModel, stream: Stream, inputs: Inputs, folder: Path) -> NDArray[np.int64]:
    """(N,) the full model's own, by a plain call of it."""
    file = folder / f"answers-{_digest(stream, model.split_model.fingerprint)}.npz"
    if not file.exists():
        found = []
        with torch.inference_mode():
            for start in range(0, len(stream), ROWS_AT_ONCE):
                logits = model.split_model.full(inputs(stream.image_N[start : start + ROWS_AT_ONCE]))
                found.append(model.task.answer(logits).numpy())
        _keep(file, answer_N=np.concatenate(found))
    with np.load(file) as kept:
        return np.asarray(kept["answer_N"])


def records(model: CachedModel, stream: Stream, inputs: Inputs, folder: Path) -> Records:
    """What all caches of the model's plan say when nothing leaves early, and the full model. No labels."""
    names = [planned.name for planned in model.plan.caches]
    caches = [cast(Cache, cache) for cache in model.caches]
    reads_K = tuple(-1 if cache.reads is None else names.index(cache.reads) for cache in caches)
    file = folder / f"records-{_digest(stream, model.certificate.to_json(), model.plan.to_json())}.npz"
    if not file.exists():
        said = []
        with torch.inference_mode():
            for start in range(0, len(stream), ROWS_AT_ONCE):
                batch = Batch((inputs(stream.image_N[start : start + ROWS_AT_ONCE]),))
                said.append(say_all(model.split_model, caches, model.task, batch))
        confidence, answer, end = (torch.cat(column).numpy() for column in zip(*said, strict=True))
        _keep(file, confidence_NK=confidence, answer_NK=answer, end_N=end)
    with np.load(file) as kept:
        confidence_NK, answer_NK, end_N = (kept[name] for name in ("confidence_NK", "answer_NK", "end_N"))
    return Records(confidence_NK, answer_NK, answer_NK == end_N[:, None], end_N, reads_K)


def _keep(file: Path, **arrays: NDArray[np.generic]) -> None:
    """Whole or not at all: a run that is stopped leaves nothing that a later one would believe."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"unfinished-{file.name}")
    np.savez_compressed(unfinished, **arrays)  # type: ignore[arg-type]
    unfinished.replace(file)


def _digest(stream: Stream, *about: object) -> str:
    digest = hashlib.blake2b(stream.image_N.tobytes(), digest_size=8)
    digest.update(repr(about).encode())
    return digest.hexdigest()
