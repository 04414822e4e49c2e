"""The verdict on a parity rollout: one line in terms of tokens, KL, and the worst error's position.

Two kinds of precision, two questions. Where errors are bounded (float32) the decoder must be the same function: the
tokens are equal or part at a near tie, and every number lies within its limit. Where none can be (fewer bits), it must
be as good a model: mean KL and the share of equal greedy choices are bounded, and tokens may part.

The verdict comes from numbers alone; what is known of file hashes is reported beside it. The limits are in
`tolerances`.
"""

from __future__ import annotations

from collections.abc import Callable

from .parity_report import Divergence, Point, PrefillCheck, Rollout
from .tolerances import ParityLimits


def judge(rollout: Rollout, limits: ParityLimits) -> tuple[bool, str]:
    """Whether the rollout passes, and the one line that says why."""
    points = [point for point in rollout.points if point.finite]
    if limits.top1_agreement is None:
        return _judge_function(rollout, points, limits)
    return _judge_quality(rollout, points, limits)


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


def _judge_quality(rollout: Rollout, points: list[Point], limits: ParityLimits) -> tuple[bool, str]:
    """As good a model: the distributions are close, and the first choice is nearly always the same."""
    assert limits.top1_agreement is not None
    same = sum(point.same_top1 for point in points) / max(1, len(points))
    mean = sum(point.kl for point in points) / max(1, len(points))
    faults = [fault for fault in (rollout.stopped, _mean_kl_fault(points, limits)) if fault]
    if same < limits.top1_agreement:
        faults.append(f"the first choice is the same at {same:.1%} of positions (limit {limits.top1_agreement:.1%})")
    if prefill := _prefill_fault(rollout.prefill, limits):
        faults.append(prefill)
    divergence = rollout.first_divergence(limits)
    tokens = f"all {rollout.steps} greedy tokens equal"
    if divergence:
        tokens = f"greedy tokens part at step {_describe(divergence, rollout, limits)}"
    if faults:
        return False, f"FAIL: {'; '.join(faults)}; {tokens}"
    kl = f"mean KL {mean:.1e} (limit {limits.mean_kl:.1e})"
    return True, f"PASS: {kl}, first choice the same at {same:.1%} of positions; {tokens}"


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
