"""Walk from value to value, add nodes and constants, change types: what all passes over graphs share.

Nodes are added at the end of a graph; `finish` sorts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lrt_deploy.bundle.precisions import Dtype
from lrt_deploy.errors import ExportError

DTYPES: dict[Dtype, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


def dtype_name(dtype: ir.DataType | None) -> str:
    """Return the name of an element type as in the manifest: float32, bfloat16, int8; `unknown` for None."""
    if dtype is None:
        return "unknown"
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def nodes(graph: ir.Graph, op: str) -> list[ir.Node]:
    """List the nodes of an op; the graph may be changed meanwhile."""
    return [node for node in graph if node.op_type == op]


def walk_back(value: ir.Value | None, through: Sequence[str]) -> ir.Value | None:
    """Return the value that this one comes from, through ops in `through`, each by its first input."""
    while value is not None and (maker := value.producer()) is not None and maker.op_type in through:
        value = maker.inputs[0]
    return value


def producer(value: ir.Value | None, op: str | None = None, behind: Sequence[str] = ()) -> ir.Node | None:
    """Return the node that makes a value, skipping ops in `behind`; None where there is none, or it is not an `op`."""
    value = walk_back(value, behind)
    node = None if value is None else value.producer()
    return None if node is None or op not in (None, node.op_type) else node


def matrix_name(node: ir.Node) -> str | None:
    """Return the name of the matrix that a MatMul multiplies by, however it is stored; None for any other value."""
    value = walk_back(node.inputs[1], ("Cast", "DequantizeLinear"))
    return None if value is None or value.producer() is not None else value.name


def scalar(value: ir.Value | None) -> float | None:
    """Return the number that a constant of one element holds; None for any other value."""
    tensor = None if value is None else value.const_value
    return float(tensor.numpy().reshape(())) if tensor is not None and tensor.size == 1 else None


def static_dim(value: ir.Value | None, axis: int) -> int:
    """Return the size of an axis; ExportError if it is not known."""
    size = value.shape[axis] if value is not None and value.shape is not None else None
    if not isinstance(size, int):
        raise ExportError(f"graph: axis {axis} of {value.name if value else 'a value'} is {size}, expected a size")
    return size


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Return the initializer of this name and value, made on first use."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def add(
    graph: ir.Graph,
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    like: ir.Value | None = None,
    dtype: ir.DataType | None = None,
    **attributes: Any,  # noqa: ANN401 - as `ir.node` takes them
) -> ir.Value:
    """Add a node of this name; return its one result, of the same name, and of `like`'s shape and type, or `dtype`."""
    dtype = like.dtype if dtype is None and like is not None else dtype
    kind = None if dtype is None else ir.TensorType(dtype)
    result = ir.Value(name=name, shape=None if like is None else like.shape, type=kind)
    graph.append(ir.node(op, inputs, attributes, outputs=[result], name=name))
    return result


def cast_value(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return `value` in another type: what it was widened from, or one Cast for all readers."""
    maker = producer(value, "Cast")
    source = None if maker is None else maker.inputs[0]
    if source is not None and value.dtype == ir.DataType.FLOAT and source.dtype == dtype:
        return source
    for user in value.consumers():
        if user.op_type == "Cast" and user.outputs[0].dtype == dtype:
            return user.outputs[0]
    return add(graph, "Cast", [value], f"{value.name}_{dtype.name.lower()}", value, dtype, to=dtype.value)


def lazy(value: ir.Value, dtype: ir.DataType, convert: object, shape: tuple[int, ...] | None = None) -> ir.LazyTensor:
    """Return the initializer `value` through `convert`, computed when it is written and not kept, to save memory."""
    source, name = value.const_value, value.name
    assert source is not None and callable(convert)
    sizes = ir.Shape(shape or source.shape.numpy())
    compute = lambda: ir.tensor(convert(source.numpy()), dtype=dtype, name=name)  # noqa: E731
    return ir.LazyTensor(compute, dtype=dtype, shape=sizes, name=name)


def store(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Let an initializer hold another tensor."""
    value.const_value = tensor
    value.type = ir.TensorType(tensor.dtype)
    value.shape = ir.Shape(tensor.shape.numpy())


def finish(model: ir.Model) -> None:
    """Remove nodes that nothing reads, and sort the others."""
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
