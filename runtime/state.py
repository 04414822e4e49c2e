"""The state of B sequences between two steps: KV cache, latent, lengths, tokens, and the logits of the next token.

What can be done with one: step and prefill (`decoder`), fork, pick rows, move between backends, rewind, save and load
(`state_file`).

Every operation is a transaction. What a state is hangs off one attribute, `_now`, which an operation replaces in one
assignment when everything else is done. Until then it writes only what does not count yet: cache slots, latents and
tokens beyond the lengths of the rows, and the one of two arrays of logits that is not in use. What it must overwrite it
notes in an `Undo` first. An operation that did not end, because of an error or an interrupt between any two lines, is
undone when the state is next used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lrt_deploy.arguments import check_is, check_list, check_path, check_wholes
from lrt_deploy.errors import StateError
from lrt_deploy.fields import shown
from lrt_deploy.runtime.backends.base import Backend, SlotArrays, StateBuffers, check_finite
from lrt_deploy.types import FloatArray, IntArray, PrefillReport

from .identity import Origin
from .latent_history import LatentHistory

_ID_BYTES = np.dtype(np.int64).itemsize
_Result = TypeVar("_Result")


class Row(NamedTuple):
    """One sequence. Of `tokens` the first `length` count: a step appends, and what it appended may be left over."""

    tokens: list[int]
    length: int
    current: bool  # whether its logits follow from its last token; after a rewind they wait to be computed
    kept: Mapping[
        int, FloatArray
    ]  # logits after tokens that no step has read: nothing else gives them again to the bit
    tag: object  # whatever a caller attaches to the row; it moves with the row


class Content(NamedTuple):
    """What a state is: together with what its buffers and its history hold for these lengths, all that there is."""

    rows: tuple[Row, ...]
    logits: FloatArray  # (slots, V)
    prefill: PrefillReport  # how the last prompt was read
    read_within: float  # the largest error of the latent that any prefill was allowed to leave
    computed_tokens: int  # token positions computed, those of the states that this one was copied from included
    unfed: tuple[int, ...]  # one token more for each row, to be fed before anything that follows from it is given
    due: tuple[int, Mapping[str, NDArray[Any]]] | None  # a row, and what must be written to it before the next use


class Undo(NamedTuple):
    """What takes back an operation for as long as it has not replaced `before`."""

    before: Content
    beyond: int  # slots beyond the length of each row that may have been written
    saved: tuple[tuple[int, int, SlotArrays, FloatArray], ...]  # row, first slot, its cache entries, its latents


_new = tuple.__new__  # of a named tuple, without the call that sorts arguments: a step makes several
_NOTHING_KEPT: Mapping[int, FloatArray] = MappingProxyType({})


class DecodeState:
    """Made by `Decoder.prefill` and advanced by `Decoder.step`; one state is used by one thread at a time.

    After any exception in an operation, an interrupt included, the state is what it was before.
    """

    def __init__(self, origin: Origin, rows: int, slots: int | None = None) -> None:
        slots = rows if slots is None else slots
        self.origin = origin
        self.buffers: StateBuffers = origin.backend.allocate(slots)
        self._memory = origin.config.memory
        self.history = LatentHistory(slots, self.buffers.capacity, self.buffers.latent.shape[1])
        self._logits = [np.zeros((slots, origin.config.vocab_size), np.float32) for _ in range(2)]
        empty = tuple(_row([]) for _ in range(rows))
        self._now = Content(empty, self._logits[0], PrefillReport("stepwise", passes=0.0), 0.0, 0, (), None)
        self._undo: Undo | None = None
        self.extra: dict[str, Any] = {}  # the caller's own, JSON types; saved and forked with the state

    @property
    def owner(self) -> Backend:
        """What runs this state."""
        return self.origin.backend

    @property
    def batch(self) -> int:
        """How many sequences, B."""
        return len(self._now.rows)

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
        return np.array(self.row_lengths, np.int64)

    @property
    def has_room(self) -> bool:
        """Whether there are rows, and one more token fits each."""
        now = self._now
        return bool(now.rows) and max([row[1] for row in now.rows]) + bool(now.unfed) < self.buffers.capacity

    @property
    def row_lengths(self) -> list[int]:
        """The tokens of each row."""
        unfed = bool(self._now.unfed)
        return [row.length + unfed for row in self._now.rows]

    def length(self, row: int) -> int:
        """Tokens of one row."""
        return self._now.rows[row].length + bool(self._now.unfed)

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens of each row so far, copies."""
        return [self.row_tokens(row) for row in range(self.batch)]

    def row_tokens(self, row: int) -> list[int]:
        """The tokens of one row, a copy."""
        found = self._now.rows[row]
        return [*found.tokens[: found.length], *self._now.unfed[row : row + 1]]

    @property
    def tags(self) -> list[object]:
        """What is attached to each row; see `add`."""
        return [row.tag for row in self._now.rows]

    @property
    def logits(self) -> FloatArray:
        """(B, V) float32, for each row's next token, a copy. After a rewind they are computed when first asked for."""
        return self._with_logits(range(self.batch)).logits[: self.batch].copy()

    def logits_of(self, rows: Sequence[int]) -> FloatArray:
        """(n, V) the logits of some rows in ascending order, to be read before the next step: of all rows a view."""
        logits = self._with_logits(rows).logits
        return logits[: self.batch] if len(rows) == self.batch else logits[list(rows)]

    def row_logits(self, row: int) -> FloatArray:
        """(V) the logits of one row, a view that later steps overwrite."""
        logits: FloatArray = self._with_logits([row]).logits[row]
        return logits

    @property
    def latent(self) -> FloatArray | None:
        """(B, C) float32, carried to the next token, a copy; None for a model without memory."""
        self.computed()
        return self.buffers.latent[: self.batch].copy() if self._memory else None

    def cache(self, layer: int) -> tuple[FloatArray, FloatArray]:
        """Keys (after RoPE and norm) and values (after gates), (B, G, max length, D) each, as copies.

        A row shorter than the longest one ends in undefined numbers.
        """
        rows = self.computed().rows
        keys, values = self.buffers.cache(layer, max((row.length for row in rows), default=0))
        return keys[: len(rows)].copy(), values[: len(rows)].copy()

    @property
    def prefill(self) -> PrefillReport:
        """How the last prompt was read: policy, passes, residual."""
        return self._now.prefill

    @prefill.setter
    def prefill(self, report: PrefillReport) -> None:
        self._now = self.ready()._replace(prefill=report)

    @property
    def read_within(self) -> float:
        """The largest error of the latent that any prefill was allowed to leave."""
        return self._now.read_within

    @property
    def computed_tokens(self) -> int:
        """Token positions computed for this state, those of the states that it was copied from included."""
        return self._now.computed_tokens

    @property
    def num_bytes(self) -> int:
        """Live bytes: cache entries, latents and tokens of the lengths so far, and the logits that are held."""
        rows = self._now.rows
        kept = sum(len(row.kept) for row in rows)
        row_of_logits: int = self._now.logits[0:1].nbytes
        tokens = sum(self.length(row) for row in range(len(rows)))
        return tokens * self.bytes_per_token + (len(rows) + kept) * row_of_logits

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row adds: an entry in every cache, its latent, its id."""
        caches = self.buffers.read_slots(0, 0, 1).values()
        return sum(array.nbytes for array in caches) + self.history.bytes_per_token + _ID_BYTES

    # Transactions

    def ready(self) -> Content:
        """What this state is, once an operation that did not end is undone and a row that is due is written."""
        if self._undo is not None and self._undo.before is self._now:
            self._take_back(self._undo)
        if self._now.due is not None:
            row, arrays = self._now.due
            self._write(row, arrays)
            self._now = self._now._replace(due=None)
        return self._now

    def computed(self) -> Content:
        """The same, once tokens that were appended by `defer` are fed."""
        now = self.ready()
        if now.unfed:
            self._feed(now, np.array(now.unfed))
        return self._now

    def open(self, past: Sequence[int], counts: Sequence[int]) -> Content:
        """Begin to read prompts of `counts` (B) tokens after the first `past` (B) tokens of each row.

        Returns the content that the state keeps until `close` replaces it. What the reading may overwrite is saved, and
        the latents are those after `past`.
        """
        now = self.ready()
        if any(length > row.length for length, row in zip(past, now.rows, strict=True)):
            now = self.computed()
        saved = []
        for index, (row, start, count) in enumerate(zip(now.rows, past, counts, strict=True)):
            stop = min(row.length, start + count)
            if start < stop:
                saved.append(self._saved(index, start, stop))
        self._undo = Undo(now, max(counts, default=0), tuple(saved))
        if any(length != row.length for length, row in zip(past, now.rows, strict=True)):
            self._set_latents(past)
        return now

    def close(
        self,
        past: Sequence[int],
        rows: Sequence[IntArray],
        logits: FloatArray | None,
        report: PrefillReport,
        shown: PrefillReport,
    ) -> None:
        """Commit what was read: the tokens of each row, the logits (B, V) after them, None if no token was read.

        `report` is about these tokens, and `shown` is what the state reports. Logits that a step of the last token
        would not give again to the bit are kept for a rewind.
        """
        now, held = self._now, self._spare(logits)
        iterated = logits is not None and (report.policy != "stepwise" or report.residual is not None)
        found = []
        for index, (row, start, ids) in enumerate(zip(now.rows, past, rows, strict=True)):
            length = start + len(ids)
            kept = _kept_until(row.kept, start)
            if iterated:
                kept = {**kept, length: held[index].copy()}
            tokens = row.tokens if not len(ids) else row.tokens[:start] + ids.tolist()
            current = logits is not None or (row.current and length == row.length)
            found.append(Row(tokens, length, current, kept, row.tag))
        within, computed = now.read_within if any(past) else 0.0, now.computed_tokens
        if logits is not None:
            within = max(within, math.inf if report.policy == "zero" else report.residual or 0.0)
            computed += round(report.passes * sum(map(len, rows)))
        self._now = Content(tuple(found), held, shown, within, computed, (), None)

    def restore(self, before: Content) -> None:
        """Return to what `open` gave, whether the operation has committed or not; nothing else came in between."""
        self._now = before

    @property
    def undo(self) -> Undo | None:
        """What takes back the last operation, see `take_back`."""
        return self._undo

    def take_back(self, undo: Undo | None) -> None:
        """Take back an operation that has ended, and since which only logits were computed."""
        if undo is not None:
            self._undo = undo
            self._now = undo.before

    def _take_back(self, undo: Undo) -> None:
        """Undo an operation: may be interrupted and done again.

        Slots beyond each row's length are zeroed. They do not count, but what is not finite would: a row beside a
        longer one gives them the weight 0, and 0 times NaN is NaN.
        """
        self.buffers.reset_order()
        for index, row in enumerate(undo.before.rows):
            entries = self.buffers.read_slots(index, row.length, min(row.length + undo.beyond, self.capacity))
            self.buffers.write_slots(index, row.length, {name: np.zeros_like(a) for name, a in entries.items()})
        for index, start, entries, latents in undo.saved:
            self.buffers.write_slots(index, start, entries)
            self.history.write_row(index, start, latents)
        self._set_latents([row.length for row in undo.before.rows])
        self._undo = None

    def _saved(self, row: int, start: int, stop: int) -> tuple[int, int, SlotArrays, FloatArray]:
        """Copies of what a row holds in some slots."""
        entries = {name: array.copy() for name, array in self.buffers.read_slots(row, start, stop).items()}
        return row, start, entries, self.history.live(row, stop)[start:].copy()

    def _set_latents(self, lengths: Sequence[int]) -> None:
        """Make the latents those after the first `lengths` (n) tokens of the first rows."""
        if len(lengths):
            latents = np.stack([self.history.after(row, length) for row, length in enumerate(lengths)])  # (n, C)
            self.buffers.set_latent(np.arange(len(lengths)), latents)

    def _spare(self, logits: FloatArray | None) -> FloatArray:
        """The array of logits that is not in use, holding `logits` (B, V) or what the other one holds."""
        spare = self._logits[self._now.logits is self._logits[0]]
        spare[: self.batch] = self._now.logits[: self.batch] if logits is None else logits
        return spare

    # One token more

    def advance(self, ids: IntArray, give: bool = False) -> FloatArray:
        """Run one token of each row (B); ids and room have been checked.

        Returns the logits (B, V), a copy if `give`, otherwise an array that later steps overwrite.
        """
        now = self._now
        if now.unfed or now.due is not None or (self._undo is not None and self._undo[0] is now):
            now = self.computed()
        return self._feed(now, ids, give)

    def defer(self, ids: Sequence[int], result: _Result) -> _Result:
        """Append one token to each row (B), which is fed when something that follows from it is asked for.

        Returns `result`: a caller that hands something out with the token does both in one step.
        """
        before = self.computed()
        try:
            rows, logits, prefill, within, computed, _, _ = before
            self._now = Content(rows, logits, prefill, within, computed, tuple(ids), None)
            return result
        except BaseException:
            self._now = before
            raise

    def _feed(self, before: Content, ids: IntArray, give: bool = False) -> FloatArray:
        self._undo = _new(Undo, (before, 1, ()))
        try:
            old, logits, prefill, within, computed, _, _ = before
            positions = np.array([row[1] for row in old], np.int64)  # (B)
            found = self.buffers.decode(ids, positions, head=True)
            assert found is not None
            self.history.write_step(positions, self.buffers.latent)
            check_finite(found, positions, self.origin.backend)
            held = self._logits[logits is self._logits[0]]
            held[: len(old)] = found
            rows = []
            for (tokens, length, _, kept, tag), token in zip(old, ids.tolist(), strict=True):
                # Shared with the row before, unless it already goes on otherwise.
                longer = tokens if len(tokens) == length else tokens[:length]
                longer.append(token)
                rows.append(_new(Row, (longer, length + 1, True, kept, tag)))
            self._now = _new(Content, (tuple(rows), held, prefill, within, computed + len(old), (), None))
            return held[: len(old)].copy() if give else held
        except BaseException:
            self._now = before
            raise

    def _with_logits(self, wanted: Sequence[int]) -> Content:
        now = self.computed()
        lacking = [row for row in wanted if not now.rows[row].current]
        if not lacking:
            return now
        if empty := [row for row in lacking if now.rows[row].length == 0]:
            raise StateError(f"sequence {empty[0]} holds no token yet, so no logits follow; read a prompt first")
        return self._recompute(now)

    def _recompute(self, now: Content) -> Content:
        """Give every row that was rewound its logits again: kept ones, or those of a step of its last token.

        The step starts from the latent before that token, and caches and latent are put back.
        """
        held, computed = self._spare(None), now.computed_tokens
        lacking = [index for index, row in enumerate(now.rows) if not row.current and row.length]
        rounded = [index for index in lacking if now.rows[index].length not in now.rows[index].kept]
        if rounded:
            last = [max(row.length - 1, 0) for row in now.rows]
            ids = np.array([row.tokens[at] if row.length else 0 for row, at in zip(now.rows, last, strict=True)])
            undo = Undo(now, 0, tuple([self._saved(row, at, at + 1) for row, at in enumerate(last)]))
            self._undo = undo
            self._set_latents(last)
            logits = self.buffers.decode(ids, np.array(last), head=True)
            assert logits is not None
            check_finite(logits, np.array(last), self.owner)
            held[rounded] = logits[rounded]
            self._take_back(undo)
            computed += len(now.rows)
        for index in set(lacking) - set(rounded):
            held[index] = now.rows[index].kept[now.rows[index].length]
        rows = tuple([row._replace(current=row.current or row.length > 0) for row in now.rows])
        self._now = now._replace(rows=rows, logits=held, computed_tokens=computed)
        return self._now

    # Earlier tokens

    def rewind(self, lengths: int | Sequence[int]) -> None:
        """Return to the first `lengths` tokens (of every row, or one number each), exactly; the rest is forgotten.

        The cache is cut and the latent of that token comes back from the history: nothing is computed, and what follows
        is bit-equal to what would have followed then. Logits are not kept for every token (a vocabulary's worth each,
        often more than the cache entry). They follow from the last token, so one step of it gives them again when they
        are asked for. Where the last token was read by sweeps, its logits were kept, because a step would round
        differently. Raises StateError for a length that a row does not have.
        """
        one = isinstance(lengths, (int, np.integer))
        wanted: list[Any] = [lengths] * self.batch if one else check_list(lengths, "lengths")
        if len(wanted) != self.batch:
            raise StateError(f"{len(wanted)} lengths were given for a state of {self.batch} sequence(s); one each")
        for row, length in enumerate(wanted):
            whole = isinstance(length, (int, np.integer)) and not isinstance(length, bool)
            if not whole or not 0 <= length <= self.length(row):
                held = self.length(row)
                raise StateError(f"sequence {row} holds {held} tokens and cannot be rewound to {shown(length)}")
        if all(length == self.length(row) for row, length in enumerate(wanted)):
            return
        before = self.open(wanted, [0] * self.batch)
        try:
            rows = [
                row if length == row.length
                else Row(row.tokens, int(length), False, _kept_until(row.kept, length), row.tag)
                for row, length in zip(before.rows, wanted, strict=True)
            ]  # fmt: skip
            within = before.read_within if any(wanted) else 0.0
            self._now = before._replace(rows=tuple(rows), read_within=within, unfed=())
        except BaseException:
            self._now = before
            raise

    # Copies

    def fork(self) -> DecodeState:
        """An independent copy; only what is live is copied."""
        return self.rows(range(self.batch))

    def rows(self, rows: Sequence[int]) -> DecodeState:
        """A new state of these sequences, in this order, each as often as it is named; this one stays as it is."""
        rows = check_wholes(rows, "rows")
        if not 1 <= len(rows) <= self.origin.max_batch_size:
            limit = self.origin.max_batch_size
            raise StateError(f"{len(rows)} rows were asked for; this bundle was exported for 1 to {limit}")
        return self.copied_to(self.origin, rows)

    def copied_to(self, origin: Origin, rows: Sequence[int]) -> DecodeState:
        """The same for another decoder of the same model and precision."""
        chosen = [self._known(row) for row in rows]
        origin.check_same(self.origin)
        state, now = DecodeState(origin, len(chosen)), self.computed()
        state.fill([self.export_row(row) for row in chosen], now)
        state.extra = copy.deepcopy(self.extra)
        return state

    def fill(self, rows: Sequence[Mapping[str, NDArray[Any]]], like: Content | None = None, **numbers: Any) -> None:  # noqa: ANN401 - fields of Content
        """Give a new state its rows, each as `export_row` gives it, and the numbers beside them."""
        now = self._now if like is None else like._replace(logits=self._now.logits, due=None)
        found = [self._imported(index, arrays) for index, arrays in enumerate(rows)]
        self._now = now._replace(rows=tuple(found), **numbers)

    def export_row(self, row: int) -> dict[str, NDArray[Any]]:
        """Everything that a row is, by name, as views."""
        now = self.computed()
        found = now.rows[row]
        arrays: dict[str, NDArray[Any]] = {
            "tokens": np.array(found.tokens[: found.length], np.int64),
            "latents": self.history.live(row, found.length),
        }
        arrays |= self.buffers.read_slots(row, 0, found.length)
        arrays |= {f"kept.{at}": logits for at, logits in found.kept.items()}
        return arrays | ({"logits": now.logits[row]} if found.current else {})

    def row_shapes(self, length: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of what `export_row` gives of a row of this length, without logits."""
        empty = self.buffers.read_slots(0, 0, 0).items()
        shapes = {name: ((a.shape[0], length, a.shape[2]), str(a.dtype)) for name, a in empty}
        width = self.history.live(0, 0).shape[1]
        return shapes | {"tokens": ((length,), "int64"), "latents": ((length, width), "float32")}

    def put(self, row: int, source: DecodeState, index: int = 0) -> None:
        """Make a row a copy of a row of another state, to the bit."""
        row, arrays = self._known(row), self._taken_over(source, index)
        self._check_fits(arrays)
        copied = {name: array.copy() for name, array in arrays.items()}
        now = self.computed()
        rows = [*now.rows]
        rows[row] = _described(copied, now.rows[row].tag)
        within = max(now.read_within, source.read_within)
        self._now = now._replace(rows=tuple(rows), read_within=within, due=(row, copied))

    def add(self, source: DecodeState | None = None, index: int = 0, tag: object = None) -> int:
        """One more row, empty or a copy of a row of another state; returns its number. `tag` is attached to it."""
        now = self.computed()
        row = len(now.rows)
        if row == self.slots:
            raise StateError(f"all {self.slots} slots of this state are taken; drop a row, or start with more slots")
        within = now.read_within
        if source is None:
            added = _row([])
            self.buffers.set_latent(np.array([row]), self.history.after(row, 0)[None])
        else:
            added = self._imported(row, self._taken_over(source, index))
            within = max(within, source.read_within)
        now = self._now  # a source that is this state may have computed its logits
        try:
            self._now = now._replace(rows=(*now.rows, added._replace(tag=tag)), read_within=within)
            return row
        except BaseException:
            self._now = now
            raise

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its number. It costs nothing from then on."""
        row, now = self._known(row), self.computed()
        last = len(now.rows) - 1
        rows = [*now.rows]
        rows[row] = rows[last]
        due = (row, self.export_row(last)) if row != last else None
        self._now = now._replace(rows=tuple(rows[:last]), due=due)

    def save(self, path: str | Path) -> None:
        """Write the live part to one safetensors file, whole or not at all; `Decoder.load_state` reads it."""
        from .state_file import save_state

        save_state(self, check_path(path, "path"))

    def _taken_over(self, source: DecodeState, index: int) -> dict[str, NDArray[Any]]:
        """A row of another state, if it may be continued here."""
        self.origin.check_same(check_is(source, DecodeState, "source").origin)
        return source.export_row(source._known(index))

    def _check_fits(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        if (length := len(arrays["tokens"])) > self.capacity:
            raise StateError(f"the sequence holds {length} tokens, more than the capacity of {self.capacity} here")

    def _imported(self, row: int, arrays: Mapping[str, NDArray[Any]]) -> Row:
        """Write arrays to a row that does not count yet, and describe it."""
        self._check_fits(arrays)
        self._write(row, arrays)
        return _described(arrays)

    def _write(self, row: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.buffers.write_slots(row, 0, arrays)
        self.history.write_row(row, 0, arrays["latents"])
        self.buffers.set_latent(np.array([row]), self.history.after(row, len(arrays["tokens"]))[None])
        if "logits" in arrays:
            self._now.logits[row] = arrays["logits"]

    def _known(self, row: int) -> int:
        if isinstance(row, bool) or not isinstance(row, (int, np.integer)) or not 0 <= row < self.batch:
            raise StateError(f"there is no row {shown(row)}; this state has the rows 0 to {self.batch - 1}")
        return int(row)


def _row(tokens: list[int], kept: Mapping[int, FloatArray] = _NOTHING_KEPT, current: bool = False) -> Row:
    return Row(tokens, len(tokens), current, kept, None)


def _described(arrays: Mapping[str, NDArray[Any]], tag: object = None) -> Row:
    """The row that `export_row` gave."""
    kept = {int(name.removeprefix("kept.")): array for name, array in arrays.items() if name.startswith("kept.")}
    return _row(arrays["tokens"].tolist(), kept, "logits" in arrays)._replace(tag=tag)


def _kept_until(kept: Mapping[int, FloatArray], length: int) -> Mapping[int, FloatArray]:
    """Kept logits after the first `length` tokens at most."""
    if all(at <= length for at in kept):
        return kept
    return {at: logits for at, logits in kept.items() if at <= length}
