"""Have the system read a file into its memory before it is needed: embedding tables, of which a token reads one row.

Tables are mapped, so a row that the system does not hold makes a step wait for the disk, some milliseconds on top of
its own ten (benchmarks/README.md). The first opening of a bundle reads all files to hash them; after a restart, or when
memory was needed elsewhere, nobody has. What is read ahead is the system's and not the process's, to be dropped when it
needs the room. Does nothing where the system cannot, or has too little memory.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

_SMALLEST_BYTES = 2**24  # of a file worth a thread
_CHUNK_BYTES = 2**17  # the most that Linux reads for one request, unless a disk has it set otherwise
_SHARE = 1 / 2  # of the memory that is available: of weights a second copy is made, packed
_MEMORY = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")  # of a container, its own limits


def read_ahead(file: Path) -> threading.Thread | None:
    """Read `file` in the background; the thread that asks for it, or None where it is not read."""
    size = file.stat().st_size
    if not hasattr(os, "posix_fadvise") or size < _SMALLEST_BYTES or size > _SHARE * _available_bytes():
        return None
    thread = threading.Thread(target=_ask, args=(file, size), name=f"read ahead {file.name}", daemon=True)
    thread.start()
    return thread


def _ask(file: Path, size: int) -> None:
    """What the system holds already costs it a look."""
    with contextlib.suppress(OSError), file.open("rb") as opened:  # advice alone: whoever needs the file will say more
        for start in range(0, size, _CHUNK_BYTES):
            os.posix_fadvise(opened.fileno(), start, _CHUNK_BYTES, os.POSIX_FADV_WILLNEED)


def _available_bytes() -> int:
    """Of the machine, or of this container where it has a limit; 0 where the system does not say."""
    if not _MEMORY.is_file():
        return 0
    available = _numbers(_MEMORY).get("MemAvailable:", 0) * 1024
    limit, held = _GROUP / "memory.max", _GROUP / "memory.stat"
    if limit.is_file() and held.is_file() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - _numbers(held).get("anon", 0))  # files that it holds can go
    return available


def _numbers(file: Path) -> dict[str, int]:
    """The number in each line, by the word before it."""
    lines = [line.split() for line in file.read_text().splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
