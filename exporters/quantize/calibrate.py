"""Measure what flows through the model while it decodes real text: true recurrence, token by token, latent and all.

A checkpoint's activations depend on its latent, and the latent on all tokens before: single tokens from an empty state
show another distribution (the memory projection's input is then zero throughout). So whole rows are rolled out with
the PyTorch reference, and what each matrix is multiplied with, and what comes out, is watched from outside the model.
What follows from it (scales, what float16 cannot hold) is decided in `plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lrt_deploy.errors import ExportError
from lrt_deploy.model.model import LRT
from lrt_deploy.model.reference import ReferenceDecoder

from .gptq import Doubles
from .histogram import Histogram

_PRODUCTS = (torch.Tensor.matmul, torch.Tensor.__matmul__)


@dataclass
class Calibration:
    """What was seen. Keys are parameter names; `outputs` holds the largest absolute products of each matrix.

    `residual` is the largest number in the residual stream, `values` in the value caches.
    """

    rows: int
    row_tokens: int
    inputs: dict[str, Histogram] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    residual: float = 0.0
    values: float = 0.0
    # (K, K) of each matrix's inputs; only where asked for: a matrix as large as its inputs are wide, for each.
    moments: dict[str, Doubles] = field(default_factory=dict)

    @property
    def squared_relu(self) -> float:
        """The largest relu(x) ** 2."""
        return max(seen.largest for name, seen in self.inputs.items() if name.endswith("mlp_out"))


def calibrate(
    model: LRT,
    rows: Sequence[Sequence[int]],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    moments: bool = False,
) -> Calibration:
    """Decode rows of token ids (of one length) together, from an empty state, and watch.

    `moments`: add up the second moments of all inputs too.

    Raises ExportError where the model itself produces numbers that are not finite.
    """
    ops, length = model.ops, len(rows[0])
    found = Calibration(len(rows), length)
    decoder = ReferenceDecoder(model, max_seq_len=length)
    try:
        with _Watch(model, found, moments):
            state = decoder.prefill([row[:1] for row in rows])
            for t in range(1, length):
                decoder.step(state, [row[t] for row in rows])
                progress("calibrating", t + 1, length)
    finally:
        model.ops = ops
    found.values = max(float(values.abs().max()) for values in state.values)
    return found


class _Watch(TorchFunctionMode):
    """Sees every product with a matrix of the model and every norm of its width."""

    def __init__(self, model: LRT, found: Calibration, moments: bool) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.width, self.found, self.moments = model.config.n_embd, found, moments

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and (name := self.names.get(id(args[1]))):
            self.see(name, args[0], result)
        elif func is F.rms_norm and args[0].shape[-1] == self.width and args[0].dim() == 3:
            self.found.residual = max(self.found.residual, float(args[0].abs().max()))
        return result

    def see(self, name: str, x: torch.Tensor, product: torch.Tensor) -> None:
        largest = float(product.abs().max())
        self.found.outputs[name] = max(self.found.outputs.get(name, 0.0), largest)
        if self.moments:
            rows = x.reshape(-1, x.shape[-1]).double().numpy()
            self.found.moments[name] = self.found.moments.get(name, 0.0) + rows.T @ rows
        try:
            self.found.inputs.setdefault(name, Histogram()).add(x.numpy())
        except ValueError as error:
            raise ExportError(
                f"calibration: what {name} is multiplied with is {error}; the checkpoint itself does not decode this "
                "text, see `lrt-deploy inspect`"
            ) from error
