"""Export a checkpoint as a bundle: trace, clean, write graphs, weights, tokenizer and manifest, then rename into place.

Loading this file is cheap: torch and the graph tools are imported when an export begins.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrt_deploy.bundle import contract, manifest
from lrt_deploy.bundle.manifest import Manifest
from lrt_deploy.bundle.precisions import INT4, base_dtype
from lrt_deploy.bundle.weights import EMBEDDING_TABLES, matrix_shapes, weight_sources
from lrt_deploy.errors import ExportError
from lrt_deploy.fields import check_callable, check_flag, check_path, check_texts, check_whole
from lrt_deploy.files import check_writable, read_json, read_text
from lrt_deploy.model.hub import check_source
from lrt_deploy.text.tokenizer import (
    SourceTokenizer,
    Tokenizer,
    load_source_tokenizer,
    tokenizer_folder,
    tokenizer_texts,
    write_tokenizer,
)

from .atomic_folder import Check, atomic_folder, recover
from .estimate import Estimate, estimate_export
from .existing import ExistingBundle
from .export_options import ExportRequest, check_space

if TYPE_CHECKING:
    from lrt_deploy.exporters.quantize.calibrate import Calibration
    from lrt_deploy.model.checkpoint import Checkpoint
    from lrt_deploy.model.model import LRT

# Called with what is being done, and done and total of it (bytes, or 0 and 0 where there is nothing to count).
Progress = Callable[[str, int, int], None]


def _silent(what: str, done: int, total: int) -> None:
    pass


_MANIFEST_BYTES = 64 * 2**20
_MANIFEST_FIELDS = {"format_version", "model", "precisions", "contracts", "files"}  # in every version
_DIGEST_FORM = re.compile(rf"[0-9a-f]{{64}}  {re.escape(manifest.MANIFEST)}\n?")
_ADDED_LATER = ("engines", "reports")


def export_bundle(
    checkpoint: str | Path,
    bundle: str | Path,
    *,
    precision: str | Sequence[str] = "fp32",
    max_seq_len: int | None = None,
    max_batch_size: int | None = None,
    tokenizer: str | Path | None = None,
    step: int | None = None,
    force: bool = False,
    add: bool = False,
    calibration: str | Path | None = None,
    keep_high: Sequence[str] | None = None,
    compensate: bool | None = None,
    int4_block: int | None = None,
    host_embeddings: bool = False,
    progress: Progress = _silent,
) -> Manifest:
    """Export a checkpoint to a bundle folder and return the bundle's manifest.

    Args:
        checkpoint: a checkpoint folder or weights file, in the authors' layout or the native one; or, as text,
            `hf://owner/name[@revision]` for one on the Hugging Face Hub, which is fetched.
        bundle: the folder to make. It is whole or absent.
        precision: one or several of `fp32`, `fp16`, `bf16`, `int8` (W8A8), `int8-weight-only`, `int4-weight-only`.
        max_seq_len: tokens that a sequence can hold; None: the model's `sequence_len`. At most 10 times that.
        max_batch_size: sequences that can run together; None: 8.
        tokenizer: a folder with `tokenizer.pkl` or `tokenizer.json`, or one of these files; `none`: no tokenizer;
            None: the one that belongs to the checkpoint, if any.
        step: which of several saved steps; None: the last.
        force: replace an existing bundle.
        add: put the precisions into an existing bundle of the same checkpoint, as a whole or not at all. It keeps its
            files, engines, tokenizer, `max_seq_len` and `max_batch_size`; processes that have it open go on.
        calibration: a text file on which ranges and int8 activations are measured; None: the one that is shipped.
        keep_high: matrices that stay precise, as `gate`, `lm_head`, `blocks.3.mlp_in` or `blocks.0`; None: the
            default of each precision; empty: none.
        compensate: round int4 weights by GPTQ, so that later rows make up for the error of earlier ones; None: where
            there is a tokenizer, and so text to calibrate on.
        int4_block: rows of a column that share an int4 scale, 32, 64 or 128; None: with GPTQ the longest that cuts
            the rows of all matrices, else 32.
        host_embeddings: keep the embedding tables out of graphs and engines; the runtime maps them.
        progress: called with (what, done, total), in bytes or 0, 0. What it raises ends the export.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be read, or its model is not known to this version.
        ExportError: the bundle cannot be made as asked for. Nothing is left behind.
        BundleError: with `add`, the bundle is not intact.
        InputError: an argument is not of its type.

    """
    given = dict(locals())
    source, target = check_source(checkpoint, "checkpoint"), check_path(bundle, "bundle")
    return _export(source, target, _request(given), check_callable(progress, "progress"))


def estimate_bundle(checkpoint: str | Path, bundle: str | Path, **named: Any) -> Estimate:  # noqa: ANN401
    """Estimate what `export_bundle` would take with the same options, and make the checks that it begins with.

    Writes nothing, but a checkpoint on the Hub is fetched into the cache. Raises the errors of `export_bundle`, as far
    as they need no weights.
    """
    source, bundle = check_source(checkpoint, "checkpoint"), check_path(bundle, "bundle")
    progress = check_callable(named.pop("progress", _silent), "progress")
    job = _prepare(source, _target(bundle, bool(named.get("add"))), _request(_DEFAULTS | named), progress)
    texts = {} if job.tokenizer is None else tokenizer_texts(job.tokenizer)
    found = {f"{manifest.TOKENIZER}/{name}": len(text.encode()) for name, text in texts.items()}
    tensors = job.checkpoint.tensors
    wide = {
        table
        for table, source in weight_sources(job.checkpoint.config).items()
        if table in EMBEDDING_TABLES
        and any(tensors[name].dtype != "bfloat16" for name in source.names if name in tensors)
    }
    return estimate_export(job.checkpoint.config, job.options, job.capacity, wide, found, job.target)


_DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(export_bundle).parameters.items()
    if parameter.default is not parameter.empty and name != "progress"
}


def _request(given: Mapping[str, Any]) -> ExportRequest:
    """Check the types of all options of `export_bundle`."""
    precision = given["precision"]
    checked: dict[str, Any] = {name: check_flag(given[name], name) for name in ("force", "add", "host_embeddings")}
    for name, check in _OPTIONAL.items():
        checked[name] = None if given[name] is None else check(given[name], name)
    return ExportRequest((precision,) if isinstance(precision, str) else check_texts(precision, "precision"), **checked)


_OPTIONAL: dict[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys(("max_seq_len", "max_batch_size", "step", "int4_block"), check_whole),
    **dict.fromkeys(("tokenizer", "calibration"), check_path),
    "keep_high": check_texts,
    "compensate": check_flag,
}


@dataclass(frozen=True)
class _Job:
    """An export whose options were checked, and whose checkpoint is open."""

    target: Path
    checkpoint: Checkpoint
    options: ExportRequest
    capacity: int
    existing: ExistingBundle | None
    tokenizer: SourceTokenizer | None


def _target(bundle: Path, add: bool) -> Path:
    """Return the folder to make: `.` cannot be renamed, and `add` goes to the bundle that a link points to."""
    return bundle.resolve() if add or not bundle.name else bundle


def _prepare(source: str | Path, target: Path, options: ExportRequest, progress: Progress) -> _Job:
    """Make the checks that need no weights; write nothing."""
    options.check()
    existing = ExistingBundle.open(target, options) if options.add else None
    if existing is None and os.path.lexists(target):
        if not options.force:
            raise ExportError(
                f"{target} exists; choose another folder, or pass --force (force=True) to replace it, or --add "
                "(add=True) to put a precision into it"
            )
        check_replaceable(target)
    check_writable(target, ExportError)
    from lrt_deploy.model.checkpoint import open_checkpoint

    from .graph import trace  # noqa: F401 - a missing package is reported before the checkpoint is read

    progress("reading the checkpoint", 0, 0)
    opened = open_checkpoint(source, options.step, progress)
    if existing is not None:
        options = existing.complete(options, opened)
    capacity = options.capacity(opened.config)
    check_space(target, opened.config, options.precisions)
    tokenizer = find_tokenizer(opened, options.tokenizer) if existing is None else None
    if options.compensate is None:
        has_text = tokenizer is not None or (existing is not None and bool(existing.manifest.tokenizer_tokens))
        options = replace(options, compensate=has_text)
    return _Job(target, opened, options, capacity, existing, tokenizer)


def _export(source: str | Path, bundle: Path, options: ExportRequest, progress: Progress) -> Manifest:
    """Make the bundle beside its place, with the files of the one that it is added to, and put it there."""
    target = _target(bundle, options.add)
    recover(target)
    job = _prepare(source, target, options, progress)
    existing, tokenizer = job.existing, job.tokenizer
    check: Check | None = check_replaceable if options.force else None
    folder: Path
    if existing is not None:
        check = lambda _: existing.take_rest(folder)  # noqa: E731
    with atomic_folder(target, check, ExportError) as folder:
        tokens = None if existing is None else existing.manifest.tokenizer_tokens
        if existing is not None:
            existing.take_files(folder)
        elif tokenizer is not None:
            tokens = len(tokenizer.byte_lengths)
            (folder / manifest.TOKENIZER).mkdir()
            write_tokenizer(folder / manifest.TOKENIZER, tokenizer)
        details, tables = _write_graphs(job, folder, progress)
        progress("hashing", 0, 0)
        made = _manifest(job, tokens, details, tables)
        if existing is not None:
            return manifest.write_manifest(folder, existing.join(made), existing.manifest.files)
        return manifest.write_manifest(folder, made)


def check_replaceable(target: Path) -> None:
    """Raise ExportError unless `target` is an empty folder, or a bundle, damaged or not, and nothing besides."""
    if target.is_dir():
        found = _foreign_in(target) if any(target.iterdir()) else None
    else:
        found = "is a file" if target.is_file() else "is a link to nowhere" if target.is_symlink() else "is no folder"
    if found:
        raise ExportError(
            f"{target} is not a bundle: it {found}. --force replaces bundles and empty folders only; choose another "
            "folder, or remove what is there yourself"
        )


def _foreign_in(folder: Path) -> str | None:
    """Describe the first thing in a folder that no bundle has; None if there is none."""
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


def find_tokenizer(checkpoint: Checkpoint, named: Path | None) -> SourceTokenizer | None:
    """Return the tokenizer that was named (`none`: none), else the one of the checkpoint, else None."""
    vocab_size = checkpoint.config.vocab_size
    if named is not None:
        return None if named == Path("none") else load_source_tokenizer(named, vocab_size)
    found = tokenizer_folder(checkpoint.folder)
    return None if found is None else load_source_tokenizer(found, vocab_size)


Tables = dict[str, dict[str, manifest.TableRecord]]


def _write_graphs(job: _Job, folder: Path, say: Progress) -> tuple[dict[str, Any], Tables]:
    """Write the graphs of all precisions and their weights; return the manifest's entries on them, and on tables."""
    from .graph import passes
    from .graph.precision_graphs import write_precision
    from .graph.trace import trace
    from .graph.verify import verify_graphs
    from .quantize.plan import make_plan

    say("loading weights", 0, 0)
    options, capacity, config = job.options, job.capacity, job.checkpoint.config
    model = job.checkpoint.model(max_positions=capacity)
    details: dict[str, Any] = {}
    seen = None
    if options.needs_calibration:
        seen, details["calibration"] = _calibrate(model, options, capacity, folder, say)
    say("tracing", 0, 0)
    traced = trace(model)
    passes.clean(traced)
    matrices = matrix_shapes(config)
    plans = [make_plan(p, matrices, options.keep_high, seen, options.int4_block) for p in options.precisions]
    tables: Tables = {}
    for plan in plans:
        plan = replace(plan, host_embeddings=options.host_embeddings)
        operations, on_host = write_precision(traced, config, capacity, plan, folder, say)
        say(f"opening the {plan.precision} graphs", 0, 0)
        verify_graphs(folder, plan.precision)
        details[plan.precision] = {**plan.details, "operations": operations}
        if on_host:
            tables[plan.precision] = on_host
    return details, tables


def _calibrate(
    model: LRT, options: ExportRequest, capacity: int, folder: Path, say: Progress
) -> tuple[Calibration, dict[str, Any]]:
    """Roll the reference out over the calibration text; return the measurements, and the manifest's entry on them."""
    from .quantize.calibrate import calibrate, calibration_rows

    has_tokenizer = (folder / manifest.TOKENIZER).is_dir()
    tokenizer = Tokenizer.open(folder / manifest.TOKENIZER) if has_tokenizer else None
    rows = calibration_rows(options.calibration, tokenizer, model.config.vocab_size, capacity)
    say(f"calibrating on {rows.source}", 0, 0)
    seen = calibrate(model, rows.tokens, say, moments=bool(options.compensate) and INT4 in options.precisions)
    return seen, {"text": rows.source, "sha256": rows.sha256, "rows": seen.rows, "row_tokens": seen.row_tokens}


def _manifest(job: _Job, tokenizer_tokens: int | None, details: dict[str, Any], tables: Tables) -> Manifest:
    checkpoint, options, config = job.checkpoint, job.options, job.checkpoint.config
    packages = ("lrt-deploy", "torch", "onnx", "onnx-ir", "onnxscript")
    return Manifest(
        model=config,
        max_seq_len=job.capacity,
        max_batch_size=options.batch_size,
        precisions=options.precisions,
        prefill_policies=("stepwise", "fixed-point", "zero") if config.memory else ("stepwise", "fixed-point"),
        contracts={
            precision: {
                f: contract.describe(config, f, base_dtype(precision, f), options.host_embeddings)
                for f in contract.FLAVOURS
            }
            for precision in options.precisions
        },
        tokenizer_tokens=tokenizer_tokens,
        precision_details=details,
        tables=tables,
        provenance={
            "checkpoint": {
                "file": checkpoint.model_file.name,
                "sha256": checkpoint.sha256,
                "step": checkpoint.step,
                "known_as": checkpoint.known_as,
                "chosen": checkpoint.chosen,
                "hub": None if checkpoint.origin is None else checkpoint.origin.to_dict(),
            },
            "versions": {package: version(package) for package in packages},
        },
    )
