"""Run the reference model on the weights that a bundle stores, over a sequence of given latents: for `arithmetic`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lrt_deploy.bundle.weights import StoredMatrix
from lrt_deploy.types import FloatArray

from .model import LRT
from .reference import InPlaceCacheOps

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
