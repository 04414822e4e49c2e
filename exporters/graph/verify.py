"""Verify graphs before they become a bundle: by the types that they compute in, and by opening them.

The counts of operations by type go into the manifest, and an export whose graph has others than its precision expects
fails. Every graph is opened to find those that ONNX Runtime would refuse: its CPU provider has kernels for all
precisions but bfloat16, whose graphs get ONNX's own check of types and shapes. Nothing is run, and the weights are
mapped and not read.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir

from lrt_deploy.bundle.contract import FLAVOURS
from lrt_deploy.bundle.manifest import PHASES, graph_path
from lrt_deploy.bundle.precisions import Format, base_dtype
from lrt_deploy.bundle.weights import matrix_shapes
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ExportError

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
    kinds = []
    for value in (node.inputs[1], node.inputs[0]):
        dequantize = producer(value, "DequantizeLinear")
        integers = None if dequantize is None else dequantize.inputs[0]
        kinds.append("" if integers is None or integers.dtype is None else f"int{integers.dtype.bitwidth}")
    weights, activations = kinds
    if not weights:
        return base if matrix_name(node) else f"{base} without a matrix"
    return f"{weights}, {base}" if weights == activations else f"{weights} weights, {base}"


def _text(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number} in {name}" for name, number in numbers.items()) or "none"


_LOG_NOTHING = 4  # but what ends the process; errors are raised


def verify_graphs(folder: Path, precision: str) -> None:
    """Open all graphs of a precision below `folder`; raises ExportError with the reason for one that cannot be."""
    for flavour in FLAVOURS:
        verify = _check_types if base_dtype(precision, flavour) == "bfloat16" else _open
        for phase in PHASES:
            try:
                verify(folder / graph_path(precision, phase, flavour))
            except Exception as error:  # onnx and onnxruntime raise their own unrelated types
                raise ExportError(
                    f"the {flavour} {phase} graph in {precision} cannot be opened, so nothing was written: "
                    f"{' '.join(str(error).split())[:400]}. Please report this with the checkpoint's config"
                ) from error


def _open(path: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = _LOG_NOTHING
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)


def _check_types(path: Path) -> None:
    import onnx

    model = onnx.load(path, load_external_data=False)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
