"""What the contenders run: random models of three sizes, the same model without memory, and their exports.

Everything is made once into a folder and found there again. Knows sizes and files; runs and times nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrt_deploy.config import LRTConfig

MEMORY_SCALE = 0.3  # the recurrence contracts about as fast as a trained model's
MADE = "made.json"


@dataclass(frozen=True)
class Size:
    """The shape of a model; attention windows follow nanochat's pattern over 2048 tokens."""

    width: int
    layers: int
    heads: int
    vocab: int
    sequence_len: int = 2048


SIZES = {
    "tiny": Size(64, 3, 2, 320, 128),  # for the tests
    "256/6": Size(256, 6, 4, 8192),
    "768/12": Size(768, 12, 12, 32768),
    "1280/20": Size(1280, 20, 10, 32768),
}


def config_of(size: Size, memory: bool) -> LRTConfig:
    """The LRT of a size, or the plain nanochat model of the same width, depth and heads."""
    from lrt_deploy.config import LRTConfig

    return LRTConfig(
        sequence_len=size.sequence_len,
        vocab_size=size.vocab,
        n_layer=size.layers,
        n_head=size.heads,
        n_kv_head=size.heads,
        n_embd=size.width,
        window_pattern="SSSL",
        memory=memory,
    )


def checkpoint(folder: Path, size: Size, memory: bool = True) -> Path:
    """Random weights in the native form; tables in bfloat16, as training leaves them."""

    def make(target: Path) -> dict[str, Any]:
        import torch
        from random_models import random_model, write_native

        model = random_model(config_of(size, memory), memory_scale=MEMORY_SCALE, table_dtype=torch.bfloat16)
        write_native(model, target)
        return {"parameters": sum(parameter.numel() for parameter in model.parameters())}

    return made_once(folder / ("checkpoint" if memory else "checkpoint-plain"), make)


def bundle(folder: Path, size: Size, precision: str, memory: bool = True) -> Path:
    """One precision of the model through our exporter; `int4-weight-only:64` is in blocks of 64 rows."""

    def make(target: Path) -> dict[str, Any]:
        import lrt_deploy

        source = checkpoint(folder, size, memory)
        name, _, block = precision.partition(":")
        manifest = lrt_deploy.export_bundle(
            source,
            target / "bundle",
            precision=name,
            max_seq_len=size.sequence_len,
            int4_block=int(block) if block else None,
        )
        return {"bytes": sum(record.bytes for record in manifest.files.values())}

    return made_once(folder / f"bundle-{precision.replace(':', '-')}{'' if memory else '-plain'}", make) / "bundle"


def made_once(folder: Path, make: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder, filled by `make` unless it was before; a half-made one is made again."""
    if not (folder / MADE).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        facts = make(folder)
        (folder / MADE).write_text(json.dumps(facts) + "\n")
    return folder
