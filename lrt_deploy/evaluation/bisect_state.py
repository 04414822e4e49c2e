"""Which part of a decoder's state is off, where every layer computes what it should.

First the state is looked at: what the decoder holds before the first bad position, against the reference. A runtime may
also hold the right state and read another, so then its next two steps are explained: the reference takes them from the
decoder's own state with one part exchanged (an older latent, no latent, one layer without its newest entry). The
exchange that reproduces the decoder's numbers is what it does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lrt_deploy import activations
from lrt_deploy.activations import ObservedDecoder, StepInput, relative_error
from lrt_deploy.bundle import contract
from lrt_deploy.tolerances import STAGE_ERROR
from lrt_deploy.types import FloatArray, StatefulDecoder

LATENT = "past_latent"
_EXPLAINED_STEPS = 2  # at the first position after the start an older latent and none at all are the same: zeros


@dataclass(frozen=True)
class StateFault:
    """`tensor` by its name in the contract; `slot` is the cache slot, for caches."""

    what: str
    tensor: str
    layer: int | None = None
    slot: int | None = None


@dataclass(frozen=True)
class _Seen:
    """A decoder before and after one step: what it held, and what came out."""

    step: StepInput
    older_latent: FloatArray  # (C) held one step before
    latent: FloatArray | None  # (C) after the step
    logits: FloatArray  # (V)


def find_state_fault(
    reference: ObservedDecoder, decoder: StatefulDecoder, tokens: Sequence[int], position: int
) -> StateFault | None:
    """The part of the state that is off when the decoder reads tokens[position]; None if none can be named."""
    if position == 0:
        if not reference.config.memory:
            return None
        return StateFault(
            "there is no cache yet at position 0, so the latent that the decoder starts from is not the zeros it "
            "must be",
            LATENT,
        )
    expected = _watch(reference, tokens, position, position + 1)[0].step
    seen = _watch(decoder, tokens, position, min(position + _EXPLAINED_STEPS, len(tokens)))
    return _held(expected, seen[0].step) or _lost(reference, seen[0]) or _explained(reference, seen)


def _held(expected: StepInput, found: StepInput) -> StateFault | None:
    """What the decoder holds before the step, against what it should."""
    if relative_error(expected.latent, found.latent) > STAGE_ERROR:
        return StateFault(
            "the latent that the decoder holds before this position is not the one of the token before", LATENT
        )
    for layer in range(len(expected.keys)):
        for name, one, other in (
            (contract.past_key(layer), expected.keys[layer], found.keys[layer]),
            (contract.past_value(layer), expected.values[layer], found.values[layer]),
        ):
            if one.shape != other.shape:
                return StateFault(f"{name} holds {other.shape[1]} tokens, expected {one.shape[1]}", name, layer)
            off = [slot for slot in range(one.shape[1]) if relative_error(one[:, slot], other[:, slot]) > STAGE_ERROR]
            if off:
                return StateFault(
                    f"{name} is off in slot {off[0]} ({len(off)} of {one.shape[1]} slots), before any other layer's",
                    name,
                    layer,
                    off[0],
                )
    return None


def _lost(reference: ObservedDecoder, seen: _Seen) -> StateFault | None:
    """A step that gives the right logits, after which another latent is held than it computed."""
    observed = reference.observe(seen.step)
    if _same(observed, seen) or not _same(observed, dataclasses.replace(seen, latent=None)):
        return None
    return StateFault(
        f"the step at position {seen.step.position} gives the right logits, but the latent that is held after it is "
        "not the one that it computed",
        LATENT,
    )


def _explained(reference: ObservedDecoder, seen: list[_Seen]) -> StateFault | None:
    """The exchange that makes the reference compute what the decoder did, at every step that was seen."""
    for fault, exchange in _exchanges(seen[0].step, reference.config.memory):
        if all(_same(reference.observe(exchange(item)), item) for item in seen):
            return fault
    return None


# Of the step that was seen, the same step from a state with one part exchanged.
_Exchange = Callable[["_Seen"], StepInput]


def _exchanges(step: StepInput, memory: bool) -> Iterator[tuple[StateFault, _Exchange]]:
    begins = f"from position {step.position} on"
    if memory:
        yield (
            StateFault(f"{begins} tokens are read with the latent of one position earlier (memory shifted)", LATENT),
            lambda seen: dataclasses.replace(seen.step, latent=seen.older_latent),
        )
        yield (
            StateFault(f"{begins} tokens are read with a latent of zeros (no memory)", LATENT),
            lambda seen: dataclasses.replace(seen.step, latent=np.zeros_like(seen.step.latent)),
        )
    for layer in range(len(step.keys)):
        what = f"{begins} layer {layer} attends over a cache that lacks its newest entry (stale by one step)"
        yield (
            StateFault(what, contract.past_key(layer), layer, step.position - 1),
            functools.partial(_without_newest, layer),
        )


def _without_newest(layer: int, seen: _Seen) -> StepInput:
    def cleared(caches: tuple[FloatArray, ...]) -> tuple[FloatArray, ...]:
        cache = caches[layer].copy()
        cache[:, -1] = 0.0
        return (*caches[:layer], cache, *caches[layer + 1 :])

    return dataclasses.replace(seen.step, keys=cleared(seen.step.keys), values=cleared(seen.step.values))


def _watch(decoder: StatefulDecoder, tokens: Sequence[int], start: int, end: int) -> list[_Seen]:
    """What the decoder holds before it reads each of tokens[start:end], start > 0, and what comes out of reading it."""
    config, seen = decoder.config, []
    state = decoder.prefill([[tokens[0]]], policy="stepwise")
    older = np.zeros(config.n_embd, np.float32)
    for t in range(1, end):
        step = StepInput.after(state, tokens[t], config)
        logits = decoder.step(state, [tokens[t]])[0].copy()
        if t >= start:
            latent = None if state.latent is None else state.latent[0].copy()
            seen.append(_Seen(step, older, latent, logits))
        older = step.latent
    return seen


def _same(observed: dict[str, FloatArray], seen: _Seen) -> bool:
    """Whether a step of the reference gives what the decoder gave."""
    logits = observed[activations.LOGITS].reshape(-1)
    if relative_error(logits, seen.logits) > STAGE_ERROR:
        return False
    if seen.latent is None or activations.LATENT not in observed:
        return True
    return relative_error(observed[activations.LATENT].reshape(-1), seen.latent) <= STAGE_ERROR
