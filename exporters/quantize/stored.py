"""Read back every matrix and embedding table that a bundle stores for a precision, from its graphs.

All four graphs of a precision are read, and each must take every matrix from the same bytes and dequantize it alike, so
that a check of one holds for all. One matrix is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lrt_deploy.bundle.contract import FLAVOURS, TOKEN_EMBEDS, VALUE_EMBEDS
from lrt_deploy.bundle.manifest import PHASES, TABLES, WEIGHTS, Manifest, graph_path, table_path
from lrt_deploy.bundle.weights import StoredMatrix, matrix_shapes
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ParityError
from lrt_deploy.exporters.graph.rewrite import dtype_name, producer, walk_back
from lrt_deploy.fields import raised_as

_DTYPES = ("int4", "int8", "float16", "bfloat16", "float32")
_TABLE_INPUTS = {TOKEN_EMBEDS: "wte", VALUE_EMBEDS: "value_embeds"}


@dataclass(frozen=True)
class _Use:
    """The initializer of a matrix, and for integers their scales and the rows that share one."""

    tensor: ir.TensorProtocol
    scales: ir.TensorProtocol | None = None
    block: int | None = None
    rows: int | None = None  # of the matrix itself; None: all that are stored

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal in graphs that use one matrix alike; rows of zeros that fill a last block do not count."""
        tensor = self.tensor
        if isinstance(tensor, ir.ExternalTensor):
            place = (str(tensor.location), tensor.offset, tensor.dtype, tuple(tensor.shape.numpy())[1:])
        else:
            place = _content(tensor, self.rows)
        return (place, None if self.scales is None else _content(self.scales), self.block)


class StoredWeights:
    """The matrices and tables of one precision of a bundle; ParityError where its graphs disagree on one of them."""

    def __init__(self, bundle: Path, manifest: Manifest, precision: str) -> None:
        self._config, self._bundle, self._manifest, self._precision = manifest.model, bundle, manifest, precision
        self._uses: dict[str, _Use] = {}
        first = ""
        for flavour in reversed(FLAVOURS):  # windowed first: it never holds more rows than there are
            for phase in PHASES:
                path = bundle / graph_path(precision, phase, flavour)
                with raised_as(ParityError, f"{path}: ", "; export the bundle again"):
                    found = _uses(ir.load(path).graph, manifest.model, manifest.host_embeddings)
                if not self._uses:
                    self._uses, first = found, path.name
                for name, use in self._uses.items():
                    if found[name].key != use.key:
                        raise ParityError(
                            f"{path} takes {name} from other data than {first} beside it; both should read the one "
                            f"copy in {WEIGHTS}: export the bundle again"
                        )

    def __iter__(self) -> Iterator[StoredMatrix]:
        """Yield one matrix after the other; none is kept."""
        for name, record in self._manifest.tables.get(self._precision, {}).items():
            path = self._bundle / table_path(self._precision)
            table = np.memmap(path, np.dtype(record.dtype), "r", record.offset, record.shape)
            yield StoredMatrix(_TABLE_INPUTS[name], record.dtype, table)
        shapes = matrix_shapes(self._config)
        for name, use in self._uses.items():
            values = use.tensor.numpy()
            rows = shapes[name][0] if name in shapes else len(values)
            if values[rows:].any():
                raise ParityError(f"{name} holds rows beyond its {rows} that are not zeros; export the bundle again")
            scales = None if use.scales is None else use.scales.numpy().astype(np.float16)
            yield StoredMatrix(name, dtype_name(use.tensor.dtype), values[:rows], scales, use.block)


def _uses(graph: ir.Graph, config: LRTConfig, host_embeddings: bool) -> dict[str, _Use]:
    """Find every matrix that a product of the graph multiplies by, and every table that it gathers from.

    Raises ValueError for a form that no export writes.
    """
    shapes = matrix_shapes(config)
    found: dict[str, _Use] = {}
    for node in graph:
        if node.op_type == "MatMul":
            name, use = _matrix(node.inputs[1])
            use = dataclasses.replace(use, rows=shapes[name][0] if name in shapes else None)
        elif node.op_type == "Gather" and (value := node.inputs[0]) is not None and value.name in graph.initializers:
            if value.name not in _TABLE_INPUTS.values():
                continue
            name, use = str(value.name), _Use(_known(value))
        else:
            continue
        if name in found and found[name].key != use.key:
            raise ValueError(f"it dequantizes {name} in two ways")
        found[name] = use
    tables = set() if host_embeddings else {"wte"} | ({"value_embeds"} if config.value_embed_layers else set())
    expected = set(matrix_shapes(config)) | tables
    if set(found) != expected:
        wrong = sorted(expected ^ set(found))
        raise ValueError(
            f"it multiplies by {len(found)} matrices and tables, expected {len(expected)}: {wrong[0]} is "
            f"{'missing' if wrong[0] in expected else 'unknown'}"
        )
    return found


def _matrix(value: ir.Value | None) -> tuple[str, _Use]:
    dequantize = producer(value, "DequantizeLinear", behind=("Cast",))
    scales, block = (None, None) if dequantize is None else _scales(dequantize)
    value = walk_back(value if dequantize is None else dequantize.inputs[0], ("Cast",))
    maker = None if value is None else value.producer()
    if value is None or maker is not None:
        found = "nothing" if maker is None else maker.op_type
        raise ValueError(f"a product takes its matrix from {found}, expected Cast or DequantizeLinear")
    return value.name or "", _Use(_known(value), scales, block)


def _scales(node: ir.Node) -> tuple[ir.TensorProtocol, int | None]:
    """Return the scales of a DequantizeLinear, and the rows that share one; None for a whole column."""
    value = walk_back(node.inputs[1], ("Cast",))
    if value is None or len(node.inputs) > 2:
        raise ValueError(f"{node.name} dequantizes with a zero point or without scales")
    tensor = _known(value)
    block, axis = node.attributes.get_int("block_size", 0), node.attributes.get_int("axis", 1)
    expected = (0, 2) if block else (1, 1)
    if (axis, len(tensor.shape)) != expected:
        raise ValueError(f"{node.name} dequantizes along axis {axis} with scales of shape {tensor.shape}")
    return tensor, block or None


def _known(value: ir.Value) -> ir.TensorProtocol:
    tensor = value.const_value
    if tensor is None or dtype_name(tensor.dtype) not in _DTYPES:
        raise ValueError(f"{value.name} is {value.dtype} and no stored matrix")
    if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) not in (WEIGHTS, TABLES):
        raise ValueError(f"{value.name} lies in {tensor.location}, expected {WEIGHTS}")
    return tensor


def _content(tensor: ir.TensorProtocol, rows: int | None = None) -> tuple[Any, ...]:
    data = tensor.numpy()[:rows] if rows is not None else tensor.numpy()
    return (tensor.dtype, tuple(data.shape), hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest())
