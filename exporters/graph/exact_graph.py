"""A bundle's graph as it stands, to be computed in float32: tells a fault of the graph from a rounding of a kernel.

A copy in memory of the graph on disk, on the same stored weights, where every 16-bit value is float32 and activations
are not rounded to int8. So it computes, up to float32's noise, what PyTorch computes with the same weights, if its ops
and their order are right, whatever the precision. The scales that were taken out are returned, to be held against what
the manifest says. The intermediate values that
`activations` names can be outputs. Runs nothing: see `runtime.backends.ort_debug`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ParityError

from .cast import matrix_name, store
from .debug_outputs import Origin, origin_of

_LOW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# What takes a 16-bit value as it is: the cast that widens it, the rows of a table, and sizes.
_TAKES_LOW = ("Cast", "Gather", "Shape")


@dataclass(frozen=True)
class ExactGraph:
    """A serialized graph, the folder that its weights lie in, and the int8 scale of the input of each matrix."""

    model: bytes
    folder: Path
    activation_scales: dict[str, float]
    origins: dict[str, Origin]  # of every stage that is an output


def exact_graph(path: Path, config: LRTConfig, stages: Sequence[str] = ()) -> ExactGraph:
    """The graph at `path` in float32, with those of `stages` that it has as further outputs.

    A 16-bit constant that is the rounding of attention's scale counts as the scale.
    """
    model = ir.load(path)
    values = {value.name: value for node in model.graph for value in node.outputs}
    known = frozenset(name for name in stages if name in values)
    origins = {name: origin_of(values[name], known) for name in stages if name in known}
    scales = _unround_activations(model.graph, path)
    _unround_scale(model.graph, config.head_dim**-0.5)
    _widen(model.graph)
    outputs = {value.name for value in model.graph.outputs}
    model.graph.outputs.extend(values[name] for name in stages if name in known and name not in outputs)
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    return ExactGraph(ir.to_proto(model).SerializeToString(), path.parent, scales, origins)


def _unround_activations(graph: ir.Graph, path: Path) -> dict[str, float]:
    """Let products read activations before QuantizeLinear; returns the scale by the matrix that each is for."""
    scales: dict[str, float] = {}
    for node in [node for node in graph if node.op_type == "MatMul"]:
        name, dequantize = matrix_name(node) or "", _producer(node.inputs[0])
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        quantize = _producer(dequantize.inputs[0])
        if quantize is None or quantize.op_type != "QuantizeLinear":
            raise ParityError(
                f"{path}: the input of {name} is dequantized and never quantized; export the bundle again"
            )
        ways = [(_number(q, 1, path), _number(q, 2, path)) for q in (quantize, dequantize)]
        if ways[0] != ways[1] or ways[0][1] != 0:
            raise ParityError(
                f"{path}: the input of {name} is quantized by scale and zero point {ways[0]} and dequantized by "
                f"{ways[1]}, expected the same scale and no zero point; export the bundle again"
            )
        scales[name] = ways[0][0]
        node.replace_input_with(0, quantize.inputs[0])
    return scales


def _unround_scale(graph: ir.Graph, scale: float) -> None:
    """Replace constants of one 16-bit number that are `scale` rounded by the number itself."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.size != 1 or value.dtype not in _LOW:
            continue
        number = tensor.numpy().reshape(())
        if number == np.array(scale, number.dtype):
            store(value, ir.tensor(np.full(tensor.shape.numpy(), scale, np.float32), name=value.name))


def _widen(graph: ir.Graph) -> None:
    """Make every 16-bit value float32: inputs, outputs, results and casts; weights are cast where they are read."""
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() in _LOW:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT.value)
        for value in node.outputs:
            if value.dtype in _LOW and node.op_type != "Gather":
                value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in graph.inputs:
        if value.dtype in _LOW:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    widened: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        for position, source in enumerate(node.inputs):
            if source is None or source.dtype not in _LOW or node.op_type in _TAKES_LOW:
                continue
            if source not in widened:
                result = ir.Value(
                    name=f"{source.name}.widened", shape=source.shape, type=ir.TensorType(ir.DataType.FLOAT)
                )
                graph.append(
                    ir.node("Cast", [source], {"to": ir.DataType.FLOAT.value}, outputs=[result], name=result.name)
                )
                widened[source] = result
            node.replace_input_with(position, widened[source])


def _producer(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value, casts between types aside."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type == "Cast":
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node


def _number(node: ir.Node, position: int, path: Path) -> float:
    """A scale or zero point of one number, casts aside; 0 where there is none."""
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is None:
        return 0.0
    source: ir.Value | None = value
    while source is not None and source.const_value is None and (producer := source.producer()) is not None:
        source = producer.inputs[0]
    if source is None or source.const_value is None or source.const_value.size != 1:
        raise ParityError(f"{path}: {node.name} has no constant scale of one number; export the bundle again")
    return float(source.const_value.numpy().reshape(()))
