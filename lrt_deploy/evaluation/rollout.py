"""Drive the reference and a decoder along the same tokens, and measure both after each: what parity is made of.

Two rollouts. Teacher-forced: both sides read the prompt token by token, then what the reference chooses greedily, each
carrying its own state. Free-running: the decoder reads its own choices instead. As long as those are the reference's,
the two are one and the same run, so the free one is computed from the first divergence on only.

Both begin stepwise, so that prefill's error never hides a fault; how the decoder reads the prompt in one go is checked
beside them. Judges nothing: see `parity_report`. Knows no backend, no files and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lrt_deploy.errors import BackendError
from lrt_deploy.types import FloatArray, PrefillPolicy, PrefillReport, State, StatefulDecoder

from .report import Point, PrefillCheck, Rollout, Trace

# Called with what is being done, and done and total of it.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reading:
    """How a prompt is read where prefill is checked."""

    policy: PrefillPolicy = "auto"
    tolerance: float | None = None


def roll_out(
    reference: StatefulDecoder,
    decoder: StatefulDecoder,
    prompt: list[int],
    steps: int,
    reading: Reading,
    progress: Progress,
) -> Rollout:
    """Both rollouts over `prompt` and `steps` tokens, and the check of prefill.

    Ends early where numbers end or the decoder fails, which is a result too.
    """
    memory = reference.config.memory
    rollout = Rollout(len(prompt), steps, tokens=list(prompt), reference=Trace(memory), decoder=Trace(memory))
    try:
        _teacher_forced(reference, decoder, rollout, reading, progress)
        rollout.free = _free_running(decoder, rollout, progress)
    except BackendError as error:
        rollout.stopped = f"the rollout stopped at position {len(rollout.points)}: {error}"
    return rollout


def _teacher_forced(
    reference: StatefulDecoder,
    decoder: StatefulDecoder,
    rollout: Rollout,
    reading: Reading,
    progress: Progress,
) -> None:
    """Feed both sides the prompt, then the reference's choices."""
    tokens, points, seen = rollout.tokens, rollout.points, rollout.reference
    total = rollout.prompt_tokens + rollout.steps
    expected = reference.prefill([tokens[:1]], policy="stepwise")
    found = decoder.prefill([tokens[:1]], policy="stepwise")
    try:
        while True:
            seen.add(expected)
            rollout.decoder.add(found)
            points.append(_measure(len(points), seen, found))
            progress("rollout", len(points), total)
            if fault := _not_finite("reference", expected) or _not_finite("decoder", found):
                rollout.stopped = f"{fault} at position {len(points) - 1}"
                return
            if len(points) == rollout.prompt_tokens:
                rollout.prefill = check_prefill(decoder, found, tokens[: rollout.prompt_tokens], reading)
            if len(points) == total:
                return
            if len(points) == len(tokens):
                tokens.append(points[-1].reference_token)
            reference.step(expected, [tokens[len(points)]])
            decoder.step(found, [tokens[len(points)]])
    finally:
        rollout.points[:] = with_cache_errors(points, expected, found, decoder.config.n_layer)


def _free_running(decoder: StatefulDecoder, rollout: Rollout, progress: Progress) -> list[Point]:
    """The decoder on its own choices; the points of the teacher-forced run up to where they part."""
    parts = next((point.position for point in rollout.choices if point.finite and not point.same_top1), None)
    if parts is None or rollout.stopped:
        return list(rollout.points)
    points, total = rollout.points[: parts + 1], len(rollout.points)
    state = decoder.prefill([rollout.tokens[:1]], policy="stepwise")
    for token in rollout.tokens[1 : parts + 1]:
        decoder.step(state, [token])
    while len(points) < total:
        decoder.step(state, [points[-1].decoder_token])
        points.append(_measure(len(points), rollout.reference, state))
        progress("free-running rollout", len(points), total)
    assert rollout.reference.last is not None
    return with_cache_errors(points, rollout.reference.last, state, decoder.config.n_layer)


def _measure(position: int, seen: Trace, found: State) -> Point:
    """The decoder's state against what the reference had at this position."""
    p, q = seen.logits[position].astype(np.float64), found.logits[0].astype(np.float64)  # (V)
    latent = seen.latents[position]
    error = distance(p, q)
    finite = math.isfinite(error)
    kth = max(0, p.size - 2)
    second, best = np.partition(p, kth)[[kth, -1]]
    return Point(
        position=position,
        logit_error=error,
        latent_error=None if latent is None else distance(latent, None if found.latent is None else found.latent[0]),
        kl=kl_divergence(p, q) if finite else math.inf,
        margin=float(best - second) if finite else math.inf,
        reference_token=int(p.argmax()),
        decoder_token=int(q.argmax()),
    )


def with_cache_errors(points: Sequence[Point], expected: State, found: State, layers: int) -> list[Point]:
    """The points with each layer's errors of K and V.

    A position's entry is written once, so both caches are read once, at the end of a rollout.
    """
    errors = [_cache_errors(expected.cache(i), found.cache(i), len(points)) for i in range(layers)]
    return [
        replace(point, key_errors=tuple(k[t] for k, _ in errors), value_errors=tuple(v[t] for _, v in errors))
        for t, point in enumerate(points)
    ]


def _cache_errors(
    expected: tuple[FloatArray, FloatArray], found: tuple[FloatArray, FloatArray], positions: int
) -> list[list[float]]:
    """K's and V's largest error at each position; inf where one side has no entry or no finite one."""
    result = []
    for one, other in zip(expected, found, strict=True):  # (1, G, S, D)
        count = min(one.shape[2], other.shape[2], positions)
        errors = np.full(positions, math.inf)
        difference = np.abs(one[:, :, :count].astype(np.float64) - other[:, :, :count])
        errors[:count] = np.nan_to_num(difference.max(axis=(0, 1, 3)), nan=math.inf)
        result.append(errors.tolist())
    return result


def check_prefill(decoder: StatefulDecoder, stepwise: State, prompt: list[int], reading: Reading) -> PrefillCheck:
    """Read the prompt as a user would, and compare with the stepwise state at the same point."""
    try:
        state = decoder.prefill([prompt], policy=reading.policy, tolerance=reading.tolerance)
    except BackendError as error:
        return PrefillCheck(error=str(error))
    report = getattr(state, "prefill", PrefillReport(policy="stepwise", passes=1.0))
    caches = [
        distance(one, other)
        for layer in range(decoder.config.n_layer)
        for one, other in zip(stepwise.cache(layer), state.cache(layer), strict=True)
    ]
    return PrefillCheck(
        policy=report.policy,
        passes=report.passes,
        residual=report.residual,
        max_abs_latent_error=distance(stepwise.latent, state.latent) if decoder.config.memory else None,
        max_abs_logit_error=distance(stepwise.logits, state.logits),
        max_abs_cache_error=max(caches),
        note=report.note,
    )


def kl_divergence(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    """KL(softmax p || softmax q) in nats, of logits (V) in float64; float32 would add noise of 3e-7."""
    log_p, log_q = (z - z.max() - np.log(np.exp(z - z.max()).sum()) for z in (p, q))
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum()))


def distance(a: npt.NDArray[Any] | None, b: npt.NDArray[Any] | None) -> float:
    """Largest absolute difference; inf where either is missing or not finite."""
    if a is None or b is None or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    return float(np.abs(a.astype(np.float64) - b).max(initial=0.0))


def _not_finite(name: str, state: State) -> str | None:
    for what, array in (("logits", state.logits), ("latent", state.latent)):
        if array is not None and (bad := int((~np.isfinite(array)).sum())):
            return f"the {name}'s {what} are not finite ({bad} of {array.size} numbers)"
    return None
