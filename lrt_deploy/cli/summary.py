"""Summaries of models, bundles and folders that several verbs print: parameter counts, the model line, sizes on disk.

Counts follow from the configuration alone, so no weights are read and no torch is needed.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from .output import bytes_text, count_text

if TYPE_CHECKING:
    from lrt_deploy.bundle.manifest import Manifest
    from lrt_deploy.config import LRTConfig

TABLES = ("wte", "value_embeds")


def kinds_of_tensors(config: LRTConfig) -> dict[str, str]:
    """Map the name of each tensor in the checkpoint to `tables` (a token reads one row), `matrices` or `other`."""
    from lrt_deploy.bundle.weights import weight_sources

    kinds: dict[str, str] = {}
    for name, source in weight_sources(config).items():
        flat = all(len(shape) == 1 for shape in source.shapes)
        kind = "tables" if name in TABLES else "other" if flat else "matrices"
        kinds |= dict.fromkeys(source.names, kind)
    return kinds


def parameter_counts(config: LRTConfig) -> dict[str, int]:
    """Count parameters by kind, rows that pad the vocabulary included."""
    from lrt_deploy.bundle.weights import weight_sources

    kinds, counts = kinds_of_tensors(config), {"matrices": 0, "tables": 0, "other": 0}
    for source in weight_sources(config).values():
        for name, shape in zip(source.names, source.shapes, strict=True):
            counts[kinds[name]] += prod(shape)
    return counts


def model_line(config: LRTConfig) -> str:
    """Describe the model in one line."""
    counts = parameter_counts(config)
    kind = "" if config.memory else " (plain model, no memory)"
    return (
        f"{config.n_layer} layers, width {config.n_embd}, {count_text(counts['matrices'])} matrix + "
        f"{count_text(counts['tables'])} table parameters{kind}"
    )


def tokenizer_line(tokens: int | None, vocab_size: int) -> str:
    """Say how many tokens the tokenizer has, and that ids without a token are never generated."""
    if not tokens:
        return "none: prompts must be token ids"
    if tokens == vocab_size:
        return f"{tokens} tokens"
    return (
        f"{tokens} tokens for a vocab_size of {vocab_size}: is it the one that the model was trained with? The ids "
        f"{tokens} to {vocab_size - 1} have no text, and generation never chooses them"
    )


def disk_text(folder: Path) -> str:
    """Format the size of all files in a folder."""
    return bytes_text(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


def bundle_rows(manifest: Manifest) -> dict[str, str]:
    """Return the rows of a table on a bundle."""
    origin = manifest.provenance.get("checkpoint") or {}
    chosen = {"checkpoint": str(origin["chosen"])} if origin.get("chosen") else {}
    return {
        "model": model_line(manifest.model),
        **chosen,
        "precisions": ", ".join(manifest.precisions),
        **precision_rows(manifest),
        "capacity": f"{manifest.max_seq_len} tokens, {manifest.max_batch_size} sequences",
        "prefill": ", ".join(manifest.prefill_policies),
        **table_rows(manifest),
        "tokenizer": tokenizer_line(manifest.tokenizer_tokens, manifest.model.vocab_size),
    }


def table_rows(manifest: Manifest) -> dict[str, str]:
    """Return a row on embedding tables that are not in the graphs, if there are any."""
    from lrt_deploy.bundle.manifest import table_path

    sizes = {p: bytes_text(manifest.files[table_path(p)].bytes) for p in manifest.tables}
    text = ", ".join(f"{precision} {size}" for precision, size in sizes.items())
    return {"tables": f"on the host, not in graphs and engines: {text}"} if sizes else {}


def product_words(kind: str) -> str:
    """Describe a kind of matrix product as the manifest names it; `int8, float16` is quantized on both sides."""
    weights, _, result = kind.partition(", ")
    if not result:
        return f"in {kind}"
    if weights == "int8":
        return f"W8A8: int8 weights times int8 activations, results in {result}"
    return f"with {weights}, computed in {result}"


def precision_rows(manifest: Manifest) -> dict[str, str]:
    """Return rows on each precision: what its graphs compute in, scales, exceptions, and the calibration text.

    ONNX Runtime's CPU provider runs the `windowed` graphs, every other backend the `full` ones; where both compute in
    the same types they share a row.
    """
    details, rows = manifest.precision_details, {}
    if about := details.get("calibration"):
        rows["calibrated on"] = f"{about.get('text')}, {about.get('rows')} rows of {about.get('row_tokens')} tokens"
    for precision in manifest.precisions:
        found = details.get(precision) or {}
        products = {
            flavour: "; ".join(f"{n} {product_words(kind)}" for kind, n in counts.get("matmul", {}).items())
            for flavour, counts in (found.get("operations") or {}).items()
        }
        named = {"full": f"{precision} on GPUs", "windowed": f"{precision} on ort-cpu"}
        if len(set(products.values())) == 1:
            named = dict.fromkeys(products, precision)
        rows |= {named.get(flavour, flavour): f"matrix products: {text}" for flavour, text in products.items()}
        if block := found.get("block"):
            rows[f"{precision} scales"] = f"one for {block} rows of a column"
        if wide := found.get("multiplied_in_float32"):
            rows[f"{precision} note"] = f"in float32, beyond what float16 can hold or kept so: {', '.join(wide)}"
    return rows
