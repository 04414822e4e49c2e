"""Passes over the traced graph (onnx-ir): clean it, derive the other graphs, and use fewer or faster ops.

`clean` removes what torch's exporter leaves behind and keeps the numbers. The windowed flavour, the decode step (T = 1)
and TensorRT's copy are derived and not traced again, so that all are the same computation on the same weights by
construction. `fewer_ops` is for ONNX Runtime on a CPU, where each small op costs about 6 us and a decode step of 12
layers has some 500 of them: only rounding changes. `rotate_together` lets TensorRT fuse more.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.contract import Flavour
from lrt_deploy.bundle.precisions import base_dtype
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ExportError

from .rewrite import add, constant, finish, nodes, producer, scalar, static_dim

# The ops of a graph. Another one means that the trace took a path that was never measured.
ALLOWED_OPS = frozenset(
    """
    Add And Attention Cast Concat DequantizeLinear Div Exp Expand Gather GatherElements GreaterOrEqual LessOrEqual
    MatMul Mul Neg Pad QuantizeLinear RMSNormalization Range Reciprocal Relu Reshape RotaryEmbedding Shape Slice Split
    Squeeze Sub Tanh TensorScatter Transpose Unsqueeze
    """.split()  # noqa: SIM905 - a list of names reads better as text
)


ACTIVATION_DOMAIN = "lrt_deploy"  # of the nodes by which `trace` says where an activation is


def clean(model: ir.Model) -> None:
    """Run all passes in place."""
    name_activations(model)
    share_norm_scales(model.graph)
    freeze_reshapes(model.graph)
    square_by_product(model.graph)
    for cleanup in (common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass()):
        cleanup(model)
    forget_source(model)
    check_ops(model.graph)


def name_activations(model: ir.Model) -> None:
    """Name the values that the model marked as in `activations` (the first mark counts), and remove the marks."""
    graph, named = model.graph, set()
    for node in [node for node in graph if node.domain == ACTIVATION_DOMAIN]:
        source, result = node.inputs[0], node.outputs[0]
        assert source is not None
        maker = source.producer()
        result.replace_all_uses_with(source)
        graph.remove(node, safe=True)
        if maker is not None and source not in named:
            source.name = node.attributes["stage"].as_string()
            named.add(source)
            if len(maker.outputs) == 1:
                maker.name = source.name
    model.opset_imports.pop(ACTIVATION_DOMAIN, None)


def share_norm_scales(graph: ir.Graph) -> None:
    """Give all norms of a width one vector of ones as weight, which torch computes in front of every norm."""
    for node in nodes(graph, "RMSNormalization"):
        width = static_dim(node.inputs[0], -1)
        node.replace_input_with(1, constant(graph, f"norm_scale_{width}", np.ones(width, np.float32)))


def freeze_reshapes(graph: ir.Graph) -> None:
    """Make the shapes of reshapes the constants [0, 0, ...]: all keep (B, T) and change the axes behind."""
    for node in nodes(graph, "Reshape"):
        source, result = node.inputs[0], node.outputs[0]
        if source is None or source.shape is None or result.shape is None or source.shape[:2] != result.shape[:2]:
            raise ExportError(
                f"graph clean-up: {node.name} reshapes more than the trailing axes; expected (B, T) to stay"
            )
        shape = [0, 0, *(static_dim(result, axis) for axis in range(2, len(result.shape)))]
        node.replace_input_with(1, constant(graph, f"shape_{'_'.join(map(str, shape))}", np.array(shape, np.int64)))
        node.attributes.pop("allowzero", None)


def square_by_product(graph: ir.Graph) -> None:
    """Spell x ** 2 as x * x, the same bit for bit: Pow has fewer kernels, and a second type to agree with."""
    for node in nodes(graph, "Pow"):
        if scalar(node.inputs[1]) == 2.0:
            _replace(graph, node, ir.node("Mul", [node.inputs[0], node.inputs[0]]))


def forget_source(model: ir.Model) -> None:
    """Drop the tracer's notes: they hold source paths of the exporting machine and double the file."""
    model.metadata_props.clear()
    common.ClearMetadataAndDocStringPass()(model)
    graph = model.graph
    results = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *graph.outputs, *results, *graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None


def check_ops(graph: ir.Graph) -> None:
    """Raise ExportError for a graph with an op that is not on the list, or from another domain."""
    unexpected = {f"{node.domain}::{node.op_type}" for node in graph if node.domain or node.op_type not in ALLOWED_OPS}
    if unexpected:
        raise ExportError(
            f"the traced graph holds {', '.join(sorted(unexpected))}, which no backend here was measured with; "
            "this happens when the installed torch traces differently: install the versions of constraints.txt"
        )


def fewer_ops(model: ir.Model) -> None:
    """Run all passes in place."""
    mix_at_once(model.graph)
    divide_at_once(model.graph)
    scale_queries(model.graph)
    finish(model)


def divide_at_once(graph: ir.Graph) -> None:
    """Replace Reciprocal and Mul by a constant by a Div."""
    for node in nodes(graph, "Mul"):
        reciprocal, scale = producer(node.inputs[0], "Reciprocal"), node.inputs[1]
        if reciprocal is not None and scale is not None and scale.const_value is not None:
            _replace(graph, node, ir.node("Div", [scale, reciprocal.inputs[0]]))


def scale_queries(graph: ir.Graph) -> None:
    """Scale q before Attention instead of in it: two to four times faster for one query.

    ORT multiplies q with K by MLAS, which has a kernel for a single row only where the product's factor is 1; with any
    other factor it packs all of K first.
    """
    for node in nodes(graph, "Attention"):
        queries = node.inputs[0]
        assert queries is not None and queries.dtype is not None
        scale = node.attributes.get_float("scale", static_dim(queries, -1) ** -0.5)
        if scale == 1:
            continue
        name = f"query_scale_{queries.dtype.name.lower()}_{scale:g}"
        factor = constant(graph, name, np.array(scale, queries.dtype.numpy()))
        node.replace_input_with(0, add(graph, "Mul", [queries, factor], f"{queries.name}_scaled", like=queries))
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)


def rotate_together(graph: ir.Graph) -> None:
    """Rotate and normalize queries and keys of a layer as one tensor (B, H + G, T, D), with the same bits.

    Both ops work on each head alone. TensorRT-RTX 1.7.1 needs 9 kernels a layer then, and 11 without it.
    """
    for attention in nodes(graph, "Attention"):
        written = producer(attention.inputs[1], "TensorScatter")
        sources = attention.inputs[0], None if written is None else written.inputs[1]
        norms = [producer(value, "RMSNormalization", behind=("Cast",)) for value in sources]
        turns = [None if norm is None else producer(norm.inputs[0], "RotaryEmbedding") for norm in norms]
        (query_norm, key_norm), (query_turn, key_turn) = norms, turns
        if not _alike(query_norm, key_norm) or not _alike(query_turn, key_turn):
            continue
        assert query_norm is not None and key_norm is not None and query_turn is not None and key_turn is not None
        label, queries, keys = f"{attention.name}_together", query_turn.inputs[0], key_turn.inputs[0]
        heads = [static_dim(value, 1) for value in (queries, keys)]
        joined = add(graph, "Concat", [queries, keys], f"{label}_joined", axis=1)
        for old, name in ((query_turn, "rotated"), (query_norm, "normed")):
            inputs = [joined, *old.inputs[1:]]
            joined = add(graph, old.op_type, inputs, f"{label}_{name}", None, None, **old.attributes)
        sizes = constant(graph, f"heads_{heads[0]}_{heads[1]}", np.array(heads, np.int64))
        split = ir.node("Split", [joined, sizes], {"axis": 1}, num_outputs=2)
        split.name = f"{label}_split"
        graph.append(split)
        for part, norm in zip(split.outputs, (query_norm, key_norm), strict=True):
            old_value = norm.outputs[0]
            part.shape, part.type = old_value.shape, old_value.type
            old_value.replace_all_uses_with(part)
            part.name, old_value.name = old_value.name, None


def _alike(one: ir.Node | None, other: ir.Node | None) -> bool:
    if one is None or other is None:
        return False
    settings = [{name: attribute.value for name, attribute in node.attributes.items()} for node in (one, other)]
    return settings[0] == settings[1] and one.inputs[1:] == other.inputs[1:]


class _Mix(NamedTuple):
    """r * x + a * x0 + b * m of one layer."""

    total: ir.Node  # the last Add
    scaled: ir.Value  # r * x
    embedded: ir.Value  # x0 (B, T, C)
    latent: ir.Value  # m (B, T, C)
    factors: tuple[float, float]  # a and b


def mix_at_once(graph: ir.Graph) -> None:
    """Compute a * x0 + b * m, which every layer adds to its input with its own a and b, for all layers together."""
    found = [mix for node in graph if (mix := _mix(node)) is not None]
    if len({(mix.embedded, mix.latent) for mix in found}) != 1:
        return
    layers, width = len(found), static_dim(found[0].embedded, -1)
    axis = constant(graph, "mix_axis", np.array([2], np.int64))
    parts = []
    for index, source in enumerate((found[0].embedded, found[0].latent)):
        factors = np.array([[mix.factors[index]] for mix in found], np.float32)  # (L, 1)
        column = add(graph, "Unsqueeze", [source, axis], f"mix_{index}_column")
        parts.append(add(graph, "Mul", [column, constant(graph, f"mix_{index}_factors", factors)], f"mix_{index}"))
    together = add(graph, "Add", parts, "mix")  # (B, T, L, C)
    shape = constant(graph, f"shape_0_0_{layers * width}", np.array([0, 0, layers * width], np.int64))
    flat = add(graph, "Reshape", [together, shape], "mix_flat")
    split = ir.node("Split", [flat], {"axis": -1, "num_outputs": layers}, num_outputs=layers)
    split.name = "mix_split"
    graph.append(split)
    for i, (mix, part) in enumerate(zip(found, split.outputs, strict=True)):
        part.name = f"mix_of_{i}"
        mix.total.replace_input_with(0, mix.scaled)
        mix.total.replace_input_with(1, part)


def _mix(node: ir.Node) -> _Mix | None:
    if node.op_type != "Add":
        return None
    first, latent = producer(node.inputs[0], "Add"), producer(node.inputs[1], "Mul")
    if first is None or latent is None:
        return None
    scaled, embedded = producer(first.inputs[0], "Mul"), producer(first.inputs[1], "Mul")
    if scaled is None or embedded is None or len(first.outputs[0].uses()) != 1:
        return None
    a, b = scalar(embedded.inputs[0]), scalar(latent.inputs[0])
    if a is None or b is None or scalar(scaled.inputs[0]) is None:
        return None
    x0, m = embedded.inputs[1], latent.inputs[1]
    assert x0 is not None and m is not None
    return _Mix(node, scaled.outputs[0], x0, m, (a, b))


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    new.name = old.name
    ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs)


def decode_step(model: ir.Model) -> ir.Model:
    """Return the graph for exactly one new token: `tokens` is 1 everywhere."""
    model = model.clone()
    fix_dims(model, {"tokens": 1})
    return model


def fix_dims(model: ir.Model, sizes: dict[str, int]) -> None:
    """Give symbolic dimensions a size wherever they occur, in place."""
    for value in [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]:
        if value.shape is not None:
            names = [str(dim.value) if isinstance(dim, ir.SymbolicDim) else "" for dim in value.shape]
            value.shape = ir.Shape([sizes.get(name, dim) for name, dim in zip(names, value.shape, strict=True)])


def for_tensorrt(model: ir.Model, capacity: int, decompose: bool) -> None:
    """Edit a `full` graph in place as TensorRT wants it: `capacity` cache slots, one row of logits, fewer kernels.

    Attention in float32 is marked as decomposable, and with `decompose` all attention: TensorRT has fused kernels for
    some shapes and 16-bit types only.
    """
    fix_dims(model, {"capacity": capacity, "rows": 1})
    for node in nodes(model.graph, "Attention"):
        if decompose or node.outputs[0].dtype == ir.DataType.FLOAT:
            node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)
    rotate_together(model.graph)
    finish(model)


# ORT's Slice copies, on one thread: with Attention 14 us a slot over 12 layers of width 768, without it 5 us.
# So a Slice pays only in caches that can grow to several times the window.
_SLICED_BELOW = 1 / 4  # of the capacity


def windowed(model: ir.Model, config: LRTConfig, capacity: int) -> ir.Model:
    """Mask attention by `slot_positions`, and slice K, V and mask to the live window where windows are small.

    Attention in ORT's CPU provider costs what its key length costs, masked or not. The runtime keeps caches short;
    slices are for windows far smaller than `capacity`, the most slots that a cache may come to have.
    """
    model = model.clone()
    fewer_ops(model)
    graph = model.graph
    end, slots = _input(contract.WINDOW_END, 1), _input(contract.SLOT_POSITIONS, "capacity")
    starts = {window: _input(contract.window_start(window), 1) for window in contract.distinct_windows(config)}
    masks, sliced = {}, {window for window in starts if window + 1 < _SLICED_BELOW * capacity}
    slot_axis, cache_axis = (constant(graph, f"slice_axis_{i}", np.array([i], np.int64)) for i in (0, 2))
    for window, start in starts.items():
        bounds = [slots, start, end, slot_axis]
        live = add(graph, "Slice", bounds, f"window_{window}_slots") if window in sliced else slots
        masks[window] = _window_mask(graph, window, live)
    graph.inputs[4:4] = [*starts.values(), end, slots]
    layers = {contract.present_cache(i)[0]: i for i in range(config.n_layer)}
    for node in nodes(graph, "Attention"):
        layer = layers.get((node.inputs[1] or node.outputs[0]).name or "")
        if layer is None:
            raise ExportError(f"windowed flavour: the keys of {node.name} are not a cache output of the contract")
        window = config.windows[layer]
        for position in (1, 2) if window in sliced else ():
            cache = node.inputs[position]
            assert cache is not None
            bounds = [cache, starts[window], end, cache_axis]
            node.replace_input_with(position, add(graph, "Slice", bounds, f"{cache.name}_live"))
        node.replace_input_with(3, masks[window])
    finish(model)
    return model


def describe(model: ir.Model, config: LRTConfig, flavour: Flavour, precision: str) -> None:
    """Write contract, state, precision and model configuration into the metadata of a graph."""
    model.producer_name, model.producer_version = "lrt-deploy", None
    model.graph.name = f"lrt_{flavour}"
    on_host = model.graph.inputs[0].name == contract.TOKEN_EMBEDS
    model.metadata_props["lrt_deploy.contract"] = json.dumps(
        contract.describe(config, flavour, base_dtype(precision, flavour), on_host)
    )
    model.metadata_props["lrt_deploy.precision"] = precision
    model.metadata_props["lrt_deploy.model"] = json.dumps(config.to_dict())


def _window_mask(graph: ir.Graph, window: int, slots: ir.Value) -> ir.Value:
    """Make the mask (B, 1, T, S): position t attends to slot s when t - window <= s <= t, as in `model.visible`."""

    def node(op: str, inputs: list[ir.Value], label: str) -> ir.Value:
        return add(graph, op, inputs, f"window_{window}_{label}")

    axes = constant(graph, "query_axes", np.array([1, 3], np.int64))
    query = node("Unsqueeze", [graph.inputs[1], axes], "query")  # (B, 1, T, 1)
    size = constant(graph, f"window_{window}", np.array(window, np.int64))
    past = node("LessOrEqual", [slots, query], "past")
    near = node("GreaterOrEqual", [slots, node("Sub", [query, size], "oldest")], "near")
    return node("And", [past, near], "mask")


def _input(name: str, size: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape([size]), type=ir.TensorType(ir.DataType.INT64))
