"""Write the four graphs and the weights file of one precision, from the one traced graph and a plan.

Weights are stored (cast, quantized) in a float32 graph, which is written once; both flavours are then derived from it,
each in its own base type, and so share every number. Tensors start on page boundaries of the file, so that a runtime
can map it. Small constants (shapes, lambdas) stay inside the graphs.

Embedding tables are most of the parameters, and a token reads one row of each. An engine, or a provider that copies
weights to its device, would hold all of them. With `take_out_tables` the rows of the new tokens come in as float32, as
the graph's own Cast would give them, so the numbers are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import onnx_ir as ir
from onnx_ir.external_data import CallbackInfo, convert_tensors_to_external
from onnx_ir.passes import common

from lrt_deploy.bundle import contract, manifest
from lrt_deploy.bundle.contract import Flavour
from lrt_deploy.bundle.manifest import TABLE_ALIGNMENT, TableRecord
from lrt_deploy.bundle.precisions import base_dtype
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ExportError
from lrt_deploy.exporters.quantize.plan import Plan
from lrt_deploy.exporters.quantize.qdq import quantize, round_by_gptq, unpad

from . import passes, variants, verify
from .cast import cast_model, cast_weights
from .rewrite import DTYPES, nodes

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
        for phase, make in (("prefill", ir.Model.clone), ("decode_step", variants.decode_step)):
            final = make(derived)
            variants.describe(final, config, flavour, plan.precision)
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
        model = variants.windowed(model, config, capacity)
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
