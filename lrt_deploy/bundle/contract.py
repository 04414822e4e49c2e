"""The contract of the graphs: name, dtype and symbolic shape of every input and output, and which pairs are the state.

It follows from the model configuration alone. Symbolic dimensions: `batch` B, `tokens` T (new tokens in this call),
`capacity` S (cache slots), `rows` K (positions per batch row that get logits; 0 skips the head).

Two flavours of every graph compute the same numbers:
- `full` attends over the whole capacity under a boolean mask: static shapes, for TensorRT and CUDA;
- `windowed`, for CPUs, masks by `slot_positions`, for caches that the runtime keeps about as long as the context and in
  another order while a prefill refines tokens; where windows are far smaller than the capacity, it slices keys, values
  and mask to the live window, from a start per distinct window to `window_end`.

With host embeddings a graph holds no tables: rows of the new tokens come in instead of their ids, as float32.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from lrt_deploy.config import LRTConfig

Flavour = Literal["full", "windowed"]
FLAVOURS: tuple[Flavour, ...] = ("full", "windowed")
OPSET = 24

Dim = int | str


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output. `shape` holds sizes, or the names of symbolic dimensions."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    meaning: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return dataclasses.asdict(self) | {"shape": list(self.shape)}


@dataclass(frozen=True)
class StatePair:
    """A state tensor: it goes in as `past` and comes out as `present`.

    With `in_place`, present may be bound to past's buffer. The latent may not, because every layer reads it.
    """

    past: str
    present: str
    dtype: str
    shape: tuple[Dim, ...]
    initial: str = "zeros"
    in_place: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return dataclasses.asdict(self) | {"shape": list(self.shape)}


def past_cache(layer: int) -> tuple[str, str]:
    """Return the names of a layer's key and value cache as inputs."""
    return f"past_key_{layer}", f"past_value_{layer}"


def present_cache(layer: int) -> tuple[str, str]:
    """Return the names of a layer's key and value cache as outputs."""
    return f"present_key_{layer}", f"present_value_{layer}"


def window_start(window: int) -> str:
    """Return the name of the input with the first live slot of all layers of this window."""
    return f"window_start_{window}"


TOKEN_EMBEDS, VALUE_EMBEDS = "token_embeds", "value_embeds"
WINDOW_END = "window_end"
SLOT_POSITIONS = "slot_positions"


def distinct_windows(config: LRTConfig) -> tuple[int, ...]:
    """Return the attention windows that occur, ascending."""
    return tuple(sorted(set(config.windows)))


def state_pairs(config: LRTConfig, dtype: str = "float32") -> list[StatePair]:
    """Return the latent (where there is one), then all key caches, then all value caches."""
    cache: tuple[Dim, ...] = ("batch", config.n_kv_head, "capacity", config.head_dim)
    pairs = [
        StatePair(past_cache(layer)[kind], present_cache(layer)[kind], dtype, cache)
        for kind in (0, 1)
        for layer in range(config.n_layer)
    ]
    if config.memory:
        latent: tuple[Dim, ...] = ("batch", "tokens", config.n_embd)
        pairs.insert(0, StatePair("past_latent", "present_latent", dtype, latent, in_place=False))
    return pairs


def embedding_inputs(config: LRTConfig) -> list[TensorSpec]:
    """Return the inputs of a graph with host embeddings that replace `input_ids` and the tables."""
    tokens: tuple[Dim, ...] = ("batch", "tokens")
    specs = [TensorSpec(TOKEN_EMBEDS, "float32", (*tokens, config.n_embd), "row of wte for each token")]
    if layers := len(config.value_embed_layers):
        width = layers * config.kv_dim
        specs.append(TensorSpec(VALUE_EMBEDS, "float32", (*tokens, width), "row of value_embeds for each token"))
    return specs


def graph_inputs(
    config: LRTConfig, flavour: Flavour, dtype: str = "float32", host_embeddings: bool = False
) -> list[TensorSpec]:
    """Return the inputs in graph order; `tokens` is 1 in the decode-step graph."""
    tokens: tuple[Dim, ...] = ("batch", "tokens")
    ids = TensorSpec("input_ids", "int64", tokens, "token ids, 0 to vocab_size - 1")
    first, *last = embedding_inputs(config) if host_embeddings else [ids]
    indices: list[tuple[str, tuple[Dim, ...], str]] = [
        ("position_ids", tokens, "position of each token in its sequence"),
        ("write_index", ("batch",), "cache slot of the first token; the others follow it"),
        ("last_index", ("batch", "rows"), "which of the T tokens get logits; rows = 0 skips the head"),
    ]
    if flavour == "windowed":
        start = "first live slot: max(0, oldest position - window), or less"
        indices += [(window_start(window), (1,), start) for window in distinct_windows(config)]
        indices.append((WINDOW_END, (1,), "one past the last live slot"))
        indices.append((SLOT_POSITIONS, ("capacity",), "position held by each slot: 0, 1, 2, ... in order"))
    specs = [first, *(TensorSpec(name, "int64", shape, meaning) for name, shape, meaning in indices)]
    for pair in state_pairs(config, dtype):
        meaning = "cache, updated in place" if pair.in_place else "latent m for each token"
        specs.append(TensorSpec(pair.past, pair.dtype, pair.shape, meaning))
    return specs + last


def graph_outputs(config: LRTConfig, dtype: str = "float32") -> list[TensorSpec]:
    """Return the outputs in graph order."""
    vocabulary: tuple[Dim, ...] = ("batch", "rows", config.vocab_size)
    specs = [TensorSpec("logits", "float32", vocabulary, "softcapped logits of the chosen tokens")]
    for pair in state_pairs(config, dtype):
        meaning = "the cache" if pair.in_place else "m for the position after each"
        specs.append(TensorSpec(pair.present, pair.dtype, pair.shape, meaning))
    return specs


def describe(
    config: LRTConfig, flavour: Flavour, dtype: str = "float32", host_embeddings: bool = False
) -> dict[str, Any]:
    """Return the whole contract as JSON types, for the manifest and the graphs' metadata."""
    return {
        "opset": OPSET,
        "flavour": flavour,
        "inputs": [spec.to_dict() for spec in graph_inputs(config, flavour, dtype, host_embeddings)],
        "outputs": [spec.to_dict() for spec in graph_outputs(config, dtype)],
        "state": [pair.to_dict() for pair in state_pairs(config, dtype)],
    }
