"""Parity: whether a decoder computes what the reference computes, along a whole rollout.

Both sides read the same tokens, each carrying its own state: the prompt token by token, then what the reference
chooses greedily. That is the teacher-forced run. As long as the decoder would have chosen the same tokens it is its
free run as well, so the first divergence is read off the same numbers. How the decoder reads a prompt in one go is
checked beside it and never enters the rollout.

Written against `interface.StatefulDecoder`: it knows no backend, no files and no torch. The verdict is made in
`parity_report`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import BackendError, ParityError
from .interface import PrefillPolicy, PrefillReport, State, StatefulDecoder
from .parity_report import ParityReport, Point, PrefillCheck, Rollout, judge
from .prompts import check_prompts
from .tolerances import limits

__all__ = ["ParityReport", "Progress", "compare", "kl_divergence"]

# Called with what is being done, and done and total of it.
Progress = Callable[[str, int, int], None]
_Reading = tuple[PrefillPolicy, float | None]  # how a prompt is read where prefill is checked: policy, tolerance


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
    `tolerance` say how the decoder reads the prompt where that is checked.
    """
    bounds = limits(precision)
    _check_comparable(reference, decoder)
    tokens = check_prompts([prompt], reference.config.vocab_size)[0].tolist()
    _check_length(reference, decoder, len(tokens), steps)
    rollout = Rollout(len(tokens), steps)
    try:
        _roll_out(reference, decoder, tokens, rollout, (prefill, tolerance), progress)
    except BackendError as error:
        rollout.stopped = f"the rollout stopped at position {len(rollout.points)}: {error}"
    passed, verdict = judge(rollout, bounds)
    points = rollout.points
    kl = [point.kl for point in points] or [math.inf]
    return ParityReport(
        passed=passed,
        verdict=verdict,
        checkpoint_matches=checkpoint_matches,
        backend=backend,
        precision=precision,
        steps=steps,
        prompt_tokens=len(tokens),
        max_abs_logit_error=max((point.logit_error for point in points), default=math.inf),
        max_abs_latent_error=max((p.latent_error for p in points if p.latent_error is not None), default=None),
        mean_kl=sum(kl) / len(kl),
        max_kl=max(kl),
        top1_agreement=sum(point.same_top1 for point in points) / max(1, len(points)),
        first_divergence=rollout.first_divergence(bounds),
        prefill=rollout.prefill,
        limits=bounds,
        points=tuple(points),
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


def _roll_out(
    reference: StatefulDecoder,
    decoder: StatefulDecoder,
    prompt: list[int],
    rollout: Rollout,
    reading: _Reading,
    progress: Progress,
) -> None:
    """Feed both sides `prompt`, then the reference's choices; ends early where numbers end."""
    tokens, total, points = list(prompt), len(prompt) + rollout.steps, rollout.points
    expected = reference.prefill([tokens[:1]], policy="stepwise")
    found = decoder.prefill([tokens[:1]], policy="stepwise")
    while True:
        points.append(_measure(len(points), expected, found, reference.config.memory))
        progress("rollout", len(points), total)
        if fault := _not_finite("reference", expected) or _not_finite("decoder", found):
            rollout.stopped = f"{fault} at position {len(points) - 1}"
            return
        if len(points) == len(prompt):
            rollout.prefill = _check_prefill(decoder, found, prompt, reading)
        if len(points) == total:
            return
        if len(points) == len(tokens):
            tokens.append(points[-1].reference_token)
        reference.step(expected, [tokens[len(points)]])
        decoder.step(found, [tokens[len(points)]])


def _measure(position: int, expected: State, found: State, memory: bool) -> Point:
    p, q = expected.logits[0].astype(np.float64), found.logits[0].astype(np.float64)  # (V)
    error = _distance(p, q)
    finite = math.isfinite(error)
    kth = max(0, p.size - 2)
    second, best = np.partition(p, kth)[[kth, -1]]
    return Point(
        position=position,
        logit_error=error,
        latent_error=_distance(expected.latent, found.latent) if memory else None,
        kl=kl_divergence(p, q) if finite else math.inf,
        margin=float(best - second) if finite else math.inf,
        reference_token=int(p.argmax()),
        decoder_token=int(q.argmax()),
    )


def kl_divergence(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    """KL(softmax p || softmax q) in nats, of logits (V) in float64; float32 would add noise of 3e-7."""
    log_p, log_q = (z - z.max() - np.log(np.exp(z - z.max()).sum()) for z in (p, q))
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum()))


def _distance(a: npt.NDArray[Any] | None, b: npt.NDArray[Any] | None) -> float:
    """Largest absolute difference; inf where either is missing or not finite."""
    if a is None or b is None or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    return float(np.abs(a.astype(np.float64) - b).max(initial=0.0))


def _not_finite(name: str, state: State) -> str | None:
    for what, array in (("logits", state.logits), ("latent", state.latent)):
        if array is not None and (bad := int((~np.isfinite(array)).sum())):
            return f"the {name}'s {what} are not finite ({bad} of {array.size} numbers)"
    return None


def _check_prefill(decoder: StatefulDecoder, stepwise: State, prompt: list[int], reading: _Reading) -> PrefillCheck:
    """Read the prompt as a user would, and compare with the stepwise state at the same point."""
    try:
        policy, tolerance = reading
        state = decoder.prefill([prompt], policy=policy, tolerance=tolerance)
    except BackendError as error:
        return PrefillCheck(error=str(error))
    report = getattr(state, "prefill", PrefillReport(policy="stepwise", passes=1.0))
    caches = [
        _distance(one, other)
        for layer in range(decoder.config.n_layer)
        for one, other in zip(stepwise.cache(layer), state.cache(layer), strict=True)
    ]
    return PrefillCheck(
        policy=report.policy,
        passes=report.passes,
        residual=report.residual,
        max_abs_latent_error=_distance(stepwise.latent, state.latent) if decoder.config.memory else None,
        max_abs_logit_error=_distance(stepwise.logits, state.logits),
        max_abs_cache_error=max(caches),
        note=report.note,
    )
