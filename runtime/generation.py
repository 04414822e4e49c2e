"""The generation loop: choose a token, emit what text is certain, stop, or feed it back.

One sequence, one event per token. The last token chosen is not fed to the state: nobody has asked for its successor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from lrt_deploy.errors import InputError
from lrt_deploy.interface import FloatArray, PrefillReport
from lrt_deploy.text_stream import TextStream
from lrt_deploy.tokenizer import Tokenizer

from .sampling import Sampler, SamplingOptions

if TYPE_CHECKING:
    from .decoder import Decoder
    from .state import DecodeState

FinishReason = Literal["stop_token", "stop_string", "length", "capacity"]


@dataclass(frozen=True)
class Event:
    """One generated token.

    `text` is what became certain with it: whole UTF-8 characters that cannot be the beginning of a stop string (so it
    may be empty, and the last event may carry more than its token). `finish_reason` is set on the last event: a stop
    token (which is the event's token and has no text), a stop string, `max_new_tokens` (length) or a full state
    (capacity).
    """

    token: int
    text: str
    finish_reason: FinishReason | None
    prefill: PrefillReport


@dataclass(frozen=True)
class Generation:
    """Checked options of one generation."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    stream: TextStream | None
    sampler: Sampler
    choices: int | None = None
    """Only ids below this are chosen: those that the tokenizer has a text for. None: all."""

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer | None,
        max_new_tokens: int,
        stop_ids: Sequence[int] | None,
        stop_strings: Sequence[str],
        sampling: Mapping[str, float | int | None],
    ) -> Generation:
        """Check and complete what a caller gave."""
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        if tokenizer is None and stop_strings:
            raise InputError("stop strings need a tokenizer, and this bundle has none; use stop token ids")
        known = SamplingOptions.__dataclass_fields__
        if unknown := sorted(set(sampling) - set(known)):
            raise InputError(f"there is no sampling option {unknown[0]!r}; expected {', '.join(known)}")
        if stop_ids is None:
            stop_ids = sorted(tokenizer.stop_ids) if tokenizer else ()
        stream = TextStream(tokenizer.token_bytes_of, stop_strings) if tokenizer else None
        options = SamplingOptions(**sampling)  # type: ignore[arg-type]  # checked by the dataclass itself
        choices = tokenizer.vocab_size if tokenizer else None
        return cls(max_new_tokens, frozenset(stop_ids), stream, Sampler(options), choices)


class Continuation:
    """One sequence that is being continued: chooses its tokens, turns them to text, and knows when it ends.

    Knows nothing of where logits come from: a state of its own, or a row in a batch.
    """

    def __init__(self, options: Generation, tokens: Sequence[int]) -> None:
        self.options, self.history, self.made = options, list(tokens), 0

    def choose(self, logits: FloatArray) -> int:
        """The next token, from logits (V), of those that have a text."""
        count = self.options.choices
        if count is None or count >= len(logits):
            return self.options.sampler.choose(logits, self.history)
        return self.options.sampler.choose(logits[:count], [token for token in self.history if token < count])

    @property
    def takes_the_largest(self) -> bool:
        """Whether `choose` is nothing but the largest logit of the choices, so that a batch may do it for all rows."""
        sampling = self.options.sampler.options
        return sampling.temperature == 0 and sampling.repetition_penalty == 1

    def take(self, token: int, prefill: PrefillReport, full: bool) -> Event:
        """The event of a chosen token; `full` says that the state has no room for it."""
        options = self.options
        self.made += 1
        self.history.append(token)
        text, reason = _outcome(token, options)
        if reason is None and self.made == options.max_new_tokens:
            reason = "length"
        if reason is None and full:
            reason = "capacity"
        if reason is not None and reason != "stop_string" and options.stream:
            text += options.stream.finish()
        return Event(token, text, reason, prefill)


def generate(decoder: Decoder, options: Generation, read: Callable[[], DecodeState]) -> Iterator[Event]:
    """Read the prompt, then yield events until something stops it."""
    state = read()
    continuation = Continuation(options, state.tokens[0])
    while True:
        token = continuation.choose(state.row_logits(0))
        event = continuation.take(token, state.prefill, full=state.length(0) == state.capacity)
        yield event
        if event.finish_reason is not None:
            return
        decoder.advance(state, np.array([token]))


def _outcome(token: int, options: Generation) -> tuple[str, FinishReason | None]:
    if token in options.stop_ids:
        return "", "stop_token"
    if options.stream is None:
        return "", None
    text = options.stream.push(token)
    return text, "stop_string" if options.stream.stopped is not None else None
