"""Integer weights and activations as explicit Q/DQ around each MatMul, by a pass over the float32 graph.

Weights are symmetric, without zero points; a scale is a float16 number, rounded before the weights are divided by it,
so that a float32 and a float16 graph use the very same numbers. The forms are those that ONNX Runtime fuses
(MatMulIntegerToFloat, MatMulNBits) and TensorRT takes. Which matrices, and which activation scales: `plan`.

A matrix whose rows are no multiple of the block is stored with rows of zeros up to one, and its activations get as many
zeros behind them: TensorRT takes the size of a block from the two shapes. ONNX Runtime multiplies by a last block that
is not full as well, exactly and without the copy; `unpad` gives a graph for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lrt_deploy.bundle.precisions import Format
from lrt_deploy.errors import ExportError
from lrt_deploy.exporters.graph.rewrite import (
    add,
    cast_value,
    constant,
    finish,
    lazy,
    matrix_name,
    nodes,
    producer,
    static_dim,
    store,
)

ACTIVATION_ZERO = "activation_zero_point"
# Shares of the largest weight of a block that its int4 grid may end at; the one with the least squared error is taken.
_INT4_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)

Floats = npt.NDArray[np.float32]
Stored = tuple[npt.NDArray[np.float16], npt.NDArray[np.generic]]  # scales, integers


def quantize(
    model: ir.Model,
    kind: Format,
    keep: Collection[str],
    activation_scales: Mapping[str, float],
    stored: Mapping[str, Stored] | None = None,
) -> None:
    """Quantize all products with matrices that are not in `keep`, in place; `stored` ones are rounded already."""
    graph = model.graph
    for node in nodes(graph, "MatMul"):
        name = matrix_name(node)
        if name is None or name in keep:
            continue
        rows = static_dim(node.inputs[1], 0)
        node.replace_input_with(1, _dequantized_weight(graph, node.inputs[1], kind, (stored or {}).get(name)))
        if missing := kind.missing_rows(rows):
            node.replace_input_with(0, _padded(graph, node.inputs[0], missing))
        if kind.activations:
            node.replace_input_with(0, _through_int8(graph, node.inputs[0], activation_scales[name]))
    finish(model)


def unpad(model: ir.Model) -> None:
    """Let products take the matrix and the activations without the zeros that fill the last block, in place.

    In the weights file, which both flavours read, the rows left out are the last bytes of a tensor.
    """
    for node in nodes(model.graph, "Pad"):
        padded, source = node.outputs[0], node.inputs[0]
        for product in list(padded.consumers()):
            dequantize = producer(product.inputs[1], "DequantizeLinear")
            if product.op_type != "MatMul" or dequantize is None:
                raise ExportError(f"{product.name} reads padded activations and has no quantized matrix")
            _cut(dequantize, static_dim(dequantize.inputs[0], 0) - static_dim(padded, -1) + static_dim(source, -1))
            product.replace_input_with(0, source)
        model.graph.remove(node, safe=True)


def weight_scales(weight: Floats, kind: Format) -> npt.NDArray[np.float16]:
    """Return float16 scales, (N) per column or (blocks, N); only an int4 grid may end below the largest weight."""
    whole = np.pad(weight, ((0, kind.missing_rows(len(weight))), (0, 0)))
    blocks = whole[None] if kind.block is None else whole.reshape(-1, kind.block, weight.shape[1])  # (K/b, b, N)
    largest = np.abs(blocks).max(axis=1)
    if kind.bits == 4:
        largest = largest * _best_share(blocks, largest, kind)
    exact = largest / kind.largest
    scales = exact.astype(np.float16)
    # Below 6e-5 float16 has few digits left: round up there, and give an all-zero column any scale.
    scales = np.where(scales < 0.999 * exact, np.nextafter(scales, np.float16(np.inf)), scales)
    scales = np.where(scales == 0, np.float16(1), scales)
    return scales[0] if kind.block is None else scales


def quantized(weight: Floats, scales: npt.NDArray[np.float16], kind: Format) -> npt.NDArray[np.generic]:
    """Return the integers (K, N)."""
    steps = scales.astype(np.float32)  # (K, N), or (N)
    if kind.block is not None:
        steps = np.repeat(steps, kind.block, axis=0)[: len(weight)]
    integers = np.clip(np.rint(weight / steps), -kind.largest, kind.largest)
    result: npt.NDArray[np.generic] = integers.astype(ml_dtypes.int4 if kind.bits == 4 else np.int8)
    return result


def _best_share(blocks: Floats, largest: Floats, kind: Format) -> Floats:
    """Return the share of its largest weight that each block's grid should span, (blocks, N)."""
    best, least = np.ones_like(largest), np.full_like(largest, np.inf)
    for share in _INT4_SHARES:
        steps = np.maximum(largest * share / kind.largest, np.finfo(np.float32).tiny)[:, None]
        errors = ((np.clip(np.rint(blocks / steps), -kind.largest, kind.largest) * steps - blocks) ** 2).sum(axis=1)
        best, least = np.where(errors < least, share, best).astype(np.float32), np.minimum(errors, least)
    return best


def _dequantized_weight(graph: ir.Graph, weight: ir.Value | None, kind: Format, stored: Stored | None) -> ir.Value:
    """Store integers in the initializer, with rows of zeros up to whole blocks; return a DequantizeLinear of it."""
    assert weight is not None and weight.const_value is not None
    rows, columns = weight.const_value.shape.numpy()
    fill = ((0, kind.missing_rows(rows)), (0, 0))
    scales = weight_scales(weight.const_value.numpy(), kind) if stored is None else stored[0]
    scale = cast_value(graph, constant(graph, f"{weight.name}.scale", scales), ir.DataType.FLOAT)
    dtype = ir.DataType.INT4 if kind.bits == 4 else ir.DataType.INT8
    if stored is None:
        shape = (rows + kind.missing_rows(rows), columns)
        store(weight, lazy(weight, dtype, lambda array: np.pad(quantized(array, scales, kind), fill), shape))
    else:
        store(weight, ir.tensor(np.pad(stored[1], fill), dtype=dtype, name=weight.name))
    grid = {"axis": 1} if kind.block is None else {"axis": 0, "block_size": kind.block}
    name = f"{weight.name}.dequantized"
    return add(graph, "DequantizeLinear", [weight, scale], name, weight, ir.DataType.FLOAT, **grid)


def _padded(graph: ir.Graph, x: ir.Value | None, count: int) -> ir.Value:
    """Append `count` zeros to each row of an activation (B, T, K); products that share it share the result."""
    assert x is not None
    for user in x.consumers():
        if user.op_type == "Pad":
            return user.outputs[0]
    pads = constant(graph, f"pad_rows_{count}", np.array([0, 0, 0, 0, 0, count], np.int64))
    result = add(graph, "Pad", [x, pads], f"{x.name}.padded", like=x)
    result.shape = None if x.shape is None else ir.Shape([*x.shape[:-1], static_dim(x, -1) + count])
    return result


def _cut(dequantize: ir.Node, rows: int) -> None:
    """Leave the first `rows` rows of the matrix that a node dequantizes; done already where products share it."""
    weight, result = dequantize.inputs[0], dequantize.outputs[0]
    assert weight is not None
    columns, tensor, name = static_dim(weight, -1), weight.const_value, weight.name or ""
    assert tensor is not None
    shape = ir.Shape([rows, columns])
    if isinstance(tensor, ir.ExternalTensor):
        length = -(-rows * columns * tensor.dtype.bitwidth // 8)
        place, folder = (tensor.location, tensor.offset, length, tensor.dtype), tensor.base_dir
        store(weight, ir.ExternalTensor(*place, shape=shape, name=name, base_dir=folder))
    else:  # too small for the file
        store(weight, ir.tensor(tensor.numpy()[:rows], dtype=tensor.dtype, name=name))
    result.shape = shape


def _through_int8(graph: ir.Graph, x: ir.Value | None, step: float) -> ir.Value:
    """Quantize and dequantize an activation (B, T, K); products that share it share the pair."""
    assert x is not None
    for user in x.consumers():
        if user.op_type == "QuantizeLinear":
            return next(iter(user.outputs[0].consumers())).outputs[0]
    scale = cast_value(graph, constant(graph, f"{x.name}.scale", np.array(step, np.float16)), ir.DataType.FLOAT)
    zero = constant(graph, ACTIVATION_ZERO, np.array(0, np.int8))
    integers = add(graph, "QuantizeLinear", [x, scale, zero], f"{x.name}.int8", x, ir.DataType.INT8)
    name = f"{x.name}.dequantized"
    return add(graph, "DequantizeLinear", [integers, scale, zero], name, x, ir.DataType.FLOAT)
