"""`lrt-deploy export`: make a bundle of a checkpoint, by `lrt_deploy.export_bundle`."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from . import options, output, summary
from .options import option


@dataclass(frozen=True)
class ExportOptions:
    """The options of `lrt_deploy.export_bundle`, by the same names."""

    tokenizer: Annotated[
        Path | None,
        option("Tokenizer folder, or its tokenizer.pkl or .json; none: without; default: the checkpoint's.", "PATH"),
    ] = None
    step: Annotated[int | None, option("Which saved step; default: the last.")] = None
    precision: Annotated[
        list[options.PrecisionName] | None,
        option(f"Precision to export: {options.listed(options.PrecisionName)}; repeatable; default: fp32.", "NAME"),
    ] = None
    max_seq_len: Annotated[int | None, option("Tokens a sequence can hold; default: the model's sequence_len.")] = None
    max_batch_size: Annotated[int | None, option("Sequences that can run together; default: 8.")] = None
    calibration: Annotated[
        Path | None, option("Text on which ranges and int8 activations are measured; default: our own.", "FILE")
    ] = None
    keep_high: Annotated[
        list[str] | None, option("Matrix to keep precise, as gate or blocks.3.mlp_in; repeatable; none: quantize all.")
    ] = None
    compensate: Annotated[
        bool | None,
        option("Round int4 weights by GPTQ or to nearest; default: by GPTQ where there is a tokenizer."),
    ] = None
    int4_block: Annotated[
        Literal["32", "64", "128"] | None,
        option("Rows that share an int4 scale; default: with GPTQ the longest that fits, else 32."),
    ] = None
    host_embeddings: Annotated[bool, option("Keep embedding tables out of graphs, engines and GPU memory.")] = False
    force: Annotated[bool, option("Replace an existing bundle.")] = False
    add: Annotated[bool, option("Put the precisions into an existing bundle of this checkpoint.")] = False

    def arguments(self) -> dict[str, Any]:
        """Return keyword arguments for `export_bundle`: plain types, and `--keep-high none` as an empty list."""
        return dataclasses.asdict(self) | {
            "precision": [str(name) for name in self.precision or ["fp32"]],
            "keep_high": None if self.keep_high is None else [name for name in self.keep_high if name != "none"],
            "int4_block": None if self.int4_block is None else int(self.int4_block),
        }


def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help=f"{options.CHECKPOINT[0].upper()}{options.CHECKPOINT[1:]}.")
    ],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder to make.")],
    *,
    chosen: ExportOptions,
    dry_run: Annotated[bool, option("Say sizes, memory and time, and write nothing.")] = False,
    json: options.Json = False,
) -> None:
    """Export a checkpoint as a bundle: graphs, weights, tokenizer and manifest in one folder."""
    from lrt_deploy import export_bundle

    if dry_run:
        from lrt_deploy.exporters.bundle import estimate_bundle

        with output.progress(quiet=json) as progress:
            found = estimate_bundle(checkpoint, bundle, **chosen.arguments(), progress=progress)
        output.estimate(json, f"export {bundle}", found.to_dict())
        return
    started = time.perf_counter()
    with output.progress(quiet=json) as progress:
        manifest = export_bundle(checkpoint, bundle, **chosen.arguments(), progress=progress)
    seconds = time.perf_counter() - started
    fields = manifest.to_dict() | {"bundle": str(bundle), "seconds": round(seconds, 3)}
    size = output.bytes_text(sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()))
    what = f"added {', '.join(chosen.arguments()['precision'])} to" if chosen.add else "exported"
    output.result(json, fields, f"{what} {bundle} ({size}) in {seconds:.1f} s", summary.bundle_rows(manifest))
