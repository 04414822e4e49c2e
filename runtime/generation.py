"""Continue one sequence: options, events, and `Continuation`, which chooses tokens, decodes text and knows the end.

The loops that run the model are elsewhere: `Decoder.generate` for one sequence, `batch` for many. A token is appended
to the state as its event is yielded, and run when its successor is needed: the state holds what was emitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lrt_deploy.arguments import check_texts, check_whole
from lrt_deploy.errors import InputError
from lrt_deploy.text.text_stream import TextStream
from lrt_deploy.text.tokenizer import Tokenizer
from lrt_deploy.types import FloatArray, PrefillReport

from .sampling import Sampler, SamplingOptions
from .state import DecodeState

FinishReason = Literal["stop_token", "stop_string", "length", "capacity"]


@dataclass(frozen=True)
class Event:
    """One generated token.

    `text` is the text that is final after this token: whole UTF-8 characters that cannot begin a stop string. It may be
    empty, and that of the last event may belong to earlier tokens too. `finish_reason` is set on the last event: a stop
    token (the event's token, without text), a stop string, `max_new_tokens` (length) or a full state (capacity).
    `logprob` is the natural log-probability of the token under the model's own logits, before temperature, penalty and
    cuts.
    """

    token: int
    text: str
    finish_reason: FinishReason | None
    prefill: PrefillReport
    logprob: float = field(compare=False)  # its last digits depend on the other rows of the batch


@dataclass(frozen=True)
class Generation:
    """Checked options of generating one sequence."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    tokenizer: Tokenizer | None
    sampler: Sampler
    choices: int | None = None  # only ids below this are chosen, those that the tokenizer has a text for; None: all

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer | None,
        max_new_tokens: int,
        stop_ids: Sequence[int] | None,
        stop_strings: Sequence[str],
        sampling: Mapping[str, object],
    ) -> Generation:
        """Check a caller's options and fill in the defaults."""
        max_new_tokens = check_whole(max_new_tokens, "max_new_tokens", 1)
        if tokenizer is None and check_texts(stop_strings, "stop strings"):
            raise InputError("stop strings need a tokenizer, and this bundle has none; use stop token ids")
        known = SamplingOptions.__dataclass_fields__
        if unknown := sorted(set(sampling) - set(known)):
            raise InputError(f"there is no sampling option {unknown[0]!r}; expected {', '.join(known)}")
        if stop_ids is None:
            stop_ids = sorted(tokenizer.stop_ids) if tokenizer else ()
        options = SamplingOptions(**sampling)  # type: ignore[arg-type]  # checked by the dataclass itself
        if tokenizer is not None:
            TextStream(tokenizer.token_bytes_of, stop_strings)  # checks them
        choices = tokenizer.vocab_size if tokenizer else None
        return cls(max_new_tokens, frozenset(stop_ids), tuple(stop_strings), tokenizer, Sampler(options), choices)

    def stream(self) -> TextStream | None:
        """Start a stream of text, where there is a tokenizer."""
        return TextStream(self.tokenizer.token_bytes_of, self.stop_strings) if self.tokenizer else None


class Continuation:
    """One sequence that is being continued: chooses tokens, decodes their text, and decides when it ends.

    Logits come from the caller, who has a state or a row of a batch. Choosing and taking a token may be interrupted and
    done again, with the same outcome; see `resume`.
    """

    def __init__(self, options: Generation, tokens: Sequence[int]) -> None:
        self.options, self.history, self.made = options, list(tokens), 0  # tokens chosen
        self.emitted = 0
        self.read, self._stream = len(self.history), options.stream()  # tokens that were there before
        sampling = options.sampler.options
        # Whether `choose` is argmax, which a batch computes for all rows together.
        self.takes_the_largest = sampling.temperature == 0 and sampling.repetition_penalty == 1

    def resume(self, made: int) -> None:
        """Return to the state after `made` tokens, if an interrupt came while the next one was being taken."""
        if self.made == made:
            return
        self.made, stream = -1, self.options.stream()
        del self.history[self.read + made :]
        for token in self.history[self.read :]:
            if stream is not None:
                stream.push(token)
        self._stream, self.made = stream, made

    def choose(self, logits: FloatArray) -> int:
        """Choose the next token from logits (V), among those that have a text."""
        count = self.options.choices
        if count is None or count >= len(logits):
            return self.options.sampler.choose(logits, self.history, self.made)
        history = [token for token in self.history if token < count]
        return self.options.sampler.choose(logits[:count], history, self.made)

    def take(self, token: int, logprob: float, prefill: PrefillReport, full: bool) -> Event:
        """Append a chosen token and return its event; `full` says that the state has no room for it."""
        options, made = self.options, self.made + 1
        self.made = -1  # until all of it is done
        self.history.append(token)
        text, reason = self._outcome(token)
        if reason is None and made == options.max_new_tokens:
            reason = "length"
        if reason is None and full:
            reason = "capacity"
        if reason is not None and reason != "stop_string" and self._stream:
            text += self._stream.finish()
        self.made = made
        return Event(token, text, reason, prefill, logprob)

    def emit(self, state: DecodeState, event: Event, full: bool) -> Event:
        """Return the event, in one step with appending its token to the state where there is room."""
        emitted = self.emitted
        try:
            self.emitted = emitted + 1
            return event if full else state.defer((event.token,), event)
        except BaseException:
            self.emitted = emitted
            raise

    def _outcome(self, token: int) -> tuple[str, FinishReason | None]:
        if token in self.options.stop_ids:
            return "", "stop_token"
        if self._stream is None:
            return "", None
        text = self._stream.push(token)
        return text, "stop_string" if self._stream.stopped is not None else None
