"""Export a checkpoint as a bundle: trace, clean, write graphs, weights, tokenizer and manifest, then rename into place.

A bundle is whole or absent: everything is made in a temporary folder beside the target.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lrt_deploy.bundle import contract, manifest
from lrt_deploy.bundle.manifest import Manifest
from lrt_deploy.bundle.precisions import INT4, INT4_BLOCKS, PRECISIONS, base_dtype
from lrt_deploy.bundle.weights import matrix_shapes
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ExportError, InputError
from lrt_deploy.exporters.graph.ort_verify import verify_graphs
from lrt_deploy.exporters.graph.precision_graphs import write_precision
from lrt_deploy.exporters.graph.trace import trace
from lrt_deploy.exporters.quantize.calibrate import Calibration, calibrate, calibration_rows
from lrt_deploy.exporters.quantize.plan import make_plan, matching, needs_calibration
from lrt_deploy.files import read_json, read_text
from lrt_deploy.model.checkpoint import Checkpoint, open_checkpoint
from lrt_deploy.model.model import LRT
from lrt_deploy.text.tokenizer import SourceTokenizer, Tokenizer, has_tokenizer, load_source_tokenizer, write_tokenizer

from .atomic_folder import atomic_folder, recover
from .early_checks import check_batch, check_space, check_target
from .graph import passes

# Called with what is being done, and done and total of it (bytes, or 0 and 0 where there is nothing to count).
Progress = Callable[[str, int, int], None]

_MANIFEST_BYTES = 64 * 2**20
_MANIFEST_FIELDS = {"format_version", "model", "precisions", "contracts", "files"}  # in every version
_DIGEST_FORM = re.compile(rf"[0-9a-f]{{64}}  {re.escape(manifest.MANIFEST)}\n?")
_ADDED_LATER = ("engines", "reports")


@dataclass(frozen=True)
class ExportOptions:
    """What `export_bundle` takes beside the two folders; None means the default that DESIGN gives."""

    precisions: tuple[str, ...] = ("fp32",)
    max_seq_len: int | None = None
    max_batch_size: int = 8
    tokenizer: Path | None = None
    step: int | None = None
    force: bool = False
    calibration: Path | None = None
    keep_high: tuple[str, ...] | None = None
    compensate: bool = False
    int4_block: int | None = None
    host_embeddings: bool = False


def export_bundle(
    checkpoint: str | Path,
    bundle: str | Path,
    options: ExportOptions,
    progress: Progress = lambda what, done, total: None,
) -> Manifest:
    """Export `checkpoint` (see `checkpoint.open_checkpoint`) to the folder `bundle` and return its manifest.

    Raises CheckpointError for what comes in and ExportError for what cannot go out; leaves no partial bundle.
    """
    target = Path(bundle) if Path(bundle).name else Path(bundle).resolve()  # `.` cannot be renamed
    refuse_existing(target, options.force)
    check_options(options)
    check_target(target, ExportError)
    progress("reading the checkpoint", 0, 0)
    opened = open_checkpoint(checkpoint, options.step)
    capacity = check_limits(opened.config, options)
    tokenizer = find_tokenizer(opened, options.tokenizer)
    check_space(target, opened.config, options.precisions)
    with atomic_folder(target, check_replaceable if options.force else None, ExportError) as folder:
        if tokenizer is not None:
            (folder / manifest.TOKENIZER).mkdir()
            write_tokenizer(folder / manifest.TOKENIZER, tokenizer)
        graphs = _write_graphs(opened, capacity, options, folder, progress)
        progress("hashing", 0, 0)
        return manifest.write_manifest(folder, _manifest(opened, options, capacity, tokenizer, graphs))


def refuse_existing(target: Path, force: bool) -> None:
    """Raise ExportError for an existing target, unless it is to be replaced and may be."""
    recover(target)
    if not os.path.lexists(target):
        return
    if not force:
        raise ExportError(f"{target} exists; choose another folder, or pass --force (force=True) to replace it")
    check_replaceable(target)


def check_replaceable(target: Path) -> None:
    """Raise ExportError unless `target` is an empty folder, or a bundle and nothing besides.

    A damaged bundle may be replaced: it has a manifest and a digest in our form, whether or not they fit.
    """
    found: str | None
    if not target.is_dir():
        found = "is a file" if target.is_file() else "is a link to nowhere" if target.is_symlink() else "is no folder"
    elif not any(target.iterdir()):
        return
    else:
        found = _foreign_in(target)
    if found:
        raise ExportError(
            f"{target} is not a bundle: it {found}. --force replaces bundles and empty folders only; choose another "
            "folder, or remove what is there yourself"
        )


def _foreign_in(folder: Path) -> str | None:
    """Say what in a folder is not of a bundle, if anything is not."""
    if not os.path.lexists(folder / manifest.MANIFEST):
        return f"holds {min(path.name for path in folder.iterdir())} and no {manifest.MANIFEST}"
    try:
        fields = read_json(folder / manifest.MANIFEST, "its manifest", ExportError, _MANIFEST_BYTES)
        digest = read_text(folder / manifest.DIGEST, "its digest", ExportError, 1000)
    except ExportError as error:
        return f"lacks a part of one: {error}"
    if not isinstance(fields, dict) or not fields.keys() >= _MANIFEST_FIELDS or not isinstance(fields["files"], dict):
        return f"holds a {manifest.MANIFEST} of something else"
    if not _DIGEST_FORM.fullmatch(digest):
        return f"holds a {manifest.DIGEST} that is no digest of a manifest"
    known = {manifest.MANIFEST, manifest.DIGEST, *fields["files"]}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder and name.as_posix() not in known and name.parts[0] not in _ADDED_LATER:
            return f"also holds {name}, which is no part of it"
    return None


def check_limits(config: LRTConfig, options: ExportOptions) -> int:
    """Return the capacity in tokens; refuse what the model cannot do."""
    capacity = config.sequence_len if options.max_seq_len is None else options.max_seq_len
    if not 1 <= capacity <= config.max_positions:
        raise ExportError(
            f"max_seq_len is {capacity}; this model's rotary tables cover 1 to {config.max_positions} positions "
            f"(10 x sequence_len, as the authors built them)"
        )
    check_batch(config, options.precisions, options.max_batch_size, capacity)
    matching(options.keep_high or (), matrix_shapes(config), strict=True)
    return capacity


def check_options(options: ExportOptions) -> None:
    """Refuse what this version cannot do, whatever the model."""
    if options.calibration is not None and not options.calibration.exists():
        raise InputError(f"the calibration text {options.calibration} does not exist")
    unknown = [p for p in options.precisions if p not in PRECISIONS]
    if unknown or not options.precisions or len(set(options.precisions)) != len(options.precisions):
        asked, held = ", ".join(options.precisions) or "empty", ", ".join(PRECISIONS)
        raise ExportError(f"precision is {asked}; this version exports {held}, each once")
    _check_int4_block(options)


def _check_int4_block(options: ExportOptions) -> None:
    """A block that is asked for is one that int4 can have, and there is int4 to have it."""
    block, held = options.int4_block, ", ".join(map(str, INT4_BLOCKS))
    if block is None:
        return
    if block not in INT4_BLOCKS:
        raise ExportError(f"int4_block is {block}, expected one of {held}: rows of a column that share a scale")
    if INT4 not in options.precisions:
        raise ExportError(
            f"int4_block is {block}, and {', '.join(options.precisions)} has no int4 weights; add --precision {INT4} "
            "or leave --int4-block out"
        )


def find_tokenizer(checkpoint: Checkpoint, named: Path | None) -> SourceTokenizer | None:
    """The tokenizer that was named (`none`: without), else the one that belongs to the checkpoint, else None.

    It is looked for in the checkpoint's folder `tokenizer`, in the checkpoint's own folder, as on the Hub, and in the
    authors' place, the folder `tokenizer` beside `base_checkpoints`.
    """
    vocab_size = checkpoint.config.vocab_size
    if named is not None:
        return None if named == Path("none") else load_source_tokenizer(named, vocab_size)
    folder, home = checkpoint.folder, checkpoint.folder.resolve().parent.parent
    candidates = (folder / manifest.TOKENIZER, folder, home / manifest.TOKENIZER)
    found = next(filter(has_tokenizer, candidates), None)
    return None if found is None else load_source_tokenizer(found, vocab_size)


@dataclass(frozen=True)
class Graphs:
    """What the manifest says of the graphs: details of each precision, and its tables where they are on the host."""

    details: dict[str, Any]
    tables: dict[str, dict[str, manifest.TableRecord]]


def _write_graphs(checkpoint: Checkpoint, capacity: int, options: ExportOptions, folder: Path, say: Progress) -> Graphs:
    """Trace once; every precision is derived from that graph. Returns what the manifest says of each precision."""
    say("loading weights", 0, 0)
    model = checkpoint.model(max_positions=capacity)
    details: dict[str, Any] = {}
    seen = None
    if needs_calibration(options.precisions):
        seen, details["calibration"] = _calibrate(model, options, capacity, folder, say)
    say("tracing", 0, 0)
    traced = trace(model)
    passes.clean(traced)
    matrices = matrix_shapes(checkpoint.config)
    plans = [make_plan(p, matrices, options.keep_high, seen, options.int4_block) for p in options.precisions]
    tables: dict[str, dict[str, manifest.TableRecord]] = {}
    for plan in plans:
        plan = dataclasses.replace(plan, host_embeddings=options.host_embeddings)
        written = write_precision(traced, checkpoint.config, capacity, plan, folder, say)
        say(f"opening the {plan.precision} graphs", 0, 0)
        verify_graphs(folder, plan.precision)
        details[plan.precision] = {**plan.details, "operations": written.operations}
        if written.tables:
            tables[plan.precision] = written.tables
    return Graphs(details, tables)


def _calibrate(
    model: LRT, options: ExportOptions, capacity: int, folder: Path, say: Progress
) -> tuple[Calibration, dict[str, Any]]:
    """Roll the reference out over the calibration text; returns what was seen, and what it was seen on."""
    has_tokenizer = (folder / manifest.TOKENIZER).is_dir()
    tokenizer = Tokenizer.open(folder / manifest.TOKENIZER) if has_tokenizer else None
    rows = calibration_rows(options.calibration, tokenizer, model.config.vocab_size, capacity)
    say(f"calibrating on {rows.source}", 0, 0)
    seen = calibrate(model, rows.tokens, say, moments=options.compensate)
    about = {"text": rows.source, "sha256": rows.sha256, "rows": seen.rows, "row_tokens": seen.row_tokens}
    return seen, about


def _manifest(
    checkpoint: Checkpoint,
    options: ExportOptions,
    capacity: int,
    tokenizer: SourceTokenizer | None,
    graphs: Graphs,
) -> Manifest:
    config = checkpoint.config
    packages = ("lrt-deploy", "torch", "onnx", "onnx-ir", "onnxscript")
    return Manifest(
        model=config,
        max_seq_len=capacity,
        max_batch_size=options.max_batch_size,
        precisions=tuple(options.precisions),
        prefill_policies=("stepwise", "fixed-point", "zero") if config.memory else ("stepwise", "fixed-point"),
        contracts={
            precision: {
                f: contract.describe(config, f, base_dtype(precision, f), options.host_embeddings)
                for f in contract.FLAVOURS
            }
            for precision in options.precisions
        },
        tokenizer_tokens=None if tokenizer is None else len(tokenizer.byte_lengths),
        precision_details=graphs.details,
        tables=graphs.tables,
        provenance={
            "checkpoint": {
                "file": checkpoint.model_file.name,
                "sha256": checkpoint.sha256,
                "step": checkpoint.step,
                "known_as": checkpoint.known_as,
                "chosen": checkpoint.chosen,
            },
            "versions": {package: version(package) for package in packages},
        },
    )
