"""Remember which big files were hashed before and have not changed since, in the user's cache folder.

Files are identified by device, inode, size and times. A lost entry costs time, not correctness.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from lrt_deploy.errors import BundleError
from lrt_deploy.fields import Sha256, convert
from lrt_deploy.files import atomic_write, read_json, user_cache_folder

_LIMIT, _LIMIT_BYTES = 512, 2**20  # 512 entries are about 80 kB


def file_key(stat: os.stat_result) -> str:
    """Return the key of a file in its present state."""
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def load_verified() -> dict[str, str]:
    """Return the digests of files that were found intact, by `file_key`; none if the cache is missing or damaged."""
    if (path := _path()) is not None:
        with contextlib.suppress(BundleError, ValueError):
            return convert(dict[str, Sha256], read_json(path, "the verified files", BundleError, _LIMIT_BYTES))
    return {}


def save_verified(digests: dict[str, str]) -> None:
    """Replace the cache by the last entries of `digests`; a folder that cannot be written is left as it is."""
    if (path := _path()) is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(path) as partial:
                partial.write_text(json.dumps(dict(list(digests.items())[-_LIMIT:])), encoding="utf-8")


def _path() -> Path | None:
    folder = user_cache_folder()
    return None if folder is None else folder / "verified.json"
