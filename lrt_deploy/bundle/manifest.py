"""The manifest of a bundle: the description that exporters write and the runtime reads, with the hash of every file.

    bundle/
      manifest.json  manifest.sha256
      graphs/<precision>/{prefill,decode_step}[.windowed].onnx  weights.bin  [tables.bin]
      tokenizer/tokenizer.json  tokenizer/token_bytes.json
      engines/  reports/                      added later, not in the manifest

Big files are hashed at the first opening and then remembered in the user's cache folder by device, inode, size and
times. `kind_of` tells bundles, checkpoints, graphs and engines apart, for messages.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import BundleError, ConfigError
from lrt_deploy.fields import Count, Sha256, Size, Whole, convert, shown
from lrt_deploy.files import (
    atomic_write,
    decode_text,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    user_cache_folder,
)
from lrt_deploy.model.checkpoint_folder import is_checkpoint

from .contract import FLAVOURS, Flavour, embedding_inputs
from .engine_sidecar import PLAN, sidecar_path
from .precisions import ITEM_BYTES, PRECISIONS, Dtype

FORMAT_VERSION = 2  # 1 knew fp32 alone
MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
PHASES = ("prefill", "decode_step")
WEIGHTS = "weights.bin"
TABLES = "tables.bin"  # of a bundle with host embeddings
TOKENIZER = "tokenizer"
TABLE_ALIGNMENT = 4096  # bytes; of tables in their file, so that they can be mapped
_ALWAYS_HASHED_BYTES = 4 * 2**20
# A manifest has about 0.3 MB for each precision of a model with 100 layers.
_LARGEST_MANIFEST_BYTES, _LARGEST_DIGEST_BYTES = 16 * 2**20, 2**10
_MOST_VERIFIED, _LARGEST_CACHE_BYTES = 512, 2**20  # 512 entries are about 80 kB

Progress = Callable[[int, int], None]


class FileRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """Size and digest of one file of the export."""

    bytes: Count
    sha256: Sha256


class TableRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """An embedding table in `tables.bin`: its type, (rows, columns), and the byte that it begins at."""

    dtype: Dtype
    shape: tuple[Size, Size]
    offset: Count

    @property
    def end(self) -> int:
        """One past its last byte."""
        return self.offset + self.shape[0] * self.shape[1] * ITEM_BYTES[self.dtype]


class _Provenance(Struct):
    checkpoint: dict[str, Any] = {}
    versions: dict[str, Any] = {}


class _Details(Struct):
    """The fields of a precision's details that programs read; other ones are for people."""

    operations: dict[str, dict[str, dict[str, Whole]]] = {}
    keep_high: tuple[str, ...] = ()
    multiplied_in_float32: tuple[str, ...] = ()
    bits: Annotated[int, Meta(ge=1, le=8)] | None = None
    block: Annotated[int, Meta(ge=1, le=2**20)] | None = None


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """The content of `manifest.json`. `files` maps paths relative to the bundle, with `/`, to their records.

    `contracts` maps precision and flavour to what `contract.describe` returns; `precision_details` maps each precision
    to its decisions and measurements: kept matrices, ranges, calibration, operations counted. With host embeddings,
    `tables` maps precision and graph input to the place of the table in `tables.bin`.
    """

    model: LRTConfig
    max_seq_len: Size
    max_batch_size: Size
    precisions: tuple[str, ...]
    prefill_policies: tuple[str, ...]
    contracts: dict[str, dict[str, Any]]
    tokenizer_tokens: Size | None
    provenance: dict[str, Any]
    precision_details: dict[str, dict[str, Any]] = {}
    tables: dict[str, dict[str, TableRecord]] = {}
    files: dict[str, FileRecord] = {}

    @property
    def host_embeddings(self) -> bool:
        """Whether the graphs take rows of the embedding tables instead of holding the tables."""
        return bool(self.tables)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, without `tables` where there are none (older versions do not know it)."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        if not self.tables:
            del fields["tables"]
        return {"format_version": FORMAT_VERSION} | fields

    def to_json(self) -> str:
        """Return the exact text of the file."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"


def graph_path(precision: str, phase: str, flavour: Flavour) -> str:
    """Return the path of a graph in the bundle; `phase` is `prefill` or `decode_step`."""
    suffix = "" if flavour == "full" else f".{flavour}"
    return f"graphs/{precision}/{phase}{suffix}.onnx"


def write_manifest(folder: Path, manifest: Manifest, known: Mapping[str, FileRecord] | None = None) -> Manifest:
    """Hash every file in `folder` but the `known` ones, write the manifest and its digest; return the manifest."""
    known = known or {}
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {
        name: known.get(name) or FileRecord((folder / name).stat().st_size, hash_file(folder / name))
        for name in names
        if name not in (MANIFEST, DIGEST)
    }
    manifest = msgspec.structs.replace(manifest, files=files)
    text = manifest.to_json().encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / DIGEST).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json` and check it against its digest; raises BundleError that names file and field."""
    if mistaken := instead_of("bundle", folder):
        raise BundleError(mistaken)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise BundleError(f"{folder} {found}; expected a bundle folder, made by `lrt-deploy export`")
    if missing := [name for name in (MANIFEST, DIGEST) if not (folder / name).exists()]:
        raise BundleError(f"{folder} is not a bundle: it has no {missing[0]}; bundles are made by `lrt-deploy export`")
    for _ in range(2):  # again where an export has replaced the bundle between the two
        data = read_bytes(folder / MANIFEST, "the manifest", BundleError, _LARGEST_MANIFEST_BYTES)
        digest = read_bytes(folder / DIGEST, "the manifest's digest", BundleError, _LARGEST_DIGEST_BYTES)
        if intact := digest == f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n".encode():
            break
    if not intact:
        raise BundleError(
            f"{folder / MANIFEST} does not match {DIGEST}: one of the two was altered; export the bundle again"
        )
    what = f"the manifest ({folder / MANIFEST})"
    fields = parse_json(decode_text(data, what, BundleError), what, BundleError)
    if not isinstance(fields, dict) or "format_version" not in fields:
        raise BundleError(f"{folder / MANIFEST} is not a manifest: expected an object with a format_version")
    version = fields.pop("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{folder} has the bundle format {shown(version)}, this lrt-deploy reads {FORMAT_VERSION}; export it again"
        )
    try:
        fields["model"] = LRTConfig.from_dict(fields.get("model"))
        manifest = convert(Manifest, fields)
        _check(manifest)
    except (ValueError, ConfigError) as error:
        raise BundleError(
            f"{folder / MANIFEST} is not of format {FORMAT_VERSION}: {error}; export the bundle again"
        ) from error
    return manifest


def verify_files(folder: Path, manifest: Manifest, force: bool = False, progress: Progress = lambda d, t: None) -> None:
    """Check every file against the manifest; `force` hashes also files that were hashed before and have not changed.

    Raises BundleError. `progress` is given the bytes done and the bytes of all files.
    """
    verified, new = _load_verified(), {}
    total, done = sum(record.bytes for record in manifest.files.values()), 0
    for name, record in manifest.files.items():
        path = folder / name  # it may be a link to a regular file anywhere, since its hash is checked
        if not os.path.lexists(path):
            raise BundleError(
                f"{folder} lacks {name}, which its manifest lists; copy the whole folder or export it again"
            )
        with open_regular(path, f"{name} of the bundle", BundleError) as file:
            stat = os.fstat(file.fileno())
        if stat.st_size != record.bytes:
            raise BundleError(
                f"{path} has {stat.st_size} bytes, the manifest says {record.bytes}: truncated or altered"
            )
        key = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
        if force or record.bytes <= _ALWAYS_HASHED_BYTES or verified.get(key) != record.sha256:
            if hash_file(path) != record.sha256:
                raise BundleError(
                    f"{path} does not match its hash in the manifest: it was altered; export the bundle again"
                )
            if record.bytes > _ALWAYS_HASHED_BYTES:
                new[key] = record.sha256
        done += record.bytes
        progress(done, total)
    if new:
        _save_verified(verified | new)


def _load_verified() -> dict[str, str]:
    """Return the digests of files that were found intact, by their state; none if the cache is missing or damaged."""
    if (path := _verified_path()) is not None:
        with contextlib.suppress(BundleError, ValueError):
            return convert(dict[str, Sha256], read_json(path, "the verified files", BundleError, _LARGEST_CACHE_BYTES))
    return {}


def _save_verified(digests: dict[str, str]) -> None:
    """Replace the cache by the last entries of `digests`; a folder that cannot be written is left as it is."""
    if (path := _verified_path()) is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(path) as partial:
                partial.write_text(json.dumps(dict(list(digests.items())[-_MOST_VERIFIED:])), encoding="utf-8")


def _verified_path() -> Path | None:
    folder = user_cache_folder()
    return None if folder is None else folder / "verified.json"


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a regular file, hex."""
    with open_regular(path, path.name, BundleError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(manifest: Manifest) -> None:
    """Raise ValueError for values that contradict each other, on which later code relies."""
    tokens, precisions = manifest.tokenizer_tokens, manifest.precisions
    rules = {
        "max_seq_len": manifest.max_seq_len <= manifest.model.max_positions,
        "tokenizer_tokens": tokens is None or tokens <= manifest.model.vocab_size,
        "precisions": 0 < len(precisions) == len(set(precisions)) and set(precisions) <= set(PRECISIONS),
    }
    if broken := [name for name, holds in rules.items() if not holds]:
        raise ValueError(f"{broken[0]} is {shown(getattr(manifest, broken[0]))}")
    for name in manifest.files:
        if not _is_inside(name):
            raise ValueError(
                f"files lists {shown(name)}, which lies outside the bundle or is no plain relative path with /"
            )
    convert(_Provenance, manifest.provenance, "provenance")
    convert(dict[str, Any], manifest.precision_details.get("calibration", {}), "precision_details.calibration")
    for precision in precisions:
        convert(_Details, manifest.precision_details.get(precision, {}), f"precision_details.{precision}")
    _check_tables(manifest)
    if missing := sorted(required_files(manifest) - set(manifest.files)):
        raise ValueError(f"{missing[0]} is not among its files")


def _check_tables(manifest: Manifest) -> None:
    """Raise ValueError unless no precision has tables on the host, or all have those of the model.

    The tables fill their file: each begins at the page after the one before, and the last ends with the file.
    """
    if not manifest.tables:
        return
    if stray := sorted(manifest.tables.keys() - set(manifest.precisions)):
        raise ValueError(f"tables are given for {shown(stray[0])}, which is not among its precisions")
    rows = manifest.model.padded_vocab_size
    expected = {spec.name: (rows, spec.shape[-1]) for spec in embedding_inputs(manifest.model)}
    for precision in manifest.precisions:
        found = manifest.tables.get(precision, {})
        if {name: table.shape for name, table in found.items()} != expected:
            raise ValueError(f"tables of {precision} are {shown(found)}, the model has {expected}")
        path, end = table_path(precision), 0
        for name, table in sorted(found.items(), key=lambda item: item[1].offset):
            if precision != "fp32" and table.dtype == "float32":
                raise ValueError(f"tables.{precision}.{name}.dtype is 'float32', expected 'float16' or 'bfloat16'")
            if table.offset != (begin := -(-end // TABLE_ALIGNMENT) * TABLE_ALIGNMENT):
                raise ValueError(f"tables.{precision}.{name} begins at byte {table.offset} of {path}, expected {begin}")
            end = table.end
        if path in manifest.files and manifest.files[path].bytes != end:
            raise ValueError(
                f"tables of {precision} end at byte {end} of {path}, which has {manifest.files[path].bytes}"
            )


def weights_path(precision: str) -> str:
    """Return the path of a precision's weights in the bundle."""
    return f"graphs/{precision}/{WEIGHTS}"


def table_path(precision: str) -> str:
    """Return the path of a precision's embedding tables in a bundle with host embeddings."""
    return f"graphs/{precision}/{TABLES}"


def required_files(manifest: Manifest) -> set[str]:
    """Return the paths of the files that a bundle of these precisions must have."""
    graphs = {graph_path(p, phase, f) for p in manifest.precisions for phase in PHASES for f in FLAVOURS}
    weights = {weights_path(precision) for precision in manifest.precisions}
    tokenizer = {f"{TOKENIZER}/{name}" for name in ("tokenizer.json", "token_bytes.json")}
    tables = {table_path(precision) for precision in manifest.tables}
    return graphs | weights | tables | (tokenizer if manifest.tokenizer_tokens else set())


def _is_inside(name: str) -> bool:
    """Return whether a path stays in the bundle on any system, and has one spelling."""
    plain = not any(part in ("", ".", "..") for part in name.split("/"))
    return plain and "\\" not in name and "\0" not in name and not PureWindowsPath(name).drive


Kind = Literal["bundle", "checkpoint", "engine", "graph"]
_SUFFIXES: dict[str, Kind] = {".onnx": "graph", ".plan": "engine"}
# What to do about a thing that was given in place of another.
_INSTEAD = {
    ("bundle", "checkpoint"): "; export it: lrt-deploy export {path} BUNDLE",
    ("bundle", "engine"): "; name the bundle that it was built in",
    ("bundle", "graph"): "; name the folder that `lrt-deploy export` made",
    ("checkpoint", "bundle"): "; name the checkpoint that it was exported from",
}


def kind_of(path: Path) -> Kind | None:
    """Return the kind of the thing at a path, by the names of its files; None for anything else, or nothing."""
    if path.is_dir():
        if any((path / name).exists() for name in (MANIFEST, DIGEST)):
            return "bundle"
        if (path / PLAN).exists() or sidecar_path(path / PLAN).exists():
            return "engine"
    elif path.suffix in _SUFFIXES and path.exists():
        return _SUFFIXES[path.suffix]
    return "checkpoint" if path.exists() and is_checkpoint(path) else None


def instead_of(wanted: Literal["bundle", "checkpoint"], path: Path) -> str | None:
    """Return the message for another thing at a path where `wanted` was expected; None for an unknown kind."""
    if (kind := kind_of(path)) in (None, wanted):
        return None
    advice = _INSTEAD.get((wanted, str(kind)), "").format(path=path)
    return f"{path} is {'an' if kind == 'engine' else 'a'} {kind}, not a {wanted}{advice}"
