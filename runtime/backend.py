"""The seam between the decoder and whatever computes the graphs: two protocols, and the choice of a backend by name.

A backend owns the weights; `StateBuffers` owns the memory of one state and runs the graphs on it in place. It offers
two calls: `decode` (one token for every row) and `read` (several tokens of one row, which prefill is made of).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lrt_deploy.errors import BackendError
from lrt_deploy.interface import FloatArray, IntArray

# Best first; `auto` takes the first that is present.
BACKENDS: tuple[str, ...] = ("ort-cpu",)


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
    def latent(self) -> FloatArray:
        """(B, C) as a view or copy on the host; (B, 0) for a model without memory."""

    def set_latent(self, rows: IntArray, latent: FloatArray) -> None:
        """Replace the latent of some rows: rows (n), latent (n, C)."""

    def decode(self, tokens: IntArray, positions: IntArray, head: bool) -> FloatArray | None:
        """Run one token per row at positions (B), advancing caches and latent; logits (B, V) if `head`.

        The returned array is reused by the next call.
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

    def cache(self, layer: int, length: int) -> tuple[FloatArray, FloatArray]:
        """Keys and values (B, G, length, D) of a layer, as views or copies on the host."""


class Backend(Protocol):
    """A loaded precision of a bundle."""

    name: str
    precision: str
    detail: str  # what runs it, for people: provider, threads

    def allocate(self, batch: int) -> StateBuffers:
        """Zeroed buffers for a state of this many sequences."""


def choose_backend(requested: str) -> str:
    """Resolve `auto`; refuse a name that this version does not have."""
    if requested == "auto":
        return BACKENDS[0]
    if requested not in BACKENDS:
        raise BackendError(f"there is no backend {requested!r}; this version has {', '.join(BACKENDS)} and auto")
    return requested
