"""Parity as one function: is a bundle the model of a checkpoint? Opens both and judges all parts.

    weights      every stored matrix and table against the checkpoint's (`parity_weights`), before anything runs
    rollout      reference and decoder side by side (`comparison`); in float32 this is the verdict
    arithmetic   with fewer bits: the graph and the decoder against PyTorch on the stored weights (`parity_arithmetic`)
    quality      with fewer bits: how good a model it is, against the original in float32 (`verdict`)

It is the one place besides the command line that brings the reference and a runtime's decoder together, and so imports
exporters and runtime, inside functions. What is measured and tolerated is said elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrt_deploy import activations
from lrt_deploy.arguments import check_path
from lrt_deploy.bundle import manifest
from lrt_deploy.bundle.precisions import PRECISIONS, base_dtype
from lrt_deploy.errors import InputError, ParityError
from lrt_deploy.machine import cpu_model
from lrt_deploy.tolerances import ParityLimits, kernel_limits, limits
from lrt_deploy.types import FloatArray, PrefillPolicy

from . import verdict
from .arithmetic import ArithmeticPart, Computed, activation_scale_fault, judge_arithmetic
from .report import ParityReport, Rollout
from .rollout import Reading
from .stored_weights import WeightsPart, check_weights
from .verdict import About, Parts, Progress

if TYPE_CHECKING:
    from lrt_deploy.bundle.contract import Flavour
    from lrt_deploy.bundle.manifest import Manifest
    from lrt_deploy.model.checkpoint import Checkpoint
    from lrt_deploy.model.model import LRT
    from lrt_deploy.runtime.decoder import Decoder

    from .bisect import Bisection

STEPS = 128
# Long enough that iterating it says something.
PROMPT = (
    "The river rose in the night, and by morning the lower meadows were under water. Two men in a boat went from house "
    "to house and called up at the windows, and whoever answered was given bread, candles and the news that the bridge "
    "was gone. Nobody had slept. In the school on the hill the tables were pushed together, and the children were told "
    "that today they would write down what they had seen: how high the water stood, what it carried, and who was there."
)
_PROMPT_TOKENS = 96  # of the prompt made up for a bundle without tokenizer
# What computes, by the name under which it is reported, and the packages that it may come in.
_PACKAGES: dict[str, tuple[str, ...]] = {
    name: (name,) for name in ("lrt-deploy", "torch", "numpy", "onnx", "onnx-ir", "tensorrt", "tensorrt-rtx")
}
_PACKAGES["onnxruntime"] = ("onnxruntime", "onnxruntime-gpu")


def _silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class ParityOptions:
    """What is compared over, and how it is judged; None stands for the default.

    `prompt` is text or token ids; `steps` decode steps follow it (default: 128, or what the capacity leaves);
    `step` is which saved step of the checkpoint to read. `prefill` and `tolerance` say how the decoder reads the prompt
    where that is checked. `float64` runs the reference in float64. `bisect` looks for the place of a fault. `max_kl`
    and `min_agreement` take the place of the limits of quality, in precisions that are judged by it.
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
        """The limits of a precision with these put in; InputError for one that is not judged by quality."""
        bounds = limits(precision)
        for name, value, largest in (("max_kl", self.max_kl, math.inf), ("min_agreement", self.min_agreement, 1.0)):
            if value is None:
                continue
            if bounds.top1_agreement is None:
                raise InputError(
                    f"{name} is {value}, and {precision} is not judged by quality: it must compute the same function; "
                    f"leave {name} out"
                )
            if not 0 <= value <= largest or math.isinf(value):
                raise InputError(f"{name} is {value}, expected a number from 0" + (" to 1" if largest == 1 else " on"))
        return dataclasses.replace(
            bounds,
            mean_kl=bounds.mean_kl if self.max_kl is None else self.max_kl,
            top1_agreement=bounds.top1_agreement if self.min_agreement is None else self.min_agreement,
        )


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
    progress: Progress = _silent,
) -> ParityReport:
    """Compare a bundle with the checkpoint that it should be, as the verb `parity` does; for tests of your own.

    `report.passed` is the answer and `report.verdict` says why in a line; `report.weights`, `.arithmetic` and
    `.quality` are its parts, and `report.to_dict()` has the fields of the JSON document. A difference is a result:
    nothing is raised for it. The options are those of `ParityOptions`; the rest is as in `open_decoder`.

    Raises CheckpointError, BundleError and BackendError for what cannot be opened, ParityError for models that cannot
    be compared, InputError for a prompt or limit that cannot be used.
    """
    from lrt_deploy.runtime.decoder import open_decoder

    folder, source = check_path(bundle, "bundle"), check_path(checkpoint, "checkpoint")
    options = ParityOptions(prompt, steps, step, prefill, tolerance, float64, bisect, max_kl, min_agreement)
    stored_only = stored_only_precision(folder, backend, precision)
    if stored_only is not None:
        return parity_of_stored(folder, source, stored_only, options, verify, progress)
    with open_decoder(folder, backend, precision, threads=threads, max_seq_len=max_seq_len, verify=verify) as decoder:
        return parity_of(folder, decoder, source, options, progress)


def stored_only_precision(folder: Path, backend: str, precision: str | None) -> str | None:
    """The precision that would be taken, if the backend cannot run it and only its stored weights can be judged."""
    held = manifest.read_manifest(folder).precisions
    chosen = precision or next(name for name in PRECISIONS if name in held)
    runs_nowhere = backend == "ort-cpu" and base_dtype(chosen, "windowed") == "bfloat16"
    return chosen if runs_nowhere and chosen in held else None


def parity_of_stored(
    bundle: Path,
    checkpoint: Path,
    precision: str,
    options: ParityOptions,
    verify: bool = False,
    progress: Progress = _silent,
) -> ParityReport:
    """The part `weights` alone, of a precision that runs nowhere here; the verdict says that nothing was run."""
    held = manifest.read_manifest(bundle)
    manifest.verify_files(bundle, held, verify)
    opened = open_same_model(held, checkpoint, options.step, progress)
    weights = _weights(bundle, held, precision, opened, progress)
    report = _report(Rollout(0, 0), Subject(bundle, held, precision, "none"), opened, options, Parts(weights))
    if not weights.passed:
        return report
    verdict = (
        f"PASS: {weights.line}; nothing was run, because {precision} runs on GPUs only: arithmetic and quality are not "
        "judged"
    )
    return dataclasses.replace(report, passed=True, verdict=verdict, quality=None)


def parity_of(
    bundle: Path, decoder: Decoder, checkpoint: Path, options: ParityOptions, progress: Progress = _silent
) -> ParityReport:
    """Compare an opened decoder of `bundle` with a checkpoint, in all parts.

    Stored weights that are not the checkpoint's end it before any rollout. Raises ParityError for models of another
    architecture, CheckpointError and InputError.
    """
    subject = Subject(bundle, decoder.manifest, decoder.precision, decoder.backend)
    bounds = options.limits(decoder.precision)
    prompt, steps = _tokens(decoder, options)
    opened = open_same_model(decoder.manifest, checkpoint, options.step, progress)
    weights = _weights(bundle, decoder.manifest, decoder.precision, opened, progress)
    if not weights.passed:
        report = _report(Rollout(len(prompt), steps, tokens=prompt), subject, opened, options, Parts(weights))
        return dataclasses.replace(report, bisect=_bisect_weights(weights)) if options.bisect else report
    return _run(subject, decoder, opened, (prompt, steps, bounds, weights), options, progress)


@dataclass(frozen=True)
class Subject:
    """What is compared: one precision of a bundle on a backend."""

    bundle: Path
    manifest: Manifest
    precision: str
    backend: str

    @property
    def flavour(self) -> Flavour:
        """The graphs that the backend runs."""
        return "windowed" if self.backend == "ort-cpu" else "full"

    @property
    def graph(self) -> Path:
        """The graph that prefill and decoding run."""
        return self.bundle / manifest.graph_path(self.precision, "prefill", self.flavour)


def _run(
    subject: Subject,
    decoder: Decoder,
    opened: Checkpoint,
    work: tuple[list[int], int, ParityLimits, WeightsPart],
    options: ParityOptions,
    progress: Progress,
) -> ParityReport:
    """The rollout, then what it leaves to be judged."""
    from lrt_deploy.model.reference import ReferenceDecoder

    prompt, steps, bounds, weights = work
    progress("loading the checkpoint", 0, 0)
    model = opened.model(decoder.max_seq_len)
    make = ReferenceDecoder.in_float64 if options.float64 else ReferenceDecoder
    reference = make(model, decoder.max_seq_len)
    rollout = verdict.follow(reference, decoder, prompt, steps, Reading(options.prefill, options.tolerance), progress)
    arithmetic = None
    if bounds.top1_agreement is not None and rollout.points:
        progress("comparing with PyTorch on the stored weights", 0, 0)
        arithmetic = _arithmetic(subject, model, rollout)  # from here on the model has the stored weights
    report = _report(rollout, subject, opened, options, Parts(weights, arithmetic, _bits_per_byte(decoder, rollout)))
    if not options.bisect:
        return report
    if arithmetic is None:
        found = _bisect_rollout(subject, reference, decoder, report)
    else:
        found = _bisect_parts(subject, model, decoder.max_seq_len, report)
    return dataclasses.replace(report, bisect=found)


def open_same_model(held: Manifest, path: Path, step: int | None, progress: Progress = _silent) -> Checkpoint:
    """The checkpoint, if it is of the bundle's architecture; else ParityError with the fields that differ."""
    from lrt_deploy.model.checkpoint import open_checkpoint

    opened = open_checkpoint(path, step)
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
    """The prompt's token ids, and how many steps follow."""
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


def _weights(bundle: Path, held: Manifest, precision: str, opened: Checkpoint, progress: Progress) -> WeightsPart:
    """The part `weights`; graphs that disagree among themselves fail it too."""
    from lrt_deploy.exporters.quantize.stored import StoredWeights

    opened.check_tensors()
    compensated = bool(held.precision_details.get(precision, {}).get("compensated"))
    try:
        stored = StoredWeights(bundle, held, precision)
        return check_weights(stored, opened.tensors, held.model, precision, compensated, progress)
    except ParityError as error:
        return WeightsPart(passed=False, worst=None, checked=0, disagreement=str(error))


def _arithmetic(subject: Subject, model: LRT, rollout: Rollout) -> ArithmeticPart:
    """The part `arithmetic`; leaves the stored weights in `model`."""
    from lrt_deploy.exporters.graph.exact_graph import exact_graph
    from lrt_deploy.exporters.quantize.stored import StoredWeights
    from lrt_deploy.model.dequantized import run_forced, take_stored_weights
    from lrt_deploy.runtime.backends.host_tables import HostTables
    from lrt_deploy.runtime.backends.ort_debug import OrtExact

    held, precision = subject.manifest, subject.precision
    take_stored_weights(model, StoredWeights(subject.bundle, held, precision))
    count = sum(point.finite for point in rollout.points)
    tokens, given = rollout.tokens[:count], _latents_before(rollout.reference.latents[:count], held.model.n_embd)
    exact = exact_graph(subject.graph, held.model)
    runner = OrtExact(exact.model, exact.folder, held.model, HostTables.open(subject.bundle, held, precision))
    stated = held.precision_details.get(precision, {}).get("activation_scales") or {}
    graph = runner.run(tokens, given), run_forced(model, tokens, given)
    own = _latents_before(rollout.decoder.latents[:count], held.model.n_embd)
    found = _computed(rollout.decoder.logits[:count], rollout.decoder.latents[:count])
    kernels = found, run_forced(model, tokens, own, exact.activation_scales)
    fault = activation_scale_fault(exact.activation_scales, stated)
    return judge_arithmetic(graph, kernels, kernel_limits(precision, subject.flavour), fault)


def _latents_before(latents: Sequence[FloatArray | None], width: int) -> FloatArray:
    """(T, C) what each token is read with: zeros, then the latent after the token before it."""
    before = np.zeros((len(latents), width), np.float32)
    for t, latent in enumerate(latents[:-1]):
        if latent is not None:
            before[t + 1] = latent
    return before


def _computed(logits: Sequence[FloatArray], latents: Sequence[FloatArray | None]) -> Computed:
    known = [latent for latent in latents if latent is not None]
    return np.stack(logits), np.stack(known) if known else np.zeros((len(logits), 0), np.float32)


def _bits_per_byte(decoder: Decoder, rollout: Rollout) -> tuple[float, float] | None:
    """The reference's and the decoder's over the prompt's own tokens; None without a tokenizer or a byte to count."""
    if decoder.tokenizer is None:
        return None
    tokens = rollout.tokens[: min(rollout.prompt_tokens, len(rollout.points))]
    known = decoder.tokenizer.byte_lengths
    sizes = [known[token] if token < len(known) else 0 for token in tokens[1:]]
    positions, size = [t for t, count in enumerate(sizes) if count > 0], sum(sizes)
    if size == 0:
        return None
    nats = [
        sum(_nats(side.logits[t], tokens[t + 1]) for t in positions) for side in (rollout.reference, rollout.decoder)
    ]
    return nats[0] / (math.log(2) * size), nats[1] / (math.log(2) * size)


def _nats(logits: FloatArray, token: int) -> float:
    z = logits.astype(np.float64)
    z -= z.max()
    return float(np.log(np.exp(z).sum()) - z[token])


def _report(
    rollout: Rollout, subject: Subject, opened: Checkpoint, options: ParityOptions, parts: Parts
) -> ParityReport:
    origin: Mapping[str, Any] = subject.manifest.provenance.get("checkpoint") or {}
    matches = opened.sha256 == origin.get("sha256")
    about = About(subject.precision, subject.backend, matches, options.limits(subject.precision))
    report = verdict.report_of(rollout, about, parts)
    return dataclasses.replace(report, provenance=_provenance(subject, opened, options, rollout.tokens))


def _provenance(subject: Subject, opened: Checkpoint, options: ParityOptions, tokens: Sequence[int]) -> dict[str, Any]:
    """What a report needs to be made again: both sides by hash, versions, date, machine, prompt and options."""
    files, precision = subject.manifest.files, subject.precision
    chosen = {name: value for name, value in dataclasses.asdict(options).items() if name != "prompt"}
    prompt = options.prompt if isinstance(options.prompt, str) else None
    return {
        "bundle": {
            "manifest_sha256": manifest.hash_file(subject.bundle / manifest.MANIFEST),
            "weights_sha256": files[manifest.weights_path(precision)].sha256,
            "checkpoint_sha256": (subject.manifest.provenance.get("checkpoint") or {}).get("sha256"),
        },
        "checkpoint": {"file": opened.model_file.name, "sha256": opened.sha256, "step": opened.step},
        "versions": _versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"processor": cpu_model(), "cores": os.cpu_count(), "system": platform.platform()},
        "prompt": {"text": PROMPT if options.prompt is None else prompt, "tokens": list(tokens)},
        "options": chosen | {"backend": subject.backend, "precision": precision},
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name, packages in _PACKAGES.items():
        for package in packages:
            with contextlib.suppress(PackageNotFoundError):
                found[name] = version(package)
    return found


def _bisect_weights(weights: WeightsPart) -> Bisection:
    from .bisect import Bisection

    name = None if weights.worst is None else weights.worst.matrix
    layer = None if name is None else activations.layer_of(name)
    return Bisection("weights", f"{weights.line}; nothing was run", None, layer, name)


def _bisect_rollout(subject: Subject, reference: Any, decoder: Decoder, report: ParityReport) -> Bisection:  # noqa: ANN401
    """Where a difference begins, seen in the graph that the backend runs."""
    from lrt_deploy.exporters.graph.debug_outputs import probed
    from lrt_deploy.runtime.backends.host_tables import HostTables
    from lrt_deploy.runtime.backends.ort_debug import OrtProbe

    from .bisect import bisect

    held = subject.manifest
    graph = probed(subject.graph, activations.in_order(held.model))
    tables = HostTables.open(subject.bundle, held, subject.precision)
    probe = OrtProbe(graph.model, graph.folder, held.model, tables)
    return bisect(reference, decoder, probe, report, graph.origins)


def _bisect_parts(subject: Subject, model: LRT, capacity: int, report: ParityReport) -> Bisection:
    """The part that fails and its place; `model` has the stored weights, and the graph is seen in float32."""
    from lrt_deploy.exporters.graph.exact_graph import exact_graph
    from lrt_deploy.model.reference import ReferenceDecoder
    from lrt_deploy.runtime.backends.host_tables import HostTables
    from lrt_deploy.runtime.backends.ort_debug import OrtProbe

    from .bisect import bisect_parts

    held = subject.manifest
    graph = exact_graph(subject.graph, held.model, activations.in_order(held.model))
    tables = HostTables.open(subject.bundle, held, subject.precision)
    probe = OrtProbe(graph.model, graph.folder, held.model, tables, fused=False)
    return bisect_parts(ReferenceDecoder(model, capacity), probe, report, graph.origins)
