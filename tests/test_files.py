"""Reading what strangers name, and writing files that are whole or absent."""

from __future__ import annotations

import os
import time

import pytest

from lrt_deploy.errors import BundleError
from lrt_deploy.files import PARTIAL, atomic_write, open_regular, parse_json, read_bytes, read_json, read_text


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
