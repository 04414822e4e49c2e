"""How large the numbers that pass a point are, and the int8 scale that suits them best.

One histogram of absolute values in constant memory: when a value passes its range, the range doubles and bins are
merged in pairs. Knows nothing of models.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

INT8_LEVELS = 127  # symmetric: -127 to 127, no zero point
_BINS = 4096  # 32 a level at the full range
_TINY = 1e-30
# Candidates for the largest number that is still represented, as shares of the largest one seen.
_SHARES = np.geomspace(0.02, 1.0, 80)


class Histogram:
    """Counts of absolute values; `largest` is exact. `add` raises ValueError for a number that is not finite."""

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(_BINS, np.int64)
        self.limit, self.largest = 0.0, 0.0

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Count the values of an array of any shape."""
        sizes = np.abs(values.reshape(-1))
        largest = float(sizes.max(initial=0.0))
        if not np.isfinite(largest):
            raise ValueError("not finite")
        self.largest = max(self.largest, largest)
        if self.limit == 0.0:
            if largest == 0.0:
                self.counts[0] += sizes.size
                return
            self.limit = largest
        while self.largest > self.limit:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(_BINS // 2, np.int64)])
            self.limit *= 2
        if self.limit < _TINY:  # the factor would be infinite in float32
            sizes = sizes.astype(np.float64)
        bins = np.minimum((sizes * (_BINS / self.limit)).astype(np.int64), _BINS - 1)
        self.counts += np.bincount(bins, minlength=_BINS)

    def scale(self) -> float:
        """The step of a symmetric int8 grid with the least mean squared error: few outliers may be worth clipping.

        Where nothing but zeros passed there is nothing to go by, and the grid spans -1 to 1.
        """
        if self.largest == 0.0:
            return 1.0 / INT8_LEVELS
        centers = (np.arange(_BINS) + 0.5) * (self.limit / _BINS)
        seen = np.flatnonzero(self.counts)
        seen = seen[seen > 0]  # the first bin is zero, or close enough
        values, counts = centers[seen], self.counts[seen]
        steps = self.largest * _SHARES / INT8_LEVELS
        rounded = np.minimum(np.rint(values / steps[:, None]), INT8_LEVELS) * steps[:, None]  # (candidates, bins)
        return float(steps[np.argmin(((rounded - values) ** 2 * counts).sum(1))])

    def clipped(self, scale: float) -> float:
        """The share of values beyond the range of a scale."""
        beyond = int(np.ceil(scale * INT8_LEVELS * _BINS / self.limit)) if self.limit else _BINS
        return float(self.counts[beyond:].sum() / max(1, self.counts.sum()))
