"""What a package is made of: the bundle's files, checked while they are copied, and templates that are filled in.

Templates are the files in a target's folder. `@name@` in one stands for a value; all else is taken as it is. Knows no
target.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from lrt_deploy.bundle.manifest import DIGEST, MANIFEST, FileRecord, Manifest
from lrt_deploy.bundle.precisions import PRECISIONS
from lrt_deploy.errors import BundleError, ExportError
from lrt_deploy.files import open_regular

Progress = Callable[[str, int, int], None]

_PLACEHOLDER = re.compile(r"@([a-z_]+)@")
_COPIED_BYTES = 2**20


@dataclass(frozen=True)
class PackageOptions:
    """Options of `package_bundle`, documented there, in the right types."""

    precision: str | None = None
    assets: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Source:
    """A bundle that is being packaged into `folder`."""

    bundle: Path
    manifest: Manifest
    options: PackageOptions
    folder: Path
    progress: Progress
    records: dict[str, FileRecord] = field(default_factory=dict)  # of files that were hashed while they were copied

    @property
    def name(self) -> str:
        """The bundle's name in lower-case letters, digits and dashes, as registries and Kubernetes take it."""
        name = re.sub(r"[^a-z0-9]+", "-", self.bundle.resolve().name.lower()).strip("-")[:40].strip("-")
        return name if name and name[0].isalpha() else f"lrt-{name}".rstrip("-")

    @property
    def precision(self) -> str:
        """The precision that was asked for, or the most precise one."""
        asked, held = self.options.precision, self.manifest.precisions
        if asked is None:
            return min(held, key=PRECISIONS.index)
        if asked not in held:
            raise ExportError(f"{self.bundle} has no {asked}; it holds {', '.join(held)}")
        return asked

    def copy_bundle(self, target: str, names: Collection[str] | None = None) -> None:
        """Copy the bundle's files below `target`, all that the manifest lists or those of `names`, and the manifest.

        Raises BundleError if a file does not have the hash that the manifest states.
        """
        chosen = self.manifest.files if names is None else {name: self.manifest.files[name] for name in names}
        total, done = sum(record.bytes for record in chosen.values()), 0
        for name, record in chosen.items():
            self.progress("copying the bundle", done, total)
            found = self.copy_file(self.bundle / name, f"{target}{name}")
            if found.sha256 != record.sha256:
                raise BundleError(
                    f"{self.bundle / name} does not match its hash in the manifest: it was altered; "
                    "export the bundle again"
                )
            done += record.bytes
        for name in (MANIFEST, DIGEST):
            self.copy_file(self.bundle / name, f"{target}{name}")

    def copy_file(self, source: Path, name: str) -> FileRecord:
        """Copy a regular file to `name` in the package; return its size and digest."""
        path, digest, size = self._place(name), hashlib.sha256(), 0
        with open_regular(source, source.name, ExportError) as file, path.open("wb") as copy:
            while data := file.read(_COPIED_BYTES):
                digest.update(data)
                copy.write(data)
                size += len(data)
        self.records[name] = FileRecord(size, digest.hexdigest())
        return self.records[name]

    def write(self, name: str, text: str) -> None:
        """Write a text file of the package."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file of the package."""
        self._place(name).write_bytes(data)

    def write_template(self, template: str, values: Mapping[str, object], name: str | None = None) -> None:
        """Write `<target>/<file>`, filled in, as `name`, or under its own name."""
        self.write(name or template.rpartition("/")[2], fill(read_template(template), {**self.values, **values}))

    @property
    def values(self) -> dict[str, object]:
        """What every template may name."""
        return {
            "name": self.name,
            "precision": self.precision,
            "version": version("lrt-deploy"),
            "tokens": self.manifest.max_seq_len,
            "slots": self.manifest.max_batch_size,
        }

    def _place(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def read_template(name: str) -> str:
    """Return the text of `<target>/<file>`."""
    return files(__package__).joinpath(*name.split("/")).read_text(encoding="utf-8")


def fill(text: str, values: Mapping[str, object]) -> str:
    """Replace each `@name@` by the value of that name; KeyError if there is none."""
    return _PLACEHOLDER.sub(lambda match: str(values[match[1]]), text)
