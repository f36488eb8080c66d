"""Writing a whole file, or none of it."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_text(target: Path, text: str) -> None:
    """The text as the file `target`, in UTF-8; otherwise as `write_bytes`."""
    write_bytes(target, text.encode())


def write_bytes(target: Path, data: bytes) -> None:
    """The data as the file `target`; a reader never sees half of it. Makes the folder if it is missing.

    Raises OSError when that fails; then `target` is as it was, and nothing lies beside it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
