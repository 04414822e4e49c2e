"""Prompts that were read before, on disk: a folder of states, shared by any number of processes.

An entry is the state after one prompt. A new prompt takes the entry that shares the most tokens with it, rewinds it to
those, and reads the rest. Entries serve only requests that would have read them the same way: same bundle, backend,
precision, policy, tolerance and sweeps, all of which name the entry's folder. So a hit keeps the promise of its
policy; a prompt that is wholly there gives the stored numbers to the bit.

    folder/
      .lrt-deploy-prompt-cache      the marker: this folder is a prompt cache, and entries in it may be removed
      .lock
      <40 hex digits>/<40 hex digits>.state      the key of how prompts were read / the hash of the tokens

Entries appear by renaming a finished file and carry a checksum, so processes need no lock to read or write; an entry
that is damaged is removed and read anew. Only making room takes a lock, so that two processes do not evict twice as
much. Only regular files with the names above are counted, read and removed, and links are not followed. Prompts are
private: the folders and files that are made here are their owner's alone. The folder is trusted as far as its checksums
go: whoever can write there can plant a state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrt_deploy.arguments import check_is, check_path, check_whole
from lrt_deploy.errors import InputError, StateError
from lrt_deploy.files import PARTIAL, remove_stale
from lrt_deploy.text.prompts import check_prompts
from lrt_deploy.types import IntArray, PrefillPolicy

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

MARKER, LOCK = ".lrt-deploy-prompt-cache", ".lock"
SUFFIX = ".state"
_MARKER_TEXT = "This folder is a prompt cache of lrt-deploy, which removes entries when it needs room.\n"
_PLACE = re.compile("[0-9a-f]{40}")
_ENTRY = re.compile(rf"[0-9a-f]{{40}}{re.escape(SUFFIX)}")
_PARTIAL = re.compile(rf"\.[0-9a-f]{{40}}{re.escape(SUFFIX + PARTIAL)}[0-9a-f]{{16}}")
DEFAULT_BYTES = 2**30
FEWEST_TOKENS = 16  # shorter prompts are read faster than found


@dataclass(frozen=True)
class Found:
    """The entry to start from, how many tokens of it are shared, and what was wrong with others."""

    state: DecodeState | None
    shared: int
    troubles: tuple[str, ...]


class PromptCache:
    """States after prompts, in a folder of at most `max_bytes`; the least recently used go first.

    The folder is made if it is missing. Raises InputError for a folder that holds something else, and StateError for
    one that cannot be made.
    """

    def __init__(self, folder: str | Path, max_bytes: int = DEFAULT_BYTES) -> None:
        self.folder = check_path(folder, "folder")
        self.max_bytes = check_whole(max_bytes, "max_bytes", 0, 2**63 - 1)
        self._known: dict[Path, tuple[int, IntArray]] = {}  # tokens of entries, by path and inode
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(f"the prompt cache {folder} cannot be made: {error.strerror}") from error
        with contextlib.suppress(OSError):  # another user's; `prefill` says so, and reads without it
            _claim(self.folder)
            for place in _places(self.folder):
                _sweep(place)

    def prefill(
        self, decoder: Decoder, tokens: list[int], policy: PrefillPolicy = "auto", tolerance: float | None = None
    ) -> DecodeState:
        """A state that has read `tokens`, as `Decoder.prefill` would; its report says what was reused."""
        from .decoder import Decoder

        (row,) = check_prompts([tokens], check_is(decoder, Decoder, "decoder").config.vocab_size)
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
                troubles += self._remove_damaged(path, error)
                continue
            return Found(state, shared, tuple(troubles))
        return Found(None, 0, tuple(troubles))

    def _shared(self, place: Path, row: IntArray, troubles: list[str]) -> Iterator[tuple[int, int, Path]]:
        """Entries that are worth loading: the tokens that they share, and minus those that must be undone."""
        try:
            entries = _files(place, _ENTRY)
        except FileNotFoundError:
            entries = {}
        except OSError as error:
            troubles.append(_trouble(self.folder, error))
            entries = {}
        for path in [path for path in self._known if path.parent == place and path not in entries]:
            del self._known[path]  # evicted, maybe by another process
        for path, status in sorted(entries.items()):
            if not os.access(path, os.R_OK):
                if not os.access(path, os.F_OK):  # another process has made room
                    continue
                if not troubles:  # one is enough: all are another user's
                    troubles.append(_trouble(path, PermissionError(errno.EACCES, "Permission denied", str(path))))
                continue
            try:
                if path not in self._known or self._known[path][0] != status.st_ino:
                    self._known[path] = (status.st_ino, read_tokens(path))
            except StateError as error:
                troubles += self._remove_damaged(path, error)
                continue
            shared = common_prefix(self._known[path][1], row)
            if shared >= FEWEST_TOKENS:
                yield shared, shared - len(self._known[path][1]), path

    def _remove_damaged(self, path: Path, error: StateError) -> list[str]:
        """Remove a damaged entry; no damage is one that is gone (another process made room) or cannot be read."""
        cause = error.__cause__
        self._known.pop(path, None)
        if isinstance(cause, FileNotFoundError):
            return []
        if isinstance(cause, OSError):
            return [_trouble(path, cause)]
        try:
            path.unlink(missing_ok=True)
        except OSError as refused:
            return [f"{_trouble(path, refused)}; it is damaged ({error})"]
        return [f"prompt cache: a damaged entry was removed and its prompt read again ({error})"]

    def _store(self, place: Path, state: DecodeState, row: IntArray) -> tuple[str, ...]:
        """Make room and save an entry; a cache that cannot be written is no reason to fail.

        Room is made first, so that processes that are killed right after saving do not let the folder grow.
        """
        path = place / f"{_name(row.tobytes())}{SUFFIX}"
        if state.num_bytes > self.max_bytes or os.path.lexists(path):
            return ()
        try:
            _claim(self.folder)
            place.mkdir(mode=0o700, exist_ok=True)
            if not stat.S_ISDIR(place.lstat().st_mode):
                raise StateError(f"{place} is a link; expected a folder of entries")
            self._make_room(state.num_bytes)
            state.save(path)
            self._make_room(0)  # the file is a little larger than the state, and others store too
        except OSError as error:
            return (_trouble(self.folder, error),)
        except (StateError, InputError) as error:
            cause = error.__cause__
            return (_trouble(self.folder, cause) if isinstance(cause, OSError) else f"prompt cache: {error}",)
        return ()

    def _make_room(self, needed: int) -> None:
        """Remove what killed processes left, then the least recently used entries until `needed` bytes are free."""
        places = _places(self.folder)
        for place in places:
            _sweep(place)
        room = self.max_bytes - needed
        if sum(size for _, size, _ in _all_entries(places)) <= room:
            return
        with self._locked():
            found = sorted(_all_entries(places))
            total = sum(size for _, size, _ in found)
            for _, size, path in found:
                if total <= room:
                    return
                path.unlink(missing_ok=True)
                self._known.pop(path, None)
                total -= size

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from making room; where the lock cannot be had, some entries may go in vain."""
        flags = os.O_RDWR | os.O_CREAT
        for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):
            flags |= getattr(os, name, 0)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a link, or another user's
                number = os.open(self.folder / LOCK, flags, 0o600)
                stack.callback(os.close, number)
                if fcntl is not None:
                    fcntl.flock(number, fcntl.LOCK_EX)
            yield


def _claim(folder: Path) -> None:
    """Mark a folder as a prompt cache; raises InputError for one that holds anything else.

    A folder without the marker is taken if it is empty, or holds nothing but entries: those of version 0.1 have none.
    """
    marker = folder / MARKER
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISREG(marker.lstat().st_mode):
            return
    if foreign := _foreign(folder):
        raise InputError(
            f"{folder} is not a prompt cache: it holds {foreign}. Expected a new or an empty folder, or one made by "
            "lrt-deploy as a prompt cache, since entries in it are removed to make room; name another folder"
        )
    with contextlib.suppress(FileExistsError):  # another process was faster
        number = os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(_MARKER_TEXT)
    for place in _places(folder):
        place.chmod(0o700)  # version 0.1 left it to the umask


def _foreign(folder: Path) -> str | None:
    """Return the name of something in a folder that is not of a prompt cache, if there is anything."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name in (MARKER, LOCK) and entry.is_file(follow_symlinks=False):
            continue
        if not (_PLACE.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)):
            return entry.name
        for inner in os.scandir(entry.path):
            ours = _ENTRY.fullmatch(inner.name) or _PARTIAL.fullmatch(inner.name)
            if not (ours and inner.is_file(follow_symlinks=False)):
                return f"{entry.name}/{inner.name}"
    return None


def _key(decoder: Decoder, request: PrefillRequest) -> bytes:
    """Everything besides the tokens that the numbers depend on."""
    identity = dataclasses.asdict(decoder.identity) | dataclasses.asdict(request)
    options = dataclasses.asdict(decoder.prefill_options)
    return json.dumps([decoder.backend, decoder.max_seq_len, identity, options], sort_keys=True).encode()


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:40]


def _places(folder: Path) -> list[Path]:
    """Return the folders of entries; links to folders are none."""
    return [
        Path(entry.path)
        for entry in os.scandir(folder)
        if _PLACE.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
    ]


def _files(place: Path, names: re.Pattern[str]) -> dict[Path, os.stat_result]:
    """Return the regular files of a folder whose names match; links are none."""
    found: dict[Path, os.stat_result] = {}
    if stat.S_ISLNK(place.lstat().st_mode):
        return found
    for entry in os.scandir(place):
        if names.fullmatch(entry.name):
            with contextlib.suppress(FileNotFoundError):  # another process has made room
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    found[Path(entry.path)] = status
    return found


def _all_entries(places: list[Path]) -> list[tuple[float, int, Path]]:
    """Return when each entry was last used, its bytes, and its path."""
    found: list[tuple[float, int, Path]] = []
    for place in places:
        found += [(status.st_mtime, status.st_size, path) for path, status in _files(place, _ENTRY).items()]
    return found


def _sweep(place: Path) -> None:
    """Remove the temporary files of killed processes."""
    for path in _files(place, _PARTIAL):
        remove_stale(path)


def _trouble(path: Path, error: OSError) -> str:
    """Say why the cache could not be used; permissions are what a cache of two users fails by."""
    if not isinstance(error, PermissionError):
        return f"prompt cache: {error.strerror or error} ({error.filename or path}); it saved no time here"
    owner = ""
    with contextlib.suppress(OSError, AttributeError):
        if (found := path.stat().st_uid) != os.geteuid():
            owner = f", it belongs to user {found}, and a prompt cache is for one user"
    return f"prompt cache: no permission for {error.filename or path}{owner}; it saved no time here"


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path)
