"""Facts about an ONNX graph on disk: what goes in and out, what it computes with, and what it says of itself.

The weights stay on disk. Knows ONNX, and of this project only the names of the metadata entries that `export` writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrt_deploy.errors import InputError
from lrt_deploy.files import parse_json, read_bytes

if TYPE_CHECKING:
    import onnx

_LARGEST_MESSAGE_BYTES = 2**31 - 1  # protobuf's own limit


def graph_fields(path: Path) -> dict[str, Any]:
    """The JSON fields of a graph; InputError for a file that is none."""
    model = load_graph(path)
    graph = model.graph
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return {
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": [value_fields(value) for value in graph.input],
        "outputs": [value_fields(value) for value in graph.output],
        "nodes": len(graph.node),
        "operators": dict(Counter(node.op_type for node in graph.node).most_common()),
        "computes": computes(path, model),
        "initializers": len(graph.initializer),
        "initializer_bytes": sum(tensor_bytes(tensor) for tensor in graph.initializer),
        "external_files": sorted(
            {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
        ),
        "contract": parse_metadata(path, metadata, "lrt_deploy.contract"),
        "model": parse_metadata(path, metadata, "lrt_deploy.model"),
    }


def computes(path: Path, model: onnx.ModelProto) -> dict[str, dict[str, int]]:
    """How many products, attentions and cache writes run in which type, counted as an export counts them."""
    import onnx_ir as ir

    from lrt_deploy.exporters.graph.verify import count

    try:
        return count(ir.serde.deserialize_model(model).graph)
    except Exception as error:  # of many types, each for another contradiction in a graph
        reason = _first_line(error.__cause__ or error)
        raise InputError(f"{path} is no valid ONNX graph: {reason}; it is damaged, or contradicts itself") from error


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph without its weights."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    data = read_bytes(path, "the graph", InputError, _LARGEST_MESSAGE_BYTES)
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise InputError(f"{path} is not an ONNX graph: {error}; it is damaged or something else") from error
    if not model.graph.node:
        raise InputError(f"{path} is not an ONNX graph: it holds no nodes; it is damaged or something else")
    return model


def value_fields(value: onnx.ValueInfoProto) -> dict[str, Any]:
    """Name, dtype and dimensions of an input or output; a name stands for a free dimension."""
    tensor = value.type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim]
    return {"name": value.name, "dtype": dtype_of(tensor.elem_type)[0], "dims": dims}


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Size of an initializer, wherever it is stored."""
    count = 1
    for size in tensor.dims:
        count *= int(size)
    return count * dtype_of(tensor.data_type)[1] // 8


def dtype_of(data_type: int) -> tuple[str, int]:
    """Name and bits of one of ONNX's element types; a number that ONNX does not know has neither."""
    import onnx

    known = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    name = known.get(data_type, f"unknown type {data_type}")
    name = {"float": "float32", "double": "float64"}.get(name, name)
    bits = 8 if name == "bool" else next((n for n in (64, 32, 16, 8, 4, 2) if str(n) in name), 0)
    return name, bits if data_type in known else 0


def parse_metadata(path: Path, metadata: Mapping[str, str], name: str) -> dict[str, Any] | None:
    """The JSON object in one metadata entry, None if there is none."""
    if name not in metadata:
        return None
    found = parse_json(metadata[name], f"the metadata {name} of {path}", InputError)
    if not isinstance(found, dict):
        raise InputError(f"the metadata {name} of {path} is {str(found)[:60]}, expected an object")
    return found


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__} {text.splitlines()[0][:200]}" if text else type(error).__name__
