"""The options of an export, and the checks that need no weights.

What would fail after minutes of tracing is refused first: options that contradict each other or the model, a target
that cannot be written, a disk that is too small, more sequences than a cache tensor can hold. Writes nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any

from lrt_deploy.bundle.contract import state_pairs
from lrt_deploy.bundle.precisions import (
    DEFAULT_KEEP_HIGH,
    FORMATS,
    INT4,
    INT4_BLOCKS,
    ITEM_BYTES,
    PRECISIONS,
    base_dtype,
)
from lrt_deploy.bundle.weights import matrix_shapes, weight_sources
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ExportError, InputError
from lrt_deploy.files import existing_parent

# Elements of one tensor that TensorRT, and kernels that index with 32 bits, can address.
_LARGEST_TENSOR = 2**31 - 1
DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True)
class ExportRequest:
    """The options of `export_bundle`, documented there, in the right types."""

    precisions: tuple[str, ...]
    max_seq_len: int | None
    max_batch_size: int | None
    tokenizer: Path | None
    step: int | None
    force: bool
    add: bool
    calibration: Path | None
    keep_high: tuple[str, ...] | None
    compensate: bool | None
    int4_block: int | None
    host_embeddings: bool

    @property
    def batch_size(self) -> int:
        """Sequences that can run together."""
        return DEFAULT_BATCH_SIZE if self.max_batch_size is None else self.max_batch_size

    @property
    def needs_calibration(self) -> bool:
        """Whether a precision computes in float16, whose range must be measured, or has int8 activations."""
        return any(base_dtype(precision, "full") == "float16" for precision in self.precisions)

    def check(self) -> None:
        """Raise ExportError or InputError for values that no model could be exported with."""
        if self.calibration is not None and not self.calibration.exists():
            raise InputError(f"the calibration text {self.calibration} does not exist")
        unknown = [precision for precision in self.precisions if precision not in PRECISIONS]
        if unknown or not self.precisions or len(set(self.precisions)) != len(self.precisions):
            asked, held = ", ".join(self.precisions) or "empty", ", ".join(PRECISIONS)
            raise ExportError(f"precision is {asked}; this version exports {held}, each once")
        block = self.int4_block
        if block is not None and block not in INT4_BLOCKS:
            held = ", ".join(map(str, INT4_BLOCKS))
            raise ExportError(f"int4_block is {block}, expected one of {held}: rows of a column that share a scale")
        if block is not None and INT4 not in self.precisions:
            raise ExportError(
                f"int4_block is {block}, and {', '.join(self.precisions)} has no int4 weights; add --precision {INT4} "
                "or leave --int4-block out"
            )

    def capacity(self, config: LRTConfig) -> int:
        """Return the capacity in tokens; raise ExportError for what this model cannot be exported with."""
        capacity = config.sequence_len if self.max_seq_len is None else self.max_seq_len
        if not 1 <= capacity <= config.max_positions:
            raise ExportError(
                f"max_seq_len is {capacity}; this model's rotary tables cover 1 to {config.max_positions} positions "
                f"(10 x sequence_len, as the authors built them)"
            )
        if self.batch_size < 1:
            raise ExportError(f"max_batch_size is {self.batch_size}, expected at least 1")
        most = _LARGEST_TENSOR // (config.n_kv_head * config.head_dim * capacity)
        if self.batch_size > most:
            taken = max(_state_bytes(config, name, capacity) for name in self.precisions) * self.batch_size
            raise ExportError(
                f"max_batch_size is {self.batch_size}; with a max_seq_len of {capacity} a cache tensor of this "
                f"model holds at most {most} sequences (2^31 elements, the limit of TensorRT and of 32-bit kernels), "
                f"and the state of {self.batch_size} would take {taken / 1e9:.3g} GB of memory"
            )
        matching(self.keep_high or (), matrix_shapes(config), strict=True)
        return capacity


def matching(patterns: Sequence[str], matrices: Mapping[str, Any], strict: bool) -> set[str]:
    """Return the matrices that patterns name, in full, by their last or first part, or with *.

    With `strict`, a pattern that names none raises ExportError.
    """
    found: set[str] = set()
    for pattern in patterns:
        names = {
            name
            for name in matrices
            if fnmatch(name, pattern) or name.endswith(f".{pattern}") or name.startswith(f"{pattern}.")
        }
        if strict and not names:
            kinds = dict.fromkeys(name.rpartition(".")[2] for name in matrices)
            layered = next(name for name in matrices if "." in name)
            raise ExportError(
                f"keep_high names {pattern!r}, and no matrix of this model is called so; its matrices are "
                f"{', '.join(kinds)}, in a layer as {layered}"
            )
        found |= names
    return found


def kept_matrices(precision: str, keep_high: Sequence[str] | None, matrices: Mapping[str, Any]) -> set[str]:
    """Return the matrices that patterns keep precise, None: those of the precision's default; ExportError as above."""
    default = DEFAULT_KEEP_HIGH if precision in FORMATS else ()
    return matching(default if keep_high is None else keep_high, matrices, strict=keep_high is not None)


def default_int4_block(rows: Sequence[int], compensated: bool) -> int:
    """Return the block for matrices with these numbers of rows: the longest that cuts all of them, if GPTQ rounds them.

    Longer blocks are faster, and by GPTQ no worse than short ones by rounding to nearest: docs/precisions.md. A block
    that is a whole column costs TensorRT-RTX two kernels a layer more.
    """
    whole = [block for block in INT4_BLOCKS if all(count % block == 0 and count > block for count in rows)]
    return max(whole) if compensated and whole else INT4_BLOCKS[0]


def check_space(target: Path, config: LRTConfig, precisions: Sequence[str]) -> None:
    """Raise ExportError if the disk has no room for the weights of all precisions; all else is small beside them."""
    needed = sum(weight_bytes(config, precision) for precision in precisions)
    free = shutil.disk_usage(existing_parent(target)).free
    if needed > free:
        raise ExportError(
            f"{target} needs at least {needed / 1e9:.2f} GB for the weights in {', '.join(precisions)}, and "
            f"{free / 1e9:.2f} GB are free there; make room, choose another disk or export fewer precisions"
        )


def weight_bytes(config: LRTConfig, precision: str) -> int:
    """Return a lower bound of the bytes of a model's weights; embedding tables count as 16 bits a parameter."""
    matrices = sum(prod(shape) for shape in matrix_shapes(config).values())
    everything = sum(prod(shape) for source in weight_sources(config).values() for shape in source.shapes)
    bits = FORMATS[precision].bits if precision in FORMATS else 8 * ITEM_BYTES[base_dtype(precision, "full")]
    return (matrices * bits + (everything - matrices) * 16) // 8


def _state_bytes(config: LRTConfig, precision: str, capacity: int) -> int:
    """Return the bytes of the state of one sequence: caches and latent at full capacity."""
    dtype = base_dtype(precision, "full")
    sizes = {"batch": 1, "tokens": 1, "capacity": capacity}
    pairs = state_pairs(config, dtype)
    return sum(prod(int(sizes.get(str(dim), dim)) for dim in pair.shape) for pair in pairs) * ITEM_BYTES[dtype]
