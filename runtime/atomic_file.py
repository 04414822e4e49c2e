"""A file that is whole or absent: written beside its target, flushed to the disk, renamed into place.

A crash leaves the old file, and at most a hidden `.NAME.partial-…` beside it. Knows nothing of what is in it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial-"


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` when the block ends well and is removed when it does not."""
    partial = target.with_name(f".{target.name}{PARTIAL}{secrets.token_hex(8)}")
    try:
        yield partial
        _flush(partial)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself; Windows cannot open a folder for this
        _flush(target.parent)


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)
