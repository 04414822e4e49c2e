"""Files on disk: read regular files within a size limit, and write files that are whole or absent.

Every file that a user or a stranger names is opened here. A FIFO, a device, a folder or a link to one of them is
refused before anything is read from it, so no reader can block or run without bound. Links to regular files are
followed. Knows nothing of what is in a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import LRTDeployError

PARTIAL = ".partial-"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: Path, what: str, error: type[LRTDeployError], limit: int | None = None) -> BinaryIO:
    """Open a regular file for reading bytes; never blocks.

    `what` names the file's role in messages, for instance "the manifest". Raises `error` if the path is missing, cannot
    be read, is not a regular file (or a link to one), or has more than `limit` bytes (None: any size).
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits for its writer.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as cause:  # ValueError: a NUL byte in the name
        raise error(f"{what} cannot be opened: {_reason(cause)} ({path})") from cause
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
            raise error(f"{what} ({path}) is {kind}; expected a regular file")
        if limit is not None and status.st_size > limit:
            raise error(f"{what} ({path}) has {status.st_size} bytes; at most {limit} are accepted")
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def read_bytes(path: Path, what: str, error: type[LRTDeployError], limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes; see `open_regular`."""
    with open_regular(path, what, error, limit) as file:
        try:
            data = file.read(limit + 1)
        except OSError as cause:
            raise error(f"{what} cannot be read: {_reason(cause)} ({path})") from cause
    if len(data) > limit:  # it has grown since it was opened
        raise error(f"{what} ({path}) has more than {limit} bytes; at most {limit} are accepted")
    return data


def read_text(path: Path, what: str, error: type[LRTDeployError], limit: int) -> str:
    """Read a regular file of at most `limit` bytes as UTF-8 text; see `open_regular`."""
    data = read_bytes(path, what, error, limit)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(f"{what} ({path}) is not UTF-8 text: byte {cause.start} is {data[cause.start]:#04x}") from cause


def read_json(path: Path, what: str, error: type[LRTDeployError], limit: int) -> Any:  # noqa: ANN401 - any JSON value
    """Read a regular file of at most `limit` bytes as JSON; see `parse_json` and `open_regular`."""
    return parse_json(read_text(path, what, error, limit), f"{what} ({path})", error)


def parse_json(text: str, what: str, error: type[LRTDeployError]) -> Any:  # noqa: ANN401 - any JSON value
    """Parse JSON text that may be hostile.

    Raises `error` for text that is not JSON, is nested too deeply, has an integer beyond Python's limit of digits, or
    has NaN or infinity, which are not JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as cause:
        raise error(f"{what} is nested too deeply to be read") from cause
    except ValueError as cause:
        raise error(f"{what} is not valid JSON: {cause}") from cause


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it to `target` when the block succeeds, remove it when it fails.

    The data is flushed to the disk before the rename, so that a crash leaves the old file or the new one, and at most a
    hidden `.NAME.partial-…` beside it.
    """
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


def _reason(cause: BaseException) -> str:
    return cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
