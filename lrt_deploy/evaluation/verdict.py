"""Judge a comparison of a decoder with the reference, in one line in terms of weights, tokens, and KL.

A precision whose errors are bounded (fp32) is judged as the same function, any other by three parts: `weights` (see
`stored_weights`), `quality` (the decoder as a model), and `arithmetic`: whether the bundle computes right with the
weights that it stores. That compares with PyTorch on the dequantized weights, both sides from the same latent at every
position, so that no error accumulates:

- the graph in float32, without activations rounded to int8, from the reference's latents: within float32's noise;
- the decoder that ran, from its own latents: within the measured limits of its kernels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import msgspec
import numpy as np

from lrt_deploy.tolerances import FP32, LEVEL_MARGIN, KernelLimits, ParityLimits, limits
from lrt_deploy.types import FloatArray, PrefillPolicy, StatefulDecoder

from .rollout import Comparison, Divergence, Point, PrefillCheck, Progress, compare_rollouts, silent
from .stored_weights import WeightsPart


@dataclass(frozen=True)
class ForcedErrors:
    """Errors of one comparison, maxima of absolute differences; the typical one is the median over positions.

    `first_exceeded` is the first position beyond a limit.
    """

    max_abs_logit_error: float
    max_abs_latent_error: float
    typical_logit_error: float
    worst_position: int
    first_exceeded: int | None
    limit_logit: float
    limit_latent: float
    limit_typical: float

    @property
    def passed(self) -> bool:
        """Whether all three errors lie within their limits."""
        return (
            self.max_abs_logit_error <= self.limit_logit
            and self.max_abs_latent_error <= self.limit_latent
            and self.typical_logit_error <= self.limit_typical
        )

    def fault(self, side: str) -> str | None:
        """A clause that says what is beyond a limit; None if nothing is."""
        if self.passed:
            return None
        where = f"at position {self.worst_position}"
        if self.first_exceeded is not None and self.first_exceeded != self.worst_position:
            where += f", first exceeded at position {self.first_exceeded}"
        return (
            f"{side} is off from PyTorch on the stored weights: logits by {self.max_abs_logit_error:.1e} (limit "
            f"{self.limit_logit:.1e}), typically {self.typical_logit_error:.1e} (limit {self.limit_typical:.1e}), "
            f"latent by {self.max_abs_latent_error:.1e} (limit {self.limit_latent:.1e}), {where}"
        )


@dataclass(frozen=True)
class ArithmeticPart:
    """The part `arithmetic` of a verdict. `max_abs_logit_error` is the graph's; `kernels` are the decoder's errors.

    `fault` says what is wrong; None where nothing is.
    """

    passed: bool
    line: str
    max_abs_logit_error: float
    graph: ForcedErrors
    kernels: ForcedErrors
    fault: str | None = None


Computed = tuple[FloatArray, FloatArray]  # logits (T, V) and latents (T, C), or (T, 0) without memory


def judge_arithmetic(
    graph: tuple[Computed, Computed],
    kernels: tuple[Computed, Computed],
    limits: KernelLimits,
    scale_fault: str | None = None,
) -> ArithmeticPart:
    """Judge pairs of (found, expected): the graph's by float32's limits, the decoder's by those of its kernels.

    `scale_fault` is the result of `activation_scale_fault`.
    """
    exact = forced_errors(*graph, KernelLimits(FP32.max_abs_logit_error, FP32.max_abs_latent_error, math.inf))
    ran = forced_errors(*kernels, limits)
    fault = scale_fault or exact.fault("the graph") or ran.fault("the decoder")
    right = (
        f"the graph within {exact.max_abs_logit_error:.1e} (limit {exact.limit_logit:.1e}) of PyTorch on the stored "
        f"weights, the kernels that run within {ran.max_abs_logit_error:.1e} (limit {ran.limit_logit:.1e})"
    )
    return ArithmeticPart(fault is None, f"arithmetic: {fault or right}", exact.max_abs_logit_error, exact, ran, fault)


def forced_errors(found: Computed, expected: Computed, limits: KernelLimits) -> ForcedErrors:
    """Errors of logits (T, V) and latents (T, C); inf for numbers that are not finite."""
    logits, latents = (_largest(one, other) for one, other in zip(found, expected, strict=True))  # (T) each
    beyond = np.flatnonzero((logits > limits.logit) | (latents > limits.latent))
    return ForcedErrors(
        max_abs_logit_error=float(logits.max()),
        max_abs_latent_error=float(latents.max()),
        typical_logit_error=float(np.median(logits)),
        worst_position=int(logits.argmax()),
        first_exceeded=int(beyond[0]) if beyond.size else None,
        limit_logit=limits.logit,
        limit_latent=limits.latent,
        limit_typical=limits.typical,
    )


def activation_scale_fault(found: Mapping[str, float], stated: Mapping[str, float]) -> str | None:
    """How the graph's int8 scales differ from those that the manifest states; None where they do not."""
    for name in [*stated, *found]:
        if name not in found:
            return f"the input of {name} is not rounded to int8, as the manifest says"
        if name not in stated:
            return f"the input of {name} is rounded to int8, and the manifest says nothing of it"
        expected = float(np.float16(stated[name]))
        if found[name] != expected:
            return f"the input of {name} is rounded in steps of {found[name]:.6g}, and the manifest says {expected:.6g}"
    return None


def _largest(found: FloatArray, expected: FloatArray) -> FloatArray:
    """(T) the largest absolute difference of each row; zeros for empty rows."""
    difference = np.abs(found.astype(np.float64) - expected)
    result: FloatArray = np.nan_to_num(difference.max(axis=1, initial=0.0), nan=np.inf, posinf=np.inf)
    return result


@dataclass(frozen=True)
class Drift:
    """Growth of the latent's error: medians over the first and the last quarter of positions, and their ratio.

    Rounding gives 1 to 3; a value that feeds back with too little precision grows steadily.
    """

    first_quarter: float
    last_quarter: float
    growth: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> Drift | None:
        """The drift over `points`; None without memory and for fewer than 4 points."""
        errors = [point.latent_error for point in points if point.latent_error is not None]
        quarter = len(errors) // 4
        if quarter < 1:
            return None
        first, last = median(errors[:quarter]), median(errors[-quarter:])
        return cls(first, last, last / first if first > 0 else (math.inf if last > 0 else 1.0))


@dataclass(frozen=True)
class FreeRun:
    """The free-running decoder against the tokens that the reference chose.

    After the first divergence the sides read different tokens, so errors there compare two texts.
    """

    token_agreement: float  # share of the generated tokens that are equal at the same position
    equal_tokens: int  # before the first divergence
    mean_kl: float
    points: tuple[Point, ...]

    @classmethod
    def of(cls, run: Comparison) -> FreeRun:
        """The free run of a comparison, as far as it got."""
        same = [point.same_top1 for point in run.choices_of(run.free)]
        kl = [point.kl for point in run.free] or [math.inf]
        equal = same.index(False) if False in same else len(same)
        agreement = sum(same) / max(1, run.steps) if run.points else math.nan
        return cls(agreement, equal, sum(kl) / len(kl), tuple(run.free))


@dataclass(frozen=True)
class QualityPart:
    """The part `quality` of a verdict: the decoder as a model, against the original in float32.

    Bits per byte are those of the prompt's tokens, both sides stepwise; None without a tokenizer. `median_margin` is
    the median over positions of the reference's best logit minus its second; `level` says that it is so small that
    equal first choices say little.
    """

    passed: bool
    line: str
    mean_kl: float
    max_kl: float
    top1_agreement: float
    median_margin: float
    level: bool
    bits_per_byte: float | None = None
    reference_bits_per_byte: float | None = None


@dataclass(frozen=True)
class ParityReport:
    """The verdict, its parts, and the measurements; inf stands for what is not finite or was not reached.

    A part that was not judged is None: arithmetic and quality are parts of precisions with fewer bits than fp32.
    """

    passed: bool
    verdict: str
    checkpoint_matches: bool | None
    backend: str
    precision: str
    steps: int
    prompt_tokens: int
    max_abs_logit_error: float
    max_abs_latent_error: float | None
    mean_kl: float
    max_kl: float
    top1_agreement: float
    first_divergence: Divergence | None
    prefill: PrefillCheck
    limits: ParityLimits
    points: tuple[Point, ...]
    max_abs_key_error: float
    max_abs_value_error: float
    drift: Drift | None
    free_running: FreeRun
    tokens: tuple[int, ...]
    weights: WeightsPart | None = None
    arithmetic: ArithmeticPart | None = None
    quality: QualityPart | None = None
    provenance: Mapping[str, Any] | None = None
    bisect: Any = None  # a `bisect.Bisection`

    def to_dict(self) -> dict[str, Any]:
        """The JSON fields; points become columns under `positions`, numbers that are not finite null."""
        fields: dict[str, Any] = as_json(self)
        if self.bisect is None:
            del fields["bisect"]
        for run in (fields, fields["free_running"]):
            points = run.pop("points")
            run["positions"] = {f.name: [point[f.name] for point in points] for f in dataclasses.fields(Point)}
        return fields


def as_json(value: object) -> Any:  # noqa: ANN401 - any JSON type
    """Convert dataclasses to JSON types. Numbers that are not finite become None: JSON has none for them."""
    return msgspec.json.decode(msgspec.json.encode(value))


@dataclass(frozen=True)
class Evidence:
    """What is judged beside the rollout, and by which limits; parts that were not measured are None.

    `bits_per_byte` are the reference's and the decoder's, of the prompt. `checkpoint_matches` is reported and decides
    nothing.
    """

    precision: str
    backend: str
    checkpoint_matches: bool | None
    limits: ParityLimits
    weights: WeightsPart | None = None
    arithmetic: ArithmeticPart | None = None
    bits_per_byte: tuple[float, float] | None = None


def compare(
    reference: StatefulDecoder,
    decoder: StatefulDecoder,
    prompt: Sequence[int],
    steps: int,
    *,
    precision: str,
    checkpoint_matches: bool | None,
    backend: str,
    prefill: PrefillPolicy = "auto",
    tolerance: float | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Roll both decoders out over `prompt` and `steps` greedy tokens, and judge by the limits of `precision`.

    A difference is a result, and so is a decoder that fails on the way. `prefill` and `tolerance` as in
    `ParityOptions`. Raises ParityError for decoders that cannot be compared, InputError for a prompt that cannot be
    read.
    """
    evidence = Evidence(precision, backend, checkpoint_matches, limits(precision))
    return report_of(compare_rollouts(reference, decoder, prompt, steps, (prefill, tolerance), progress), evidence)


def report_of(run: Comparison, evidence: Evidence) -> ParityReport:
    """The verdict on a comparison and its evidence, with the numbers behind it."""
    bounds, points, weights = evidence.limits, run.points, evidence.weights
    by_quality = bounds.top1_agreement is not None and (weights is None or weights.passed)
    quality = judge_quality(run, bounds, evidence.bits_per_byte) if by_quality else None
    passed, verdict = _verdict(run, evidence, quality)
    if evidence.checkpoint_matches is False:
        verdict += "; checkpoint_matches: no (the file is not the one that was exported)"
    kl = [point.kl for point in points] or [math.inf]
    return ParityReport(
        passed=passed,
        verdict=verdict,
        checkpoint_matches=evidence.checkpoint_matches,
        backend=evidence.backend,
        precision=evidence.precision,
        steps=run.steps,
        prompt_tokens=run.prompt_tokens,
        max_abs_logit_error=max((point.logit_error for point in points), default=math.inf),
        max_abs_latent_error=max((p.latent_error for p in points if p.latent_error is not None), default=None),
        mean_kl=sum(kl) / len(kl),
        max_kl=max(kl),
        top1_agreement=sum(point.same_top1 for point in points) / len(points) if points else math.nan,
        first_divergence=run.first_divergence(bounds),
        prefill=run.prefill,
        limits=bounds,
        points=tuple(points),
        max_abs_key_error=max((error for point in points for error in point.key_errors), default=math.inf),
        max_abs_value_error=max((error for point in points for error in point.value_errors), default=math.inf),
        drift=Drift.of(points),
        free_running=FreeRun.of(run),
        tokens=tuple(run.tokens),
        weights=weights,
        arithmetic=evidence.arithmetic,
        quality=quality,
    )


def _verdict(run: Comparison, evidence: Evidence, quality: QualityPart | None) -> tuple[bool, str]:
    """Join the parts: those that fail come first, and weights that fail are the whole verdict."""
    weights, arithmetic = evidence.weights, evidence.arithmetic
    if weights is not None and not weights.passed:
        return False, f"FAIL: {weights.line}; nothing was run"
    if quality is None:
        passed, line = _judge_function(run, evidence.limits)
        return passed, line if weights is None else f"{line}; {weights.line}"
    lines = [(part.passed, part.line) for part in (weights, arithmetic) if part is not None]
    lines.append((quality.passed, f"quality: {quality.line}" if lines else quality.line))
    passed = all(fine for fine, _ in lines)
    ordered = [line for _, line in sorted(lines, key=lambda item: item[0])]
    return passed, f"{'PASS' if passed else 'FAIL'}: {'; '.join(ordered)}"


def _judge_function(run: Comparison, limits: ParityLimits) -> tuple[bool, str]:
    points = [point for point in run.points if point.finite]
    divergence = run.first_divergence(limits)
    numbers = (
        _excess("logits differ", points, lambda point: point.logit_error, limits.max_abs_logit_error)
        or _excess("latents differ", points, lambda point: point.latent_error or 0.0, limits.max_abs_latent_error)
        or _mean_kl_fault(points, limits)
    )
    faults = [fault for fault in (run.stopped, numbers, _prefill_fault(run.prefill, limits)) if fault]
    if divergence and (faults or not divergence.near_tie):
        faults.insert(0, f"greedy tokens part at step {_describe(divergence, run, limits)}")
    elif numbers and len(run.choices) == run.steps:
        faults[0] = f"numerically different though all {run.steps} greedy tokens are equal: {faults[0]}"
    kl = f"max KL {max((point.kl for point in points), default=0.0):.1e}"
    if faults:
        return False, f"FAIL: {'; '.join(faults)}; {kl}"
    worst = max(point.logit_error for point in points)
    kl += f", logits within {worst:.1e} (limit {limits.max_abs_logit_error:.1e})"
    if divergence:
        return True, f"PASS with a near tie at step {_describe(divergence, run, limits)}; {kl}"
    return True, f"PASS: {run.steps} of {run.steps} greedy tokens equal, {kl}"


def judge_quality(run: Comparison, limits: ParityLimits, bits_per_byte: tuple[float, float] | None) -> QualityPart:
    """Judge mean KL and the share of positions with the same first choice."""
    assert limits.top1_agreement is not None
    points = [point for point in run.points if point.finite]
    same = sum(point.same_top1 for point in points) / max(1, len(points))
    mean = _mean_kl(points)
    margin = median([point.margin for point in points]) if points else math.nan
    first = f"the first choice is the same at {same:.1%} of positions (limit {limits.top1_agreement:.1%})"
    choices = first if same < limits.top1_agreement else None
    possible = (run.stopped, _mean_kl_fault(points, limits), choices, _prefill_fault(run.prefill, limits))
    faults = [fault for fault in possible if fault]
    right = f"mean KL {mean:.1e} (limit {limits.mean_kl:.1e}), first choice the same at {same:.1%} of positions"
    lines = list(faults or [right])
    if divergence := run.first_divergence(limits):
        lines.append(f"greedy tokens part at step {_describe(divergence, run, limits)}")
        equal = FreeRun.of(run).token_agreement
        lines.append(f"of its own free-running tokens {equal:.1%} are equal (reported, not judged)")
    else:
        lines.append(f"all {run.steps} greedy tokens equal")
    if margin < LEVEL_MARGIN:
        lines.append(
            f"this model's logits are nearly level (its best two are {margin:.2g} apart in the median), so its first "
            "choices say little, as in a model that is not trained"
        )
    if bits_per_byte is not None:
        lines.append(f"bits per byte of the prompt {bits_per_byte[1]:.4f}, in float32 {bits_per_byte[0]:.4f}")
    expected, found = bits_per_byte or (None, None)
    largest = max((point.kl for point in points), default=math.inf)
    return QualityPart(
        not faults, "; ".join(lines), mean, largest, same, margin, margin < LEVEL_MARGIN, found, expected
    )


def _describe(divergence: Divergence, run: Comparison, limits: ParityLimits) -> str:
    kind = "a near tie: at most" if divergence.near_tie else "a near tie would be at most"
    return (
        f"{divergence.step} of {run.steps} (position {divergence.position}: {divergence.reference_token} in the "
        f"reference, {divergence.decoder_token} in the decoder), where the reference's best two logits are "
        f"{divergence.margin:.1e} apart ({kind} {limits.near_tie_margin:.1e})"
    )


def _excess(name: str, points: list[Point], error: Callable[[Point], float], limit: float) -> str | None:
    beyond = [point for point in points if error(point) > limit]
    if not beyond:
        return None
    worst = max(beyond, key=error)
    return (
        f"{name} by {error(worst):.1e} at position {worst.position} "
        f"(limit {limit:.1e}, first exceeded at position {beyond[0].position})"
    )


def _mean_kl(points: list[Point]) -> float:
    return sum(point.kl for point in points) / max(1, len(points))


def _mean_kl_fault(points: list[Point], limits: ParityLimits) -> str | None:
    mean = _mean_kl(points)
    return f"mean KL is {mean:.1e} (limit {limits.mean_kl:.1e})" if mean > limits.mean_kl else None


def _prefill_fault(check: PrefillCheck, limits: ParityLimits) -> str | None:
    """Iterated prefill may be off by its stated residual; prefill without one must be exact in all parts."""
    if check.error:
        return f"prefill failed: {check.error}"
    bounds = {"latent": limits.max_abs_latent_error + (check.residual or 0.0)}
    if not check.residual:
        bounds |= {"logit": limits.max_abs_logit_error, "cache": limits.max_abs_cache_error}
    for part, bound in bounds.items():
        error = getattr(check, f"max_abs_{part}_error")
        if error is not None and error > bound:
            residual = "" if not check.residual else f", its stated residual {check.residual:.1e} included"
            return (
                f"{check.policy} prefill of the prompt differs from reading it stepwise: {part} by {error:.1e} "
                f"(limit {bound:.1e}{residual})"
            )
    return None
