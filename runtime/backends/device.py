"""The two calls of a graph on a GPU, bound to device memory: a decode step for n rows of a state, a block of one row.

What runs the graph is behind `Context`: a TensorRT engine or an ONNX Runtime session.

A decode step is bound once and then only run. Its first run is a real step and at the same time the warm-up that
TensorRT asks for; from the second run of a turn on it is a CUDA graph. Capturing records and runs nothing, so no step
happens twice; and if one did, it would change nothing, because a step reads one latent and writes the other, and its
cache slot counts only once the step is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lrt_deploy.bundle.engine_sidecar import DECODE, PREFILL
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import BackendError
from lrt_deploy.types import FloatArray, IntArray

from .cuda import Arena, Array, Device
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


class Runner(Protocol):
    """Makes contexts for `decode` (one token for each row) or `prefill` (a block of one row)."""

    def context(self, profile: str, stream: int) -> Context:
        """A new one, with working memory of its own."""


@dataclass(frozen=True)
class Setup:
    """What all steps of a backend share."""

    runner: Runner
    device: Device
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

    device: Device
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
    """One token for each of the first `rows` rows of a state."""

    def __init__(self, memory: StateMemory, rows: int) -> None:
        setup, self._arena, self._latents = memory.setup, memory.arena, memory.latents
        config, device = setup.config, setup.device
        self._setup, self._device, self.rows = setup, device, rows
        self._inputs = _Inputs.make(setup, memory.arena, rows)
        self._logits_address = memory.arena.allocate(rows * config.vocab_size * 4)
        self._logits: FloatArray = device.pinned((rows, config.vocab_size), np.dtype(np.float32))
        # The latent that each turn leaves, fetched with the logits: it is as small as they are, and often asked for.
        self._fetched = [device.pinned((rows, config.n_embd), setup.dtype) for _ in memory.latents]
        self._context = setup.runner.context(DECODE, device.stream)
        self._bind(memory.caches)
        self._warm = False
        self._graphs: dict[int, Any] = {}

    def run(self, turn: int, tokens: IntArray, positions: IntArray) -> tuple[FloatArray, Array]:
        """From the latent `turn` to the other one; logits (n, V) and the new latent (n, C), reused by later calls."""
        self._inputs.host[:3, : self.rows] = tokens, positions, positions
        self._inputs.gather(tokens)
        if not (self._warm and self._setup.cuda_graph):
            self._enqueue(turn)
        else:
            if turn not in self._graphs:
                self._graphs[turn] = self._capture(turn)
            self._device.launch(self._graphs[turn])
        self._device.synchronize()
        self._warm = True
        return self._logits, self._fetched[1 - turn]

    def _capture(self, turn: int) -> Any:  # noqa: ANN401 - the device's handle
        try:
            return self._arena.capture(lambda: self._enqueue(turn))
        except BackendError as error:
            raise BackendError(f"{error}; open_decoder(..., cuda_graph=False) decodes without a CUDA graph") from error

    def _bind(self, caches: Caches) -> None:
        setup, context, rows = self._setup, self._context, self.rows
        set_shapes(setup, context, rows, 1)
        self._inputs.bind(context)
        context.bind("logits", self._logits_address)
        bind_caches(context, caches)
        self._bind_latents(0)
        context.ready()

    def _bind_latents(self, turn: int) -> None:
        if self._setup.config.memory:
            self._context.bind("past_latent", self._latents[turn])
            self._context.bind("present_latent", self._latents[1 - turn])

    def _enqueue(self, turn: int) -> None:
        self._inputs.send(self.rows)
        self._bind_latents(turn)
        self._context.enqueue(self._device.stream)
        self._device.copy_out(self._logits, self._logits_address)
        if self._setup.config.memory:
            self._device.copy_out(self._fetched[1 - turn], self._latents[1 - turn])


class PrefillStep:
    """Up to a chunk of tokens of one row of any state; shared by all states of a backend."""

    def __init__(self, setup: Setup, arena: Arena) -> None:
        config, device = setup.config, setup.device
        self._setup, self._device = setup, device
        self.chunk_tokens = setup.chunk_tokens
        self._inputs = _Inputs.make(setup, arena, self.chunk_tokens)
        self._latents = [arena.allocate(self.chunk_tokens * setup.latent_bytes) for _ in range(2)]
        self._host_latents = device.pinned((self.chunk_tokens, config.n_embd), setup.dtype)
        self._logits_address = arena.allocate(config.vocab_size * 4)
        self._logits: FloatArray = device.pinned((config.vocab_size,), np.dtype(np.float32))
        self._context = setup.runner.context(PREFILL, device.stream)
        self._inputs.bind(self._context)
        self._context.bind("logits", self._logits_address)
        if config.memory:
            self._context.bind("past_latent", self._latents[0])
            self._context.bind("present_latent", self._latents[1])

    def run(
        self, caches: Caches, ids: IntArray, positions: IntArray, slot: int, latents: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Tokens (n) into slots from `slot` on; the latent of each (n, C) and the logits (V) after the last."""
        count, host = len(ids), self._inputs.host
        host[0, :count], host[1, :count], host[2, 0], host[3, 0] = ids, positions, slot, count - 1
        self._inputs.gather(ids)
        self._inputs.send(count)
        set_shapes(self._setup, self._context, 1, count)
        bind_caches(self._context, caches)
        self._context.ready()
        fetched = self._host_latents[:count]
        if self._setup.config.memory:
            fetched[...] = latents
            self._device.copy_in(self._latents[0], fetched)
        self._context.enqueue(self._device.stream)
        self._device.copy_out(self._logits, self._logits_address)
        if self._setup.config.memory:
            self._device.copy_out(fetched, self._latents[1])
        self._device.synchronize()
        return (fetched.astype(np.float32) if self._setup.config.memory else latents), self._logits


@dataclass
class StateMemory:
    """Device memory of one state: a cache for each pair of the contract, (B, G, S, D), and two latents (B, C)."""

    setup: Setup
    arena: Arena
    caches: Caches = field(default_factory=dict)
    latents: tuple[int, int] = (0, 0)

    @classmethod
    def make(cls, setup: Setup, batch: int) -> StateMemory:
        """All of it zeroed."""
        memory = cls(setup, Arena(setup.device))
        allocate = memory.arena.allocate
        for pair in setup.state:
            if pair["in_place"]:
                memory.caches[pair["past"], pair["present"]] = allocate(batch * setup.cache_row_bytes)
        size = batch * setup.latent_bytes
        memory.latents = (allocate(size), allocate(size))
        return memory

    def row(self, row: int) -> Caches:
        """The caches of one row."""
        return {names: address + row * self.setup.cache_row_bytes for names, address in self.caches.items()}


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
