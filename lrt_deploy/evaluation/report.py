"""What parity saw, position by position, and what it makes of that: the words that `rollout` writes and reports read.

It does not run anything (see `rollout`) and does not judge (see `verdict`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from lrt_deploy.tolerances import ParityLimits
from lrt_deploy.types import FloatArray, State

from .arithmetic import ArithmeticPart
from .stored_weights import WeightsPart


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
    # Of this position's entry in each layer's cache.
    key_errors: tuple[float, ...] = ()
    value_errors: tuple[float, ...] = ()

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
class Trace:
    """One side of the teacher-forced rollout: what it computed after each token, and its state after the last."""

    memory: bool
    logits: list[FloatArray] = field(default_factory=list)  # (V) a position
    latents: list[FloatArray | None] = field(default_factory=list)  # (C) a position
    last: State | None = None

    def add(self, state: State) -> None:
        """Copy logits and latent of the state's first row."""
        self.logits.append(state.logits[0].copy())
        self.latents.append(state.latent[0].copy() if self.memory and state.latent is not None else None)
        self.last = state


@dataclass
class Rollout:
    """What was seen, in the order of positions; `stopped` says why it ended early.

    `tokens` are the prompt and what the reference chose, which both sides read in the teacher-forced run (`points`);
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
        """The points whose logits choose the generated tokens."""
        return self.choices_of(self.points)

    def choices_of(self, points: list[Point]) -> list[Point]:
        """Of these points, those from the prompt's last one on, without the very last."""
        return points[self.prompt_tokens - 1 : self.prompt_tokens - 1 + self.steps]

    def first_divergence(self, limits: ParityLimits) -> Divergence | None:
        """Where the decoder, fed with its own choices, would leave the reference's path."""
        for step, at in enumerate(self.choices):
            if at.finite and not at.same_top1:
                near_tie = at.margin <= limits.near_tie_margin
                return Divergence(step, at.position, at.reference_token, at.decoder_token, at.margin, near_tie)
        return None


@dataclass(frozen=True)
class Drift:
    """How the latent's error goes with position: medians over the first and the last quarter, and their ratio.

    Rounding gives 1 to 3. A quantity that feeds back with too little precision grows steadily.
    """

    first_quarter: float
    last_quarter: float
    growth: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> Drift | None:
        """None without memory, and for runs too short to have quarters."""
        errors = [point.latent_error for point in points if point.latent_error is not None]
        quarter = len(errors) // 4
        if quarter < 1:
            return None
        first, last = median(errors[:quarter]), median(errors[-quarter:])
        return cls(first, last, last / first if first > 0 else (math.inf if last > 0 else 1.0))


@dataclass(frozen=True)
class FreeRun:
    """The decoder on its own choices, against what the reference chose; the teacher-forced run until they part.

    After the first divergence the sides read different tokens, so errors there say how far apart two texts are.
    """

    token_agreement: float  # share of the generated tokens that are equal at the same position
    equal_tokens: int  # before the first divergence
    mean_kl: float
    points: tuple[Point, ...]

    @classmethod
    def of(cls, rollout: Rollout) -> FreeRun:
        """From what a rollout recorded; as far as it got."""
        choices = rollout.choices_of(rollout.free)
        same = [point.same_top1 for point in choices]
        kl = [point.kl for point in rollout.free] or [math.inf]
        equal = same.index(False) if False in same else len(same)
        agreement = sum(same) / max(1, rollout.steps) if rollout.points else math.nan
        return cls(agreement, equal, sum(kl) / len(kl), tuple(rollout.free))


@dataclass(frozen=True)
class QualityPart:
    """The part `quality` of a verdict: how good a model the decoder is, against the original in float32.

    Bits per byte are those of the prompt's own tokens, both sides stepwise; None without a tokenizer. `level` says that
    the model hardly prefers any token, so that first choices say little; `median_margin` is that of its best two
    logits.
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
    """What `comparison.compare` found, and the curves. inf stands for what is not finite or was not reached."""

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
    # What is beyond the fields that scripts rely on.
    max_abs_key_error: float
    max_abs_value_error: float
    drift: Drift | None
    free_running: FreeRun
    tokens: tuple[int, ...]
    # The parts of the verdict, None where a part was not judged: arithmetic and quality go with fewer bits than fp32.
    weights: WeightsPart | None = None
    arithmetic: ArithmeticPart | None = None
    quality: QualityPart | None = None
    provenance: Mapping[str, Any] | None = None
    bisect: Any = None  # a `bisect.Bisection`

    def to_dict(self) -> dict[str, Any]:
        """JSON types; the curves as columns under `positions`, null for numbers that are not finite."""
        fields = dataclasses.asdict(self)
        fields["weights"] = None if self.weights is None else self.weights.to_dict()
        if self.bisect is None:
            del fields["bisect"]
        fields["positions"] = _columns(fields.pop("points"))
        fields["free_running"]["positions"] = _columns(fields["free_running"].pop("points"))
        result: dict[str, Any] = as_json(fields)
        return result


def _columns(points: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {f.name: [point[f.name] for point in points] for f in dataclasses.fields(Point)}


def as_json(value: Any) -> Any:  # noqa: ANN401 - any JSON type
    """JSON has no number for what is not finite."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
