"""Read a state dict that `torch.save` wrote, from a stranger: tensors by name, each read on demand.

A `.pt` file is an uncompressed zip archive. Here every byte of it must belong to exactly one place (records lie one
after the other, each under one name), and every CRC-32, which PyTorch ignores, is checked while the file's SHA-256 is
computed. Python's zipfile reads the directory of the archive; `pickles` interprets the description of the
tensors.

Refused with the reason are empty files, git-LFS pointers, PyTorch's format from before version 1.6 (a bare pickle),
TorchScript and big-endian archives, and archives that PyTorch does not write: compressed, with a comment, with gaps.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

import numpy as np
import numpy.typing as npt

from lrt_deploy.errors import CheckpointError
from lrt_deploy.files import open_regular, refuse_placeholder
from lrt_deploy.pickles import MAX_PICKLE_BYTES, TensorDescription, parse_tensors

_WHAT = "the weights file"
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # protocol 2, then the magic number of the old format
# Records beside data.pkl and data/N that PyTorch writes; none of them changes a tensor.
_KNOWN = {"version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}
# All tensors together may be this many times the stored numbers: parameters that share one storage are stored once.
_MAX_SHARING = 2
_MAX_NAME_BYTES = 1_000
_DIRECTORY_BYTES = 8 * 1024 * 1024  # 10,000 records have about 1 MB
_CHUNK = 1024 * 1024
_END_BYTES = 22  # the end of an archive without a comment
_LOCAL = struct.Struct("<4s5H3L2H")  # the header before a record's bytes
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 0x1, 0x8, 0x800
# Bytes after a record whose sizes were not known when its header was written: CRC and sizes of 4 or 8 bytes, with or
# without a signature.
_DESCRIPTOR_BYTES = (12, 16, 20, 24)
_IN_64 = 0xFFFFFFFF


@dataclass(frozen=True)
class _Record:
    """One file of the archive: `size` bytes of the archive from `offset` on."""

    name: str
    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a state dict, not yet read."""

    path: Path
    record: _Record
    description: TensorDescription

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.description.elements * self.description.storage.item_bytes

    def read_bytes(self) -> npt.NDArray[np.uint8]:
        """Read the tensor's elements, little-endian, in the order of its strides.

        Raises CheckpointError if the bytes are not the ones that were checked when the file was opened.
        """
        data = np.empty(self.size, np.uint8)
        with open_regular(self.path, _WHAT, CheckpointError) as file:
            file.seek(self.record.offset + self.description.offset * self.description.storage.item_bytes)
            if file.readinto(data.data) != data.size:
                raise CheckpointError(f"{self.path} became shorter while it was read")
        if data.size == self.record.size:
            _check_crc(self.record, zlib.crc32(data.data), str(self.path))
        return data


@dataclass(frozen=True)
class StateDict:
    """The tensors of a `.pt` file by name, and the SHA-256 of the file, hex."""

    tensors: Mapping[str, StoredTensor]
    sha256: str


def read_state_dict(path: Path) -> StateDict:
    """Check a `.pt` file from its first byte to its last, and describe its tensors.

    Raises CheckpointError if it is not a whole and undamaged archive of `torch.save`, or holds anything but dense
    tensors by name.
    """
    source = str(path)
    with open_regular(path, _WHAT, CheckpointError) as file:
        _refuse_other_formats(file.read(len(_LEGACY) + 64), path)
        try:
            records = _read_records(file, source)
            root = _root(records, source)
            pickled = records[f"{root}data.pkl"]
            if pickled.size > MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"{source} describes its tensors in {pickled.size} bytes; at most {MAX_PICKLE_BYTES} are accepted"
                )
            digest = _verify(file, records, source)
            file.seek(pickled.offset)
            data = file.read(pickled.size)
            # Older versions of PyTorch did not write the byte order, and ran on little-endian machines.
            if order := records.get(f"{root}byteorder"):
                file.seek(order.offset)
                if (found := file.read(min(order.size, 10))) != b"little":
                    raise CheckpointError(
                        f"{source} holds numbers in the byte order {found!r}; this version reads b'little'"
                    )
        except OSError as error:
            raise CheckpointError(f"{source} cannot be read: {error.strerror or error}") from error
    _check_crc(pickled, zlib.crc32(data), source)
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


def _root(records: Mapping[str, _Record], source: str) -> str:
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


def _stored(path: Path, root: str, records: Mapping[str, _Record], tensor: TensorDescription) -> StoredTensor:
    storage = tensor.storage
    record, needed = records.get(f"{root}data/{storage.key}"), storage.elements * storage.item_bytes
    if record is None:
        raise CheckpointError(f"{path} has no record {root}data/{storage.key[:100]}, which a tensor refers to")
    if record.size != needed:
        raise CheckpointError(
            f"{path}: the record {record.name!r} has {record.size} bytes, and its {storage.elements} elements of type "
            f"{storage.dtype} need {needed}"
        )
    return StoredTensor(path, record, tensor)


def _refuse_expansion(tensors: Mapping[str, StoredTensor], source: str) -> None:
    """Raise CheckpointError if tensors share storage so that a small file becomes a large model."""
    stored = sum({tensor.record.name: tensor.record.size for tensor in tensors.values()}.values())
    total = sum(tensor.size for tensor in tensors.values())
    if total > _MAX_SHARING * stored:
        raise CheckpointError(
            f"{source} describes tensors of {total} bytes and stores {stored}; tensors that share storage may have "
            f"{_MAX_SHARING} times the stored bytes"
        )


def _read_records(file: BinaryIO, source: str) -> dict[str, _Record]:
    """Read the archive's directory: record by name, in the order of their bytes.

    Raises CheckpointError, naming the record, if the archive is cut off, compressed, encrypted, has two records of one
    name, or has bytes that belong to no record or to two. Reads no record; see `_verify`.
    """
    entries, end = _directory(file, source)
    if entries[0].header_offset != 0:
        _refuse(source, f"begins with {entries[0].header_offset} bytes that belong to no record")
    records: dict[str, _Record] = {}
    for entry, following in zip(entries, [*(entry.header_offset for entry in entries[1:]), end], strict=True):
        if entry.filename in records:
            _refuse(source, f"holds two records named {entry.filename[:200]!r}")
        records[entry.filename] = _locate(file, entry, following, source)
    return records


class _Bounded:
    """The part of a file's methods that zipfile uses; it never reads more than a directory may have."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if size > _DIRECTORY_BYTES:
            raise ValueError(f"a directory of {size} bytes; at most {_DIRECTORY_BYTES} are accepted")
        return self._file.read(_DIRECTORY_BYTES if size < 0 else size)


def _directory(file: BinaryIO, source: str) -> tuple[list[zipfile.ZipInfo], int]:
    """Return the entries of the archive's directory in the order of their bytes, and where the directory begins."""
    try:
        with zipfile.ZipFile(cast(BinaryIO, _Bounded(file))) as archive:
            entries, start = sorted(archive.infolist(), key=lambda entry: entry.header_offset), archive.start_dir
        file.seek(-_END_BYTES, 2)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, OSError) as error:
        _refuse(source, f"has no readable directory ({ascii(str(error))[:200]})", error)
    if archive.comment or file.read(4) != b"PK\5\6":
        _refuse(source, "does not end as a zip archive without a comment does")
    if not entries:
        _refuse(source, "holds no record")
    return entries, start


def _locate(file: BinaryIO, entry: zipfile.ZipInfo, end: int, source: str) -> _Record:
    """Find the bytes of a record, which with its header and descriptor must end at `end`."""
    name, size = entry.filename, entry.file_size
    raw_name = entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF8 else "cp437")
    if not name or name != entry.orig_filename or len(raw_name) > _MAX_NAME_BYTES:
        _refuse(source, f"has a record with the name {raw_name[:100]!r} of {len(raw_name)} bytes")
    if entry.compress_type:
        _refuse(source, f"has the compressed record {name!r} (method {entry.compress_type})")
    if entry.flag_bits & _ENCRYPTED:
        _refuse(source, f"has the encrypted record {name!r}")
    if end - entry.header_offset < _LOCAL.size + len(raw_name):
        _refuse(source, f"has no room for the header of {name!r}")
    file.seek(entry.header_offset)
    header = file.read(_LOCAL.size + len(raw_name))
    signature, _, flags, method, _, _, crc, packed, unpacked, name_bytes, extra_bytes = _LOCAL.unpack_from(header)
    has_sizes = not flags & _DESCRIPTOR
    if (
        (signature, method, flags, name_bytes) != (b"PK\3\4", 0, entry.flag_bits, len(raw_name))
        or header[_LOCAL.size :] != raw_name
        or (has_sizes and (crc != entry.CRC or packed != unpacked or unpacked not in (size, _IN_64)))
    ):
        _refuse(source, f"has a header before {name!r} that its directory contradicts")
    start = entry.header_offset + len(header) + extra_bytes
    rest = end - (start + size)
    if size != entry.compress_size or not (rest == 0 or (flags & _DESCRIPTOR and rest in _DESCRIPTOR_BYTES)):
        _refuse(source, f"has the record {name!r} of {size} bytes at {start}, and the next part at {end}")
    return _Record(name, start, size, entry.CRC)


def _refuse(source: str, what: str, cause: Exception | None = None) -> NoReturn:
    raise CheckpointError(
        f"{source} {what}; expected an archive as torch.save writes it. It is cut off, damaged or was not written by "
        "PyTorch"
    ) from cause


def _verify(file: BinaryIO, records: Mapping[str, _Record], source: str) -> str:
    """Check every record's CRC-32 and return the SHA-256 of the whole file, hex; reads the file once."""
    digest = hashlib.sha256()
    file.seek(0)
    position = 0
    for record in records.values():
        for chunk in _chunks(file, record.offset - position, source):
            digest.update(chunk)
        crc = 0
        for chunk in _chunks(file, record.size, source):
            digest.update(chunk)
            crc = zlib.crc32(chunk, crc)
        _check_crc(record, crc, source)
        position = record.offset + record.size
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _check_crc(record: _Record, crc: int, source: str) -> None:
    if crc != record.crc32 == 0:
        raise CheckpointError(
            f"{source} states no CRC-32 for the record {record.name!r}: it was saved with "
            "torch.serialization.set_crc32_options(False), so damage cannot be told. Save it again with True"
        )
    if crc != record.crc32:
        raise CheckpointError(
            f"{source} is damaged: the record {record.name!r} has the CRC-32 {crc:08x}, and the archive was written "
            f"with {record.crc32:08x}; copy or download the file again"
        )


def _chunks(file: BinaryIO, size: int, source: str) -> Iterator[bytes]:
    while size > 0:
        chunk = file.read(min(size, _CHUNK))
        if not chunk:
            raise CheckpointError(f"{source} became shorter while it was read")
        size -= len(chunk)
        yield chunk
