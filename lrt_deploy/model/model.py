"""The reference LRT in PyTorch: explicit inputs, explicit outputs, no hidden state.

The parity reference runs it eagerly, the exporters trace it (with `CacheOps` whose methods become ONNX ops), and
training code may differentiate it. Weights have the shape (in, out) of `x @ W`. Fused are q, k and v of a layer, the K
and V memory projections of all layers (they share their input m), and the value-embedding tables of all layers (a token
reads one row). Formulas: arXiv 2605.26797 and its authors' release; shape letters: see `config`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrt_deploy import activations
from lrt_deploy.config import LOGIT_SOFTCAP, RMS_NORM_EPS, ROPE_BASE, LRTConfig


class CacheOps:
    """The operations that a traced graph expresses differently; here in eager PyTorch, differentiable, copying."""

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
        """Rotate x (B, N, T, D) by the tables (positions, D/2) at position_ids (B, T).

        y1 = x1 cos + x2 sin, y2 = -x1 sin + x2 cos over half-split pairs.
        """
        c, s = cos[position_ids].unsqueeze(1).to(x.dtype), sin[position_ids].unsqueeze(1).to(x.dtype)  # (B, 1, T, D/2)
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat([x1 * c + x2 * s, x2 * c - x1 * s], dim=-1)

    def write(self, past: Tensor, update: Tensor, write_index: Tensor) -> Tensor:
        """Return past (B, G, S, D) with update (B, G, T, D) in slots write_index[b] to write_index[b] + T - 1."""
        offsets = torch.arange(update.shape[2], device=update.device)
        slots = (write_index[:, None] + offsets)[:, None, :, None].expand_as(update)  # (B, G, T, D)
        return past.scatter(2, slots, update)

    def mark(self, x: Tensor, stage: str) -> Tensor:
        """Return x unchanged; a subclass may record the activation or name it. Names: see `activations`."""
        return x


_Pair = tuple[Tensor, Tensor]
# Stores new keys and values (B, G, T, D) of a layer; returns those that attention reads, (B, G, S, D).
_Write = Callable[[int, Tensor, Tensor], _Pair]


class Block(nn.Module):
    """The weights of one layer; `LRT` does the arithmetic."""

    def __init__(self, config: LRTConfig, gates: int) -> None:
        super().__init__()
        width = config.n_embd
        self.qkv = _weight(width, width + 2 * config.kv_dim)
        self.gate = _weight(config.gate_channels, gates * config.n_kv_head) if gates else None
        self.attention_out = _weight(width, width)
        self.mlp_in = _weight(width, 4 * width)
        self.mlp_out = _weight(4 * width, width)


class Step(NamedTuple):
    """The results of a forward pass beside logits."""

    hidden: Tensor  # (B, T, C) normed output of the last block; logits are made from it
    latent: Tensor  # (B, T, C) m for the position after each; the same tensor as hidden unless the source is earlier
    keys: list[Tensor]  # L of (B, G, S, D)
    values: list[Tensor]  # L of (B, G, S, D)


class LRT(nn.Module):
    """A Latent Recurrent Transformer, or the plain model when `config.memory` is off.

    `max_positions` is the length of the rotary tables (default: the authors' limit). Weights start uninitialized.
    """

    cos: Tensor  # (positions, D/2)
    sin: Tensor  # (positions, D/2)

    def __init__(self, config: LRTConfig, max_positions: int | None = None, ops: CacheOps | None = None) -> None:
        super().__init__()
        self.config = config
        self.ops = ops or CacheOps()
        padded, width = config.padded_vocab_size, config.n_embd
        self.wte = _weight(padded, width)
        self.lm_head = _weight(width, padded)
        embedded = set(config.value_embed_layers)
        # Gates per kv head: local, feedback and value embedding in an LRT; the value embedding's alone in a plain
        # model.
        gates = [3 if config.memory else int(i in embedded) for i in range(config.n_layer)]
        self.blocks = nn.ModuleList(Block(config, gates[i]) for i in range(config.n_layer))
        self.value_embeds = _weight(padded, len(embedded) * config.kv_dim) if embedded else None
        pairs = config.memory_projection_count
        self.memory_kv = _weight(width, pairs * 2 * config.kv_dim) if pairs else None
        self.resid_lambdas = _weight(config.n_layer) if config.use_resid_lambdas else None
        self.x0_lambdas = _weight(config.n_layer) if config.use_x0_residual else None
        self.memory_lambdas = _weight(config.n_layer) if config.memory and config.memory_residual else None
        cos, sin = rotary_tables(config, config.max_positions if max_positions is None else max_positions)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        past_latent: Tensor,
        past_keys: Sequence[Tensor],
        past_values: Sequence[Tensor],
        write_index: Tensor,
    ) -> Step:
        """Run T positions on top of a cache of S slots.

        input_ids, position_ids (B, T) int64; past_latent (B, T, C), row t being m for position t (ignored by a plain
        model); past_keys, past_values: L of (B, G, S, D); write_index (B) int64, the slot of the first new token.
        """
        slots = torch.arange(past_keys[0].shape[2], device=input_ids.device)  # (S)
        keys, values = list(past_keys), list(past_values)

        def write(layer: int, k: Tensor, v: Tensor) -> _Pair:
            keys[layer] = self.ops.write(keys[layer], k, write_index)
            values[layer] = self.ops.write(values[layer], v, write_index)
            return keys[layer], values[layer]

        hidden, latent = self._run(input_ids, position_ids, past_latent, slots, write)
        return Step(hidden, latent, keys, values)

    def parallel(self, input_ids: Tensor, past_latent: Tensor) -> _Pair:
        """Run whole sequences without a cache: ids (B, T), m (B, T, C) -> hidden and latent, both (B, T, C)."""
        slots = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self._run(input_ids, slots.expand_as(input_ids), past_latent, slots, lambda layer, k, v: (k, v))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) float32 of hidden (..., C), capped softly to +-15, without the padded rows."""
        raw = (hidden @ self.lm_head).float()
        return LOGIT_SOFTCAP * torch.tanh(raw[..., : self.config.vocab_size] / LOGIT_SOFTCAP)

    def _run(self, input_ids: Tensor, position_ids: Tensor, past_latent: Tensor, slots: Tensor, write: _Write) -> _Pair:
        config = self.config
        x = norm(F.embedding(input_ids, self.wte).to(self.lm_head.dtype))  # (B, T, C)
        x = x0 = self.ops.mark(x, activations.EMBEDDED)
        masks = {w: visible(position_ids, slots, w) for w in sorted(set(config.windows))}  # (B, 1, T, S)
        memory = self._memory(past_latent)
        embeds = self._value_embeds(input_ids)
        latent = x
        for i, window in enumerate(config.windows):
            x = self._mark(i, "mixed", self._mix(i, x, x0, past_latent))
            pair = memory[i] if memory else None
            a = self._mark(i, "normed", norm(x))
            x = x + self._attend(i, a, pair, embeds.get(i), position_ids, masks[window], write)
            x = x + self._mlp(i, self._mark(i, "mlp_normed", norm(x)))
            if i == config.source_layer:
                latent = norm(x)
        hidden = latent if config.source_layer == config.n_layer - 1 else norm(x)
        return hidden, latent

    def _mix(self, i: int, x: Tensor, x0: Tensor, m: Tensor) -> Tensor:
        """Mix resid * x + x0_lambda * x0 + memory_lambda * m, each term where it exists."""
        if self.resid_lambdas is not None:
            x = self.resid_lambdas[i] * x
        if self.x0_lambdas is not None:
            x = x + self.x0_lambdas[i] * x0
        if self.memory_lambdas is not None:
            x = x + self.memory_lambdas[i] * m
        return x

    def _memory(self, m: Tensor) -> list[_Pair]:
        """Return each layer's K and V memory projections of m (B, T, C), (B, T, G, D) each; none without them."""
        if self.memory_kv is None:
            return []
        parts = self._kv_heads(m @ self.memory_kv)
        pairs = list(zip(parts[0::2], parts[1::2], strict=True))
        return pairs * (self.config.n_layer // self.config.memory_projection_count)

    def _value_embeds(self, input_ids: Tensor) -> dict[int, Tensor]:
        """Gather the value embeddings of all layers at once: layer -> (B, T, G, D)."""
        if self.value_embeds is None:
            return {}
        rows = F.embedding(input_ids, self.value_embeds).to(self.lm_head.dtype)  # (B, T, layers * G * D)
        return dict(zip(self.config.value_embed_layers, self._kv_heads(rows), strict=True))

    def _kv_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Cut x (B, T, n * G * D) into n (B, T, G, D)."""
        heads: tuple[Tensor, ...] = x.unflatten(-1, (-1, self.config.head_dim)).split(self.config.n_kv_head, dim=-2)
        return heads

    def _attend(
        self,
        i: int,
        a: Tensor,
        memory: _Pair | None,
        embed: Tensor | None,
        position_ids: Tensor,
        mask: Tensor,
        write: _Write,
    ) -> Tensor:
        config, block = self.config, self._block(i)
        heads = self._mark(i, "heads", a @ block.qkv).unflatten(-1, (-1, config.head_dim))  # (B, T, H + 2G, D)
        q, k, v = heads.split([config.n_head, config.n_kv_head, config.n_kv_head], dim=-2)
        k, v = self._gated(i, a, k, v, memory, embed)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, G, T, D) twice
        q = self._mark(i, "queries", norm(self.ops.rotary(q, self.cos, self.sin, position_ids)))
        k = self._mark(i, "keys", norm(self.ops.rotary(k, self.cos, self.sin, position_ids)))
        k, v = write(i, k, v)  # (B, G, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=config.n_kv_head != config.n_head)
        y = self._mark(i, "attention", y)  # (B, H, T, D)
        return self._mark(i, "attended", y.transpose(1, 2).flatten(2) @ block.attention_out)  # (B, T, C)

    def _gated(self, i: int, a: Tensor, k: Tensor, v: Tensor, memory: _Pair | None, embed: Tensor | None) -> _Pair:
        """Mix memory and value embedding into k and v, one gate in (0, 2) per kv head and source."""
        block = self._block(i)
        if block.gate is None:
            return k, v
        # 2 sigmoid(z), written so that small gates keep their relative precision: QK norm scales a k of small gates up
        # again, and with it the absolute error of 1e-7 of ORT's Sigmoid (logits 5e-5 off, not 1.5e-5).
        raw = a[..., : self.config.gate_channels] @ block.gate  # (B, T, 3G or G)
        gate = self._mark(i, "gates", 2 / (1 + torch.exp(-raw))).unsqueeze(-1)  # (B, T, 3G or G, 1)
        if embed is not None:
            embed = self._mark(i, "value_embeds", embed)
        if not self.config.memory:
            return k, v if embed is None else v + gate * embed
        local, feedback, embedded = gate.chunk(3, dim=-2)  # each (B, T, G, 1)
        k, v = local * k, local * v
        if memory is not None:
            memory_k, memory_v = self._mark(i, "memory_keys", memory[0]), self._mark(i, "memory_values", memory[1])
            k, v = k + feedback * memory_k, v + feedback * memory_v
        if embed is not None:
            v = v + embedded * embed
        return self._mark(i, "gated_keys", k), self._mark(i, "gated_values", v)

    def _mlp(self, i: int, a: Tensor) -> Tensor:
        block = self._block(i)
        hidden = self._mark(i, "mlp_hidden", F.relu(a @ block.mlp_in).square())  # (B, T, 4C)
        return self._mark(i, "mlp", hidden @ block.mlp_out)

    def _mark(self, i: int, stage: str, x: Tensor) -> Tensor:
        return self.ops.mark(x, activations.of_layer(i, stage))

    def _block(self, i: int) -> Block:
        block = self.blocks[i]
        assert isinstance(block, Block)
        return block


def norm(x: Tensor) -> Tensor:
    """Apply RMSNorm over the last axis, without weight."""
    return F.rms_norm(x, (x.shape[-1],), eps=RMS_NORM_EPS)


def visible(position_ids: Tensor, slots: Tensor, window: int) -> Tensor:
    """Return the boolean mask (B, 1, T, S): slot s is seen from position t when t - window <= s <= t."""
    t = position_ids[:, None, :, None]  # (B, 1, T, 1)
    return (slots <= t) & (slots >= t - window)


def rotary_tables(config: LRTConfig, positions: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (positions, D/2) float32, rounded to bfloat16 as in the authors' tables."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), 1.0 / ROPE_BASE**exponents)
    return angles.cos().bfloat16().float(), angles.sin().bfloat16().float()


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))
