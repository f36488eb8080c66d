"""A folder that outlives a process: written whole or not at all, used by one process at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offramp.errors import ArtifactError, InputError, StorageError
from offramp.state import StateFolder, write_whole


def test_what_was_written_is_read(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state")
    assert folder.read() is None
    folder.write({"plan": 3})
    assert folder.read() == {"format": "offramp-state", "format_version": 2, "plan": 3}
    folder.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    with pytest.raises(InputError, match="in use by another process; give each process a folder of its own"):
        StateFolder(tmp_path)
    folder.close()
    folder.close()
    StateFolder(tmp_path).close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "offramp-sta', "cannot be read .* how much of the failure budget is spent"),
        ("[]", "is not the state of a model in service"),
        ('{"format": "other"}', "is not the state of a model in service"),
        ('{"format": "offramp-state", "format_version": 3}', "has format 3, this offramp reads 2"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "state.json").write_text(text)
    folder = StateFolder(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        folder.read()
    assert (tmp_path / "state.json").read_text() == text
    folder.close()


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"holds other things \(thesis.tex\)"):
        StateFolder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot use the state folder"):
        StateFolder(tmp_path / "file")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", b"first")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; what was there is unchanged"):
        write_whole(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"


def test_a_process_that_is_killed_while_it_writes_leaves_a_whole_file_and_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom offramp.state import StateFolder\n"
        "folder = StateFolder(sys.argv[1])\n"
        "number = 0\n"
        "while True:\n    number += 1\n    folder.write({'number': number, 'more': 'x' * 200_000})\n"
    )
    for wait_s in (0.3, 0.05, 0.01):
        writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        deadline = time.monotonic() + 60
        while not (tmp_path / "state.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(wait_s)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        folder = StateFolder(tmp_path)
        document = folder.read()
        folder.close()
        assert document is not None
        assert document["more"] == "x" * 200_000
