"""Copies of a bundle's graph for debugging: with intermediate activations as outputs, or computed in float32.

Copies are made in memory and read the weights file of the graph on disk. The export gave the values in the graph the
names of `lrt_deploy.activations`. What runs them: `runtime.backends.ort_session`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ParityError
from lrt_deploy.fields import raised_as

from .rewrite import cast_value, finish, matrix_name, nodes, producer, scalar, store, walk_back

_LOW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Ops that take a 16-bit value as it is: the cast that widens it, the gather from a table, and sizes.
_TAKES_LOW = ("Cast", "Gather", "Shape")


@dataclass(frozen=True)
class DebugGraph:
    """A serialized graph, the folder of its weights, and the ops behind every activation that is an output, in words.

    `activation_scales`: the int8 scale of the input of each matrix, where activations were quantized.
    """

    model: bytes
    folder: Path
    derivations: dict[str, str]
    activation_scales: dict[str, float] = field(default_factory=dict)


def with_debug_outputs(path: Path, names: Sequence[str]) -> DebugGraph:
    """Return the graph with those named activations as outputs that it has; ParityError if it has hardly any."""
    model = ir.load(path)
    derivations = _add_outputs(model.graph, names)
    if len(derivations) < len(names) // 4:
        raise ParityError(
            f"{path} names {len(derivations)} of the {len(names)} activations that bisecting compares; it was exported "
            "by a version that did not name them: export the bundle again"
        )
    return DebugGraph(ir.to_proto(model).SerializeToString(), path.parent, derivations)


def exact_graph(path: Path, config: LRTConfig, names: Sequence[str] = ()) -> DebugGraph:
    """Return the graph at `path` in float32, with those of the named activations that it has as outputs.

    Every 16-bit value is float32 and activations are not rounded to int8, on the same stored weights. So it computes,
    up to float32's noise, what PyTorch computes with these weights, if its ops and their order are right. A 16-bit
    constant that is the rounding of attention's scale counts as the scale. The scales that were taken out are returned.
    """
    model = ir.load(path)
    derivations = _add_outputs(model.graph, names)
    with raised_as(ParityError, f"{path}: ", "; export the bundle again"):
        scales = _unround_activations(model.graph)
    _unround_scale(model.graph, config.head_dim**-0.5)
    _widen(model.graph)
    finish(model)
    return DebugGraph(ir.to_proto(model).SerializeToString(), path.parent, derivations, scales)


def _add_outputs(graph: ir.Graph, names: Sequence[str]) -> dict[str, str]:
    values = {value.name: value for node in graph for value in node.outputs}
    found = {name: values[name] for name in names if name in values}
    known = frozenset(found)
    outputs = {value.name for value in graph.outputs}
    graph.outputs.extend(value for name, value in found.items() if name not in outputs)
    return {name: _derivation(value, known) for name, value in found.items()}


def _derivation(value: ir.Value, known: frozenset[str]) -> str:
    """Name the ops between a value and the values that are `known`, inputs and weights that it is computed from."""
    ops: dict[ir.Node, None] = {}
    sources: dict[str, None] = {}

    def visit(current: ir.Value) -> None:
        node = current.producer()
        if current is not value and (node is None or current.name in known):
            sources[current.name or "a constant"] = None
        elif node is not None and node not in ops:
            for source in node.inputs:
                if source is not None:
                    visit(source)
            ops[node] = None

    visit(value)
    *before, last = (node.op_type for node in ops)
    after = f" (after {', '.join(before)})" if before else ""
    return f"{last}{after} of {', '.join(sources)}"


def _unround_activations(graph: ir.Graph) -> dict[str, float]:
    """Let products read activations before QuantizeLinear; return the scale by the matrix that each is for.

    Raises ValueError for a form that no export writes.
    """
    scales: dict[str, float] = {}
    for node in nodes(graph, "MatMul"):
        name, dequantize = matrix_name(node) or "", producer(node.inputs[0], behind=("Cast",))
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        quantize = producer(dequantize.inputs[0], behind=("Cast",))
        if quantize is None or quantize.op_type != "QuantizeLinear":
            raise ValueError(f"the input of {name} is dequantized and never quantized")
        ways = [(_number(q, 1), _number(q, 2)) for q in (quantize, dequantize)]
        if ways[0] != ways[1] or ways[0][1] != 0:
            raise ValueError(
                f"the input of {name} is quantized by scale and zero point {ways[0]} and dequantized by {ways[1]}, "
                "expected the same scale and no zero point"
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
    for node in list(graph):
        for position, source in enumerate(node.inputs):
            if source is not None and source.dtype in _LOW and node.op_type not in _TAKES_LOW:
                node.replace_input_with(position, cast_value(graph, source, ir.DataType.FLOAT))


def _number(node: ir.Node, position: int) -> float:
    """Read a scale or zero point of one number, behind casts; 0 where there is none."""
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is None:
        return 0.0
    number = scalar(walk_back(value, ("Cast",)))
    if number is None:
        raise ValueError(f"{node.name} has no constant scale of one number")
    return number
