"""Random non-zero weights for a model, for tests and benchmarks: no term of the forward pass vanishes."""

from __future__ import annotations

import torch

from lrt_deploy.bundle.weights import EMBEDDING_TABLES
from lrt_deploy.config import LRTConfig

from .model import LRT


def random_model(
    config: LRTConfig, seed: int = 0, memory_scale: float = 1.0, table_dtype: torch.dtype = torch.float32
) -> LRT:
    """Return a model in evaluation mode whose activations stay of order one, deterministic in `seed`.

    `memory_scale` sets how strongly the latent enters, hence how fast the fixed point of the recurrence contracts.
    """
    model = LRT(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        values = torch.empty_like(parameter).normal_(generator=generator)
        if name.endswith("lambdas"):
            means = {"resid_lambdas": 1.0, "x0_lambdas": 0.2, "memory_lambdas": 0.2 * memory_scale}
            values = means[name] + 0.1 * values
        elif name not in EMBEDDING_TABLES:
            values *= (memory_scale if name == "memory_kv" else 1.0) * parameter.shape[0] ** -0.5
        if name in EMBEDDING_TABLES:
            setattr(model, name, torch.nn.Parameter(values.to(table_dtype)))
        else:
            parameter.data = values
    return model.eval().requires_grad_(False)
