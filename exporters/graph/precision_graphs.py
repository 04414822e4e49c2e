"""Write the four graphs and the weights file of one precision, from the one traced graph and a plan.

Weights are stored (cast, quantized) in a float32 graph, which is written once; both flavours are then derived from it,
each in its own base type, and so share every number. In the base type is whatever reads much memory: MatMul, Attention,
TensorScatter, the state and the Q/DQ around them, with Casts where types meet. Norms, residual stream, gates, rotary
embedding, softcap and logits stay in float32. Ops that only move numbers (and relu and its square, which round once)
are in the base type where all their readers are.

Tensors start on page boundaries of the file, so that a runtime can map it; small constants stay inside the graphs. With
`take_out_tables` rows of the embedding tables come in as float32 instead, for engines and providers that would hold
whole tables: as the graph's own Cast would give them, so the numbers are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.external_data import CallbackInfo, convert_tensors_to_external
from onnx_ir.passes import common

from lrt_deploy.bundle import contract, manifest
from lrt_deploy.bundle.contract import Flavour
from lrt_deploy.bundle.manifest import TABLE_ALIGNMENT, TableRecord
from lrt_deploy.bundle.precisions import Dtype, base_dtype
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ExportError
from lrt_deploy.exporters.quantize.gptq import round_by_gptq
from lrt_deploy.exporters.quantize.plan import Plan
from lrt_deploy.exporters.quantize.qdq import quantize, unpad

from . import passes, verify
from .rewrite import DTYPES, cast_value, finish, lazy, matrix_name, nodes, store

Progress = Callable[[str, int, int], None]


def write_precision(
    traced: ir.Model, config: LRTConfig, capacity: int, plan: Plan, folder: Path, say: Progress
) -> tuple[dict[str, verify.Counts], dict[str, manifest.TableRecord]]:
    """Write graphs and weights below `folder`; return the counts of each flavour's graphs, and tables in a file."""
    out = folder / "graphs" / plan.precision
    out.mkdir(parents=True)
    stored = store_weights(traced, plan)
    tables: dict[str, manifest.TableRecord] = {}
    if plan.host_embeddings:
        report = partial(say, f"writing {plan.precision} tables")
        tables = take_out_tables(stored, config, out / manifest.TABLES, report)
    externalize(stored, out / manifest.WEIGHTS, partial(say, f"writing {plan.precision} weights"))
    operations: dict[str, verify.Counts] = {}
    for flavour in contract.FLAVOURS:
        derived = derive(stored, config, capacity, plan, flavour)
        base = base_dtype(plan.precision, flavour)
        expected = verify.expected_counts(config, plan.kind, base, len(plan.keep), len(plan.float32))
        operations[flavour] = verify.check(derived.graph, expected, f"the {flavour} graph in {plan.precision}")
        for phase, make in (("prefill", ir.Model.clone), ("decode_step", passes.decode_step)):
            final = make(derived)
            passes.describe(final, config, flavour, plan.precision)
            ir.save(final, folder / manifest.graph_path(plan.precision, phase, flavour))
    return operations, tables


def store_weights(traced: ir.Model, plan: Plan) -> ir.Model:
    """Return a copy of the traced graph that computes in float32 on weights as the precision stores them."""
    model = traced.clone()
    if plan.kind is not None:
        stored = {
            name: round_by_gptq(value.const_value.numpy(), plan.moments[name], plan.kind)
            for name, value in model.graph.initializers.items()
            if name in plan.moments and value.const_value is not None
        }
        quantize(model, plan.kind, plan.keep, plan.activation_scales, stored)
    if plan.precision != "fp32":
        cast_weights(model, base_dtype(plan.precision, "full"), plan.float32)
    return model


def derive(stored: ir.Model, config: LRTConfig, capacity: int, plan: Plan, flavour: Flavour) -> ir.Model:
    """Return the flavour's prefill graph in its base type."""
    model = cast_model(stored, base_dtype(plan.precision, flavour), plan.float32)
    if flavour == "windowed":
        unpad(model)
        model = passes.windowed(model, config, capacity)
    passes.check_ops(model.graph)
    return model


_INLINE_BYTES = 1024
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INPUT_OF = {"wte": contract.TOKEN_EMBEDS, "value_embeds": contract.VALUE_EMBEDS}


def externalize(model: ir.Model, path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Move all large initializers of `model` into the file `path`, and point them there by its bare name."""
    known = [(value, value.const_value) for value in model.graph.initializers.values() if value.const_value is not None]
    large = [(value, tensor) for value, tensor in known if tensor.nbytes > _INLINE_BYTES]
    for (value, _), tensor in zip(large, write([tensor for _, tensor in large], path, progress), strict=True):
        value.const_value = tensor


def write(
    tensors: Sequence[ir.TensorProtocol], path: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[ir.ExternalTensor]:
    """Write tensors one after the other into `path` and return them as they lie there; `progress` gets bytes."""
    sizes = [tensor.nbytes for tensor in tensors]

    def report(tensor: ir.TensorProtocol, info: CallbackInfo) -> None:
        progress(sum(sizes[: info.index]), sum(sizes))

    written = convert_tensors_to_external(
        tensors, path.parent, path.name, report, alignment=TABLE_ALIGNMENT, align_threshold=0
    )
    progress(sum(sizes), sum(sizes))
    return written


def take_out_tables(
    model: ir.Model, config: LRTConfig, path: Path, progress: Callable[[int, int], None]
) -> dict[str, TableRecord]:
    """Replace the tables of a float32 graph by inputs, in place, write them to `path`, and return their records."""
    graph, tables = model.graph, {}
    specs = {spec.name: spec for spec in contract.embedding_inputs(config)}
    for node in nodes(graph, "Gather"):
        table = node.inputs[0]
        if table is None or table.const_value is None or table.name not in _INPUT_OF:
            continue
        name = _INPUT_OF[table.name]
        rows = ir.Value(name=name, shape=ir.Shape(specs[name].shape), type=ir.TensorType(ir.DataType.FLOAT))
        tables[name] = table.const_value
        _replace_rows(node, rows)
        graph.inputs.append(rows)
        graph.initializers.pop(table.name)
    if set(tables) != set(specs):
        raise ExportError(f"host embeddings: the graph gathers {sorted(tables)}, expected {sorted(specs)}, each once")
    common.RemoveUnusedNodesPass()(model)
    first = next(value for value in graph.inputs if value.name == contract.TOKEN_EMBEDS)
    graph.inputs.remove(first)
    graph.inputs[0] = first  # in place of the ids, which nothing reads any more
    records = {}
    for name, tensor in zip(tables, write(list(tables.values()), path, progress), strict=True):
        size, width = tensor.shape.numpy()
        records[name] = TableRecord(_NAMES[tensor.dtype], (size, width), tensor.offset or 0)
    return records


def _replace_rows(gather: ir.Node, rows: ir.Value) -> None:
    """Let the readers of gathered rows, cast to float32 where the table has fewer bits, read the input instead."""
    found = gather.outputs[0]
    if found.dtype == ir.DataType.FLOAT:
        found.replace_all_uses_with(rows)
        return
    for user in list(found.consumers()):
        if user.op_type != "Cast" or user.outputs[0].dtype != ir.DataType.FLOAT:
            raise ExportError(f"host embeddings: {user.name} reads rows of {found.dtype} without widening them")
        user.outputs[0].replace_all_uses_with(rows)


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
