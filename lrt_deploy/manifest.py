"""The manifest of a bundle: what the exporters promise and the runtime relies on, with the hash of every file.

    bundle/
      manifest.json  manifest.sha256
      graphs/<precision>/{prefill,decode_step}[.windowed].onnx  weights.bin  [tables.bin]
      tokenizer/tokenizer.json  tokenizer/token_bytes.json
      engines/  reports/                      added later, not in the manifest

Big files are hashed at the first opening and then remembered in the user's cache folder by size, times and inode.
Knows nothing of torch, onnx or a backend.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import LRTConfig
from .contract import FLAVOURS, Flavour, embedding_inputs
from .errors import BundleError, ConfigError
from .precisions import ITEM_BYTES, PRECISIONS
from .remembered_hashes import Remembered

FORMAT_VERSION = 2  # 1 knew fp32 alone
MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
PHASES = ("prefill", "decode_step")
WEIGHTS = "weights.bin"
TABLES = "tables.bin"  # of a bundle with host embeddings
TOKENIZER = "tokenizer"
_ALWAYS_HASHED_BYTES = 4 * 2**20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FileRecord:
    """Size and digest of one file of the export."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TableRecord:
    """An embedding table in `tables.bin`: its type, (rows, columns), and the byte that it begins at."""

    dtype: str
    shape: tuple[int, int]
    offset: int

    @classmethod
    def of(cls, fields: dict[str, Any]) -> TableRecord:
        """From JSON types; ValueError for what cannot be."""
        rows, columns = fields["shape"]
        record = cls(fields["dtype"], (rows, columns), fields["offset"])
        if record.dtype not in ITEM_BYTES or not (_is_count(rows) and _is_count(columns)):
            raise ValueError(f"a table is {str(fields)[:80]}")
        if not isinstance(record.offset, int) or record.offset < 0:
            raise ValueError(f"a table begins at {record.offset!r}")
        return record

    @property
    def end(self) -> int:
        """One past its last byte."""
        return self.offset + self.shape[0] * self.shape[1] * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says. `files` maps paths relative to the bundle, with `/`, to their records.

    `contracts` maps precision and flavour to what `contract.describe` says; `precision_details` maps each precision to
    what was decided and measured for it: kept matrices, ranges, calibration, operations counted.
    """

    model: LRTConfig
    max_seq_len: int
    max_batch_size: int
    precisions: tuple[str, ...]
    prefill_policies: tuple[str, ...]
    contracts: dict[str, Any]
    tokenizer_tokens: int | None
    provenance: dict[str, Any]
    precision_details: dict[str, Any] = field(default_factory=dict)
    # With host embeddings: precision -> graph input -> where in `tables.bin` the table lies that its rows come from.
    tables: dict[str, dict[str, TableRecord]] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def host_embeddings(self) -> bool:
        """Whether the graphs take rows of the embedding tables instead of holding the tables."""
        return bool(self.tables)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; without `tables` where there are none, as all bundles were before there could be."""
        fields = {"format_version": FORMAT_VERSION} | dataclasses.asdict(self)
        if not self.tables:
            del fields["tables"]
        return fields

    def to_json(self) -> str:
        """The exact text of the file."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"


def graph_path(precision: str, phase: str, flavour: Flavour) -> str:
    """Where a graph lies in the bundle; `phase` is `prefill` or `decode_step`."""
    suffix = "" if flavour == "full" else f".{flavour}"
    return f"graphs/{precision}/{phase}{suffix}.onnx"


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file in `folder`, write the manifest and its digest; returns it with the files filled in."""
    files = {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, hash_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, DIGEST)
    }
    manifest = dataclasses.replace(manifest, files=files)
    text = manifest.to_json().encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / DIGEST).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json` against its digest; raises BundleError by name."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise BundleError(f"{folder} {found}; expected a bundle folder, made by `lrt-deploy export`")
    try:
        text, digest = (folder / MANIFEST).read_bytes(), (folder / DIGEST).read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise BundleError(f"{folder} is not a bundle: {error.strerror} ({Path(error.filename).name})") from error
    if digest != f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n":
        raise BundleError(
            f"{folder / MANIFEST} does not match {DIGEST}: one of the two was altered; export the bundle again"
        )
    try:
        fields = json.loads(text)
        version = fields.pop("format_version")
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{folder / MANIFEST} is not a manifest: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{folder / MANIFEST} is not a manifest: expected an object with a format_version") from error
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{folder} has the bundle format {version!r}, this lrt-deploy reads {FORMAT_VERSION}; export it again"
        )
    return _parse(folder, fields)


def verify_files(folder: Path, manifest: Manifest, force: bool = False, progress: Progress = lambda d, t: None) -> None:
    """Hold every file against the manifest; `force` hashes also what an earlier opening has hashed unchanged."""
    memory = Remembered.load()
    total, done = sum(record.bytes for record in manifest.files.values()), 0
    for name, record in manifest.files.items():
        path = _inside(folder, name)
        try:
            stat = path.stat()
        except OSError as error:
            raise BundleError(
                f"{folder} lacks {name}, which its manifest lists; copy the whole folder or export it again"
            ) from error
        if stat.st_size != record.bytes:
            raise BundleError(
                f"{path} has {stat.st_size} bytes, the manifest says {record.bytes}: truncated or altered"
            )
        if force or record.bytes <= _ALWAYS_HASHED_BYTES or not memory.holds(stat, record.sha256):
            if hash_file(path) != record.sha256:
                raise BundleError(
                    f"{path} does not match its hash in the manifest: it was altered; export the bundle again"
                )
            if record.bytes > _ALWAYS_HASHED_BYTES:
                memory.add(stat, record.sha256)
        done += record.bytes
        progress(done, total)
    memory.save()


def hash_file(path: Path) -> str:
    """SHA-256, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(folder: Path, fields: dict[str, Any]) -> Manifest:
    try:
        model = LRTConfig.from_dict(fields.pop("model"))
        files = {str(name): FileRecord(**record) for name, record in fields.pop("files").items()}
        for name in files:
            _inside(folder, name)
        tables = {
            precision: {name: TableRecord.of(table) for name, table in found.items()}
            for precision, found in fields.pop("tables", {}).items()
        }
        precisions, policies = tuple(fields.pop("precisions")), tuple(fields.pop("prefill_policies"))
        manifest = Manifest(
            model=model, files=files, precisions=precisions, prefill_policies=policies, tables=tables, **fields
        )
        _check(manifest)
    except (KeyError, TypeError, AttributeError, ValueError, ConfigError) as error:
        raise BundleError(f"{folder / MANIFEST} is not of format {FORMAT_VERSION}: {error}") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Refuse by ValueError what later code relies on."""
    tokens = manifest.tokenizer_tokens
    rules = {
        "max_seq_len": _is_count(manifest.max_seq_len) and manifest.max_seq_len <= manifest.model.max_positions,
        "max_batch_size": _is_count(manifest.max_batch_size),
        "tokenizer_tokens": tokens is None or (_is_count(tokens) and tokens <= manifest.model.vocab_size),
        "precisions": bool(manifest.precisions) and set(manifest.precisions) <= set(PRECISIONS),
        "contracts": isinstance(manifest.contracts, dict)
        and all(isinstance(contracts, dict) for contracts in manifest.contracts.values()),
        "precision_details": isinstance(manifest.precision_details, dict),
        "provenance": isinstance(manifest.provenance, dict),
        "files": all(isinstance(r.bytes, int) and isinstance(r.sha256, str) for r in manifest.files.values()),
    }
    if broken := [name for name, holds in rules.items() if not holds]:
        raise ValueError(f"{broken[0]} is {str(getattr(manifest, broken[0]))[:80]}")
    _check_tables(manifest)
    if missing := sorted(required_files(manifest) - set(manifest.files)):
        raise ValueError(f"{missing[0]} is not among its files")


def _check_tables(manifest: Manifest) -> None:
    """All precisions have their tables on the host or none has, and the tables are those of the model."""
    if not manifest.tables:
        return
    rows = manifest.model.padded_vocab_size
    expected = {spec.name: (rows, spec.shape[-1]) for spec in embedding_inputs(manifest.model)}
    for precision in manifest.precisions:
        found = manifest.tables.get(precision, {})
        if {name: table.shape for name, table in found.items()} != expected:
            raise ValueError(f"tables of {precision} are {str(found)[:80]}")
        size = getattr(manifest.files.get(table_path(precision)), "bytes", 0)
        if any(table.end > size for table in found.values()):
            raise ValueError(f"tables of {precision} go beyond the {size} bytes of {table_path(precision)}")


def weights_path(precision: str) -> str:
    """Where the weights of a precision lie in the bundle."""
    return f"graphs/{precision}/{WEIGHTS}"


def table_path(precision: str) -> str:
    """Where the embedding tables of a precision lie in a bundle with host embeddings."""
    return f"graphs/{precision}/{TABLES}"


def required_files(manifest: Manifest) -> set[str]:
    """What a bundle of these precisions cannot do without."""
    graphs = {graph_path(p, phase, f) for p in manifest.precisions for phase in PHASES for f in FLAVOURS}
    weights = {weights_path(precision) for precision in manifest.precisions}
    tokenizer = {f"{TOKENIZER}/{name}" for name in ("tokenizer.json", "token_bytes.json")}
    tables = {table_path(precision) for precision in manifest.tables}
    return graphs | weights | tables | (tokenizer if manifest.tokenizer_tokens else set())


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _inside(folder: Path, name: str) -> Path:
    """Join a name from the manifest, which must not reach outside of the folder.

    The file may be a link: the Hub's cache keeps files as links to blobs, and the hash says whether the content fits.
    """
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BundleError(f"{folder / MANIFEST} lists {name!r}, which lies outside the bundle")
    return path
