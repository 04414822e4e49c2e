"""Reading what strangers name, and writing files that are whole or absent."""

from __future__ import annotations

import os
import time

import pytest

from lrt_deploy.errors import BundleError
from lrt_deploy.files import (
    PARTIAL,
    atomic_write,
    check_replaceable,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    user_cache_folder,
)


def test_a_regular_file_and_a_link_to_one_are_read(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    (tmp_path / "link").symlink_to(file)
    assert read_bytes(file, "the file", BundleError, 3) == b"abc"
    assert read_text(tmp_path / "link", "the file", BundleError, 3) == "abc"


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "socket", "missing", "loop", "nul"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "path"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "nul":
        path = tmp_path / "a\0b"
    began = time.monotonic()
    with pytest.raises(BundleError, match="the manifest"):
        open_regular(path, "the manifest", BundleError)
    assert time.monotonic() - began < 30  # a hang, not a measurement


def test_sizes_are_bounded(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 11)
    with pytest.raises(BundleError, match="has 11 bytes; at most 10 are accepted"):
        read_bytes(path, "the file", BundleError, 10)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 5000, "not valid JSON"),
        ("NaN", "NaN is not a JSON number"),
        ("-Infinity", "not a JSON number"),
    ],
)
def test_hostile_json_is_refused(text, reason):
    with pytest.raises(BundleError, match=reason):
        parse_json(text, "the manifest", BundleError)


def test_json_and_text_of_other_encodings(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b'{"a": [1, 2.5, null]}')
    assert read_json(path, "the file", BundleError, 100) == {"a": [1, 2.5, None]}
    path.write_bytes(b"ab\xff")
    with pytest.raises(BundleError, match="not UTF-8 text: byte 2 is 0xff"):
        read_json(path, "the file", BundleError, 100)


def test_an_atomic_write_replaces_or_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with atomic_write(path) as partial:
        assert PARTIAL in partial.name
        partial.write_text("new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("private", "mode"), [(True, 0o600), (False, 0o640)])
def test_a_private_file_is_its_owners_alone_and_others_follow_the_umask(tmp_path, private, mode):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file", private) as partial:
            assert partial.stat().st_mode & 0o777 == mode  # also while it is written
            partial.write_text("text")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name, kind in ("device", "a character device"), ("folder", "a folder"), ("fifo", "a named pipe"):
        with pytest.raises(OSError, match=f"it is {kind}"), atomic_write(tmp_path / name):
            raise AssertionError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device", "fifo", "folder"]


def test_what_a_killed_writer_left_goes_with_the_next_write_and_what_a_live_one_writes_stays(tmp_path):
    left, notes = (tmp_path / f".file.partial-{end}" for end in ("0123456789abcdef", "notes"))
    for path in (left, notes):
        path.write_text("half")
    with atomic_write(tmp_path / "file") as live:
        live.write_text("first")
        assert not left.exists()
        with atomic_write(tmp_path / "file") as second:
            second.write_text("second")
        assert live.exists()
    assert (tmp_path / "file").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == [notes.name, "file"]


def test_a_file_of_another_kind_is_not_replaced(tmp_path):
    path = tmp_path / "file"

    def check():
        check_replaceable(path, "the plot", lambda head: head.startswith(b"PNG"), BundleError)

    check()
    for content in (b"", b"PNG and more"):
        path.write_bytes(content)
        check()
    path.write_bytes(b"years of work")
    with pytest.raises(BundleError, match="file exists and is a file of another kind; the plot replaces only"):
        check()


@pytest.mark.parametrize(("base", "expected"), [("/base", "/base/lrt-deploy"), ("base", None), ("", None)])
def test_the_cache_folder_is_the_users_and_a_relative_one_is_ignored(tmp_path, monkeypatch, base, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(user_cache_folder()) == (expected or str(tmp_path / ".cache" / "lrt-deploy"))


@pytest.mark.parametrize("name", ["n" * 255, "ä" * 120 + "n" * 10])
def test_the_longest_names_can_be_written_and_their_leftovers_go(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(RuntimeError), atomic_write(path) as partial:
        left = partial.name
        raise RuntimeError
    (tmp_path / left).write_text("left by a killed process")
    with atomic_write(path) as partial:
        partial.write_text("new")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
