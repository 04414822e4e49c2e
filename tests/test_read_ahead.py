"""Files are read in the background where the system has the memory for it, and otherwise left alone."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time

import numpy as np
import pytest

import lrt_deploy
from lrt_deploy.runtime import opening
from lrt_deploy.runtime.backends import memory_pages
from lrt_deploy.runtime.backends.memory_pages import _available_bytes

MODEL = "mr_gqa_SSSL"
BYTES = 2 * memory_pages._SMALLEST_BYTES
needs_advice = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice on files")


@pytest.fixture
def file(tmp_path):
    """A large file that is on disk."""
    path = tmp_path / "weights.bin"
    with path.open("wb") as opened:
        opened.write(os.urandom(BYTES))
        os.fsync(opened.fileno())
    return path


def held(path):
    """The share of a file that the system has in memory."""
    with path.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
    view, flags = np.frombuffer(mapped, np.uint8), ctypes.create_string_buffer(BYTES // mmap.PAGESIZE)
    ask = ctypes.CDLL(None).mincore
    ask.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    assert ask(view.ctypes.data, BYTES, flags) == 0
    return sum(flag & 1 for flag in flags.raw) / len(flags)


@needs_advice
def test_a_dropped_file_is_read_again(file):
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if held(file) > 0.5:
        pytest.skip("this file system keeps its files in memory")
    thread = memory_pages.read_ahead(file)
    thread.join()
    for _ in range(100):  # asked for is not read yet
        if held(file) == 1:
            return
        time.sleep(0.1)
    raise AssertionError(f"{held(file):.0%} of the file are in memory")


@needs_advice
def test_small_files_and_those_that_do_not_fit_are_left(file, monkeypatch):
    assert memory_pages.read_ahead(file) is not None
    monkeypatch.setattr(memory_pages, "_available_bytes", lambda: 2 * BYTES - 1)
    assert memory_pages.read_ahead(file) is None
    monkeypatch.setattr(memory_pages, "_available_bytes", lambda: 2 * BYTES)
    assert memory_pages.read_ahead(file) is not None
    file.write_bytes(b"few")
    assert memory_pages.read_ahead(file) is None


def test_a_system_without_advice_is_let_be(file, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert memory_pages.read_ahead(file) is None


@needs_advice
def test_a_file_that_goes_meanwhile_ends_the_thread_quietly(file, recwarn):
    memory_pages._ask(file.with_name("gone"), BYTES)
    assert not recwarn


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of Linux")
def test_a_container_has_what_its_limit_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_pages, "_GROUP", tmp_path)
    whole = _available_bytes()
    assert whole > 0
    (tmp_path / "memory.stat").write_text("anon 3000\nfile 900000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert _available_bytes() > 10000
    (tmp_path / "memory.max").write_text("10000\n")
    assert _available_bytes() == 7000


def test_a_system_that_does_not_say_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_pages, "_MEMORY", tmp_path / "meminfo")
    assert _available_bytes() == 0


def test_what_holds_the_tables_is_read_ahead(export_once, host_embeddings_once, monkeypatch):
    asked = []
    monkeypatch.setattr(opening, "read_ahead", asked.append)
    for folder in (export_once(MODEL), host_embeddings_once(MODEL)):
        lrt_deploy.open_decoder(folder).close()
    assert [path.relative_to(path.parents[2]).as_posix() for path in asked] == [
        "graphs/fp32/weights.bin",
        "graphs/fp32/tables.bin",
    ]
