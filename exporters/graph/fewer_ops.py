"""Say the same with fewer or faster ops, for ONNX Runtime on a CPU, where each small one costs about 6 us.

A decode step of 12 layers has some 500 nodes besides its products, and caches that hold nothing but weights when they
run. Only rounding changes. Names that `stages` gives stay; engines fuse by themselves, so their graphs are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from .passes import constant, static_dim


def fewer_ops(model: ir.Model) -> None:
    """Run all passes in place."""
    mix_at_once(model.graph)
    divide_at_once(model.graph)
    scale_queries(model.graph)
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)


def divide_at_once(graph: ir.Graph) -> None:
    """Reciprocal and Mul by a constant become a Div."""
    for node in list(graph):
        reciprocal, scale = _producer(node, 0, "Reciprocal"), node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type == "Mul" and reciprocal is not None and scale is not None and scale.const_value is not None:
            _replace(graph, node, ir.node("Div", [scale, reciprocal.inputs[0]]))


def scale_queries(graph: ir.Graph) -> None:
    """Scale q before Attention instead of in it: two to four times faster for one query.

    ORT multiplies q with K by MLAS, which has a kernel for a single row only where the product's factor is 1; with any
    other factor it packs all of K first.
    """
    for node in [node for node in graph if node.op_type == "Attention"]:
        queries = node.inputs[0]
        assert queries is not None and queries.dtype is not None
        scale = node.attributes.get_float("scale", static_dim(queries, -1) ** -0.5)
        if scale == 1:
            continue
        name = f"query_scale_{queries.dtype.name.lower()}_{scale:g}"
        factor = constant(graph, name, np.array(scale, queries.dtype.numpy()))
        scaled = _add(graph, ir.node("Mul", [queries, factor]), f"{queries.name}_scaled")
        scaled.shape, scaled.type = queries.shape, queries.type
        node.replace_input_with(0, scaled)
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)


@dataclass(frozen=True)
class _Mix:
    """r * x + a * x0 + b * m of one layer."""

    total: ir.Node  # the last Add
    scaled: ir.Value  # r * x
    embedded: ir.Value  # x0 (B, T, C)
    latent: ir.Value  # m (B, T, C)
    factors: tuple[float, float]  # a and b


def mix_at_once(graph: ir.Graph) -> None:
    """Every layer adds a * x0 + b * m to its input, with its own a and b: compute that for all layers together."""
    found = [mix for node in graph if (mix := _mix(node)) is not None]
    if len({(mix.embedded, mix.latent) for mix in found}) != 1:
        return
    layers, width = len(found), static_dim(found[0].embedded, -1)
    axis = constant(graph, "mix_axis", np.array([2], np.int64))
    parts = []
    for index, source in enumerate((found[0].embedded, found[0].latent)):
        factors = np.array([[mix.factors[index]] for mix in found], np.float32)  # (L, 1)
        column = _add(graph, ir.node("Unsqueeze", [source, axis]), f"mix_{index}_column")
        parts.append(
            _add(graph, ir.node("Mul", [column, constant(graph, f"mix_{index}_factors", factors)]), f"mix_{index}")
        )
    together = _add(graph, ir.node("Add", parts), "mix")  # (B, T, L, C)
    shape = constant(graph, f"shape_0_0_{layers * width}", np.array([0, 0, layers * width], np.int64))
    flat = _add(graph, ir.node("Reshape", [together, shape]), "mix_flat")
    split = ir.node("Split", [flat], {"axis": -1, "num_outputs": layers}, num_outputs=layers)
    split.name = "mix_split"
    graph.append(split)
    for i, (mix, part) in enumerate(zip(found, split.outputs, strict=True)):
        part.name = f"mix_of_{i}"
        mix.total.replace_input_with(0, mix.scaled)
        mix.total.replace_input_with(1, part)


def _mix(node: ir.Node) -> _Mix | None:
    first, latent = _producer(node, 0, "Add"), _producer(node, 1, "Mul")
    if node.op_type != "Add" or first is None or latent is None:
        return None
    scaled, embedded = _producer(first, 0, "Mul"), _producer(first, 1, "Mul")
    if scaled is None or embedded is None or len(first.outputs[0].uses()) != 1:
        return None
    a, b = _scalar(embedded.inputs[0]), _scalar(latent.inputs[0])
    if a is None or b is None or _scalar(scaled.inputs[0]) is None:
        return None
    x0, m = embedded.inputs[1], latent.inputs[1]
    assert x0 is not None and m is not None
    return _Mix(node, scaled.outputs[0], x0, m, (a, b))


def _producer(node: ir.Node, index: int, op: str) -> ir.Node | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == op else None


def _scalar(value: ir.Value | None) -> float | None:
    tensor = None if value is None else value.const_value
    return float(tensor.numpy()) if tensor is not None and tensor.size == 1 else None


def _add(graph: ir.Graph, node: ir.Node, name: str) -> ir.Value:
    node.name = node.outputs[0].name = name
    graph.append(node)  # `fewer_ops` sorts
    return node.outputs[0]


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    result, before = new.outputs[0], old.outputs[0]
    new.name, result.name, result.shape, result.type = old.name, before.name, before.shape, before.type
    graph.insert_after(old, new)
    before.replace_all_uses_with(result)
    before.name = None
    graph.remove(old, safe=True)
