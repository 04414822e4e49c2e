"""Move what a block of code allocates into huge pages, on Linux: weights that every step reads from end to end.

A step of a large model walks through all of its packed weights. In pages of 4 KiB that means a walk through the page
tables for every few cache lines; in pages of 2 MiB a decode step took 2 to 30% less time (benchmarks/README.md).
Runtimes do not ask for huge pages, and most systems give them only to who asks, so this does, afterwards: MADV_COLLAPSE
(Linux 6.1) copies a range into a huge page, or leaves it as it was. What the block has freed is given back to the
system first, because malloc keeps it and huge pages would keep it for good: of quantized models a quarter of the
process's memory. Does nothing where the system cannot.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
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
    if regions:
        _give_back_freed()
    moved.bytes = sum(_collapse(start, end) for start, end in regions)


def _give_back_freed() -> None:
    """Let malloc return to the system what was freed amid memory in use; other allocators than glibc's are left."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


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
