"""`lrt-deploy parity`: is the bundle the model of the checkpoint? Exits 1 on no.

`lrt_deploy.evaluation` measures and judges; here a report is shown and written: a page, a picture and its numbers.
`--check` and `--golden` compare a decoder with itself or with a recording.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from lrt_deploy import figures
from lrt_deploy.bundle.precisions import PRECISIONS
from lrt_deploy.errors import CheckpointError, LRTDeployError

from . import options, output

if TYPE_CHECKING:
    from lrt_deploy.evaluation.report import ParityReport
    from lrt_deploy.runtime.decoder import Decoder

# The names of `lrt_deploy.evaluation.checks`; a test holds them against it.
CheckName = Literal[
    "fixed-point-vs-stepwise", "chunked-vs-whole", "batch-vs-alone", "restored-vs-straight", "cuda-graph", "all"
]
if TYPE_CHECKING:
    _CheckItem = str
else:
    _CheckItem = StrEnum("_CheckItem", [(name, name) for name in get_args(CheckName)])


@dataclass(frozen=True)
class ComparisonOptions:
    """Options of `lrt_deploy.parity` beside the prompt, by the same names."""

    step: Annotated[int | None, typer.Option(help="Which saved step of the checkpoint; default: the last.")] = None
    steps: Annotated[
        int | None, typer.Option(help="Decode steps after the prompt; default: 128, or what the capacity leaves.")
    ] = None
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Name the first position, layer, tensor and op that differ.")
    ] = False
    max_kl: Annotated[
        float | None,
        typer.Option(metavar="KL", help="Largest mean KL in nats, in precisions judged by quality."),
    ] = None
    min_agreement: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Smallest share of equal first choices, 0 to 1, likewise."),
    ] = None
    float64: Annotated[
        bool, typer.Option("--float64", help="Run the reference in float64, to see its own rounding drop out.")
    ] = False
    prefill: options.Prefill = "fixed-point"
    tolerance: options.Tolerance = None


def write_reports(bundle: Path, folder: Path, fields: dict[str, Any]) -> None:
    """Write the report and put the path of its page, or what went wrong, into `fields`."""
    try:
        fields["report"] = str(write_page(folder, bundle.resolve().name, fields))
    except (OSError, LRTDeployError) as error:
        fields["report"] = None
        fields["report_error"] = (
            f"the report could not be written to {folder}: {getattr(error, 'strerror', None) or error}; give a folder "
            "that can be written with --report-dir"
        )


def write_page(folder: Path, bundle: str, fields: Mapping[str, Any]) -> Path:
    """Write `parity-BACKEND-PRECISION` as .json, .html and .png; returns the page."""
    from lrt_deploy.evaluation import plots
    from lrt_deploy.evaluation.html import page
    from lrt_deploy.files import atomic_write

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = f"parity-{fields['backend']}-{fields['precision']}"
    title = f"Parity of {bundle}: {fields['backend']}, {fields['precision']}"
    with atomic_write(folder / f"{name}.json", private=True) as path:
        path.write_text(json.dumps(fields) + "\n", encoding="utf-8")
    others = comparable(folder, fields)
    with atomic_write(folder / f"{name}.html", private=True) as path:
        path.write_text(page(title, fields, others), encoding="utf-8")
    if not fields["positions"]["position"]:  # stored weights alone were judged
        return folder / f"{name}.html"
    plots.plot_parity(folder / f"{name}.png", fields, title)
    if len(others) > 1:
        plots.plot_precisions(folder / "parity-precisions.png", others, f"Parity of {bundle} by precision")
    return folder / f"{name}.html"


def comparable(folder: Path, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the stored runs over the same prompt and as many steps, the most precise first."""
    found = []
    for path in sorted(folder.glob("parity-*.json")):
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
            same = all(other[name] == fields[name] for name in ("prompt_tokens", "steps"))
            prompt = fields["prompt_tokens"]
            same = same and bool(other["positions"]["position"])  # something was run
            if same and other["tokens"][:prompt] == fields["tokens"][:prompt] and other["precision"] in PRECISIONS:
                found.append(other)
        except (ValueError, KeyError, TypeError):
            output.say(f"{path} is not a report of this version and was left out")
    return sorted(found, key=lambda other: (PRECISIONS.index(other["precision"]), other["backend"]))


_CHECK_STEPS = 16


def run_checks(
    bundle: Path,
    decoder: Decoder,
    opening: options.DecoderOptions,
    names: Sequence[str],
    prompt: list[int],
    tolerance: float | None,
) -> list[dict[str, Any]]:
    """Run the named checks of a decoder against itself; return their JSON fields."""
    from lrt_deploy.evaluation.checks import CHECKS, Setting, select_checks
    from lrt_deploy.tolerances import limits

    with contextlib.ExitStack() as opened:
        setting = Setting(
            prompt,
            max(1, min(_CHECK_STEPS, decoder.max_seq_len - len(prompt))),
            limits(decoder.precision),
            tolerance,
            decoder.manifest.max_batch_size,
            lambda: opened.enter_context(opening.open(bundle, cuda_graph=False)),
        )
        return [CHECKS[name](decoder, setting).to_dict() for name in select_checks(names, decoder.backend)]


def against_golden(decoder: Decoder, golden: Path, quiet: bool) -> dict[str, Any]:
    """Compare a decoder with recorded arrays; return the JSON fields."""
    from lrt_deploy.evaluation.checks import compare_with_recording, read_recording
    from lrt_deploy.tolerances import limits

    recording = read_recording(golden, decoder.config)
    with output.progress(quiet) as progress:
        return compare_with_recording(decoder, recording, limits(decoder.precision), progress).to_dict()


def checks_document(decoder: Decoder, checks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON fields of a run without a checkpoint."""
    failed = [check["name"] for check in checks if not check["passed"]]
    return {
        "passed": not failed,
        "verdict": f"FAIL: {', '.join(failed)}" if failed else f"PASS: {len(checks)} of {len(checks)} checks",
        "backend": decoder.backend,
        "precision": decoder.precision,
    }


def parity(
    bundle: options.BundlePath,
    *,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="The checkpoint to compare with.")
    ] = None,
    prompt: options.Prompt = None,
    tokens: options.Tokens = None,
    comparison: ComparisonOptions,
    check: Annotated[
        list[_CheckItem] | None,
        typer.Option(
            metavar="NAME",
            help=f"Check the decoder against itself: {options.listed(CheckName)}; repeatable, needs no checkpoint.",
        ),
    ] = None,
    golden: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Compare with recorded logits and latents; needs no checkpoint."),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Write a page and pictures to BUNDLE/reports.")] = False,
    report_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Write them there instead.")] = None,
    opening: options.DecoderOptions,
    json: options.Json = False,
) -> None:
    """Compare a bundle with its checkpoint: weights, arithmetic, quality. Exits with 1 if one of them fails."""
    chosen = options.one_prompt(prompt, tokens)
    if checkpoint is None and not (check or golden):
        raise typer.BadParameter(
            "give --checkpoint or --golden to compare with, or --check to compare the bundle with itself"
        )
    check_inputs(checkpoint, golden, comparison.tolerance)
    if report or report_dir is not None:
        figures.require("report", "a report", "--report")
    from lrt_deploy.evaluation.parity import (
        ParityOptions,
        default_prompt,
        parity_of,
        parity_of_stored,
        stored_only_precision,
    )

    asked = ParityOptions(chosen, **dataclasses.asdict(comparison))
    checked: list[dict[str, Any]] = []
    stored_only = None if check or golden else stored_only_precision(bundle, opening.backend, opening.precision)
    if stored_only is not None and checkpoint is not None:
        with output.progress(json) as progress:
            fields = document(parity_of_stored(bundle, checkpoint, stored_only, asked, opening.verify, progress))
    else:
        with opening.open(bundle) as decoder:
            ids = default_prompt(decoder) if chosen is None else options.prompt_ids(decoder, chosen)
            checked += (
                run_checks(bundle, decoder, opening, list(map(str, check)), ids, asked.tolerance) if check else []
            )
            checked += [against_golden(decoder, golden, json)] if golden else []
            if checkpoint is None:
                fields = checks_document(decoder, checked)
            else:
                with output.progress(json) as progress:
                    fields = document(parity_of(bundle, decoder, checkpoint, asked, progress))
    fields["checks"] = checked
    fields["passed"] = bool(fields["passed"]) and all(check["passed"] for check in checked)
    if checkpoint and (report or report_dir is not None):
        write_reports(bundle, report_dir or bundle / "reports", fields)
    show(fields, json)
    if not fields["passed"]:
        raise typer.Exit(1)


def check_inputs(checkpoint: Path | None, golden: Path | None, tolerance: float | None) -> None:
    """Raise CheckpointError or InputError for files that do not exist or are something else."""
    from lrt_deploy.bundle import kinds

    if checkpoint is not None and (mistaken := kinds.instead_of_checkpoint(checkpoint)):
        raise CheckpointError(mistaken)
    options.check_file(checkpoint, "the checkpoint")
    options.check_file(golden, "the recording")
    options.check_tolerance(tolerance)


def document(report: ParityReport) -> dict[str, Any]:
    """Return the JSON fields of a report."""
    from lrt_deploy.evaluation.report import as_json

    fields = report.to_dict()
    if report.bisect is not None:
        fields["bisect"] = as_json(report.bisect.to_dict())
    return fields


def show(fields: dict[str, Any], json: bool) -> None:
    """Print the document, or the verdict with the place of the fault, and a table."""
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
    if "report_error" in fields:
        output.say(fields["report_error"])


def rows(fields: dict[str, Any]) -> dict[str, object]:
    """Return the rows of a table of the measured numbers, without curves and verdict."""
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
    return {name.replace("_", " "): value for name, value in shown.items() if name not in hidden}
