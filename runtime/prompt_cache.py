"""Prompts that were read before, on disk: a folder of states, shared by any number of processes.

An entry is the state after one prompt. A new prompt takes the entry that shares the most tokens with it, rewinds it to
those, and reads the rest. Entries serve only requests that would have read them the same way: same bundle, backend,
precision, policy, tolerance and sweeps, all of which name the entry's folder. So a hit keeps the promise of its
policy; a prompt that is wholly there gives the stored numbers to the bit.

Entries appear by renaming a finished file and carry a checksum, so processes need no lock to read or write; an entry
that is damaged is removed and read anew. Only making room takes a lock, so that two processes do not throw out twice
as much. The folder is trusted as far as its checksums go: who can write there can plant a state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrt_deploy.errors import StateError
from lrt_deploy.files import PARTIAL
from lrt_deploy.interface import IntArray, PrefillPolicy
from lrt_deploy.prompts import check_prompts

from .prefill import PrefillRequest
from .prefix import common_prefix
from .state import DecodeState
from .state_file import read_tokens

try:
    import fcntl
except ImportError:  # Windows: room may be made twice, which costs entries and no correctness
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from .decoder import Decoder

SUFFIX, LOCK = ".state", ".lock"
DEFAULT_BYTES = 2**30
FEWEST_TOKENS = 16  # shorter prompts are read faster than found
STALE_SECONDS = 3600  # after which an unfinished file was left by a process that is no more


@dataclass(frozen=True)
class Found:
    """The entry to start from, how many tokens of it are shared, and what was wrong with others."""

    state: DecodeState | None
    shared: int
    troubles: tuple[str, ...]


class PromptCache:
    """States after prompts, in a folder of at most `max_bytes`; the least recently used go first."""

    def __init__(self, folder: str | Path, max_bytes: int = DEFAULT_BYTES) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._known: dict[Path, tuple[int, IntArray]] = {}  # tokens of entries, by path and inode
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(f"the prompt cache {folder} cannot be made: {error.strerror}") from error

    def prefill(
        self, decoder: Decoder, tokens: list[int], policy: PrefillPolicy = "auto", tolerance: float | None = None
    ) -> DecodeState:
        """A state that has read `tokens`, as `Decoder.prefill` would; its report says what was reused."""
        (row,) = check_prompts([tokens], decoder.config.vocab_size)
        request = PrefillRequest.of(policy, tolerance, decoder.config.memory, decoder.precision)
        place = self.folder / _name(_key(decoder, request))
        found = self._find(place, decoder, row)
        reading: dict[str, Any] = {"policy": policy, "tolerance": tolerance}
        if found.state is None:
            state = decoder.prefill([tokens], **reading)
        else:
            state = decoder.prefill([tokens], state=found.state, reuse=True, **reading)
        if len(row) - found.shared >= FEWEST_TOKENS:
            troubles = found.troubles + self._store(place, state, row)
        else:
            troubles = found.troubles
        if troubles:
            notes = [state.prefill.note] if state.prefill.note else []
            state.prefill = replace(state.prefill, note="; ".join([*notes, *troubles]))
        return state

    def _find(self, place: Path, decoder: Decoder, row: IntArray) -> Found:
        """Load the entry that shares the most; one that turns out damaged is removed, and the next is tried."""
        troubles: list[str] = []
        for shared, _, path in sorted(self._shared(place, row, troubles), reverse=True):
            try:
                state = decoder.load_state(path)
                if state.batch != 1 or common_prefix(np.array(state.tokens[0]), row) != shared:
                    raise StateError(f"{path} holds other tokens than it said")
                _touch(path)
            except StateError as error:
                troubles += _remove(path, error)
                continue
            return Found(state, shared, tuple(troubles))
        return Found(None, 0, tuple(troubles))

    def _shared(self, place: Path, row: IntArray, troubles: list[str]) -> Iterator[tuple[int, int, Path]]:
        """Entries that are worth loading: the tokens that they share, and minus those that must be undone."""
        for path in _entries(place):
            try:
                inode = path.stat().st_ino
                if path not in self._known or self._known[path][0] != inode:
                    self._known[path] = (inode, read_tokens(path))
            except OSError:
                continue  # another process has made room
            except StateError as error:
                troubles += _remove(path, error)
                continue
            shared = common_prefix(self._known[path][1], row)
            if shared >= FEWEST_TOKENS:
                yield shared, shared - len(self._known[path][1]), path

    def _store(self, place: Path, state: DecodeState, row: IntArray) -> tuple[str, ...]:
        """Save an entry and make room; a cache that cannot be written is no reason to fail."""
        path = place / f"{_name(row.tobytes())}{SUFFIX}"
        if state.num_bytes > self.max_bytes or path.exists():
            return ()
        try:
            place.mkdir(exist_ok=True)
            state.save(path)
            self._make_room()
        except (StateError, OSError) as error:
            return (f"prompt cache: {error}",)
        return ()

    def _make_room(self) -> None:
        """Remove the least recently used entries, and what crashed processes left, until all fits."""
        files = [file for place in self.folder.iterdir() if place.is_dir() for file in place.iterdir()]
        if sum(_stat(file)[1] for file in files) <= self.max_bytes:
            return
        with self._locked():
            found = sorted((*_stat(file), file) for file in files)
            total = sum(size for _, size, _ in found)
            for used, size, file in found:
                partial = PARTIAL in file.name
                if partial and time.time() - used < STALE_SECONDS:
                    continue
                if total > self.max_bytes or partial:
                    with contextlib.suppress(OSError):
                        file.unlink()
                    total -= size

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / LOCK).open("w") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _key(decoder: Decoder, request: PrefillRequest) -> bytes:
    """Everything besides the tokens that the numbers depend on."""
    identity = dataclasses.asdict(decoder.identity) | dataclasses.asdict(request)
    options = dataclasses.asdict(decoder.prefill_options)
    return json.dumps([decoder.backend, decoder.max_seq_len, identity, options], sort_keys=True).encode()


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:40]


def _entries(place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if path.suffix == SUFFIX and PARTIAL not in path.name)
    except OSError:
        return []


def _stat(path: Path) -> tuple[float, int]:
    """When a file was last used, and its size; nothing for one that is gone."""
    try:
        stat = path.stat()
    except OSError:
        return 0.0, 0
    return stat.st_mtime, stat.st_size


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path)


def _remove(path: Path, error: StateError) -> list[str]:
    """Take a damaged entry away; one that is gone is no damage: another process has made room."""
    if isinstance(error.__cause__, FileNotFoundError):
        return []
    with contextlib.suppress(OSError):
        path.unlink()
    return [f"prompt cache: a damaged entry was removed and its prompt read again ({error})"]
