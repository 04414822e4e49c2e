"""The state of B sequences in device memory, and the calls that the decoder makes on it.

The same for TensorRT and for ONNX Runtime on a GPU: see `device_steps` for what runs. Logits and the latent, a few
kilobytes, come back after each step; caches only where somebody asks for them. Slots are kept in the order of
positions, because the mask of the `full` flavour knows no other.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import numpy as np

from lrt_deploy.bundle import contract
from lrt_deploy.errors import BackendError
from lrt_deploy.types import FloatArray, IntArray

from .base import Block, SlotArrays
from .cuda import Array
from .device import DecodeStep, PrefillStep, Setup, StateMemory

_COPIES_NOTE = (
    "what the engine copies inside cannot be seen from outside; every cache is bound in place, as input and output at "
    "one address"
)


class DeviceBuffers:
    """The state of B sequences on the device. See `backend.StateBuffers`."""

    def __init__(self, setup: Setup, prefill: PrefillStep, batch: int, capacity: int) -> None:
        self._setup, self._device, self._prefill = setup, setup.device, prefill
        self.batch, self.capacity, self.layers = batch, capacity, setup.config.n_layer
        self._memory = StateMemory.make(setup, batch)
        self._steps: dict[int, DecodeStep] = {}
        self._turn = 0  # which of the two latents is the current one
        # What the device holds in the two places, known here without asking it.
        self._latents = [np.zeros((batch, setup.config.n_embd), np.float32) for _ in range(2)]
        weakref.finalize(self, self._memory.arena.release).atexit = False

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
        for row, value in zip(rows, values, strict=True):
            self._device.copy_in(self._memory.latents[self._turn] + int(row) * self._setup.latent_bytes, value)
        self._device.synchronize()
        self._latents[self._turn][rows] = values

    def expect(self, total: int) -> None:
        """Caches are as long as the capacity from the start."""

    def decode(self, tokens: IntArray, positions: IntArray, head: bool) -> FloatArray | None:
        """Run one token for each of the first rows; a step is bound per number of rows. The head always runs."""
        rows = len(tokens)
        if rows not in self._steps:
            self._steps[rows] = DecodeStep(self._memory, rows)
        logits, latent = self._steps[rows].run(self._turn, tokens, positions)
        if self._setup.config.memory:
            self._turn = 1 - self._turn
            self._latents[self._turn][:rows] = latent
        return logits if head else None

    def read(self, block: Block, latents: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Run a block of one row, whose slots must be in the order of its positions."""
        if not np.array_equal(block.positions, block.slot + np.arange(len(block.tokens))):
            raise BackendError("this backend keeps cache slots in the order of positions, and a block does not")
        caches = self._memory.row(block.row)
        found, logits = self._prefill.run(caches, block.tokens, block.positions, block.slot, latents)
        return found, logits if block.head else logits[:0]

    def reorder(self, row: int, start: int, order: IntArray, move: bool) -> None:
        """Only the order of positions is possible here."""
        if not np.array_equal(order, np.arange(len(order))):
            raise BackendError("this backend keeps cache slots in the order of positions; read with stride 1")

    def reset_order(self) -> None:
        """Slots are always in the order of positions."""

    def cache(self, layer: int, length: int) -> tuple[FloatArray, FloatArray]:
        """Keys and values (B, G, length, D) of a layer, as copies on the host."""
        rows = [self.read_slots(row, 0, length, (layer,)) for row in range(self.batch)]
        names = contract.past_key(layer), contract.past_value(layer)
        keys, values = (np.stack([row[name] for row in rows]).astype(np.float32) for name in names)
        return keys, values

    def read_slots(self, row: int, start: int, stop: int, layers: tuple[int, ...] | None = None) -> SlotArrays:
        """Copies (G, n, D) of a row's entries in slots start to stop - 1, by the names of the contract."""
        entries = {}
        for name, address in self._row_caches(row, layers).items():
            entries[name] = self._empty_slots(stop - start)
            self._device.copy_rows_out(_as_rows(entries[name]), address + start * self._slot_bytes, self._head_bytes)
        self._device.synchronize()
        return entries

    def write_slots(self, row: int, start: int, entries: Mapping[str, Array]) -> None:
        """Put entries into a row's slots from `start` on."""
        for name, address in self._row_caches(row, None).items():
            values = np.ascontiguousarray(entries[name].astype(self._setup.dtype, copy=False))
            self._device.copy_rows_in(address + start * self._slot_bytes, self._head_bytes, _as_rows(values))
        self._device.synchronize()

    def _row_caches(self, row: int, layers: tuple[int, ...] | None) -> dict[str, int]:
        wanted = range(self.layers) if layers is None else layers
        names = {name(layer) for layer in wanted for name in (contract.past_key, contract.past_value)}
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


def _as_rows(array: Array) -> Array:
    """(G, n, D) as (G, bytes), without a copy."""
    return array.reshape(array.shape[0], array[0].size).view(np.uint8)
