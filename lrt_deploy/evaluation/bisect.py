"""Where does a difference begin? Name the first position, and there the first value and op, or the state, that is off.

At the first bad position both sides take one step from the same state, the reference's, and show their stages
(`stages`). The first stage in the order of computation that differs has a fault between it and the stages before it.
Where none differs, the graph computes what it should from that state, so the fault is in the state that it was given,
and `bisect_state` looks there.

Written against `stages.Observer`: it knows no torch, no graphs and no backend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrt_deploy import activations
from lrt_deploy.activations import ObservedDecoder, Observer, StepInput, relative_error
from lrt_deploy.tolerances import STAGE_ERROR, ParityLimits
from lrt_deploy.types import FloatArray, StatefulDecoder

from .bisect_state import StateFault, find_state_fault
from .report import ParityReport


@dataclass(frozen=True)
class StageError:
    """One stage of the step at the first bad position; `error` is relative to the largest number of the stage."""

    name: str
    error: float
    scale: float


@dataclass(frozen=True)
class Bisection:
    """What was found; `line` says it in one line.

    `kind` is `stage` (the first value that is off has a name), `state` (the step is right, what it was given is not),
    `call` (step and state are right, so the fault is between them), or `clean` (nothing is off). Of the parts of a
    verdict: `weights` (a stored matrix), `graph` (what no single step shows), `kernels` (what runs, not the graph),
    `quality` (no fault but what rounding costs).
    """

    kind: str
    line: str
    position: int | None = None
    layer: int | None = None
    tensor: str | None = None
    op: str | None = None
    state: StateFault | None = None
    stages: tuple[StageError, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return dataclasses.asdict(self)


def bisect(
    reference: ObservedDecoder,
    decoder: StatefulDecoder,
    probe: Observer,
    report: ParityReport,
    origins: Mapping[str, object],
) -> Bisection:
    """Follow up on `report`, the result of comparing the two. `probe` shows the stages of the decoder's graph.

    `origins` says for each stage how the graph computes it.
    """
    position = first_bad(report)
    if position is None:
        return Bisection("clean", "nothing to bisect: no position of the rollout is beyond the limits")
    token, config = report.tokens[position], reference.config
    step = StepInput.first(token, config)
    if position:
        step = StepInput.after(_replay(reference, report.tokens[:position]), token, config)
    compared = compare_stages(reference, probe, step)
    off = next((stage for stage in compared if not stage.error <= STAGE_ERROR), None)
    if off is not None:
        return _at_stage(off, position, compared, origins)
    fault = find_state_fault(reference, decoder, report.tokens, position)
    return _in_state(fault, position, compared)


def bisect_parts(
    reference: ObservedDecoder, probe: Observer, report: ParityReport, origins: Mapping[str, object]
) -> Bisection:
    """Name the part of a quantized bundle's verdict that fails, and its place.

    `reference` has the weights that the bundle stores and `probe` shows its graph in float32, so that their stages
    agree up to float32's noise wherever the graph is right.
    """
    arithmetic, quality = report.arithmetic, report.quality
    if arithmetic is not None and not arithmetic.graph.passed:
        return _in_graph(reference, probe, report, origins)
    if arithmetic is not None and not arithmetic.passed:
        line = f"{arithmetic.fault}; the graph itself computes every value right"
        if arithmetic.kernels is None or arithmetic.kernels.passed:
            return Bisection("graph", line)
        position = arithmetic.kernels.first_exceeded
        line += ": look at the kernels, and at the state that the decoder hands on (`--check all`)"
        return Bisection("kernels", line, position)
    if quality is not None and not quality.passed:
        worst = max(report.points, key=lambda point: point.kl)
        line = (
            "no part computes wrong: the stored weights are the checkpoint's, and the graph and its kernels compute "
            f"with them as they should. What is lost is lost by rounding (largest KL {worst.kl:.1e} at position "
            f"{worst.position}): keep more matrices precise (--keep-high), round by GPTQ (--compensate), or take more "
            "bits"
        )
        return Bisection("quality", line, worst.position)
    return Bisection("clean", "nothing to bisect: no part is beyond its limits")


def _in_graph(
    reference: ObservedDecoder, probe: Observer, report: ParityReport, origins: Mapping[str, object]
) -> Bisection:
    """The first value that the graph computes wrong, at the first position beyond the limits or the worst one."""
    assert report.arithmetic is not None
    errors = report.arithmetic.graph
    compared: tuple[StageError, ...] = ()
    for position in (errors.first_exceeded, errors.worst_position):
        if position is None:
            continue
        token, config = report.tokens[position], reference.config
        step = StepInput.first(token, config)
        if position:
            step = StepInput.after(_replay(reference, report.tokens[:position]), token, config)
        compared = compare_stages(reference, probe, step)
        if off := next((stage for stage in compared if not stage.error <= STAGE_ERROR), None):
            return _at_stage(off, position, compared, origins)
    line = f"{report.arithmetic.fault}; one step by itself computes every value right, so it reads several tokens wrong"
    return Bisection("graph", line, errors.first_exceeded, stages=compared)


def first_bad(report: ParityReport) -> int | None:
    """The first position beyond the limits; where errors are not bounded, the one with the largest KL."""
    if not report.points:
        return 0
    if report.limits.top1_agreement is not None:
        return max(report.points, key=lambda point: point.kl).position
    for point in report.points:
        bounds = _bounded(report.limits)
        errors = (point.logit_error, point.latent_error or 0.0, max(point.key_errors, default=0.0))
        if any(not error <= bound for error, bound in zip(errors, bounds, strict=True)):
            return point.position
    return None


def compare_stages(reference: Observer, probe: Observer, step: StepInput) -> tuple[StageError, ...]:
    """Both sides take `step`; the stages that both have, in the order of computation."""
    expected, found = reference.observe(step), probe.observe(step)
    # Marked in the order of computation; latent and logits come last, an earlier source layer's latent too.
    return tuple(_stage_error(name, expected[name], found[name]) for name in expected if name in found)


def _bounded(limits: ParityLimits) -> tuple[float, float, float]:
    """Keys are normed as the latent is; values are not, so an absolute bound on them would say nothing."""
    return limits.max_abs_logit_error, limits.max_abs_latent_error, limits.max_abs_cache_error


def _stage_error(name: str, expected: FloatArray, found: FloatArray) -> StageError:
    """Layouts agree but for axes of size 1, so the numbers are compared in order."""
    scale = float(np.abs(expected).max(initial=0.0))
    return StageError(name, relative_error(expected.reshape(-1), found.reshape(-1)), scale)


def _replay(decoder: StatefulDecoder, tokens: tuple[int, ...]) -> Any:  # noqa: ANN401 - a State of this decoder
    state = decoder.prefill([[tokens[0]]], policy="stepwise")
    for token in tokens[1:]:
        decoder.step(state, [token])
    return state


def _at_stage(
    off: StageError, position: int, compared: tuple[StageError, ...], origins: Mapping[str, object]
) -> Bisection:
    op, layer = str(origins.get(off.name, "")) or None, activations.layer_of(off.name)
    line = (
        f"begins at position {position} in {off.name} ({activations.meaning(off.name)}), which is off by "
        f"{off.error:.1e} of its largest number (limit {STAGE_ERROR:.0e}) though everything before it is right"
    )
    if op:
        line += f"; it is computed by {op}"
    return Bisection("stage", line, position, layer, off.name, op, None, compared)


def _in_state(fault: StateFault | None, position: int, compared: tuple[StageError, ...]) -> Bisection:
    right = f"begins at position {position}; from the reference's state the graph computes every stage right there"
    if fault is None:
        line = f"{right}, and the decoder's own state is right too: look at what else it is called with"
        return Bisection("call", line, position, stages=compared)
    line = f"{right}, so no layer is at fault but the state: {fault.what}"
    return Bisection("state", line, position, fault.layer, fault.tensor, None, fault, compared)
