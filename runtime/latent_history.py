"""The latent that each token of each row left: what makes a recurrent state rewindable.

A cache is cut by forgetting slots; a latent cannot be computed backwards. So the latent of every token is kept, a few
kilobytes each, on the host and in float32, which holds every narrower type exactly. It is a record: what a step reads
is elsewhere, and `lrt-deploy bench` counts it apart (`latent_record_bytes_per_step`). Space is set aside for the whole
capacity, as for the caches, and the system commits its pages only as tokens come. Entries beyond a row's length do not
count; the length itself is the state's to know.
"""

from __future__ import annotations

import numpy as np

from lrt_deploy.types import FloatArray, IntArray


class LatentHistory:
    """Latents by row and position."""

    def __init__(self, rows: int, capacity: int, width: int) -> None:
        self._latents = np.zeros((rows, capacity, width), np.float32)  # (B, S, C)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one latent."""
        return self._latents.shape[2] * self._latents.itemsize

    def write_step(self, positions: IntArray, latents: FloatArray) -> None:
        """What one token of each of the first n rows left: positions (n), and latents (n, C) or of more rows."""
        for row, position in enumerate(positions.tolist()):
            self._latents[row, position] = latents[row]

    def write_row(self, row: int, start: int, latents: FloatArray) -> None:
        """What consecutive tokens of one row left, (n, C), from position `start` on."""
        self._latents[row, start : start + len(latents)] = latents

    def live(self, row: int, length: int) -> FloatArray:
        """A view (length, C) of the latents of a row's first tokens."""
        return self._latents[row, :length]

    def after(self, row: int, length: int) -> FloatArray:
        """A view (C) of the latent carried after `length` tokens: zeros after none."""
        if length == 0:
            return np.zeros(self._latents.shape[2], np.float32)
        latent: FloatArray = self._latents[row, length - 1]
        return latent
