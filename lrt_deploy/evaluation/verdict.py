"""Judge a comparison of a decoder with the reference, in one line in terms of weights, tokens, and KL.

A precision whose errors are bounded (fp32) is judged as the same function, any other by three parts: `weights` and
`arithmetic`, which are measured elsewhere, and `quality`. The limits are those of `tolerances`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from lrt_deploy.tolerances import LEVEL_MARGIN, ParityLimits, limits
from lrt_deploy.types import PrefillPolicy, StatefulDecoder

from .arithmetic import ArithmeticPart
from .report import Comparison, Divergence, Drift, FreeRun, ParityReport, Point, PrefillCheck, QualityPart
from .rollout import PrefillRequest, Progress, compare_rollouts, silent
from .stored_weights import WeightsPart


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
    request = PrefillRequest(prefill, tolerance)
    return report_of(compare_rollouts(reference, decoder, prompt, steps, request, progress), evidence)


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
    """Judge whether the decoder computes the same function, up to rounding."""
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
