"""Decode states as files: one safetensors file with the live part of every row, its history, and where it came from.

    metadata   format, format_version, model_sha256, bundle_sha256, checkpoint_sha256, precision, state_dtype, backend,
               book, sha256
    N.tokens   (n) int64                     N.latents   (n, C) float32, what each token left
    N.past_key_L, N.past_value_L             (G, n, D) in the caches' own type; bfloat16 as its 16 bits
    N.logits   (V) float32, if known         N.kept.M    (V) float32, logits after M tokens

N is the row. `book` is JSON: lengths and the few numbers beside the tensors. `sha256` covers everything else, so a
damaged file is found out whatever is damaged. A file is checked as a whole before a state is made of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes  # noqa: F401 - teaches numpy the name bfloat16
import msgspec
import numpy as np
import safetensors
from msgspec import Meta
from numpy.typing import NDArray

from lrt_deploy.errors import StateError
from lrt_deploy.fields import Count, convert, shown
from lrt_deploy.files import atomic_write, check_replaceable, open_regular
from lrt_deploy.types import IntArray, PrefillReport

from .identity import Identity, Origin
from .state import DecodeState

FORMAT, FORMAT_VERSION = "lrt-deploy decode state", 1

_IDENTITY = ("model_sha256", "precision", "state_dtype", "bundle_sha256")

_DTYPES = {"float32": "F32", "float16": "F16", "uint16": "U16", "int64": "I64"}  # as safetensors calls them

_READABLE = (*_DTYPES.values(), "F64", "I32", "I16", "I8", "U8", "U32", "U64", "BOOL")  # NumPy has these
_LARGEST_HEADER_BYTES = 32 * 2**20  # names and places of the arrays, and `extra`

Arrays = dict[str, NDArray[Any]]


def save_state(state: DecodeState, path: Path) -> None:
    """Write a state to a file that only its owner may read, in place of an older state only when it is whole.

    Raises StateError for a path with a file that is no state, and leaves it as it is.
    """
    check_replaceable(path, "the state", lambda head: f'"format":"{FORMAT}"'.encode() in head, StateError)
    arrays: Arrays = {}
    for row in range(state.batch):
        arrays |= {f"{row}.{name}": array for name, array in state.export_row(row).items()}
    arrays = {name: _storable(array) for name, array in arrays.items()}
    metadata = _metadata(state, path)
    metadata["sha256"] = _digest(metadata, arrays)
    try:
        with atomic_write(path, private=True) as partial:
            _write(partial, arrays, metadata)
    except OSError as error:
        raise StateError(f"the state could not be saved to {path}: {error}") from error


def _write(path: Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    """Write the format of safetensors into the file that is there, array by array.

    The library's own writer makes a temporary file that stays when it is killed, or copies all arrays in memory.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    names, end = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name)), 0  # so that each is aligned
    for name in names:
        begin, end = end, end + arrays[name].nbytes
        dtype, shape = _DTYPES[arrays[name].dtype.name], list(arrays[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("r+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(arrays[name].tobytes() if arrays[name].size == 0 else arrays[name].data)


def load_state(path: Path, origin: Origin) -> DecodeState:
    """The state in a file, on this decoder; raises StateError with the reason why it cannot be used."""
    file = read_file(path)
    if why := origin.identity.why_not(file.identity):
        raise StateError(f"{path} cannot be used here: {why}")
    lengths = file.lengths
    if len(lengths) > origin.max_batch_size or max(lengths) > origin.capacity:
        raise StateError(
            f"{path} holds {len(lengths)} sequence(s) of up to {max(lengths)} tokens; this decoder takes "
            f"{origin.max_batch_size} of {origin.capacity}"
        )
    state = DecodeState(origin, len(lengths))
    _check_arrays(file, state)
    numbers = {name: file.book[name] for name in ("prefill", "read_within", "computed_tokens")}
    state.fill([file.row(row) for row in range(state.batch)], **numbers)
    state.extra = file.book["extra"]
    return state


@dataclass(frozen=True)
class StateFile:
    """The content of an intact file."""

    path: Path
    identity: Identity
    book: dict[str, Any]
    arrays: Arrays

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        lengths: list[int] = self.book["lengths"]
        return lengths

    def row(self, row: int) -> Arrays:
        """The arrays of one row by their own names, caches in their own type."""
        found = {n.partition(".")[2]: a for n, a in self.arrays.items() if n.startswith(f"{row}.")}
        dtype = np.dtype(self.identity.state_dtype)
        return {name: array.view(dtype) if name.startswith("past_") else array for name, array in found.items()}


def read_file(path: Path) -> StateFile:
    """Read and check a file as far as that goes without a decoder; StateError says what is wrong with it."""
    with _opened(path) as file:
        metadata = check_format(path, file.metadata())
        arrays = {name: _read_array(path, file, name) for name in file.keys()}  # noqa: SIM118
    if metadata.pop("sha256", None) != _digest(metadata, arrays):
        raise StateError(f"{path} does not match its own checksum: it was altered or damaged; save the state again")
    try:
        source = metadata.get("checkpoint_sha256", "")  # version 0.1.0 did not write it
        identity = Identity(**{name: metadata[name] for name in _IDENTITY}, checkpoint_sha256=source)
        return StateFile(path, identity, _parse_book(metadata["book"]), arrays)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise StateError(f"{path} is not of the state format {FORMAT_VERSION}: {shown(error)}") from error


def read_tokens(path: Path) -> IntArray:
    """The tokens of the first row, without reading or checking the rest."""
    with _opened(path) as file:
        check_format(path, file.metadata())
        tokens = _read_array(path, file, "0.tokens")
    if tokens.ndim != 1 or tokens.dtype != np.int64:
        raise StateError(f"{path} holds tokens of the shape {tokens.shape} and the type {tokens.dtype}")
    return tokens


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:  # safetensors is untyped
    """The file, whose header is known to lie within it and to be of a size that a state may have."""
    with open_regular(path, "the state", StateError) as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(8)
    header = int.from_bytes(start, "little")
    if len(start) < 8 or header > min(size - 8, _LARGEST_HEADER_BYTES):
        raise StateError(
            f"{path} is not a whole state file: it is of another kind, or was cut short ({size} bytes); expected a "
            "file that `DecodeState.save` or `/save` in a chat wrote"
        )
    try:
        with safetensors.safe_open(path, framework="np") as opened:
            yield opened
    except (OSError, safetensors.SafetensorError) as error:
        raise StateError(f"{path} is not a whole state file: {error}") from error


def _read_array(path: Path, file: Any, name: str) -> NDArray[Any]:  # noqa: ANN401
    if (kind := file.get_slice(name).get_dtype()) not in _READABLE:
        raise StateError(f"{path}: {shown(name)} is of the type {shown(kind)}, which no state has")
    array: NDArray[Any] = file.get_tensor(name)
    return array


def check_format(path: Path, metadata: Mapping[str, str] | None) -> dict[str, str]:
    """The metadata, if they are those of a state in the format that this version reads."""
    found = dict(metadata or {})
    if found.get("format") != FORMAT:
        raise StateError(f"{path} is a safetensors file, but not a {FORMAT}; expected what DecodeState.save writes")
    if (version := found.get("format_version")) != str(FORMAT_VERSION):
        raise StateError(
            f"{path} has the state format {version}, this lrt-deploy reads {FORMAT_VERSION}; load it with the "
            "lrt-deploy that saved it, or read its tokens again"
        )
    return found


def _parse_book(text: str) -> dict[str, Any]:
    """The numbers beside the tensors, in their types."""
    found = convert(_Book, json.loads(text))  # with Infinity, where a prompt was read with zero memory
    return {name: getattr(found, name) for name in found.__struct_fields__}


class _Book(msgspec.Struct, forbid_unknown_fields=True):
    lengths: Annotated[list[Count], Meta(min_length=1)]
    prefill: PrefillReport
    read_within: Annotated[float, Meta(ge=0)]
    computed_tokens: Count
    extra: dict[str, Any]


def _metadata(state: DecodeState, path: Path) -> dict[str, str]:
    identity = state.origin.identity
    try:
        book = {
            "lengths": state.lengths.tolist(),
            "prefill": state.prefill.to_dict(),
            "read_within": state.read_within,
            "computed_tokens": state.computed_tokens,
            "extra": state.extra,
        }
        text = json.dumps(book, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise StateError(f"the state could not be saved to {path}: its `extra` is not JSON: {error}") from error
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "model_sha256": identity.model_sha256,
        "bundle_sha256": identity.bundle_sha256,
        "checkpoint_sha256": identity.checkpoint_sha256,
        "precision": identity.precision,
        "state_dtype": identity.state_dtype,
        "backend": state.owner.name,
        "book": text,
    }


def _digest(metadata: Mapping[str, str], arrays: Arrays) -> str:
    """Over all metadata but the digest, and the name, type, shape and bytes of every array."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _storable(array: NDArray[Any]) -> NDArray[Any]:
    """Contiguous, and of a type that the file format's reader for numpy knows."""
    array = np.ascontiguousarray(array)
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def _check_arrays(file: StateFile, state: DecodeState) -> None:
    """A file may match its checksum and still not be a state of this model: somebody may have made it so."""
    if strays := sorted({name.partition(".")[0] for name in file.arrays} - {str(row) for row in range(state.batch)}):
        raise StateError(f"{file.path} has arrays of a row {strays[0]!r}, expected {state.batch} row(s)")
    for row, length in enumerate(file.lengths):
        found = file.row(row)
        logits = ((state.origin.config.vocab_size,), "float32")
        expected = state.row_shapes(length) | {n: logits for n in found if n == "logits" or _kept_after(n, length)}
        for name in sorted(expected.keys() | found.keys()):
            shape = (found[name].shape, str(found[name].dtype)) if name in found else "missing"
            if shape != expected.get(name):
                raise StateError(
                    f"{file.path}: {row}.{name} is {shape}, expected {expected.get(name, 'no such array')}"
                )
        for name, array in found.items():
            if array.dtype.kind != "i" and not np.isfinite(array.astype(np.float32)).all():
                raise StateError(f"{file.path}: {row}.{name} holds numbers that are not finite; no token follows")
        tokens, vocabulary = found["tokens"], state.origin.config.vocab_size
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary:
            raise StateError(f"{file.path}: {row}.tokens holds ids outside 0 to {vocabulary - 1}")


def _kept_after(name: str, length: int) -> bool:
    """Whether an array is the logits after one of the first tokens."""
    number = name.removeprefix("kept.")
    return name.startswith("kept.") and number.isdecimal() and len(number) < 20 and 1 <= int(number) <= length
