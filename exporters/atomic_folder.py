"""A folder that is whole or absent: made beside its target and renamed into place, gone when anything goes wrong.

The old folder and the new one are exchanged in one step, so that at every moment, a SIGKILL included, one of them has
the name. Where the system or the filesystem cannot exchange, the old one stands aside for the time between two renames
as `.NAME.retired-` and 16 hex digits, and `recover` brings it back. The temporary folder is locked while it is filled
(see `lrt_deploy.files`): what killed processes left is told from what living ones write, in other containers too.
Installs no signal handlers. Knows nothing of what is in a folder: the caller says what may be replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lrt_deploy.errors import LRTDeployError
from lrt_deploy.files import left_beside, locked, partial_name, remove_partials, try_lock

# Raises an error that names what it found, if a folder or link must not be replaced.
Check = Callable[[Path], None]

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # of renameat2(2)
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_FASTER = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)  # of a rename, when another process came in between
# Longest wait for processes that clean up and rename in the same folder, which takes moments. Whoever has its lock
# longer is no export: `flock FOLDER lrt-deploy export …`.
_SECTION_S = 10.0
_FOLDER = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


@contextlib.contextmanager
def atomic_folder(target: Path, check: Check | None, error: type[LRTDeployError]) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block succeeds, and is removed when it fails.

    An existing `target` is replaced if `check` does not raise for it, then and at the last moment; with None it is
    never replaced, and `error` is raised. Of several that replace one target at once the last wins.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    folder, number = _new_folder(target)
    try:
        try:
            yield folder
            with locked(target.parent, longest_s=_SECTION_S):
                _put_in_place(folder, target, check, error)
        finally:  # the new one after an error, the old one after an exchange, nothing where there was no old one
            _remove(folder)
    finally:
        if number is not None:
            os.close(number)


def recover(target: Path) -> None:
    """Clean up after killed processes: bring back a folder that stood aside, remove temporary ones."""
    if not target.parent.is_dir():
        return
    with locked(target.parent, longest_s=_SECTION_S):
        with contextlib.suppress(OSError):
            for retired in left_beside(target, f".{target.name}.retired-"):
                if os.path.lexists(target):
                    _remove(retired)
                else:
                    retired.rename(target)
        remove_partials(target)


def _new_folder(target: Path) -> tuple[Path, int | None]:
    """Create and lock an empty temporary folder; its open number holds the lock."""
    with locked(target.parent, longest_s=_SECTION_S):
        folder = partial_name(target)
        folder.mkdir()
        try:
            number = os.open(folder, os.O_RDONLY | _FOLDER)
        except OSError:  # Windows cannot open folders
            return folder, None
        try_lock(number)
        return folder, number


def _put_in_place(folder: Path, target: Path, check: Check | None, error: type[LRTDeployError]) -> None:
    """Give the new folder its name; the old one, if any, then has the temporary name."""
    while True:
        try:
            if not os.path.lexists(target):
                if not _renameat2(folder, target, _NOREPLACE):
                    folder.rename(target)
                return
            if check is None:
                raise error(f"{target} has come into being meanwhile; it was left as it is, and nothing was written")
            before = target.lstat()
            check(target)
            if not _renameat2(folder, target, _EXCHANGE):
                _step_aside(folder, target)
        except OSError as cause:
            if cause.errno not in _FASTER or not folder.is_dir():
                raise
            continue
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(before, folder.lstat()):  # something else was put there after the check
                _renameat2(folder, target, _EXCHANGE)
                continue
        return


def _step_aside(folder: Path, target: Path) -> None:
    """Exchange by two renames; `recover` mends a kill between them."""
    retired = target.with_name(f".{target.name}.retired-{secrets.token_hex(8)}")
    target.rename(retired)
    try:
        folder.rename(target)
    except BaseException:
        if not os.path.lexists(target):
            retired.rename(target)
        raise
    retired.rename(folder)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Rename with flags; False where the system or the filesystem cannot."""
    function = _renameat2_function()
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@functools.cache
def _renameat2_function() -> Any:  # noqa: ANN401 - ctypes has no types for this
    """Return the C library's renameat2, or None."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function


def _remove(path: Path) -> None:
    """Remove a folder with its content, or a link; what cannot be removed stays, and is tried again next time."""
    with contextlib.suppress(OSError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
