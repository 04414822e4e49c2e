"""A folder that is whole or absent: made beside its target, renamed into place, gone when anything goes wrong.

Knows nothing of what is in it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lrt_deploy.errors import ExportError

_FASTER = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)  # of a rename, when another one came in between


@contextmanager
def made_whole(target: Path, replace: bool) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, in place of an old one only if `replace`.

    Any exception cleans up. After a signal that no handler turns into one, such as SIGKILL, the hidden folder stays,
    but never under the target's name; the next one made for the same target removes it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-{os.getpid()}.", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        _put_in_place(folder, target, replace)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _put_in_place(folder: Path, target: Path, replace: bool) -> None:
    """Rename; the old target stands aside until the new one is there, and comes back if it does not.

    Of several that replace one target at once the last wins: between two renames another one may have taken the old
    target away, or put its own there, and then it is done again.
    """
    retired = folder.with_name(f"{folder.name}.old")
    while True:
        occupied = os.path.lexists(target)
        if occupied and not replace:  # somebody was faster
            raise ExportError(f"{target} has come into being meanwhile; it was left as it is, and nothing was written")
        try:
            if occupied:
                target.rename(retired)
            folder.rename(target)
        except BaseException as error:
            if not (isinstance(error, OSError) and error.errno in _FASTER and folder.is_dir()):
                if os.path.lexists(retired) and not os.path.lexists(target):
                    retired.rename(target)
                raise
            _remove(retired)
        else:
            _remove(retired)
            return


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def _remove_stale(target: Path) -> None:
    """Remove what processes that are no more have left behind for this target."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.partial-(\d+)\.\w+(\.old)?")
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not match[2] and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
