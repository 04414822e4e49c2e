"""The state of B sequences between two steps: rows of tokens, latents and logits, over caches that the backend owns.

A `Row` says what one sequence is: its tokens, the latent after each of them, how many of both count, and the logits of
its next token. The caches and the latents that the next step reads are in `StateBuffers` (backends/base.py).

Every operation is a transaction. All that a state is hangs off one attribute, `_now`, which an operation replaces in
one assignment after everything else is done. Until then it writes only what does not count: cache slots, tokens and
latents beyond the lengths of the rows. What it must overwrite it first copies to an `Undo`. An operation that did not
end, because of an error or an interrupt between any two lines, is undone when the state is next used (`ready`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from lrt_deploy.errors import StateError
from lrt_deploy.fields import check_is, check_list, check_path, check_wholes, shown
from lrt_deploy.runtime.backends.base import SlotArrays, StateBuffers, check_finite
from lrt_deploy.types import FloatArray, IntArray, PrefillReport

from . import state_file
from .fixed_point import InBlocks, finish
from .state_file import Owner

_new = tuple.__new__  # of a named tuple, several times quicker than its own constructor, for steps
_NOTHING_KEPT: Mapping[int, FloatArray] = MappingProxyType({})
_Result = TypeVar("_Result")


class Row(NamedTuple):
    """One sequence. It is replaced and never changed, but a step appends to its lists: their first `length` count."""

    tokens: list[int]
    latents: list[FloatArray]  # (C) float32, after each token
    length: int
    logits: FloatArray | None  # (V) after the last token; None after a rewind, until they are computed
    kept: Mapping[int, FloatArray]  # logits (V) after so many tokens, where a decode step would round differently
    tag: object  # the caller's; it moves with the row
    read_within: float  # the largest error of the latent that any prefill was allowed to leave

    def cut(self, length: int) -> Row:
        """Return the first `length` tokens as a row."""
        if length == self.length:
            return self
        kept = {at: logits for at, logits in self.kept.items() if at <= length}
        within = self.read_within if length else 0.0
        return self._replace(length=length, logits=None, kept=kept, read_within=within)

    def independent(self) -> Row:
        """Return the same row with memory of its own and without a tag.

        Latents and logits of a step are views of the arrays of all rows, which one row would keep alive.
        """
        n = self.length
        latents = list(np.concatenate(self.latents[:n]).reshape(n, self.latents[0].size)) if n else []
        logits = None if self.logits is None else self.logits.copy()
        return self._replace(tokens=self.tokens[:n], latents=latents, logits=logits, tag=None)


# In the latents of a row: still on the device, where a loop has put it.
ON_DEVICE: FloatArray = np.zeros(0, np.float32)
_EMPTY = Row([], [], 0, None, _NOTHING_KEPT, None, 0.0)


class Content(NamedTuple):
    """All that a state is, together with what its buffers hold below the lengths of the rows."""

    rows: tuple[Row, ...] = ()
    prefill: PrefillReport = PrefillReport("stepwise", passes=0.0)  # how the last prompt was read
    computed_tokens: int = 0  # token positions computed, including those of the states that this one was copied from
    unfed: tuple[int, ...] = ()  # one more token for each row, to be run before anything that depends on it is given
    due: tuple[int, int] | None = None  # a row, and the one of the buffers whose entries it gets before the next use


class Undo(NamedTuple):
    """How to undo an operation: what the state was before it, and copies of the cache entries that it may overwrite."""

    before: Content
    beyond: int  # slots beyond the length of each row that may have been written
    saved: tuple[tuple[int, int, SlotArrays], ...]  # row, first slot, copies of its cache entries


class Ahead(Protocol):
    """A loop on the device that runs ahead of a state."""

    overshoot: int  # slots beyond the length of each row that it may have written

    def fetch(self, row: int, start: int, stop: int) -> FloatArray:
        """Wait for all that runs; put the row's entries of these tokens into its caches, and return their latents."""

    def release(self) -> None:
        """End the loop."""


class Reading(NamedTuple):
    """What reading prompts of n tokens per row gives, before it counts."""

    logits: FloatArray  # (B, V) after the last tokens
    latents: list[list[FloatArray]]  # of each row, (C) after each of its n tokens
    report: PrefillReport


class DecodeState:
    """Made by `Decoder.prefill` and advanced by `Decoder.step`; one state is used by one thread at a time.

    After any exception in an operation, an interrupt included, the state is what it was before.
    """

    def __init__(self, owner: Owner, slots: int, rows: int = 0) -> None:
        self.owner, self.slots = owner, slots  # sequences that there is room for
        self.buffers: StateBuffers = owner.backend.allocate(slots)
        self.capacity = self.buffers.capacity  # tokens that each sequence can hold
        self._now = Content(tuple(_EMPTY.independent() for _ in range(rows)))
        self.undo: Undo | None = None  # what undoes the last operation; see `roll_back`
        self.ahead: Ahead | None = None  # a loop on the device that has run the last tokens; see `follow`
        self.extra: dict[str, Any] = {}  # the caller's own, JSON types; saved and forked with the state

    @property
    def batch(self) -> int:
        """Number of sequences, B."""
        return len(self._now.rows)

    @property
    def lengths(self) -> IntArray:
        """(B) tokens so far."""
        return np.array(self.row_lengths, np.int64)

    @property
    def row_lengths(self) -> list[int]:
        """The tokens of each row, as a list."""
        unfed = bool(self._now.unfed)
        return [row.length + unfed for row in self._now.rows]

    @property
    def has_room(self) -> bool:
        """Whether there are rows, and one more token fits each."""
        now, capacity = self._now, self.buffers.capacity
        return max([row.length for row in now.rows], default=capacity) + bool(now.unfed) < capacity

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens of each row so far, copies."""
        unfed = self._now.unfed
        return [[*row.tokens[: row.length], *unfed[i : i + 1]] for i, row in enumerate(self._now.rows)]

    @property
    def tags(self) -> list[object]:
        """What is attached to each row; see `add`."""
        return [row.tag for row in self._now.rows]

    @property
    def logits(self) -> FloatArray:
        """(B, V) float32, for each row's next token, a copy.

        Runs the network where it must: after a rewind one decode step of the last tokens gives the logits again, once,
        and so does a token that `Decoder.generate` has emitted and not run. Otherwise nothing is computed.
        """
        if 0 in (lengths := self.row_lengths):
            self.row_logits(lengths.index(0))  # raises, before any are computed
        found = [self.row_logits(row) for row in range(self.batch)]
        return np.stack(found) if found else np.zeros((0, self.owner.config.vocab_size), np.float32)

    def row_logits(self, row: int) -> FloatArray:
        """Return the logits (V) of one row, not to be written to; see `logits` for when this runs the network."""
        found = self.computed().rows[row]
        if found.length == 0:
            raise StateError(f"sequence {row} holds no token yet, so no logits follow; read a prompt first")
        logits = found.logits if found.logits is not None else self._recompute().rows[row].logits
        assert logits is not None
        return logits

    @property
    def latent(self) -> FloatArray | None:
        """(B, C) float32, carried to the next token, a copy; None for a model without memory."""
        self.computed()
        return self.buffers.latent[: self.batch].copy() if self.owner.config.memory else None

    def latent_cosine(self, row: int) -> float | None:
        """Return the cosine of the latents after the last two tokens of a row; None where there are no two of them."""
        found = self.computed().rows[row]
        if found.length < 2 or not self.owner.config.memory:
            return None
        before, last = np.array(found.latents[found.length - 2 : found.length], np.float64)  # (2, C)
        return float(before @ last / np.sqrt((before @ before) * (last @ last)))

    def cache(self, layer: int) -> tuple[FloatArray, FloatArray]:
        """Return keys (after RoPE and norm) and values (after gates), (B, G, max length, D) each, as copies.

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
        return max((row.read_within for row in self._now.rows), default=0.0)

    @property
    def computed_tokens(self) -> int:
        """Token positions computed for this state, those of the states that it was copied from included."""
        return self._now.computed_tokens

    @property
    def num_bytes(self) -> int:
        """Live bytes: cache entries, latents and tokens of the lengths so far, and the logits that are held."""
        rows, ids = self._now.rows, np.zeros(1, np.int64)
        logits = len(rows) + sum(len(row.kept) for row in rows)
        each: int = sum(array.nbytes for array in self.buffers.read_slots(0, 0, 1).values())
        each += self.buffers.latent[:1].nbytes + ids.nbytes  # bytes of one token of one row
        return sum(self.row_lengths) * each + logits * 4 * self.owner.config.vocab_size

    # Transactions

    def ready(self) -> Content:
        """Undo an operation that did not end, move a row that is due, and return what this state is."""
        if self.ahead is not None:
            self._land(self.ahead)
        if self.undo is not None and self.undo.before is self._now:
            self._restore(self.undo)
        if self._now.due is not None:
            index, source = self._now.due
            row = self._now.rows[index]
            self.buffers.copy_row(index, self.buffers, source, row.length)
            self._set_latents([row], [row.length], index)
            self._now = self._now._replace(due=None)
        return self._now

    def _land(self, ahead: Ahead) -> None:
        """Fetch the latents that a loop has left on the device, and drop what it has run beyond this state."""
        now = self._now
        for index, row in enumerate(now.rows):
            first = row.length
            while first and row.latents[first - 1] is ON_DEVICE:
                first -= 1
            if first < row.length:
                row.latents[first : row.length] = list(ahead.fetch(index, first, row.length))
        self._restore(Undo(now, ahead.overshoot, ()))
        self.ahead = None
        ahead.release()

    def fit(self, soon: int = 0) -> None:
        """Do a part of `StateBuffers.fit`, which would lose the entries of a row that is due: it is moved first."""
        self.ready()
        self.buffers.fit(self.row_lengths, soon)

    def computed(self) -> Content:
        """Do the same as `ready`, and run the tokens that were appended by `defer`."""
        now = self.ready()
        if now.unfed:
            self._run(now, np.array(now.unfed))
        return self._now

    def _save(self, before: Content, spans: Sequence[tuple[int, int]], beyond: int) -> Undo:
        """Begin an operation that may overwrite slots `start` to `stop - 1` of each row, and `beyond` after its end."""
        saved = []
        for row, (start, stop) in enumerate(spans):
            if start < stop:
                entries = self.buffers.read_slots(row, start, stop).items()
                saved.append((row, start, {name: array.copy() for name, array in entries}))
        self.undo = undo = Undo(before, beyond, tuple(saved))
        return undo

    def roll_back(self, undo: Undo | None) -> None:
        """Undo an operation that has ended, and since which only logits were computed."""
        if undo is not None:
            self.undo = undo
            self._now = undo.before

    def commit(self, content: Content, result: _Result) -> _Result:
        """Make `content` what this state is and return `result`, both or neither."""
        before = self._now
        try:
            self._now = content
            return result
        except BaseException:
            self._now = before
            raise

    def _restore(self, undo: Undo) -> None:
        """Put back what an operation overwrote: may be interrupted and done again.

        Slots beyond each row's length are zeroed. They do not count, but NaN in them would: a row beside a longer one
        gives them the weight 0, and 0 times NaN is NaN.
        """
        self.buffers.reset_order()
        for index, row in enumerate(undo.before.rows):
            entries = self.buffers.read_slots(index, row.length, min(row.length + undo.beyond, self.capacity))
            self.buffers.write_slots(index, row.length, {name: np.zeros_like(a) for name, a in entries.items()})
        for index, start, saved in undo.saved:
            self.buffers.write_slots(index, start, saved)
        self._set_latents(undo.before.rows, [row.length for row in undo.before.rows])
        self.undo = None

    def _set_latents(self, rows: Sequence[Row], lengths: Sequence[int], first: int = 0) -> None:
        """Make the current latents of rows from `first` on those after `lengths` tokens: zeros after none."""
        if rows:
            none = np.zeros(self.buffers.latent.shape[1], np.float32)
            latents = [row.latents[n - 1] if n else none for row, n in zip(rows, lengths, strict=True)]
            self.buffers.set_latent(np.arange(first, first + len(rows)), np.stack(latents))

    # More tokens

    def advance(self, ids: IntArray, give: bool = False) -> FloatArray:
        """Run one token of each row (B); ids and room have been checked.

        Returns the logits (B, V), a copy if `give`, otherwise an array that must not be written to.
        """
        return self._run(self.computed(), ids, give)

    def defer(self, ids: Sequence[int], result: _Result) -> _Result:
        """Append one token to each row (B), which is run when something that depends on it is asked for.

        Returns `result`: a caller that hands something out with the token does both in one step.
        """
        return self.commit(self.computed()._replace(unfed=tuple(ids)), result)

    def unfed_token(self) -> int | None:
        """Return the token of a state of one sequence that was appended and not run; None if there is none."""
        unfed = self.ready().unfed
        return unfed[0] if len(unfed) == 1 else None

    def follow(self, ids: Sequence[int], result: _Result) -> _Result:
        """Append one token to each row (B), as `defer`; the loop that is ahead has run those that were appended before.

        Their latents stay on the device until the state is used otherwise.
        """
        now, rows = self._now, []
        for row, token in zip(now.rows, now.unfed, strict=True):
            n = row.length
            tokens = [*row.tokens[:n]] if len(row.tokens) != n else row.tokens
            latents = [*row.latents[:n]] if len(row.latents) != n else row.latents
            tokens.append(token)
            latents.append(ON_DEVICE)
            rows.append(row._replace(tokens=tokens, latents=latents, length=n + 1, logits=None))
        computed = now.computed_tokens + len(rows)
        return self.commit(now._replace(rows=tuple(rows), computed_tokens=computed, unfed=tuple(ids)), result)

    def _run(self, before: Content, ids: IntArray, give: bool = False) -> FloatArray:
        """Run one token of each row in the backend, and append it, its latent and its logits."""
        self.undo = _new(Undo, (before, 1, ()))
        positions = np.array([row.length for row in before.rows])  # (B)
        found = self.buffers.decode(ids, positions, head=True)
        assert found is not None
        check_finite(found, positions, self.owner.backend)
        # Copies, since the backend uses both arrays again. Rows share them and never write to them.
        logits, latents = found.copy(), np.array(self.buffers.latent[: len(ids)])  # (B, V), (B, C)
        rows = []
        for row, token, latent, after in zip(before.rows, ids.tolist(), latents, logits, strict=True):
            # Lists are shared with the row before, unless they already go on otherwise.
            tokens, past, length, _, kept, tag, within = row
            tokens = tokens if len(tokens) == length else tokens[:length]
            past = past if len(past) == length else past[:length]
            tokens.append(token)
            past.append(latent)
            rows.append(_new(Row, (tokens, past, length + 1, after, kept, tag, within)))
        now = _new(Content, (tuple(rows), before.prefill, before.computed_tokens + len(rows), (), None))
        return self.commit(now, logits.copy() if give else logits)

    def read(
        self,
        past: Sequence[int],
        rows: Sequence[IntArray],
        run: Callable[[], InBlocks[Reading]] | None = None,
        shown_as: Callable[[PrefillReport], PrefillReport] = lambda report: report,
    ) -> InBlocks[Content]:
        """Replace what follows the first `past` (B) tokens of each row by `rows`; return what to `commit` at the end.

        `run` reads `rows` into the buffers, None where all are empty. The state will show the report of the reading, or
        else its own, as changed by `shown_as`. Logits that a decode step of the last token would round differently are
        kept for a rewind. Until then, the state must not be used; what is not committed is undone by the next use.
        """
        now = self.ready()
        if any(length > row.length for length, row in zip(past, now.rows, strict=True)):
            now = self.computed()
        counts = [len(ids) for ids in rows]
        stops = [min(row.length, start + count) for row, start, count in zip(now.rows, past, counts, strict=True)]
        self._save(now, list(zip(past, stops, strict=True)), max(counts, default=0))
        if any(length != row.length for length, row in zip(past, now.rows, strict=True)):
            self._set_latents(now.rows, past)
        found, computed = [row.cut(length) for row, length in zip(now.rows, past, strict=True)], now.computed_tokens
        report = now.prefill
        if run is not None:
            reading = yield from run()
            report = reading.report
            found = [_longer(row, ids, reading, i) for i, (row, ids) in enumerate(zip(found, rows, strict=True))]
            computed += round(report.passes * sum(counts))
        return Content(tuple(found), shown_as(report), computed)

    def _recompute(self) -> Content:
        """Give every row that was rewound its logits again: kept ones, or those of a decode step of its last token.

        The step starts from the latent before that token; caches and latents are put back.
        """
        now = self._now
        lacking = [index for index, row in enumerate(now.rows) if row.logits is None and row.length]
        found = {i: now.rows[i].kept[now.rows[i].length] for i in lacking if now.rows[i].length in now.rows[i].kept}
        computed = now.computed_tokens
        if len(found) < len(lacking):
            last = [max(row.length - 1, 0) for row in now.rows]
            ids = np.array([row.tokens[at] if row.length else 0 for row, at in zip(now.rows, last, strict=True)])
            undo = self._save(now, [(at, at + 1) for at in last], 0)
            self._set_latents(now.rows, last)
            logits = self.buffers.decode(ids, np.array(last), head=True)
            assert logits is not None
            check_finite(logits, np.array(last), self.owner.backend)
            found = {index: logits[index].copy() for index in lacking} | found
            self._restore(undo)
            computed += len(now.rows)
        rows = [row._replace(logits=found[i]) if i in found else row for i, row in enumerate(now.rows)]
        self._now = now._replace(rows=tuple(rows), computed_tokens=computed)
        return self._now

    def rewind(self, lengths: int | Sequence[int]) -> None:
        """Return to the first `lengths` tokens (of every row, or one number each), exactly; the rest is forgotten.

        Nothing is computed: the cache is cut, and the latent after the last token that stays is current again. What
        follows is bit-equal to what would have followed then. Logits are not stored for every token (they are often
        larger than a cache entry), see `logits`. Raises StateError for a length that a row does not have.
        """
        one = isinstance(lengths, (int, np.integer))
        wanted: list[Any] = [lengths] * self.batch if one else check_list(lengths, "lengths")
        if len(wanted) != self.batch:
            raise StateError(f"{len(wanted)} lengths were given for a state of {self.batch} sequence(s); one each")
        for row, (length, held) in enumerate(zip(wanted, self.row_lengths, strict=True)):
            whole = isinstance(length, (int, np.integer)) and not isinstance(length, bool)
            if not whole or not 0 <= length <= held:
                raise StateError(f"sequence {row} holds {held} tokens and cannot be rewound to {shown(length)}")
        past = [int(length) for length in wanted]
        if past != self.row_lengths:
            self.commit(finish(self.read(past, [np.zeros(0, np.int64)] * self.batch)), None)

    # Copies

    def fork(self) -> DecodeState:
        """Return an independent copy; only what is live is copied."""
        return self.rows(range(self.batch))

    def rows(self, rows: Sequence[int], owner: Owner | None = None) -> DecodeState:
        """Return a new state of these sequences, in this order, each as often as it is named.

        It belongs to `owner`, another decoder of the same model and precision, or to the one of this state.
        """
        owner = owner or self.owner
        owner.fingerprint.check_same(self.owner.fingerprint)
        chosen = [self._known(row) for row in check_wholes(rows, "rows")]
        if not 1 <= len(chosen) <= owner.max_batch_size:
            limit = owner.max_batch_size
            raise StateError(f"{len(chosen)} rows were asked for; this bundle was exported for 1 to {limit}")
        state, now = DecodeState(owner, len(chosen)), self.computed()
        for row in chosen:
            state.add(self, row)
        state._now = now._replace(rows=state._now.rows)
        state.extra = copy.deepcopy(self.extra)
        return state

    def add(self, source: DecodeState | None = None, index: int = 0, tag: object = None) -> int:
        """Add a row, empty or a copy of a row of another state; returns its number. `tag` is attached to it."""
        now = self.computed()
        if len(now.rows) == self.slots:
            raise StateError(f"all {self.slots} slots of this state are taken; drop a row, or start with more slots")
        if source is None:
            return self._append(_EMPTY.independent()._replace(tag=tag))
        self.owner.fingerprint.check_same(check_is(source, DecodeState, "source").owner.fingerprint)
        index = source._known(index)
        row = source.computed().rows[index].independent()
        if row.length > self.capacity:
            raise StateError(f"the sequence holds {row.length} tokens, more than the capacity of {self.capacity} here")
        self.buffers.copy_row(len(now.rows), source.buffers, index, row.length)
        return self._append(row._replace(tag=tag))

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its number. It costs nothing from then on."""
        row, now = self._known(row), self.computed()
        *rows, last = now.rows
        due = None
        if row < len(rows):
            rows[row], due = last, (row, len(rows))
        self._now = now._replace(rows=tuple(rows), due=due)

    def _append(self, row: Row) -> int:
        """Add a row whose cache entries are in the buffers; returns its number."""
        now, index = self._now, len(self._now.rows)
        self._set_latents([row], [row.length], index)
        return self.commit(now._replace(rows=(*now.rows, row)), index)

    def _known(self, row: int) -> int:
        if isinstance(row, bool) or not isinstance(row, (int, np.integer)) or not 0 <= row < self.batch:
            raise StateError(f"there is no row {shown(row)}; this state has the rows 0 to {self.batch - 1}")
        return int(row)

    # Files

    def export_row(self, row: int) -> state_file.Arrays:
        """Return everything that a row is, as arrays by the names of `state_file`."""
        found = self.computed().rows[row]
        length, shape = found.length, (found.length, self.buffers.latent.shape[1])
        arrays: state_file.Arrays = {
            "tokens": np.array(found.tokens[:length], np.int64),
            "latents": np.array(found.latents[:length], np.float32).reshape(shape),
        }
        arrays |= self.buffers.read_slots(row, 0, length)
        arrays |= {f"kept.{at}": logits for at, logits in found.kept.items()}
        return arrays if found.logits is None else arrays | {"logits": found.logits}

    def save(self, path: str | Path) -> None:
        """Write the live part to one safetensors file, whole or not at all; `Decoder.load_state` reads it."""
        path, rows, now = check_path(path, "path"), [self.export_row(row) for row in range(self.batch)], self.computed()
        book = state_file.Book(self.row_lengths, now.prefill, self.read_within, now.computed_tokens, self.extra)
        state_file.save(state_file.Snapshot(self.owner.fingerprint, self.owner.backend.name, rows, book), path)

    @classmethod
    def load(cls, path: Path, owner: Owner) -> DecodeState:
        """Make a state of a file; see `Decoder.load_state`."""
        snapshot = state_file.load(path, owner)
        state, book = cls(owner, len(snapshot.rows)), snapshot.book
        for arrays in snapshot.rows:
            kept = {int(name.removeprefix("kept.")): a for name, a in arrays.items() if name.startswith("kept.")}
            tokens = arrays["tokens"].tolist()
            found = Row(
                tokens, list(arrays["latents"]), len(tokens), arrays.get("logits"), kept, None, book.read_within
            )
            if tokens:
                state.buffers.write_slots(state.batch, 0, arrays)
            state._append(found)
        state._now = Content(state._now.rows, book.prefill, book.computed_tokens)
        state.extra = book.extra
        return state


def _longer(row: Row, ids: IntArray, reading: Reading, index: int) -> Row:
    length, logits, report = row.length + len(ids), reading.logits[index].copy(), reading.report
    iterated = report.policy != "stepwise" or report.residual is not None
    kept = {**row.kept, length: logits} if iterated else row.kept
    tokens, latents = row.tokens[: row.length] + ids.tolist(), row.latents[: row.length] + reading.latents[index]
    within = max(row.read_within, math.inf if report.policy == "zero" else report.residual or 0.0)
    return Row(tokens, latents, length, logits, kept, row.tag, within)
