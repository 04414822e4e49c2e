"""Roll out a decoder token by token, and measure two decoders against each other along the same tokens.

`rollout` is the loop over decode steps that parity, bisecting, recordings and bits per byte share. `compare_rollouts`
runs the reference and a decoder, each on its own state:

- teacher-forced: both read the prompt, then the tokens that the reference chooses greedily;
- free-running: the decoder reads its own choices; computed from the first divergence on.

Both read the prompt stepwise, so that an error of prefill cannot hide a fault; prefill is compared separately.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import BackendError, ParityError
from lrt_deploy.text.prompts import check_prompts
from lrt_deploy.tolerances import ParityLimits
from lrt_deploy.types import FloatArray, IntArray, PrefillPolicy, PrefillReport, State, StatefulDecoder

# Called with the current task, and how much of it is done, of what total.
Progress = Callable[[str, int, int], None]


def silent(task: str, done: int, total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Point:
    """Both sides after the token at `position`. Errors are maxima of absolute differences, inf where not finite.

    `latent_error` is None for a model without memory; `kl` is KL(reference || decoder) in nats; `margin` is the
    reference's best logit minus its second best; the tokens are each side's greedy choices. `key_errors` and
    `value_errors` are those of this position's entry in each layer's cache.
    """

    position: int
    logit_error: float
    latent_error: float | None
    kl: float
    margin: float
    reference_token: int
    decoder_token: int
    key_errors: tuple[float, ...] = ()
    value_errors: tuple[float, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether both sides' logits are finite."""
        return math.isfinite(self.logit_error)

    @property
    def same_top1(self) -> bool:
        """Whether both sides choose the same token."""
        return self.finite and self.reference_token == self.decoder_token


@dataclass(frozen=True)
class Divergence:
    """The first generated token that differs: number `step` from 0, chosen by the logits of `position`."""

    step: int
    position: int
    reference_token: int
    decoder_token: int
    margin: float
    near_tie: bool


@dataclass(frozen=True)
class PrefillCheck:
    """Prefill of the prompt against the decoder's own stepwise state at the same point.

    All fields are None where the rollout ended before that point; `error` is the message of a prefill that failed.
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
class Trace:
    """One side of the teacher-forced run: logits and latent after each token, and the last state."""

    memory: bool
    logits: list[FloatArray] = field(default_factory=list)  # (V) a position
    latents: list[FloatArray | None] = field(default_factory=list)  # (C) a position
    last: State | None = None

    def add(self, state: State) -> None:
        """Append copies of the logits and the latent of the state's first row."""
        self.logits.append(state.logits[0].copy())
        self.latents.append(state.latent[0].copy() if self.memory and state.latent is not None else None)
        self.last = state


@dataclass
class Comparison:
    """Two rollouts of reference and decoder, in the order of positions; `stopped` says why they ended early.

    `tokens` are the prompt and the reference's choices, which both sides read in the teacher-forced run (`points`);
    `free` is the run in which the decoder reads its own choices.
    """

    prompt_tokens: int
    steps: int
    points: list[Point] = field(default_factory=list)
    free: list[Point] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    prefill: PrefillCheck = field(default_factory=PrefillCheck)
    stopped: str | None = None
    reference: Trace = field(default_factory=lambda: Trace(memory=False))
    decoder: Trace = field(default_factory=lambda: Trace(memory=False))

    @property
    def choices(self) -> list[Point]:
        """The points of the teacher-forced run whose logits choose the generated tokens."""
        return self.choices_of(self.points)

    def choices_of(self, points: list[Point]) -> list[Point]:
        """Of `points`, those whose logits choose the generated tokens."""
        return points[self.prompt_tokens - 1 : self.prompt_tokens - 1 + self.steps]

    @property
    def parting(self) -> Point | None:
        """The first of the choices that differs."""
        return next((point for point in self.choices if point.finite and not point.same_top1), None)

    def first_divergence(self, limits: ParityLimits) -> Divergence | None:
        """Where the decoder on its own choices leaves the reference's tokens; None where it does not."""
        if (at := self.parting) is None:
            return None
        step, near_tie = at.position - (self.prompt_tokens - 1), at.margin <= limits.near_tie_margin
        return Divergence(step, at.position, at.reference_token, at.decoder_token, at.margin, near_tie)


AskedPrefill = tuple[PrefillPolicy, float | None]  # policy and tolerance, where prefill is checked


def rollout(
    decoder: StatefulDecoder,
    tokens: Iterable[Sequence[int] | IntArray],
    state: Any = None,  # noqa: ANN401 - the decoder's own state
) -> Iterator[tuple[Any, FloatArray]]:
    """Decode B sequences step by step; yield the state and its logits (B, V) after each step.

    `tokens` gives the (B) tokens of each position, at least one; it is read lazily, so that a token may depend on what
    was yielded before. Without `state` the rollout begins with empty sequences. The state advances in place: copy what
    must outlive the step.
    """
    columns = iter(tokens)
    if state is None:
        state = decoder.prefill([[int(token)] for token in next(columns)], policy="stepwise")
        yield state, state.logits
    for column in columns:
        yield state, decoder.step(state, column)


def kl_divergence(p: npt.NDArray[np.floating[Any]], q: npt.NDArray[np.floating[Any]]) -> float:
    """KL(softmax p || softmax q) in nats, of logits (V); computed in float64, where float32 would add noise of 3e-7."""
    log_p, log_q = (_log_softmax(z) for z in (p, q))
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum()))


def nats(logits: FloatArray, targets: Sequence[int] | IntArray) -> npt.NDArray[np.float64]:
    """-log softmax of logits (B, V) at the targets (B), in float64."""
    result: npt.NDArray[np.float64] = -_log_softmax(logits)[np.arange(len(targets)), targets]
    return result


def _log_softmax(logits: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    z = logits.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return result


def distance(a: npt.NDArray[Any] | None, b: npt.NDArray[Any] | None) -> float:
    """Largest absolute difference; inf where an array is missing or not finite."""
    if a is None or b is None or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    return float(np.abs(a.astype(np.float64) - b).max(initial=0.0))


def capacity_of(decoder: StatefulDecoder) -> int:
    """Tokens that a sequence of the decoder can hold."""
    return int(getattr(decoder, "max_seq_len", decoder.config.max_positions))


def compare_rollouts(
    reference: StatefulDecoder,
    decoder: StatefulDecoder,
    prompt: Sequence[int],
    steps: int,
    prefill: AskedPrefill,
    progress: Progress = silent,
) -> Comparison:
    """Run both rollouts over `prompt` and `steps` tokens, and check prefill.

    The result ends early where logits or latents are not finite or the decoder fails. Raises ParityError for models
    or lengths that cannot be compared, InputError for a prompt that cannot be read.
    """
    tokens = check_prompts([prompt], reference.config.vocab_size)[0].tolist()
    _check_comparable(reference, decoder, len(tokens), steps)
    memory = reference.config.memory
    run = Comparison(len(tokens), steps, tokens=tokens, reference=Trace(memory), decoder=Trace(memory))
    try:
        _teacher_forced(reference, decoder, run, prefill, progress)
        run.free = _free_running(decoder, run, progress)
    except BackendError as error:
        run.stopped = f"the rollout stopped at position {len(run.points)}: {error}"
    return run


def _check_comparable(reference: StatefulDecoder, decoder: StatefulDecoder, prompt_tokens: int, steps: int) -> None:
    """Refuse models whose logits, latents or caches differ in shape, and rollouts that they cannot hold."""
    for name in ("vocab_size", "memory", "n_embd", "n_layer"):
        expected, found = getattr(reference.config, name), getattr(decoder.config, name)
        if found != expected:
            raise ParityError(
                f"the decoder's model has {name} {found}, the reference's has {expected}, so there is nothing to "
                "compare; give the checkpoint that the bundle was exported from"
            )
    if steps < 1:
        raise ParityError(f"steps is {steps}, expected at least 1: parity is a rollout")
    total = prompt_tokens + steps
    for name, side in (("decoder", decoder), ("reference", reference)):
        if total > (capacity := capacity_of(side)):
            raise ParityError(
                f"{prompt_tokens} prompt tokens and {steps} steps are {total} tokens, and the {name} holds {capacity}; "
                "take fewer steps or a shorter prompt, or export with a larger --max-seq-len"
            )


def _teacher_forced(
    reference: StatefulDecoder, decoder: StatefulDecoder, run: Comparison, prefill: AskedPrefill, progress: Progress
) -> None:
    """Feed both sides the prompt, then the reference's choices, which are appended to `run.tokens`."""
    points, total = run.points, run.prompt_tokens + run.steps
    try:
        for (expected, _), (found, _) in zip(_along(reference, run.tokens), _along(decoder, run.tokens), strict=True):
            run.reference.add(expected)
            run.decoder.add(found)
            points.append(_measure(len(points), run.reference, found))
            progress("rollout", len(points), total)
            if fault := _not_finite("reference", expected) or _not_finite("decoder", found):
                run.stopped = f"{fault} at position {len(points) - 1}"
                return
            if len(points) == run.prompt_tokens:
                run.prefill = check_prefill(decoder, found, run.tokens[: run.prompt_tokens], prefill)
            if len(run.tokens) == len(points) < total:
                run.tokens.append(points[-1].reference_token)
    finally:
        points[:] = _with_cache_errors(points, run.reference.last, run.decoder.last, decoder.config.n_layer)


def _free_running(decoder: StatefulDecoder, run: Comparison, progress: Progress) -> list[Point]:
    """The points of the run in which the decoder reads its own choices."""
    if run.parting is None or run.stopped:
        return list(run.points)
    parts, total = run.parting.position, len(run.points)
    points = run.points[: parts + 1]
    tokens = [*run.tokens[: parts + 1], points[-1].decoder_token]
    for position, (state, _) in enumerate(_along(decoder, tokens)):
        if position <= parts:
            continue
        points.append(_measure(position, run.reference, state))
        progress("free-running rollout", len(points), total)
        if len(points) < total:
            tokens.append(points[-1].decoder_token)
    return _with_cache_errors(points, run.reference.last, state, decoder.config.n_layer)


def _along(decoder: StatefulDecoder, tokens: list[int]) -> Iterator[tuple[Any, FloatArray]]:
    return rollout(decoder, ([token] for token in tokens))


def _measure(position: int, reference: Trace, found: State) -> Point:
    p, q = reference.logits[position].astype(np.float64), found.logits[0]  # (V)
    latent = reference.latents[position]
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


def _with_cache_errors(
    points: Sequence[Point], expected: State | None, found: State | None, layers: int
) -> list[Point]:
    """The points with each layer's errors of K and V, read once at the end: a cache entry is written once.

    They are inf where an entry is missing or not finite.
    """
    if expected is None or found is None:
        return list(points)
    errors = np.full((2, len(points), layers), math.inf)
    for layer in range(layers):
        for kind, (one, other) in enumerate(zip(expected.cache(layer), found.cache(layer), strict=True)):
            count = min(one.shape[2], other.shape[2], len(points))  # (1, G, S, D)
            difference = np.abs(one[:, :, :count].astype(np.float64) - other[:, :, :count])
            errors[kind, :count, layer] = np.nan_to_num(difference.max(axis=(0, 1, 3)), nan=math.inf)
    keys, values = errors.tolist()
    return [replace(point, key_errors=tuple(keys[t]), value_errors=tuple(values[t])) for t, point in enumerate(points)]


def check_prefill(decoder: StatefulDecoder, stepwise: State, prompt: list[int], asked: AskedPrefill) -> PrefillCheck:
    """Prefill the prompt as requested, and compare with the decoder's stepwise state at the same point."""
    try:
        state = decoder.prefill([prompt], policy=asked[0], tolerance=asked[1])
    except BackendError as error:
        return PrefillCheck(error=str(error))
    report = getattr(state, "prefill", PrefillReport(policy="stepwise", passes=1.0))
    logits, latent, cache = state_errors(state, stepwise, decoder.config)
    return PrefillCheck(report.policy, report.passes, report.residual, latent, logits, cache, report.note)


def state_errors(found: State, expected: State, config: LRTConfig) -> tuple[float, float | None, float]:
    """Largest differences of logits, latent (None without memory) and caches between the last rows of two states."""
    length = int(expected.lengths[-1])  # a batch's cache is as long as its longest row
    caches = [
        distance(one[-1, :, :length], other[-1, :, :length])
        for layer in range(config.n_layer)
        for one, other in zip(found.cache(layer), expected.cache(layer), strict=True)
    ]
    latents = [None if state.latent is None else state.latent[-1] for state in (found, expected)]
    return distance(found.logits[-1], expected.logits[-1]), distance(*latents) if config.memory else None, max(caches)


def _not_finite(name: str, state: State) -> str | None:
    for part, array in (("logits", state.logits), ("latent", state.latent)):
        if array is not None and (bad := int((~np.isfinite(array)).sum())):
            return f"the {name}'s {part} are not finite ({bad} of {array.size} numbers)"
    return None
