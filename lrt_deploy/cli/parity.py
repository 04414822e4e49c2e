"""`lrt-deploy parity`: is the bundle the model of the checkpoint? Exits 1 on no.

What is measured and tolerated is for `lrt_deploy.evaluation.parity`; here options become a call, and a report is shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lrt_deploy.errors import CheckpointError, LRTDeployError

from . import checks, options, output
from . import parity_options as own

if TYPE_CHECKING:
    from lrt_deploy.evaluation.parity import ParityOptions
    from lrt_deploy.evaluation.report import ParityReport


def parity(
    bundle: options.BundlePath,
    checkpoint: own.Checkpoint = None,
    step: own.CheckpointStep = None,
    prompt: options.Prompt = None,
    tokens: options.Tokens = None,
    steps: own.Steps = None,
    check: own.Check = None,
    golden: own.Golden = None,
    bisect: own.Bisect = False,
    max_kl: own.MaxKl = None,
    min_agreement: own.MinAgreement = None,
    write_report: own.Report = False,
    report_dir: own.ReportDir = None,
    float64: own.Float64 = False,
    prefill: options.Prefill = "fixed-point",
    tolerance: options.Tolerance = None,
    backend: options.Backend = "ort-cpu",
    precision: options.Precision = None,
    max_seq_len: options.MaxSeqLen = None,
    threads: options.Threads = None,
    verify: options.Verify = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare a bundle with its checkpoint: weights, arithmetic, quality. Exits with 1 if one of them fails."""
    chosen = options.one_prompt(prompt, tokens)
    if checkpoint is None and not (check or golden):
        raise typer.BadParameter(
            "give --checkpoint or --golden to compare with, or --check to compare the bundle with itself"
        )
    check_inputs(checkpoint, golden, tolerance)
    from lrt_deploy.evaluation.parity import ParityOptions, parity_of_stored, stored_only_precision

    asked = ParityOptions(chosen, steps, step, prefill, tolerance, float64, bisect, max_kl, min_agreement)
    runner = options.Runner(backend, precision, max_seq_len, threads, verify)
    names = [str(name) for name in check or ()]
    checked: list[dict[str, Any]] = []
    stored_only = None if check or golden else stored_only_precision(bundle, backend, precision)
    if stored_only is not None and checkpoint is not None:
        with output.progress(json) as progress:
            fields = document(parity_of_stored(bundle, checkpoint, stored_only, asked, verify, progress))
    else:
        fields, checked = _decoded(bundle, checkpoint, runner, asked, (names, golden), json)
    written = _write(bundle, report_dir, fields) if checkpoint and (write_report or report_dir is not None) else None
    show(checks.joined(fields, checked), json)
    if written and not json:
        output.say(written)
    if not fields["passed"]:
        raise typer.Exit(1)


def check_inputs(checkpoint: Path | None, golden: Path | None, tolerance: float | None) -> None:
    """Refuse what is not there before the bundle is opened."""
    from lrt_deploy.bundle import kinds

    if checkpoint is not None and (mistaken := kinds.instead_of_checkpoint(checkpoint)):
        raise CheckpointError(mistaken)
    options.check_file(checkpoint, "the checkpoint")
    options.check_file(golden, "the recording")
    options.check_tolerance(tolerance)


def _decoded(
    bundle: Path,
    checkpoint: Path | None,
    runner: options.Runner,
    asked: ParityOptions,
    others: tuple[list[str], Path | None],
    json: bool,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The fields of the comparison, and of the checks that need no checkpoint; `others` are --check and --golden."""
    from lrt_deploy.evaluation.parity import default_prompt, parity_of

    check, golden = others
    with runner.open(bundle) as decoder:
        chosen = asked.prompt
        ids = (
            default_prompt(decoder)
            if chosen is None
            else options.prompt_ids(decoder, chosen if isinstance(chosen, str) else list(chosen))
        )
        checked = checks.run_checks(bundle, decoder, runner, check, ids, asked.tolerance) if check else []
        checked += [checks.against_golden(decoder, golden, json)] if golden else []
        if checkpoint is None:
            return checks.document(decoder, checked), checked
        with output.progress(json) as progress:
            return document(parity_of(bundle, decoder, checkpoint, asked, progress)), checked


def _write(bundle: Path, folder: Path | None, fields: dict[str, Any]) -> str | None:
    """Write the page and put its place into `fields`; or say why it could not be written, for after the verdict."""
    from .report_files import write_reports

    target = bundle / "reports" if folder is None else folder
    try:
        fields["report"] = str(write_reports(target, bundle.resolve().name, fields))
    except (OSError, LRTDeployError) as error:
        fields["report"] = None
        fields["report_error"] = (
            f"the report could not be written to {target}: {getattr(error, 'strerror', None) or error}; give a folder "
            "that can be written with --report-dir"
        )
        return str(fields["report_error"])
    return None


def document(report: ParityReport) -> dict[str, Any]:
    """The JSON fields."""
    from lrt_deploy.evaluation.report import as_json

    fields = report.to_dict()
    if report.bisect is not None:
        fields["bisect"] = as_json(report.bisect.to_dict())
    return fields


def show(fields: dict[str, Any], json: bool) -> None:
    """The document, or the verdict with the place of the fault, and a table."""
    if json:
        output.document(fields)
        return
    for check in fields["checks"]:
        output.answer(check["line"])
    if "max_kl" not in fields:  # checks alone
        return
    output.answer(fields["verdict"])
    if "bisect" in fields:
        output.answer(fields["bisect"]["line"])
    output.table(rows(fields))


def rows(fields: dict[str, Any]) -> dict[str, str]:
    """The measured numbers for people, without the curves, and without the verdict, which stands on stdout."""
    shown = {name: value for name, value in fields.items() if not isinstance(value, (list, dict))}
    for part, label in (
        ("prefill", "prefill"),
        ("first_divergence", "divergence"),
        ("free_running", "free-running"),
        ("drift", "latent error, drift"),
    ):
        numbers = (fields.get(part) or {}).items()
        shown |= {f"{label} {name}": value for name, value in numbers if not isinstance(value, (list, dict))}
    for part in ("weights", "arithmetic", "quality"):
        if fields.get(part):
            shown[part] = "passed" if fields[part]["passed"] else "failed"
    hidden = ("passed", "verdict", "report_error", *(name for name, value in shown.items() if value is None))
    return {name.replace("_", " "): cell(value) for name, value in shown.items() if name not in hidden}


def cell(value: object) -> str:
    """A number in few digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)
