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

# Errors that numpy raises for damaged archives; it parses an array's header as Python literals.
_ERRORS = (
    *(OSError, ValueError, EOFError, MemoryError, NotImplementedError, RecursionError, OverflowError, TypeError),
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
        with _open(path, expected, error_type) as archive:
            found = [fnmatch.filter(archive.files, pattern)[:1] for pattern in patterns]
            if missing := [pattern for pattern, names in zip(patterns, found, strict=True) if not names]:
                held = ", ".join(archive.files) or "nothing"
                raise error_type(f"{path} lacks {' and '.join(missing)}; it holds {held}. Expected {expected}")
            return [_member(archive, name) for (name,) in found]
    except _ERRORS as error:
        reason = str(error)[:300]
        raise error_type(f"{path} cannot be read as an .npz archive: {reason}. Expected {expected}") from error


def _open(path: str | Path, expected: str, error_type: type[LRTDeployError]) -> Any:  # noqa: ANN401 - numpy's NpzFile
    """Open an archive that is not too large; ValueError for a file that numpy would suggest to unpickle."""
    with open_regular(Path(path), "the archive of arrays", InputError) as file:
        head, size = file.read(6), os.fstat(file.fileno()).st_size
        if head == b"\x93NUMPY":
            raise error_type(f"{path} holds one array; expected an .npz archive of {expected}")
        if not head.startswith(b"PK"):
            raise ValueError("it begins like no such archive")
        with zipfile.ZipFile(file) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
    if total > (limit := min(max(_MAX_EXPANSION * size, _FREE_BYTES), _MAX_BYTES)):
        raise ValueError(f"its {size} bytes would become {total}; at most {limit} are accepted")
    return np.load(path, allow_pickle=False)


def _member(archive: Any, name: str) -> npt.NDArray[Any]:  # noqa: ANN401 - numpy's NpzFile
    """Read an array; ValueError for a member that is no array, which numpy returns as bytes."""
    array = archive[name]
    if not isinstance(array, np.ndarray):
        raise ValueError(f"its member {name} is no array")
    return array
