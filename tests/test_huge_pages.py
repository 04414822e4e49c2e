"""Huge pages change where memory lies, never what it holds; where the system has none, nothing happens."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from lrt_deploy.runtime import huge_pages

BYTES = 16 * huge_pages.HUGE_PAGE_BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")
def test_contents_and_addresses_stay():
    with huge_pages.in_huge_pages() as moved:
        array = np.arange(BYTES // 8)
        address = array.ctypes.data
    assert array.ctypes.data == address and np.array_equal(array, np.arange(BYTES // 8))
    assert 0 <= moved.bytes <= 2 * BYTES  # how much is the system's to say; it may have none


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")
def test_only_what_the_block_allocated_is_moved(monkeypatch):
    asked = []
    monkeypatch.setattr(huge_pages, "_collapse", lambda start, end: asked.append((start, end)) or end - start)
    before = np.ones(BYTES // 8)
    with huge_pages.in_huge_pages() as moved:
        after = np.ones(BYTES // 8)
    assert moved.bytes == sum(end - start for start, end in asked) >= BYTES
    middle = after.ctypes.data + after.nbytes // 2
    assert any(start <= middle < end for start, end in asked)
    assert before.all()
    asked.clear()
    with huge_pages.in_huge_pages() as moved:
        pass
    assert (asked, moved.bytes) == ([], 0)


def test_a_system_without_a_memory_map_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(huge_pages, "_MAPS", tmp_path / "maps")
    with huge_pages.in_huge_pages() as moved:
        kept = np.ones(BYTES // 8)
    assert kept.all() and moved.bytes == 0


def test_an_error_in_the_block_passes():
    with pytest.raises(KeyError), huge_pages.in_huge_pages():
        raise KeyError
