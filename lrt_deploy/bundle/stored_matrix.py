"""One matrix or table as a bundle stores it, and the float32 matrix that the graphs multiply by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix (K, N) or table as a bundle stores it.

    Integers have `scales`, (N) for whole columns or (blocks, N) for blocks of `block` rows, of which the last may have
    fewer; floats have none.
    """

    name: str
    dtype: str  # int4, int8, float16, bfloat16 or float32
    values: npt.NDArray[Any]
    scales: npt.NDArray[np.float16] | None = None
    block: int | None = None

    def dequantized(self) -> Floats:
        """Return the matrix (K, N) that a graph multiplies by."""
        values: Floats = self.values.astype(np.float32)
        return values if self.scales is None else values * self.steps()

    def steps(self) -> Floats:
        """Return the scale of each weight, (K, N)."""
        assert self.scales is not None
        scales = self.scales.astype(np.float32)
        rows, columns = self.values.shape
        return np.broadcast_to(scales, (rows, columns)) if self.block is None else scales.repeat(self.block, 0)[:rows]
