"""`lrt-deploy export`: a checkpoint becomes a bundle. Shows what is made and how far; the work is `export_bundle`'s."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import facts, options, output

if TYPE_CHECKING:
    from lrt_deploy.bundle.manifest import Manifest


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder, a weights file, or nanochat's base folder."),
    ],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder to make.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Tokenizer folder, or its tokenizer.pkl or .json; none: without; default: the checkpoint's.",
        ),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Which saved step; default: the last.")] = None,
    precision: Annotated[
        list[options.PrecisionItem] | None,
        typer.Option(
            metavar="NAME",
            help=f"Precision to export: {options.listed(options.PrecisionName)}; repeatable; default: fp32.",
        ),
    ] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Tokens a sequence can hold; default: the model's sequence_len.")
    ] = None,
    max_batch_size: Annotated[int, typer.Option(help="Sequences that can run together.")] = 8,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text on which ranges and int8 activations are measured; default: our own."),
    ] = None,
    keep_high: Annotated[
        list[str] | None,
        typer.Option(help="Matrix to keep precise, as gate or blocks.3.mlp_in; repeatable; none: quantize all."),
    ] = None,
    compensate: Annotated[
        bool, typer.Option("--compensate", help="Round int4 weights so that errors make up for each other.")
    ] = False,
    int4_block: Annotated[
        Literal["32", "64", "128"] | None, typer.Option(help="Rows of a matrix that share an int4 scale; default: 32.")
    ] = None,
    host_embeddings: Annotated[
        bool, typer.Option("--host-embeddings", help="Keep embedding tables out of graphs, engines and GPU memory.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Export a checkpoint as a bundle: graphs, weights, tokenizer and manifest in one folder."""
    from lrt_deploy import export_bundle

    started = time.perf_counter()
    with output.progress(quiet=json) as progress:
        manifest = export_bundle(
            checkpoint,
            bundle,
            precision=[str(name) for name in precision or ["fp32"]],
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            tokenizer=tokenizer,
            step=step,
            force=force,
            calibration=calibration,
            keep_high=None if keep_high is None else [name for name in keep_high if name != "none"],
            compensate=compensate,
            int4_block=None if int4_block is None else int(int4_block),
            host_embeddings=host_embeddings,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    if json:
        output.document(manifest.to_dict() | {"bundle": str(bundle), "seconds": round(seconds, 3)})
        return
    output.answer(f"exported {bundle} ({facts.disk_text(bundle)}) in {seconds:.1f} s")
    output.table(summary(manifest))


def summary(manifest: Manifest) -> dict[str, str]:
    """What a bundle holds, for people."""
    origin = manifest.provenance.get("checkpoint") or {}
    chosen = {"checkpoint": str(origin["chosen"])} if origin.get("chosen") else {}
    return {
        "model": facts.model_line(manifest.model),
        **chosen,
        "precisions": ", ".join(manifest.precisions),
        **precision_rows(manifest),
        "capacity": f"{manifest.max_seq_len} tokens, {manifest.max_batch_size} sequences",
        "prefill": ", ".join(manifest.prefill_policies),
        **table_rows(manifest),
        "tokenizer": facts.tokenizer_line(manifest.tokenizer_tokens, manifest.model.vocab_size),
    }


def table_rows(manifest: Manifest) -> dict[str, str]:
    """Where embedding tables lie, if not in the graphs."""
    from lrt_deploy.bundle.manifest import table_path

    sizes = {p: output.bytes_text(manifest.files[table_path(p)].bytes) for p in manifest.tables}
    text = ", ".join(f"{precision} {size}" for precision, size in sizes.items())
    return {"tables": f"on the host, not in graphs and engines: {text}"} if sizes else {}


def product_words(kind: str) -> str:
    """How a kind of matrix product computes, in words: `int8, float16` is quantized on both sides."""
    weights, _, result = kind.partition(", ")
    if not result:
        return f"in {kind}"
    if weights == "int8":
        return f"W8A8: int8 weights times int8 activations, results in {result}"
    return f"with {weights}, computed in {result}"


def precision_rows(manifest: Manifest) -> dict[str, str]:
    """What was decided for each precision, and on which text it was calibrated."""
    details, rows = manifest.precision_details, {}
    if about := details.get("calibration"):
        rows["calibrated on"] = f"{about.get('text')}, {about.get('rows')} rows of {about.get('row_tokens')} tokens"
    for precision in manifest.precisions:
        found = details.get(precision) or {}
        for flavour, counts in (found.get("operations") or {}).items():
            kinds = "; ".join(f"{number} {product_words(kind)}" for kind, number in counts.get("matmul", {}).items())
            rows[f"{precision} {flavour}"] = f"matrix products: {kinds}"
        if block := found.get("block"):
            rows[f"{precision} scales"] = f"one for {block} rows of a column"
        if wide := found.get("multiplied_in_float32"):
            rows[f"{precision} note"] = f"in float32, beyond what float16 can hold or kept so: {', '.join(wide)}"
    return rows
