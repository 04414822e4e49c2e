"""Estimate how far an iteration is from its fixed point, from what it changes: a measured bound, with margins.

The unit is the *block*: a sweep over a chunk computes its positions in `blocks` blocks in turn, each with all that is
known by then, and every block's change against the sweep before it is one number. Comparing a block with the same
block one sweep earlier gives a ratio, so that interleaved sweeps show their contraction `blocks` times a sweep.

It is a measurement and not a proof. Knows nothing of graphs, tokens or tolerances. How far true errors stayed below the
bound, and how often they did not: docs/numerics.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrt_deploy.tolerances import FLOAT32_RESIDUAL_NOISE

CLEAR_CHANGE = 2.0  # the first change is 5 to 8: it stands above the noise of every precision
LARGE_VALUE = 50.0  # from here on, 5e-5 is less than eight units in the last place of float32
SWEEPS_OF_RATIOS = 3  # contraction drifts, so that older ratios say less
# While no block has shown more than one ratio, the margin is the larger one; keys and values vary more than latents.
FIRST_MARGIN, FIRST_MARGIN_CACHE, MARGIN = 4.0, 6.0, 3.0


def ratios(changes: Sequence[float], blocks: int, noise: float) -> list[float]:
    """Of changes and those one sweep before, as far as these stand above rounding noise."""
    pairs = zip(changes, changes[blocks:], strict=False)
    return [b / a for a, b in pairs if a > min(20 * noise, CLEAR_CHANGE)]


def contraction(changes: Sequence[float], blocks: int = 1, noise: float = FLOAT32_RESIDUAL_NOISE) -> float:
    """By how much a sweep shrinks the error: the largest ratio that the last three sweeps showed.

    Where all changes before the last sweep are noise, memory is too weak for a ratio: 1/2 is then on the safe side.
    """
    found = ratios(changes, blocks, noise)[-SWEEPS_OF_RATIOS * blocks :]
    return max(found, default=0.5 if len(changes) > blocks else math.inf)


def error_bound(
    changes: Sequence[float],
    blocks: int = 1,
    noise: float = FLOAT32_RESIDUAL_NOISE,
    first_margin: float = FIRST_MARGIN,
) -> float:
    """Bound the error after the last of several block changes: margin * change * q / (1 - q), plus noise.

    Without a margin this is the geometric series of what is still to come, `change` being the largest of the last
    sweep's. The margin pays for q being measured and not known: MARGIN, and `first_margin` while one sweep alone has
    shown it.
    """
    q = contraction(changes, blocks, noise)
    if not q < 1:
        return math.inf
    margin = MARGIN if len(ratios(changes, blocks, noise)) > blocks else first_margin
    return margin * float(np.max(changes[-blocks:])) * q / (1 - q) + noise  # not max, which can lose NaN


def largest_change(before: Mapping[str, NDArray[Any]], after: Mapping[str, NDArray[Any]]) -> float:
    """Over all arrays; relative to LARGE_VALUE in an array that holds larger numbers, because values are not normed.

    `before` is used up: differences are taken in place.
    """
    largest = 0.0
    for name, old in before.items():
        new = after[name]
        change = _largest(np.subtract(new, old, out=old))
        if not change <= largest:  # also where it is NaN; else no scale can make it the largest
            scale = max(1.0, _largest(new) / LARGE_VALUE)
            largest = np.maximum(largest, change / scale)  # unlike max, keeps NaN
    return float(largest)


def _largest(array: NDArray[Any]) -> float:
    """Absolute value, without an array of absolute values."""
    return float(np.maximum(array.max(initial=0), -array.min(initial=0)))
