"""The manifest of a bundle: what the exporters promise and the runtime relies on, with the hash of every file.

    bundle/
      manifest.json  manifest.sha256
      graphs/<precision>/{prefill,decode_step}[.windowed].onnx  weights.bin
      tokenizer/tokenizer.json  tokenizer/token_bytes.json
      engines/  reports/                      added later, not in the manifest

Big files are hashed at the first opening and then remembered in the user's cache folder by size, times and inode.
Knows nothing of torch, onnx or a backend.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import LRTConfig
from .contract import FLAVOURS, Flavour
from .errors import BundleError, ConfigError
from .precisions import PRECISIONS

FORMAT_VERSION = 2  # 1 knew fp32 alone
MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
PHASES = ("prefill", "decode_step")
WEIGHTS = "weights.bin"
TOKENIZER = "tokenizer"
_ALWAYS_HASHED_BYTES = 4 * 2**20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FileRecord:
    """Size and digest of one file of the export."""

    bytes: int
    sha256: str


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
    files: dict[str, FileRecord] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"format_version": FORMAT_VERSION} | dataclasses.asdict(self)

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
        raise BundleError(f"{folder} does not exist; expected a bundle folder, made by `lrt-deploy export`")
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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{folder / MANIFEST} is not a manifest: {error}") from error
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{folder} has the bundle format {version!r}, this lrt-deploy reads {FORMAT_VERSION}; export it again"
        )
    return _parse(folder, fields)


def verify_files(folder: Path, manifest: Manifest, force: bool = False, progress: Progress = lambda d, t: None) -> None:
    """Hold every file against the manifest; `force` hashes also what an earlier opening has hashed unchanged."""
    memory = _Remembered.load()
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
        if force or record.bytes <= _ALWAYS_HASHED_BYTES or not memory.holds(stat, record):
            if hash_file(path) != record.sha256:
                raise BundleError(
                    f"{path} does not match its hash in the manifest: it was altered; export the bundle again"
                )
            memory.add(stat, record)
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
        precisions, policies = tuple(fields.pop("precisions")), tuple(fields.pop("prefill_policies"))
        manifest = Manifest(model=model, files=files, precisions=precisions, prefill_policies=policies, **fields)
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
    if missing := sorted(required_files(manifest) - set(manifest.files)):
        raise ValueError(f"{missing[0]} is not among its files")


def required_files(manifest: Manifest) -> set[str]:
    """What a bundle of these precisions cannot do without."""
    graphs = {graph_path(p, phase, f) for p in manifest.precisions for phase in PHASES for f in FLAVOURS}
    weights = {f"graphs/{precision}/{WEIGHTS}" for precision in manifest.precisions}
    tokenizer = {f"{TOKENIZER}/{name}" for name in ("tokenizer.json", "token_bytes.json")}
    return graphs | weights | (tokenizer if manifest.tokenizer_tokens else set())


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _inside(folder: Path, name: str) -> Path:
    """A manifest from a stranger must not reach outside its folder."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{folder / MANIFEST} lists {name!r}, which lies outside the bundle")
    return path


class _Remembered:
    """Which files were found intact before: digest by (device, inode, size, mtime, ctime), a few hundred at most."""

    _LIMIT = 512

    def __init__(self, path: Path, entries: dict[str, str]) -> None:
        self._path, self._entries, self._changed = path, entries, False

    @classmethod
    def load(cls) -> _Remembered:
        """From the user's cache folder; an unreadable memory is an empty one."""
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = base / "lrt-deploy" / "verified.json"
        entries: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            entries = {str(k): str(v) for k, v in dict(json.loads(path.read_text())).items()}
        return cls(path, entries)

    def holds(self, stat: os.stat_result, record: FileRecord) -> bool:
        """Whether this very file was hashed to this digest before."""
        return self._entries.get(self._key(stat)) == record.sha256

    def add(self, stat: os.stat_result, record: FileRecord) -> None:
        """Remember; only what is worth remembering."""
        if record.bytes > _ALWAYS_HASHED_BYTES:
            self._entries[self._key(stat)] = record.sha256
            self._changed = True

    def save(self) -> None:
        """Replace the file in one step. A cache folder that cannot be written costs time, not correctness."""
        if not self._changed:
            return
        recent = dict(list(self._entries.items())[-self._LIMIT :])
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump(recent, file)
            Path(file.name).replace(self._path)

    @staticmethod
    def _key(stat: os.stat_result) -> str:
        return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
