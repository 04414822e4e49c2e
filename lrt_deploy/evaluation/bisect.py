"""Find where a difference begins: the first position, and there the first value and op, or the part of the state.

At the first bad position the reference and the decoder's graph take one step from the reference's state. A fault lies
between the first activation that differs and those before it. Where none differs, it lies in the state that the decoder
held, or read. Cache entries of the step tell which: those of layer 0 depend on the token and the latent alone, those of
layer n + 1 also on what layer n read from its cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lrt_deploy import activations
from lrt_deploy.activations import ObservedDecoder, Observer, StepInput, relative_error
from lrt_deploy.bundle import contract
from lrt_deploy.tolerances import ACTIVATION_ERROR
from lrt_deploy.types import FloatArray, StatefulDecoder

from .rollout import rollout
from .verdict import ParityReport

LATENT = "past_latent"  # in the contract


@dataclass(frozen=True)
class ActivationError:
    """One activation of the step at the first bad position; `error` is relative to `scale`, its largest number."""

    name: str
    error: float
    scale: float


@dataclass(frozen=True)
class StateFault:
    """A part of the state that is wrong: `tensor` by its name in the contract, `slot` of a cache."""

    what: str
    tensor: str
    layer: int | None = None
    slot: int | None = None


@dataclass(frozen=True)
class Bisection:
    """The place of a fault; `line` says it in one line.

    `kind` is `stage` (the first wrong activation has a name), `state` (the step is right, the state it read is not),
    `call` (step and state are right, so the fault is in the other inputs of the call), or `clean` (nothing is wrong).
    Parts of a verdict: `weights` (a stored matrix), `graph` (a fault that no single step shows), `kernels` (the kernels
    that run, not the graph), `quality` (no fault but the cost of rounding).
    """

    kind: str
    line: str
    position: int | None = None
    layer: int | None = None
    tensor: str | None = None
    op: str | None = None
    state: StateFault | None = None
    stages: tuple[ActivationError, ...] = ()


def bisect(
    reference: ObservedDecoder,
    decoder: StatefulDecoder,
    observer: Observer,
    report: ParityReport,
    producers: Mapping[str, str],
) -> Bisection:
    """Find the fault behind `report`, the comparison of the two.

    `observer` shows the activations of the decoder's graph; `producers` describes the op of each.
    """
    position = first_bad(report)
    if position is None:
        return Bisection("clean", "nothing to bisect: no position of the rollout is beyond the limits")
    compared, off = _first_off(reference, observer, report, position)
    if off is not None:
        return _at_activation(off, position, compared, producers)
    right = f"begins at position {position}; from the reference's state the graph computes every activation right there"
    fault = _find_state_fault(reference, decoder, report.tokens, position)
    if fault is None:
        line = f"{right}, and the decoder's own state is right too: look at what else it is called with"
        return Bisection("call", line, position, stages=compared)
    line = f"{right}, so no layer is at fault but the state: {fault.what}"
    return Bisection("state", line, position, fault.layer, fault.tensor, None, fault, compared)


def bisect_parts(
    reference: ObservedDecoder, observer: Observer, report: ParityReport, producers: Mapping[str, str]
) -> Bisection:
    """Name the part of a quantized bundle's verdict that fails, and its place.

    `reference` has the weights that the bundle stores and `observer` runs its graph in float32, so that their
    activations agree up to float32's noise wherever the graph is right.
    """
    arithmetic, quality = report.arithmetic, report.quality
    if arithmetic is not None and not arithmetic.passed:
        compared: tuple[ActivationError, ...] = ()
        graph = arithmetic.graph
        if not graph.passed:
            for position in (graph.first_exceeded, graph.worst_position):
                if position is not None:
                    compared, off = _first_off(reference, observer, report, position)
                    if off is not None:
                        return _at_activation(off, position, compared, producers)
            reads = "one step by itself computes every value right, so it reads several tokens wrong"
            return Bisection("graph", f"{arithmetic.fault}; {reads}", graph.first_exceeded, stages=compared)
        line = f"{arithmetic.fault}; the graph itself computes every value right"
        if arithmetic.kernels.passed:
            return Bisection("graph", line)
        line += ": look at the kernels, and at the state that the decoder hands on (`--check all`)"
        return Bisection("kernels", line, arithmetic.kernels.first_exceeded)
    if quality is not None and not quality.passed:
        worst = max(report.points, key=lambda point: point.kl)
        line = (
            "no part computes wrong: the stored weights are the checkpoint's, and the graph and its kernels compute "
            f"with them as they should. What is lost is lost by rounding (largest KL {worst.kl:.1e} at position "
            f"{worst.position}): keep more matrices precise (--keep-high), round by GPTQ in short blocks "
            "(--compensate --int4-block 32), or take more bits"
        )
        return Bisection("quality", line, worst.position)
    return Bisection("clean", "nothing to bisect: no part is beyond its limits")


def first_bad(report: ParityReport) -> int | None:
    """The first position beyond the limits; where errors are not bounded, the one with the largest KL."""
    limits = report.limits
    if not report.points:
        return 0
    if limits.top1_agreement is not None:
        return max(report.points, key=lambda point: point.kl).position
    # Keys are normed as the latent is; values are not, so an absolute bound on them would say nothing.
    bounds = limits.max_abs_logit_error, limits.max_abs_latent_error, limits.max_abs_cache_error
    for point in report.points:
        errors = (point.logit_error, point.latent_error or 0.0, max(point.key_errors, default=0.0))
        if any(not error <= bound for error, bound in zip(errors, bounds, strict=True)):
            return point.position
    return None


def compare_activations(reference: Observer, observer: Observer, step: StepInput) -> tuple[ActivationError, ...]:
    """Run `step` on both sides; errors of the activations that both have, in the order of computation."""
    expected, found = reference.observe(step), observer.observe(step)
    # Layouts agree but for axes of size 1, so the numbers are compared in order.
    return tuple(
        ActivationError(name, relative_error(value.ravel(), found[name].ravel()), float(np.abs(value).max(initial=0.0)))
        for name, value in expected.items()
        if name in found
    )


def _first_off(
    reference: ObservedDecoder, observer: Observer, report: ParityReport, position: int
) -> tuple[tuple[ActivationError, ...], ActivationError | None]:
    """All activations of the step at `position` from the reference's state, and the first that differs."""
    step = StepInput.first(report.tokens[position], reference.config)
    if position:
        state = reference.prefill([report.tokens[:position]], policy="stepwise")
        step = StepInput.after(state, report.tokens[position], reference.config)
    compared = compare_activations(reference, observer, step)
    return compared, next((one for one in compared if not one.error <= ACTIVATION_ERROR), None)


def _at_activation(
    off: ActivationError, position: int, compared: tuple[ActivationError, ...], producers: Mapping[str, str]
) -> Bisection:
    op, layer = producers.get(off.name), activations.layer_of(off.name)
    line = (
        f"begins at position {position} in {off.name} ({activations.meaning(off.name)}), which is off by "
        f"{off.error:.1e} of its largest number (limit {ACTIVATION_ERROR:.0e}) though everything before it is right"
        + (f"; it is computed by {op}" if op else "")
    )
    return Bisection("stage", line, position, layer, off.name, op, None, compared)


def _find_state_fault(
    reference: StatefulDecoder, decoder: StatefulDecoder, tokens: Sequence[int], position: int
) -> StateFault | None:
    """The part of the state that is wrong when the decoder reads tokens[position]; None if none can be named."""
    if position == 0:
        if not reference.config.memory:
            return None
        return StateFault(
            "there is no cache yet at position 0, so the latent that the decoder starts from is not the zeros it "
            "must be",
            LATENT,
        )
    sides = (rollout(side, ([token] for token in tokens[: position + 1])) for side in (reference, decoder))
    for t, ((expected, _), (found, _)) in enumerate(zip(*sides, strict=True)):
        if t >= position - 1:
            one, other = (StepInput.after(state, tokens[t], reference.config) for state in (expected, found))
        if t == position - 1 and (fault := _held(one, other)):
            return fault
    return _read(one, other, relative_error(expected.logits[0], found.logits[0]) <= ACTIVATION_ERROR)


def _held(expected: StepInput, found: StepInput) -> StateFault | None:
    """The first part of the state before the step that differs from the reference's."""
    if relative_error(expected.latent, found.latent) > ACTIVATION_ERROR:
        what = "the latent that the decoder holds before this position is not the one of the token before"
        return StateFault(what, LATENT)
    for layer in range(len(expected.keys)):
        sides = ((step.keys[layer], step.values[layer]) for step in (expected, found))
        for name, one, other in zip(contract.past_cache(layer), *sides, strict=True):
            slots = one.shape[1]
            if one.shape != other.shape:
                return StateFault(f"{name} holds {other.shape[1]} tokens, expected {slots}", name, layer)
            off = [slot for slot in range(slots) if relative_error(one[:, slot], other[:, slot]) > ACTIVATION_ERROR]
            if off:
                what = f"{name} is off in slot {off[0]} ({len(off)} of {slots} slots), before any other layer's"
                return StateFault(what, name, layer, off[0])
    return None


def _read(expected: StepInput, found: StepInput, same_logits: bool) -> StateFault | None:
    """The part of a right state that the step did not read, or not hand on; from the states after the step."""
    keys, values = (zip(getattr(expected, name), getattr(found, name), strict=True) for name in ("keys", "values"))
    right = [_same_entry(*key) and _same_entry(*value) for key, value in zip(keys, values, strict=True)]
    position = found.position - 1
    if all(right) and same_logits:
        if relative_error(expected.latent, found.latent) <= ACTIVATION_ERROR:
            return None
        return StateFault(
            f"the step at position {position} gives the right logits, but the latent that is held after it is "
            "not the one that it computed",
            LATENT,
        )
    first = right.index(False) if False in right else len(right)
    if first == 0:
        return StateFault(
            f"the step at position {position} writes wrong entries into the caches of layer 0, which depend on the "
            "latent alone: the latent that it reads is not the one that is held",
            LATENT,
        )
    if first == 1:
        return None  # layer 0's cache, or an input that all layers share, such as the mask
    layer = first - 1
    return StateFault(
        f"the step at position {position} goes wrong where layer {layer} attends over its cache: layers before it read "
        "theirs right, so what this layer reads is not what is held, or its window has wrong bounds",
        contract.past_cache(layer)[0],
        layer,
    )


def _same_entry(expected: FloatArray, found: FloatArray) -> bool:
    """Whether the newest entries of two caches (G, S, D) agree."""
    return relative_error(expected[:, -1], found[:, -1]) <= ACTIVATION_ERROR
