"""States of earlier requests, so that a prompt that continues one reads only what is new.

`PrefixStates` holds them in memory, bounded in bytes, the least recently used leave first; a prompt gets the state that
shares the most tokens with it. `StateFolder` writes them to a prompt cache in a thread of its own, from which another
process, or the same one after a crash, takes them. Both only save time: what is lost is read again. A kept state is
never changed, so both threads may read it.
"""

from __future__ import annotations

import itertools
import math
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrt_deploy.runtime.decoder import Decoder
from lrt_deploy.runtime.prefill import PrefillRequest, common_prefix
from lrt_deploy.runtime.prompt_cache import FEWEST_TOKENS, PromptCache
from lrt_deploy.runtime.state import DecodeState
from lrt_deploy.types import IntArray

DEFAULT_BYTES = 2**30
_MOST_STORES = 16  # that wait to be written; more are dropped

Found = tuple[DecodeState | None, int]  # a state, and how many tokens of the prompt it holds


@dataclass(frozen=True, eq=False)
class _Entry:
    """A state and its tokens."""

    state: DecodeState
    tokens: IntArray
    num_bytes: int


class PrefixStates:
    """States in memory, at most `max_bytes`. One thread uses it."""

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._entries: OrderedDict[_Entry, None] = OrderedDict()  # the least recently used first
        self._beginning: dict[bytes, list[_Entry]] = {}  # by the first FEWEST_TOKENS tokens

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tokens: Sequence[int], request: PrefillRequest) -> Found:
        """Return the state that shares the most tokens with a prompt and was read as exactly as is requested."""
        row = np.array(tokens, np.int64)
        best, most = None, FEWEST_TOKENS - 1
        for entry in self._beginning.get(_key(row), ()):
            if request.accepts(entry.state.read_within) and (shared := common_prefix(entry.tokens, row)) > most:
                best, most = entry, shared
        if best is None:
            return None, 0
        self._entries.move_to_end(best)
        return best.state, most

    def keep(self, state: DecodeState) -> bool:
        """Keep a state of one sequence; return False if it is too short, too large, read by zero, or there already.

        A state that the new one continues is dropped, because the new one can be rewound to it.
        """
        row = np.array(state.tokens[0], np.int64)
        entry = _Entry(state, row, state.num_bytes)
        if len(row) < FEWEST_TOKENS or entry.num_bytes > self.max_bytes or math.isinf(state.read_within):
            return False
        for other in [*self._beginning.get(_key(row), ())]:
            shared = common_prefix(other.tokens, row)
            if shared == len(row) and other.state.read_within <= state.read_within:
                self._entries.move_to_end(other)
                return False
            if shared == len(other.tokens) and state.read_within <= other.state.read_within:
                self._drop(other)
        self._entries[entry] = None
        self._beginning.setdefault(_key(row), []).append(entry)
        self.num_bytes += entry.num_bytes
        while self.num_bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))
        return True

    def clear(self) -> None:
        """Drop all states."""
        self._entries.clear()
        self._beginning.clear()
        self.num_bytes = 0

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry]
        self.num_bytes -= entry.num_bytes
        key = _key(entry.tokens)
        self._beginning[key].remove(entry)
        if not self._beginning[key]:
            del self._beginning[key]


class StateFolder:
    """A prompt cache that other processes share, used in a thread: loads come before stores."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._cache, self._warn = PromptCache(folder), warn
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._stores = 0  # that wait
        self.dropped = self.problems = 0
        self._thread = threading.Thread(target=self._run, name="states", daemon=True)
        self._thread.start()

    def load(
        self,
        decoder: Decoder,
        wanted: Mapping[int, tuple[Sequence[int], int]],
        request: PrefillRequest,
        done: Callable[[dict[int, DecodeState]], None],
    ) -> None:
        """Look for states of prompts, each better than the number of tokens beside it; `done` gets those found."""

        def job() -> None:
            found = {}
            try:
                for at, (tokens, held) in wanted.items():
                    state, notes = self._cache.find(decoder, tokens, request, more_than=held)
                    self._note(notes)
                    if state is not None:
                        found[at] = state
            finally:
                done(found)

        self._jobs.put((0, next(self._numbers), job))

    def store(self, decoder: Decoder, state: DecodeState, request: PrefillRequest) -> None:
        """Write a state, later; dropped where the disk cannot keep up."""
        if self._stores >= _MOST_STORES:
            self.dropped += 1
            return

        def job() -> None:
            self._stores -= 1
            self._note(self._cache.store(decoder, state, request))

        self._stores += 1
        self._jobs.put((1, next(self._numbers), job))

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._jobs.put((2, next(self._numbers), None))
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()[2]) is not None:
            try:
                job()
            except Exception as error:  # memory, or a fault of ours: states only save time
                self._note([f"{type(error).__name__}: {error}"])

    def _note(self, notes: Sequence[str]) -> None:
        """Count what was wrong with the folder, and say it the first time."""
        for note in notes:
            if not self.problems:
                self._warn(f"state folder: {note}; it costs time only")
            self.problems += 1


def _key(tokens: IntArray) -> bytes:
    return tokens[:FEWEST_TOKENS].tobytes()
