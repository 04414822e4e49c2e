"""Read prompts by policy: stepwise, fixed-point, zero, or auto (one of the first two, by length).

Stepwise reads a batch together; rows of different length start at different times and end together, so that one last
step gives all logits. The other policies read row by row: a pass over a prompt is bound by arithmetic, so a batch would
gain nothing, and a row is read the same way whatever shares its batch.

With `reuse`, tokens that a state shares with the prompts are kept, unless it was read less exactly than is requested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lrt_deploy.bundle.weights import matrix_elements
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import InputError
from lrt_deploy.fields import LARGEST_COUNT, check_choice, check_is, check_number, check_whole
from lrt_deploy.runtime.backends.base import BlockLimits, StateBuffers
from lrt_deploy.tolerances import DEFAULT_PREFILL_TOLERANCE, PrefillLimits, prefill_limits
from lrt_deploy.types import PREFILL_POLICIES, FloatArray, IntArray, PrefillPolicy, PrefillReport

from .fixed_point import InBlocks, RowReading, SweepOptions, read_row, read_row_once
from .state import Reading

ZERO_NOTE = "zero memory: this is not the model as trained"


@dataclass(frozen=True)
class PrefillOptions:
    """How a decoder reads prompts. `auto` reads prompts of fewer tokens than `stepwise_below` stepwise.

    `stepwise_below` None: by precision and size of the model, see `resolve`; `LARGEST_COUNT`: `auto` never iterates.
    """

    stepwise_below: int | None = None
    sweeps: SweepOptions = field(default_factory=SweepOptions)
    note: str | None = None  # what the backend does not allow, for the report

    def __post_init__(self) -> None:
        if self.stepwise_below is not None:
            check_whole(self.stepwise_below, "stepwise_below")
        check_is(self.sweeps, SweepOptions, "sweeps")

    def clamp(self, limits: BlockLimits) -> PrefillOptions:
        """Return these options as far as a backend can follow them."""
        options, sweeps = self, self.sweeps
        if limits.tokens is not None:
            chunk, largest = (min(n, limits.tokens) for n in (sweeps.chunk_tokens, sweeps.largest_chunk_tokens))
            sweeps = replace(sweeps, chunk_tokens=chunk, largest_chunk_tokens=largest)
        if limits.in_order:
            sweeps = replace(sweeps, stride=1)
            options = replace(options, note="iterated with stride 1, the only one on this backend")
        if not limits.auto_iterates and options.stepwise_below is None:
            options = replace(options, stepwise_below=LARGEST_COUNT)
        return replace(options, sweeps=sweeps)


# From which length `auto` iterates, by precision, for small, medium and large models: where passes ÷ (time of a step ÷
# time of a token in a block) falls below 1, measured with ort-cpu (docs/numerics.md). A step of a small model is the
# cost of launching its ops, and one of a large model that of reading its weights from memory; a block divides both
# among its tokens. In between weights come from the cache, and a block of MatMulNBits gains less than passes cost.
_SMALL_ELEMENTS, _MEDIUM_ELEMENTS = 4 * 2**20, 16 * 2**20
_NEVER = LARGEST_COUNT
_STEPWISE_BELOW = {
    "fp32": (_NEVER, 32, 16),
    "fp16": (_NEVER, 32, 32),
    "bf16": (_NEVER, 32, 32),  # not measured
    "int8": (16, 32, 16),
    "int8-weight-only": (32, _NEVER, 32),
    "int4-weight-only": (48, _NEVER, 64),
}


def resolve(options: PrefillOptions, config: LRTConfig, precision: str = "fp32") -> PrefillOptions:
    """Set `stepwise_below` where it is None, by precision and size: a bundle reads alike wherever it is opened."""
    if options.stepwise_below is not None:
        return options
    elements = matrix_elements(config)
    size = (elements > _SMALL_ELEMENTS) + (elements > _MEDIUM_ELEMENTS)
    return replace(options, stepwise_below=_STEPWISE_BELOW.get(precision, _STEPWISE_BELOW["fp32"])[size])


@dataclass(frozen=True)
class PrefillRequest:
    """Checked options of one call."""

    policy: PrefillPolicy = "auto"
    tolerance: float = DEFAULT_PREFILL_TOLERANCE
    precision: str = "fp32"

    @classmethod
    def of(
        cls, policy: PrefillPolicy, tolerance: float | None, memory: bool, precision: str = "fp32"
    ) -> PrefillRequest:
        """Check a policy and a tolerance (None: the precision's default) for a model with or without memory."""
        check_choice(policy, "prefill policy", PREFILL_POLICIES)
        if policy == "zero" and not memory:
            raise InputError(
                "prefill policy zero is for models with memory; this one has none, any other policy is exact"
            )
        if tolerance is None:
            return cls(policy, prefill_limits(precision).default, precision)
        return cls(policy, check_number(tolerance, "tolerance", 0), precision)  # the largest error of the latent

    @property
    def limits(self) -> PrefillLimits:
        """What the precision can estimate."""
        return prefill_limits(self.precision)

    @property
    def reuses(self) -> bool:
        """Whether states may be reused; zero memory would not be zero after one."""
        return self.policy != "zero"

    def accepts(self, read_within: float) -> bool:
        """Return whether tokens whose latent has at most this error may be reused."""
        return self.reuses and read_within <= (0.0 if self.policy == "stepwise" else self.tolerance)


@dataclass(frozen=True)
class Place:
    """Where prompts are read to: the buffers of a state, after the first `past` (B) tokens of its rows."""

    buffers: StateBuffers
    past: Sequence[int]
    memory: bool


def read_prompts(
    place: Place, rows: Sequence[IntArray], request: PrefillRequest, options: PrefillOptions
) -> InBlocks[Reading]:
    """Read `rows` (B) of one or more tokens into the buffers; the caller decides whether the result counts."""
    policies = [policy_of(row, place.memory, request, options) for row in rows]
    if all(policy == "stepwise" for policy in policies):
        reading = read_stepwise(place, rows, stepwise_note(request))
    else:
        place.buffers.expect(max(place.past[i] + len(row) for i, row in enumerate(rows)))
        found = []
        for i, (row, policy) in enumerate(zip(rows, policies, strict=True)):
            found.append((yield from _read_row(place, i, row, policy, request, options)))
        place.buffers.set_latent(np.arange(len(rows)), np.stack([row.latents[-1] for row in found]))
        report = _report(rows, found, request)
        if report.policy == "fixed-point" and place.memory:
            report = replace(report, note=options.note)
        reading = Reading(np.stack([row.logits for row in found]), [list(row.latents) for row in found], report)
    if request.policy == "auto":
        reading = reading._replace(report=replace(reading.report, stepwise_below=options.stepwise_below))
    return reading


def read_stepwise(place: Place, rows: Sequence[IntArray], note: str | None = None) -> Reading:
    """Read `rows` with one decode step per token, the head in the last one alone.

    Until a row starts, its place in the batch holds a placeholder token without effect: its cache slot is overwritten
    by the row's first token, and the latent is put back.
    """
    buffers, past = place.buffers, np.array(place.past)
    counts = np.array([len(row) for row in rows])
    steps = int(counts.max())
    starts = steps - counts  # (B) the step at which each row begins
    padded = np.stack(
        [np.concatenate([np.repeat(row[:1], start), row]) for row, start in zip(rows, starts, strict=True)]
    )
    carried = buffers.latent[: len(rows)].copy()
    latents: list[list[FloatArray]] = [[] for _ in rows]
    logits: FloatArray | None = None
    for t in range(steps):
        logits = buffers.decode(padded[:, t], past + np.maximum(0, t - starts), head=t == steps - 1)
        after = np.array(buffers.latent[: len(rows)])  # (B, C), a copy
        waiting = np.flatnonzero(t < starts)
        for row in np.flatnonzero(t >= starts).tolist():
            latents[row].append(after[row])
        if waiting.size:
            buffers.set_latent(waiting, carried[waiting])
    assert logits is not None
    report = PrefillReport("stepwise", passes=steps * len(rows) / int(counts.sum()), note=note)
    return Reading(logits, latents, report)


def policy_of(row: IntArray, memory: bool, request: PrefillRequest, options: PrefillOptions) -> str:
    """Return how one row is read: by the request and the row's own length, whatever the other rows are."""
    if request.policy in ("stepwise", "zero"):
        return request.policy
    if not memory:  # without memory one parallel pass is exact
        return "fixed-point"
    if request.tolerance < request.limits.smallest:
        return "stepwise"
    assert options.stepwise_below is not None  # resolved
    return "stepwise" if request.policy == "auto" and len(row) < options.stepwise_below else "fixed-point"


def common_prefix(first: IntArray, second: IntArray) -> int:
    """Count the leading tokens that are the same."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if different.size else length


def shared_tokens(
    tokens: Sequence[Sequence[int]], rows: Sequence[IntArray], read_within: float, request: PrefillRequest
) -> list[int]:
    """Count the tokens of each prompt that rows which hold `tokens` have already read, as exactly as is requested.

    A prompt that is wholly there is left one token to read when others have some: all rows are read together.
    """
    if not request.accepts(read_within):
        return [0] * len(rows)
    shared = [common_prefix(np.array(held), row) for held, row in zip(tokens, rows, strict=True)]
    if any(count < len(row) for count, row in zip(shared, rows, strict=True)):
        shared = [min(count, len(row) - 1) for count, row in zip(shared, rows, strict=True)]
    return shared


def reused(report: PrefillReport, shared: Sequence[int], rows: Sequence[IntArray], read_within: float) -> PrefillReport:
    """Return the report of reading what follows `shared` tokens, which were read within an error of `read_within`.

    Passes are counted over whole prompts, and the residual is not below the error of what was reused.
    """
    total = sum(len(row) for row in rows)
    passes = report.passes * (total - sum(shared)) / total
    residual = max(report.residual or 0.0, read_within) if any(shared) and read_within else report.residual
    return replace(report, passes=passes, residual=residual, reused_tokens=sum(shared))


def stepwise_note(request: PrefillRequest) -> str | None:
    """Return why a prompt is read stepwise that was to be iterated, if that is so."""
    if request.policy == "stepwise" or request.tolerance >= request.limits.smallest:
        return None
    return (
        f"read stepwise: {request.precision} estimates no error below {request.limits.smallest:.0e}, "
        f"and {request.tolerance:.0e} was asked for"
    )


def _read_row(
    place: Place, index: int, row: IntArray, policy: str, request: PrefillRequest, options: PrefillOptions
) -> InBlocks[RowReading]:
    buffers, past = place.buffers, place.past[index]
    if policy == "zero" or not place.memory:
        return read_row_once(buffers, index, row, past, options.sweeps)
    sweeps = replace(options.sweeps, noise=request.limits.noise, noise_rms=request.limits.noise_rms)
    return read_row(buffers, index, row, past, None if policy == "stepwise" else request.tolerance, sweeps)


def _report(rows: Sequence[IntArray], readings: Sequence[RowReading], request: PrefillRequest) -> PrefillReport:
    passes = sum(reading.computed for reading in readings) / sum(len(row) for row in rows)
    if request.policy == "zero":
        return PrefillReport("zero", passes, None, ZERO_NOTE)
    residual = max(reading.residual for reading in readings)  # chunks before the one that fell back were iterated
    fallbacks = [f"row {i} {reading.fallback}" for i, reading in enumerate(readings) if reading.fallback]
    if fallbacks:
        return PrefillReport("stepwise", passes, residual, f"finished stepwise: {'; '.join(fallbacks)}")
    return PrefillReport("fixed-point", passes, residual)
