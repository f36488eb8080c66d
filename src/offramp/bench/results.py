"""The lines of a benchmark: one JSON object per cell in one file, appended as soon as the cell is measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from offramp.bench.suite import Cell
from offramp.errors import StorageError
from offramp.report.files import write_text
from offramp.types import version

Line = Mapping[str, Any]

DONE, FAILED = "done", "failed"


class Results:
    """The file of lines. Of several lines with one key the last counts; a line cut off by a crash counts as none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, Line] = {}
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            if text and not text.endswith("\n"):
                with path.open("a", encoding="utf-8") as file:
                    file.write("\n")
        for line in map(_parsed, text.splitlines()):
            if line is not None:
                self._lines[line["key"]] = line

    def get(self, cell: Cell) -> Line | None:
        return self._lines.get(cell.key)

    def is_done(self, cell: Cell) -> bool:
        """A failed cell is not: it is tried again."""
        line = self.get(cell)
        return line is not None and line["status"] == DONE

    def add(self, cell: Cell, status: str, found: Mapping[str, Any]) -> Line:
        """Keep what was found about a cell. Raises ValueError when it is not JSON, StorageError on a full disk."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        line = {**cell.describe(), "status": status, "created": created, "offramp": version(), **found}
        text = json.dumps(line, allow_nan=False)
        with storing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        kept: Line = json.loads(text)  # as a later run will read it
        self._lines[cell.key] = kept
        return kept


def write(path: Path, text: str) -> None:
    """The text as a whole file; a reader never sees half of it."""
    with storing(path):
        write_text(path, text)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Within: a disk's refusal becomes a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"the benchmark's results could not be kept in {path}: {error}") from error


def _parsed(text: str) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and {"key", "status"} <= set(line) else None
