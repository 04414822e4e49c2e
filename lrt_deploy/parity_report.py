"""What a parity rollout saw, and the verdict on it: one line in terms of tokens, KL, and the worst error's position.

The verdict comes from numbers alone; what is known of file hashes is reported beside it. It does not run anything: see
`parity`. The limits are in `tolerances`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .tolerances import ParityLimits


@dataclass(frozen=True)
class Point:
    """Both sides after the token at `position`. Errors are maxima of absolute differences, inf for what is not finite.

    `latent_error` is None for a model without memory; `kl` is KL(reference || decoder) in nats; `margin` is by how much
    the reference's best logit beats its second; the tokens are those that each side would choose next.
    """

    position: int
    logit_error: float
    latent_error: float | None
    kl: float
    margin: float
    reference_token: int
    decoder_token: int

    @property
    def finite(self) -> bool:
        """Whether both sides' logits, and with them the tokens, mean anything."""
        return math.isfinite(self.logit_error)

    @property
    def same_top1(self) -> bool:
        """Whether both sides would choose the same token."""
        return self.finite and self.reference_token == self.decoder_token


@dataclass(frozen=True)
class Divergence:
    """The first generated token in which the sides differ: number `step` from 0, chosen by the logits of `position`."""

    step: int
    position: int
    reference_token: int
    decoder_token: int
    margin: float
    near_tie: bool


@dataclass(frozen=True)
class PrefillCheck:
    """The prompt read with policy `auto`, against the decoder's own stepwise state at the same point.

    All fields are None when the rollout ended before that point; `error` says why the prefill failed, if it did.
    """

    policy: str | None = None
    passes: float | None = None
    residual: float | None = None
    max_abs_latent_error: float | None = None
    max_abs_logit_error: float | None = None
    max_abs_cache_error: float | None = None
    note: str | None = None
    error: str | None = None


@dataclass
class Rollout:
    """What was seen, in the order of positions; `stopped` says why it ended early."""

    prompt_tokens: int
    steps: int
    points: list[Point] = field(default_factory=list)
    prefill: PrefillCheck = field(default_factory=PrefillCheck)
    stopped: str | None = None

    @property
    def choices(self) -> list[Point]:
        """The points whose logits choose the generated tokens: from the prompt's last one on, without the very last."""
        return self.points[self.prompt_tokens - 1 : self.prompt_tokens - 1 + self.steps]

    def first_divergence(self, limits: ParityLimits) -> Divergence | None:
        """Where the decoder, fed with its own choices, would leave the reference's path."""
        for step, at in enumerate(self.choices):
            if at.finite and not at.same_top1:
                near_tie = at.margin <= limits.near_tie_margin
                return Divergence(step, at.position, at.reference_token, at.decoder_token, at.margin, near_tie)
        return None


@dataclass(frozen=True)
class ParityReport:
    """The result of `parity.compare` and the curves behind it. inf stands for what is not finite or was not reached."""

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

    def to_dict(self) -> dict[str, Any]:
        """JSON types; the curves as columns under `positions`, null for numbers that are not finite."""
        fields = dataclasses.asdict(self)
        points = fields.pop("points")
        columns = {f.name: [point[f.name] for point in points] for f in dataclasses.fields(Point)}
        result: dict[str, Any] = _as_json(fields | {"positions": columns})
        return result


def judge(rollout: Rollout, limits: ParityLimits) -> tuple[bool, str]:
    """Whether the rollout passes, and the one line that says why."""
    divergence = rollout.first_divergence(limits)
    points = [point for point in rollout.points if point.finite]
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


def _as_json(value: Any) -> Any:  # noqa: ANN401 - any JSON type
    """JSON has no number for what is not finite."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
