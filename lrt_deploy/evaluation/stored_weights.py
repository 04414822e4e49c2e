"""Judge the part `weights` of parity: every stored matrix and table against the checkpoint's, without running anything.

Compared are the numbers that the graphs multiply by, one matrix in memory at a time:

- Rounded to nearest: every scale is the float16 number that the block's largest weight implies, and every weight lies
  within half a step of its integer, or beyond the end of the grid at the end.
- Rounded by GPTQ (`export --compensate`): rows correct the errors of other rows, so errors of the whole matrix, of
  each row and column, and of its norm are bounded by what was measured.
- Floats: the nearest number of their type; in fp32 the same number.

The expected matrix is built by the table of `bundle.weights`, not by the model that an export traces.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lrt_deploy import tolerances
from lrt_deploy.bundle.precisions import base_dtype
from lrt_deploy.bundle.weights import EMBEDDING_TABLES, Floats, Source, StoredMatrix, weight_sources
from lrt_deploy.config import LRTConfig

# The grid of an int4 block may end at one of these shares of its largest weight: docs/precisions.md.
INT4_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


@dataclass(frozen=True)
class MatrixCheck:
    """One matrix against the checkpoint's. `found` and `allowed` are in the unit of the strictest test that was made.

    `fault` says what is wrong, None where nothing is; `clipped` counts weights beyond the ends of their grid.
    """

    matrix: str
    stored: str
    found: float
    allowed: float
    unit: str
    clipped: int = 0
    fault: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the matrix is the checkpoint's, as far as its bits allow."""
        return self.fault is None

    @property
    def badness(self) -> float:
        """The error as a share of its limit, above 2 for any fault: the measure of the worst matrix."""
        share = self.found / self.allowed if self.allowed > 0 else (0.0 if self.found == 0 else math.inf)
        return share if self.passed else 2.0 + (share if math.isfinite(share) else 1e300)


@dataclass(frozen=True)
class WeightsPart:
    """The part `weights` of a verdict: all matrices and tables of one precision; `failed` has names of wrong ones."""

    passed: bool
    line: str
    worst: MatrixCheck | None = None
    checked: int = 0
    failed: tuple[str, ...] = ()


def check_weights(
    stored: Iterable[StoredMatrix],
    tensors: Mapping[str, Any],
    config: LRTConfig,
    precision: str,
    compensated: bool = False,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> WeightsPart:
    """Compare every stored matrix with the checkpoint's `tensors`, by the names of its file.

    `tensors` are arrays, torch's tensors or `checkpoint.LazyTensor`s, each read when it is needed; `compensated` says
    that the manifest states GPTQ.
    """
    sources = weight_sources(config)
    checks: list[MatrixCheck] = []
    names = [name for name, source in sources.items() if source.transposed or name in EMBEDDING_TABLES]
    for matrix in stored:
        expected = expected_matrix(sources[matrix.name], tensors)
        checks.append(check_matrix(matrix, expected, precision, compensated))
        progress("comparing the stored weights", len(checks), len(names))
    failed = tuple(check.matrix for check in checks if not check.passed)
    if not checks:
        return WeightsPart(True, "weights: nothing was stored")
    worst = max(checks, key=lambda check: check.badness)
    if failed:
        others = f"; {len(failed)} of {len(checks)} matrices are off" if len(failed) > 1 else ""
        line = f"{worst.matrix} is not the checkpoint's: {worst.fault}{others}"
    else:
        size = f"worst {worst.matrix} by {worst.found:.3g} {worst.unit} (limit {worst.allowed:.3g})"
        size = "every number the nearest" if worst.allowed == 0 else size
        line = f"{len(checks)} of {len(checks)} stored matrices are the checkpoint's, {size}"
    return WeightsPart(not failed, f"weights: {line}", worst, len(checks), failed)


def expected_matrix(source: Source, tensors: Mapping[str, Any]) -> Floats:
    """The float32 matrix (K, N) of the checkpoint, in the orientation of the graphs."""
    parts = []
    for name in source.names:
        read = tensors[name].load() if hasattr(tensors[name], "load") else tensors[name]
        # numpy does not know torch's bfloat16.
        part = np.asarray(read if isinstance(read, np.ndarray) else read.float(), np.float32)
        parts.append(part.T if source.transposed else part)
    return np.concatenate(parts, axis=-1)


def check_matrix(stored: StoredMatrix, expected: Floats, precision: str, compensated: bool = False) -> MatrixCheck:
    """Compare one stored matrix with the expected one (K, N)."""
    if stored.values.shape != expected.shape:
        fault = f"it has the shape {stored.values.shape}, expected {expected.shape}"
        return MatrixCheck(stored.name, stored.dtype, math.inf, 0.0, "", fault=fault)
    if stored.scales is None:
        return _check_floats(stored, expected, precision)
    rows = "a column" if stored.block is None else f"{stored.block} rows of a column"
    kind = f"{stored.dtype}, a scale for {rows}, rounded to nearest"
    nearest = _check_scales(stored, expected, kind) or _check_integers(stored, expected, kind)
    if nearest.passed or not compensated:
        return nearest
    return _check_gptq(stored, expected)


def _check_floats(stored: StoredMatrix, expected: Floats, precision: str) -> MatrixCheck:
    """Floats of the precision's own type are the nearest, floats of any other type the same number."""
    found = stored.dequantized()
    own = precision != "fp32" and stored.dtype == base_dtype(precision, "full")
    with np.errstate(over="ignore"):
        nearest = expected.astype(stored.values.dtype).astype(np.float32) if own else expected
    off = ~(found == nearest)
    kind = f"{stored.dtype}, {'rounded to nearest' if own else 'exact'}"
    fault = None
    if off.any():
        at = _place(np.where(off, np.abs(found.astype(np.float64) - expected), 0.0))
        fault = (
            f"row {at[0]}, column {at[1]} is {found[at]:.6g} and the checkpoint's {expected[at]:.6g} "
            f"({int(off.sum())} of {off.size} numbers differ by more than {stored.dtype} rounds)"
        )
    return MatrixCheck(stored.name, kind, float(off.sum()), 0.0, "numbers that are not the nearest", fault=fault)


def _check_integers(stored: StoredMatrix, expected: Floats, kind: str) -> MatrixCheck:
    largest = _largest(stored)
    steps = stored.steps().astype(np.float64)
    weights = expected.astype(np.float64) / steps  # (K, N) in steps
    clipped = np.abs(weights) > largest + 0.5
    integers = stored.values.astype(np.float64)
    errors = np.abs(np.clip(weights, -largest, largest) - integers)
    at = _place(errors)
    found, limit, fault = float(errors[at]), tolerances.ROUNDING_STEPS, None
    if not found <= limit:
        fault = (
            f"row {at[0]}, column {at[1]} is {integers[at]:.0f} steps of {steps[at]:.3g}, and the checkpoint's "
            f"{expected[at]:.6g} is {weights[at]:.3f} ({int((errors > limit).sum())} of {errors.size} are off by more "
            "than half a step)"
        )
    return MatrixCheck(stored.name, kind, found, limit, "steps", int(clipped.sum()), fault)


def _largest(stored: StoredMatrix) -> int:
    return 7 if stored.dtype == "int4" else 127


def _check_scales(stored: StoredMatrix, expected: Floats, kind: str) -> MatrixCheck | None:
    """Find the first scale that the weights do not imply; None without one."""
    assert stored.scales is not None
    largest = _largest(stored)
    blocks = _in_blocks(expected, stored.block)  # (blocks, rows, N)
    scales = stored.scales.reshape(len(blocks), -1)
    if scales.shape[1] != expected.shape[1] or not np.isfinite(scales).all() or (scales <= 0).any():
        shape = f"{len(blocks)} x {expected.shape[1]}"
        fault = f"its scales, of shape {stored.scales.shape}, are not {shape} positive numbers"
        return MatrixCheck(stored.name, kind, math.inf, 0.0, "", fault=fault)
    ends = np.abs(blocks).max(axis=1).astype(np.float64)  # (blocks, N)
    shares = INT4_SHARES if largest == 7 else (1.0,)
    least, used = np.full(scales.shape, np.inf), np.full(scales.shape, np.nan)
    for share in shares:
        exact = ends * share / largest
        error = _squared_error(blocks, exact, largest) if len(shares) > 1 else np.zeros_like(exact)
        least = np.minimum(least, error)
        used = np.where(_rounds_to(exact, scales), np.fmin(used, error), used)  # tiny scales round alike
    zero = ends == 0  # any scale is right
    off = np.isnan(used) & ~zero
    if off.any():
        at = _place(off)
        implied = ends[at] / largest
        which = f"column {at[1]}" if stored.block is None else f"column {at[1]}, rows from {at[0] * stored.block} on"
        between = "" if len(shares) == 1 else f" or {', '.join(map(str, shares[1:]))} times that"
        fault = (
            f"the scale of {which} is {float(scales[at]):.6g}, and the checkpoint's weights imply "
            f"{float(np.float16(implied)):.6g}{between} ({int(off.sum())} of {off.size} scales are off)"
        )
        found = min(abs(float(scales[at]) / (implied * share) - 1) for share in shares)
        return MatrixCheck(stored.name, kind, found, float(np.finfo(np.float16).eps) / 2, "of the scale", fault=fault)
    worse = ~zero & (used > least * tolerances.SHARE_ERROR + np.finfo(np.float32).tiny)
    if worse.any():
        at = _place(worse)
        fault = (
            f"the scale of column {at[1]}, block {at[0]}, is {float(scales[at]):.6g}, where another share of its "
            f"largest weight has less squared error ({int(worse.sum())} of {worse.size} scales)"
        )
        found = float(used[at] / least[at])
        return MatrixCheck(stored.name, kind, found, tolerances.SHARE_ERROR, "of the least squared error", fault=fault)
    return None


def _rounds_to(exact: npt.NDArray[np.float64], scales: npt.NDArray[np.float16]) -> npt.NDArray[np.bool_]:
    """Whether each float16 scale is the rounding of the exact one; subnormal numbers may be rounded up."""
    near = [(exact * (1 + side * tolerances.SCALE_ERROR)).astype(np.float16) for side in (-1, 1)]
    with np.errstate(over="ignore"):
        up = np.nextafter(near[0], np.float16(np.inf))
    few_digits = near[0].astype(np.float64) < 0.999 * exact
    result: npt.NDArray[np.bool_] = (scales == near[0]) | (scales == near[1]) | (few_digits & (scales == up))
    return result


def _squared_error(blocks: Floats, exact: npt.NDArray[np.float64], largest: int) -> npt.NDArray[np.float64]:
    """(blocks, N) the squared error of rounding to steps of `exact`."""
    steps = np.maximum(exact, np.finfo(np.float32).tiny)[:, None].astype(np.float32)
    rounded = np.clip(np.rint(blocks / steps), -largest, largest) * steps
    result: npt.NDArray[np.float64] = ((rounded - blocks) ** 2).sum(axis=1, dtype=np.float64)
    return result


def _check_gptq(stored: StoredMatrix, expected: Floats) -> MatrixCheck:
    """Check rounding by GPTQ: the first block's scales and row are rounded to nearest, all other errors are bounded.

    GPTQ selects the scales of the first block, and rounds the first row, before it has corrected anything.
    """
    assert stored.block is not None and stored.scales is not None
    kind = f"{stored.dtype}, a scale for {stored.block} rows of a column, rounded by GPTQ"
    first = StoredMatrix(stored.name, stored.dtype, stored.values[: stored.block], stored.scales[:1], stored.block)
    if off := _check_scales(first, expected[: stored.block], kind):
        return off
    row = _check_integers(dataclasses.replace(first, values=first.values[:1]), expected[:1], kind)
    if not row.passed:
        return row
    found, w = stored.dequantized().astype(np.float64), expected.astype(np.float64)
    slope = float((found * w).sum() / max((w**2).sum(), 1e-300))  # the least-squares factor from w to found
    errors = {
        "the matrix": (_relative(found, w, None), tolerances.GPTQ_MATRIX),
        "row": (_relative(found, w, 1), tolerances.GPTQ_ROW),
        "column": (_relative(found, w, 0), tolerances.GPTQ_COLUMN),
        "the size of the whole": (np.array([abs(slope - tolerances.GPTQ_SHRUNK)]), tolerances.gptq_slope(w.size)),
    }
    name, (values, limit) = max(errors.items(), key=lambda item: float(item[1][0].max()) / item[1][1])
    at = int(values.argmax())
    error, which = float(values[at]), f"{name} {at}" if values.size > 1 else name
    fault = f"{which} is off by {error:.3g} of its size, and GPTQ's rounding by up to {limit:.3g}"
    unit = f"relative error of {which}"
    return MatrixCheck(stored.name, kind, error, limit, unit, fault=None if error <= limit else fault)


def _relative(
    found: npt.NDArray[np.float64], expected: npt.NDArray[np.float64], axis: int | None
) -> npt.NDArray[np.float64]:
    """Norm of the difference relative to the expected norm, over all numbers or along an axis."""
    size = np.sqrt((expected**2).sum(axis=axis))
    typical = math.sqrt(float((expected**2).mean()) * expected.size / size.size) or 1.0
    error: npt.NDArray[np.float64] = np.sqrt(((found - expected) ** 2).sum(axis=axis)) / np.maximum(size, typical)
    return np.atleast_1d(error)


def _in_blocks(weight: Floats, block: int | None) -> Floats:
    """(blocks, rows, N); the last block is padded with zeros."""
    if block is None:
        return weight[None]
    whole = np.pad(weight, ((0, -len(weight) % block), (0, 0)))
    return whole.reshape(-1, block, weight.shape[1])


def _place(values: npt.NDArray[Any]) -> tuple[int, ...]:
    """Index of the largest number, of NaN first."""
    return tuple(int(i) for i in np.unravel_index(int(np.nan_to_num(values, nan=np.inf).argmax()), values.shape))
