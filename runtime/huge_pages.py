"""Move what a block of code allocates into huge pages, on Linux: weights that every step reads from end to end.

A step of a large model walks through all of its packed weights. In pages of 4 KiB that means a walk through the page
tables for every few cache lines; in pages of 2 MiB a decode step took 11 to 30% less time (benchmarks/README.md).
Runtimes do not ask for huge pages, and most systems give them only to who asks, so this does, afterwards: MADV_COLLAPSE
(Linux 6.1) copies a range into huge pages, or leaves it as it was. Does nothing where the system cannot.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HUGE_PAGE_BYTES = 2 * 2**20
_MADV_COLLAPSE = 25
_CHUNK_BYTES = 16 * HUGE_PAGE_BYTES  # one call holds the process's memory map for as long as it copies
_MAPS = Path("/proc/self/maps")


class Moved:
    """How much was moved; known when the block has ended."""

    bytes = 0


@contextmanager
def in_huge_pages() -> Iterator[Moved]:
    """Move large anonymous memory that the block leaves allocated; contents and addresses stay."""
    moved, before = Moved(), _anonymous_regions()
    yield moved
    for start, end in sorted(_anonymous_regions() - before):
        moved.bytes += _collapse(start, end)


def _anonymous_regions() -> set[tuple[int, int]]:
    """Start and end of writable mappings without a file, of at least two huge pages."""
    if not (sys.platform == "linux" and _MAPS.is_file()):
        return set()
    regions = set()
    for line in _MAPS.read_text().splitlines():
        span, access, *_, inode = line.split()[:5]
        start, end = (int(number, 16) for number in span.split("-"))
        if len(line.split()) == 5 and access == "rw-p" and inode == "0" and end - start >= 2 * HUGE_PAGE_BYTES:
            regions.add((start, end))
    return regions


def _collapse(start: int, end: int) -> int:
    """Bytes that now lie in huge pages."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    first, last = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, end // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    chunks = [(low, min(_CHUNK_BYTES, last - low)) for low in range(first, last, _CHUNK_BYTES)]
    return sum(size for low, size in chunks if madvise(low, size, _MADV_COLLAPSE) == 0)
