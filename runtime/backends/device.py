"""The state of B sequences in device memory, and the two calls of a graph on a GPU that are bound to it.

The same for TensorRT and for ONNX Runtime on a GPU: a decode step for n rows of a state, and a block of one row's
prompt. Logits and the latent come back after each step; caches only when they are asked for. Slots are kept in the
order of positions, because the mask of the `full` flavour knows no other.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.engine_sidecar import DECODE, PREFILL
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import BackendError
from lrt_deploy.types import FloatArray, IntArray

from .base import Block, BlockLimits, SlotArrays, StateBuffers
from .cuda import Arena, Array, CudaDevice
from .host_tables import HostTables, Rows

Specs = Sequence[Mapping[str, Any]]  # name, dtype and shape of each input or output; a free dimension has its name
Caches = dict[tuple[str, str], int]  # addresses by the names of (past, present)

_ALIGNMENT = 256  # of every address that TensorRT is given


class Context(Protocol):
    """One way to run the graph, with shapes and addresses that stay until they are set anew."""

    def shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Set the shape of an input."""

    def bind(self, name: str, address: int) -> None:
        """Set where an input or output lies."""

    def ready(self) -> None:
        """Every shape is set; raises BackendError where one is missing."""

    def enqueue(self, stream: int) -> None:
        """Run once, on the stream."""

    def capturable(self, stream: int) -> bool:
        """Whether a run may be captured as a CUDA graph, with these shapes and on this stream."""
        return False

    def warmed(self) -> None:
        """Say that a first run has ended."""
        return


class Runner(Protocol):
    """Makes contexts for `decode` (one token for each row) or `prefill` (a block of one row)."""

    def context(self, profile: str, stream: int) -> Context:
        """A new one. All of them run on one stream, one after the other."""


@dataclass(frozen=True)
class Setup:
    """What all steps of a backend share."""

    runner: Runner
    device: CudaDevice
    config: LRTConfig
    dtype: np.dtype[Any]  # of caches and latent
    inputs: Specs
    state: Specs  # the pairs of the contract
    capacity: int  # cache slots
    chunk_tokens: int  # of one block, at most
    cuda_graph: bool
    tables: HostTables  # none where the graph holds the embedding tables

    @property
    def latent_bytes(self) -> int:
        """Of one token's latent."""
        return self.config.n_embd * self.dtype.itemsize

    @property
    def cache_row_bytes(self) -> int:
        """Of one sequence in one cache."""
        return self.config.n_kv_head * self.capacity * self.config.head_dim * self.dtype.itemsize


@dataclass
class _Inputs:
    """The small inputs, in pinned memory with a twin on the device: integers in one piece, and rows of host tables."""

    device: CudaDevice
    tables: HostTables
    host: Array  # (4, stride) int64: ids, positions, write index, last index
    address: int
    rows: Rows  # (count, columns) each
    row_addresses: dict[str, int]

    @classmethod
    def make(cls, setup: Setup, arena: Arena, count: int) -> _Inputs:
        """Room for `count` tokens."""
        stride, device = -(-count * 8 // _ALIGNMENT) * _ALIGNMENT // 8, arena.device
        columns = setup.tables.columns
        return cls(
            device=device,
            tables=setup.tables,
            host=device.pinned((4, stride), np.dtype(np.int64)),
            address=arena.allocate(4 * stride * 8),
            rows={name: device.pinned((count, size), np.dtype(np.float32)) for name, size in columns.items()},
            row_addresses={name: arena.allocate(count * size * 4) for name, size in columns.items()},
        )

    def bind(self, context: Context) -> None:
        """Tell the context where they lie."""
        for index, name in enumerate(("input_ids", "position_ids", "write_index", "last_index")):
            if name != "input_ids" or not self.rows:
                context.bind(name, self.address + index * self.host.strides[0])
        for name, address in self.row_addresses.items():
            context.bind(name, address)

    def gather(self, ids: IntArray) -> None:
        """Put the tables' rows of ids (n) into host memory."""
        self.tables.take(ids, {name: rows[: len(ids)] for name, rows in self.rows.items()})

    def send(self, count: int) -> None:
        """Enqueue the copy to the device, of the rows of `count` tokens."""
        self.device.copy_in(self.address, self.host)
        for name, rows in self.rows.items():
            self.device.copy_in(self.row_addresses[name], rows[:count])


class DecodeStep:
    """One token for each of `rows` rows, the first ones of any state: one for a backend and a number of rows.

    Its context, inputs and outputs are shared by all states; a CUDA graph, which holds the addresses of a state's
    caches and latents, belongs to the state's memory.
    """

    def __init__(self, setup: Setup, rows: int) -> None:
        config, device = setup.config, setup.device
        self._setup, self._device, self.rows = setup, device, rows
        self._arena = arena = Arena(device)
        self._inputs = _Inputs.make(setup, arena, rows)
        self._logits_address = arena.allocate(rows * config.vocab_size * 4)
        self._logits: FloatArray = device.pinned((rows, config.vocab_size), np.dtype(np.float32))
        # The new latent, fetched with the logits: it is as small as they are, and often asked for.
        self._latent: Array = device.pinned((rows, config.n_embd), setup.dtype)
        self._context = setup.runner.context(DECODE, device.stream)
        set_shapes(setup, self._context, rows, 1)
        self._inputs.bind(self._context)
        self._context.bind("logits", self._logits_address)
        self._warm = False

    def run(self, memory: StateMemory, turn: int, tokens: IntArray, positions: IntArray) -> tuple[FloatArray, Array]:
        """From the latent `turn` to the other one; logits (n, V) and the new latent (n, C), reused by later calls."""
        self._inputs.host[:3, : self.rows] = tokens, positions, positions
        self._inputs.gather(tokens)
        key = (self.rows, turn)
        if key in memory.graphs:
            self._device.launch(memory.graphs[key])
        else:
            self._bind(memory, turn)
            if self._warm and self._setup.cuda_graph and self._context.capturable(self._device.stream):
                memory.graphs[key] = self._capture(memory, turn)
                self._device.launch(memory.graphs[key])
            else:
                self._enqueue(memory, turn)
        self._device.synchronize()
        if not self._warm:
            self._context.warmed()
        self._warm = True
        return self._logits, self._latent

    def _capture(self, memory: StateMemory, turn: int) -> Any:  # noqa: ANN401 - the device's handle
        try:
            return memory.arena.capture(lambda: self._enqueue(memory, turn))
        except BackendError as error:
            raise BackendError(f"{error}; open_decoder(..., cuda_graph=False) decodes without a CUDA graph") from error

    def _bind(self, memory: StateMemory, turn: int) -> None:
        bind_caches(self._context, memory.caches)
        if self._setup.config.memory:
            self._context.bind("past_latent", memory.latents[turn])
            self._context.bind("present_latent", memory.latents[1 - turn])
        self._context.ready()

    def _enqueue(self, memory: StateMemory, turn: int) -> None:
        self._inputs.send(self.rows)
        self._context.enqueue(self._device.stream)
        self._device.copy_out(self._logits, self._logits_address)
        if self._setup.config.memory:
            self._device.copy_out(self._latent, memory.latents[1 - turn])


class PrefillStep:
    """Up to a chunk of tokens of one row of any state; one for a backend."""

    def __init__(self, setup: Setup) -> None:
        config, device = setup.config, setup.device
        self._setup, self._device = setup, device
        self._arena = arena = Arena(device)
        self.chunk_tokens = setup.chunk_tokens
        self._inputs = _Inputs.make(setup, arena, self.chunk_tokens)
        self._latents = [arena.allocate(self.chunk_tokens * setup.latent_bytes) for _ in range(2)]
        self._given, self._found = (device.pinned((self.chunk_tokens, config.n_embd), setup.dtype) for _ in range(2))
        self._logits_address = arena.allocate(config.vocab_size * 4)
        self._logits: FloatArray = device.pinned((config.vocab_size,), np.dtype(np.float32))
        self._context = setup.runner.context(PREFILL, device.stream)
        self._inputs.bind(self._context)
        self._context.bind("logits", self._logits_address)
        if config.memory:
            self._context.bind("past_latent", self._latents[0])
            self._context.bind("present_latent", self._latents[1])
        self._warm = False

    def run(
        self, caches: Caches, ids: IntArray, positions: IntArray, slot: int, latents: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Tokens (n) into slots from `slot` on; the latent of each (n, C) and the logits (V) after the last, copies."""
        count, host = len(ids), self._inputs.host
        host[0, :count], host[1, :count], host[2, 0], host[3, 0] = ids, positions, slot, count - 1
        self._inputs.gather(ids)
        self._inputs.send(count)
        set_shapes(self._setup, self._context, 1, count)
        bind_caches(self._context, caches)
        self._context.ready()
        found = self._found[:count]
        if self._setup.config.memory:
            self._given[:count] = latents
            self._device.copy_in(self._latents[0], self._given[:count])
        self._context.enqueue(self._device.stream)
        self._device.copy_out(self._logits, self._logits_address)
        if self._setup.config.memory:
            self._device.copy_out(found, self._latents[1])
        self._device.synchronize()
        if not self._warm:
            self._context.warmed()
        self._warm = True
        return (found.astype(np.float32) if self._setup.config.memory else latents), self._logits.copy()


@dataclass
class StateMemory:
    """Device memory of one state: a cache for each pair of the contract, (B, G, S, D), and two latents (B, C).

    `graphs` holds the decode steps that were captured on it, by the number of rows and the latent they start from, or
    the loop that they belong to.
    """

    setup: Setup
    arena: Arena
    batch: int
    caches: Caches = field(default_factory=dict)
    latents: tuple[int, int] = (0, 0)
    graphs: dict[tuple[int, int], Any] = field(default_factory=dict)

    @classmethod
    def make(cls, setup: Setup, batch: int) -> StateMemory:
        """All of it zeroed."""
        memory = cls(setup, Arena(setup.device), batch)
        allocate = memory.arena.allocate
        for pair in setup.state:
            if pair["in_place"]:
                memory.caches[pair["past"], pair["present"]] = allocate(memory.cache_bytes)
        memory.latents = (allocate(memory.latents_bytes), allocate(memory.latents_bytes))
        return memory

    @property
    def cache_bytes(self) -> int:
        """Of one cache."""
        return self.batch * self.setup.cache_row_bytes

    @property
    def latents_bytes(self) -> int:
        """Of the latents of all rows."""
        return self.batch * self.setup.latent_bytes

    def zero(self) -> None:
        """Enqueue the zeroing of all of it."""
        for address in self.caches.values():
            self.setup.device.zero(address, self.cache_bytes)
        for address in self.latents:
            self.setup.device.zero(address, self.latents_bytes)

    def row(self, row: int) -> Caches:
        """The caches of one row."""
        return {names: address + row * self.setup.cache_row_bytes for names, address in self.caches.items()}


class Steps:
    """What all states of a backend share: the steps, each made when it is first needed, and the memory of a dead state.

    The memory of the state that died last is kept, with its CUDA graphs, for the next state of as many rows: a server
    that makes a state for each request captures once. To be used with the device's lock held, apart from `keep`.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._decode: dict[int, DecodeStep] = {}
        self._prefill: PrefillStep | None = None
        self._kept: list[StateMemory] = []

    def decode(self, rows: int) -> DecodeStep:
        """The step for a number of rows."""
        if rows not in self._decode:
            self._decode[rows] = DecodeStep(self.setup, rows)
        return self._decode[rows]

    def prefill(self) -> PrefillStep:
        """The step for a block of one row."""
        if self._prefill is None:
            self._prefill = PrefillStep(self.setup)
        return self._prefill

    def memory(self, batch: int) -> StateMemory:
        """Zeroed memory for a state of `batch` rows."""
        kept = self._kept.pop() if self._kept else None
        if kept is not None and kept.batch == batch:
            kept.zero()
            return kept
        return StateMemory.make(self.setup, batch)

    def keep(self, memory: StateMemory) -> None:
        """Take the memory of a state that is no longer used; may be called at any time."""
        self._kept = [memory]


def set_shapes(setup: Setup, context: Context, rows: int, tokens: int) -> None:
    """Shapes of all inputs for `rows` rows of `tokens` tokens, each with one row of logits."""
    sizes = {"batch": rows, "tokens": tokens, "rows": 1, "capacity": setup.capacity}
    for spec in setup.inputs:
        context.shape(spec["name"], tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec["shape"]))


def bind_caches(context: Context, caches: Caches) -> None:
    """A cache goes in and comes out at the same address: that is what updates it in place."""
    for (past, present), address in caches.items():
        context.bind(past, address)
        context.bind(present, address)


_COPIES_NOTE = (
    "what the engine copies inside cannot be seen from outside; every cache is bound in place, as input and output at "
    "one address"
)


class DeviceBuffers(StateBuffers):
    """The state of B sequences on the device, with slots for the whole capacity from the start."""

    def __init__(self, steps: Steps, batch: int, capacity: int) -> None:
        setup = steps.setup
        self._steps, self._setup, self._device = steps, setup, setup.device
        self.batch, self.capacity, self.layers = batch, capacity, setup.config.n_layer
        with self._device.lock:
            self._device.begin()
            self._memory = steps.memory(batch)
        weakref.finalize(self, steps.keep, self._memory).atexit = False
        self._turn = 0  # which of the two latents is the current one
        # What the device holds in the two places, known here without asking it.
        self._latents = [np.zeros((batch, setup.config.n_embd), np.float32) for _ in range(2)]
        self._logits = np.zeros((batch, setup.config.vocab_size), np.float32)

    @property
    def memory(self) -> StateMemory:
        """Where it all lies."""
        return self._memory

    @property
    def current_latent(self) -> int:
        """Address of the current latents (B, C)."""
        return self._memory.latents[self._turn]

    @property
    def copies_note(self) -> str:
        """Caches and latent are in the device's memory, of which arrays here are copies."""
        latent = ", and the new latent is fetched to the host after each step" if self._setup.config.memory else ""
        return f"{_COPIES_NOTE}{latent}"

    @property
    def latent(self) -> FloatArray:
        """(B, C), a view of what the host knows; (B, 0) for a model without memory."""
        latent = self._latents[self._turn]
        return latent if self._setup.config.memory else latent[:, :0]

    def set_latent(self, rows: IntArray, latent: FloatArray) -> None:
        """Replace the latent of some rows: rows (n), latent (n, C)."""
        if not self._setup.config.memory:
            return
        values = np.ascontiguousarray(latent.astype(self._setup.dtype))
        with self._device.lock:
            self._device.begin()
            for row, value in zip(rows, values, strict=True):
                self._device.copy_in(self._memory.latents[self._turn] + int(row) * self._setup.latent_bytes, value)
            self._device.synchronize()
        self._latents[self._turn][rows] = values

    def decode(self, tokens: IntArray, positions: IntArray, head: bool) -> FloatArray | None:
        """Run one token for each of the first rows. The head always runs."""
        rows = len(tokens)
        with self._device.lock:
            self._device.begin()
            logits, latent = self._steps.decode(rows).run(self._memory, self._turn, tokens, positions)
            self._logits[:rows] = logits  # other states use the step's arrays
            if self._setup.config.memory:
                self._latents[1 - self._turn][:rows] = latent
                self._turn = 1 - self._turn
        return self._logits[:rows] if head else None

    def read(self, block: Block, latents: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Run a block of one row, whose slots must be in the order of its positions."""
        if not np.array_equal(block.positions, block.slot + np.arange(len(block.tokens))):
            raise BackendError("this backend keeps cache slots in the order of positions, and a block does not")
        caches = self._memory.row(block.row)
        with self._device.lock:
            self._device.begin()
            step = self._steps.prefill()
            found, logits = step.run(caches, block.tokens, block.positions, block.slot, latents)
        return found, logits if block.head else logits[:0]

    def reorder(self, row: int, start: int, order: IntArray, move: bool) -> None:
        """Only the order of positions is possible here."""
        if not np.array_equal(order, np.arange(len(order))):
            raise BackendError("this backend keeps cache slots in the order of positions; read with stride 1")

    def cache(self, layer: int, length: int) -> tuple[FloatArray, FloatArray]:
        """Keys and values (B, G, length, D) of a layer, as copies on the host."""
        rows = [self.read_slots(row, 0, length, (layer,)) for row in range(self.batch)]
        names = contract.past_cache(layer)
        keys, values = (np.stack([row[name] for row in rows]).astype(np.float32) for name in names)
        return keys, values

    def read_slots(self, row: int, start: int, stop: int, layers: tuple[int, ...] | None = None) -> SlotArrays:
        """Copies (G, n, D) of a row's entries in slots start to stop - 1, by the names of the contract."""
        entries = {}
        with self._device.lock:
            self._device.begin()
            for name, address in self._row_caches(row, layers).items():
                entries[name] = self._empty_slots(stop - start)
                first = address + start * self._slot_bytes
                self._device.copy_rows_out(_as_rows(entries[name]), first, self._head_bytes)
            self._device.synchronize()
        return entries

    def write_slots(self, row: int, start: int, entries: Mapping[str, Array]) -> None:
        """Put entries into a row's slots from `start` on."""
        values = {name: np.ascontiguousarray(a.astype(self._setup.dtype, copy=False)) for name, a in entries.items()}
        with self._device.lock:
            self._device.begin()
            for name, address in self._row_caches(row, None).items():
                first = address + start * self._slot_bytes
                self._device.copy_rows_in(first, self._head_bytes, _as_rows(values[name]))
            self._device.synchronize()

    def copy_row(self, row: int, source: StateBuffers, index: int, length: int) -> None:
        """Copy on the device where both states are on this one; over the host otherwise."""
        if not isinstance(source, DeviceBuffers) or source._device is not self._device:
            super().copy_row(row, source, index, length)
            return
        assert source._head_bytes == self._head_bytes  # one device is of one backend
        sources, heads, width = source._row_caches(index, None), self._setup.config.n_kv_head, length * self._slot_bytes
        with self._device.lock:
            self._device.begin()
            for name, address in self._row_caches(row, None).items():
                self._device.copy_rows_within(address, sources[name], self._head_bytes, heads, width)
            self._device.synchronize()

    def _row_caches(self, row: int, layers: tuple[int, ...] | None) -> dict[str, int]:
        wanted = range(self.layers) if layers is None else layers
        names = {name for layer in wanted for name in contract.past_cache(layer)}
        return {past: address for (past, _), address in self._memory.row(row).items() if past in names}

    def _empty_slots(self, count: int) -> Array:
        config = self._setup.config
        return np.empty((config.n_kv_head, count, config.head_dim), self._setup.dtype)  # (G, n, D)

    @property
    def _slot_bytes(self) -> int:
        return self._setup.config.head_dim * self._setup.dtype.itemsize

    @property
    def _head_bytes(self) -> int:
        """From one head's slots to the next one's."""
        return self._setup.capacity * self._slot_bytes


class DeviceBackend:
    """A graph or an engine on a device, whose states share the steps. See `base.Backend`."""

    def __init__(self, name: str, precision: str, setup: Setup, max_seq_len: int, detail: str) -> None:
        self.name, self.precision, self.capacity, self.detail = name, precision, max_seq_len, detail
        self.setup, self.device, self.state_dtype = setup, setup.device, setup.dtype.name
        self.steps = Steps(setup)
        self.loops = True  # whether `generate` chooses tokens on the device
        self.loop_pool: Any = None  # of `device_loop`, once it is needed
        self.blocks = BlockLimits(setup.chunk_tokens, in_order=True, auto_iterates=False)

    def allocate(self, batch: int) -> DeviceBuffers:
        """Zeroed device memory for a state of this many sequences."""
        return DeviceBuffers(self.steps, batch, self.capacity)


def _as_rows(array: Array) -> Array:
    """(G, n, D) as (G, bytes), without a copy."""
    return array.reshape(array.shape[0], array[0].size).view(np.uint8)
