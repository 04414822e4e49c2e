"""Prompts that were read before, on disk: a folder of states, shared by any number of processes.

An entry is the state after one prompt. A new prompt takes the entry that shares the most tokens with it, rewinds it to
those, and reads the rest. Entries serve only requests that would have read them the same way: bundle, backend,
precision, policy, tolerance and sweeps name the entry's folder.

    folder/
      .lrt-deploy-prompt-cache      the marker: this folder is a prompt cache, and entries in it may be removed
      .lock
      <40 hex digits>/<40 hex digits>.state      the key of how prompts were read / the hash of the tokens

Entries appear by renaming a finished file and carry a checksum, so processes read and write without a lock, which only
eviction takes; a damaged entry is removed and its prompt read again. Only regular files with the names above are
counted, read and removed. Prompts are private: folders and files are accessible to their owner alone. Checksums find
damage, not forgery: a process that can write to the folder can plant a state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lrt_deploy.errors import InputError, StateError
from lrt_deploy.fields import check_is, check_path, check_whole
from lrt_deploy.files import NO_FOLLOW, PARTIAL, locked, remove_stale
from lrt_deploy.text.prompts import check_prompts
from lrt_deploy.types import IntArray, PrefillPolicy

from .decoder import Decoder
from .prefill import PrefillRequest, common_prefix
from .state import DecodeState
from .state_file import read_tokens

MARKER, LOCK = ".lrt-deploy-prompt-cache", ".lock"
SUFFIX = ".state"
_MARKER_TEXT = "This folder is a prompt cache of lrt-deploy, which removes entries when it needs room.\n"
_PLACE = re.compile("[0-9a-f]{40}")
_ENTRY = re.compile(rf"[0-9a-f]{{40}}{re.escape(SUFFIX)}")
_PARTIAL = re.compile(rf"\.[0-9a-f]{{40}}{re.escape(SUFFIX + PARTIAL)}[0-9a-f]{{16}}")
_ENTRY_OR_PARTIAL = re.compile(f"{_ENTRY.pattern}|{_PARTIAL.pattern}")
_OWN = re.compile(f"{re.escape(MARKER)}|{re.escape(LOCK)}")
DEFAULT_BYTES = 2**30
FEWEST_TOKENS = 16  # shorter prompts are read faster than found


class PromptCache:
    """States after prompts, in a folder of at most `max_bytes`; the least recently used are evicted first.

    The folder is made if it is missing. Raises InputError for a folder that holds something else, and StateError for
    one that cannot be made.
    """

    def __init__(self, folder: str | Path, max_bytes: int = DEFAULT_BYTES) -> None:
        self.folder = check_path(folder, "folder")
        self.max_bytes = check_whole(max_bytes, "max_bytes", 0, 2**63 - 1)
        self._known: dict[Path, tuple[int, IntArray]] = {}  # inode and tokens of entries
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(f"the prompt cache {folder} cannot be made: {error.strerror}") from error
        with contextlib.suppress(OSError):  # another user's; `prefill` says so, and reads without it
            _claim(self.folder)
            _remove_partials(_places(self.folder))

    def prefill(
        self, decoder: Decoder, tokens: list[int], policy: PrefillPolicy = "auto", tolerance: float | None = None
    ) -> DecodeState:
        """Read `tokens` as `Decoder.prefill` does; the state's report says how many of them were in the cache.

        A cache that cannot be used costs time and is no error: the report's note says what was wrong. Prompts that are
        read with zero memory are neither looked for nor saved.
        """
        (row,) = check_prompts([tokens], check_is(decoder, Decoder, "decoder").config.vocab_size)
        request = PrefillRequest.of(policy, tolerance, decoder.config.memory, decoder.precision)
        found, notes = self.find(decoder, row, request)
        shared = 0 if found is None else common_prefix(np.array(found.tokens[0]), row)
        state = decoder.prefill([tokens], state=found, reuse=found is not None, policy=policy, tolerance=tolerance)
        if len(row) - shared >= FEWEST_TOKENS:
            notes += self.store(decoder, state, request)
        if notes:
            before = [state.prefill.note] if state.prefill.note else []
            state.prefill = replace(state.prefill, note="; ".join([*before, *notes]))
        return state

    def find(
        self, decoder: Decoder, tokens: Sequence[int] | IntArray, request: PrefillRequest, more_than: int = 0
    ) -> tuple[DecodeState | None, list[str]]:
        """Load the state that shares the most tokens with a prompt, if these are more than `more_than`.

        Returns None where there is none, and notes on what was wrong with the folder. Removes entries that are damaged.
        """
        notes = list[str]()
        if not request.reuses:
            return None, notes
        row = np.array(tokens, np.int64)
        for shared, _, path in sorted(self._candidates(self._place(decoder, request), row, notes), reverse=True):
            if shared <= more_than:
                break
            try:
                state = decoder.load_state(path)
                if state.batch != 1 or common_prefix(np.array(state.tokens[0]), row) != shared:
                    raise StateError(f"{path} holds other tokens than it said")
            except StateError as error:
                self._remove_damaged(path, error, notes)
                continue
            with contextlib.suppress(OSError):
                os.utime(path)
            return state, notes
        return None, notes

    def store(self, decoder: Decoder, state: DecodeState, request: PrefillRequest) -> list[str]:
        """Save a state of one sequence that was read as requested; returns notes on why it could not be saved.

        Room is made first, so that processes that are killed right after saving do not let the folder grow.
        """
        place = self._place(decoder, request)
        path = place / f"{_name(np.array(state.tokens[0], np.int64).tobytes())}{SUFFIX}"
        if not request.reuses or state.num_bytes > self.max_bytes or os.path.lexists(path):
            return []
        try:
            _claim(self.folder)
            place.mkdir(mode=0o700, exist_ok=True)
            if not stat.S_ISDIR(place.lstat().st_mode):
                raise StateError(f"{place} is a link; expected a folder of entries")
            self._make_room(state.num_bytes)
            state.save(path)
            self._make_room(0)  # the file is a little larger than the state, and others store too
        except (OSError, StateError, InputError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            return [_trouble(self.folder, cause) if isinstance(cause, OSError) else f"prompt cache: {error}"]
        return []

    def _place(self, decoder: Decoder, request: PrefillRequest) -> Path:
        """Return the folder of entries that were read in the same way: named by all but the tokens that they follow."""
        model = dataclasses.asdict(decoder.fingerprint) | dataclasses.asdict(request)
        options = dataclasses.asdict(decoder.prefill_options)
        del options["sweeps"]["piece_tokens"]  # no number depends on it
        key = json.dumps([decoder.backend, decoder.max_seq_len, model, options], sort_keys=True)
        return self.folder / _name(key.encode())

    def _candidates(self, place: Path, row: IntArray, notes: list[str]) -> Iterator[tuple[int, int, Path]]:
        """Yield the tokens that an entry shares, minus those to be rewound, and its path, if it is worth loading."""
        entries: dict[Path, os.stat_result] = {}
        try:
            if not place.is_symlink():
                entries = _listed(place, _ENTRY)
        except FileNotFoundError:
            pass
        except OSError as error:
            notes.append(_trouble(self.folder, error))
        gone = {path for path in self._known if path.parent == place} - entries.keys()
        self._known = {path: found for path, found in self._known.items() if path not in gone}
        for path, status in sorted(entries.items()):
            try:
                if path not in self._known or self._known[path][0] != status.st_ino:
                    self._known[path] = (status.st_ino, read_tokens(path))
            except StateError as error:
                self._remove_damaged(path, error, notes)
                continue
            tokens = self._known[path][1]
            if (shared := common_prefix(tokens, row)) >= FEWEST_TOKENS:
                yield shared, shared - len(tokens), path

    def _remove_damaged(self, path: Path, error: StateError, notes: list[str]) -> None:
        """Remove a damaged entry; one that is gone (evicted by another process) or cannot be read is not damaged."""
        cause = error.__cause__
        self._known.pop(path, None)
        if isinstance(cause, OSError):
            if not (isinstance(cause, FileNotFoundError) or notes):  # one note is enough: all are another user's
                notes.append(_trouble(path, cause))
            return
        try:
            path.unlink(missing_ok=True)
            notes.append(f"prompt cache: a damaged entry was removed and its prompt read again ({error})")
        except OSError as refused:
            notes.append(f"{_trouble(path, refused)}; it is damaged ({error})")

    def _make_room(self, needed: int) -> None:
        """Remove files of killed processes, then evict the least recently used entries until `needed` bytes fit."""
        places = _places(self.folder)
        _remove_partials(places)
        room = self.max_bytes - needed
        if sum(size for _, size, _ in _all_entries(places)) <= room:
            return
        # Other processes do not evict meanwhile; without locks more entries than needed may go.
        with locked(self.folder / LOCK, os.O_RDWR | os.O_CREAT | NO_FOLLOW):
            found = sorted(_all_entries(places))
            total = sum(size for _, size, _ in found)
            for _, size, path in found:
                if total <= room:
                    return
                path.unlink(missing_ok=True)
                self._known.pop(path, None)
                total -= size


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
    """Return the name of something in a folder that does not belong to a prompt cache; None if there is nothing."""
    places = _places(folder)
    ours = {*places, *_listed(folder, _OWN), *(path for place in places for path in _listed(place, _ENTRY_OR_PARTIAL))}
    found = (path for at in (folder, *places) for path in at.iterdir())
    return min((str(path.relative_to(folder)) for path in found if path not in ours), default=None)


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:40]


def _places(folder: Path) -> list[Path]:
    return list(_listed(folder, _PLACE, stat.S_ISDIR))


def _listed(
    folder: Path, names: re.Pattern[str], kind: Callable[[int], bool] = stat.S_ISREG
) -> dict[Path, os.stat_result]:
    """Return the regular files of a folder, or what else is of this kind, whose names match; links are not followed."""
    found: dict[Path, os.stat_result] = {}
    for entry in os.scandir(folder):
        if names.fullmatch(entry.name):
            with contextlib.suppress(FileNotFoundError):  # another process has made room
                status = entry.stat(follow_symlinks=False)
                if kind(status.st_mode):
                    found[Path(entry.path)] = status
    return found


def _all_entries(places: list[Path]) -> list[tuple[float, int, Path]]:
    """Return when each entry was last used, its bytes, and its path."""
    found = [(path, status) for place in places for path, status in _listed(place, _ENTRY).items()]
    return [(status.st_mtime, status.st_size, path) for path, status in found]


def _remove_partials(places: list[Path]) -> None:
    for place in places:
        for path in _listed(place, _PARTIAL):
            remove_stale(path)


def _trouble(path: Path, error: OSError) -> str:
    """Return why the cache could not be used. Permission errors name the owner: two users may have shared a folder."""
    if not isinstance(error, PermissionError):
        return f"prompt cache: {error.strerror or error} ({error.filename or path}); it saved no time here"
    owner = ""
    with contextlib.suppress(OSError, AttributeError):
        if (found := path.stat().st_uid) != os.geteuid():
            owner = f", it belongs to user {found}, and a prompt cache is for one user"
    return f"prompt cache: no permission for {error.filename or path}{owner}; it saved no time here"
