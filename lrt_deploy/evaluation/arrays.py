"""Read `.npz` archives that users name: regular files of bounded size, without pickles."""

from __future__ import annotations

import fnmatch
import os
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lrt_deploy.errors import InputError, LRTDeployError
from lrt_deploy.files import open_regular

# Errors of damaged archives; numpy parses an array's header as Python literals.
_ERRORS = (
    *(OSError, ValueError, EOFError, MemoryError, RuntimeError, OverflowError, TypeError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
# Bounds of the uncompressed size: recorded numbers hardly compress, and token rows by less than this factor.
_MAX_EXPANSION, _FREE_BYTES, _MAX_BYTES = 64, 64 * 1024 * 1024, 8 * 1024**3


def read_arrays(
    path: str | Path, patterns: Sequence[str], expected: str, error_type: type[LRTDeployError]
) -> list[npt.NDArray[Any]]:
    """Read for each of `patterns` the first array whose name matches it.

    `expected` says what the archive should hold. Raises `error_type` for a file that is no archive, is damaged, would
    become too large, or lacks an array; InputError for one that is not a regular file.
    """
    try:
        with open_regular(Path(path), "the archive of arrays", InputError) as file:
            if file.read(6) == b"\x93NUMPY":
                raise error_type(f"{path} holds one array; expected an .npz archive of {expected}")
            size = os.fstat(file.fileno()).st_size
            with zipfile.ZipFile(file) as archive:
                total = sum(entry.file_size for entry in archive.infolist())
                if total > (limit := min(max(_MAX_EXPANSION * size, _FREE_BYTES), _MAX_BYTES)):
                    raise ValueError(f"its {size} bytes would become {total}; at most {limit} are accepted")
                members = {name.removesuffix(".npy"): name for name in archive.namelist()}
                found = [next((name for name in members if fnmatch.fnmatchcase(name, like)), None) for like in patterns]
                if missing := [pattern for pattern, name in zip(patterns, found, strict=True) if name is None]:
                    held = ", ".join(members) or "nothing"
                    raise error_type(f"{path} lacks {' and '.join(missing)}; it holds {held}. Expected {expected}")
                return [_read(archive, members[name]) for name in found if name is not None]
    except _ERRORS as error:
        reason = str(error)[:300]
        raise error_type(f"{path} cannot be read as an .npz archive: {reason}. Expected {expected}") from error


def _read(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    with archive.open(name) as member:
        array: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
        return array
