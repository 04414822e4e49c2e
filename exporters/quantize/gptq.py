"""GPTQ: round a matrix row by row so that later rows make up for the error of earlier ones, on measured inputs.

Rounding to nearest treats all inputs alike, but the inputs of a matrix are correlated: the error that rounding one row
makes in the product can be undone in part by the rows that are not rounded yet. With H the second moment of the inputs,
the best correction after each row follows from the Cholesky factor of its inverse (Frantar et al., 2023). Scales are
chosen as in `qdq`, for each block of rows when its turn comes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from lrt_deploy.bundle.precisions import Format

from .qdq import Floats, quantized, weight_scales

# Added to H's diagonal, as a share of its mean: limits corrections along inputs that calibration rarely had.
_DAMPING = 0.01

Doubles = npt.NDArray[np.float64]


def round_by_gptq(
    weight: Floats, moment: Floats, kind: Format
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.generic]]:
    """Return scales (blocks, N) and integers (K, N) of a matrix (K, N) whose inputs have the second moment (K, K)."""
    assert kind.block is not None
    rest, factor = weight.astype(np.float64), _inverse_factor(moment)
    scales, integers, one_row = [], [], replace(kind, block=1)
    for start in range(0, len(rest), kind.block):
        rows = slice(start, min(start + kind.block, len(rest)))  # the last block may have fewer
        steps = weight_scales(rest[rows].astype(np.float32), kind)
        errors = np.empty_like(rest[rows])
        for i, row in enumerate(range(start, rows.stop)):
            integer = quantized(rest[row : row + 1].astype(np.float32), steps, one_row)
            integers.append(integer)
            errors[i] = (rest[row] - integer[0].astype(np.float64) * steps[0]) / factor[row, row]
            rest[row + 1 : rows.stop] -= np.outer(factor[row, row + 1 : rows.stop], errors[i])
        rest[rows.stop :] -= factor[rows, rows.stop :].T @ errors
        scales.append(steps)
    return np.concatenate(scales), np.concatenate(integers)


def _inverse_factor(moment: Floats) -> Doubles:
    """Return U (K, K), upper, with U^T U the inverse of the damped moment.

    With rows and columns in reverse order, the moment is L L^T, and U is the inverse of L in that order.
    """
    damped = torch.tensor(moment, dtype=torch.float64)  # a copy
    mean = float(damped.diagonal().mean())
    damped.diagonal().add_(_DAMPING * mean if mean > 0 else 1.0)
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False)
    factor: Doubles = inverse.flip(0, 1).numpy()
    return factor
