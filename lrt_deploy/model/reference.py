"""The PyTorch model as a stateful decoder, the reference of parity: true recurrence, one token at a time.

`run_forced` runs it on the weights that a bundle stores, over a sequence of given latents, for the part `arithmetic`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lrt_deploy import activations
from lrt_deploy.activations import StepInput
from lrt_deploy.bundle.weights import StoredMatrix
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import InputError
from lrt_deploy.text.prompts import check_prompts, check_tokens
from lrt_deploy.types import FloatArray, IntArray, PrefillPolicy

from .model import LRT, CacheOps


class InPlaceCacheOps(CacheOps):
    """Cache operations that write into the given cache instead of a copy; only for inference."""

    def write(self, past: Tensor, update: Tensor, write_index: Tensor) -> Tensor:
        """Write one slice for all rows: those of a reference state have one length."""
        start = int(write_index[0])
        past[:, :, start : start + update.shape[2]] = update
        return past


class RecordingCacheOps(InPlaceCacheOps):
    """Cache operations that also record every activation that the model marks."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def mark(self, x: Tensor, stage: str) -> Tensor:
        """Record x under its name and return it."""
        self.seen[stage] = x
        return x


@dataclass
class ReferenceState:
    """B sequences of equal length; a `types.State`."""

    keys: list[Tensor]  # L of (B, G, S, D)
    values: list[Tensor]  # L of (B, G, S, D)
    carried: Tensor  # (B, 1, C)
    next_logits: Tensor  # (B, V)
    length: int = 0

    @property
    def logits(self) -> FloatArray:
        """(B, V) for each row's next token."""
        return self.next_logits.float().numpy()

    @property
    def latent(self) -> FloatArray:
        """(B, C) carried to the next token."""
        return self.carried[:, 0].float().numpy()

    @property
    def lengths(self) -> IntArray:
        """(B) tokens so far."""
        return torch.full((self.carried.shape[0],), self.length).numpy()

    def cache(self, layer: int) -> tuple[FloatArray, FloatArray]:
        """Live keys and values (B, G, length, D) of a layer."""
        keys, values = (cache[layer][:, :, : self.length].float().numpy() for cache in (self.keys, self.values))
        return keys, values


class ReferenceDecoder:
    """Decodes with `model` on the CPU; in float64 it shows how much of a difference is float32 noise."""

    def __init__(self, model: LRT, max_seq_len: int | None = None, float64: bool = False) -> None:
        self._dtype = torch.float64 if float64 else torch.float32
        if float64:
            copy = LRT(model.config)
            copy.load_state_dict(model.state_dict(), assign=True)
            model = copy.double().eval().requires_grad_(False)
        self._model = model
        self._model.ops = InPlaceCacheOps()
        self.max_seq_len = max_seq_len or model.config.max_positions

    @property
    def config(self) -> LRTConfig:
        """The model that is run."""
        return self._model.config

    def prefill(
        self, prompts: Sequence[Sequence[int]], *, policy: PrefillPolicy = "stepwise", tolerance: float | None = None
    ) -> ReferenceState:
        """Read prompts of equal length into a new state, step by step; `policy` and `tolerance` are ignored."""
        rows = check_prompts(prompts, self.config.vocab_size)
        if len({len(row) for row in rows}) != 1:
            raise InputError("the reference reads prompts of one length; call it row by row")
        state = self._empty(len(rows))
        for t in range(len(rows[0])):
            self.step(state, [int(row[t]) for row in rows])
        return state

    @torch.inference_mode()
    def step(self, state: ReferenceState, tokens: Sequence[int] | IntArray) -> FloatArray:
        """Append one token to each row, in place; returns logits (B, V)."""
        ids = torch.from_numpy(check_tokens(tokens, self.config.vocab_size, state.carried.shape[0]))[:, None]
        if state.length >= self.max_seq_len:
            raise InputError(f"the reference state is full: {self.max_seq_len} tokens")
        end = state.length + 1
        position = torch.full_like(ids, state.length)
        live = ([key[:, :, :end] for key in state.keys], [value[:, :, :end] for value in state.values])
        step = self._model(ids, position, state.carried, *live, position[:, 0])
        state.carried, state.next_logits = step.latent, self._model.logits(step.hidden)[:, 0]
        state.length = end
        return state.logits

    @torch.inference_mode()
    def observe(self, step: StepInput) -> dict[str, FloatArray]:
        """Return the activations of one step from a state given in full; see `activations.Observer`."""
        keys, values = ([self._with_room(cache) for cache in caches] for caches in (step.keys, step.values))
        ids, position = torch.tensor([[step.token]]), torch.tensor([[step.position]])
        latent = torch.from_numpy(step.latent).to(self._dtype)[None, None]
        plain, recording = self._model.ops, RecordingCacheOps()
        self._model.ops = recording
        try:
            result = self._model(ids, position, latent, keys, values, position[:, 0])
        finally:
            self._model.ops = plain
        seen = recording.seen | {activations.LOGITS: self._model.logits(result.hidden)}
        if self.config.memory:
            seen[activations.LATENT] = result.latent
        return {name: value.float().numpy() for name, value in seen.items()}

    def _with_room(self, cache: FloatArray) -> Tensor:
        """(G, P, D) -> (1, G, P + 1, D), its last slot free."""
        past = torch.from_numpy(cache).to(self._dtype)
        return torch.cat([past, past.new_zeros(past.shape[0], 1, past.shape[2])], dim=1)[None]

    def _empty(self, batch: int) -> ReferenceState:
        config = self.config
        shape = (batch, config.n_kv_head, self.max_seq_len, config.head_dim)
        keys, values = ([torch.zeros(shape, dtype=self._dtype) for _ in range(config.n_layer)] for _ in range(2))
        carried = torch.zeros(batch, 1, config.n_embd, dtype=self._dtype)
        return ReferenceState(keys, values, carried, torch.zeros(batch, config.vocab_size))


_PRODUCTS = (torch.Tensor.matmul, torch.Tensor.__matmul__)
_INT8_ENDS = (-128, 127)
BLOCK_TOKENS = 128


@torch.no_grad()
def take_stored_weights(model: LRT, stored: Iterable[StoredMatrix]) -> None:
    """Replace matrices and tables of `model`, in place, by those that a bundle stores; one matrix at a time."""
    for matrix in stored:
        parameter = model.get_parameter(matrix.name)
        values = torch.from_numpy(np.ascontiguousarray(matrix.dequantized()))
        if parameter.dtype.itemsize < 4:  # a table that the checkpoint has in 16 bits
            owner, _, name = matrix.name.rpartition(".")
            setattr(model.get_submodule(owner), name, nn.Parameter(values, requires_grad=False))
        else:
            parameter.copy_(values)


@torch.inference_mode()
def run_forced(
    model: LRT, tokens: list[int], latents: FloatArray, activation_scales: Mapping[str, float] | None = None
) -> tuple[FloatArray, FloatArray]:
    """Return logits (T, V) and latents (T, C) after each token; `latents` (T, C) are those before it.

    `activation_scales`, by matrix name: the input of each of these products is rounded to int8 and back first. A model
    without memory returns no latents, (T, 0).
    """
    config, count, dtype = model.config, len(tokens), model.lm_head.dtype
    shape = (1, config.n_kv_head, count, config.head_dim)
    keys, values = ([torch.zeros(shape, dtype=dtype) for _ in range(config.n_layer)] for _ in range(2))
    logits = np.zeros((count, config.vocab_size), np.float32)
    after = np.zeros((count, config.n_embd if config.memory else 0), np.float32)
    ops, model.ops = model.ops, InPlaceCacheOps()
    try:
        with _RoundedInputs(model, activation_scales or {}):
            for start in range(0, count, BLOCK_TOKENS):
                block = slice(start, min(start + BLOCK_TOKENS, count))
                ids, positions = torch.tensor([tokens[block]]), torch.arange(count)[None, block]
                given = torch.from_numpy(np.ascontiguousarray(latents[None, block])).to(dtype)
                step = model(ids, positions, given, keys, values, positions[:, 0])
                logits[block] = model.logits(step.hidden)[0].float().numpy()
                if config.memory:
                    after[block] = step.latent[0].float().numpy()
    finally:
        model.ops = ops
    return logits, after


class _RoundedInputs(TorchFunctionMode):
    """Rounds the inputs of chosen products to int8 and back, as QuantizeLinear and DequantizeLinear do."""

    def __init__(self, model: LRT, scales: Mapping[str, float]) -> None:
        super().__init__()
        self.scales = {id(model.get_parameter(name)): scale for name, scale in scales.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if func in _PRODUCTS and (scale := self.scales.get(id(args[1]))):
            args = (_rounded(args[0], scale), *args[1:])
        return func(*args, **(kwargs or {}))


def _rounded(x: Tensor, scale: float) -> Tensor:
    """Round half to even, saturate, without a zero point."""
    return torch.clamp(torch.round(x / scale), *_INT8_ENDS) * scale
