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

_LIMIT_BYTES = 2**20  # 512 entries are about 80 kB


class Remembered:
    """Digests of files that were found intact, by (device, inode, size, mtime, ctime); a few hundred at most."""

    _LIMIT = 512

    def __init__(self, path: Path | None, entries: dict[str, str]) -> None:
        self._path, self._entries, self._changed = path, entries, False

    @classmethod
    def load(cls) -> Remembered:
        """Read the user's file. One that is missing, damaged or no regular file is empty, and saving replaces it."""
        folder = user_cache_folder()
        if folder is None:
            return cls(None, {})
        path = folder / "verified.json"
        entries: dict[str, str] = {}
        with contextlib.suppress(BundleError, ValueError):
            entries = convert(dict[str, Sha256], read_json(path, "the verified files", BundleError, _LIMIT_BYTES))
        return cls(path, entries)

    def holds(self, stat: os.stat_result, sha256: str) -> bool:
        """Return whether this very file was hashed to this digest before."""
        return self._entries.get(self._key(stat)) == sha256

    def add(self, stat: os.stat_result, sha256: str) -> None:
        """Remember the digest of a file."""
        self._entries[self._key(stat)] = sha256
        self._changed = True

    def save(self) -> None:
        """Replace the file in one step. A cache folder that cannot be written costs time, not correctness."""
        if not self._changed or self._path is None:
            return
        recent = dict(list(self._entries.items())[-self._LIMIT :])
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(self._path) as partial:
                partial.write_text(json.dumps(recent), encoding="utf-8")

    @staticmethod
    def _key(stat: os.stat_result) -> str:
        return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
