"""Check an ONNX graph file: external weights lie within the bundle's weights file, and no graph is nested.

A graph that a stranger wrote could name another file, or bytes beyond the end, or hold graphs within graphs. A
deployment has no onnx, so messages are read as unknown fields. Inputs and outputs: see `ort_session`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.empty_pb2 import Empty  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]

from lrt_deploy.errors import BundleError
from lrt_deploy.fields import raised_as, shown
from lrt_deploy.files import open_regular, read_bytes

_LARGEST_GRAPH_BYTES = 64 * 2**20  # a model with 100 layers has about 2 MB
_DOMAINS = ("", "ai.onnx", "com.microsoft")
# Bits of an element by ONNX's number of the type: float, uint8, int8, int32, int64, bool, float16, bfloat16, u/int4.
_BITS = {1: 32, 2: 8, 3: 8, 6: 32, 7: 64, 9: 8, 10: 16, 16: 16, 21: 4, 22: 4}
# Field numbers of onnx.proto.
_GRAPH, _TRAINING, _FUNCTIONS = 7, 20, 25
_NODE, _INITIALIZER, _SPARSE_INITIALIZER = 1, 5, 15
_NODE_ATTRIBUTE, _NODE_DOMAIN = 5, 7
_NESTED = {5: "a tensor", 6: "a graph", 10: "tensors", 11: "graphs", 22: "a sparse tensor", 23: "sparse tensors"}
_DIMS, _DATA_TYPE, _TENSOR_NAME, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 8, 13, 14
_KEY, _VALUE = 1, 2
_VARINT, _BYTES = 0, 2  # protobuf's types of fields
_BROKEN = "it is no protobuf message, or was cut"

Value = int | bytes | None


def check_graph_file(graph: Path, weights: Path) -> None:
    """Raise BundleError unless the graph is a plain one whose external data lie within `weights`, in its folder."""
    data = read_bytes(graph, "the graph", BundleError, _LARGEST_GRAPH_BYTES)
    with open_regular(weights, "the weights file", BundleError) as file:
        size = file.seek(0, 2)
    with raised_as(BundleError, f"{graph} is no graph of a bundle: ", "; export the bundle again"):
        _check_model(data, weights.name, size)


def _check_model(data: bytes, weights: str, size: int) -> None:
    graphs = []
    for number, value in _fields(data):
        if number in (_TRAINING, _FUNCTIONS):
            raise ValueError("it holds functions or training information")
        if number == _GRAPH:
            graphs.append(_message(value))
    if len(graphs) != 1:
        raise ValueError(f"it holds {len(graphs)} graphs, expected 1")
    for number, value in _fields(graphs[0]):
        if number == _NODE:
            _check_node(_message(value))
        elif number == _INITIALIZER:
            _check_tensor(_message(value), weights, size)
        elif number == _SPARSE_INITIALIZER:
            raise ValueError("it holds sparse weights")


def _check_node(data: bytes) -> None:
    for number, value in _fields(data):
        if number == _NODE_DOMAIN and _text(value) not in _DOMAINS:
            raise ValueError(f"a node is of the domain {shown(_text(value))}, expected one of {_DOMAINS}")
        if number == _NODE_ATTRIBUTE:
            for kind, _ in _fields(_message(value)):
                if kind in _NESTED:
                    raise ValueError(f"a node holds {_NESTED[kind]}")


def _check_tensor(data: bytes, weights: str, size: int) -> None:
    """Check the place of an external tensor against the file, and its bytes against its type and shape."""
    dims, kind, outside, name = [], 0, False, ""
    place: dict[str, str] = {}
    for number, value in _fields(data):
        if number == _DIMS:
            if not isinstance(value, int):
                raise ValueError("its dimensions are packed, as no export writes them")
            dims.append(value)
        elif number == _DATA_TYPE and isinstance(value, int):
            kind = value
        elif number == _DATA_LOCATION:
            outside = value == 1
        elif number == _TENSOR_NAME:
            name = _text(value)
        elif number == _EXTERNAL_DATA:
            entry = dict(_fields(_message(value)))
            place[_text(entry.get(_KEY, b""))] = _text(entry.get(_VALUE, b""))
    if not outside and not place:
        return
    if place.get("location") != weights:
        raise ValueError(f"{shown(name)} lies in {shown(place.get('location'))}, expected {weights}")
    offset, length = _count(place, "offset", name), _count(place, "length", name)
    if kind not in _BITS or any(dim >= 2**63 for dim in dims):  # negative
        raise ValueError(f"{shown(name)} is of the type {kind} and the shape {shown(dims)}")
    if length != -(-math.prod(dims) * _BITS[kind] // 8):
        raise ValueError(f"{shown(name)} has {length} bytes, which is not what its type and shape {shown(dims)} need")
    if offset + length > size:
        raise ValueError(f"{shown(name)} lies at bytes {offset} to {offset + length} of {weights}, which has {size}")


def _count(place: dict[str, str], key: str, name: str) -> int:
    text = place.get(key, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ValueError(f"the {key} of {shown(name)} is {shown(text)}, expected a number of bytes")
    return int(text)


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Yield number and value of each field of a message: a whole number, bytes for messages and texts, else None."""
    message = Empty()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(_BROKEN) from error
    for field in UnknownFieldSet(message):
        yield field.field_number, field.data if field.wire_type in (_VARINT, _BYTES) else None


def _message(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(_BROKEN)
    return value


def _text(value: Value) -> str:
    return _message(value).decode("utf-8", "replace")
