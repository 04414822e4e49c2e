"""The model's parameters: their names, order and orientation in the authors' state dict, and a matrix as it is stored.

A parameter of `model.LRT` is one or several of the authors' matrices, transposed where it is a projection (they keep
(out, in), the graphs multiply by (in, out)) and joined along the last axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lrt_deploy.config import LRTConfig

Floats = npt.NDArray[np.float32]
EMBEDDING_TABLES = ("wte", "value_embeds")  # a row is gathered for each token; all other matrices are multiplied by


@dataclass(frozen=True)
class Source:
    """The authors' tensors behind one parameter.

    `names` in the order of the last axis, `shapes` as the authors store them; `transposed` says that the stored matrix
    is (out, in); `default` is the constant that stands for a key that old files lack.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transposed: bool = False
    default: float | None = None


def weight_sources(config: LRTConfig) -> dict[str, Source]:
    """Return the source of each parameter of `LRT(config)` by name, in the order of use."""
    width, kv, padded = config.n_embd, config.kv_dim, config.padded_vocab_size
    sources = {"wte": Source(("transformer.wte.weight",), ((padded, width),))}
    if config.use_resid_lambdas:
        sources["resid_lambdas"] = Source(("resid_lambdas",), ((config.n_layer,),), default=1.0)
    if config.use_x0_residual:
        sources["x0_lambdas"] = Source(("x0_lambdas",), ((config.n_layer,),), default=0.0)
    if config.memory and config.memory_residual:
        sources["memory_lambdas"] = Source(("interleaved_lambdas",), ((config.n_layer,),))
    if pairs := config.memory_projection_count:
        kinds = ("interleaved_key_projections", "interleaved_projections")
        names = tuple(f"{kind}.{i}.W_v.weight" for i in range(pairs) for kind in kinds)
        sources["memory_kv"] = Source(names, ((kv, width),) * len(names), transposed=True)
    if layers := config.value_embed_layers:
        table = "interleaved_init_value_embeds" if config.memory else "value_embeds"
        names = tuple(f"{table}.{i}.weight" for i in layers)
        sources["value_embeds"] = Source(names, ((padded, kv),) * len(names))
    for i in range(config.n_layer):
        sources |= _block_sources(config, i)
    sources["lm_head"] = Source(("lm_head.weight",), ((padded, width),), transposed=True)
    return sources


def matrix_shapes(config: LRTConfig) -> dict[str, tuple[int, int]]:
    """Return (rows, columns) of every matrix that a step multiplies by, by name; tables are not among them."""
    sources = weight_sources(config)
    return {
        name: (source.shapes[0][1], sum(shape[0] for shape in source.shapes))
        for name, source in sources.items()
        if source.transposed
    }


def matrix_elements(config: LRTConfig) -> int:
    """Elements of all matrices that a step multiplies by: of each layer, the memory projections, and the head.

    The head counts with the padded vocabulary. Embedding tables, lambdas and rotary tables are not counted.
    """
    return sum(rows * columns for rows, columns in matrix_shapes(config).values())


def _block_sources(config: LRTConfig, i: int) -> dict[str, Source]:
    width, kv = config.n_embd, config.kv_dim
    gate, gates = ("triple_gate", 3) if config.memory else ("ve_gate", 1)
    parts: dict[str, dict[str, tuple[int, int]]] = {
        "qkv": {"attn.c_q": (width, width), "attn.c_k": (kv, width), "attn.c_v": (kv, width)},
        "gate": {f"attn.{gate}": (gates * config.n_kv_head, config.gate_channels)},
        "attention_out": {"attn.c_proj": (width, width)},
        "mlp_in": {"mlp.c_fc": (4 * width, width)},
        "mlp_out": {"mlp.c_proj": (width, 4 * width)},
    }
    if not config.memory and i not in config.value_embed_layers:
        del parts["gate"]
    return {
        f"blocks.{i}.{part}": Source(
            tuple(f"transformer.h.{i}.{name}.weight" for name in shapes), tuple(shapes.values()), transposed=True
        )
        for part, shapes in parts.items()
    }


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix (K, N) or table as a bundle stores it.

    Integers have `scales`, (N) for whole columns or (blocks, N) for blocks of `block` rows, of which the last may have
    fewer; floats have none.
    """

    name: str
    dtype: str  # int4, int8, float16, bfloat16 or float32
    values: npt.NDArray[Any]
    scales: npt.NDArray[np.float16] | None = None
    block: int | None = None

    def dequantized(self) -> Floats:
        """Return the matrix (K, N) that a graph multiplies by."""
        values: Floats = self.values.astype(np.float32)
        return values if self.scales is None else values * self.steps()

    def steps(self) -> Floats:
        """Return the scale of each weight, (K, N)."""
        assert self.scales is not None
        scales = self.scales.astype(np.float32)
        rows, columns = self.values.shape
        return np.broadcast_to(scales, (rows, columns)) if self.block is None else scales.repeat(self.block, 0)[:rows]
