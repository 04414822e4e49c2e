"""The parts of parity put together: compare a decoder with the reference along a rollout, and make the verdict.

The verdict is one line in terms of stored weights, tokens, KL, and the worst error's position; its limits are those of
`tolerances`. Written against `types.StatefulDecoder`: knows no backend, no files and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from lrt_deploy.errors import ParityError
from lrt_deploy.text.prompts import check_prompts
from lrt_deploy.tolerances import LEVEL_MARGIN, ParityLimits, limits
from lrt_deploy.types import PrefillPolicy, StatefulDecoder

from .arithmetic import ArithmeticPart
from .report import Divergence, Drift, FreeRun, ParityReport, Point, PrefillCheck, QualityPart, Rollout
from .rollout import Progress, Reading, kl_divergence, roll_out
from .stored_weights import WeightsPart

__all__ = ["About", "ParityReport", "Parts", "Progress", "compare", "follow", "kl_divergence", "report_of"]


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
    progress: Progress = lambda what, done, total: None,
) -> ParityReport:
    """Roll both out over `prompt` and `steps` greedy tokens, and judge by the limits of `precision`.

    A difference is a result, and so is a decoder that fails on the way. Raises ParityError for what cannot be compared,
    InputError for a prompt that cannot be read. `checkpoint_matches` is reported and decides nothing. `prefill` and
    `tolerance` say how the decoder reads the prompt where that is checked. Stored weights are not looked at: that, and
    the whole verdict, is `lrt_deploy.parity`'s.
    """
    about = About(precision, backend, checkpoint_matches, limits(precision))
    rollout = follow(reference, decoder, prompt, steps, Reading(prefill, tolerance), progress)
    return report_of(rollout, about)


def follow(
    reference: StatefulDecoder,
    decoder: StatefulDecoder,
    prompt: Sequence[int],
    steps: int,
    reading: Reading,
    progress: Progress = lambda what, done, total: None,
) -> Rollout:
    """Roll both out and judge nothing. Raises as `compare` does."""
    _check_comparable(reference, decoder)
    tokens = check_prompts([prompt], reference.config.vocab_size)[0].tolist()
    _check_length(reference, decoder, len(tokens), steps)
    return roll_out(reference, decoder, tokens, steps, reading, progress)


@dataclass(frozen=True)
class About:
    """What is compared, and by which limits it is judged."""

    precision: str
    backend: str
    checkpoint_matches: bool | None
    limits: ParityLimits


@dataclass(frozen=True)
class Parts:
    """What was found beside the rollout; None where a part was not judged."""

    weights: WeightsPart | None = None
    arithmetic: ArithmeticPart | None = None
    bits_per_byte: tuple[float, float] | None = None  # the reference's and the decoder's, on the prompt


def report_of(rollout: Rollout, about: About, parts: Parts | None = None) -> ParityReport:
    """The verdict on a rollout and all numbers behind it; with `parts`, on them as well."""
    parts, bounds, points = parts or Parts(), about.limits, rollout.points
    judgement = judge_all(rollout, bounds, parts.weights, parts.arithmetic, parts.bits_per_byte)
    verdict = judgement.verdict
    if about.checkpoint_matches is False:
        verdict += "; checkpoint_matches: no (the file is not the one that was exported)"
    kl = [point.kl for point in points] or [math.inf]
    return ParityReport(
        passed=judgement.passed,
        verdict=verdict,
        checkpoint_matches=about.checkpoint_matches,
        backend=about.backend,
        precision=about.precision,
        steps=rollout.steps,
        prompt_tokens=rollout.prompt_tokens,
        max_abs_logit_error=max((point.logit_error for point in points), default=math.inf),
        max_abs_latent_error=max((p.latent_error for p in points if p.latent_error is not None), default=None),
        mean_kl=sum(kl) / len(kl),
        max_kl=max(kl),
        top1_agreement=sum(point.same_top1 for point in points) / len(points) if points else math.nan,
        first_divergence=rollout.first_divergence(bounds),
        prefill=rollout.prefill,
        limits=bounds,
        points=tuple(points),
        max_abs_key_error=max((error for point in points for error in point.key_errors), default=math.inf),
        max_abs_value_error=max((error for point in points for error in point.value_errors), default=math.inf),
        drift=Drift.of(points),
        free_running=FreeRun.of(rollout),
        tokens=tuple(rollout.tokens),
        weights=parts.weights,
        arithmetic=parts.arithmetic,
        quality=judgement.quality,
    )


def _check_comparable(reference: StatefulDecoder, decoder: StatefulDecoder) -> None:
    """Refuse models whose logits or latents have no common shape; whatever else differs, the numbers will show."""
    for name in ("vocab_size", "memory", "n_embd", "n_layer"):
        expected, found = getattr(reference.config, name), getattr(decoder.config, name)
        if found != expected:
            raise ParityError(
                f"the decoder's model has {name} {found}, the reference's has {expected}, so there is nothing to "
                "compare; give the checkpoint that the bundle was exported from"
            )


def _check_length(reference: StatefulDecoder, decoder: StatefulDecoder, prompt_tokens: int, steps: int) -> None:
    if steps < 1:
        raise ParityError(f"steps is {steps}, expected at least 1: parity is a rollout")
    total = prompt_tokens + steps
    for name, side in (("decoder", decoder), ("reference", reference)):
        capacity = getattr(side, "max_seq_len", side.config.max_positions)
        if total > capacity:
            raise ParityError(
                f"{prompt_tokens} prompt tokens and {steps} steps are {total} tokens, and the {name} holds {capacity}; "
                "take fewer steps or a shorter prompt, or export with a larger --max-seq-len"
            )


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
