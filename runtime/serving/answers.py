"""Answers of OpenAI's API: from the engine's deliveries to the JSON of a whole answer, or to the chunks of a stream.

Text comes with the event after which it is certain, so a token may bring none; no chunk is made for it, and its
log-probability comes with the next one. A chunk has one choice. Knows neither HTTP nor the engine's threads.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lrt_deploy.runtime.generation import NO_TOKEN, Event
from lrt_deploy.text.tokenizer import Tokenizer
from lrt_deploy.types import PrefillReport

from .engine import Delivery
from .openai_api import Call

REASONS = {"stop_token": "stop", "stop_string": "stop", "grammar": "stop", "length": "length", "capacity": "length"}


class Scored(NamedTuple):
    """A token of the answer or of an echoed prompt, its log-probability, and the likeliest tokens in its place."""

    token: int
    logprob: float | None
    top: Sequence[tuple[int, float]]


class Choice:
    """One continuation as far as it has come."""

    def __init__(self) -> None:
        self.text: list[str] = []  # not shown yet
        self.scored: list[Scored] = []  # not shown yet
        self.latent_cosine: list[float | None] = []  # not shown yet
        self.tokens, self.logprob = 0, 0.0  # their number, and the sum of their log-probabilities
        self.reason: str | None = None
        self.stop: int | str | None = None  # what ended it: a token or a text
        self.begun = False  # whether a chunk of it was made
        self.shown = codecs.getincrementaldecoder("utf-8")("replace")  # of the tokens whose offsets were given
        self.offset = 0  # of the character that these tokens have begun or are about to
        self.echoed = 0  # entries of `scored` that belong to the prompt and were not shown yet

    def add(self, event: Event) -> None:
        """Append a token."""
        self.text.append(event.text)
        if event.token != NO_TOKEN:
            self.tokens += 1
            self.logprob += event.logprob
            self.scored.append(Scored(event.token, event.logprob, event.top_logprobs))
            self.latent_cosine.append(event.latent_cosine)
        if event.finish_reason is not None:
            self.reason, self.stop = REASONS[event.finish_reason], event.stop


class Answer:
    """The answer to a call, filled by deliveries."""

    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        self.call, self.tokenizer = call, tokenizer
        self.choices = [Choice() for _ in range(call.request.size)]
        self.prefills: dict[int, PrefillReport] = {}  # by the number of the prompt
        self._head = {
            "id": call.id,
            "object": "chat.completion.chunk" if call.kind == "chat" else "text_completion",
            "created": call.created,
            "model": call.model,
        }

    def add(self, delivery: Delivery) -> list[int]:
        """Take in events; return the numbers of the continuations that they belong to."""
        changed: dict[int, None] = {}
        for index, event in delivery.events:
            choice, prompt = self.choices[index], index // self.call.request.count
            if index not in changed and not (choice.tokens or choice.reason):
                self.prefills[prompt] = event.prefill
                self._echo(choice, prompt, event)
            choice.add(event)
            changed[index] = None
        return list(changed)

    def _echo(self, choice: Choice, prompt: int, event: Event) -> None:
        """Begin a choice with its prompt, if that is to be shown."""
        if not self.call.echo:
            return
        text, hidden = self.call.echo[prompt]
        choice.text.append(text)
        if event.prompt_logprobs is not None:
            first, *rest = event.prompt_logprobs[hidden:] or (None,)
            if first is not None:  # it has nothing before it, or nothing that the caller has written
                choice.scored.append(Scored(first.token, None, ()))
            choice.scored += [Scored(found.token, found.logprob, found.top) for found in rest]
        choice.echoed = len(choice.scored)

    # Streams

    def chunks(self, changed: list[int]) -> Iterator[dict[str, Any]]:
        """Yield a chunk for each of these continuations that has something new to show."""
        for index in changed:
            choice = self.choices[index]
            text = "".join(choice.text)
            choice.text.clear()
            if not text and choice.reason is None:
                continue
            yield self._chunk([self._part(index, choice, text)])
            choice.begun = True

    def _part(self, index: int, choice: Choice, text: str) -> dict[str, Any]:
        """Return the choice of a chunk."""
        part: dict[str, Any] = {"index": index}
        if self.call.kind == "completion":
            part["text"] = text
        else:
            part["delta"] = ({} if choice.begun else {"role": "assistant"}) | ({"content": text} if text else {})
        return part | self._rest(choice)

    def _rest(self, choice: Choice) -> dict[str, Any]:
        """Return the fields that choices of all kinds have."""
        found: dict[str, Any] = {"logprobs": self._logprobs(choice), "finish_reason": choice.reason}
        if choice.stop is not None:
            found["stop_reason"] = choice.stop
        cosines, choice.latent_cosine = choice.latent_cosine, []
        if self.call.request.arguments["latent_cosine"]:
            found["lrt"] = {"latent_cosine": cosines}
        return found

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"choices": choices} | ({"usage": None} if self.call.include_usage else {})

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last chunk of a stream that was asked for usage: no choices."""
        return self._head | {"choices": [], "usage": self.usage()}

    # Whole answers

    def body(self) -> dict[str, Any]:
        """Return the whole answer."""
        found = []
        for prompt in range(len(self.call.request.prompts)):
            found += [self.choices[index] for index in self._best(prompt)]
        kind = "chat.completion" if self.call.kind == "chat" else "text_completion"
        choices = [self._whole(index, choice) for index, choice in enumerate(found)]
        return self._head | {"object": kind, "choices": choices, "usage": self.usage()}

    def _best(self, prompt: int) -> list[int]:
        """Return the continuations of a prompt that are shown: all, or those with the highest mean log-probability."""
        count, wanted = self.call.request.count, self.call.choices
        numbers = list(range(prompt * count, (prompt + 1) * count))
        if wanted == count:
            return numbers
        means = {i: self.choices[i].logprob / max(1, self.choices[i].tokens) for i in numbers}
        return sorted(numbers, key=lambda i: -means[i])[:wanted]

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        if self.call.kind == "completion":
            return {"index": index, "text": text} | self._rest(choice)
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message} | self._rest(choice)

    # Log-probabilities

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Return the log-probabilities that were not shown yet."""
        scored, choice.scored = choice.scored, []
        if not self.call.logprobs:
            return None
        if self.call.kind == "chat":
            return {"content": [self._entry(found) for found in scored], "refusal": None}
        offsets = []
        for at, found in enumerate(scored):
            if at == choice.echoed:  # the texts of prompt and answer are decoded apart
                choice.offset += len(choice.shown.decode(b"", final=True))
            offsets.append(_place(choice, self.tokenizer.token_bytes_of(found.token)))
        choice.echoed -= len(scored)
        return {
            "tokens": [self._name(found.token) for found in scored],
            "token_logprobs": [found.logprob for found in scored],
            "top_logprobs": [self._alternatives(found) for found in scored],
            "text_offset": offsets,
        }

    def _entry(self, found: Scored) -> dict[str, Any]:
        """Return a token as chats show it."""
        assert found.logprob is not None
        top = [self._alone(token, logprob) for token, logprob in found.top]
        return self._alone(found.token, found.logprob) | {"top_logprobs": top}

    def _alone(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes_of(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    def _alternatives(self, found: Scored) -> dict[str, float] | None:
        """Return the likeliest tokens as completions show them, with the chosen one in any case."""
        if found.logprob is None:
            return None
        return {self._name(token): logprob for token, logprob in (*found.top, (found.token, found.logprob))}

    def _name(self, token: int) -> str:
        """Return a token's text; that of a part of a character names its bytes, so that two do not look alike."""
        data = self.tokenizer.token_bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def usage(self) -> dict[str, Any]:
        """Return the counts of tokens, and under `lrt` how the prompts were read."""
        made = sum(choice.tokens for choice in self.choices)
        read, reports = self.call.prompt_tokens, [self.prefills[i] for i in sorted(self.prefills)]
        reused = sum(report.reused_tokens for report in reports)
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": reused},
            "lrt": self._reading(reports) | {"reused_tokens": reused},
        }

    def _reading(self, reports: list[PrefillReport]) -> dict[str, Any]:
        """Summarize how the prompts were read: passes by tokens, the largest residual."""
        policies = sorted({report.policy for report in reports})
        sizes = [len(prompt.tokens) for prompt in self.call.request.prompts]
        weights = [sizes[i] for i in sorted(self.prefills)]
        passes = sum(report.passes * size for report, size in zip(reports, weights, strict=True)) / max(1, sum(weights))
        residuals = [report.residual for report in reports if report.residual is not None]
        return {
            "policy": ", ".join(policies) or None,
            "passes": round(passes, 6),
            "residual": max(residuals, default=None),
        }


def _place(choice: Choice, data: bytes) -> int:
    """Return the index of the character that the first byte of a token belongs to, and go on to its end.

    Bytes that wait for the rest of a character become U+FFFD, one or more, where the first byte does not continue them.
    """
    begun = choice.shown.decode(data[:1])
    waits = bool(choice.shown.getstate()[0])
    place = choice.offset + max(0, len(begun) - (0 if waits else 1))
    choice.offset += len(begun) + len(choice.shown.decode(data[1:]))
    return place
