"""The wheel of this lrt-deploy, made from its installed files, because no package index has it under this name.

A normal installation lists its files with their hashes, and each is verified. An editable one lists none: there the
wheel holds what lies in the source folder, except caches and hidden files. The same files give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import lrt_deploy
from lrt_deploy.errors import ExportError
from lrt_deploy.files import read_bytes

_PROJECT, _PACKAGE = "lrt-deploy", "lrt_deploy"
_FILE_BYTES = 64 * 2**20
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip file can hold
_MODE = 0o100644 << 16
# Of the metadata folder: what says how it was installed, and what is written again.
_NOT_RELEASED = ("INSTALLER", "REQUESTED", "direct_url.json", "RECORD", "WHEEL")
_WHEEL = "Wheel-Version: 1.0\nGenerator: lrt-deploy\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def build_wheel() -> tuple[str, bytes]:
    """Return the name and the bytes of the wheel of the running lrt-deploy.

    Raises ExportError where its files are not those of one installation, unaltered.
    """
    try:
        found = distribution(_PROJECT)
    except PackageNotFoundError as error:
        raise _impossible("it has no metadata, so it was not installed by pip") from error
    top = f"{_PACKAGE}-{found.version}.dist-info"
    contents = {name: data for name, data in _installed(found, top) if Path(name).name not in _NOT_RELEASED}
    # The metadata last, as the format recommends.
    installed = {name: contents[name] for name in sorted(contents, key=lambda name: (name.startswith(top), name))}
    if f"{_PACKAGE}/__init__.py" not in installed or f"{top}/METADATA" not in installed:
        raise _impossible("its list of files lacks lrt_deploy/__init__.py, or the metadata")
    installed[f"{top}/WHEEL"] = _WHEEL.encode()
    lines = [f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in installed.items()]
    installed[f"{top}/RECORD"] = "".join([*lines, f"{top}/RECORD,,\n"]).encode()
    return f"{_PACKAGE}-{found.version}-py3-none-any.whl", _archive(installed)


def _archive(files: dict[str, bytes]) -> bytes:
    """Return a zip file, not compressed: compressors differ from one machine to another."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, _MODE  # as on Unix, on every system
            archive.writestr(entry, data)
    return buffer.getvalue()


def _installed(found: Distribution, top: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files of the installation; `top` is the folder of its metadata."""
    source = Path(lrt_deploy.__file__).parent
    if not source.is_dir():
        raise _impossible(f"{source} is no folder")
    direct = json.loads(found.read_text("direct_url.json") or "{}")
    if direct.get("dir_info", {}).get("editable"):
        for path in _source_files(source):
            yield f"{_PACKAGE}/{path.relative_to(source).as_posix()}", _read(path)
    elif (place := Path(str(found.locate_file(_PACKAGE)))).resolve() != source.resolve():
        raise _impossible(f"it runs from {source}, and is installed in {place}")
    for listed in found.files or ():
        name = listed.as_posix()
        if not name.startswith((f"{_PACKAGE}/", f"{top}/")) or name.endswith(".pyc"):
            continue
        data = _read(Path(str(listed.locate())))
        if listed.hash is not None and listed.hash.value != _digest(data, listed.hash.mode):
            raise _impossible(f"{listed.locate()} was altered after its installation")
        yield name, data


def _source_files(folder: Path) -> list[Path]:
    """Return the files of the source folder, through its links; no caches, no hidden files."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".") and not name.endswith((".pyc", "~"))]
    return sorted(found)


def _read(path: Path) -> bytes:
    return read_bytes(path, "a file of lrt-deploy", ExportError, _FILE_BYTES)


def _digest(data: bytes, kind: str = "sha256") -> str:
    """Return a hash as wheels write it."""
    return base64.urlsafe_b64encode(hashlib.new(kind, data).digest()).rstrip(b"=").decode()


def _impossible(reason: str) -> ExportError:
    return ExportError(
        f"the package needs the wheel of this lrt-deploy, and it cannot be made: {reason}; "
        "install lrt-deploy into a new environment by pip, and package from there"
    )
