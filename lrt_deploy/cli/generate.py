"""`lrt-deploy generate`: continue one prompt. Streams the text and times the tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrt_deploy import files
from lrt_deploy.errors import InputError

from . import options, output

if TYPE_CHECKING:
    from lrt_deploy.runtime.decoder import Decoder
    from lrt_deploy.runtime.generation import Event
    from lrt_deploy.types import PrefillReport


def generate(
    bundle: options.BundlePath,
    *,
    prompt: options.Prompt = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prompt text from a file, - for stdin; its last newline is cut.")
    ] = None,
    tokens: options.Tokens = None,
    json_schema: Annotated[
        Path | None,
        options.option("Text that is JSON under the schema in this file; needs llguidance.", "FILE", options.SAMPLING),
    ] = None,
    generation: options.GenerationOptions,
    reading: options.PromptOptions,
    opening: options.DecoderOptions,
    json: options.Json = False,
) -> None:
    """Continue a prompt: text goes to stdout as it comes, a summary to stderr."""
    chosen = options.one_prompt(prompt, tokens, prompt_file)
    if chosen is None:
        raise typer.BadParameter("a prompt is missing; give --prompt, --prompt-file or --tokens")
    cache = reading.open_cache()
    arguments = generation.arguments()
    if json_schema is not None:
        from lrt_deploy.text.grammar import MAX_SCHEMA_BYTES, Grammar

        text = files.read_text(json_schema, "the JSON schema", InputError, 4 * MAX_SCHEMA_BYTES)
        arguments["grammar"] = Grammar.json_schema(text)
    with opening.open(bundle) as decoder:
        ids = options.prompt_ids(decoder, chosen)
        answer = Answer()

        def events() -> Iterator[Event]:  # lazily: the first token's time begins before the prompt is read
            if cache is None:
                yield from decoder.generate(ids, **reading.arguments, **arguments)
            else:
                state = cache.prefill(decoder, ids, **reading.arguments)
                yield from decoder.generate(None, state=state, **arguments)

        for event in answer.timed(events()):
            if not json:
                output.stream(event.text if decoder.tokenizer else f"{event.token} ")
        report = {"prompt_tokens": len(ids)} | answer.fields(decoder)
    if json:
        output.document(report)
    else:
        output.stream("\n")
        output.say(summary(report))
        if note := report["prefill"]["note"]:
            output.say(f"prefill: {note}")


@dataclass
class Answer:
    """The tokens of one answer with the time each took."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    prefill: PrefillReport | None = None
    times_ms: list[float] = field(default_factory=list)

    def timed(self, events: Iterator[Event]) -> Iterator[Event]:
        """Pass the events on and record them; the time that the caller takes between them is not counted."""
        while True:
            started = time.perf_counter()
            event = next(events, None)
            if event is None:
                return
            self.times_ms.append((time.perf_counter() - started) * 1e3)
            self.tokens.append(event.token)
            self.text += event.text
            self.finish_reason, self.prefill = event.finish_reason, event.prefill
            yield event

    def turn(self, message: str) -> dict[str, Any]:
        """Return the JSON fields of one turn of a chat."""
        return {
            "user": message,
            "assistant": self.text,
            "finish_reason": self.finish_reason,
            "tokens": self.tokens,
            "prefill": self.prefill.to_dict() if self.prefill else None,
        }

    def fields(self, decoder: Decoder) -> dict[str, Any]:
        """Return the JSON fields; ttft is from before the prefill to the first token, tpot the mean of the others."""
        first, following = self.times_ms[0], self.times_ms[1:]
        assert self.prefill is not None
        return {
            "tokens": self.tokens,
            "text": self.text if decoder.tokenizer else None,
            "finish_reason": self.finish_reason,
            "ttft_ms": round(first, 4),
            "tpot_ms": round(sum(following) / len(following), 4) if following else None,
            "prefill": self.prefill.to_dict(),
            "backend": decoder.backend,
            "precision": decoder.precision,
        }


def summary(report: dict[str, Any]) -> str:
    """Summarize an answer in one line."""
    prefill, tpot = report["prefill"], report["tpot_ms"]
    pace = f", then {tpot:.2f} ms a token" if tpot else ""
    plural = "" if report["prompt_tokens"] == 1 else "s"
    reused = f", {prefill['reused_tokens']} reused" if prefill.get("reused_tokens") else ""
    return (
        f"{report['prompt_tokens']} prompt token{plural} ({prefill['policy']}, "
        f"{prefill['passes']:.3g} passes{reused}), "
        f"{len(report['tokens'])} new ({report['finish_reason']}); first after {report['ttft_ms']:.1f} ms{pace}; "
        f"{report['backend']}, {report['precision']}"
    )
