"""The contract of the graphs: name, dtype and symbolic shape of every input and output, and which pairs are the state.

Exporters name graph values by it, the runtime binds by it, the manifest and the graphs' metadata carry it. It follows
from the model configuration alone. Symbolic dimensions: `batch` B, `tokens` T (new tokens in this call), `capacity` S
(cache slots), `rows` K (positions per batch row that get logits; 0 skips the head).

Two flavours of every graph compute the same numbers:
- `full` attends over the whole capacity under a boolean mask: static shapes, what TensorRT and CUDA want;
- `windowed` masks by `slot_positions`, for caches that the runtime keeps about as long as the context, and slices keys,
  values and mask to the live window where windows are far smaller than the capacity: what a CPU wants.
  It has further inputs: a start per distinct attention window, `window_end`, and `slot_positions`, which lets a prefill
  keep the tokens that it is still refining in another order than that of their positions.

With host embeddings a graph holds no tables: rows of the new tokens come in instead of their ids, as float32.
"""

from __future__ import annotations

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
        """As JSON types."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "meaning": self.meaning}


@dataclass(frozen=True)
class StatePair:
    """A state tensor: what goes in as `past`, comes out as `present`, and starts as zeros."""

    past: str
    present: str
    dtype: str
    shape: tuple[Dim, ...]
    in_place: bool  # present may be bound to past's buffer; the latent may not, because every layer reads it

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "past": self.past,
            "present": self.present,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "initial": "zeros",
            "in_place": self.in_place,
        }


def past_key(layer: int) -> str:
    """Name of a layer's key cache going in."""
    return f"past_key_{layer}"


def past_value(layer: int) -> str:
    """Name of a layer's value cache going in."""
    return f"past_value_{layer}"


def present_key(layer: int) -> str:
    """Name of a layer's key cache coming out."""
    return f"present_key_{layer}"


def present_value(layer: int) -> str:
    """Name of a layer's value cache coming out."""
    return f"present_value_{layer}"


def window_start(window: int) -> str:
    """Name of the input that says where the live window of all layers with this window begins."""
    return f"window_start_{window}"


TOKEN_EMBEDS, VALUE_EMBEDS = "token_embeds", "value_embeds"
WINDOW_END = "window_end"
SLOT_POSITIONS = "slot_positions"


_START_MEANING = "first live slot: max(0, oldest position - window), or less"


def distinct_windows(config: LRTConfig) -> tuple[int, ...]:
    """The attention windows that occur, ascending."""
    return tuple(sorted(set(config.windows)))


def state_pairs(config: LRTConfig, dtype: str = "float32") -> list[StatePair]:
    """Latent first (where there is one), then all key caches, then all value caches."""
    cache: tuple[Dim, ...] = ("batch", config.n_kv_head, "capacity", config.head_dim)
    layers = range(config.n_layer)
    pairs = [StatePair(past_key(i), present_key(i), dtype, cache, in_place=True) for i in layers]
    pairs += [StatePair(past_value(i), present_value(i), dtype, cache, in_place=True) for i in layers]
    if config.memory:
        latent: tuple[Dim, ...] = ("batch", "tokens", config.n_embd)
        pairs.insert(0, StatePair("past_latent", "present_latent", dtype, latent, in_place=False))
    return pairs


def embedding_inputs(config: LRTConfig) -> list[TensorSpec]:
    """What a graph with host embeddings takes: rows of `wte` in place of `input_ids`, and those of `value_embeds`."""
    tokens: tuple[Dim, ...] = ("batch", "tokens")
    specs = [TensorSpec(TOKEN_EMBEDS, "float32", (*tokens, config.n_embd), "row of wte for each token")]
    if layers := len(config.value_embed_layers):
        width = layers * config.kv_dim
        specs.append(TensorSpec(VALUE_EMBEDS, "float32", (*tokens, width), "row of value_embeds for each token"))
    return specs


def graph_inputs(
    config: LRTConfig, flavour: Flavour, dtype: str = "float32", host_embeddings: bool = False
) -> list[TensorSpec]:
    """Inputs in graph order; `tokens` is 1 in the decode-step graph."""
    ids = TensorSpec("input_ids", "int64", ("batch", "tokens"), "token ids, 0 to vocab_size - 1")
    first, *last = embedding_inputs(config) if host_embeddings else [ids]
    specs = [
        first,
        TensorSpec("position_ids", "int64", ("batch", "tokens"), "position of each token in its sequence"),
        TensorSpec("write_index", "int64", ("batch",), "cache slot of the first token; the others follow it"),
        TensorSpec(
            "last_index", "int64", ("batch", "rows"), "which of the T tokens get logits; rows = 0 skips the head"
        ),
    ]
    if flavour == "windowed":
        specs += [TensorSpec(window_start(w), "int64", (1,), _START_MEANING) for w in distinct_windows(config)]
        specs.append(TensorSpec(WINDOW_END, "int64", (1,), "one past the last live slot"))
        specs.append(
            TensorSpec(SLOT_POSITIONS, "int64", ("capacity",), "position held by each slot: 0, 1, 2, ... in order")
        )
    specs += [
        TensorSpec(
            p.past,
            p.dtype,
            p.shape,
            "latent m for each token" if p.past == "past_latent" else "cache, updated in place",
        )
        for p in state_pairs(config, dtype)
    ]
    return specs + last


def graph_outputs(config: LRTConfig, dtype: str = "float32") -> list[TensorSpec]:
    """Outputs in graph order."""
    logits = TensorSpec(
        "logits", "float32", ("batch", "rows", config.vocab_size), "softcapped logits of the chosen tokens"
    )
    return [logits] + [
        TensorSpec(
            p.present, p.dtype, p.shape, "m for the position after each" if p.past == "past_latent" else "the cache"
        )
        for p in state_pairs(config, dtype)
    ]


def describe(
    config: LRTConfig, flavour: Flavour, dtype: str = "float32", host_embeddings: bool = False
) -> dict[str, Any]:
    """The whole contract as JSON types, for the manifest and the graphs' metadata."""
    return {
        "opset": OPSET,
        "flavour": flavour,
        "inputs": [spec.to_dict() for spec in graph_inputs(config, flavour, dtype, host_embeddings)],
        "outputs": [spec.to_dict() for spec in graph_outputs(config, dtype)],
        "state": [pair.to_dict() for pair in state_pairs(config, dtype)],
    }
