"""Files on disk: read regular files within a size limit, and write files that are whole or absent.

Every file that a user or a stranger names is opened here. A FIFO, a device, a folder or a link to one of them is
refused before anything is read from it, so no reader can block or run without bound.

A temporary file or folder, `.NAME.partial-` and 16 hex digits, is locked (flock) by the process that fills it. One that
is not locked was left by a killed process, and the next writer of NAME removes it. Where the filesystem has no such
locks, one that was not changed for a day counts as left.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import platformdirs

from .errors import LRTDeployError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_TEXT_BYTES = 2**28  # of a prompt, or of a text to evaluate or to calibrate on
_PART_BYTES = 2**20
PARTIAL = ".partial-"
_LONGEST_STEM_BYTES = 200  # of the 255 that filesystems allow a name
STALE_SECONDS = 24 * 3600  # only where there are no locks
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: Path, what: str, error: type[LRTDeployError], limit: int | None = None) -> BufferedReader:
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
            # In parts: Python allocates the whole size before it reads.
            parts, size = [], 0
            while size <= limit and (part := file.read(min(_PART_BYTES, limit + 1 - size))):
                parts.append(part)
                size += len(part)
        except OSError as cause:
            raise error(f"{what} cannot be read: {_reason(cause)} ({path})") from cause
    if size > limit:  # it has grown since it was opened
        raise error(f"{what} ({path}) has more than {limit} bytes; at most {limit} are accepted")
    return b"".join(parts)


def read_text(path: Path, what: str, error: type[LRTDeployError], limit: int) -> str:
    """Read a regular file of at most `limit` bytes as UTF-8 text; see `open_regular`."""
    return decode_text(read_bytes(path, what, error, limit), f"{what} ({path})", error)


def decode_text(data: bytes, what: str, error: type[LRTDeployError]) -> str:
    """Decode UTF-8; raises `error` that names the first wrong byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(f"{what} is not UTF-8 text: byte {cause.start} is {data[cause.start]:#04x}") from cause


def read_json(path: Path, what: str, error: type[LRTDeployError], limit: int, constants: bool = False) -> Any:  # noqa: ANN401 - any JSON value
    """Read a regular file of at most `limit` bytes as JSON; see `parse_json` and `open_regular`."""
    text = read_text(path, what, error, limit)
    refuse_placeholder(text[: len(_LFS_POINTER)].encode(), f"{what} ({path})", error)
    return parse_json(text, f"{what} ({path})", error, constants)


def refuse_placeholder(head: bytes, what: str, error: type[LRTDeployError]) -> None:
    """Raise `error` if a file that begins with `head` is empty or a git-LFS pointer, which stands for a file."""
    if not head:
        raise error(f"{what} is empty; it was not written or not copied to its end")
    if head.startswith(_LFS_POINTER):
        raise error(f"{what} is a git-LFS pointer and not the file that it stands for; run `git lfs pull` there")


def parse_json(text: str, what: str, error: type[LRTDeployError], constants: bool = False) -> Any:  # noqa: ANN401 - any JSON value
    """Parse JSON text that may be hostile.

    Raises `error` for text that is not JSON, is nested too deeply, has an integer beyond Python's limit of digits, or
    has NaN or infinity, which are not JSON; `constants` admits these two, because Python writes them.
    """
    try:
        return json.loads(text, parse_constant=None if constants else _refuse_constant)
    except RecursionError as cause:
        raise error(f"{what} is nested too deeply to be read") from cause
    except ValueError as cause:
        raise error(f"{what} is not valid JSON: {cause}") from cause


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


@contextlib.contextmanager
def atomic_write(target: Path, private: bool = False) -> Iterator[Path]:
    """Yield a temporary file beside `target`; rename it to `target` when the block succeeds, remove it when it fails.

    The block writes into the file that is there, which is locked. The data is flushed to the disk before the rename, so
    that a crash leaves the old file or the new one, and at most a temporary file that the next call for `target`
    removes. `private`: only the owner may read and write it (mode 0600). A link is replaced, not followed. Raises
    OSError for a target that is no regular file, for instance `/dev/null`.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(target).st_mode  # noqa: PTH116 - of what a link points to
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
            raise OSError(errno.EEXIST, f"it is {kind}, which is not replaced by a file", str(target))
    remove_partials(target)
    partial, number = _new_partial(target, 0o600 if private else 0o666)
    try:
        try:
            yield partial
            _flush(partial)
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    finally:
        if number is not None:
            os.close(number)
    if os.name == "posix":  # the rename itself; Windows cannot open a folder for this
        _flush(target.parent)


def check_replaceable(target: Path, what: str, ours: Callable[[bytes], bool], error: type[LRTDeployError]) -> None:
    """Raise `error` if `target` is a file of another kind than `what`: not empty, and `ours` refuses its first MiB."""
    if not os.path.lexists(target):
        return
    with open_regular(target, f"the old file in place of which {what} would be written", error) as file:
        head = file.read(2**20)
    if head and not ours(head):
        raise error(
            f"{target} exists and is a file of another kind; {what} replaces only one of its own kind: "
            "choose another name, or remove the file"
        )


def check_writable(target: Path, error: type[LRTDeployError]) -> None:
    """Raise `error` unless a file or folder `target` can be made: its nearest existing parent is a writable folder."""
    parent = existing_parent(target)
    if not parent.is_dir():
        raise error(f"{target} cannot be made: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise error(f"{target} cannot be made: the folder {parent} may not be written to; choose another place")


def existing_parent(target: Path) -> Path:
    """Return the nearest parent of a path that exists."""
    return next((parent for parent in target.absolute().parents if os.path.lexists(parent)), Path(target.anchor or "/"))


def remove_partials(target: Path) -> None:
    """Remove the temporary files and folders that killed writers of `target` have left beside it."""
    for path in left_beside(target, f".{_stem(target)}{PARTIAL}"):
        remove_stale(path)


def left_beside(target: Path, prefix: str) -> list[Path]:
    """List what lies beside `target` under a name of `prefix` and 16 hex digits."""
    pattern = re.compile(f"{re.escape(prefix)}[0-9a-f]{{16}}")
    try:
        return [target.parent / entry.name for entry in os.scandir(target.parent) if pattern.fullmatch(entry.name)]
    except OSError:
        return []


def remove_stale(path: Path) -> None:
    """Remove a temporary file or folder, unless a living process holds its lock; a link or a device is left."""
    try:
        number = os.open(path, os.O_RDONLY | NO_FOLLOW)
    except OSError:  # a link, another user's, or gone
        return
    try:
        status = os.fstat(number)
        free = try_lock(number)
        if free is None:
            free = time.time() - status.st_mtime > STALE_SECONDS
        if free and stat.S_ISREG(status.st_mode):
            path.unlink(missing_ok=True)
        elif free and stat.S_ISDIR(status.st_mode):
            shutil.rmtree(path, ignore_errors=True)
    except OSError:  # a folder that cannot be written
        return
    finally:
        os.close(number)


def try_lock(number: int) -> bool | None:
    """Lock an open file or folder until it is closed; False if another process holds it, None where locks are not."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # network filesystems
        return None
    return True


@contextlib.contextmanager
def locked(path: Path, flags: int = 0, longest_s: float = math.inf) -> Iterator[None]:
    """Hold the lock of a file or folder during the block, for moments; without it where it is not to be had.

    `flags` are those of open(2); another process that has the lock is waited for, `longest_s` at most.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # Windows cannot open folders; a link, or another user's
            number = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o600)
            stack.callback(os.close, number)
            ends = time.monotonic() + longest_s
            while try_lock(number) is False and time.monotonic() < ends:
                time.sleep(0.01)
        yield


def partial_name(target: Path) -> Path:
    """Return a new name for a temporary file or folder beside `target`."""
    return target.with_name(f".{_stem(target)}{PARTIAL}{secrets.token_hex(8)}")


def _stem(target: Path) -> str:
    """Return the part of a target's name that names its temporary files, shortened if they would be too long."""
    name = os.fsencode(target.name)
    if len(name) <= _LONGEST_STEM_BYTES:
        return target.name
    digest = hashlib.sha256(name).hexdigest()[:16]  # long names that begin alike stay apart
    return f"{os.fsdecode(name[: _LONGEST_STEM_BYTES - 16]).encode(errors='ignore').decode()}{digest}"


def user_cache_folder() -> Path | None:
    """Return this package's folder in the user's cache, which need not exist; None for a user without a home."""
    try:
        return platformdirs.user_cache_path("lrt-deploy", appauthor=False)
    except RuntimeError:  # no HOME, and the user is not in the system's list of users
        return None


def _new_partial(target: Path, mode: int) -> tuple[Path, int | None]:
    """Create and lock an empty temporary file; its open number holds the lock."""
    while True:
        partial = partial_name(target)
        number = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_FOLLOW, mode)
        if fcntl is None:  # Windows cannot rename what is open
            os.close(number)
            return partial, None
        # Another process may have taken it for a leftover before it was locked; then take a new name.
        if try_lock(number) is not False and os.fstat(number).st_nlink:
            return partial, number
        os.close(number)


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _reason(cause: BaseException) -> str:
    return cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
