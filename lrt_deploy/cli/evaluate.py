"""`lrt-deploy eval`: bits per byte of a text or of given token rows, by `lrt_deploy.evaluation.bits_per_byte`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import typer

from lrt_deploy.errors import InputError

from . import options, output


def evaluate(
    bundle: options.BundlePath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="UTF-8 text, or .npz with token rows x and y.")],
    *,
    batch_size: Annotated[
        int | None, options.option("Rows that run together; default: as many as the bundle allows.")
    ] = None,
    opening: options.DecoderOptions,
    json: options.Json = False,
) -> None:
    """Measure bits per byte on a file, token by token from an empty state."""
    from lrt_deploy.evaluation import bits_per_byte

    options.check_file(file, "the file to measure on,")
    with opening.open(bundle) as decoder:
        if decoder.tokenizer is None:
            raise InputError(
                "this bundle has no tokenizer, which says how many bytes a token counts; export one with it"
            )
        largest = decoder.manifest.max_batch_size
        if batch_size is not None and not 1 <= batch_size <= largest:
            raise InputError(f"--batch-size is {batch_size}; this bundle was exported for 1 to {largest} sequences")
        x: bits_per_byte.Rows
        y: bits_per_byte.Rows
        if file.suffix == ".npz":
            x, y = bits_per_byte.rows_from_npz(file)
        else:
            text = options.read_text(str(file))
            x, y = bits_per_byte.rows_from_text(text, decoder.tokenizer, decoder.max_seq_len)
        started = time.perf_counter()
        with output.progress(quiet=json) as progress:
            rows_at_once = largest if batch_size is None else batch_size
            lengths = decoder.tokenizer.byte_lengths
            result = bits_per_byte.evaluate(decoder, x, y, lengths, rows_at_once, progress)
        seconds = time.perf_counter() - started
    fields = dataclasses.asdict(result) | {"seconds": round(seconds, 3)}
    fields |= {"backend": decoder.backend, "precision": decoder.precision}
    shown = {name: str(value) for name, value in fields.items() if name not in ("bits_per_byte", "buckets")}
    buckets = {
        f"positions {bucket.first} to {bucket.last}": f"{bucket.bits_per_byte:.4f} bits per byte "
        f"({bucket.tokens} tokens)"
        for bucket in result.buckets
    }
    output.result(json, fields, f"{result.bits_per_byte:.6f} bits per byte", shown, buckets)
