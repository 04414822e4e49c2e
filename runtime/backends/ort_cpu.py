"""ONNX Runtime on the CPU: one session on the windowed prefill graph serves prefill and decode.

Caches are numpy arrays that ORT updates in place, because input and output of a cache are bound to one OrtValue. They
hold little more than the tokens so far, since attention reads all of their slots, and are replaced by larger ones in
steps (`room_for`). The latent, which every layer reads, goes in and out through two small arrays that swap roles. All
that a call needs is bound once per shape; a decode step writes a few integers and runs.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.graph_file import check_graph_file
from lrt_deploy.bundle.manifest import Manifest, graph_path, table_path, weights_path
from lrt_deploy.bundle.precisions import base_dtype
from lrt_deploy.errors import BackendError
from lrt_deploy.types import FloatArray, IntArray

from .base import Block, BlockLimits, SlotArrays, StateBuffers
from .host_tables import HostTables, RowArrays, Rows
from .memory_pages import Moved, in_huge_pages
from .ort_session import ORT_ERRORS, check_session, raise_backend_error

UNIT = 32  # slots; caches have a multiple of it


def room_for(end: int) -> int:
    """Slots for `end` tokens that come one by one: the next multiple of about 4 sqrt(end).

    A copy costs what the caches hold, an empty slot the same for every token until then: the sum of both is least
    where steps grow with the root of the length. The factor was measured (128 slots a step before: up to 6% slower).
    """
    step = -(-4 * math.isqrt(end) // UNIT) * UNIT
    return -(-end // step) * step


def room_for_prompt(end: int, total: int) -> int:
    """Slots for `end` tokens of prompts that will have come to `total`: a quarter more, until all have room.

    In the steps of `room_for`, copying took a tenth of the time of reading 2,048 tokens. What the last quarter had too
    much, every later step would read.
    """
    more = -(-(end + end // 4) // UNIT) * UNIT
    return max(room_for(end), min(more, room_for(total + 1)))


def quantized_entries(precision: str) -> dict[str, str]:
    """Session entries for a precision.

    With weights alone quantized: to multiply in int8 (in float32, 8 bits were 10 to 45 times slower). With activations:
    sums of uint8 x int8 saturate at 16 bits where a processor has no VNNI instructions, unless asked not to; where it
    has them, asking costs 2.5 times the time. INT8 weights have a scale a column, which the product sees block by
    block: blocks of 128 take 12 to 20% less time than ORT's 32, for a mean KL of 1.6e-4 instead of 1.2e-4.
    """
    if precision == "int8":
        return {} if _has_vnni() else {"session.x64quantprecision": "1"}
    blocks = {"session.qdq_matmulnbits_block_size": "128"} if precision == "int8-weight-only" else {}
    return {"session.qdq_matmulnbits_accuracy_level": "4"} | blocks


def _has_vnni() -> bool:
    """Whether int8 products cannot saturate; False where that is not known. Only x86 has the problem."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# Below this, handing work to a second thread costs more than it saves (measured: docs/tried-and-lost.md), and weights
# stay in the processor's cache.
_SMALL_BYTES = 24 * 2**20
# Caches that hold so much more than their rows need are not made smaller: a step loses less by reading it than the
# copies and bindings of shrinking and growing again cost (demo: 5% of a step, against 9% of an answer of 128 tokens).
_SMALL_EXCESS_BYTES = 4 * 2**20
_LOG_ERRORS = 3
_NO_POSITION = np.iinfo(np.int64).max  # of a slot that no token may see
_KEPT_READS = 8  # a prompt is read in blocks of at most two lengths a chunk, with and without head


class OrtCpuBackend:
    """A session on the CPU provider. `threads` None: one for small models, else ORT's choice (all physical cores)."""

    name = "ort-cpu"
    blocks = BlockLimits()
    device = None

    def __init__(
        self, folder: Path, manifest: Manifest, precision: str, threads: int | None = None, log_level: int = _LOG_ERRORS
    ) -> None:
        self.config, self.precision, self.capacity = manifest.model, precision, manifest.max_seq_len
        self.dtype = _state_dtype(manifest, precision)
        self.state_dtype = str(self.dtype)
        graph = folder / graph_path(precision, "prefill", "windowed")
        self.tables = HostTables.open(folder, manifest, precision)
        files = (weights_path(precision), *([table_path(precision)] if self.tables else []))
        small = sum((folder / name).stat().st_size for name in files) < _SMALL_BYTES
        threads = 1 if threads is None and small else threads
        # A process that is forked from this one has the memory, but not the threads that would do the work.
        self.process = None if threads == 1 else os.getpid()
        check_graph_file(graph, folder / weights_path(precision))
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = log_level
        options.enable_mem_pattern = False  # prompts come in many lengths, and a plan would be kept for each
        for entry, value in quantized_entries(precision).items():
            options.add_session_config_entry(entry, value)
        try:
            with nullcontext(Moved()) if small else in_huge_pages() as moved:
                self.session = ort.InferenceSession(
                    str(graph), options, providers=["CPUExecutionProvider"], enable_fallback=0
                )
        except ORT_ERRORS as error:
            raise_backend_error(error, f"ONNX Runtime {ort.__version__} cannot open {graph}")
        check_session(self.session, graph, manifest, precision, "windowed")
        self.threads = threads
        self.detail = f"ONNX Runtime {ort.__version__}, CPU, {f'{threads} thread(s)' if threads else 'all cores'}"
        if moved.bytes:
            self.detail += f", {moved.bytes / 2**20:.0f} MiB of weights in huge pages"

    def allocate(self, batch: int) -> OrtCpuBuffers:
        """Zeroed buffers; the system commits their pages only when they are first written."""
        return OrtCpuBuffers(self, batch)


@dataclass
class _Call:
    """A binding for calls of one shape, and the arrays it reads and writes."""

    binding: Any  # onnxruntime is untyped
    ids: IntArray  # (B, T)
    positions: IntArray  # (B, T)
    write_index: IntArray  # (B)
    latents_in: NDArray[Any]  # (B, T, C), of the state's type like the next
    latents_out: NDArray[Any]  # (B, T, C)
    logits: FloatArray  # (B, K, V)
    rows: Rows  # of the tokens in the embedding tables, where the graph does not hold these


class _Bound:
    """What belongs to caches of one size: `room` slots each."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.seen_positions = np.full(room, _NO_POSITION)  # (room) of the slots, or `_NO_POSITION`
        self.decodes: dict[tuple[int, bool, int], _Call] = {}
        self.reads: dict[tuple[int, int, int], _Call] = {}


@dataclass
class _Resized:
    """Caches of another size that are filled one by one, while steps go on in the old ones."""

    room: int
    caches: dict[str, NDArray[Any]]  # those that have been filled
    written: list[int]  # (B) of each row, the first slot that a step has written since


class OrtCpuBuffers(StateBuffers):
    """Caches and latent of B sequences, and the bindings that run on them. See `base.StateBuffers`."""

    copies_note = None

    def __init__(self, backend: OrtCpuBackend, batch: int) -> None:
        config = backend.config
        self._session, self._config, self._process = backend.session, config, backend.process
        self.batch, self.capacity, self.layers = batch, backend.capacity, config.n_layer
        self._dtype = backend.dtype
        self._tables, self._rows = backend.tables, RowArrays(backend.tables)
        self._bound = _Bound(0)
        self._growing: tuple[dict[str, NDArray[Any]], _Bound] | None = None  # larger caches, to be moved into
        self._resized: _Resized | None = None
        self._spare: dict[str, NDArray[Any]] = {}  # larger caches of before, whose memory may be used again
        self._expected = self.capacity  # tokens that the longest row will come to hold
        shape = (batch, config.n_kv_head, 0, config.head_dim)
        self._presents = {pair.past: pair.present for pair in contract.state_pairs(config) if pair.in_place}
        self._caches = {past: np.zeros(shape, self._dtype) for past in self._presents}
        self._slot_bytes = len(self._caches) * config.n_kv_head * config.head_dim * self._dtype.itemsize  # of one row
        self._latents = [np.zeros((batch, 1, config.n_embd), self._dtype) for _ in range(2)]
        width = config.n_embd if config.memory else 0
        self._latent_rows = [latent[:, 0, :width] for latent in self._latents]  # views, (B, C) or (B, 0)
        self._turn = 0  # which of the two holds the current latent
        # The bounds of the live windows and the order of the slots are shared by all calls: one runs at a time.
        self._starts = {window: np.zeros(1, np.int64) for window in contract.distinct_windows(config)}
        self._end = np.zeros(1, np.int64)
        self._slot_positions = np.arange(self.capacity)
        self._make_room(1)

    @property
    def latent(self) -> FloatArray:
        """(B, C), a view of the current latent, a copy where it is not float32; (B, 0) for a model without memory."""
        return _as_float32(self._latent_rows[self._turn])

    def set_latent(self, rows: IntArray, latent: FloatArray) -> None:
        """Replace the latent of some rows: rows (n), latent (n, C)."""
        self._latent_rows[self._turn][rows] = latent

    def _make_room(self, end: int, room: int | None = None) -> None:
        """Have slots up to `end`, if not `room` of them."""
        if self._growing:
            self._move_into(*self._growing)
        if end > self._bound.room or room:
            self._resized = None
        if end > self._bound.room:
            slots = min(room or room_for(end), self.capacity)
            # All is allocated before anything is changed.
            larger, bound = {name: self._allocate(name, slots) for name in self._caches}, _Bound(slots)
            self._growing, self._spare = (larger, bound), {}
            self._move_into(larger, bound)

    def _move_into(self, larger: dict[str, NDArray[Any]], bound: _Bound) -> None:
        """Move into larger caches one at a time, so that old ones can go; goes on where an interrupt ended it."""
        self._bound = bound  # bindings hold the old caches
        for name, cache in self._caches.items():
            new = larger[name]
            if cache is not new:
                new[:, :, : cache.shape[2]] = cache
                self._caches[name] = new
                del cache
        self._growing = None

    def fit(self, lengths: Sequence[int], soon: int = 0) -> None:
        """Fill the next cache of the size that rows of these lengths need, and change to that size when it is needed.

        Begins as many steps before the caches are full as there are caches. When they shrink, the memory of the large
        ones is kept for the next time: fresh pages cost most of growing.
        """
        held = max(lengths, default=0)
        longest = max(soon, held)
        resized = self._resized = self._resizing(min(longest + 2 + len(self._caches), self.capacity), len(lengths))
        if resized is None:
            return
        name = next((name for name in self._caches if name not in resized.caches), None)
        if name is not None:
            old, new = self._caches[name], self._allocate(name, resized.room)
            for row, length in enumerate(lengths):
                new[row, :, :length] = old[row, :, :length]
            resized.caches[name] = new
        elif resized.room < self._bound.room or held >= self._bound.room:  # steps cost more with larger caches
            self._change_to(resized, lengths)

    def _resizing(self, end: int, rows: int) -> _Resized | None:
        """Return the change of size to go on with, or to begin, for `end` slots; None where the caches fit the rows."""
        room, resized = self._bound.room, self._resized
        if resized is not None and end <= resized.room and not end <= room < resized.room:
            return resized
        if end <= room < 2 * end:  # no cache for `end` has fewer slots
            return None
        wanted = min(room_for(end), self.capacity)
        excess = (room - wanted) * rows * self._slot_bytes
        if end <= room and (room < 2 * wanted or excess <= _SMALL_EXCESS_BYTES):
            return None
        return _Resized(wanted, {}, [self.capacity] * self.batch)

    def _change_to(self, resized: _Resized, lengths: Sequence[int]) -> None:
        """Copy what steps have written since the resized caches were filled, and use those from now on."""
        for name, new in resized.caches.items():
            for row, (start, length) in enumerate(zip(resized.written, lengths, strict=False)):
                new[row, :, start:length] = self._caches[name][row, :, start:length]
        grown = resized.room > self._bound.room
        bound, spare = _Bound(resized.room), {} if grown else self._spare or self._caches
        # In one statement without a call, which no interrupt divides.
        self._caches, self._bound, self._resized, self._spare = resized.caches, bound, None, spare

    def _allocate(self, name: str, slots: int) -> NDArray[Any]:
        """Return a cache of so many slots: zeros, or in the memory that a larger one had, with numbers that are finite.

        The system commits pages of zeros only when they are written.
        """
        old, spare = self._caches[name], self._spare.get(name)
        shape = (*old.shape[:2], slots, old.shape[3])
        if spare is None or slots < self._bound.room or spare.shape[2] < slots:
            return np.zeros(shape, old.dtype)
        return spare.reshape(-1)[: math.prod(shape)].reshape(shape)

    def expect(self, total: int) -> None:
        """Caches grow in few and large steps to what this many tokens need, and not beyond."""
        self._expected = total

    def decode(self, tokens: IntArray, positions: IntArray, head: bool) -> FloatArray | None:
        """Run one token for each of the first rows; bindings are kept per number of rows."""
        listed = positions.tolist()  # a few whole numbers: quicker to compare than by numpy
        end = max(listed) + 1
        if end > self._bound.room or self._growing:
            self._make_room(end)
        call = self._decode_call(len(listed), head, self._turn)
        call.ids[:, 0] = tokens
        call.positions[:, 0] = positions
        call.write_index[:] = positions
        self._look_back(min(listed), end)
        if self._resized:
            self._resized.written[: len(listed)] = map(min, self._resized.written, listed)
        self._run(call)
        self._turn = 1 - self._turn
        return call.logits[:, 0] if head else None

    def read(self, block: Block, latents: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Run a block of one row; bindings are kept per row and block length."""
        end = max(block.end, block.slot + len(block.tokens))
        self._make_room(end, room_for_prompt(end, self._expected))
        call = self._read_call(block.row, len(block.tokens), int(block.head))
        call.ids[0], call.positions[0], call.write_index[0] = block.tokens, block.positions, block.slot
        if self._config.memory:
            call.latents_in[0] = latents
        self._look_back(int(block.positions.min()), block.end, block.ordered)
        self._run(call)
        return _as_float32(call.latents_out[0]) if self._config.memory else latents, call.logits[0].reshape(-1)

    def reorder(self, row: int, start: int, order: IntArray, move: bool) -> None:
        """Permute the slots' positions; with `move`, gather the row's entries back into order."""
        slots = slice(start, start + len(order))
        self._make_room(slots.stop, room_for_prompt(slots.stop, self._expected))  # once, and not with every block
        self._slot_positions[slots] = start + order
        if move:
            back = np.argsort(order)
            for cache in self._caches.values():
                cache[row, :, slots] = cache[row, :, slots][:, back]
            self._slot_positions[slots] = np.arange(start, start + len(order))

    def reset_order(self) -> None:
        """Every slot holds its own position."""
        self._slot_positions[:] = np.arange(self.capacity)

    def cache(self, layer: int, length: int) -> tuple[FloatArray, FloatArray]:
        """(B, G, length, D) of a layer's keys and values: views, or copies where the caches are not float32."""
        keys, values = (self._caches[name] for name in contract.past_cache(layer))
        return _as_float32(keys[:, :, :length]), _as_float32(values[:, :, :length])

    def read_slots(self, row: int, start: int, stop: int) -> SlotArrays:
        """Views (G, stop - start, D) of a row's entries in every cache, by the names of the contract."""
        return {name: cache[row, :, start:stop] for name, cache in self._caches.items()}

    def write_slots(self, row: int, start: int, entries: Mapping[str, NDArray[Any]]) -> None:
        """Put entries into a row's slots from `start` on."""
        end = start + max((array.shape[1] for name, array in entries.items() if name in self._caches), default=0)
        room, resized = self._bound.room, self._resized
        if resized and len(resized.caches) == len(self._caches) and room < end <= resized.room:
            self._change_to(resized, [room] * self.batch)  # they were made for this row
        self._resized = None
        self._make_room(end)
        for name, cache in self._caches.items():
            cache[row, :, start : start + entries[name].shape[1]] = entries[name]

    def _look_back(self, oldest: int, end: int, ordered: int | None = None) -> None:
        """Set what queries from position `oldest` on may see: slots below `end`, and where windows begin.

        No window may begin among slots out of order, which begin at `ordered`.
        """
        for window, start in self._starts.items():
            first = max(0, oldest - window)
            start[0] = first if ordered is None else min(first, ordered)
        self._end[0] = end
        seen = self._bound.seen_positions
        seen[:end] = self._slot_positions[:end]
        seen[end:] = _NO_POSITION

    def _run(self, call: _Call) -> None:
        if self._process is not None and self._process != os.getpid():
            raise BackendError(
                f"this decoder was opened in the process {self._process} with several threads, which a fork of it does "
                "not have; open the bundle in each process, or with threads=1 before the fork"
            )
        if call.rows:
            self._tables.take(call.ids, call.rows)
        try:
            self._session.run_with_iobinding(call.binding)
        except ORT_ERRORS as error:
            raise_backend_error(error, "ONNX Runtime failed")

    def _decode_call(self, rows: int, head: bool, turn: int) -> _Call:
        """One token for each of the first `rows` rows, from the latent `turn` to the other one."""
        key, calls = (rows, head, turn), self._bound.decodes
        if key not in calls:
            before, after = self._latents[turn][:rows], self._latents[1 - turn][:rows]
            calls[key] = self._bind(slice(0, rows), int(head), before, after)
        return calls[key]

    def _read_call(self, row: int, count: int, logit_rows: int) -> _Call:
        """`count` tokens of one row, between two latent arrays of their own; the last few are kept."""
        key, calls = (row, count, logit_rows), self._bound.reads
        if key not in calls:
            while len(calls) >= _KEPT_READS:
                del calls[next(iter(calls))]
            latents = np.zeros((2, 1, count, self._config.n_embd), self._dtype)
            calls[key] = self._bind(slice(row, row + 1), logit_rows, latents[0], latents[1])
        return calls[key]

    def _bind(self, rows: slice, logit_rows: int, latents_in: NDArray[Any], latents_out: NDArray[Any]) -> _Call:
        """Bind a call on some rows; `logit_rows` is 1 (the last token's) or 0 (no head)."""
        batch, count = latents_in.shape[:2]
        call = _Call(
            binding=self._session.io_binding(),
            ids=np.zeros((batch, count), np.int64),
            positions=np.zeros((batch, count), np.int64),
            write_index=np.zeros(batch, np.int64),
            latents_in=latents_in,
            latents_out=latents_out,
            logits=np.zeros((batch, logit_rows, self._config.vocab_size), np.float32),
            rows=self._rows.of(batch, count),
        )
        inputs: dict[str, NDArray[Any]] = {
            **(call.rows or {"input_ids": call.ids}),
            "position_ids": call.positions,
            "write_index": call.write_index,
            "last_index": np.full((batch, logit_rows), count - 1, np.int64),
            contract.WINDOW_END: self._end,
            contract.SLOT_POSITIONS: self._bound.seen_positions,
        } | {contract.window_start(window): start for window, start in self._starts.items()}
        outputs: dict[str, NDArray[Any]] = {"logits": call.logits}
        if self._config.memory:
            inputs["past_latent"], outputs["present_latent"] = latents_in, latents_out
        for name, array in inputs.items():
            call.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in outputs.items():
            call.binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        # Input and output of a cache share one OrtValue: that is what makes TensorScatter write in place.
        for past, present in self._presents.items():
            value = ort.OrtValue.ortvalue_from_numpy(self._caches[past][rows])
            call.binding.bind_ortvalue_input(past, value)
            call.binding.bind_ortvalue_output(present, value)
        return call


def _state_dtype(manifest: Manifest, precision: str) -> np.dtype[Any]:
    """The type of caches and latent; refuses a precision that ONNX Runtime has no CPU kernels for."""
    dtype = base_dtype(precision, "windowed")
    if dtype == "bfloat16":
        others = [p for p in manifest.precisions if base_dtype(p, "windowed") != "bfloat16"]
        instead = f"take {' or '.join(others)}" if others else "export with --precision fp32 as well"
        raise BackendError(
            f"ort-cpu cannot run {precision}: ONNX Runtime has no bfloat16 matrix product on a CPU; {instead}, "
            "or run it on a GPU"
        )
    return np.dtype(dtype)


def _as_float32(array: NDArray[Any]) -> FloatArray:
    return array if array.dtype == np.float32 else array.astype(np.float32)
