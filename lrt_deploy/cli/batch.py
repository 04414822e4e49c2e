"""`lrt-deploy batch`: answer a file of requests in OpenAI's batch format; `runtime.serving.jsonl` knows the format."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import typer

from . import options, output
from .serve import ApiOptions, engine_of


def batch(
    bundle: options.BundlePath,
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests, one a line: custom_id, url, body.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Answers; continued if it exists.")],
    *,
    api: ApiOptions,
    opening: options.DecoderOptions,
    json: options.Json = False,
) -> None:
    """Answer a file of OpenAI requests. A run that was stopped goes on where it stood."""
    from lrt_deploy.runtime.serving import jsonl

    options.check_file(source, "the input")
    with opening.open(bundle) as decoder:
        engine, checked = engine_of(decoder, bundle, api)
        started = time.perf_counter()
        engine.start()
        try:
            with output.progress(quiet=json) as progress:
                counts = jsonl.run(engine, checked, source, target, progress)
        finally:
            engine.stop()
        seconds = time.perf_counter() - started
    fields = dataclasses.asdict(counts) | {"seconds": round(seconds, 3), "backend": decoder.backend}
    if json:
        output.document(fields | {"precision": decoder.precision})
    else:
        output.say(
            f"{counts.answered} answered, {counts.failed} with an error, {counts.skipped} there already; "
            f"{counts.completion_tokens} new tokens in {seconds:.1f} s"
        )
