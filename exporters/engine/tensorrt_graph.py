"""The TensorRT-only copy of a bundle's graph: what its parser wants and ONNX Runtime would refuse or not use.

It is the `full` flavour with free T, with three edits: cache slots become a fixed number (TensorRT updates a cache in
place only then), `rows` becomes 1 (the head always runs, for one token of each row), and attention in float32 may be
decomposed (TensorRT has no fused kernel for it), on demand any. The copy lives in memory; its weights stay in the
bundle's file.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from lrt_deploy.errors import EngineError


def tensorrt_copy(graph: Path, capacity: int, decompose: bool = False) -> bytes:
    """The edited graph as ONNX bytes; it names its weights file as the original does.

    With `decompose`, attention in any type may be: for shapes that TensorRT has no fused kernel for.
    """
    try:
        model = ir.load(graph)
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read the graph {graph}: {error}; export the bundle again") from error
    fix_dims(model, {"capacity": capacity, "rows": 1})
    for node in model.graph:
        if node.op_type == "Attention" and (decompose or _computes_in(node) == ir.DataType.FLOAT):
            node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def fix_dims(model: ir.Model, sizes: dict[str, int]) -> None:
    """Give symbolic dimensions a size, wherever they occur."""
    for value in [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([sizes.get(_symbol(dim), dim) for dim in value.shape])


def _symbol(dim: int | ir.SymbolicDim) -> str:
    return str(dim.value) if isinstance(dim, ir.SymbolicDim) else ""


def _computes_in(node: ir.Node) -> ir.DataType | None:
    return node.outputs[0].dtype
