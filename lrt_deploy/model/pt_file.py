"""Read a state dict that `torch.save` wrote, from a stranger: tensors by name, each read on demand.

No unpickler runs: `zip_records` checks the archive's structure and CRC-32s, `tensor_pickle` interprets the description
of the tensors, and a tensor's bytes are those of its record. Needs no torch. Refused with the reason are empty files,
git-LFS pointers, PyTorch's format from before version 1.6 (a bare pickle), TorchScript and big-endian archives.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from lrt_deploy.errors import CheckpointError
from lrt_deploy.files import open_regular, refuse_placeholder

from .tensor_pickle import MAX_PICKLE_BYTES, TensorDescription, parse_tensors
from .zip_records import Record, check_crc, read_records, verify

_WHAT = "the weights file"
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # protocol 2, then the magic number of the old format
# Records beside data.pkl and data/N that PyTorch writes; none of them changes a tensor.
_KNOWN = {"version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}
# All tensors together may be this many times the stored numbers: parameters that share one storage are stored once.
_MAX_SHARING = 2


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a state dict, not yet read."""

    path: Path
    record: Record
    description: TensorDescription

    @property
    def dtype(self) -> str:
        """The element type by its name in torch, for instance `bfloat16`."""
        return self.description.storage.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.description.shape

    def read_bytes(self) -> npt.NDArray[np.uint8]:
        """Read the tensor's elements, little-endian, in the order of its strides.

        Raises CheckpointError if the bytes are not the ones that were checked when the file was opened.
        """
        about, width = self.description, self.description.storage.item_bytes
        data = np.empty(about.elements * width, np.uint8)
        with open_regular(self.path, _WHAT, CheckpointError) as file:
            file.seek(self.record.offset + about.offset * width)
            if file.readinto(data.data) != data.size:
                raise CheckpointError(f"{self.path} became shorter while it was read")
        if data.size == self.record.size:
            check_crc(self.record, zlib.crc32(data.data), str(self.path))
        return data


@dataclass(frozen=True)
class StateDict:
    """The tensors of a `.pt` file by name, and the SHA-256 of the file, hex."""

    tensors: Mapping[str, StoredTensor]
    sha256: str


def read_state_dict(path: Path) -> StateDict:
    """Check a `.pt` file from its first byte to its last, and describe its tensors.

    Raises CheckpointError if it is not a regular file, not a whole and undamaged archive of `torch.save`, or holds
    anything but dense tensors by name.
    """
    source = str(path)
    with open_regular(path, _WHAT, CheckpointError) as file:
        _refuse_other_formats(file.read(len(_LEGACY) + 64), path)
        try:
            records = read_records(file, source)
            root = _root(records, source)
            pickled = records[f"{root}data.pkl"]
            if pickled.size > MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"{source} describes its tensors in {pickled.size} bytes; at most {MAX_PICKLE_BYTES} are accepted"
                )
            digest = verify(file, records, source)
            file.seek(pickled.offset)
            data = file.read(pickled.size)
            _check_byte_order(file, records.get(f"{root}byteorder"), source)
        except OSError as error:
            raise CheckpointError(f"{source} cannot be read: {error.strerror or error}") from error
    check_crc(pickled, zlib.crc32(data), source)
    described = parse_tensors(data, source)
    tensors = {name: _stored(path, root, records, tensor) for name, tensor in described.items()}
    _refuse_expansion(tensors, source)
    return StateDict(tensors, digest)


def _refuse_other_formats(head: bytes, path: Path) -> None:
    refuse_placeholder(head, f"{_WHAT} ({path})", CheckpointError)
    if head.startswith(_LEGACY):
        raise CheckpointError(
            f"{path} was refused: it is in PyTorch's format from before version 1.6, a bare pickle without checksums. "
            "Where you trust it, load it with torch.load(..., weights_only=True) and torch.save it again"
        )
    if not head.startswith(b"PK\3\4"):
        raise CheckpointError(f"{path} is not a file that torch.save wrote: it begins with the bytes {head[:8]!r}")


def _root(records: Mapping[str, Record], source: str) -> str:
    """Return the folder in the archive of all records, with its slash; raises CheckpointError for other records."""
    first = next(iter(records))
    root = f"{first.partition('/')[0]}/"
    if f"{root}data.pkl" not in records:
        raise CheckpointError(f"{source} has no record {root}data.pkl; it is not an archive that torch.save wrote")
    for name in records:
        inner = name.removeprefix(root) if name.startswith(root) else ""
        if inner != "data.pkl" and inner not in _KNOWN and not inner.startswith("data/"):
            raise CheckpointError(
                f"{source} holds the record {name[:200]!r}, which no state dict has; a TorchScript archive is not read"
            )
    return root


def _check_byte_order(file: BinaryIO, record: Record | None, source: str) -> None:
    if record is None:  # older versions of PyTorch did not write it, and ran on little-endian machines
        return
    file.seek(record.offset)
    if (order := file.read(min(record.size, 10))) != b"little":
        raise CheckpointError(f"{source} holds numbers in the byte order {order!r}; this version reads b'little'")


def _stored(path: Path, root: str, records: Mapping[str, Record], tensor: TensorDescription) -> StoredTensor:
    storage = tensor.storage
    record = records.get(f"{root}data/{storage.key}")
    if record is None:
        raise CheckpointError(f"{path} has no record {root}data/{storage.key[:100]}, which a tensor refers to")
    if record.size != storage.elements * storage.item_bytes:
        raise CheckpointError(
            f"{path}: the record {record.name!r} has {record.size} bytes, and its {storage.elements} elements of type "
            f"{storage.dtype} need {storage.elements * storage.item_bytes}"
        )
    return StoredTensor(path, record, tensor)


def _refuse_expansion(tensors: Mapping[str, StoredTensor], source: str) -> None:
    """Raise CheckpointError if tensors share storage so that a small file becomes a large model."""
    stored = sum({tensor.record.name: tensor.record.size for tensor in tensors.values()}.values())
    total = sum(tensor.description.elements * tensor.description.storage.item_bytes for tensor in tensors.values())
    if total > _MAX_SHARING * stored:
        raise CheckpointError(
            f"{source} describes tensors of {total} bytes and stores {stored}; tensors that share storage may have "
            f"{_MAX_SHARING} times the stored bytes"
        )
