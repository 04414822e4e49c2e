"""`lrt-deploy parity`: is the bundle the model of the checkpoint? Opens both, compares by rollout, exits 1 on no.

What is measured and what is tolerated is `lrt_deploy.comparison`'s; here only the two sides and the prompt are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lrt_deploy.errors import CheckpointError
from lrt_deploy.parity_report import as_json

from . import budget, checks, options, output
from . import parity_options as own
from .parity_options import STEPS

if TYPE_CHECKING:
    from lrt_deploy.bisect import Bisection
    from lrt_deploy.checkpoint import Checkpoint
    from lrt_deploy.comparison import ParityReport
    from lrt_deploy.contract import Flavour
    from lrt_deploy.reference import ReferenceDecoder
    from lrt_deploy.runtime.decoder import Decoder

# Long enough that iterating it says something.
PROMPT = (
    "The river rose in the night, and by morning the lower meadows were under water. Two men in a boat went from house "
    "to house and called up at the windows, and whoever answered was given bread, candles and the news that the bridge "
    "was gone. Nobody had slept. In the school on the hill the tables were pushed together, and the children were told "
    "that today they would write down what they had seen: how high the water stood, what it carried, and who was there."
)
_PROMPT_TOKENS = 96  # of the prompt made up for a bundle without tokenizer


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
    fit_budget: own.FitBudget = None,
    calibration: own.CalibrationText = None,
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
    """Compare a bundle with its checkpoint over a rollout. Exits with 1 if they differ by more than is tolerated."""
    chosen = options.one_prompt(prompt, tokens)
    if checkpoint is None and (not (check or golden) or fit_budget is not None):
        raise typer.BadParameter(
            "give --checkpoint or --golden to compare with, or --check to compare the bundle with itself"
        )
    check_inputs(checkpoint, golden, calibration, tolerance)
    if write_report or report_dir is not None:
        options.check_writable(bundle / "reports" if report_dir is None else report_dir, "the report")
    runner = options.Runner(backend, precision, max_seq_len, threads, verify)
    with runner.open(bundle) as decoder:
        if checkpoint is not None and fit_budget is not None:
            opened = open_same_model(decoder, checkpoint, step)
            with output.progress(json) as progress:
                fields = budget.fitted(decoder, opened, fit_budget, calibration, progress)
            budget.show(fields, json)
            raise typer.Exit(0 if fields["passed"] else 1)
        ids = default_prompt(decoder) if chosen is None else options.prompt_ids(decoder, chosen)
        checked = (
            checks.run_checks(bundle, decoder, runner, [str(name) for name in check], ids, tolerance) if check else []
        )
        checked += [checks.against_golden(decoder, golden, json)] if golden else []
        fields = checks.document(decoder, checked)
        if checkpoint is not None:
            count = min(STEPS, max(1, decoder.max_seq_len - len(ids))) if steps is None else steps
            run = Run(checkpoint, step, ids, count, {"prefill": prefill, "tolerance": tolerance}, float64, bisect)
            with output.progress(json) as progress:
                fields = against_checkpoint(bundle, decoder, run, progress)
    if checkpoint is not None and (write_report or report_dir is not None):
        fields["report"] = write_page(bundle, report_dir, fields)
    show(checks.joined(fields, checked), json)
    if not fields["passed"]:
        raise typer.Exit(1)


def check_inputs(checkpoint: Path | None, golden: Path | None, text: Path | None, tolerance: float | None) -> None:
    """Refuse what is not there before the bundle is opened."""
    from lrt_deploy import kinds

    if checkpoint is not None and (mistaken := kinds.instead_of_checkpoint(checkpoint)):
        raise CheckpointError(mistaken)
    options.check_file(checkpoint, "the checkpoint")
    options.check_file(golden, "the recording")
    options.check_file(text, "the calibration text")
    options.check_tolerance(tolerance)


@dataclass(frozen=True)
class Run:
    """What is compared with what, over which tokens."""

    checkpoint: Path
    step: int | None
    prompt: list[int]
    steps: int
    reading: dict[str, Any]
    float64: bool
    bisect: bool


def against_checkpoint(bundle: Path, decoder: Decoder, run: Run, progress: output.Progress) -> dict[str, Any]:
    """The JSON fields of the comparison, and of the search for its fault if one is wanted."""
    opened = open_same_model(decoder, run.checkpoint, run.step)
    progress("loading the checkpoint", 0, 0)
    reference = open_reference(decoder, opened, run.float64)
    report = compare(reference, decoder, opened, (run.prompt, run.steps, run.reading), progress)
    return document(report, bisected(bundle, reference, decoder, report) if run.bisect else None)


def write_page(bundle: Path, folder: Path | None, fields: dict[str, Any]) -> str:
    """Where the page went."""
    from .report_files import write_reports

    return str(write_reports(bundle / "reports" if folder is None else folder, bundle.resolve().name, fields))


def document(report: ParityReport, found: Bisection | None) -> dict[str, Any]:
    """The JSON fields."""
    fields = report.to_dict()
    if found is not None:
        fields["bisect"] = as_json(found.to_dict())
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


def default_prompt(decoder: Decoder) -> list[int]:
    """A short fixed text, or, without a tokenizer for it, token ids spread over the vocabulary."""
    from lrt_deploy.chat_form import BOS

    capacity, vocab_size = decoder.max_seq_len, decoder.config.vocab_size
    if decoder.tokenizer is not None and BOS in decoder.tokenizer.special_tokens:
        ids = decoder.tokenizer.encode_prompt(PROMPT)
    else:
        ids = [(7919 * i + 1) % vocab_size for i in range(_PROMPT_TOKENS)]
    return ids[: max(1, capacity // 2)]


def open_same_model(decoder: Decoder, path: Path, step: int | None) -> Checkpoint:
    """The checkpoint, if it is of the bundle's architecture; else ParityError with the fields that differ."""
    from lrt_deploy.checkpoint import open_checkpoint
    from lrt_deploy.errors import ParityError

    opened = open_checkpoint(path, step)
    if opened.chosen:
        output.say(f"{path}: {opened.chosen}")
    theirs, ours = opened.config.to_dict(), decoder.config.to_dict()
    if differing := [name for name in ours if ours[name] != theirs[name]]:
        found = ", ".join(f"{name} is {theirs[name]!r} and not {ours[name]!r}" for name in differing)
        raise ParityError(f"{path} is not the model of this bundle: in the checkpoint {found}; nothing was compared")
    return opened


def open_reference(decoder: Decoder, opened: Checkpoint, float64: bool) -> ReferenceDecoder:
    """The checkpoint's model in PyTorch, with the decoder's capacity."""
    from lrt_deploy.reference import ReferenceDecoder

    make = ReferenceDecoder.in_float64 if float64 else ReferenceDecoder
    return make(opened.model(decoder.max_seq_len), decoder.max_seq_len)


def compare(
    reference: ReferenceDecoder,
    decoder: Decoder,
    opened: Checkpoint,
    rollout: tuple[list[int], int, dict[str, Any]],
    progress: output.Progress,
) -> ParityReport:
    """The comparison itself: prompt, steps, and how prefill is checked."""
    from lrt_deploy import comparison as library

    prompt, steps, reading = rollout
    origin: dict[str, Any] = decoder.manifest.provenance.get("checkpoint") or {}
    return library.compare(
        reference,
        decoder,
        prompt,
        steps,
        precision=decoder.precision,
        checkpoint_matches=opened.sha256 == origin.get("sha256"),
        backend=decoder.backend,
        progress=progress,
        **reading,
    )


def bisected(bundle: Path, reference: ReferenceDecoder, decoder: Decoder, report: ParityReport) -> Bisection:
    """Where a difference begins, seen in the graph that the backend runs: on a CPU the windowed one."""
    from lrt_deploy import stages
    from lrt_deploy.bisect import bisect
    from lrt_deploy.exporters.probe import probed
    from lrt_deploy.manifest import graph_path
    from lrt_deploy.runtime.host_tables import HostTables
    from lrt_deploy.runtime.ort_probe import OrtProbe

    flavour: Flavour = "windowed" if decoder.backend == "ort-cpu" else "full"
    graph = probed(bundle / graph_path(decoder.precision, "prefill", flavour), stages.in_order(decoder.config))
    tables = HostTables.open(bundle, decoder.manifest, decoder.precision)
    probe = OrtProbe(graph.model, graph.folder, decoder.config, tables)
    return bisect(reference, decoder, probe, report, graph.origins)


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
    return {name.replace("_", " "): cell(value) for name, value in shown.items() if name not in ("passed", "verdict")}


def cell(value: object) -> str:
    """A number in few digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)
