"""Continue one sequence: options, events, and `Continuation`, which chooses tokens, decodes text and knows the end.

The loops that run the model are `Decoder.generate` for one sequence and `batch` for many. A token is appended to the
state as its event is yielded, and run when its successor is needed: the state holds what was emitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrt_deploy.errors import InputError
from lrt_deploy.fields import check_is, check_texts, check_whole
from lrt_deploy.text.grammar import Grammar, Matcher
from lrt_deploy.text.prompts import check_ids
from lrt_deploy.text.text_stream import TextStream
from lrt_deploy.text.tokenizer import Tokenizer
from lrt_deploy.types import FloatArray, PrefillReport

from .sampling import Sampler, SamplingOptions, TokenLogprob
from .state import DecodeState

FinishReason = Literal["stop_token", "stop_string", "grammar", "length", "capacity"]
NO_TOKEN = -1  # in the event of a request for no tokens


class PromptLogprob(NamedTuple):
    """One token of a prompt, its log-probability after those before it, and the likeliest tokens in its place.

    The first token follows nothing: None, and no alternatives.
    """

    token: int
    logprob: float | None
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Event:
    """One generated token.

    `text` is the text that is final after this token: whole UTF-8 characters that cannot begin a stop string. It may be
    empty, and that of the last event may belong to earlier tokens too. `finish_reason` is set on the last event: a stop
    token (the event's token, without text), a stop string, a grammar that allows nothing more (grammar),
    `max_new_tokens` (length) or a full state (capacity). `stop` is the token id or the string that matched. `logprob`
    is the natural log-probability of the token under the model's own logits, before temperature, penalties, grammar and
    cuts; `top_logprobs` those of the likeliest tokens, the likeliest first.

    A batch can be asked for `prompt_logprobs` (on the first event, an entry for each token of the prompt), `state` (on
    the last, it holds every token) and `latent_cosine`: of the latent that the token was chosen from and the one before
    it.
    """

    token: int
    text: str
    finish_reason: FinishReason | None
    prefill: PrefillReport
    logprob: float = field(compare=False)  # its last digits depend on the other rows of the batch
    top_logprobs: tuple[TokenLogprob, ...] = field(default=(), compare=False)
    stop: int | str | None = None
    prompt_logprobs: tuple[PromptLogprob, ...] | None = field(default=None, compare=False)
    state: DecodeState | None = field(default=None, compare=False)
    latent_cosine: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Generation:
    """Checked options of generating one sequence."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    tokenizer: Tokenizer | None
    sampler: Sampler
    logprobs: int = 0  # alternatives of each token
    grammar: Grammar | None = None

    @classmethod
    def of(
        cls,
        vocabulary: tuple[Tokenizer | None, int],
        max_new_tokens: int,
        stops: tuple[Sequence[int] | None, Sequence[str]],
        logprobs: int | None,
        sampling: Mapping[str, object],
        grammar: Grammar | None = None,
    ) -> Generation:
        """Check a caller's options and fill in the defaults.

        `vocabulary` is the tokenizer and the number of token ids, `stops` are token ids (None: the tokenizer's) and
        strings.
        """
        (tokenizer, vocab_size), (stop_ids, stop_strings) = vocabulary, stops
        if grammar is not None:
            _check_grammar(check_is(grammar, Grammar, "grammar"), tokenizer, stops)
        if tokenizer is None and check_texts(stop_strings, "stop strings"):
            raise InputError("stop strings need a tokenizer, and this bundle has none; use stop token ids")
        if stop_ids is None:
            stop_ids = sorted(tokenizer.stop_ids) if tokenizer else ()
        stop_ids = check_ids(stop_ids, vocab_size, "stop_ids")
        known = SamplingOptions.__dataclass_fields__
        if unknown := sorted(set(sampling) - set(known)):
            raise InputError(f"there is no sampling option {unknown[0]!r}; expected {', '.join(known)}")
        options = SamplingOptions(**sampling)  # type: ignore[arg-type]  # checked by the dataclass itself
        check_ids(list(options.logit_bias), vocab_size, "logit_bias")
        if tokenizer is not None:
            TextStream(tokenizer.token_bytes_of, stop_strings)  # checks them
        count = 0 if logprobs is None else check_whole(logprobs, "logprobs", 0, vocab_size)
        max_new_tokens = check_whole(max_new_tokens, "max_new_tokens", 0)
        ids, strings = frozenset(stop_ids), tuple(stop_strings)
        return cls(max_new_tokens, ids, strings, tokenizer, Sampler(options), count, grammar)

    @property
    def choices(self) -> int | None:
        """Only ids below this are chosen, those that the tokenizer has a text for; None: all."""
        return self.tokenizer.vocab_size if self.tokenizer else None

    def choice(self, index: int) -> Generation:
        """Return the options of choice `index` of several: it draws from the seed + index, or from fresh entropy."""
        if index == 0:
            return self
        options = self.sampler.options
        seed = None if options.seed is None else options.seed + index
        return replace(self, sampler=Sampler(replace(options, seed=seed)))

    def stream(self) -> TextStream | None:
        """Start a stream of text, where there is a tokenizer."""
        return TextStream(self.tokenizer.token_bytes_of, self.stop_strings) if self.tokenizer else None

    def matcher(self) -> Matcher | None:
        """Start a match of the grammar, where there is one."""
        return Matcher(self.grammar, self.tokenizer) if self.grammar and self.tokenizer else None


def _check_grammar(
    grammar: Grammar, tokenizer: Tokenizer | None, stops: tuple[Sequence[int] | None, Sequence[str]]
) -> None:
    """Compile a grammar; raises InputError for one that cannot be used, or with other rules of where to stop."""
    if tokenizer is None:
        raise InputError("a grammar needs a tokenizer, and this bundle has none; export it with --tokenizer")
    for name, given in (("stop_ids", stops[0] is not None), ("stop_strings", bool(stops[1]))):
        if given:
            raise InputError(f"{name} and a grammar exclude each other: an answer ends where its grammar ends")
    grammar.check(tokenizer)


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
        self._matcher = options.matcher()
        self.takes_the_largest = sampling.temperature == 0 and not sampling.change_logits and self._matcher is None

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

    def allowed(self) -> NDArray[np.intp] | None:
        """Return the ids that the grammar allows, ascending; None: all."""
        return self._matcher.allowed(self.history[self.read :]) if self._matcher else None

    def choose(self, logits: FloatArray) -> int:
        """Choose the next token from logits (V), among those that have a text and that the grammar allows."""
        return self.options.sampler.choose(logits[: self.options.choices], self.history, self.made, self.allowed())

    def take(
        self, token: int, logprob: float, top: tuple[TokenLogprob, ...], prefill: PrefillReport, full: bool
    ) -> Event:
        """Append a chosen token and return its event; `full` says that the state has no room for it."""
        options, made = self.options, self.made + 1
        self.made = -1  # until all of it is done
        self.history.append(token)
        text, reason, stop = self._outcome(token)
        if reason is None and made == options.max_new_tokens:
            reason = "length"
        if reason is None and full:
            reason = "capacity"
        if reason is not None and reason != "stop_string" and self._stream:
            text += self._stream.finish()
        self.made = made
        return Event(token, text, reason, prefill, logprob, top, stop)

    def emit(self, state: DecodeState, event: Event, full: bool) -> Event:
        """Return the event, in one step with appending its token to the state where there is room.

        While a loop is ahead of the state, it has run the state's last token.
        """
        emitted = self.emitted
        try:
            self.emitted = emitted + 1
            if state.ahead is not None:
                return state.follow((event.token,), event)
            return event if full else state.defer((event.token,), event)
        except BaseException:
            self.emitted = emitted
            raise

    def _outcome(self, token: int) -> tuple[str, FinishReason | None, int | str | None]:
        """Return the text that the token adds, and the reason and what matched if it ends the sequence."""
        if token in self.options.stop_ids:
            return "", "stop_token", token
        if self._stream is None:
            return "", None, None
        text = self._stream.push(token)
        if self._matcher is not None:
            return text, "grammar" if self._matcher.ended(self.history[self.read :]) else None, None
        return (text, None, None) if self._stream.stopped is None else (text, "stop_string", self._stream.stopped)
