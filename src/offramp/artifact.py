"""Saving a cached model to a folder, and loading it back onto the same backbone.

An artefact is a folder of two files: `caches.safetensors` with the weights of the caches and a few example
inputs (they are needed to split the backbone again), and `manifest.json` with everything that was decided:
plan, certificate, costs, what the caches are, and which backbone they belong to. The backbone itself is not
in it. Nothing is ever unpickled. Of an optimized model the folder holds the one that it was made from, and
beside it what is needed to build its parts again: programs are not stored.

A certificate is worth something only if the plan, the weights and the backbone are the ones it was issued
for. So the manifest carries a checksum of the weights, one of its own decisions, and the backbone's
fingerprint; loading checks all of them and the split points before it hands anything out. They guard against
accidents, not against forgery.

Saving writes and flushes everything in a temporary folder beside the target, then renames it into place; what
was there before is kept until then, and put back when the renaming fails.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.export import ExportedProgram

from offramp.caches import Cache, build_cache
from offramp.cost import cost_from_json, cost_to_json
from offramp.errors import ArtifactError, BackendError, InputError, OfframpError, StorageError
from offramp.model import CachedModel
from offramp.parts import Choice
from offramp.rebuilding import Answers, OptimizedModel, Origin, answers, hardware, rebuild
from offramp.splitting import SplitModel, split
from offramp.streams import Batch
from offramp.tasks import task_named
from offramp.types import Certificate, Plan, version

log = logging.getLogger("offramp")

FORMAT = "offramp-cached-model"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
WEIGHTS = "caches.safetensors"
EXAMPLE_ROWS = 4
CHECKED_ROWS = 32  # of an optimized model's sample, where eight bits do not need all of it
SEAL = "sealed_sha256"


def save(cached: CachedModel, path: str | os.PathLike[str]) -> None:
    """Write a cached model to the folder `path`; an artefact that is already there is replaced in one step.

    The folder holds up to four of the example inputs that the backbone was split with, as they are; that of an
    optimized model also the 256 inputs that its parts were calibrated with, or 32 where none is in eight bits.
    """
    target = Path(path).resolve()
    optimized = cached if isinstance(cached, OptimizedModel) else None
    base = cached if optimized is None else optimized.origin.base
    tensors, section = _tensors(base), None
    if optimized is not None:
        more, section = _optimized(optimized)
        tensors |= more
    weights = safetensors.torch.save(tensors)
    manifest = _to_json(_manifest(base, weights, section), indent=2)
    with _storage_errors(target):
        _refuse_foreign(target)
        _replace(target, {WEIGHTS: weights, MANIFEST: manifest.encode()})


def load(
    path: str | os.PathLike[str],
    backbone: nn.Module | ExportedProgram,
    *,
    device: torch.device | str | None = None,
) -> CachedModel:
    """The cached model saved in the folder `path`, on the backbone that it was made for.

    The caches go where the backbone is; nothing about the backbone is changed. With `device` given, the
    backbone must already be there. The parts of an optimized model are built again, which takes as long as
    building them did; where that fails, or where the model then answers otherwise than when it was saved, the
    model that it was made from is returned, with a warning. Raises ArtifactError when anything in the folder is
    damaged or does not belong to this backbone.
    """
    _check_device(backbone, device)
    return _load(
        Path(path).resolve(), lambda folder, manifest, example: _split_again(folder, manifest, backbone, example)
    )


def load_onto(path: str | os.PathLike[str], split_model: SplitModel) -> CachedModel:
    """The same, on a backbone that is split already, as the saved one was: nothing is traced. ArtifactError if not."""

    def same(folder: Path, manifest: Mapping[str, Any], _: Batch) -> SplitModel:
        saved = manifest["split"]
        if split_model.fingerprint != saved["fingerprint"] or _points(split_model) != saved["points"]:
            raise ArtifactError(
                f"the artefact in {folder} belongs to another backbone: {_mismatch(split_model, saved)}"
            )
        return split_model

    return _load(Path(path).resolve(), same)


def is_saved_in(cached: CachedModel, path: str | os.PathLike[str]) -> bool:
    """Whether the artefact there is this model, by plan and certificate. ArtifactError when it cannot be read."""
    manifest = read_manifest(Path(path).resolve())
    decided = manifest.get("optimized", manifest)
    plan, certificate = Plan.from_json(decided["plan"]), Certificate.from_json(decided["certificate"])
    return (plan, certificate) == (cached.plan, cached.certificate)


def _load(folder: Path, split_as_saved: Callable[[Path, Mapping[str, Any], Batch], SplitModel]) -> CachedModel:
    manifest = read_manifest(folder)
    tensors = _read_weights(folder, manifest["weights"])
    caches = _build_caches(folder, manifest["caches"], tensors)
    split_model = split_as_saved(folder, manifest, batch_of("example", tensors))
    try:
        base = CachedModel(
            split_model,
            caches,
            Plan.from_json(manifest["plan"]),
            Certificate.from_json(manifest["certificate"]),
            cost_from_json(manifest["costs"]),
            task=task_named(manifest["task"]),
            summary=manifest["summary"],
        )
        return base if "optimized" not in manifest else _optimized_again(folder, base, manifest["optimized"], tensors)
    except (OfframpError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the artefact in {folder} does not make a cached model: {_name(error)}") from error


# --- what is written ------------------------------------------------------------------------------


def _manifest(cached: CachedModel, weights: bytes, optimized: Mapping[str, Any] | None) -> dict[str, Any]:
    split_model = cached.split_model
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "offramp": version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "task": cached.task.name,
        "split": {
            "fingerprint": split_model.fingerprint,
            "method": split_model.method,
            "points": _points(split_model),
        },
        "plan": cached.plan.to_json(),
        "certificate": cached.certificate.to_json(),
        "caches": [cast(Cache, cache).describe() for cache in cached.caches],
        "costs": cost_to_json(cached.costs),
        "weights": {"file": WEIGHTS, "bytes": len(weights), "sha256": _sha256(weights)},
        "summary": cached.summary,
    }
    if optimized is not None:
        manifest["optimized"] = optimized
    plain = json.loads(_to_json(manifest))  # as it will be read: keys are strings, tuples are lists
    return {**plain, SEAL: _seal(plain)}


def _tensors(cached: CachedModel) -> dict[str, Tensor]:
    """State of each cache under `caches.<position>.`, inputs under `example.args.` and `example.kwargs.`"""
    tensors = {
        f"caches.{position}.{key}": value
        for position, cache in enumerate(cached.caches)
        for key, value in cache.state_dict().items()
    }
    return apart(tensors | tensors_of("example", cached.split_model.example.rows(slice(0, EXAMPLE_ROWS))))


def _optimized(model: OptimizedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is written of an optimized model besides the one that it was made from."""
    origin = model.origin
    in_eight_bits = any(choice.precision == "int8" for choice in origin.choices)
    sample = origin.sample if in_eight_bits else origin.sample.rows(slice(0, CHECKED_ROWS))
    said = answers(model, sample)
    tensors = apart(tensors_of("sample", sample) | {"sample.answer": said.answer, "sample.left_at": said.left_at})
    return tensors, {
        "caches": list(origin.caches),
        "plan": model.plan.to_json(),
        "certificate": model.certificate.to_json(),
        "costs": cost_to_json(model.costs),
        "summary": model.summary["optimized"],
    }


def tensors_of(name: str, batch: Batch) -> dict[str, Tensor]:
    """Numbered, because safetensors does not keep the order of its tensors and tracing depends on it."""
    tensors = {f"{name}.args.{position}": value for position, value in enumerate(batch.args)}
    return tensors | {f"{name}.kwargs.{i}.{key}": value for i, (key, value) in enumerate(batch.kwargs.items())}


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory; a copy of each shares none."""
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}


def _seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of everything in the manifest but the seal itself."""
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    return _sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def _to_json(document: Mapping[str, Any], *, indent: int | None = None) -> str:
    try:
        return json.dumps(document, indent=indent, default=_plain)
    except TypeError as error:
        raise InputError(f"the summary of the cached model cannot be saved as JSON: {error}") from error


def _plain(value: object) -> object:
    """numpy's numbers and arrays as Python's; anything else has no JSON form."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"it holds a {type(value).__name__}")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- how it is written ----------------------------------------------------------------------------


def _refuse_foreign(target: Path) -> None:
    """An existing artefact or an empty folder may be replaced, nothing else."""
    if not target.exists():
        return
    if not target.is_dir():
        raise StorageError(f"cannot save to {target}: it is a file; an artefact is a folder")
    names = {entry.name for entry in target.iterdir()}
    if names and names != {MANIFEST, WEIGHTS}:
        listed = ", ".join(sorted(names)[:5])
        raise StorageError(
            f"cannot save to {target}: the folder is not an offramp artefact (it holds {listed}) and would "
            "be lost; choose another path or remove it first"
        )


def _replace(target: Path, files: Mapping[str, bytes]) -> None:
    """Put a folder of these files at `target`, or change nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{target.name}.{uuid.uuid4().hex[:8]}"
    new, old = target.with_name(f"{stem}.new"), target.with_name(f"{stem}.old")
    try:
        new.mkdir()
        for name, data in files.items():
            _write(new / name, data)
        _flush(new)
        _swap(target, new, old)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _swap(target: Path, new: Path, old: Path) -> None:
    """Rename `target`, if there is one, to `old` and `new` to `target`; if that fails, rename `old` back."""
    replacing = target.exists()
    if replacing:
        _rename(target, old)
    try:
        _rename(new, target)
    except BaseException:
        if replacing:
            old.rename(target)
        raise


def _rename(source: Path, destination: Path) -> None:
    source.rename(destination)


def _write(file: Path, data: bytes) -> None:
    with file.open("xb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _flush(folder: Path) -> None:
    """Make the names in a folder survive a power cut, on the file systems that can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _storage_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        there = os.path.exists(target)
        kept = "what was there is unchanged" if there else f"nothing was written{_interrupted(target)}"
        raise StorageError(f"cannot save to {target}: {error.strerror or error}; {kept}") from error


# --- reading and checking -------------------------------------------------------------------------


def _check_device(backbone: nn.Module | ExportedProgram, device: torch.device | str | None) -> None:
    if device is None:
        return
    wanted = torch.device(device)
    for tensor in (*backbone.parameters(), *backbone.buffers()):
        if tensor.device.type != wanted.type or wanted.index not in (None, tensor.device.index):
            raise InputError(
                f"load(device={str(wanted)!r}) but the backbone is on {tensor.device}; move it first with "
                f"backbone.to({str(wanted)!r})"
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, once its format is known and its seal is right."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(_read(file))
    except ValueError as error:
        raise ArtifactError(f"{file} is not valid JSON: it is damaged or cut off ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{file} is not the manifest of an offramp artefact")
    _check_version(file, manifest.get("format_version"))
    if manifest.get(SEAL) != _seal(manifest):
        raise ArtifactError(
            f"{file} was changed after it was saved: the plan, certificate, costs or caches in it may not "
            "be those that were certified. Restore the file, or fit and save again."
        )
    return manifest


def report_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's own `report()` says, without the model."""
    document = {**manifest["summary"], "plan": manifest["plan"], "certificate": manifest["certificate"]}
    if optimized := manifest.get("optimized"):
        decided = {name: optimized[name] for name in ("plan", "certificate")}
        document["optimized"] = {**optimized["summary"], **decided}
    return document


def _check_version(file: Path, version: object) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ArtifactError(f"{file} is damaged: its format_version is {version!r}")
    if version != FORMAT_VERSION:
        which, what = ("a newer", "upgrade offramp") if version > FORMAT_VERSION else ("an older", "fit again")
        raise ArtifactError(
            f"{file} was written by {which} offramp (format {version}), this one reads {FORMAT_VERSION}: {what}"
        )


def _read_weights(folder: Path, expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the weights file; its bytes are checked before they are parsed."""
    file = folder / WEIGHTS
    data = _read(file)
    if len(data) < expected["bytes"]:
        raise ArtifactError(
            f"{file} is cut off: it has {len(data)} bytes, {expected['bytes']} were saved; copy it again"
        )
    if _sha256(data) != expected["sha256"]:
        raise ArtifactError(f"{file} is damaged: its checksum is not the one in {MANIFEST}; copy it again")
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise ArtifactError(f"{file} is not a safetensors file: {error}") from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{file} is missing{_interrupted(file.parent)}") from error
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror or error}") from error


def _interrupted(folder: Path) -> str:
    """A hint at the artefact that a killed save may have left under another name."""
    if folder.exists() or not folder.parent.is_dir():
        return ""
    kept = sorted(entry.name for entry in folder.parent.iterdir() if _is_kept(entry.name, folder.name))
    return f"; a save was interrupted and left the artefact in {kept[-1]}: rename it back" if kept else ""


def _is_kept(name: str, artefact: str) -> bool:
    return name.startswith(f".{artefact}.") and name.endswith(".old")


def batch_of(name: str, tensors: Mapping[str, Tensor]) -> Batch:
    """What `tensors_of` made tensors of."""
    positional, named = {}, {}
    for key, value in tensors.items():
        if key.startswith(f"{name}.args."):
            positional[int(key.removeprefix(f"{name}.args."))] = value
        elif key.startswith(f"{name}.kwargs."):
            number, argument = key.removeprefix(f"{name}.kwargs.").split(".", 1)
            named[int(number)] = (argument, value)
    return Batch(tuple(positional[i] for i in sorted(positional)), dict(named[i] for i in sorted(named)))


def _optimized_again(
    folder: Path, base: CachedModel, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> CachedModel:
    """The optimized model on parts that are built here, or the base where that does not give the same model."""
    sample = batch_of("sample", tensors).to(base.split_model.device)
    summary = saved["summary"]
    choices, there = tuple(Choice(**part) for part in summary["parts"]), summary["hardware"]
    origin = Origin(base, sample, choices, tuple(saved["caches"]), there)
    if (here := hardware()) != there:
        names = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
        changed = ", ".join(f"{name} {there.get(name)} -> {here.get(name)}" for name in names)
        log.warning(
            "the model in %s was optimized elsewhere (%s): its parts are built again, its certificate is from there. "
            "optimize() it again to certify it here.",
            folder,
            changed,
        )
    expected = Answers(tensors["sample.answer"], tensors["sample.left_at"])
    plan, certificate = Plan.from_json(saved["plan"]), Certificate.from_json(saved["certificate"])
    try:
        model = rebuild(origin, plan, certificate, cost_from_json(saved["costs"]), expected)
    except BackendError as error:
        log.warning("the model in %s runs as it was before it was optimized: %s", folder, error)
        return base
    model.summary["optimized"] = summary
    return model


def _split_again(
    folder: Path, manifest: Mapping[str, Any], backbone: nn.Module | ExportedProgram, example: Batch
) -> SplitModel:
    """The backbone in the same stages as when it was saved; ArtifactError when it is another one."""
    saved = manifest["split"]
    names = [point["name"] for point in saved["points"]]
    problems: list[str] = []
    for points in (None, names[1:]):  # as `fit` splits; if that is not it, then at the saved points by name
        try:
            split_model = split(backbone, example, points=points)
        except OfframpError as error:
            problems.append(f"this one cannot be split as the saved one was ({error})")
            continue
        if split_model.fingerprint == saved["fingerprint"] and _points(split_model) == saved["points"]:
            return split_model
        problems.append(_mismatch(split_model, saved))
    raise ArtifactError(
        f"the artefact in {folder} belongs to another backbone: {problems[0]}. Load the weights that it "
        f"was fitted on, or fit again{_versions_apart(manifest)}."
    )


def _mismatch(split_model: SplitModel, saved: Mapping[str, Any]) -> str:
    if split_model.fingerprint != saved["fingerprint"]:
        return f"it was made for {saved['fingerprint'][:12]}, this one is {split_model.fingerprint[:12]}"
    return f"it was cut at {saved['points']}, this one is cut at {_points(split_model)}"


def _versions_apart(manifest: Mapping[str, Any]) -> str:
    then, now = manifest["versions"]["torch"], torch.__version__
    return "" if then == now else f" (it was saved with torch {then}, this is torch {now})"


def _points(split_model: SplitModel) -> list[dict[str, Any]]:
    return [{"name": point.name, "shape": list(point.shape)} for point in split_model.points]


def _build_caches(
    folder: Path, descriptions: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> list[Cache]:
    states = [_state(tensors, position) for position in range(len(descriptions))]
    inputs = sum(key.startswith(("example.", "sample.")) for key in tensors)
    known = sum(len(state) for state in states) + inputs
    if known != len(tensors):
        raise ArtifactError(f"{folder / WEIGHTS} holds weights of more than {len(descriptions)} caches")
    with torch.random.fork_rng(devices=[]):  # building draws initial weights that are overwritten at once
        return [_build_cache(folder, d, s) for d, s in zip(descriptions, states, strict=True)]


def _build_cache(folder: Path, description: Mapping[str, Any], state: Mapping[str, Tensor]) -> Cache:
    """One cache with its weights; their names and shapes must be just those that its description needs."""
    try:
        cache = build_cache(description)
    except Exception as error:
        raise ArtifactError(f"a cache of the artefact in {folder} cannot be built: {_name(error)}") from error
    needed = {key: tuple(value.shape) for key, value in cache.state_dict().items()}
    saved = {key: tuple(value.shape) for key, value in state.items()}
    if needed != saved:
        wrong = sorted(key for key in needed.keys() | saved.keys() if needed.get(key) != saved.get(key))
        raise ArtifactError(
            f"{folder / WEIGHTS} does not fit cache {description.get('name')!r}: {wrong[0]} has shape "
            f"{saved.get(wrong[0], 'none')}, {needed.get(wrong[0], 'none')} is needed"
        )
    cache.load_state_dict(dict(state), strict=True, assign=True)  # assigned, so that the saved dtype stays
    return cache.eval().requires_grad_(False)


def _state(tensors: Mapping[str, Tensor], position: int) -> dict[str, Tensor]:
    prefix = f"caches.{position}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
