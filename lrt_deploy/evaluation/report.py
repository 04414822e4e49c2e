"""The data of parity: measurements at each position, the parts of a verdict, and the report as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import msgspec

from lrt_deploy.tolerances import ParityLimits
from lrt_deploy.types import FloatArray, State

from .arithmetic import ArithmeticPart
from .stored_weights import WeightsPart


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
