"""What would fail after minutes of tracing or building is refused before it begins.

A target that cannot be written, a disk that is too small, more sequences than a graph can hold. Reads no weights and
writes nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path

from lrt_deploy.bundle.contract import state_pairs
from lrt_deploy.bundle.precisions import ITEM_BYTES, base_dtype
from lrt_deploy.bundle.weights import matrix_shapes, weight_sources
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ExportError, LRTDeployError

# Elements of one tensor that TensorRT, and kernels that index with 32 bits, can address.
_LARGEST_TENSOR = 2**31 - 1
_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int8-weight-only": 8, "int4-weight-only": 4}


def check_target(target: Path, error: type[LRTDeployError]) -> None:
    """Refuse a folder that cannot be made: its nearest existing parent must be a folder that may be written."""
    parent = existing_parent(target)
    if not parent.is_dir():
        raise error(f"{target} cannot be made: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise error(f"{target} cannot be made: the folder {parent} may not be written to; choose another place")


def existing_parent(target: Path) -> Path:
    """The nearest parent of a path that is there."""
    return next((parent for parent in target.absolute().parents if os.path.lexists(parent)), Path(target.anchor or "/"))


def check_space(target: Path, config: LRTConfig, precisions: Sequence[str]) -> None:
    """Refuse a disk that has no room for the weights of all precisions; graphs and the rest are small beside them."""
    needed = sum(weight_bytes(config, precision) for precision in precisions)
    free = shutil.disk_usage(existing_parent(target)).free
    if needed > free:
        raise ExportError(
            f"{target} needs at least {needed / 1e9:.2f} GB for the weights in {', '.join(precisions)}, and "
            f"{free / 1e9:.2f} GB are free there; make room, choose another disk or export fewer precisions"
        )


def weight_bytes(config: LRTConfig, precision: str) -> int:
    """Bytes of a model's matrices in a precision, at least; tables, which may be stored narrower, count as 16 bits."""
    matrices = sum(prod(shape) for shape in matrix_shapes(config).values())
    everything = sum(prod(shape) for source in weight_sources(config).values() for shape in source.shapes)
    return (matrices * _BITS[precision] + (everything - matrices) * 16) // 8


def check_batch(config: LRTConfig, precisions: Sequence[str], max_batch_size: int, capacity: int) -> None:
    """Refuse more sequences than one cache tensor can hold; says what memory they would take."""
    if max_batch_size < 1:
        raise ExportError(f"max_batch_size is {max_batch_size}, expected at least 1")
    row = config.n_kv_head * config.head_dim * capacity  # elements of one cache for one sequence
    most = _LARGEST_TENSOR // row
    if max_batch_size > most:
        taken = max(state_bytes(config, precision, capacity) for precision in precisions) * max_batch_size
        raise ExportError(
            f"max_batch_size is {max_batch_size}; with a max_seq_len of {capacity} a cache tensor of this model holds "
            f"at most {most} sequences (2^31 elements, the limit of TensorRT and of 32-bit kernels), and the state of "
            f"{max_batch_size} would take {taken / 1e9:.3g} GB of memory"
        )


def state_bytes(config: LRTConfig, precision: str, capacity: int) -> int:
    """Bytes of the state of one sequence: caches and latent at full capacity."""
    dtype = base_dtype(precision, "full")
    sizes = {"batch": 1, "tokens": 1, "capacity": capacity}
    shapes = [
        [sizes[dim] if isinstance(dim, str) else dim for dim in pair.shape] for pair in state_pairs(config, dtype)
    ]
    return sum(prod(shape) for shape in shapes) * ITEM_BYTES[dtype]
