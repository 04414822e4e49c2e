"""The verdict of parity: one line in terms of stored weights, tokens, KL, and the worst error's position.

Two kinds of precision, two questions. Where errors are bounded (float32) the decoder must be the same function: the
tokens are equal or part at a near tie, and every number lies within its limit. Where none can be (fewer bits), it must
be as good a model: mean KL and the share of equal greedy choices are bounded, and tokens may part.

Beside the rollout stand what the bundle stores (`parity_weights`) and, with fewer bits, how it computes with that
(`parity_arithmetic`): limits wide enough for few bits would pass a wrong model, theirs do not. The verdict comes from
numbers alone; what is known of file hashes is reported beside it. The limits are in `tolerances`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from lrt_deploy.tolerances import LEVEL_MARGIN, ParityLimits

from .arithmetic import ArithmeticPart
from .report import Divergence, FreeRun, Point, PrefillCheck, QualityPart, Rollout
from .stored_weights import WeightsPart


@dataclass(frozen=True)
class Judgement:
    """The result of all parts; `quality` is None in a precision whose errors are bounded."""

    passed: bool
    verdict: str
    quality: QualityPart | None = None


def judge(rollout: Rollout, limits: ParityLimits) -> tuple[bool, str]:
    """Whether the rollout alone passes, and the one line that says why."""
    points = [point for point in rollout.points if point.finite]
    if limits.top1_agreement is None:
        return _judge_function(rollout, points, limits)
    quality = judge_quality(rollout, limits, None)
    return quality.passed, f"{'PASS' if quality.passed else 'FAIL'}: {quality.line}"


def judge_all(
    rollout: Rollout,
    limits: ParityLimits,
    weights: WeightsPart | None,
    arithmetic: ArithmeticPart | None,
    bits_per_byte: tuple[float, float] | None,
) -> Judgement:
    """The verdict on the parts that there are: weights, arithmetic, and the rollout, whose line comes last.

    Where a part fails, its line stands first. Stored weights that are others end the matter: then nothing was run.
    """
    if weights is not None and not weights.passed and not rollout.points:
        return Judgement(False, f"FAIL: {weights.line}; nothing was run")
    if limits.top1_agreement is None:
        passed, line = judge(rollout, limits)
        if weights is None:
            return Judgement(passed, line)
        if not weights.passed:
            return Judgement(False, f"FAIL: {weights.line}; {line}")
        return Judgement(passed, f"{line}; {weights.line}")
    quality = judge_quality(rollout, limits, bits_per_byte)
    parts = [part for part in (weights, arithmetic) if part is not None]
    if not parts:
        return Judgement(quality.passed, f"{'PASS' if quality.passed else 'FAIL'}: {quality.line}", quality)
    lines = [(part.passed, part.line) for part in parts] + [(quality.passed, f"quality: {quality.line}")]
    passed = all(fine for fine, _ in lines)
    ordered = [line for fine, line in lines if not fine] + [line for fine, line in lines if fine]
    return Judgement(passed, f"{'PASS' if passed else 'FAIL'}: {'; '.join(ordered)}", quality)


def _judge_function(rollout: Rollout, points: list[Point], limits: ParityLimits) -> tuple[bool, str]:
    """The same function, up to rounding."""
    divergence = rollout.first_divergence(limits)
    numbers = _number_fault(points, limits)
    faults = [fault for fault in (rollout.stopped, numbers, _prefill_fault(rollout.prefill, limits)) if fault]
    if divergence and (faults or not divergence.near_tie):
        faults.insert(0, f"greedy tokens part at step {_describe(divergence, rollout, limits)}")
    elif numbers and len(rollout.choices) == rollout.steps:
        faults[0] = f"numerically different though all {rollout.steps} greedy tokens are equal: {faults[0]}"
    kl = f"max KL {max((point.kl for point in points), default=0.0):.1e}"
    if faults:
        return False, f"FAIL: {'; '.join(faults)}; {kl}"
    worst = max(point.logit_error for point in points)
    kl += f", logits within {worst:.1e} (limit {limits.max_abs_logit_error:.1e})"
    if divergence:
        return True, f"PASS with a near tie at step {_describe(divergence, rollout, limits)}; {kl}"
    return True, f"PASS: {rollout.steps} of {rollout.steps} greedy tokens equal, {kl}"


def judge_quality(rollout: Rollout, limits: ParityLimits, bits_per_byte: tuple[float, float] | None) -> QualityPart:
    """As good a model: the distributions are close, and the first choice is nearly always the same."""
    assert limits.top1_agreement is not None
    points = [point for point in rollout.points if point.finite]
    same = sum(point.same_top1 for point in points) / max(1, len(points))
    mean = sum(point.kl for point in points) / max(1, len(points))
    margin = median([point.margin for point in points]) if points else math.nan
    level = margin < LEVEL_MARGIN
    faults = [fault for fault in (rollout.stopped, _mean_kl_fault(points, limits)) if fault]
    if same < limits.top1_agreement:
        faults.append(f"the first choice is the same at {same:.1%} of positions (limit {limits.top1_agreement:.1%})")
    if prefill := _prefill_fault(rollout.prefill, limits):
        faults.append(prefill)
    divergence = rollout.first_divergence(limits)
    tokens = f"all {rollout.steps} greedy tokens equal"
    if divergence:
        tokens = f"greedy tokens part at step {_describe(divergence, rollout, limits)}"
        free = FreeRun.of(rollout)
        tokens += f"; of its own free-running tokens {free.token_agreement:.1%} are equal (reported, not judged)"
    if level:
        tokens += (
            f"; this model's logits are nearly level (its best two are {margin:.2g} apart in the median), so its first "
            "choices say little, as in a model that is not trained"
        )
    if bits_per_byte is not None:
        tokens += f"; bits per byte of the prompt {bits_per_byte[1]:.4f}, in float32 {bits_per_byte[0]:.4f}"
    kl = f"mean KL {mean:.1e} (limit {limits.mean_kl:.1e})"
    line = f"{'; '.join(faults)}" if faults else f"{kl}, first choice the same at {same:.1%} of positions"
    return QualityPart(
        passed=not faults,
        line=f"{line}; {tokens}",
        mean_kl=mean,
        max_kl=max((point.kl for point in points), default=math.inf),
        top1_agreement=same,
        median_margin=margin,
        level=level,
        bits_per_byte=None if bits_per_byte is None else bits_per_byte[1],
        reference_bits_per_byte=None if bits_per_byte is None else bits_per_byte[0],
    )


def _describe(divergence: Divergence, rollout: Rollout, limits: ParityLimits) -> str:
    kind = "a near tie: at most" if divergence.near_tie else "a near tie would be at most"
    return (
        f"{divergence.step} of {rollout.steps} (position {divergence.position}: {divergence.reference_token} in the "
        f"reference, {divergence.decoder_token} in the decoder), where the reference's best two logits are "
        f"{divergence.margin:.1e} apart ({kind} {limits.near_tie_margin:.1e})"
    )


def _number_fault(points: list[Point], limits: ParityLimits) -> str | None:
    """The first of logits, latent and KL that is beyond its limit."""
    return (
        _excess("logits differ", points, lambda point: point.logit_error, limits.max_abs_logit_error)
        or _excess("latents differ", points, lambda point: point.latent_error or 0.0, limits.max_abs_latent_error)
        or _mean_kl_fault(points, limits)
    )


def _excess(what: str, points: list[Point], error: Callable[[Point], float], limit: float) -> str | None:
    beyond = [point for point in points if error(point) > limit]
    if not beyond:
        return None
    worst = max(beyond, key=error)
    return (
        f"{what} by {error(worst):.1e} at position {worst.position} "
        f"(limit {limit:.1e}, first exceeded at position {beyond[0].position})"
    )


def _mean_kl_fault(points: list[Point], limits: ParityLimits) -> str | None:
    mean = sum(point.kl for point in points) / max(1, len(points))
    return f"mean KL is {mean:.1e} (limit {limits.mean_kl:.1e})" if mean > limits.mean_kl else None


def _prefill_fault(check: PrefillCheck, limits: ParityLimits) -> str | None:
    """Iterated prefill may be off by the residual that it states; what states none must be exact in all parts."""
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
