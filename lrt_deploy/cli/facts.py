"""Facts about models and folders that several verbs tell people: parameter counts, the model line, sizes on disk.

Counts follow from the configuration alone, so no weights are read and no torch is needed.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from .output import bytes_text, count_text

if TYPE_CHECKING:
    from lrt_deploy.config import LRTConfig

TABLES = ("wte", "value_embeds")


def kinds_of_tensors(config: LRTConfig) -> dict[str, str]:
    """Name of each tensor in the checkpoint -> `tables` (a token reads one row), `matrices` (read whole) or `other`."""
    from lrt_deploy.bundle.weights import weight_sources

    kinds: dict[str, str] = {}
    for name, source in weight_sources(config).items():
        flat = all(len(shape) == 1 for shape in source.shapes)
        kind = "tables" if name in TABLES else "other" if flat else "matrices"
        kinds |= dict.fromkeys(source.names, kind)
    return kinds


def parameter_counts(config: LRTConfig) -> dict[str, int]:
    """Parameters by kind, rows that pad the vocabulary included."""
    from lrt_deploy.bundle.weights import weight_sources

    kinds, counts = kinds_of_tensors(config), {"matrices": 0, "tables": 0, "other": 0}
    for source in weight_sources(config).values():
        for name, shape in zip(source.names, source.shapes, strict=True):
            counts[kinds[name]] += prod(shape)
    return counts


def model_line(config: LRTConfig) -> str:
    """The model in one line."""
    counts = parameter_counts(config)
    kind = "" if config.memory else " (plain model, no memory)"
    return (
        f"{config.n_layer} layers, width {config.n_embd}, {count_text(counts['matrices'])} matrix + "
        f"{count_text(counts['tables'])} table parameters{kind}"
    )


def tokenizer_line(tokens: int | None, vocab_size: int) -> str:
    """How many tokens the tokenizer has, and what becomes of the ids that it has none for."""
    if not tokens:
        return "none: prompts must be token ids"
    if tokens == vocab_size:
        return f"{tokens} tokens"
    return (
        f"{tokens} tokens for a vocab_size of {vocab_size}: is it the one that the model was trained with? The ids "
        f"{tokens} to {vocab_size - 1} have no text, and generation never chooses them"
    )


def disk_text(folder: Path) -> str:
    """Size of all files in a folder."""
    return bytes_text(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
