"""Zip archives written field by field, so that records and checksums may lie; and what else a file could be."""

from __future__ import annotations

import functools
import gzip
import io
import random
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path


class Record:
    """A stored record of a zip file."""

    def __init__(self, name: str, data: bytes, start: int = 0) -> None:
        self.name, self.data, self.start = name, data, start
        self.method, self.crc, self.flags, self.size, self.extra = 0, None, 0, None, b""
        self.packed: bytes | None = None  # deflated, where that was done before

    def bomb(self, header: bytes, zeros: int) -> None:
        """Hold some bytes and very many zeros, deflated to a thousandth."""
        self.data, self.method = b"", 8
        self.packed, self.crc, self.size = deflated_zeros(header, zeros)


@functools.lru_cache(maxsize=16)
def deflated_zeros(header: bytes, zeros: int) -> tuple[bytes, int, int]:
    """Some bytes and then zeros as one deflate stream; their CRC-32, and how many they are."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    parts, crc, block = [packer.compress(header)], zlib.crc32(header), bytes(2**20)
    for start in range(0, zeros, len(block)):
        some = block[: zeros - start]
        parts.append(packer.compress(some))
        crc = zlib.crc32(some, crc)
    return b"".join([*parts, packer.flush()]), crc, len(header) + zeros


def read_records(data: bytes) -> list[Record]:
    """The records of an intact zip, with the offsets of their data."""
    found = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            name_length, extra_length = struct.unpack_from("<HH", data, info.header_offset + 26)
            start = info.header_offset + 30 + name_length + extra_length
            found.append(Record(info.filename, data[start : start + info.file_size], start))
    return found


def write_records(records: list[Record], comment: bytes = b"", padded: bool = True) -> bytes:
    """A zip of these records, data on boundaries of 64 bytes as torch writes it, every field as the record says."""
    out, central = bytearray(), bytearray()
    for record in records:
        name = record.name.encode("utf-8", "surrogatepass")
        crc = zlib.crc32(record.data) if record.crc is None else record.crc
        body = record.data
        if record.packed is not None:
            body = record.packed
        elif record.method == 8:
            packer = zlib.compressobj(6, zlib.DEFLATED, -15)
            body = packer.compress(record.data) + packer.flush()
        size = len(record.data) if record.size is None else record.size
        extra = record.extra
        if padded and not extra:
            missing = -(len(out) + 30 + len(name) + 4) % 64
            extra = struct.pack("<HH", 0x4246, missing) + b"Z" * missing
        fields = (20, record.flags, record.method, 0, 33, crc & 0xFFFFFFFF, len(body), size & 0xFFFFFFFF)
        offset = len(out)
        out += struct.pack("<4sHHHHHIIIHH", b"PK\3\4", *fields, len(name), len(extra)) + name + extra + body
        central += struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", 20, *fields, len(name), 0, 0, 0, 0, 0, offset) + name
    start = len(out)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, len(records), len(records), len(central), start, len(comment))
    return bytes(out + central + end + comment)


def gzipped(data: bytes, rng: random.Random) -> bytes:

    if rng.random() < 0.5:
        return gzip.compress(data, 1)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"))
    return file.getvalue()


def is_zip(path: Path) -> bool:
    """Whether zipfile reads its directory."""
    try:
        if not path.is_file():
            return False
        with zipfile.ZipFile(path) as archive:
            return bool(archive.namelist())
    except Exception:
        return False
