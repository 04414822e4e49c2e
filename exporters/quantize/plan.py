"""Decide how a checkpoint is stored in one precision: which matrices stay precise, which scales, what cannot be.

Decisions come from the user's list and from what was measured (`calibrate`); all of them go into the manifest. Float16
ends at 65504. A product or its input that came near it on real text is multiplied in float32; a cache that did cannot
be helped, and the precision is refused by name. The shares that int8 grids clip are recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lrt_deploy.bundle.precisions import FORMATS, Format, base_dtype
from lrt_deploy.errors import ExportError
from lrt_deploy.exporters.export_options import default_int4_block, kept_matrices
from lrt_deploy.tolerances import FLOAT16_LARGEST, FLOAT16_RANGE_USED

from .calibrate import Calibration
from .qdq import Floats


@dataclass(frozen=True)
class Plan:
    """`keep`: matrices not quantized. `float32`: multiplied in float32. `details`: for the manifest.

    `kind` is the format of the others, None in a precision that quantizes nothing.
    """

    precision: str
    kind: Format | None = None
    keep: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    activation_scales: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    # Second moments of the inputs, of matrices that GPTQ rounds.
    moments: Mapping[str, Floats] = field(default_factory=dict)
    host_embeddings: bool = False  # whether graphs take rows of the embedding tables instead of holding them


def make_plan(
    precision: str,
    matrices: Mapping[str, tuple[int, int]],
    keep_high: Sequence[str] | None,
    seen: Calibration | None,
    int4_block: int | None = None,
) -> Plan:
    """Return the plan for matrices (name -> rows, columns); `keep_high`, `int4_block` None: the precision's default.

    Raises ExportError for a pattern that names no matrix, for a cache that float16 cannot hold, and where a quantized
    precision would quantize nothing.
    """
    if precision == "fp32":
        return Plan(precision)
    kind, named = FORMATS.get(precision), kept_matrices(precision, keep_high, matrices)
    wide = _beyond_float16(precision, seen) if seen and base_dtype(precision, "full") == "float16" else ()
    if kind is None:
        float32 = tuple(name for name in matrices if name in named or name in wide)
        return Plan(precision, None, (), float32, {}, {"keep_high": list(float32)} | _ranges(seen, float32))
    keep = tuple(name for name in matrices if name in named or name in wide)
    if len(keep) == len(matrices):
        raise ExportError(
            f"in {precision} no matrix would be quantized: keep_high names {len(named)} of {len(matrices)} and "
            f"{len(wide)} came too near float16's end on the calibration text; keep fewer, or export in fp16 or fp32"
        )
    moments: dict[str, Floats] = {}
    if kind.bits == 4:
        moments = {name: moment for name, moment in seen.moments.items() if name not in keep} if seen else {}
        rows = [shape[0] for name, shape in matrices.items() if name not in keep]
        kind = replace(kind, block=int4_block or default_int4_block(rows, compensated=bool(moments)))
    details: dict[str, Any] = {"bits": kind.bits, "block": kind.block, "keep_high": list(keep)}
    scales: dict[str, float] = {}
    if kind.activations:
        assert seen is not None
        scales = {name: seen.inputs[name].scale() for name in matrices if name not in keep}
        clipped = {name: seen.inputs[name].clipped(scale) for name, scale in scales.items()}
        details |= {"activation_scales": scales, "clipped_shares": clipped}
    if kind.bits == 4:
        details["compensated"] = bool(moments)
    return Plan(precision, kind, keep, tuple(wide), scales, details | _ranges(seen, wide), moments)


def _beyond_float16(precision: str, seen: Calibration) -> tuple[str, ...]:
    """Return matrices whose input or product came too near float16's end; ExportError for caches that did."""
    limit = FLOAT16_LARGEST * FLOAT16_RANGE_USED
    if seen.values > limit:
        raise ExportError(
            f"{precision} needs value caches in float16, and on the calibration text values reach {seen.values:.4g}: "
            f"beyond {limit:.4g}, {FLOAT16_RANGE_USED:.0%} of what float16 can hold; export this checkpoint in fp32 or "
            "bf16"
        )
    sizes = {name: max(found.largest, seen.outputs[name]) for name, found in seen.inputs.items()}
    return tuple(name for name, size in sizes.items() if size > limit)


def _ranges(seen: Calibration | None, float32: Sequence[str]) -> dict[str, Any]:
    """Return the manifest's entries on the largest numbers measured and the matrices multiplied in float32."""
    if seen is None:
        return {"multiplied_in_float32": list(float32)}
    ranges = {"squared_relu": seen.squared_relu, "residual": seen.residual, "values": seen.values}
    ranges |= {"largest_product": max(seen.outputs.values())}
    return {"ranges": ranges, "multiplied_in_float32": list(float32)}
