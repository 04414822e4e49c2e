"""`lrt-deploy parity`: is the bundle the model of the checkpoint? Exits 1 on no.

`lrt_deploy.evaluation` measures and judges; here a report is shown and written: a page, a picture and its numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lrt_deploy import tolerances
from lrt_deploy.bundle.precisions import PRECISIONS
from lrt_deploy.errors import LRTDeployError

from . import options, output
from .options import option

if TYPE_CHECKING:
    from lrt_deploy.runtime.decoder import Decoder

# The names of `lrt_deploy.evaluation.checks`; a test holds them against it.
CheckName = Literal[
    "fixed-point-vs-stepwise", "chunked-vs-whole", "batch-vs-alone", "restored-vs-straight", "cuda-graph", "all"
]


@dataclass(frozen=True)
class ComparisonOptions:
    """Options of `lrt_deploy.parity` beside the prompt, by the same names."""

    step: Annotated[int | None, option("Which saved step of the checkpoint; default: the last.")] = None
    steps: Annotated[
        int | None, option("Decode steps after the prompt; default: 128, or what the capacity leaves.")
    ] = None
    bisect: Annotated[bool, option("Name the first position, layer, tensor and op that differ.")] = False
    max_kl: Annotated[float | None, option("Largest mean KL in nats, in precisions judged by quality.", "KL")] = None
    min_agreement: Annotated[
        float | None, option("Smallest share of equal first choices, 0 to 1, likewise.", "SHARE")
    ] = None
    float64: Annotated[bool, option("Run the reference in float64, to see its own rounding drop out.")] = False
    prefill: options.Prefill = "fixed-point"
    tolerance: options.Tolerance = None


@dataclass(frozen=True)
class CheckOptions:
    """Comparisons that need no checkpoint."""

    check: Annotated[
        list[CheckName] | None,
        option(
            f"Check the decoder against itself: {options.listed(CheckName)}; repeatable, needs no checkpoint.", "NAME"
        ),
    ] = None
    golden: Annotated[
        Path | None, option("Compare with recorded logits and latents; needs no checkpoint.", "FILE.npz")
    ] = None


@dataclass(frozen=True)
class ReportOptions:
    """Where the report goes; nowhere by default."""

    report: Annotated[bool, option("Write a page and pictures to BUNDLE/reports.")] = False
    report_dir: Annotated[Path | None, option("Write them there instead.", "DIR")] = None

    def __post_init__(self) -> None:
        if self.report or self.report_dir:
            from lrt_deploy import figures

            figures.require("report", "a report", "--report")

    def write(self, bundle: Path, fields: dict[str, Any]) -> None:
        """Write the report, if asked for, and put the path of its page, or what went wrong, into `fields`."""
        if not (self.report or self.report_dir):
            return
        folder = self.report_dir or bundle / "reports"
        try:
            fields["report"] = str(write_page(folder, bundle.resolve().name, fields))
        except (OSError, LRTDeployError) as error:
            fields["report"] = None
            fields["report_error"] = (
                f"the report could not be written to {folder}: {getattr(error, 'strerror', None) or error}; give a "
                "folder that can be written with --report-dir"
            )


def write_page(folder: Path, bundle: str, fields: Mapping[str, Any]) -> Path:
    """Write `parity-BACKEND-PRECISION` as .json, .html and .png; returns the page."""
    from lrt_deploy import figures
    from lrt_deploy.figures import page
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
    figures.plot_parity(folder / f"{name}.png", fields, title)
    if len(others) > 1:
        figures.plot_precisions(folder / "parity-precisions.png", others, f"Parity of {bundle} by precision")
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
    decoder: Decoder,
    reopen: Callable[[], Decoder],
    asked: CheckOptions,
    prompt: list[int],
    tolerance: float | None,
    quiet: bool,
) -> list[dict[str, Any]]:
    """Run the checks that need no checkpoint, on a prompt; return the JSON fields of each.

    `reopen` opens the same bundle without CUDA graphs.
    """
    from lrt_deploy.evaluation.checks import CHECKS, Setting, compare_with_recording, read_recording, select_checks
    from lrt_deploy.evaluation.verdict import as_json

    found: list[Any] = []
    limits = tolerances.limits(decoder.precision)
    with contextlib.ExitStack() as opened, output.progress(quiet) as progress:
        if asked.check:
            setting = Setting(
                prompt,
                max(1, min(_CHECK_STEPS, decoder.max_seq_len - len(prompt))),
                limits,
                tolerance,
                decoder.manifest.max_batch_size,
                lambda: opened.enter_context(reopen()),
            )
            found += [CHECKS[name](decoder, setting) for name in select_checks(asked.check, decoder.backend)]
        if asked.golden:
            recording = read_recording(asked.golden, decoder.config)
            found.append(compare_with_recording(decoder, recording, limits, progress))
    return [as_json(check) for check in found]


def parity(
    bundle: options.BundlePath,
    *,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help=f"The checkpoint to compare with: {options.CHECKPOINT}.")
    ] = None,
    prompt: options.Prompt = None,
    tokens: options.Tokens = None,
    comparison: ComparisonOptions,
    own: CheckOptions,
    reporting: ReportOptions,
    opening: options.DecoderOptions,
    json: options.Json = False,
) -> None:
    """Compare a bundle with its checkpoint: weights, arithmetic, quality. Exits with 1 if one of them fails."""
    chosen = options.one_prompt(prompt, tokens)
    alone = not (own.check or own.golden)
    if checkpoint is None and alone:
        raise typer.BadParameter(
            "give --checkpoint or --golden to compare with, or --check to compare the bundle with itself"
        )
    if checkpoint is not None:
        options.check_checkpoint(checkpoint)
    options.check_file(own.golden, "the recording")
    options.check_tolerance(comparison.tolerance)
    from lrt_deploy.evaluation import parity as library

    asked = library.ParityOptions(chosen, **dataclasses.asdict(comparison))
    checked: list[dict[str, Any]] = []
    stored = library.stored_only_precision(bundle, opening.backend, opening.precision) if alone else None
    if stored is not None and checkpoint is not None:
        with output.progress(json) as progress:
            fields = library.parity_of_stored(bundle, checkpoint, stored, asked, opening.verify, progress).to_dict()
    else:
        with opening.open(bundle) as decoder:
            ids = library.default_prompt(decoder) if chosen is None else options.prompt_ids(decoder, chosen)
            reopen = functools.partial(opening.open, bundle, cuda_graph=False)
            checked = run_checks(decoder, reopen, own, ids, asked.tolerance, json)
            if checkpoint is None:
                failed = [check["name"] for check in checked if not check["passed"]]
                verdict = f"FAIL: {', '.join(failed)}" if failed else f"PASS: {len(checked)} of {len(checked)} checks"
                fields = {"passed": not failed, "verdict": verdict}
                fields |= {"backend": decoder.backend, "precision": decoder.precision}
            else:
                with output.progress(json) as progress:
                    fields = library.parity_of(bundle, decoder, checkpoint, asked, progress).to_dict()
    fields["checks"] = checked
    fields["passed"] = bool(fields["passed"]) and all(check["passed"] for check in checked)
    if checkpoint:
        reporting.write(bundle, fields)
    show(fields, json)
    if not fields["passed"]:
        raise typer.Exit(1)


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
    hidden = ("passed", "verdict", "report_error")
    return {name.replace("_", " "): value for name, value in shown.items() if value is not None and name not in hidden}
