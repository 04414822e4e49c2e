"""Read the records of an uncompressed zip archive from a stranger, as `torch.save` writes it.

PyTorch reads such archives without checking their CRC-32s, so a damaged disk changes weights silently. Here every byte
of the file must belong to exactly one place: records lie one after the other, uncompressed, each under one name, and
every CRC-32 is checked while the file's SHA-256 is computed. Python's zipfile reads the directory; it is given at most
a few MiB. Archives in other forms (compressed, with a comment, with gaps) are refused; no PyTorch writes them.

Knows nothing of tensors: see `pt_file`.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, NoReturn, cast

from lrt_deploy.errors import CheckpointError

MAX_NAME_BYTES = 1_000
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
class Record:
    """One file of the archive: `size` bytes of the archive from `offset` on."""

    name: str
    offset: int
    size: int
    crc32: int


def read_records(file: BinaryIO, source: str) -> dict[str, Record]:
    """Read the archive's directory: record by name, in the order of their bytes.

    Raises CheckpointError, naming the record, if the archive is cut off, compressed, encrypted, has two records of one
    name, or has bytes that belong to no record or to two. Reads no record; see `verify`.
    """
    entries, end = _directory(file, source)
    if entries[0].header_offset != 0:
        _refuse(source, f"begins with {entries[0].header_offset} bytes that belong to no record")
    records: dict[str, Record] = {}
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
        raise CheckpointError(_message(source, f"has no readable directory ({ascii(str(error))[:200]})")) from error
    if archive.comment or file.read(4) != b"PK\5\6":
        _refuse(source, "does not end as a zip archive without a comment does")
    if not entries:
        _refuse(source, "holds no record")
    return entries, start


def _locate(file: BinaryIO, entry: zipfile.ZipInfo, end: int, source: str) -> Record:
    """Find the bytes of a record, which with its header and descriptor must end at `end`."""
    name, size = entry.filename, entry.file_size
    raw_name = entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF8 else "cp437")
    if not name or name != entry.orig_filename or len(raw_name) > MAX_NAME_BYTES:
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
    return Record(name, start, size, entry.CRC)


def _refuse(source: str, what: str) -> NoReturn:
    raise CheckpointError(_message(source, what))


def _message(source: str, what: str) -> str:
    return (
        f"{source} {what}; expected an archive as torch.save writes it. It is cut off, damaged or was not written by "
        "PyTorch"
    )


def verify(file: BinaryIO, records: Mapping[str, Record], source: str) -> str:
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
        check_crc(record, crc, source)
        position = record.offset + record.size
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def check_crc(record: Record, crc: int, source: str) -> None:
    """Raise CheckpointError if the CRC-32 of a record's bytes is not the one that the archive states."""
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
