"""Derive the other graphs from the traced one: the windowed flavour, the decode step (T = 1), and TensorRT's copy.

Deriving instead of tracing again makes all of them the same computation on the same weights by construction.
"""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.contract import Flavour
from lrt_deploy.bundle.precisions import base_dtype
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ExportError

from .passes import fewer_ops, rotate_together
from .rewrite import add, constant, finish, nodes


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
