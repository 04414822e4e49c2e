"""Read what Python API a TensorRT extension module offers, without loading it, which would need NVIDIA's libraries.

    pip download --no-deps tensorrt-cu13-bindings
    python tests/data/tensorrt_api/read_symbols.py tensorrt_cu13_bindings-*.whl > tests/data/tensorrt_api/tensorrt.json

The extension keeps its symbols. TensorRT's bindings hold the docstring of every documented method in a constant
`tensorrt::<Class>Doc::<method>`, whose text names the arguments; and pybind11 holds every name that it binds as a
string. From the first come signatures, from the second the names of what is not documented so.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

_SYMBOL = re.compile(r"_ZN8tensorrt(\d+)(\w+)")
_ARGUMENT = re.compile(r":(?:arg|param) (\w+)\s*:")
_NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_]{2,63}\0")
_PROGBITS, _SYMTAB, _RELA, _NOBITS = 1, 2, 4, 8  # kinds of sections
_ALLOCATED, _MERGED, _RELATIVE = 2, 0x30, 8  # flags of sections, and a kind of relocation


class Elf:
    """The little of a 64-bit little-endian ELF file that is needed."""

    def __init__(self, data: bytes) -> None:
        assert data[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
        self.data = data
        (start,) = struct.unpack_from("<Q", data, 0x28)
        size, count = struct.unpack_from("<HH", data, 0x3A)
        # name, type, flags, address, offset, size, link, info, alignment, entry size
        self.sections = [struct.unpack_from("<IIQQQQIIQQ", data, start + index * size) for index in range(count)]
        self.pointers = dict(self._relative_relocations())

    def _relative_relocations(self) -> Iterator[tuple[int, int]]:
        """Where a pointer lies, and the address that it will hold."""
        for _, kind, _, _, offset, size, *_ in self.sections:
            if kind == _RELA:
                for at in range(offset, offset + size, 24):
                    address, info, addend = struct.unpack_from("<QQq", self.data, at)
                    if info & 0xFFFFFFFF == _RELATIVE:
                        yield address, addend

    def symbols(self) -> Iterator[tuple[str, int]]:
        """Name and address of every symbol."""
        for _, kind, _, _, offset, size, link, *_ in self.sections:
            if kind == _SYMTAB:
                names = self.sections[link][4]
                for at in range(offset, offset + size, 24):
                    name, _, _, _, address, _ = struct.unpack_from("<IBBHQQ", self.data, at)
                    yield self.text(names + name), address

    def text(self, offset: int) -> str:
        """The string at a file offset."""
        return self.data[offset : self.data.index(b"\0", offset)].decode("utf-8", "replace")

    def string_at(self, pointer: int) -> str | None:
        """The string that the pointer at this address points to."""
        target = self.pointers.get(pointer)
        for _, kind, flags, address, offset, size, *_ in self.sections:
            if target is not None and kind != _NOBITS and flags & _ALLOCATED and address <= target < address + size:
                return self.text(target - address + offset)
        return None


def signatures(elf: Elf) -> dict[str, list[str]]:
    """Argument names by `Class.method`, as the docstrings have them."""
    found = {}
    for symbol, address in elf.symbols():
        match = _SYMBOL.match(symbol)
        if not match:
            continue
        length = int(match[1])
        owner, rest = match[2][:length], match[2][length:]
        member = re.match(r"L?(\d+)(\w+)", rest)
        text = elf.string_at(address)
        if owner.endswith("Doc") and member and text is not None:
            found[f"{owner.removesuffix('Doc')}.{member[2][: int(member[1])]}"] = _ARGUMENT.findall(text)
    return dict(sorted(found.items()))


def names(elf: Elf) -> list[str]:
    """Every identifier that stands as a string in read-only data; a linker lets one string be the end of another."""
    found = set()
    for _, kind, flags, _, offset, size, *_ in elf.sections:
        if kind == _PROGBITS and flags & ~_MERGED == _ALLOCATED:
            found |= {match[:-1].decode() for match in _NAME.findall(elf.data[offset : offset + size])}
    return sorted(found)


def main() -> None:
    """Print what a wheel's extension offers as JSON."""
    wheel = Path(sys.argv[1])
    _, version, *_ = wheel.name.split("-")
    with zipfile.ZipFile(wheel) as archive:
        (module,) = [name for name in archive.namelist() if re.fullmatch(r"tensorrt\w*/tensorrt\w*\.so", name)]
        elf = Elf(archive.read(module))
    fields = {
        "wheel": wheel.name,
        "version": version,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "signatures": signatures(elf),
        "names": names(elf),
    }
    sys.stdout.write(json.dumps(fields, indent=0) + "\n")


if __name__ == "__main__":
    main()
