"""Names of the activations of a decode step, the same in the reference model and in the graphs.

The reference records them (`model.CacheOps.mark`), exported graphs name their values by them, and `evaluation.bisect`
compares them in the order of computation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .config import LRTConfig
from .types import FloatArray, State, StatefulDecoder

EMBEDDED = "embedded"
# Activation of a layer -> its meaning; shapes with the letters of `config`.
LAYER_ACTIVATIONS: dict[str, str] = {
    "mixed": "the residual stream with x0 and the latent mixed in by their lambdas, (B, T, C)",
    "normed": "its norm, which the projections and gates read, (B, T, C)",
    "heads": "the projections to q, k and v, (B, T, (H + 2G) D)",
    "gates": "one gate per kv head and source: local, memory, value embedding, (B, T, 3G)",
    "value_embeds": "the value embedding of the token, (B, T, G, D)",
    "memory_keys": "K memory projection of the latent, (B, T, G, D)",
    "memory_values": "V memory projection of the latent, (B, T, G, D)",
    "gated_keys": "k with the memory mixed in, (B, T, G, D)",
    "gated_values": "v with memory and value embedding mixed in, (B, T, G, D)",
    "queries": "q after RoPE and norm, (B, H, T, D)",
    "keys": "k after RoPE and norm, as it is cached, (B, G, T, D)",
    "attention": "what attention reads from the cache, (B, H, T, D)",
    "attended": "its output projection, (B, T, C)",
    "mlp_normed": "the norm of the residual stream before the MLP, (B, T, C)",
    "mlp_hidden": "the squared relu inside the MLP, (B, T, 4C)",
    "mlp": "the MLP's output, (B, T, C)",
}
# Graph outputs, by the names of `contract`.
LATENT, LOGITS = "present_latent", "logits"


def of_layer(layer: int, name: str) -> str:
    """Return the full name of a layer's activation."""
    return f"blocks.{layer}.{name}"


def in_order(config: LRTConfig) -> list[str]:
    """List all activations in the order of computation; a model may lack some of them."""
    names = [EMBEDDED]
    for layer in range(config.n_layer):
        names += [of_layer(layer, name) for name in LAYER_ACTIVATIONS]
        if config.memory and layer == config.source_layer:
            names.append(LATENT)
    return [*names, LOGITS]


def meaning(name: str) -> str:
    """Return the meaning of an activation, for messages."""
    known = {
        EMBEDDED: "the normed token embedding, (B, T, C)",
        LATENT: "the latent, m for the next position, (B, T, C)",
        LOGITS: "the softly capped logits, (B, K, V)",
    }
    return known.get(name) or LAYER_ACTIVATIONS[name.rpartition(".")[2]]


def layer_of(name: str) -> int | None:
    """Return the layer of an activation; None for one of no layer."""
    parts = name.split(".")
    return int(parts[1]) if len(parts) == 3 else None


# Most values are of the order of 1, because their inputs are normed. One that is small altogether, such as
# the squared relu of sums that all lie near 0, has the rounding of its inputs: relative to itself that would be large.
_SMALLEST_SCALE = 0.25


@dataclass(frozen=True)
class StepInput:
    """One decode step of one sequence, from a state given in full, so that two sides can take the same step."""

    token: int
    position: int
    latent: FloatArray  # (C) zeros at position 0; ignored by a model without memory
    keys: tuple[FloatArray, ...]  # L of (G, position, D)
    values: tuple[FloatArray, ...]  # L of (G, position, D)

    @classmethod
    def after(cls, state: State, token: int, config: LRTConfig) -> StepInput:
        """Return the step that reads `token` after the first row of `state`."""
        caches = [state.cache(i) for i in range(config.n_layer)]
        latent = state.latent
        return cls(
            token,
            caches[0][0].shape[2],
            np.zeros(config.n_embd, np.float32) if latent is None else latent[0].copy(),
            tuple(keys[0].copy() for keys, _ in caches),
            tuple(values[0].copy() for _, values in caches),
        )

    @classmethod
    def first(cls, token: int, config: LRTConfig) -> StepInput:
        """Return the step at position 0, with an empty cache and a latent of zeros."""
        empty = (np.zeros((config.n_kv_head, 0, config.head_dim), np.float32),) * config.n_layer
        return cls(token, 0, np.zeros(config.n_embd, np.float32), empty, empty)


class Observer(Protocol):
    """Runs single steps and returns the activations of each."""

    def observe(self, step: StepInput) -> dict[str, FloatArray]:
        """Run one step; return name -> value in float32, of the activations that this side has."""


class ObservedDecoder(Observer, StatefulDecoder, Protocol):
    """The reference, which decodes and returns the activations of a step."""


def relative_error(expected: FloatArray, found: FloatArray) -> float:
    """Return the largest difference as a share of the largest expected number, which counts as 0.25 at least.

    inf for arrays of different shapes and for numbers that are not finite.
    """
    if expected.shape != found.shape or not np.isfinite(found).all():
        return math.inf
    a = expected.astype(np.float64)
    scale = max(float(np.abs(a).max(initial=0.0)), _SMALLEST_SCALE)
    return float(np.abs(a - found).max(initial=0.0)) / scale
