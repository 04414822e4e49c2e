"""Decode steps that follow each other on the GPU: each chooses its tokens there, and they are the next one's input.

A step is the engine, the choice of a token for each row, and what makes it the next input; where the backend allows
it, one CUDA graph. The host enqueues steps ahead of those whose tokens it has seen. What comes back is a record for
each row, and logits where they are wanted; latents stay on the device, one for each token, until they are asked for.

Rows keep their places. A row that has ended, or was never begun, runs the same step again and again, which changes
nothing. A loop knows rows by number and no states; see `ahead` for a state that is continued.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrt_deploy.bundle.engine_sidecar import DECODE
from lrt_deploy.errors import BackendError
from lrt_deploy.runtime.backends.cuda import Arena, Array
from lrt_deploy.runtime.backends.device import Setup, StateMemory, bind_caches, set_shapes
from lrt_deploy.types import FloatArray, IntArray

from .kernels import Kernels
from .selection import RowRules, Selection

# As in kernels.cu.
PLACE = np.dtype([(name, np.int32) for name in ("length", "limit", "active", "unused")])
RECORD = np.dtype([("token", np.int32), ("status", np.int32), ("length", np.int32), ("logprob", np.float32)])
TABLE = np.dtype([("values", np.uint64), ("rows", np.uint64), ("columns", np.int32), ("type", np.int32)])
_TABLE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}

AHEAD = 2  # steps that are enqueued beyond the one whose tokens the host waits for
_KEPT = AHEAD + 1  # steps whose results the host may not have taken
_numbers = itertools.count()  # of loops: what each has captured is its own
_ALIGNMENT = 256  # of every address that an engine is given


@dataclass(frozen=True)
class Seat:
    """How a row begins: `token` is run after the first `length` tokens, which its caches hold."""

    token: int
    length: int
    limit: int  # no token is run beyond so many
    latent: int  # address of the latent (C) after the first `length` tokens
    rules: RowRules


@dataclass(frozen=True)
class Taken:
    """What one step has done."""

    number: int  # of the step, among all of the loop's
    records: Array  # (B) RECORD
    logits: FloatArray | None  # (B, V), to be used before the next step is taken


class DeviceTables:
    """The embedding tables of a bundle that keeps them on the host, copied to the device: loops gather from them."""

    def __init__(self, setup: Setup) -> None:
        self._arena, self.addresses = Arena(setup.device), {}
        for name, values in setup.tables.tables.items():
            self.addresses[name] = self._arena.allocate(values.nbytes), _TABLE_TYPES[str(values.dtype)], values.shape[1]
            setup.device.copy_in(self.addresses[name][0], np.ascontiguousarray(values))


class DeviceLoop:
    """Steps of `rows` rows of the memory of a state; see the module. Its calls hold the device's lock.

    After an exception it must not be used but for `latents`.
    """

    def __init__(self, setup: Setup, kernels: Kernels, tables: DeviceTables, rows: int) -> None:
        config, device = setup.config, setup.device
        self._setup, self._device, self._kernels, self.rows = setup, device, kernels, rows
        self._number = next(_numbers)
        self._arena = arena = Arena(device)
        self._selection = Selection(device, kernels, rows, config.vocab_size)
        self._stride = -(-rows * 8 // _ALIGNMENT) * _ALIGNMENT // 8
        self._inputs = arena.allocate(4 * self._stride * 8)  # int64: ids, positions, write index, last index
        self._places, self._records = arena.allocate(rows * PLACE.itemsize), arena.allocate(rows * RECORD.itemsize)
        self._logits = arena.allocate(rows * config.vocab_size * 4)
        # The latents before and after a step, and after each token of each row.
        self._words = setup.latent_bytes // 4 if config.memory else 0
        size = rows * self._words * 4
        self._past, self._present = arena.allocate(max(1, size)), arena.allocate(max(1, size))
        self._history = arena.allocate(max(1, size * setup.capacity))
        self._results = [device.pinned((rows,), RECORD) for _ in range(_KEPT)]
        self._host_logits: list[FloatArray] = []  # as many, once they are wanted
        self._events = [arena.event() for _ in range(_KEPT)]
        self._table_rows = {
            name: arena.allocate(rows * columns * 4) for name, (_, _, columns) in tables.addresses.items()
        }
        self._tables = self._send_tables(tables)
        self._context = setup.runner.context(DECODE, device.stream)
        set_shapes(setup, self._context, rows, 1)
        self._bind()
        self._memory: StateMemory | None = None
        self._warm = self._wants_logits = False
        self.started = 0  # steps that were enqueued
        self._waiting: deque[int] = deque()  # those whose results were not taken

    def _send_tables(self, tables: DeviceTables) -> int:
        found = [(values, self._table_rows[n], columns, t) for n, (values, t, columns) in tables.addresses.items()]
        address = self._arena.allocate(max(1, len(found)) * TABLE.itemsize)
        self._device.copy_in(address, np.array(found, TABLE))
        return address

    def _bind(self) -> None:
        for index, name in enumerate(("input_ids", "position_ids", "write_index", "last_index")):
            if name != "input_ids" or not self._table_rows:
                self._context.bind(name, self._inputs + index * self._stride * 8)
        for name, address in self._table_rows.items():
            self._context.bind(name, address)
        self._context.bind("logits", self._logits)
        if self._words:
            self._context.bind("past_latent", self._past)
            self._context.bind("present_latent", self._present)

    @property
    def waiting(self) -> int:
        """How many steps were enqueued and not taken."""
        return len(self._waiting)

    def attach(self, memory: StateMemory, logits: bool = False) -> None:
        """Run on the caches of this memory from now on, no row being active; `logits`: steps give them too."""
        with self._device.lock:
            self._device.begin()
            self._memory = memory
            bind_caches(self._context, memory.caches)
            self._context.ready()
            self._device.zero(self._places, self.rows * PLACE.itemsize)
            self._waiting.clear()
            if logits and not self._host_logits:
                shape = (self.rows, self._setup.config.vocab_size)
                self._host_logits = [self._device.pinned(shape, np.dtype(np.float32)) for _ in range(_KEPT)]
            self._wants_logits = logits
            self._device.leave_running()

    def seat(self, row: int, seat: Seat) -> None:
        """Begin a row, whatever it was before; from the next step on it is active."""
        with self._device.lock:
            self._device.begin(go_on=True)
            self._selection.set_row(row, seat.rules)
            for index, value in enumerate((seat.token, seat.length, seat.length)):
                address = self._inputs + (index * self._stride + row) * 8
                self._device.copy_in(address, np.array([value], np.int64))
            for name, address in self._table_rows.items():
                values = self._setup.tables.tables[name][seat.token].astype(np.float32)
                self._device.copy_in(address + row * values.nbytes, values)
            latent_bytes = self._words * 4
            self._device.copy_within(self._past + row * latent_bytes, seat.latent, latent_bytes)
            self._put(row, np.array([(seat.length, seat.limit, 1, 0)], PLACE))
            self._device.leave_running()

    def leave(self, row: int) -> None:
        """End a row, after the steps that were enqueued."""
        with self._device.lock:
            self._device.begin(go_on=True)
            self._put(row, np.zeros(1, PLACE)["active"], PLACE.fields["active"][1])  # type: ignore[index]
            self._device.leave_running()

    def allow(self, row: int, allowed: IntArray | None) -> None:
        """Set which ids the next step may choose for a row; see `Selection.set_allowed`."""
        with self._device.lock:
            self._device.begin(go_on=True)
            self._selection.set_allowed(row, allowed)
            self._device.leave_running()

    def _put(self, row: int, value: Array, offset: int = 0) -> None:
        self._device.copy_in(self._places + row * PLACE.itemsize + offset, value)

    def enqueue(self) -> None:
        """Enqueue one step of all rows."""
        assert len(self._waiting) < _KEPT and self._memory is not None
        slot, graphs, key = self.started % _KEPT, self._memory.graphs, (-1 - self._number, self.rows)
        with self._device.lock:
            self._device.begin(go_on=True)
            captures = self._warm and self._setup.cuda_graph and key not in graphs
            if captures and self._context.capturable(self._device.stream):
                graphs[key] = self._capture(self._memory)
            if key in graphs:
                self._device.launch(graphs[key])
            else:
                self._enqueue_step()
            self._device.copy_out(self._results[slot], self._records)
            if self._wants_logits:
                self._device.copy_out(self._host_logits[slot], self._logits)
            self._device.mark(self._events[slot])
            self._device.leave_running()
        self._waiting.append(self.started)
        self.started += 1

    def _capture(self, memory: StateMemory) -> Any:  # noqa: ANN401 - the device's handle
        try:
            return memory.arena.capture(self._enqueue_step)
        except BackendError as error:
            raise BackendError(f"{error}; open_decoder(..., cuda_graph=False) decodes without a CUDA graph") from error

    def _enqueue_step(self) -> None:
        self._context.enqueue(self._device.stream)
        self._selection.enqueue(self._logits, self.rows, self._places)
        self._kernels.advance_rows(
            self.rows,
            self._selection.choices_address,
            self._places,
            self._records,
            self._inputs,
            self._stride,
            self._present,
            self._past,
            self._history,
            self._words,
            self._setup.capacity,
            self._tables,
            len(self._table_rows),
        )

    def take(self) -> Taken:
        """Wait for the oldest step whose result was not taken, and return it."""
        number = self._waiting[0]
        slot = number % _KEPT
        with self._device.lock:
            self._device.begin(go_on=True)
            self._device.wait(self._events[slot])
            if not self._warm:
                self._context.warmed()
            self._warm = True
            self._device.leave_running()
        self._waiting.popleft()
        return Taken(number, self._results[slot].copy(), self._host_logits[slot] if self._wants_logits else None)

    def latents(self, row: int, start: int, stop: int) -> FloatArray:
        """Return the latents (stop - start, C) after tokens `start` to `stop` - 1 of a row, which this loop has run."""
        width = self._setup.config.n_embd if self._words else 0
        found = np.zeros((stop - start, width), self._setup.dtype)
        with self._device.lock:
            self._device.begin()
            first = row * self._setup.capacity + start
            self._device.copy_out(found, self._history + first * self._words * 4)
            self._device.synchronize()
        return found.astype(np.float32)
