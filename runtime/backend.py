"""The seam between the decoder and whatever computes the graphs: two protocols, and the choice of a backend by name.

A backend owns the weights; `StateBuffers` owns the memory of one state and runs the graphs on it in place.
"""

from __future__ import annotations

from typing import Protocol

from lrt_deploy.errors import BackendError
from lrt_deploy.interface import FloatArray, IntArray

# Best first; `auto` takes the first that is present.
BACKENDS: tuple[str, ...] = ("ort-cpu",)


class StateBuffers(Protocol):
    """The device memory of B sequences: caches and latent."""

    batch: int
    capacity: int

    @property
    def latent(self) -> FloatArray:
        """(B, C) as a view or copy on the host; (B, 0) for a model without memory."""

    def set_latent(self, rows: IntArray, latent: FloatArray) -> None:
        """Replace the latent of some rows: rows (n), latent (n, C)."""

    def decode(self, tokens: IntArray, positions: IntArray, head: bool) -> FloatArray | None:
        """Run one token per row at positions (B), advancing caches and latent; logits (B, V) if `head`.

        The returned array is reused by the next call.
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

    def close(self) -> None:
        """Release the weights."""


def choose_backend(requested: str) -> str:
    """Resolve `auto`; refuse a name that this version does not have."""
    if requested == "auto":
        return BACKENDS[0]
    if requested not in BACKENDS:
        raise BackendError(f"there is no backend {requested!r}; this version has {', '.join(BACKENDS)} and auto")
    return requested
