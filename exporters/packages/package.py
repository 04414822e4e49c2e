"""Package a bundle for one target: a folder that is whole or absent, with a list of its files that says it is ours.

The list, `lrt-package.json`, has the size and SHA-256 of every other file, the target, the precision and the bundle's
digest. `force` replaces such folders only, and none to which something was added. Runs nothing of what it writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from lrt_deploy.bundle.manifest import MANIFEST, FileRecord, hash_file, read_manifest
from lrt_deploy.errors import ExportError
from lrt_deploy.exporters.atomic_folder import atomic_folder, recover
from lrt_deploy.fields import Sha256, check_choice, check_flag, check_path, convert
from lrt_deploy.files import check_writable, read_json

from . import docker, kserve, ray, triton, web
from .source import PackageOptions, Progress, Source

Target = Literal["docker", "kserve", "ray", "triton", "web"]
TARGETS: tuple[Target, ...] = get_args(Target)
_WRITERS: dict[str, Callable[[Source], str]] = {
    "docker": docker.write,
    "kserve": kserve.write,
    "ray": ray.write,
    "triton": triton.write,
    "web": web.write,
}  # each returns the one command to run

LIST = "lrt-package.json"
_LIST_BYTES = 16 * 2**20


class Package(Struct, frozen=True, forbid_unknown_fields=True):
    """The content of `lrt-package.json`. `run` is the command that runs it, in its folder."""

    format_version: Annotated[int, Meta(ge=1, le=1)]
    made_by: str
    target: str
    precision: str
    bundle_sha256: Sha256
    run: str
    files: dict[str, FileRecord]


def package_bundle(
    bundle: str | Path,
    out: str | Path,
    to: Target,
    *,
    precision: str | None = None,
    assets: str | Path | None = None,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Package:
    """Make a folder that runs a bundle on a target, and return its list of files.

    Args:
        bundle: a bundle folder, made by `export_bundle`.
        out: the folder to make. It is whole or absent.
        to: the target, one of `TARGETS`.
        precision: which one runs; None: the most precise in the bundle.
        assets: for `web`, a folder with the npm packages that the page needs.
        force: replace an existing package.
        progress: called with (what, done, total), in bytes or 0, 0. What it raises ends the packaging.

    Raises:
        BundleError: the bundle is damaged.
        ExportError: the package cannot be made as asked for. Nothing is left behind.
        InputError: an argument is not of its type.

    """
    source, target = check_path(bundle, "bundle"), check_path(out, "out")
    target = target if target.name else target.resolve()  # `.` cannot be renamed
    check_choice(to, "target", TARGETS)
    options = PackageOptions(
        precision, None if assets is None else check_path(assets, "assets"), check_flag(force, "force")
    )
    manifest = read_manifest(source)
    if target.resolve().is_relative_to(source.resolve()):
        raise ExportError(f"{target} lies inside the bundle {source}; choose a folder outside of it")
    recover(target)
    if os.path.lexists(target):
        if not options.force:
            raise ExportError(f"{target} exists; choose another folder, or pass --force (force=True) to replace it")
        check_replaceable(target)
    check_writable(target, ExportError)
    with atomic_folder(target, check_replaceable if options.force else None, ExportError) as folder:
        return _write(Source(source, manifest, options, folder, progress), to)


def _write(source: Source, to: Target) -> Package:
    command = _WRITERS[to](source)
    found = sorted(path for path in source.folder.rglob("*") if path.is_file())
    names = [path.relative_to(source.folder).as_posix() for path in found]
    package = Package(
        format_version=1,
        made_by=f"lrt-deploy {version('lrt-deploy')}",
        target=to,
        precision=source.precision,
        bundle_sha256=hash_file(source.bundle / MANIFEST),
        run=command,
        files={
            name: source.records.get(name) or FileRecord(path.stat().st_size, hash_file(path))
            for name, path in zip(names, found, strict=True)
        },
    )
    source.write(LIST, json.dumps(msgspec.to_builtins(package), indent=2, ensure_ascii=False) + "\n")
    return package


def read_package(folder: Path) -> Package:
    """Read the list of a package; raises ExportError if there is none, or it is something else."""
    fields = read_json(folder / LIST, "the list of the package", ExportError, _LIST_BYTES)
    try:
        return convert(Package, fields)
    except ValueError as error:
        raise ExportError(f"{folder / LIST} is no list of a package: {error}") from error


def verify_package(folder: Path) -> Package:
    """Check that a package has every file of its list, whole, and no other one; raises ExportError."""
    package = read_package(folder)
    for name, record in package.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != record.bytes or hash_file(path) != record.sha256:
            raise ExportError(f"{path} is missing or was altered; make the package again")
    if found := _foreign_in(folder, package):
        raise ExportError(f"{folder} {found}")
    return package


def check_replaceable(target: Path) -> None:
    """Raise ExportError unless `target` is an empty folder, or a package of ours and nothing besides."""
    if target.is_symlink() or not target.is_dir():
        found: str | None = "is no folder"
    elif not any(target.iterdir()):
        found = None
    elif not os.path.lexists(target / LIST):
        found = f"holds {min(path.name for path in target.iterdir())} and no {LIST}"
    else:
        try:
            found = _foreign_in(target, read_package(target))
        except ExportError as error:
            found = f"has a damaged list: {error}"
    if found:
        raise ExportError(
            f"{target} is not a package: it {found}. --force replaces packages and empty folders only; choose another "
            "folder, or remove what is there yourself"
        )


def _foreign_in(folder: Path, package: Package) -> str | None:
    """Describe the first thing in a folder that its package does not list; None if there is none."""
    known = {LIST, *package.files}
    folders = {parent.as_posix() for name in known for parent in Path(name).parents}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in (folders if path.is_dir() and not path.is_symlink() else known):
            return f"also holds {name}, which is no part of it"
    return None


def summary(package: Package) -> dict[str, Any]:
    """Return what people and scripts want to know of a package: JSON types."""
    return {
        "target": package.target,
        "precision": package.precision,
        "files": len(package.files),
        "bytes": sum(record.bytes for record in package.files.values()),
        "run": package.run,
    }
