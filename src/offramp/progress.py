"""Progress of long work: a bar with the remaining time where a person watches, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """One running job. `advance` adds finished units; `note` shows a short remark beside the bar."""

    def advance(self, units: float = 1) -> None: ...

    def note(self, text: str) -> None: ...


class _Silent:
    def advance(self, units: float = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class _RichBar:
    def __init__(self, progress: object, task: object) -> None:
        self._progress, self._task = progress, task

    def advance(self, units: float = 1) -> None:
        self._progress.advance(self._task, units)  # type: ignore[attr-defined]

    def note(self, text: str) -> None:
        self._progress.update(self._task, remark=text)  # type: ignore[attr-defined]


@contextmanager
def bar(description: str, total: float | None, *, show: bool) -> Iterator[Bar]:
    """A progress bar on stderr for `total` units (None: unknown), or a silent stand-in."""
    if not show:
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, redirect_stdout=False) as progress:  # stdout is the program's own
        yield _RichBar(progress, progress.add_task(description, total=total, remark=""))
