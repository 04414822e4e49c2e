"""The state of B sequences between two steps: KV cache, latent, lengths, tokens, and the logits of the next token.

What can be done with one: step and prefill (`decoder`), fork, pick rows, move between backends (`state_rows`), rewind
(`rewind`), save and load (`state_file`). Here are the numbers and their bookkeeping.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrt_deploy.errors import StateError
from lrt_deploy.interface import FloatArray, IntArray, PrefillReport

from .backend import Backend, StateBuffers
from .latent_history import LatentHistory
from .origin import Origin

_ID_BYTES = np.dtype(np.int64).itemsize


class DecodeState:
    """Made by `Decoder.prefill` and advanced by `Decoder.step`; one state is used by one thread at a time.

    After an error in a step the state is what it was before: lengths and latent only move when a step has succeeded.
    """

    def __init__(self, origin: Origin, rows: int, slots: int | None = None) -> None:
        slots = rows if slots is None else slots
        self.origin, self._batch = origin, rows
        self.buffers: StateBuffers = origin.backend.allocate(slots)
        self._memory = origin.config.memory
        self._lengths = [0] * slots
        self._logits = np.zeros((slots, origin.config.vocab_size), np.float32)
        self._current = [False] * slots  # whether a row's logits follow from its last token
        self._tokens: list[list[int]] = [[] for _ in range(slots)]
        # Logits after tokens that were not read by a step: nothing else could give them again to the bit.
        self._kept: list[dict[int, FloatArray]] = [{} for _ in range(slots)]
        self.history = LatentHistory(slots, self.capacity, self.buffers.latent.shape[1])
        self.prefill = PrefillReport(policy="stepwise", passes=0.0)
        self.read_within = 0.0  # the largest error of the latent that any prefill was allowed to leave
        self.computed_tokens = 0  # token positions computed for this state, those of its forerunners included
        self.extra: dict[str, Any] = {}  # the caller's own, JSON types; saved and forked with the state

    @property
    def owner(self) -> Backend:
        """What runs this state."""
        return self.origin.backend

    @property
    def batch(self) -> int:
        """How many sequences, B."""
        return self._batch

    @property
    def slots(self) -> int:
        """How many sequences there is room for."""
        return self.buffers.batch

    @property
    def capacity(self) -> int:
        """How many tokens each sequence can hold."""
        return self.buffers.capacity

    @property
    def lengths(self) -> IntArray:
        """(B) tokens so far."""
        return np.array(self._lengths[: self._batch], np.int64)

    @property
    def logits(self) -> FloatArray:
        """(B, V) float32, for each row's next token, a copy. After a rewind they are computed when first asked for."""
        self._have_logits(range(self._batch))
        return self._logits[: self._batch].copy()

    def logits_of(self, rows: Sequence[int]) -> FloatArray:
        """(n, V) the logits of some rows, a copy."""
        self._have_logits(rows)
        return self._logits[list(rows)]

    def row_logits(self, row: int) -> FloatArray:
        """(V) the logits of one row, a view that the next step overwrites."""
        if not self._current[row]:
            self._have_logits([row])
        logits: FloatArray = self._logits[row]
        return logits

    @property
    def latent(self) -> FloatArray | None:
        """(B, C) float32, carried to the next token, a copy; None for a model without memory."""
        return self.buffers.latent[: self._batch].copy() if self._memory else None

    def cache(self, layer: int) -> tuple[FloatArray, FloatArray]:
        """Keys (after RoPE and norm) and values (after gates), (B, G, max length, D) each, as copies.

        A row shorter than the longest one ends in undefined numbers.
        """
        keys, values = self.buffers.cache(layer, max(self._lengths[: self._batch], default=0))
        return keys[: self._batch].copy(), values[: self._batch].copy()

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens of each row so far, copies."""
        return [list(row) for row in self._tokens[: self._batch]]

    def row_tokens(self, row: int) -> list[int]:
        """The tokens of one row, a copy."""
        return list(self._tokens[row])

    def length(self, row: int) -> int:
        """Tokens of one row."""
        return self._lengths[row]

    @property
    def last_tokens(self) -> IntArray:
        """(B) the last token of each row; 0 for a row without tokens."""
        return np.array([row[-1] if row else 0 for row in self._tokens[: self._batch]], np.int64)

    @property
    def num_bytes(self) -> int:
        """Live bytes: cache entries, latents and tokens of the lengths so far, and the logits that are held."""
        tokens = sum(self._lengths[: self._batch])
        kept = sum(len(row) for row in self._kept[: self._batch])
        row_of_logits = self._logits.shape[1] * self._logits.itemsize
        return tokens * self.bytes_per_token + (self._batch + kept) * row_of_logits

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row adds: an entry in every cache, its latent, its id."""
        caches = self.buffers.read_slots(0, 0, 1).values()
        return sum(array.nbytes for array in caches) + self.history.bytes_per_token + _ID_BYTES

    def fork(self) -> DecodeState:
        """An independent copy; only what is live is copied."""
        return self.rows(range(self._batch))

    def rows(self, rows: Sequence[int]) -> DecodeState:
        """A new state of these sequences, in this order, each as often as it is named; this one stays as it is."""
        if not 1 <= len(rows) <= self.origin.max_batch_size:
            limit = self.origin.max_batch_size
            raise StateError(f"{len(rows)} rows were asked for; this bundle was exported for 1 to {limit}")
        return self.copied_to(self.origin, rows)

    def copied_to(self, origin: Origin, rows: Sequence[int]) -> DecodeState:
        """The same for another decoder of the same model and precision."""
        chosen = [self._known(row) for row in rows]
        state = DecodeState(origin, len(chosen))
        for row, source in enumerate(chosen):
            state.put(row, self, source)
        state.prefill, state.computed_tokens = self.prefill, self.computed_tokens
        state.extra = copy.deepcopy(self.extra)
        return state

    def put(self, row: int, source: DecodeState, index: int = 0) -> None:
        """Make a row a copy of a row of another state, to the bit."""
        self.origin.check_same(source.origin)
        length = source._lengths[index]
        if length > self.capacity:
            raise StateError(f"the sequence holds {length} tokens, more than the capacity of {self.capacity} here")
        self.import_row(row, length, source.export_row(index))
        self.read_within = max(self.read_within, source.read_within)

    def export_row(self, row: int) -> dict[str, NDArray[Any]]:
        """Everything that a row is, by name, as views."""
        length = self._lengths[row]
        arrays: dict[str, NDArray[Any]] = {
            "tokens": np.array(self._tokens[row], np.int64),
            "latents": self.history.live(row, length),
        }
        arrays |= self.buffers.read_slots(row, 0, length)
        arrays |= {f"kept.{at}": logits for at, logits in self._kept[row].items()}
        return arrays | ({"logits": self._logits[row]} if self._current[row] else {})

    def import_row(self, row: int, length: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """The reverse; the arrays have been checked."""
        self.buffers.write_slots(row, 0, arrays)
        self.history.write_row(row, 0, arrays["latents"])
        self._lengths[row], self._tokens[row] = length, arrays["tokens"].tolist()
        self._kept[row] = {int(n.removeprefix("kept.")): a for n, a in arrays.items() if n.startswith("kept.")}
        self.buffers.set_latent(np.array([row]), self.history.after(row, length)[None])
        self._current[row] = "logits" in arrays
        if self._current[row]:
            self._logits[row] = arrays["logits"]

    def row_shapes(self, length: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of what `export_row` gives of a row of this length, without logits."""
        empty = self.buffers.read_slots(0, 0, 0).items()
        shapes = {name: ((a.shape[0], length, a.shape[2]), str(a.dtype)) for name, a in empty}
        width = self.history.live(0, 0).shape[1]
        return shapes | {"tokens": ((length,), "int64"), "latents": ((length, width), "float32")}

    def add(self, source: DecodeState | None = None, index: int = 0) -> int:
        """One more row, empty or a copy of a row of another state; returns its number."""
        if self._batch == self.slots:
            raise StateError(f"all {self.slots} slots of this state are taken; drop a row, or start with more slots")
        self._batch += 1
        try:
            if source is not None:
                self.put(self._batch - 1, source, index)
            else:
                self.truncate(self._batch - 1, 0)
        except BaseException:
            self._batch -= 1
            raise
        return self._batch - 1

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its number. It costs nothing from then on."""
        last, row = self._batch - 1, self._known(row)
        if row != last:
            self.put(row, self, last)
        self._batch = last

    def truncate(self, row: int, length: int) -> None:
        """Cut a row to its first tokens, without checks; see `rewind`."""
        if length != self._lengths[row]:
            self._current[row] = False
        self._lengths[row] = length
        del self._tokens[row][length:]
        self._kept[row] = {at: logits for at, logits in self._kept[row].items() if at <= length}
        self.buffers.set_latent(np.array([row]), self.history.after(row, length)[None])
        if length in self._kept[row]:
            self._logits[row], self._current[row] = self._kept[row][length], True

    def rewind(self, lengths: int | Sequence[int]) -> None:
        """Return to the first `lengths` tokens (of every row, or one number each), exactly; the rest is forgotten.

        The cache and the latent are those of that moment. Logits are computed again, by the last token alone, when
        they are asked for; nothing else is. Raises StateError for a length that a row does not have.
        """
        from .rewind import rewind

        rewind(self, lengths)

    def save(self, path: str | Path) -> None:
        """Write the live part to one safetensors file, whole or not at all; `Decoder.load_state` reads it."""
        from .state_file import save_state

        save_state(self, Path(path))

    def append(self, ids: IntArray, logits: FloatArray) -> None:
        """Record that one token per row (B) was read, and led to `logits` (B, V); for the decoder."""
        for row, token in enumerate(ids.tolist()):
            self._tokens[row].append(token)
            self._lengths[row] += 1
        self.computed_tokens += self._batch
        self._hold(logits)

    def extend(self, rows: Sequence[IntArray], logits: FloatArray) -> None:
        """The same for several tokens of each row; how they were computed is for `finish_reading`."""
        for index, row in enumerate(rows):
            self._tokens[index].extend(row.tolist())
            self._lengths[index] += len(row)
        self._hold(logits)

    def finish_reading(self, report: PrefillReport, tokens: int) -> None:
        """Record how prompts of this many tokens were read; after `extend`.

        Logits that a step of the last token would not give again to the bit are kept for a rewind.
        """
        self.prefill = report
        self.computed_tokens += round(report.passes * tokens)
        self.read_within = max(self.read_within, math.inf if report.policy == "zero" else report.residual or 0.0)
        if report.policy != "stepwise" or report.residual is not None:
            for row, length in enumerate(self._lengths[: self._batch]):
                self._kept[row][length] = self._logits[row].copy()

    def clear_slots(self, row: int, start: int, stop: int) -> None:
        """Zero a row's cache entries, which must not count."""
        entries = self.buffers.read_slots(row, start, stop)
        self.buffers.write_slots(row, start, {name: np.zeros_like(array) for name, array in entries.items()})

    def set_logits(self, logits: FloatArray) -> None:
        """Fill in the logits (B, V) of rows that lack them."""
        for row in range(self._batch):
            if not self._current[row] and self._lengths[row] > 0:
                self._logits[row], self._current[row] = logits[row], True

    def _hold(self, logits: FloatArray) -> None:
        self._logits[: self._batch] = logits
        self._current[: self._batch] = [True] * self._batch

    def _have_logits(self, rows: Sequence[int]) -> None:
        """Compute the logits of rows that were rewound."""
        if not all(self._current[row] for row in rows):
            from .rewind import recompute_logits

            recompute_logits(self, list(rows))

    def _known(self, row: int) -> int:
        if isinstance(row, bool) or not isinstance(row, (int, np.integer)) or not 0 <= row < self._batch:
            raise StateError(f"there is no row {row!r}; this state has the rows 0 to {self._batch - 1}")
        return int(row)
