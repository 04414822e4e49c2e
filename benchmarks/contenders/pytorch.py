"""Contender (b): PyTorch decoding recurrently, one token a step, caches allocated once; eager or compiled.

Written for this one job, as well as PyTorch allows on a CPU: no gradients, the same fused matrices as the reference in
the orientation in which a product with one row is fastest. Eager, the live window is a slice and needs no mask. Such a
slice would be compiled anew at every position: compiled, the position is a tensor, and attention masks a part of the
caches whose length changes every 128 tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lrt_deploy.config import LOGIT_SOFTCAP
from lrt_deploy.model.checkpoint import open_checkpoint
from lrt_deploy.model.model import LRT, norm
from lrt_deploy.model.reference import InPlaceCacheOps

from .serving import Greedy

ROOM = 128  # slots by which the part of the caches grows that a compiled step attends to


class PyTorch(Greedy):
    """The reference's weights, a step function of its own. `compiled` runs that through `torch.compile`."""

    def __init__(self, checkpoint: Path, threads: int, compiled: bool = False) -> None:
        torch.set_num_threads(threads)
        self.model = open_checkpoint(checkpoint).model()
        self.model.ops = InPlaceCacheOps()
        self._compiled = torch.compile(step, dynamic=False) if compiled else None
        self.facts = {
            "runs": f"PyTorch {torch.__version__}, {'compiled' if compiled else 'eager'}, {threads} thread(s)",
            "bytes_allocated_per_step": None,  # activations and logits; the caches are written in place
        }

    @torch.inference_mode()
    def start(self, rows: list[list[int]], exact: bool) -> None:
        """See `serving.Contender`."""
        config, batch = self.model.config, len(rows)
        shape = (batch, config.n_kv_head, config.sequence_len, config.head_dim)
        self.keys, self.values = ([torch.zeros(shape) for _ in range(config.n_layer)] for _ in range(2))
        self.latent, self.length = torch.zeros(batch, config.n_embd), 0
        ids = torch.tensor(rows)  # (B, T)
        if exact:
            for t in range(ids.shape[1]):
                self.step(ids[:, t].tolist())
            return
        count = ids.shape[1]
        live = ([key[:, :, :count] for key in self.keys], [value[:, :, :count] for value in self.values])
        memory = torch.zeros(batch, count, config.n_embd)
        positions = torch.arange(count).expand_as(ids)
        read = self.model(ids, positions, memory, *live, torch.zeros(batch, dtype=torch.int64))
        self.latent, self.length = read.latent[:, -1].clone(), count

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """See `serving.Contender`."""
        place, ids = self.length, torch.tensor(tokens)
        if self._compiled is None:
            raw, self.latent = step(self.model, ids, Sliced(place, self.keys, self.values), self.latent)
        else:
            room = min(-(-(place + 1) // ROOM) * ROOM, self.model.config.sequence_len)
            caches = Masked(torch.tensor([place]), room, self.keys, self.values)
            raw, self.latent = self._compiled(self.model, ids, caches, self.latent)
        self.length += 1
        return raw.numpy()


class Sliced(NamedTuple):
    """Caches, L of (B, G, S, D), that attention sees the live window of."""

    place: int
    keys: list[Tensor]
    values: list[Tensor]

    def take(self, i: int, window: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        """Store k and v (B, G, D) of layer i; keys and values to attend to, and no mask."""
        self.keys[i][:, :, self.place], self.values[i][:, :, self.place] = k, v
        live = slice(max(0, self.place - window), self.place + 1)
        return self.keys[i][:, :, live], self.values[i][:, :, live], None


class Masked(NamedTuple):
    """The same caches, of which attention sees the first `room` slots through a mask: shapes stay for many steps."""

    place: Tensor  # (1)
    room: int
    keys: list[Tensor]
    values: list[Tensor]

    def take(self, i: int, window: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store k and v (B, G, D) of layer i; keys, values, and which slots are seen."""
        self.keys[i].index_copy_(2, self.place, k[:, :, None])
        self.values[i].index_copy_(2, self.place, v[:, :, None])
        slots = torch.arange(self.room)
        seen = (slots <= self.place) & (slots >= self.place - window)  # (room)
        return self.keys[i][:, :, : self.room], self.values[i][:, :, : self.room], seen[None, None, None]


def step(model: LRT, ids: Tensor, caches: Sliced | Masked, m: Tensor) -> tuple[Tensor, Tensor]:
    """One token at the caches' position for all rows: ids (B), m (B, C) -> logits (B, V) and the latent (B, C)."""
    config = model.config
    batch, kv, wide = ids.shape[0], config.n_kv_head, config.head_dim
    x = x0 = norm(F.embedding(ids, model.wte).float())  # (B, C)
    memory = (m @ model.memory_kv).view(batch, config.n_layer, 2, kv, wide)
    embeds = F.embedding(ids, model.value_embeds).float().view(batch, config.n_layer, kv, wide)
    cos, sin = model.cos[caches.place], model.sin[caches.place]  # (D/2) or (1, D/2)
    for i, window in enumerate(config.windows):
        block: Any = model.blocks[i]
        x = model.resid_lambdas[i] * x + model.x0_lambdas[i] * x0 + model.memory_lambdas[i] * m
        a = norm(x)
        heads = (a @ block.qkv).view(batch, -1, wide)  # (B, H + 2G, D)
        gates = (2 * torch.sigmoid(a[:, : config.gate_channels] @ block.gate)).view(batch, 3, kv, 1)
        k = gates[:, 0] * heads[:, config.n_head : -kv] + gates[:, 1] * memory[:, i, 0]
        v = gates[:, 0] * heads[:, -kv:] + gates[:, 1] * memory[:, i, 1] + gates[:, 2] * embeds[:, i]
        qk = norm(turned(torch.cat((heads[:, : config.n_head], k), 1), cos, sin))  # (B, H + G, D)
        keys, values, seen = caches.take(i, window, qk[:, config.n_head :], v)
        y = F.scaled_dot_product_attention(
            qk[:, : config.n_head, None], keys, values, attn_mask=seen, enable_gqa=config.n_head != kv
        )
        x = x + y.reshape(batch, -1) @ block.attention_out
        x = x + F.relu(norm(x) @ block.mlp_in).square() @ block.mlp_out
    latent = norm(x)
    raw = (latent @ model.lm_head)[:, : config.vocab_size]
    return LOGIT_SOFTCAP * torch.tanh(raw / LOGIT_SOFTCAP), latent


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, N, D) at one position."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
