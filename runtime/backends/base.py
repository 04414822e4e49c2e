"""The protocols between the decoder and what computes the graphs. `opening` says which backend is taken.

A backend owns the weights; `StateBuffers` owns the memory of one state and runs the graphs on it in place. It offers
two calls that compute: `decode` (one token for every row) and `read` (several tokens of one row, for prefill); and
three that move cache entries: `read_slots` and `write_slots` for saving, `copy_row` for forking and moving rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lrt_deploy.errors import NonFiniteError
from lrt_deploy.types import FloatArray, IntArray

from .cuda import CudaDevice


@dataclass(frozen=True)
class BlockLimits:
    """What blocks a backend reads: how many tokens at most, and whether slots must be in the order of positions.

    `auto_iterates` says whether `auto` may read a prompt by iteration. It may not where every pass would copy the
    chunk's cache entries from the device to the host to compare them.
    """

    tokens: int | None = None
    in_order: bool = False
    auto_iterates: bool = True


# Entries of one row in every cache, (G, n, D) each in the cache's own type, by the contract's names: `past_key_0`, ...
SlotArrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Block:
    """Tokens of one row to compute in one call, at any positions, written to consecutive slots from `slot` on.

    They see the slots below `end`, and of those the ones whose position (see `StateBuffers.reorder`) is in their
    window. Slots below `ordered` hold their own position.
    """

    row: int
    tokens: IntArray  # (n)
    positions: IntArray  # (n)
    slot: int
    end: int
    ordered: int
    head: bool  # whether the logits after the last token are wanted


class StateBuffers(Protocol):
    """The memory of B sequences: caches and latent."""

    batch: int
    capacity: int
    layers: int

    @property
    def copies_note(self) -> str | None:
        """Why it cannot be counted from outside which state a step copies; None where arrays here are that state."""

    @property
    def latent(self) -> FloatArray:
        """(B, C) as a view or copy on the host; (B, 0) for a model without memory."""

    def set_latent(self, rows: IntArray, latent: FloatArray) -> None:
        """Replace the latent of some rows: rows (n), latent (n, C)."""

    def expect(self, total: int) -> None:
        """Say how many tokens the longest row will hold after the prompts that follow; caches may grow that far."""
        return  # by default they are as long as the capacity

    def fit(self, lengths: Sequence[int], soon: int = 0) -> None:
        """Do a part of the work of fitting the caches to rows of these lengths: between two steps, one cache at most.

        Caches that are soon full, or too small for a row of `soon` tokens that will be added, grow. Those of twice the
        size or more shrink. Contents stay.
        """
        return  # by default as above

    def decode(self, tokens: IntArray, positions: IntArray, head: bool) -> FloatArray | None:
        """Run one token for each of the first rows, tokens and positions (n <= B); logits (n, V) if `head`.

        Advances caches and latent of these rows; the latent of the others is lost. The returned array is reused by
        the next call.
        """

    def read(self, block: Block, latents: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Run a block with the latent of each token's predecessor (n, C); writes the caches, leaves `latent` alone.

        Returns the latent of each token (n, C) and the logits (V) after the last one, or (0) without head; both are
        reused by the next call.
        """

    def reorder(self, row: int, start: int, order: IntArray, move: bool) -> None:
        """Declare that slot start + i holds position start + order[i], for all rows while one row is being read.

        With `move`, the row's cache entries, until now in that order, are put back in the order of their positions.
        """

    def reset_order(self) -> None:
        """Forget every order that was declared: a reading did not end. Slots hold their own positions again."""
        return  # by default they always do

    def cache(self, layer: int, length: int) -> tuple[FloatArray, FloatArray]:
        """Keys and values (B, G, length, D) of a layer, as views or copies on the host."""

    def read_slots(self, row: int, start: int, stop: int) -> SlotArrays:
        """A row's entries in slots start to stop - 1 of every cache, as views or copies on the host."""

    def write_slots(self, row: int, start: int, entries: Mapping[str, NDArray[Any]]) -> None:
        """Put entries, as `read_slots` gives them, into a row's slots from `start` on."""

    def copy_row(self, row: int, source: StateBuffers, index: int, length: int) -> None:
        """Make the first `length` slots of a row those of another row, of these or other buffers of the same model.

        May be interrupted and done again. This is the way over the host; buffers on a device have one of their own.
        """
        if length:
            self.write_slots(row, 0, source.read_slots(index, 0, length))


class Backend(Protocol):
    """A loaded precision of a bundle."""

    name: str
    precision: str
    detail: str  # what runs it, for people: provider, threads
    blocks: BlockLimits
    state_dtype: str  # of the caches: float32, float16 or bfloat16

    @property
    def device(self) -> CudaDevice | None:
        """The GPU that holds weights and states; None where they are in the host's memory."""

    def allocate(self, batch: int) -> StateBuffers:
        """Zeroed buffers for a state of this many sequences."""


def check_finite(logits: FloatArray, positions: Sequence[int] | IntArray, backend: Backend) -> None:
    """Refuse logits (B, V) that no token may be chosen from; positions (B) are those of the tokens before them."""
    finite = np.isfinite(logits)
    if finite.all():
        return
    rows = np.flatnonzero(~finite.all(axis=1))
    raise NonFiniteError(
        f"{backend.name} in {backend.precision} produced {int((~finite).sum())} logits that are not finite, first "
        f"in row {rows[0]} after {int(positions[rows[0]]) + 1} tokens; no token was chosen from them",
        rows.tolist(),
    )
