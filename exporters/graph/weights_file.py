"""Write initializers into files beside the graphs: weights, and embedding tables that are taken out of the graphs.

All graphs of a precision share one file of weights. Tensors start on page boundaries, so that a runtime can map the
file instead of reading it. Small constants (shapes, lambdas) stay inside the graphs.

Tables are most of the parameters, and a token reads one row of each. Where a runtime maps weights they cost little in
the graph; an engine, or a provider that copies weights to its device, would hold all of them. With `take_out_tables`
the rows of the new tokens come in as float32, as the graph's own Cast would give them, so the numbers are the same to
the bit. `runtime.backends.host_tables` gathers the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.external_data import CallbackInfo, convert_tensors_to_external
from onnx_ir.passes import common

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.manifest import TABLE_ALIGNMENT, TableRecord
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ExportError

from .rewrite import DTYPES, nodes

_INLINE_BYTES = 1024
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INPUT_OF = {"wte": contract.TOKEN_EMBEDS, "value_embeds": contract.VALUE_EMBEDS}

Progress = Callable[[int, int], None]


def externalize(model: ir.Model, path: Path, progress: Progress = lambda done, total: None) -> None:
    """Move all large initializers of `model` into the file `path`, and point them there by its bare name."""
    known = [(value, value.const_value) for value in model.graph.initializers.values() if value.const_value is not None]
    large = [(value, tensor) for value, tensor in known if tensor.nbytes > _INLINE_BYTES]
    for (value, _), tensor in zip(large, write([tensor for _, tensor in large], path, progress), strict=True):
        value.const_value = tensor


def write(
    tensors: Sequence[ir.TensorProtocol], path: Path, progress: Progress = lambda done, total: None
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


def take_out_tables(model: ir.Model, config: LRTConfig, path: Path, progress: Progress) -> dict[str, TableRecord]:
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
