"""Summaries of models, bundles and folders that several verbs print: parameter counts, the model line, sizes on disk.

Counts follow from the configuration alone, so no weights are read and no torch is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from .output import bytes_text, count_text

if TYPE_CHECKING:
    from lrt_deploy.bundle.manifest import Manifest
    from lrt_deploy.config import LRTConfig


def parameter_counts(config: LRTConfig, elements: Mapping[str, int] | None = None) -> dict[str, int]:
    """Count parameters by kind: `tables` (a token reads one row), `matrices`, `other`.

    `elements` maps the tensors of a checkpoint to their sizes; one that the config does not name counts as other.
    None: all tensors of the config, with the rows that pad the vocabulary.
    """
    from lrt_deploy.bundle.weights import EMBEDDING_TABLES, weight_sources

    kinds, expected = dict[str, str](), dict[str, int]()
    for name, source in weight_sources(config).items():
        flat = all(len(shape) == 1 for shape in source.shapes)
        kinds |= dict.fromkeys(source.names, "tables" if name in EMBEDDING_TABLES else "other" if flat else "matrices")
        expected |= dict(zip(source.names, map(prod, source.shapes), strict=True))
    counts = {"matrices": 0, "tables": 0, "other": 0}
    for name, size in (expected if elements is None else elements).items():
        counts[kinds.get(name, "other")] += size
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


def bundle_rows(manifest: Manifest) -> dict[str, str]:
    """Return the rows of a table on a bundle."""
    from lrt_deploy.bundle.manifest import table_path

    source = manifest.provenance.get("checkpoint") or {}
    chosen = {"checkpoint": str(source["chosen"])} if source.get("chosen") else {}
    sizes = ", ".join(f"{p} {bytes_text(manifest.files[table_path(p)].bytes)}" for p in manifest.tables)
    return {
        "model": model_line(manifest.model),
        **chosen,
        "precisions": ", ".join(manifest.precisions),
        **precision_rows(manifest),
        "capacity": f"{manifest.max_seq_len} tokens, {manifest.max_batch_size} sequences",
        "prefill": ", ".join(manifest.prefill_policies),
        **({"tables": f"on the host, not in graphs and engines: {sizes}"} if sizes else {}),
        "tokenizer": tokenizer_line(manifest.tokenizer_tokens, manifest.model.vocab_size),
    }


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
