"""Which big files were hashed before and have not changed since, in the user's cache folder.

Knows files by what the system says of them, and nothing of bundles. What is lost here costs time, not correctness.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path


class Remembered:
    """Which files were found intact before: digest by (device, inode, size, mtime, ctime), a few hundred at most."""

    _LIMIT = 512

    def __init__(self, path: Path, entries: dict[str, str]) -> None:
        self._path, self._entries, self._changed = path, entries, False

    @classmethod
    def load(cls) -> Remembered:
        """From the user's cache folder; an unreadable memory is an empty one."""
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = base / "lrt-deploy" / "verified.json"
        entries: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            entries = {str(k): str(v) for k, v in dict(json.loads(path.read_text())).items()}
        return cls(path, entries)

    def holds(self, stat: os.stat_result, sha256: str) -> bool:
        """Whether this very file was hashed to this digest before."""
        return self._entries.get(self._key(stat)) == sha256

    def add(self, stat: os.stat_result, sha256: str) -> None:
        """Remember."""
        self._entries[self._key(stat)] = sha256
        self._changed = True

    def save(self) -> None:
        """Replace the file in one step. A cache folder that cannot be written costs time, not correctness."""
        if not self._changed:
            return
        recent = dict(list(self._entries.items())[-self._LIMIT :])
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump(recent, file)
            Path(file.name).replace(self._path)

    @staticmethod
    def _key(stat: os.stat_result) -> str:
        return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
