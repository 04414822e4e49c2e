"""Read prompts into a state, by policy: stepwise, fixed-point, zero, or auto (one of the first two, by length).

Stepwise reads a batch together; rows of different length start at different times and end together, so that one last
step gives all logits. The iterated policies read row by row: a pass over a prompt is bound by arithmetic, so a batch
would gain nothing, and a row is read the same way whatever stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lrt_deploy.arguments import LARGEST_COUNT, check_choice, check_is, check_number, check_whole
from lrt_deploy.bundle.weights import matrix_elements
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import InputError
from lrt_deploy.runtime.backends.base import BlockLimits, StateBuffers
from lrt_deploy.tolerances import DEFAULT_PREFILL_TOLERANCE, PrefillLimits, prefill_limits
from lrt_deploy.types import PREFILL_POLICIES, FloatArray, IntArray, PrefillPolicy, PrefillReport

from .fixed_point import Reading, SweepOptions, read_row, read_row_once, read_row_stepwise
from .latent_history import LatentHistory

ZERO_NOTE = "zero memory: this is not the model as trained"


@dataclass(frozen=True)
class PrefillOptions:
    """Settled once when a decoder is opened. `auto` reads prompts of fewer tokens than `stepwise_below` stepwise.

    `stepwise_below` None: by the size of the model, see `settle`; `LARGEST_COUNT`: `auto` never iterates.
    """

    stepwise_below: int | None = None
    sweeps: SweepOptions = field(default_factory=SweepOptions)
    note: str | None = None  # what the backend does not allow, for the report

    def __post_init__(self) -> None:
        if self.stepwise_below is not None:
            check_whole(self.stepwise_below, "stepwise_below")
        check_is(self.sweeps, SweepOptions, "sweeps")

    def within(self, limits: BlockLimits) -> PrefillOptions:
        """These options as far as a backend can follow them."""
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


# Where iterating starts to pay, measured with ort-cpu (benchmarks/README.md): weights that must come from memory for
# every step make steps dear, and 24 tokens are read 1.7 x faster by iteration. Weights that stay in the processor's
# cache make them cheap: neither way wins by more than a tenth at any length, so that a prompt is read stepwise, which
# is exact, unless it is long.
_CACHED_ELEMENTS = 8 * 2**20  # 32 MiB in float32
_STEPWISE_BELOW_CACHED, _STEPWISE_BELOW = 256, 24


def settle(options: PrefillOptions, config: LRTConfig) -> PrefillOptions:
    """Options with a length for `auto`: a rule, no measurement, so that a bundle reads alike wherever it is opened."""
    if options.stepwise_below is not None:
        return options
    cached = matrix_elements(config) <= _CACHED_ELEMENTS
    return replace(options, stepwise_below=_STEPWISE_BELOW_CACHED if cached else _STEPWISE_BELOW)


@dataclass(frozen=True)
class PrefillRequest:
    """What a caller asked for, checked."""

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
    def allowed_error(self) -> float:
        """The largest error of the latent that this request puts up with."""
        return {"stepwise": 0.0, "zero": math.inf}.get(self.policy, self.tolerance)


@dataclass(frozen=True)
class Place:
    """Where prompts are read to: the memory of a state that was opened for it, after the first `past` (B) tokens."""

    buffers: StateBuffers
    history: LatentHistory
    past: Sequence[int]
    memory: bool


def read_prompts(
    place: Place, rows: Sequence[IntArray], request: PrefillRequest, options: PrefillOptions
) -> tuple[FloatArray, PrefillReport]:
    """Append `rows` to the sequences; returns logits (B, V) and the report.

    Whether they count is left to the caller, who commits them when the logits are found good.
    """
    ways = [way_of(row, place.memory, request, options) for row in rows]
    if all(way == "stepwise" for way in ways):
        logits, report = read_stepwise(place, rows, _stepwise_note(request))
    else:
        place.buffers.expect(max(place.past[i] + len(row) for i, row in enumerate(rows)))
        numbered = enumerate(zip(rows, ways, strict=True))
        readings = [_read_row(place, i, row, way, request, options) for i, (row, way) in numbered]
        for i, reading in enumerate(readings):
            place.history.write_row(i, place.past[i], reading.latents)
        place.buffers.set_latent(np.arange(len(rows)), np.stack([reading.latents[-1] for reading in readings]))
        logits, report = np.stack([reading.logits for reading in readings]), _report(rows, readings, request)
        if report.policy == "fixed-point" and place.memory:
            report = replace(report, note=options.note)
    if request.policy == "auto":
        report = replace(report, stepwise_below=options.stepwise_below)
    return logits, report


def read_stepwise(place: Place, rows: Sequence[IntArray], note: str | None = None) -> tuple[FloatArray, PrefillReport]:
    """Append `rows`, one decode step per token, the head in the last one alone.

    Until a row starts, its place in the batch holds a placeholder token whose effects are undone: the cache slot is
    overwritten by the row's first token, and the latent is put back.
    """
    buffers, past = place.buffers, np.array(place.past)
    counts = np.array([len(row) for row in rows])
    steps = int(counts.max())
    starts = steps - counts  # (B) the step at which each row begins
    padded = np.stack(
        [np.concatenate([np.repeat(row[:1], start), row]) for row, start in zip(rows, starts, strict=True)]
    )
    carried = buffers.latent[: len(rows)].copy()
    logits: FloatArray | None = None
    for t in range(steps):
        positions = past + np.maximum(0, t - starts)
        logits = buffers.decode(padded[:, t], positions, head=t == steps - 1)
        place.history.write_step(positions, buffers.latent[: len(rows)])
        waiting = np.flatnonzero(t < starts)
        if waiting.size:
            buffers.set_latent(waiting, carried[waiting])
    assert logits is not None
    return logits, PrefillReport("stepwise", passes=steps * len(rows) / int(counts.sum()), note=note)


def way_of(row: IntArray, memory: bool, request: PrefillRequest, options: PrefillOptions) -> str:
    """How one row is read, by its own length alone."""
    if request.policy in ("stepwise", "zero"):
        return request.policy
    if not memory:  # without memory one parallel pass is exact
        return "fixed-point"
    if request.tolerance < request.limits.smallest:
        return "stepwise"
    assert options.stepwise_below is not None  # settled
    return "stepwise" if request.policy == "auto" and len(row) < options.stepwise_below else "fixed-point"


def _stepwise_note(request: PrefillRequest) -> str | None:
    if request.policy == "stepwise" or request.tolerance >= request.limits.smallest:
        return None
    return (
        f"read stepwise: {request.precision} estimates no error below {request.limits.smallest:.0e}, "
        f"and {request.tolerance:.0e} was asked for"
    )


def _read_row(
    place: Place, index: int, row: IntArray, way: str, request: PrefillRequest, options: PrefillOptions
) -> Reading:
    buffers, past = place.buffers, place.past[index]
    if way == "zero" or not place.memory:
        return read_row_once(buffers, index, row, past, options.sweeps)
    if way == "stepwise":
        return read_row_stepwise(buffers, index, row, past)
    sweeps = replace(options.sweeps, noise=request.limits.noise)
    return read_row(buffers, index, row, past, request.tolerance, sweeps)


def _report(rows: Sequence[IntArray], readings: Sequence[Reading], request: PrefillRequest) -> PrefillReport:
    passes = sum(reading.computed for reading in readings) / sum(len(row) for row in rows)
    if request.policy == "zero":
        return PrefillReport("zero", passes, None, ZERO_NOTE)
    residual = max(reading.residual for reading in readings)  # chunks before the one that fell back were iterated
    fallbacks = [f"row {i} {reading.fallback}" for i, reading in enumerate(readings) if reading.fallback]
    if fallbacks:
        return PrefillReport("stepwise", passes, residual, f"finished stepwise: {'; '.join(fallbacks)}")
    return PrefillReport("fixed-point", passes, residual)
