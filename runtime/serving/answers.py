"""Answers of OpenAI's API: from the engine's deliveries to the JSON of a whole answer, or to the chunks of a stream.

Text comes with the event after which it is certain, so a token may bring none; no chunk is made for it. A chunk has one
choice. Knows neither HTTP nor the engine's threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lrt_deploy.runtime.generation import Event
from lrt_deploy.types import PrefillReport

from .engine import Delivery
from .openai_api import Call

_REASONS = {"stop_token": "stop", "stop_string": "stop", "length": "length", "capacity": "length"}


@dataclass
class Choice:
    """One continuation as far as it has come."""

    text: list[str] = field(default_factory=list)
    tokens: int = 0
    logprob: float = 0.0  # sum over its tokens
    reason: str | None = None
    begun: bool = False  # whether a chunk of it was made

    def add(self, event: Event) -> None:
        """Append a token."""
        self.text.append(event.text)
        self.tokens += 1
        self.logprob += event.logprob
        if event.finish_reason is not None:
            self.reason = _REASONS[event.finish_reason]


class Answer:
    """The answer to a call, filled by deliveries."""

    def __init__(self, call: Call) -> None:
        self.call = call
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
            self.choices[index].add(event)
            changed[index] = None
            if index % self.call.request.count == 0 and not self.choices[index].tokens > 1:
                self.prefills[index // self.call.request.count] = event.prefill
        return list(changed)

    # Streams

    def chunks(self, changed: list[int]) -> Iterator[dict[str, Any]]:
        """Yield a chunk for each of these continuations that has something new to show."""
        for index in changed:
            choice = self.choices[index]
            text = "".join(choice.text)
            choice.text.clear()
            if not text and choice.reason is None and (choice.begun or not self._prefix(index)):
                continue
            yield self._chunk([self._part(index, choice, text)])
            choice.begun = True
        return

    def _part(self, index: int, choice: Choice, text: str) -> dict[str, Any]:
        """Return the choice of a chunk."""
        if self.call.kind == "completion":
            shown = text if choice.begun else self._prefix(index) + text
            return {"index": index, "text": shown, "logprobs": None, "finish_reason": choice.reason}
        delta = {} if choice.begun else {"role": "assistant"}
        if text or not choice.begun:
            delta["content"] = text
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": choice.reason}

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
            found += [self._whole(index) for index in self._best(prompt)]
        for at, choice in enumerate(found):
            choice["index"] = at
        kind = "chat.completion" if self.call.kind == "chat" else "text_completion"
        return self._head | {"object": kind, "choices": found, "usage": self.usage()}

    def _best(self, prompt: int) -> list[int]:
        """Return the continuations of a prompt that are shown: all, or those with the highest mean log-probability."""
        count, wanted = self.call.request.count, self.call.choices
        numbers = list(range(prompt * count, (prompt + 1) * count))
        if wanted == count:
            return numbers
        means = {i: self.choices[i].logprob / max(1, self.choices[i].tokens) for i in numbers}
        return sorted(numbers, key=lambda i: -means[i])[:wanted]

    def _whole(self, index: int) -> dict[str, Any]:
        choice = self.choices[index]
        text = "".join(choice.text)
        if self.call.kind == "completion":
            return {
                "index": index,
                "text": self._prefix(index) + text,
                "logprobs": None,
                "finish_reason": choice.reason,
            }
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": choice.reason}

    def _prefix(self, index: int) -> str:
        """Return the text of the prompt where it is to be shown."""
        return self.call.echo[index // self.call.request.count] if self.call.echo else ""

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
