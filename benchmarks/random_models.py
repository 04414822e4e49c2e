"""Models of random weights for tests and benchmarks, and the native checkpoints that hold them.

    .venv/bin/python benchmarks/random_models.py FOLDER [--precisions fp32,int8-weight-only] [--layers 12 --width 768]

makes FOLDER/checkpoint and FOLDER/bundle. Ranges of activations are measured on 32 tokens instead of 4,096: random
weights have no text to be calibrated on, and time and memory do not depend on the scales.
"""

from __future__ import annotations

import argparse
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


def make_bundle(folder: Path, args: argparse.Namespace) -> None:
    """Write and export a model whose recurrence contracts about as fast as a trained one's."""
    import lrt_deploy
    from lrt_deploy.exporters.quantize import calibrate

    calibrate.ROWS, calibrate.ROW_TOKENS = 1, 32
    shape = {"n_layer": args.layers, "n_head": args.heads, "n_kv_head": args.heads, "n_embd": args.width}
    config = LRTConfig(sequence_len=2048, vocab_size=args.vocab, window_pattern="SSSL", **shape)
    write_native(random_model(config, memory_scale=0.3), folder / "checkpoint")
    precisions = args.precisions.split(",")
    lrt_deploy.export_bundle(folder / "checkpoint", folder / "bundle", precision=precisions, max_seq_len=2560)


def main() -> None:
    """Make one bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precisions", default="fp32", metavar="P,P")
    for name, value in (("layers", 12), ("width", 768), ("heads", 12), ("vocab", 8192)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    make_bundle(args.folder, args)


if __name__ == "__main__":
    main()
