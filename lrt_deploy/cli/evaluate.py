"""`lrt-deploy eval`: bits per byte of a text or of given token rows, sequentially, as the authors count them.

Reads the rows and shows progress; `lrt_deploy.evaluation.bits_per_byte` evaluates them.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lrt_deploy.errors import InputError

from . import options, output

if TYPE_CHECKING:
    from lrt_deploy.evaluation.bits_per_byte import Rows
    from lrt_deploy.text.tokenizer import Tokenizer


def evaluate(
    bundle: options.BundlePath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="UTF-8 text, or .npz with token rows x and y.")],
    *,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows that run together; default: as many as the bundle allows.")
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
        x, y = rows(file, decoder.tokenizer, decoder.max_seq_len)
        started = time.perf_counter()
        with output.progress(quiet=json) as progress:
            result = bits_per_byte.evaluate(
                decoder,
                x,
                y,
                decoder.tokenizer.byte_lengths,
                largest if batch_size is None else batch_size,
                progress,
            )
        seconds = time.perf_counter() - started
    fields = {
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "seconds": round(seconds, 3),
        "backend": decoder.backend,
        "precision": decoder.precision,
        "buckets": [dataclasses.asdict(bucket) for bucket in result.buckets],
    }
    if json:
        output.document(fields)
    else:
        output.answer(f"{result.bits_per_byte:.6f} bits per byte")
        output.table({name: str(value) for name, value in fields.items() if name not in ("bits_per_byte", "buckets")})
        output.table(
            {
                f"positions {bucket.first} to {bucket.last}": f"{bucket.bits_per_byte:.4f} bits per byte "
                f"({bucket.tokens} tokens)"
                for bucket in result.buckets
            }
        )


def rows(file: Path, tokenizer: Tokenizer, max_seq_len: int) -> tuple[Rows, Rows]:
    """Return inputs and targets: the arrays of an .npz, or the rows that a text is cut into."""
    from lrt_deploy.evaluation.bits_per_byte import rows_from_npz, rows_from_text

    if file.suffix == ".npz":
        return rows_from_npz(file)
    return rows_from_text(options.read_text(str(file)), tokenizer, max_seq_len)
