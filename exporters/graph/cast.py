"""Cast a float32 graph to a lower base type: matrix products, attention, caches and latent in it, all else in float32.

`cast_weights` stores weights in fewer bits behind a Cast, `quantize` behind Q/DQ, and `cast_model` moves into the base
type whatever reads much memory, MatMul, Attention, TensorScatter, the state and the Q/DQ around them, with Casts where
types meet. The ops between them cost little and stay in float32: norms, residual stream, gates, rotary embedding,
softcap, logits. Ops that only move numbers (and relu and its square, which round once) are in the base type where all
their readers are.
"""

from __future__ import annotations

from collections.abc import Collection

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lrt_deploy.bundle.precisions import Dtype
from lrt_deploy.errors import ExportError

from .rewrite import DTYPES, cast_value, finish, lazy, matrix_name, nodes, store

HEAVY = frozenset("MatMul Attention TensorScatter QuantizeLinear DequantizeLinear".split())  # noqa: SIM905
FOLLOWING = frozenset("Reshape Transpose Split Slice Squeeze Unsqueeze Relu Pad".split())  # noqa: SIM905


def cast_weights(model: ir.Model, dtype: Dtype, keep: Collection[str] = ()) -> None:
    """Store float32 matrices and tables as `dtype`, in place; those in `keep` stay. They are converted when written.

    A matrix is followed by a Cast, which `cast_model` removes and ONNX Runtime folds; of a table the rows that are read
    are cast. Tables that have 16 bits already stay as they are.
    """
    for node in [*nodes(model.graph, "MatMul"), *nodes(model.graph, "Gather")]:
        value = node.inputs[1 if node.op_type == "MatMul" else 0]
        if value is None or value.const_value is None or value.dtype != ir.DataType.FLOAT:
            continue
        if value.name in keep or len(value.shape or ()) < 2:
            continue
        store(value, lazy(value, DTYPES[dtype], lambda array, to=DTYPES[dtype]: _rounded(array, to)))
        if node.op_type == "MatMul":
            node.replace_input_with(1, cast_value(model.graph, value, ir.DataType.FLOAT))
        else:
            _cast_rows(model.graph, node, DTYPES[dtype])
    finish(model)


def cast_model(model: ir.Model, dtype: Dtype, keep: Collection[str] = ()) -> ir.Model:
    """Return a copy whose base type is `dtype`; products with a matrix in `keep` stay float32."""
    model = model.clone()
    if dtype == "float32":
        return model
    low, graph = DTYPES[dtype], model.graph
    low_nodes = _low_nodes(graph, keep)
    low_values = {value for value in graph.inputs if (value.name or "").startswith("past_")}
    low_values |= {value for node in low_nodes for value in node.outputs if value.dtype == ir.DataType.FLOAT}
    for value in low_values:
        value.type = ir.TensorType(low)
    for node in list(graph):
        wanted = low if node in low_nodes else ir.DataType.FLOAT
        for position, source in enumerate(node.inputs):
            if source is None or node.op_type == "Shape":
                continue
            if source in low_values if wanted == ir.DataType.FLOAT else source.dtype == ir.DataType.FLOAT:
                node.replace_input_with(position, cast_value(graph, source, wanted))
    _set_outputs(graph, low)
    finish(model)
    return model


def _low_nodes(graph: ir.Graph, keep: Collection[str]) -> set[ir.Node]:
    """Return the nodes that compute in the base type: heavy ops, and runs of following ops between them."""
    kept = {node for node in nodes(graph, "MatMul") if matrix_name(node) in keep}
    heavy = {node for node in graph if node.op_type in HEAVY and node not in kept}
    willing = set(heavy)
    for node in reversed(list(graph)):
        users = [user for value in node.outputs for user in value.consumers()]
        follows = node.op_type in FOLLOWING or (node.op_type == "Mul" and node.inputs[0] is node.inputs[1])  # a square
        if follows and users and all(user in willing for user in users):
            willing.add(node)
    low = set(heavy)
    for node in graph:
        source = node.inputs[0] if node.inputs else None
        if node in willing and source is not None and source.producer() in low:
            low.add(node)
    return low


def _set_outputs(graph: ir.Graph, low: ir.DataType) -> None:
    """Make logits float32 and all state `low`, by a Cast under the contract's name where they are not."""
    for index, value in enumerate(graph.outputs):
        wanted = ir.DataType.FLOAT if value.name == "logits" else low
        if value.dtype == wanted:
            continue
        name = value.name
        value.name = f"{name}_{value.dtype.name.lower() if value.dtype else 'before'}"
        result = cast_value(graph, value, wanted)
        result.name = name
        graph.outputs[index] = result


def _cast_rows(graph: ir.Graph, gather: ir.Node, dtype: ir.DataType) -> None:
    rows = gather.outputs[0]
    rows.type = ir.TensorType(dtype)
    users = [(user, i) for user in rows.consumers() for i, value in enumerate(user.inputs) if value is rows]
    widened = cast_value(graph, rows, ir.DataType.FLOAT)
    for user, position in users:
        user.replace_input_with(position, widened)


def _rounded(array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """Round to `dtype`; ExportError for a number that it cannot hold."""
    kind = np.float16 if dtype == ir.DataType.FLOAT16 else ml_dtypes.bfloat16
    with np.errstate(over="ignore"):
        result: np.ndarray = array.astype(kind)
    if not np.isfinite(result).all():
        largest = float(np.abs(array).max())
        raise ExportError(
            f"a weight of {largest:.4g} does not fit {np.dtype(kind).name}; export this checkpoint in fp32 or bf16"
        )
    return result
