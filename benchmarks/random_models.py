"""Models of random weights for tests and benchmarks, and the native checkpoints that hold them."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch

from lrt_deploy.bundle.weights import EMBEDDING_TABLES, weight_sources
from lrt_deploy.config import LRTConfig
from lrt_deploy.model.checkpoint import parts_of
from lrt_deploy.model.model import LRT


def random_model(
    config: LRTConfig, seed: int = 0, memory_scale: float = 1.0, table_dtype: torch.dtype = torch.float32
) -> LRT:
    """Return a model in evaluation mode whose activations stay of order one, deterministic in `seed`.

    No term of the forward pass vanishes. `memory_scale` sets how strongly the latent enters, hence how fast the fixed
    point of the recurrence contracts.
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


def write_native(model: LRT, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, which `open_checkpoint` reads back."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, source in weight_sources(model.config).items():
        parts = zip(source.names, parts_of(model, name, source), strict=True)
        tensors |= {key: part.detach().contiguous() for key, part in parts}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
