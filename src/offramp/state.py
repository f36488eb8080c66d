"""The folder in which a model in service keeps what must outlive its process: counts, evidence, budget, plans, inputs.

    state.json     everything that is decided or counted, written whole, at most a second old
    plans/0001/    one artefact per plan that was served, as `offramp.save` writes it
    inputs/        the reservoir's files; or activations/
    refit/         the job of the refit that is running

A file is written under another name, flushed, and renamed, so a process that is killed leaves the old or the new one.
The order makes it safe to be killed anywhere: a plan is on disk before `state.json` names it, and that is written
before it answers. One process at a time may use a folder: it holds a lock, which the system takes back when it dies.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from offramp.errors import ArtifactError, InputError, StorageError

FORMAT, FORMAT_VERSION = "offramp-state", 2
STATE, LOCK = "state.json", "lock"
PLANS, REFIT, KEPT = "plans", "refit", ("inputs", "activations")


class StateFolder:
    """InputError when another process uses the folder or it holds something else; StorageError when it cannot be made;
    ArtifactError when what is in it cannot be read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import fcntl  # not on every system, and needed by nobody else

        self.path = Path(path).resolve()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign()
            self._lock: IO[bytes] = (self.path / LOCK).open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise InputError(
                f"the state folder {self.path} is in use by another process; give each process a folder of its own"
            ) from None
        except OSError as error:
            raise StorageError(f"cannot use the state folder {self.path}: {error.strerror or error}") from error
        self.plans, self.refit = self.path / PLANS, self.path / REFIT

    def _refuse_foreign(self) -> None:
        names = {entry.name for entry in self.path.iterdir()} - {f"{STATE}.new"}
        if names and not names <= {STATE, LOCK, PLANS, REFIT, *KEPT}:
            listed = ", ".join(sorted(names)[:5])
            raise InputError(f"{self.path} holds other things ({listed}); a state folder must be empty or one of ours")

    def kept(self, what: str) -> Path:
        """Where the reservoir's files of this kind are. Those of another kind are deleted, and so is what was copied
        out for a refit, which is over: whoever no longer wants inputs to be kept does not want those that were."""
        for other in {*KEPT, REFIT} - {what}:
            shutil.rmtree(self.path / other, ignore_errors=True)
        return self.path / what

    def read(self) -> dict[str, Any] | None:
        """What was written last; None in a new folder."""
        file = self.path / STATE
        if not file.exists():
            return None
        try:
            document = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{file} cannot be read ({error}). It says how much of the failure budget is spent, so nothing is "
                "learned without it: restore it, or begin a new life in another folder."
            ) from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ArtifactError(f"{file} is not the state of a model in service")
        if document.get("format_version") != FORMAT_VERSION:
            raise ArtifactError(
                f"{file} has format {document.get('format_version')!r}, this offramp reads {FORMAT_VERSION}"
            )
        return document

    def write(self, document: Mapping[str, Any]) -> None:
        """Replaces what was there. StorageError, and what was there is unchanged, when that is not possible."""
        text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **document})
        write_whole(self.path / STATE, text.encode())

    def plan(self, number: int) -> Path:
        return self.plans / f"{number:04d}"

    def close(self) -> None:
        """Others may use the folder from now on. May be called twice."""
        self._lock.close()


def write_whole(file: Path, data: bytes) -> None:
    """All of it or nothing, also when the process is killed. StorageError when it cannot be written."""
    new = file.with_name(f"{file.name}.new")
    try:
        with new.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        new.replace(file)
    except OSError as error:
        raise StorageError(f"could not write {file}: {error.strerror or error}; what was there is unchanged") from error
