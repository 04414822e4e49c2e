"""Memory of weights and tables on Linux: huge pages for what each step reads, and files read before they are needed.

A decode step reads all weights from end to end, and pages of 4 KiB cost it address translations; `in_huge_pages` moves
what a block of code allocates. A row of a mapped table that the system does not hold makes a step wait for the disk
(docs/tried-and-lost.md); `read_ahead` has it read the file in the background. Both do nothing where the system cannot,
or has too little memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HUGE_PAGE_BYTES = 2 * 2**20
_MADV_COLLAPSE = 25
_RESIDENT = 3 / 4  # of a huge page must be in use: the rest of it becomes memory that holds nothing
_MAPS = Path("/proc/self/maps")
_Region = tuple[int, int]  # start and end


class Moved:
    """How much was moved; known when the block has ended."""

    bytes = 0


@contextmanager
def in_huge_pages() -> Iterator[Moved]:
    """Move large anonymous memory that the block leaves allocated; contents and addresses stay."""
    moved, before = Moved(), _anonymous_regions()
    yield moved
    parts = [part for region in _anonymous_regions() for part in _without(region, before)]
    regions = [(start, end) for start, end in parts if end - start >= HUGE_PAGE_BYTES]
    if regions and hasattr(
        library := ctypes.CDLL(None), "malloc_trim"
    ):  # glibc's: gives back what was freed amid others
        library.malloc_trim(0)
    moved.bytes = sum(_collapse(start, end) for start, end in regions)


def _anonymous_regions() -> list[_Region]:
    """Writable mappings without a file, of at least two huge pages; ascending. The heap is one of them."""
    if not (sys.platform == "linux" and _MAPS.is_file()):
        return []
    regions = []
    for line in _MAPS.read_text().splitlines():
        span, access, _, _, inode, *name = line.split()
        start, end = (int(number, 16) for number in span.split("-"))
        large = end - start >= 2 * HUGE_PAGE_BYTES
        if large and access == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            regions.append((start, end))
    return regions


def _without(region: _Region, old: list[_Region]) -> Iterator[_Region]:
    """The parts of a region that no old one (ascending) covers: the heap and neighbouring mappings grow."""
    start, end = region
    for low, high in old:
        if low < end and start < high:
            if start < low:
                yield start, low
            start = high
    if start < end:
        yield start, end


def _collapse(start: int, end: int) -> int:
    """Bytes that now lie in huge pages."""
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    pages = HUGE_PAGE_BYTES // mmap.PAGESIZE
    flags, moved = ctypes.create_string_buffer(pages), 0
    for low in range(-(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, end - HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES):
        if library.mincore(low, HUGE_PAGE_BYTES, flags) != 0:
            continue  # given back since
        resident = sum(flag & 1 for flag in flags.raw)
        if resident >= _RESIDENT * pages and library.madvise(low, HUGE_PAGE_BYTES, _MADV_COLLAPSE) == 0:
            moved += HUGE_PAGE_BYTES
    return moved


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
    lines = [line.split() for line in file.read_text().splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
