"""The configuration of a model, under the names of the authors' `model_config` and those of the paper's variants.

How a checkpoint's meta file and tensors become a configuration: see `model.checkpoint`.

Letters used in shape comments everywhere: B batch, T new tokens in this call, P past tokens, S cache slots, K rows that
get logits, L layers, C width, H query heads, G key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from .errors import ConfigError
from .fields import convert, raised_as, shown

# float32's machine epsilon, in every dtype: the default of torch's rms_norm, used by all norms here.
RMS_NORM_EPS = 1.1920928955078125e-07
ROPE_BASE = 10000.0
LOGIT_SOFTCAP = 15.0
# The authors round rotary tables to bfloat16 and build them for 10 x sequence_len positions; both are part of the
# model.
ROPE_POSITIONS_PER_SEQUENCE_LEN = 10
VOCAB_PADDING = 64
_MAX_ROTARY = 2**25  # sequence_len x head width: the rotary tables' size

MemoryProjections = Literal["layerwise", "shared"]


@dataclass(frozen=True)
class LRTConfig:
    """An LRT, or with `memory=False` the plain nanochat model it is compared with.

    The first block holds the authors' names. The second describes the memory path: `memory_projections` is
    `layerwise` in the released code and `shared` in the paper's default; `memory_source_layer` is the block whose
    normed output is carried to the next token (None: the last, as released); `memory_kv` and `memory_residual`
    switch the two ways in which the latent enters a layer (the paper's ablations).
    """

    # Bounds far beyond any model keep a damaged file from asking for all of the machine's memory or time.
    sequence_len: Annotated[int, Meta(ge=1, le=2**18)]
    vocab_size: Annotated[int, Meta(ge=1, le=2**22)]
    n_layer: Annotated[int, Meta(ge=1, le=1024)]
    n_head: Annotated[int, Meta(ge=1, le=4096)]
    n_kv_head: Annotated[int, Meta(ge=1, le=4096)]
    n_embd: Annotated[int, Meta(ge=1, le=2**16)]
    window_pattern: Annotated[str, Meta(pattern=r"^[SL]{1,1024}\Z")] = "L"
    use_value_embeds: bool = True
    ve_every_layer: bool = False
    use_x0_residual: bool = True
    use_resid_lambdas: bool = True
    ve_gate_channels: int = 0

    memory: bool = True
    memory_projections: MemoryProjections = "layerwise"
    memory_source_layer: int | None = None
    memory_kv: bool = True
    memory_residual: bool = True

    def __post_init__(self) -> None:
        with raised_as(ConfigError, "model config: "):
            for name, kind in _TYPES.items():
                convert(kind, getattr(self, name), name)
        rotary = self.sequence_len * self.head_dim
        feeds_back = self.memory_kv or self.memory_residual or not self.memory
        source = f"0 to {self.n_layer - 1}, the index of a block"
        for holds, name, found, expected in (
            (self.n_embd % self.n_head == 0, "n_embd", self.n_embd, f"a multiple of n_head ({self.n_head})"),
            (self.head_dim % 2 == 0, "n_embd / n_head", self.head_dim, "even, because RoPE turns pairs"),
            (self.n_head % self.n_kv_head == 0, "n_head", self.n_head, f"a multiple of n_kv_head ({self.n_kv_head})"),
            (rotary <= _MAX_ROTARY, "sequence_len * n_embd / n_head", rotary, f"at most {_MAX_ROTARY}"),
            (0 <= self.ve_gate_channels <= self.n_embd, "ve_gate_channels", self.ve_gate_channels, "0 to n_embd"),
            (0 <= self.source_layer < self.n_layer, "memory_source_layer", self.memory_source_layer, source),
            (feeds_back, "memory", True, "memory_kv or memory_residual to be on as well"),
        ):
            if not holds:
                raise ConfigError(f"model config: {name} is {shown(found)}, expected {expected}")

    @property
    def head_dim(self) -> int:
        """Width of one head, D."""
        return self.n_embd // self.n_head

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads together, G * D."""
        return self.n_kv_head * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding tables: the vocabulary rounded up to a multiple of 64."""
        return -(-self.vocab_size // VOCAB_PADDING) * VOCAB_PADDING

    @property
    def max_positions(self) -> int:
        """Positions that the authors' rotary tables cover; no capacity may exceed it."""
        return ROPE_POSITIONS_PER_SEQUENCE_LEN * self.sequence_len

    @property
    def gate_channels(self) -> int:
        """Leading channels that the gates read (`ve_gate_channels`, where 0 means all)."""
        return self.ve_gate_channels or self.n_embd

    @property
    def source_layer(self) -> int:
        """The block whose normed output is the latent."""
        return self.n_layer - 1 if self.memory_source_layer is None else self.memory_source_layer

    @property
    def windows(self) -> tuple[int, ...]:
        """Per layer w: position t sees keys t-w to t, w+1 of them. The last layer is always long."""
        pattern = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer)]
        pattern[-1] = "L"
        return tuple(self.sequence_len if letter == "L" else self.sequence_len // 2 for letter in pattern)

    @property
    def value_embed_layers(self) -> tuple[int, ...]:
        """Layers that mix in a value embedding: all in an LRT, every other one in a plain model."""
        if not self.use_value_embeds:
            return ()
        if self.memory or self.ve_every_layer:
            return tuple(range(self.n_layer))
        return tuple(i for i in range(self.n_layer) if i % 2 == (self.n_layer - 1) % 2)

    @property
    def memory_projection_count(self) -> int:
        """Number of pairs of K/V memory projections: one a layer, one in all, or none."""
        if not (self.memory and self.memory_kv):
            return 0
        return 1 if self.memory_projections == "shared" else self.n_layer

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: object) -> LRTConfig:
        """Read what `to_dict` wrote; raises ConfigError for anything else."""
        if not isinstance(fields, dict):
            raise ConfigError(f"model config is {shown(fields)}, expected an object")
        known = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - set(known)):
            raise ConfigError(
                f"model config has the unknown field(s) {', '.join(unknown)}; known are {', '.join(known)}"
            )
        required = [name for name, f in known.items() if f.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in fields]:
            raise ConfigError(f"model config lacks {', '.join(missing)}")
        return cls(**fields)


_TYPES = typing.get_type_hints(LRTConfig, include_extras=True)
