"""Count node by node which types a graph computes in, and verify the counts against what its precision expects.

The counts go into the manifest, `inspect` shows them, and an export whose graph has others fails. Needs onnx_ir alone.
"""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from lrt_deploy.bundle.weights import matrix_shapes
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ExportError
from lrt_deploy.exporters.quantize.qdq import Format

from .rewrite import dtype_name, matrix_name, producer

Counts = dict[str, dict[str, int]]


def count(graph: ir.Graph) -> Counts:
    """Count operations by type: `matmul`, `attention`, `cache_write`, and `convert` for Q/DQ.

    A matmul in `float16` has a matrix of that type; `int8 weights, float16` multiplies in float16 with a matrix that
    is stored in int8; in `int8, float16` both sides are int8, and what comes out is float16.
    """
    found = {name: Counter[str]() for name in ("matmul", "attention", "cache_write", "convert")}
    for node in graph:
        base = dtype_name(node.outputs[0].dtype)
        if node.op_type == "MatMul":
            found["matmul"][_matmul_kind(node, base)] += 1
        elif node.op_type == "Attention":
            found["attention"][base] += 1
        elif node.op_type == "TensorScatter":
            found["cache_write"][base] += 1
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            found["convert"][node.op_type] += 1
    return {operation: dict(sorted(counts.items())) for operation, counts in found.items()}


def expected_counts(config: LRTConfig, kind: Format | None, base: str, kept: int, wide: int) -> Counts:
    """Return the counts that a graph must have: `kept` matrices are not quantized, `wide` multiply in float32.

    The others are of the format `kind`, if it is not None; what is not quantized is in the type `base`.
    """
    matrices, layers = len(matrix_shapes(config)), config.n_layer
    plain = matrices if kind is None else kept
    quantized = matrices - plain
    matmuls = Counter[str]({base: plain - wide})
    matmuls["float32"] += wide
    if kind is not None:
        matmuls[f"int{kind.bits}{'' if kind.activations else ' weights'}, {base}"] = quantized
    return {
        "matmul": {name: number for name, number in sorted(matmuls.items()) if number},
        "attention": {base: layers},
        "cache_write": {base: 2 * layers},
    }


def check(graph: ir.Graph, expected: Counts, what: str) -> Counts:
    """Return the counts of a graph; ExportError with the difference where they are not those expected."""
    found = count(graph)
    for operation, numbers in expected.items():
        if found[operation] != numbers:
            raise ExportError(
                f"{what} was to have {_text(numbers)} as {operation}, and has {_text(found[operation])}; nothing was "
                "written, because it would not run as asked for. Please report this with the checkpoint's config"
            )
    return found


def _matmul_kind(node: ir.Node, base: str) -> str:
    stored, kinds = node.inputs[1], []
    for value in (stored, node.inputs[0]):
        dequantize = producer(value, "DequantizeLinear")
        integers = None if dequantize is None else dequantize.inputs[0]
        kinds.append("" if integers is None or integers.dtype is None else f"int{integers.dtype.bitwidth}")
    weights, activations = kinds
    if not weights:
        return base if matrix_name(node) else f"{base} without a matrix"
    return f"{weights}, {base}" if weights == activations else f"{weights} weights, {base}"


def _text(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number} in {name}" for name, number in numbers.items()) or "none"
