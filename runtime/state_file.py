"""Snapshots of states as files: one safetensors file with the live part of every row, and the model that it is of.

    metadata   format, format_version, model_sha256, bundle_sha256, checkpoint_sha256, precision, state_dtype, backend,
               book, sha256
    N.tokens   (n) int64                     N.latents   (n, C) float32, after each token
    N.past_key_L, N.past_value_L             (G, n, D) in the caches' own type; bfloat16 as its 16 bits
    N.logits   (V) float32, if known         N.kept.M    (V) float32, logits after M tokens

N is the row. `book` is JSON: lengths and the few numbers beside the tensors. `sha256` covers everything else, so any
damage is found. Two decoders whose fingerprints agree may exchange states, on any backends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import msgspec
import numpy as np
import safetensors
from msgspec import Meta
from numpy.typing import NDArray

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.manifest import Manifest
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import StateError
from lrt_deploy.fields import Count, convert, shown
from lrt_deploy.files import atomic_write, check_replaceable, open_regular
from lrt_deploy.runtime.backends.base import Backend
from lrt_deploy.types import IntArray, PrefillReport


@dataclass(frozen=True)
class ModelFingerprint:
    """What the numbers of a state depend on, and the bundle that they came from, which is not compared."""

    model_sha256: str  # configuration and weights
    precision: str
    state_dtype: str  # of the caches
    bundle_sha256: str = dataclasses.field(compare=False)
    # Empty where it is not known; version 0.1.0 did not write it to state files.
    checkpoint_sha256: str = dataclasses.field(default="", compare=False)

    @classmethod
    def of(cls, backend: Backend, manifest: Manifest, bundle_sha256: str) -> ModelFingerprint:
        """Compute the fingerprint of a loaded bundle."""
        weights = {
            name: record.sha256
            for name, record in manifest.files.items()
            if name.startswith(f"graphs/{backend.precision}/") and not name.endswith(".onnx")
        }
        parts = json.dumps([dataclasses.asdict(manifest.model), weights], sort_keys=True)
        model = hashlib.sha256(parts.encode()).hexdigest()
        checkpoint = manifest.provenance.get("checkpoint", {})
        source = str(checkpoint.get("sha256", "")) if isinstance(checkpoint, dict) else ""
        return cls(model, backend.precision, backend.state_dtype, bundle_sha256, source)

    def check_same(self, other: ModelFingerprint, what: object = "this state") -> None:
        """Raise StateError, which says why, where `what` of the fingerprint `other` must not be continued here."""
        if self == other:
            return
        found, here = f"{other.precision} with {other.state_dtype} caches", f"{self.precision} with {self.state_dtype}"
        same_kind = (other.precision, other.state_dtype) == (self.precision, self.state_dtype)
        checkpoint = self.checkpoint_sha256
        same_source = self.bundle_sha256 == other.bundle_sha256 or checkpoint == other.checkpoint_sha256 != ""
        # Weights are stored in each precision, so their hash differs between precisions of one model too.
        if self.model_sha256 == other.model_sha256 or (not same_kind and same_source):
            why = f"it is of {found}, expected {here}; open that precision, or"
        else:
            precisions = "" if same_kind else f", and of {found} instead of {here}"
            why = (
                f"it is of another model (configuration and weights hash to {other.model_sha256[:12]}, here to "
                f"{self.model_sha256[:12]}){precisions};"
            )
        raise StateError(f"{what} cannot be used here: {why} read its tokens with this decoder instead")


@dataclass(frozen=True, eq=False)
class Owner:
    """The decoder's side of its states."""

    backend: Backend
    config: LRTConfig
    max_batch_size: int
    capacity: int  # tokens of a row
    fingerprint: ModelFingerprint


FORMAT, FORMAT_VERSION = "lrt-deploy decode state", 1
_DTYPES = {"float32": "F32", "float16": "F16", "uint16": "U16", "int64": "I64"}  # as safetensors calls them
_READABLE = (*_DTYPES.values(), "F64", "I32", "I16", "I8", "U8", "U32", "U64", "BOOL")  # NumPy has these
_LARGEST_HEADER_BYTES = 32 * 2**20  # names and places of the arrays, and `extra`

Arrays = dict[str, NDArray[Any]]


class Book(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The numbers beside the tensors."""

    lengths: Annotated[list[Count], Meta(min_length=1)]  # tokens of each row
    prefill: PrefillReport
    read_within: Annotated[float, Meta(ge=0)]
    computed_tokens: Count
    extra: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """Everything that a state is. A row is its arrays by the names above (without `N.`), caches in their own type."""

    fingerprint: ModelFingerprint
    backend: str  # for people: what computed it
    rows: list[Arrays]
    book: Book


def save(snapshot: Snapshot, path: Path) -> None:
    """Write a snapshot to a file that only its owner may read, whole or not at all.

    Raises StateError for a path with a file that is no state, and leaves it as it is.
    """
    check_replaceable(path, "the state", lambda head: f'"format":"{FORMAT}"'.encode() in head, StateError)
    arrays = {f"{i}.{name}": _storable(array) for i, row in enumerate(snapshot.rows) for name, array in row.items()}
    try:
        book = msgspec.structs.asdict(snapshot.book) | {"prefill": snapshot.book.prefill.to_dict()}
        text = json.dumps(book, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise StateError(f"the state could not be saved to {path}: its `extra` is not JSON: {error}") from error
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "backend": snapshot.backend, "book": text}
    metadata |= dataclasses.asdict(snapshot.fingerprint)
    metadata["sha256"] = _digest(metadata, arrays)
    try:
        with atomic_write(path, private=True) as partial:
            _write(partial, arrays, metadata)
    except OSError as error:
        raise StateError(f"the state could not be saved to {path}: {error}") from error


def _write(path: Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    """Write the safetensors format into an existing file, array by array.

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


def load(path: Path, owner: Owner) -> Snapshot:
    """Read a file that a decoder can continue; raises StateError with the reason why it cannot."""
    snapshot = read_file(path)
    owner.fingerprint.check_same(snapshot.fingerprint, path)
    lengths = snapshot.book.lengths
    if len(lengths) > owner.max_batch_size or max(lengths) > owner.capacity:
        raise StateError(
            f"{path} holds {len(lengths)} sequence(s) of up to {max(lengths)} tokens; this decoder takes "
            f"{owner.max_batch_size} of {owner.capacity}"
        )
    for row, (arrays, length) in enumerate(zip(snapshot.rows, lengths, strict=True)):
        _check_row(f"{path}: {row}.", arrays, length, owner)
    return snapshot


def read_file(path: Path) -> Snapshot:
    """Read a file and check everything that does not depend on a decoder; StateError says what is wrong with it."""
    with _opened(path) as file:
        metadata = _check_format(path, file.metadata())
        arrays = {name: _read_array(path, file, name) for name in file.keys()}  # noqa: SIM118
    if metadata.pop("sha256", None) != _digest(metadata, arrays):
        raise StateError(f"{path} does not match its own checksum: it was altered or damaged; save the state again")
    try:
        fingerprint = convert(ModelFingerprint, metadata)
        fields = json.loads(metadata["book"])  # with Infinity, where a prompt was read with zero memory
        book = convert(Book, fields)
        if unknown := sorted(fields["prefill"].keys() - PrefillReport.__dataclass_fields__.keys()):
            raise ValueError(f"prefill.{shown(unknown[0])[1:-1]} is not a known field")
        rows: list[Arrays] = [{} for _ in book.lengths]
        names = {str(row): row for row in range(len(rows))}
        for name, array in arrays.items():
            row, _, own = name.partition(".")
            if row not in names:
                raise StateError(f"{path} has arrays of a row {row!r}, expected {len(rows)} row(s)")
            as_bits = own.startswith("past_") and fingerprint.state_dtype == "bfloat16"
            rows[names[row]][own] = array.view(ml_dtypes.bfloat16) if as_bits else array
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise StateError(f"{path} is not of the state format {FORMAT_VERSION}: {shown(error)}") from error
    return Snapshot(fingerprint, metadata.get("backend", ""), rows, book)


def read_tokens(path: Path) -> IntArray:
    """Read the tokens of the first row, without reading or checking the rest."""
    with _opened(path) as file:
        _check_format(path, file.metadata())
        tokens = _read_array(path, file, "0.tokens")
    if tokens.ndim != 1 or tokens.dtype != np.int64:
        raise StateError(f"{path} holds tokens of the shape {tokens.shape} and the type {tokens.dtype}")
    return tokens


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:  # safetensors is untyped
    """Open a file whose header lies within it and has a size that a state may have."""
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


def _check_format(path: Path, metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return the metadata, if they are those of a state in the format that this version reads."""
    found = dict(metadata or {})
    if found.get("format") != FORMAT:
        raise StateError(f"{path} is a safetensors file, but not a {FORMAT}; expected what DecodeState.save writes")
    if (version := found.get("format_version")) != str(FORMAT_VERSION):
        raise StateError(
            f"{path} has the state format {version}, this lrt-deploy reads {FORMAT_VERSION}; load it with the "
            "lrt-deploy that saved it, or read its tokens again"
        )
    return found


def _digest(metadata: Mapping[str, str], arrays: Arrays) -> str:
    """Hash all metadata but the digest, and the name, type, shape and bytes of every array."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _storable(array: NDArray[Any]) -> NDArray[Any]:
    array = np.ascontiguousarray(array)
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def _check_row(where: str, arrays: Arrays, length: int, owner: Owner) -> None:
    """Check the arrays of one row against the model: a matching checksum does not say that a state was saved."""
    config, logits = owner.config, ((owner.config.vocab_size,), "float32")
    width = config.n_embd if config.memory else 0
    cache: tuple[tuple[int, ...], str] = ((config.n_kv_head, length, config.head_dim), owner.fingerprint.state_dtype)
    expected = {pair.past: cache for pair in contract.state_pairs(config) if pair.in_place}
    expected |= {"tokens": ((length,), "int64"), "latents": ((length, width), "float32")}
    kept = {f"kept.{at}" for at in range(1, length + 1)}
    expected |= {name: logits for name in arrays if name == "logits" or name in kept}
    for name in sorted(expected.keys() | arrays.keys()):
        shape = (arrays[name].shape, str(arrays[name].dtype)) if name in arrays else "missing"
        if shape != expected.get(name):
            raise StateError(f"{where}{name} is {shape}, expected {expected.get(name, 'no such array')}")
    for name, array in arrays.items():
        if array.dtype.kind != "i" and not np.isfinite(array.astype(np.float32)).all():
            raise StateError(f"{where}{name} holds numbers that are not finite; no token follows")
    tokens = arrays["tokens"]
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        raise StateError(f"{where}tokens holds ids outside 0 to {config.vocab_size - 1}")
