"""Huge pages change where memory lies, never what it holds; where the system has none, nothing happens."""

from __future__ import annotations

import mmap
import subprocess
import sys

import numpy as np
import pytest

from lrt_deploy.runtime.backends import memory_pages

BYTES = 16 * memory_pages.HUGE_PAGE_BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")
def test_contents_and_addresses_stay():
    with memory_pages.in_huge_pages() as moved:
        array = np.arange(BYTES // 8)
        address = array.ctypes.data
    assert array.ctypes.data == address and np.array_equal(array, np.arange(BYTES // 8))
    assert 0 <= moved.bytes <= 2 * BYTES  # how much is the system's to say; it may have none


@pytest.mark.parametrize(
    ("old", "parts"),
    [
        ([], [(10, 20)]),
        ([(0, 10), (20, 30)], [(10, 20)]),
        ([(10, 14)], [(14, 20)]),  # a heap that grew
        ([(16, 20)], [(10, 16)]),  # a mapping below another one
        ([(12, 14), (15, 16)], [(10, 12), (14, 15), (16, 20)]),
        ([(5, 12), (18, 25)], [(12, 18)]),
        ([(10, 20)], []),
    ],
)
def test_what_was_there_before_is_left_out(old, parts):
    assert list(memory_pages._without((10, 20), old)) == parts


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")
@pytest.mark.parametrize(("used", "asked"), [(1, True), (0.8, True), (0.7, False), (0, False)])
def test_a_huge_page_is_asked_for_where_most_of_it_is_in_use(monkeypatch, used, asked):
    size = memory_pages.HUGE_PAGE_BYTES
    memory = mmap.mmap(-1, 3 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # a system may give huge pages to who does not ask
    view = np.frombuffer(memory, np.uint8)
    start = -(-view.ctypes.data // size) * size
    view[start - view.ctypes.data :][: int(used * size) : mmap.PAGESIZE] = 1
    monkeypatch.setattr(memory_pages, "_MADV_COLLAPSE", mmap.MADV_NORMAL)  # which no system refuses
    assert memory_pages._collapse(start, start + size) == asked * size


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted on Linux alone")
def test_what_the_block_freed_is_given_back():
    """Small arrays between kept ones: malloc cannot return them by itself.

    A process of its own: in a heap with free memory the arrays would take no new memory, and nothing would be done.
    """
    program = """
import numpy as np, psutil
from lrt_deploy.runtime.backends import memory_pages
private_bytes = lambda: psutil.Process().memory_full_info().uss
with memory_pages.in_huge_pages():
    kept = [np.ones(2**15, np.uint8) for _ in range(4096)][::16]
    before = private_bytes()
print(private_bytes() < before - 64 * 2**20, all(array.all() for array in kept))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "True"]


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")
def test_only_what_the_block_allocated_is_moved(monkeypatch):
    asked = []
    monkeypatch.setattr(memory_pages, "_collapse", lambda start, end: asked.append((start, end)) or end - start)
    before = mapped_array()
    with memory_pages.in_huge_pages() as moved:
        after = mapped_array()
    assert moved.bytes == sum(end - start for start, end in asked) >= BYTES
    middle = after.ctypes.data + after.nbytes // 2
    assert any(start <= middle < end for start, end in asked)
    assert before.all()
    asked.clear()
    with memory_pages.in_huge_pages() as moved:
        pass
    assert (asked, moved.bytes) == ([], 0)


def mapped_array():
    """Array of ones in a mapping of its own: malloc might take it from free memory of the heap."""
    array = np.frombuffer(mmap.mmap(-1, BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.float64)
    array[:] = 1
    return array


def test_a_system_without_a_memory_map_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_pages, "_MAPS", tmp_path / "maps")
    with memory_pages.in_huge_pages() as moved:
        kept = np.ones(BYTES // 8)
    assert kept.all() and moved.bytes == 0


def test_an_error_in_the_block_passes():
    with pytest.raises(KeyError), memory_pages.in_huge_pages():
        raise KeyError
