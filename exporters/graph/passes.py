"""Clean-up passes over the traced graph (onnx-ir): what torch's exporter leaves behind and no runtime needs.

Each pass does one thing, keeps the numbers, and is checked by the parity tests. Flavours are derived in `flavours`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lrt_deploy.errors import ExportError

# What a graph may consist of. An op beyond this list means that the trace took a path nobody has measured.
ALLOWED_OPS = frozenset(
    """
    Add And Attention Cast Concat DequantizeLinear Div Exp Expand Gather GatherElements GreaterOrEqual LessOrEqual
    MatMul Mul Neg Pad QuantizeLinear RMSNormalization Range Reciprocal Relu Reshape RotaryEmbedding Shape Slice Split
    Squeeze Sub Tanh TensorScatter Transpose Unsqueeze
    """.split()  # noqa: SIM905 - a list of names reads better as text
)


STAGE_DOMAIN = "lrt_deploy"  # of the nodes by which `trace` says where a value of `stages` is


def clean(model: ir.Model) -> None:
    """Run all passes in place."""
    name_stages(model)
    share_norm_scales(model.graph)
    freeze_reshapes(model.graph)
    square_by_product(model.graph)
    for cleanup in (common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass()):
        cleanup(model)
    forget_origin(model)
    check_ops(model.graph)


def name_stages(model: ir.Model) -> None:
    """Give the values that the model marked the names of `stages`, and remove the marks.

    A value marked twice (a memory projection that all layers share) keeps its first name.
    """
    graph, named = model.graph, set()
    for node in [node for node in graph if node.domain == STAGE_DOMAIN]:
        source, result = node.inputs[0], node.outputs[0]
        assert source is not None
        producer = source.producer()
        result.replace_all_uses_with(source)
        graph.remove(node, safe=True)
        if producer is not None and source not in named:
            source.name = node.attributes["stage"].as_string()
            named.add(source)
            if len(producer.outputs) == 1:
                producer.name = source.name
    model.opset_imports.pop(STAGE_DOMAIN, None)


def share_norm_scales(graph: ir.Graph) -> None:
    """The norms have no weight, the op wants one: give all norms of a width one shared vector of ones.

    torch spells it as Shape + ConstantOfShape in front of every norm.
    """
    ones: dict[int, ir.Value] = {}
    for node in graph:
        if node.op_type != "RMSNormalization":
            continue
        width = static_dim(node.inputs[0], -1)
        if width not in ones:
            ones[width] = constant(graph, f"norm_scale_{width}", np.ones(width, np.float32))
        node.replace_input_with(1, ones[width])


def freeze_reshapes(graph: ir.Graph) -> None:
    """Every reshape keeps (B, T) and changes what follows: make its shape the constant [0, 0, ...]."""
    for node in graph:
        if node.op_type != "Reshape":
            continue
        source, result = node.inputs[0], node.outputs[0]
        if source is None or source.shape is None or result.shape is None or source.shape[:2] != result.shape[:2]:
            raise ExportError(
                f"graph clean-up: {node.name} reshapes more than the trailing axes; expected (B, T) to stay"
            )
        shape = [0, 0, *(static_dim(result, axis) for axis in range(2, len(result.shape)))]
        name = "shape_" + "_".join(map(str, shape))
        node.replace_input_with(1, constant(graph, name, np.array(shape, np.int64)))
        node.attributes.pop("allowzero", None)


def square_by_product(graph: ir.Graph) -> None:
    """Spell x ** 2 as x * x, the same bit for bit: Pow has fewer kernels, and a second type to agree with."""
    for node in list(graph):
        exponent = node.inputs[1].const_value if node.op_type == "Pow" and node.inputs[1] is not None else None
        if exponent is None or exponent.numpy().size != 1 or float(exponent.numpy().item()) != 2.0:
            continue
        product = ir.node("Mul", [node.inputs[0], node.inputs[0]], name=node.name)
        graph.insert_after(node, product)
        ir.convenience.replace_nodes_and_values(graph, product, [node], [product], node.outputs, product.outputs)


def forget_origin(model: ir.Model) -> None:
    """Drop the tracer's notes: they hold source paths of the exporting machine and double the file."""
    model.metadata_props.clear()
    model.doc_string = None
    for holder in (model.graph, *model.graph, *model.graph.inputs, *model.graph.outputs):
        holder.metadata_props.clear()
        holder.doc_string = None
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()


def check_ops(graph: ir.Graph) -> None:
    """Refuse a graph with an op that is not on the list, or from another domain."""
    unexpected = {f"{node.domain}::{node.op_type}" for node in graph if node.domain or node.op_type not in ALLOWED_OPS}
    if unexpected:
        raise ExportError(
            f"the traced graph holds {', '.join(sorted(unexpected))}, which no backend here was measured with; "
            "this happens when the installed torch traces differently: install the versions of constraints.txt"
        )


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer of this name and value, made on first use."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def static_dim(value: ir.Value | None, axis: int) -> int:
    """The size of an axis that must be known."""
    size = value.shape[axis] if value is not None and value.shape is not None else None
    if not isinstance(size, int):
        raise ExportError(
            f"graph clean-up: axis {axis} of {value.name if value else 'a value'} is {size}, expected a size"
        )
    return size
