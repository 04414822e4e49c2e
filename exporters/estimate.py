"""What an export or a build will take: sizes of files, peak memory and time, before any of it is done.

Sizes of weights follow from the configuration and are exact, unless calibration finds matrices that must stay in
float32. Graphs, manifest and engines are sized by what was measured on models of 5 to 12 layers, memory and time
likewise, for one core of an x86 server. Reads no weights and writes nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from lrt_deploy.bundle import manifest
from lrt_deploy.bundle.contract import FLAVOURS
from lrt_deploy.bundle.manifest import TABLE_ALIGNMENT, Manifest
from lrt_deploy.bundle.precisions import FORMATS, INT4, ITEM_BYTES
from lrt_deploy.bundle.weights import EMBEDDING_TABLES, matrix_shapes, weight_sources
from lrt_deploy.config import LRTConfig
from lrt_deploy.files import existing_parent

from .export_options import ExportRequest, default_int4_block, kept_matrices

_INLINE_BYTES = 1024  # smaller tensors stay in the graphs (`graph.precision_graphs`)
# Measured bytes of a graph: of any model, and of each layer.
_GRAPH_BYTES = {
    "fp32": (6_500, 8_100),
    "fp16": (6_000, 9_600),
    "bf16": (6_000, 9_700),
    "int8": (14_000, 12_500),
    "int8-weight-only": (11_000, 10_600),
    INT4: (5_500, 10_700),
}
GRAPH_ERROR = 0.15  # largest relative error of a graph's size that the tests accept
_MANIFEST_BYTES = (3_500, 12_000, 2_580)  # of any bundle, of each precision, and of each layer in it
_PROCESS_BYTES = 480e6  # torch and the graph tools
_MODEL_SHARE, _CALIBRATION_SHARE = 2.05, 0.65  # of the model in memory
_SECONDS, _SECONDS_LAYER = 12.0, 1.3  # imports and tracing
_SECONDS_GB, _CALIBRATION_SECONDS, _CALIBRATION_SECONDS_GB = 5.0, 3.0, 28.0
# GPTQ of a matrix (K, N): K^3, K^2 and K N times so many seconds.
_GPTQ_SECONDS = (5e-11, 5e-8, 1.5e-7)
# TensorRT-RTX 1.7: a plan beyond its weights, of any model and of each layer; W8A8 and weight-only alike.
_PLAN_SHARE, _PLAN_BYTES, _PLAN_INTEGER_BYTES = 1.05, (500_000, 2_100_000), (1_700_000, 2_400_000)
_BUILD_BYTES, _BUILD_SHARE = 430e6, 3.4
_BUILD_SECONDS, _BUILD_SECONDS_LAYER, _BUILD_SECONDS_GB = 3.0, 0.5, 13.0


@dataclass(frozen=True)
class FileEstimate:
    """Bytes of a file, and whether they are exact."""

    bytes: int
    exact: bool


@dataclass(frozen=True)
class Estimate:
    """The files that will be written, by path; the largest memory of the process; the time on one core."""

    files: Mapping[str, FileEstimate]
    peak_memory_bytes: int
    seconds: float
    free_bytes: int

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self) | {"bytes": self.bytes}


def estimate_export(
    config: LRTConfig,
    options: ExportRequest,
    capacity: int,
    wide_tables: Collection[str],
    others: Mapping[str, int],
    target: Path,
) -> Estimate:
    """Estimate an export.

    `options.compensate` says whether there is text to round int4 weights on. `wide_tables` are the embedding tables
    that the checkpoint stores in more than 16 bits; `others` the exact sizes of files that are no graphs, the
    tokenizer's.
    """
    files = {name: FileEstimate(size, True) for name, size in others.items()}
    for precision in options.precisions:
        weights, tables = _weights(config, precision, options, capacity, wide_tables)
        files[manifest.weights_path(precision)] = FileEstimate(_packed(weights), True)
        if tables:
            files[manifest.table_path(precision)] = FileEstimate(_packed(tables), True)
        first, each = _GRAPH_BYTES[precision]
        for phase in manifest.PHASES:
            for flavour in FLAVOURS:
                size = first + each * config.n_layer
                files[manifest.graph_path(precision, phase, flavour)] = FileEstimate(size, False)
    fixed, first, each = _MANIFEST_BYTES
    described = len(options.precisions) * (first + each * config.n_layer)
    files[manifest.MANIFEST] = FileEstimate(fixed + described, False)
    files[manifest.DIGEST] = FileEstimate(64 + 2 + len(manifest.MANIFEST) + 1, True)
    model = sum(
        prod(shape) * (2 if name in EMBEDDING_TABLES and name not in wide_tables else 4)
        for name, source in weight_sources(config).items()
        for shape in source.shapes
    )
    seconds = _SECONDS + _SECONDS_LAYER * config.n_layer + _SECONDS_GB * model / 1e9 * len(options.precisions)
    if options.needs_calibration:
        seconds += _CALIBRATION_SECONDS + _CALIBRATION_SECONDS_GB * model / 1e9
    share, moments = _MODEL_SHARE + (_CALIBRATION_SHARE if options.needs_calibration else 0), 0
    if INT4 in options.precisions and options.compensate:
        cube, square, product = _GPTQ_SECONDS
        keep = kept_matrices(INT4, options.keep_high, matrix_shapes(config))
        for rows, columns in (shape for name, shape in matrix_shapes(config).items() if name not in keep):
            seconds += cube * rows**3 + square * rows**2 + product * rows * columns
            moments += ITEM_BYTES["float32"] * rows**2
    free = shutil.disk_usage(existing_parent(target)).free
    return Estimate(files, int(_PROCESS_BYTES + share * model) + moments, round(seconds, 1), free)


def estimate_build(folder: Path, found: Manifest, plan: str, precision: str) -> Estimate:
    """Estimate the building of an engine: `plan` is its path in the bundle; its weights are those of the graphs."""
    weights = found.files[manifest.weights_path(precision)].bytes
    layers = found.model.n_layer
    first, each = _PLAN_INTEGER_BYTES if precision in FORMATS else _PLAN_BYTES
    files = {plan: FileEstimate(int(_PLAN_SHARE * weights) + first + each * layers, False)}
    seconds = _BUILD_SECONDS + _BUILD_SECONDS_LAYER * layers + _BUILD_SECONDS_GB * weights / 1e9
    free = shutil.disk_usage(folder).free
    return Estimate(files, int(_BUILD_BYTES + _BUILD_SHARE * weights), round(seconds, 1), free)


def _weights(
    config: LRTConfig, precision: str, options: ExportRequest, capacity: int, wide_tables: Collection[str]
) -> tuple[list[int], list[int]]:
    """Return the bytes of the tensors in the weights file, in its order, and of those in the tables' file."""
    matrices = matrix_shapes(config)
    kind, item = FORMATS.get(precision), 4 if precision == "fp32" else 2
    keep, block = kept_matrices(precision, options.keep_high, matrices), None
    if precision == INT4:
        counts = [rows for name, (rows, _) in matrices.items() if name not in keep]
        block = options.int4_block or default_int4_block(counts, bool(options.compensate))
    elements = {name: sum(prod(shape) for shape in source.shapes) for name, source in weight_sources(config).items()}
    order = [name for name in elements if name in EMBEDDING_TABLES or name in matrices]
    order.insert(1, order.pop(order.index("lm_head")))  # as the graph has them
    weights, tables, scales = list[int](), list[int](), list[int]()
    for name in order:
        if name in EMBEDDING_TABLES:
            wide = precision == "fp32" and name in wide_tables
            (tables if options.host_embeddings else weights).append(elements[name] * (4 if wide else 2))
            continue
        rows, columns = matrices[name]
        if kind is None or name in keep:
            weights.append(rows * columns * (4 if kind is None and name in keep else item))
            continue
        whole = rows if block is None else -(-rows // block) * block
        weights.append(whole * columns * kind.bits // 8)
        scales.append((1 if block is None else whole // block) * columns * ITEM_BYTES["float16"])
    if scales and "lm_head" not in keep:
        scales.append(scales.pop(0))  # the head's come last, in the order of use
    rotary = [capacity * (config.head_dim // 2) * 4] * 2
    norms = [config.n_embd * 4, config.head_dim * 4]
    return [size for size in (*weights, *rotary, *norms, *scales) if size > _INLINE_BYTES], tables


def _packed(sizes: list[int]) -> int:
    """Return the bytes of a file of tensors that begin at page boundaries each."""
    whole = sum(-(-size // TABLE_ALIGNMENT) * TABLE_ALIGNMENT for size in sizes[:-1])
    return whole + sizes[-1] if sizes else 0
