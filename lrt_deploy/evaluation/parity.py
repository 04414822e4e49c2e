"""Parity as one function: whether a bundle is the model of a checkpoint. Opens both and judges the three parts.

weights      every stored matrix and table against the checkpoint's (`stored_weights`), before anything runs
rollout      reference and decoder side by side (`rollout`); in float32 this is the verdict
arithmetic   with fewer bits: the graph and the decoder against PyTorch on the stored weights (`arithmetic`)
quality      with fewer bits: the decoder as a model, against the original in float32 (`verdict`)
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrt_deploy import activations
from lrt_deploy.bundle import manifest
from lrt_deploy.bundle.precisions import BACKENDS, PRECISIONS, base_dtype
from lrt_deploy.errors import InputError, ParityError
from lrt_deploy.fields import check_path
from lrt_deploy.machine import cpu_model, versions
from lrt_deploy.tolerances import ParityLimits, kernel_limits, limits
from lrt_deploy.types import FloatArray, PrefillPolicy

from .bisect import Bisection, bisect, bisect_parts
from .rollout import Comparison, Progress, compare_rollouts, nats, silent
from .stored_weights import WeightsPart, check_weights
from .verdict import (
    ArithmeticPart,
    Computed,
    Evidence,
    ParityReport,
    activation_scale_fault,
    judge_arithmetic,
    report_of,
)

if TYPE_CHECKING:
    from lrt_deploy.bundle.manifest import Manifest
    from lrt_deploy.model.checkpoint import Checkpoint
    from lrt_deploy.model.model import LRT
    from lrt_deploy.runtime.decoder import Decoder

STEPS = 128
# Long enough that prefill by iteration takes several passes.
PROMPT = (
    "The river rose in the night, and by morning the lower meadows were under water. Two men in a boat went from house "
    "to house and called up at the windows, and whoever answered was given bread, candles and the news that the bridge "
    "was gone. Nobody had slept. In the school on the hill the tables were pushed together, and the children were told "
    "that today they would write down what they had seen: how high the water stood, what it carried, and who was there."
)
_PROMPT_TOKENS = 96  # of the prompt made up for a bundle without tokenizer


@dataclass(frozen=True)
class ParityOptions:
    """The rollout of a parity run and how it is judged; None stands for the default.

    `prompt` is text or token ids; `steps` decode steps follow it (default: 128, or what the capacity leaves);
    `step` selects a saved step of the checkpoint. `prefill` and `tolerance` say how the decoder reads the prompt where
    its prefill is checked. `float64` runs the reference in float64. `bisect` looks for the place of a fault. `max_kl`
    and `min_agreement` replace the limits of precisions that are judged by quality.
    """

    prompt: str | Sequence[int] | None = None
    steps: int | None = None
    step: int | None = None
    prefill: PrefillPolicy = "fixed-point"
    tolerance: float | None = None
    float64: bool = False
    bisect: bool = False
    max_kl: float | None = None
    min_agreement: float | None = None

    def limits(self, precision: str) -> ParityLimits:
        """The limits of a precision with these options applied; InputError where it is not judged by quality."""
        bounds = limits(precision)
        for name, limit, largest in (("max_kl", "mean_kl", math.inf), ("min_agreement", "top1_agreement", 1.0)):
            value = getattr(self, name)
            if value is None:
                continue
            if bounds.top1_agreement is None:
                raise InputError(
                    f"{name} is {value}, and {precision} is not judged by quality: it must compute the same function; "
                    f"leave {name} out"
                )
            if not 0 <= value <= largest or math.isinf(value):
                raise InputError(f"{name} is {value}, expected a number from 0" + (" to 1" if largest == 1 else " on"))
            bounds = dataclasses.replace(bounds, **{limit: value})
        return bounds


def parity(
    bundle: str | Path,
    checkpoint: str | Path,
    *,
    backend: str = "ort-cpu",
    precision: str | None = None,
    prompt: str | Sequence[int] | None = None,
    steps: int | None = None,
    step: int | None = None,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    prefill: PrefillPolicy = "fixed-point",
    tolerance: float | None = None,
    float64: bool = False,
    bisect: bool = False,
    threads: int | None = None,
    max_seq_len: int | None = None,
    verify: bool = False,
    progress: Progress = silent,
) -> ParityReport:
    """Compare a bundle with its checkpoint, as the command `parity` does; for users' own tests.

    `report.passed` is the answer, `report.verdict` says why in a line, `report.to_dict()` has the fields of the JSON
    document. A difference is a result: nothing is raised for it. The options are those of `ParityOptions`; the rest is
    as in `open_decoder`.

    `checkpoint` may be `hf://owner/name[@revision]`, as in `export_bundle`.

    Raises CheckpointError, BundleError and BackendError for what cannot be opened, ParityError for models that cannot
    be compared, InputError for a prompt or limit that cannot be used.
    """
    from lrt_deploy.model.hub import check_source
    from lrt_deploy.runtime.decoder import open_decoder

    folder, source = check_path(bundle, "bundle"), check_source(checkpoint, "checkpoint")
    options = ParityOptions(prompt, steps, step, prefill, tolerance, float64, bisect, max_kl, min_agreement)
    stored_only = stored_only_precision(folder, backend, precision)
    if stored_only is not None:
        return parity_of_stored(folder, source, stored_only, options, verify, progress)
    with open_decoder(folder, backend, precision, threads=threads, max_seq_len=max_seq_len, verify=verify) as decoder:
        return parity_of(folder, decoder, source, options, progress)


@dataclass(frozen=True)
class Subject:
    """One precision of a bundle on a backend."""

    bundle: Path
    manifest: Manifest
    precision: str
    backend: str

    @property
    def graph(self) -> Path:
        """The graph that prefill and decoding run."""
        return self.bundle / manifest.graph_path(self.precision, "prefill", BACKENDS[self.backend].flavour)


def stored_only_precision(folder: Path, backend: str, precision: str | None) -> str | None:
    """The precision to be compared, if the backend cannot run it, so that only its stored weights can be judged."""
    held = manifest.read_manifest(folder).precisions
    selected = precision or next(name for name in PRECISIONS if name in held)
    runs_nowhere = backend == "ort-cpu" and base_dtype(selected, "windowed") == "bfloat16"
    return selected if runs_nowhere and selected in held else None


def parity_of_stored(
    bundle: Path,
    checkpoint: str | Path,
    precision: str,
    options: ParityOptions,
    verify: bool = False,
    progress: Progress = silent,
) -> ParityReport:
    """Judge the part `weights` alone, of a precision that runs on no backend here; the verdict says so."""
    subject = Subject(bundle, manifest.read_manifest(bundle), precision, "none")
    manifest.verify_files(bundle, subject.manifest, verify)
    opened, weights, evidence = _open(subject, checkpoint, options, progress)
    report = _report(Comparison(0, 0), evidence, subject, opened, options)
    if not weights.passed:
        return report
    verdict = (
        f"PASS: {weights.line}; nothing was run, because {precision} runs on GPUs only: arithmetic and quality are not "
        "judged"
    )
    return dataclasses.replace(report, passed=True, verdict=verdict, quality=None)


def parity_of(
    bundle: Path, decoder: Decoder, checkpoint: str | Path, options: ParityOptions, progress: Progress = silent
) -> ParityReport:
    """Compare an open decoder of `bundle` with a checkpoint, in all parts.

    Stored weights that differ from the checkpoint's end the comparison before any rollout. Raises ParityError for
    models of another architecture, CheckpointError and InputError.
    """
    from lrt_deploy.model.reference import ReferenceDecoder

    subject = Subject(bundle, decoder.manifest, decoder.precision, decoder.backend)
    prompt, steps = _tokens(decoder, options)
    opened, weights, evidence = _open(subject, checkpoint, options, progress)
    if not weights.passed:
        report = _report(Comparison(len(prompt), steps, tokens=prompt), evidence, subject, opened, options)
        name = None if weights.worst is None else weights.worst.matrix
        layer = None if name is None else activations.layer_of(name)
        found = Bisection("weights", f"{weights.line}; nothing was run", None, layer, name)
        return dataclasses.replace(report, bisect=found) if options.bisect else report
    progress("loading the checkpoint", 0, 0)
    model = opened.model(decoder.max_seq_len)
    reference = ReferenceDecoder(model, decoder.max_seq_len, options.float64)
    run = compare_rollouts(reference, decoder, prompt, steps, (options.prefill, options.tolerance), progress)
    quantized = evidence.limits.top1_agreement is not None and any(point.finite for point in run.points)
    if quantized:
        progress("comparing with PyTorch on the stored weights", 0, 0)
        arithmetic = _arithmetic(subject, model, run)  # from here on the model has the stored weights
        evidence = dataclasses.replace(evidence, arithmetic=arithmetic, bits_per_byte=_bits_per_byte(decoder, run))
    report = _report(run, evidence, subject, opened, options)
    if not options.bisect:
        return report
    if quantized:
        found = _bisect(subject, report, ReferenceDecoder(model, decoder.max_seq_len), None)
    else:
        found = _bisect(subject, report, reference, decoder)
    return dataclasses.replace(report, bisect=found)


def _open(
    subject: Subject, checkpoint: str | Path, options: ParityOptions, progress: Progress
) -> tuple[Checkpoint, WeightsPart, Evidence]:
    bounds = options.limits(subject.precision)
    opened = open_same_model(subject.manifest, checkpoint, options.step, progress)
    matches = opened.sha256 == (subject.manifest.provenance.get("checkpoint") or {}).get("sha256")
    weights = _weights(subject, opened, progress)
    return opened, weights, Evidence(subject.precision, subject.backend, matches, bounds, weights)


def open_same_model(held: Manifest, path: str | Path, step: int | None, progress: Progress = silent) -> Checkpoint:
    """Open a checkpoint of the bundle's architecture; ParityError names the fields in which another one differs."""
    from lrt_deploy.model.checkpoint import open_checkpoint

    opened = open_checkpoint(path, step, progress)
    if opened.chosen:
        progress(f"{path}: {opened.chosen}", 0, 0)
    theirs, ours = opened.config.to_dict(), held.model.to_dict()
    if differing := [name for name in ours if ours[name] != theirs[name]]:
        found = ", ".join(f"{name} is {theirs[name]!r} and not {ours[name]!r}" for name in differing)
        raise ParityError(f"{path} is not the model of this bundle: in the checkpoint {found}; nothing was compared")
    return opened


def default_prompt(decoder: Decoder) -> list[int]:
    """A short fixed text, or, without a tokenizer for it, token ids spread over the vocabulary."""
    from lrt_deploy.text.chat import BOS

    capacity, vocab_size = decoder.max_seq_len, decoder.config.vocab_size
    if decoder.tokenizer is not None and BOS in decoder.tokenizer.special_tokens:
        ids = decoder.tokenizer.encode_prompt(PROMPT)
    else:
        ids = [(7919 * i + 1) % vocab_size for i in range(_PROMPT_TOKENS)]
    return ids[: max(1, capacity // 2)]


def _tokens(decoder: Decoder, options: ParityOptions) -> tuple[list[int], int]:
    if options.prompt is None:
        prompt = default_prompt(decoder)
    elif not isinstance(options.prompt, str):
        prompt = list(options.prompt)
    elif decoder.tokenizer is None:
        raise InputError("this bundle has no tokenizer, so give the prompt as token ids")
    else:
        prompt = decoder.tokenizer.encode_prompt(options.prompt)
    left = max(1, decoder.max_seq_len - len(prompt))
    return prompt, min(STEPS, left) if options.steps is None else options.steps


def _weights(subject: Subject, opened: Checkpoint, progress: Progress) -> WeightsPart:
    """Judge the part `weights`; graphs that disagree among themselves fail it too."""
    from lrt_deploy.exporters.quantize.stored import StoredWeights

    opened.check_tensors()
    held, precision = subject.manifest, subject.precision
    compensated = bool(held.precision_details.get(precision, {}).get("compensated"))
    try:
        stored = StoredWeights(subject.bundle, held, precision)
        return check_weights(stored, opened.tensors, held.model, precision, compensated, progress)
    except ParityError as error:
        return WeightsPart(False, f"weights: {error}")


def _arithmetic(subject: Subject, model: LRT, run: Comparison) -> ArithmeticPart:
    """Judge the part `arithmetic`; leaves the stored weights in `model`."""
    from lrt_deploy.exporters.graph.debug_outputs import exact_graph
    from lrt_deploy.exporters.quantize.stored import StoredWeights
    from lrt_deploy.model.reference import run_forced, take_stored_weights
    from lrt_deploy.runtime.backends.host_tables import HostTables
    from lrt_deploy.runtime.backends.ort_session import OrtDebugger

    held, precision = subject.manifest, subject.precision
    take_stored_weights(model, StoredWeights(subject.bundle, held, precision))
    count = sum(point.finite for point in run.points)
    tokens, given = run.tokens[:count], _latents_before(run.reference.latents[:count], held.model.n_embd)
    exact = exact_graph(subject.graph, held.model)
    tables = HostTables.open(subject.bundle, held, precision)
    runner = OrtDebugger(exact.model, exact.folder, held.model, tables, fused=False)
    stated = held.precision_details.get(precision, {}).get("activation_scales") or {}
    graph = runner.run(tokens, given), run_forced(model, tokens, given)
    own = _latents_before(run.decoder.latents[:count], held.model.n_embd)
    found = _computed(run.decoder.logits[:count], run.decoder.latents[:count])
    kernels = found, run_forced(model, tokens, own, exact.activation_scales)
    fault = activation_scale_fault(exact.activation_scales, stated)
    return judge_arithmetic(graph, kernels, kernel_limits(precision), fault)


def _latents_before(latents: Sequence[FloatArray | None], width: int) -> FloatArray:
    """(T, C) the latent that each token is read with: zeros, then the latent after the token before it."""
    zeros = np.zeros(width, np.float32)
    return np.stack([zeros, *(zeros if latent is None else latent for latent in latents[:-1])])


def _computed(logits: Sequence[FloatArray], latents: Sequence[FloatArray | None]) -> Computed:
    known = [latent for latent in latents if latent is not None]
    return np.stack(logits), np.stack(known) if known else np.zeros((len(logits), 0), np.float32)


def _bits_per_byte(decoder: Decoder, run: Comparison) -> tuple[float, float] | None:
    """The reference's and the decoder's, of the prompt's tokens; None without a tokenizer or a byte to count."""
    if decoder.tokenizer is None:
        return None
    tokens = run.tokens[: min(run.prompt_tokens, len(run.points))]
    known = decoder.tokenizer.byte_lengths
    sizes = [known[token] if token < len(known) else 0 for token in tokens[1:]]
    positions, size = [t for t, count in enumerate(sizes) if count > 0], sum(sizes)
    if size == 0:
        return None
    targets = [tokens[t + 1] for t in positions]
    one, other = (
        float(nats(np.stack([side.logits[t] for t in positions]), targets).sum()) / (math.log(2) * size)
        for side in (run.reference, run.decoder)
    )
    return one, other


def _report(
    run: Comparison, evidence: Evidence, subject: Subject, opened: Checkpoint, options: ParityOptions
) -> ParityReport:
    """Judge, and add what reproducing the report takes: hashes of both sides, versions, machine, prompt and options."""
    files, precision = subject.manifest.files, subject.precision
    selected = {name: value for name, value in dataclasses.asdict(options).items() if name != "prompt"}
    prompt = options.prompt if isinstance(options.prompt, str) else None
    provenance = {
        "bundle": {
            "manifest_sha256": manifest.hash_file(subject.bundle / manifest.MANIFEST),
            "weights_sha256": files[manifest.weights_path(precision)].sha256,
            "checkpoint_sha256": (subject.manifest.provenance.get("checkpoint") or {}).get("sha256"),
        },
        "checkpoint": {
            "file": opened.model_file.name,
            "sha256": opened.sha256,
            "step": opened.step,
            "hub": None if opened.origin is None else opened.origin.to_dict(),
        },
        "versions": {"python": platform.python_version()} | {name: v for name, v in versions().items() if v},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"processor": cpu_model(), "cores": os.cpu_count(), "system": platform.platform()},
        "prompt": {"text": PROMPT if options.prompt is None else prompt, "tokens": run.tokens},
        "options": selected | {"backend": subject.backend, "precision": precision},
    }
    return dataclasses.replace(report_of(run, evidence), provenance=provenance)


def _bisect(subject: Subject, report: ParityReport, reference: Any, decoder: Decoder | None) -> Bisection:  # noqa: ANN401
    """Find where a difference begins, in the graph that the backend runs.

    Without `decoder` the bundle is quantized: `reference` has its stored weights, and the graph is run in float32.
    """
    from lrt_deploy.exporters.graph.debug_outputs import exact_graph, with_debug_outputs
    from lrt_deploy.runtime.backends.host_tables import HostTables
    from lrt_deploy.runtime.backends.ort_session import OrtDebugger

    held = subject.manifest
    names = activations.in_order(held.model)
    tables = HostTables.open(subject.bundle, held, subject.precision)
    if decoder is None:
        exact = exact_graph(subject.graph, held.model, names)
        observer = OrtDebugger(exact.model, exact.folder, held.model, tables, fused=False)
        return bisect_parts(reference, observer, report, exact.derivations)
    graph = with_debug_outputs(subject.graph, names)
    observer = OrtDebugger(graph.model, graph.folder, held.model, tables)
    return bisect(reference, decoder, observer, report, graph.derivations)
