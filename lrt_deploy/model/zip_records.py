"""Read the records of an uncompressed zip archive from a stranger, as `torch.save` writes it.

PyTorch reads such archives without checking their CRC-32s, so a damaged disk changes weights silently. Here every byte
of the file must belong to exactly one place: records lie one after the other, uncompressed, each under one name, and
every CRC-32 is checked while the file's SHA-256 is computed. Zip files that other programs write in other ways
(compressed, with a comment, with gaps) are refused; no PyTorch writes them.

Knows nothing of tensors: see `pt_file`.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from lrt_deploy.errors import CheckpointError

MAX_RECORDS = 100_000
MAX_NAME_BYTES = 1_000
_DIRECTORY_BYTES = 32 * 1024 * 1024
_CHUNK = 1024 * 1024

_END = struct.Struct("<4s4H2LH")  # end of central directory
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")  # one record in the central directory
_LOCAL = struct.Struct("<4s5H3L2H")  # the header before a record's bytes
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 0x1, 0x8, 0x800
# What follows a record whose sizes were not known when its header was written: CRC and sizes of 4 or 8 bytes, with or
# without a signature.
_DESCRIPTOR_BYTES = (12, 16, 20, 24)
_IN_64 = 0xFFFFFFFF


@dataclass(frozen=True)
class Record:
    """One file of the archive: its bytes are `size` bytes of the archive from `offset` on."""

    name: str
    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class _Directory:
    start: int
    end: int
    count: int


def read_records(file: BinaryIO, source: str) -> dict[str, Record]:
    """Read the archive's directory: record by name, in the order of their bytes.

    Raises CheckpointError, naming the record, if the archive is cut off, compressed, encrypted, has two records of one
    name, or has bytes that belong to no record or to two. Reads no record; see `verify`.
    """
    archive = _Archive(file, source)
    directory = archive.find_directory()
    entries = sorted(archive.entries(directory), key=lambda entry: entry.header)
    if not entries:
        archive.refuse("holds no record")
    records: dict[str, Record] = {}
    ends = [*(entry.header for entry in entries[1:]), directory.start]
    if entries[0].header != 0:
        archive.refuse(f"begins with {entries[0].header} bytes that belong to no record")
    for entry, end in zip(entries, ends, strict=True):
        if entry.name in records:
            archive.refuse(f"holds two records named {entry.name[:200]!r}")
        records[entry.name] = archive.locate(entry, end)
    return records


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


@dataclass(frozen=True)
class _Entry:
    """What the central directory says of a record; `header` is the offset of its local header."""

    name: str
    header: int
    size: int
    crc32: int
    flags: int


class _Archive:
    """The archive's structures, each read from where the last one says that it is."""

    def __init__(self, file: BinaryIO, source: str) -> None:
        self._file = file
        self._source = source
        self._size = file.seek(0, 2)

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self._source} {what}; expected an archive as torch.save writes it. It is cut off, damaged or was not "
            "written by PyTorch"
        )

    def find_directory(self) -> _Directory:
        """Locate the central directory from the archive's end, in its 32-bit or 64-bit form."""
        at = self._size - _END.size
        signature, disk, first_disk, here, count, size, start, comment = self._unpack(_END, at)
        if signature != b"PK\5\6" or comment:
            self.refuse("does not end as a zip archive without a comment does")
        if disk or first_disk or here != count:
            self.refuse("is one of several parts of a zip archive")
        if _IN_64 in (size, start) or count == 0xFFFF or self._has_locator(at):
            at, count, size, start = self._end_of_64(at)
        if start + size != at:
            self.refuse(f"has a directory of {size} bytes at {start} that does not end at {at}")
        if count > MAX_RECORDS or size > _DIRECTORY_BYTES:
            self.refuse(f"has a directory of {count} records in {size} bytes, more than any checkpoint needs")
        return _Directory(start, at, count)

    def entries(self, directory: _Directory) -> Iterator[_Entry]:
        """Read the central directory."""
        data = self._read(directory.start, directory.end - directory.start)
        at = 0
        for _ in range(directory.count):
            if at + _ENTRY.size > len(data):
                self.refuse("has a directory that ends within a record")
            fields = _ENTRY.unpack_from(data, at)
            name_end = at + _ENTRY.size + fields[10]
            end = name_end + fields[11] + fields[12]
            if fields[0] != b"PK\1\2" or end > len(data):
                self.refuse("has a damaged directory")
            yield self._entry(fields, data[at + _ENTRY.size : name_end], data[name_end : name_end + fields[11]])
            at = end
        if at != len(data):
            self.refuse(f"has {len(data) - at} bytes after the last record of its directory")

    def locate(self, entry: _Entry, end: int) -> Record:
        """Find the bytes of a record, which with its header and descriptor must end at `end`."""
        fields = self._unpack(_LOCAL, entry.header)
        signature, _, flags, method, _, _, crc, packed, size, name_bytes, extra_bytes = fields
        name = self._read(entry.header + _LOCAL.size, min(name_bytes, MAX_NAME_BYTES))
        if signature != b"PK\3\4" or name != entry.name.encode() or method or flags != entry.flags:
            self.refuse(f"has a header before {entry.name!r} that its directory contradicts")
        if not flags & _DESCRIPTOR and (crc != entry.crc32 or size != packed or size not in (entry.size, _IN_64)):
            self.refuse(f"has a header before {entry.name!r} that its directory contradicts")
        start = entry.header + _LOCAL.size + name_bytes + extra_bytes
        rest = end - (start + entry.size)
        if rest != 0 and not (flags & _DESCRIPTOR and rest in _DESCRIPTOR_BYTES):
            self.refuse(f"has the record {entry.name!r} of {entry.size} bytes at {start}, and the next part at {end}")
        return Record(entry.name, start, entry.size, entry.crc32)

    def _entry(self, fields: tuple[Any, ...], raw_name: bytes, extra: bytes) -> _Entry:
        flags, method, crc, packed, size, header = fields[3], fields[4], *fields[7:10], fields[16]
        try:
            name = raw_name.decode("utf-8" if flags & _UTF8 else "ascii")
        except UnicodeDecodeError:
            self.refuse("has a record whose name is not UTF-8")
        if not name or len(raw_name) > MAX_NAME_BYTES:
            self.refuse(f"has a record whose name has {len(raw_name)} bytes")
        if method:
            self.refuse(f"has the compressed record {name!r} (method {method})")
        if flags & _ENCRYPTED:
            self.refuse(f"has the encrypted record {name!r}")
        size, packed, header = self._from_extra(name, extra, [size, packed, header])
        if size != packed or header >= self._size or size > self._size:
            self.refuse(f"has the record {name!r} of {packed} bytes for {size}, at {header} of {self._size}")
        return _Entry(name, header, size, crc, flags)

    def _from_extra(self, name: str, extra: bytes, values: list[int]) -> list[int]:
        """Replace the values that did not fit in 32 bits by those of the Zip64 field."""
        wide = b""
        while len(extra) >= 4:
            kind, size = struct.unpack_from("<2H", extra)
            if kind == 1:
                wide = extra[4 : 4 + size]
            extra = extra[4 + size :]
        needed = values.count(_IN_64)
        if len(wide) < 8 * needed:
            self.refuse(f"has the record {name!r} without the 64-bit sizes that it announces")
        longs = iter(struct.unpack_from(f"<{needed}Q", wide))
        return [next(longs) if value == _IN_64 else value for value in values]

    def _has_locator(self, end: int) -> bool:
        at = end - _END64_LOCATOR.size
        return at >= 0 and self._read(at, 4) == b"PK\6\7"

    def _end_of_64(self, end: int) -> tuple[int, int, int, int]:
        """Where the 64-bit end record lies, and the count, size and start of the directory that it states."""
        at = end - _END64_LOCATOR.size
        signature, _, found, _ = self._unpack(_END64_LOCATOR, at)
        if signature != b"PK\6\7" or found != at - _END64.size:
            self.refuse("has no 64-bit end record where one belongs")
        fields = self._unpack(_END64, found)
        if fields[0] != b"PK\6\6" or fields[1] != _END64.size - 12 or fields[6] != fields[7]:
            self.refuse("has a damaged 64-bit end record")
        return found, fields[7], fields[8], fields[9]

    def _unpack(self, kind: struct.Struct, at: int) -> tuple[Any, ...]:
        return kind.unpack(self._read(at, kind.size))

    def _read(self, at: int, size: int) -> bytes:
        if at < 0 or size < 0 or at + size > self._size:
            self.refuse(f"has {self._size} bytes, too few for what it says that it holds")
        self._file.seek(at)
        data = self._file.read(size)
        if len(data) != size:
            self.refuse("became shorter while it was read")
        return data
