"""A conversation: one state through all turns, and every token of it, fed or not.

A turn feeds only what the state has not seen: the closing `<|assistant_end|>`, where the answer did not end with it,
and the new message in the chat form. Going back a turn, branching, saving and loading are operations on the state;
where turns begin is kept in its `extra`, so that a saved chat can be loaded and rewound. Tool tokens are ordinary
output here: what stands between them is text, and nothing is ever run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lrt_deploy.errors import InputError, StateError

from . import options, output, signals
from .generate import Answer
from .output import WordWrapper

if TYPE_CHECKING:
    from lrt_deploy.runtime.decoder import Decoder
    from lrt_deploy.runtime.generation import Event
    from lrt_deploy.runtime.prompt_cache import PromptCache
    from lrt_deploy.runtime.state import DecodeState
    from lrt_deploy.text.tokenizer import Tokenizer

ADVICE = "/reset begins a new chat, /rewind takes turns back; for more room, export with a larger --max-seq-len"


@dataclass
class Conversation:
    """The state of a chat, its tokens, and where its turns begin in them."""

    decoder: Decoder
    tokenizer: Tokenizer
    system: str | None
    generation: options.GenerationOptions
    reading: options.PromptOptions
    history: list[int] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)  # roles and contents of the history
    state: DecodeState | None = None
    turns: list[int] = field(default_factory=list)  # tokens of the history before each turn
    cache: PromptCache | None = None
    count: int = 0

    @property
    def fed(self) -> int:
        """Number of tokens in the state."""
        return 0 if self.state is None else int(self.state.lengths[0])

    def answer(self, message: str, echo: bool) -> dict[str, Any]:
        """Answer a message; return the turn. A message that does not fit leaves the chat as it was.

        An interrupt stops the answer and keeps what there is of it; before its first token it takes the message back.
        """
        history, limit = self.with_message(message), self.decoder.max_seq_len
        answer = Answer()
        if len(history) > limit:
            output.say(
                f"no room for this message: the chat would have {len(history)} tokens of at most {limit}; {ADVICE}"
            )
            answer.finish_reason = "capacity"
            return answer.turn(message)
        self.count += 1
        begun = len(self.history)
        width = output.text_width()
        lines = WordWrapper(width) if width else None
        try:
            for event in answer.timed(self.events(history)):
                if echo:
                    output.stream(lines.push(event.text) if lines else event.text)
        except KeyboardInterrupt:
            signals.forget()
            answer.finish_reason = "interrupted"
        if echo:
            output.stream(f"{lines.finish() if lines else ''}\n")
        if answer.finish_reason == "interrupted" and not answer.tokens:
            output.say("stopped before the answer began; the message is taken back")
            return answer.turn(message)
        self.history, self.turns = history + answer.tokens, [*self.turns, begun]
        self.messages = [*self._with(message), {"role": "assistant", "content": answer.text}]
        if answer.finish_reason == "interrupted":
            output.say("the answer was stopped; the chat goes on from here")
        if answer.prefill and answer.prefill.note:
            output.say(f"prefill: {answer.prefill.note}")
        if answer.finish_reason == "capacity":
            output.say(f"the answer was cut: the context of {limit} tokens is full; {ADVICE}")
        return answer.turn(message)

    def check(self) -> None:
        """Raise InputError for a system message that fills the context, or unfit prefill options."""
        from lrt_deploy.runtime.prefill import PrefillRequest

        prefill, tolerance = self.reading.prefill, self.reading.tolerance
        PrefillRequest.of(prefill, tolerance, self.decoder.config.memory, self.decoder.precision)
        if self.system is not None and len(self.with_message("")) >= self.decoder.max_seq_len:
            limit = self.decoder.max_seq_len
            raise InputError(f"the system message leaves no room in a context of {limit} tokens; give a shorter one")

    def events(self, history: list[int]) -> Iterator[Event]:
        """Read the part of the history that the state lacks, then generate."""
        arguments = self.generation.arguments(self.count)
        if self.state is None and self.cache is not None:
            self.state = self.cache.prefill(self.decoder, history, **self.reading.arguments)
            return self.decoder.generate(None, state=self.state, **arguments)
        if self.state is None:
            self.state = self.decoder.prefill([history[:1]])
        return self.decoder.generate(history, state=self.state, reuse=True, **self.reading.arguments, **arguments)

    def with_message(self, message: str) -> list[int]:
        """Return the history with the last answer closed and a message appended."""
        from lrt_deploy.text.chat import ASSISTANT_END, BOS

        if not self.history or self.tokenizer.chat is not None:
            return self.tokenizer.render_chat(self._with(message))
        end, bos = (self.tokenizer.special_tokens[name] for name in (ASSISTANT_END, BOS))
        history = self.history[:-1] if self.history[-1] in (end, bos) else self.history
        return [*history, end, *self.tokenizer.render_chat([{"role": "user", "content": message}])[1:]]

    def _with(self, message: str) -> list[dict[str, str]]:
        """Return all messages and one more."""
        system = [] if self.system is None or self.messages else [{"role": "system", "content": self.system}]
        return [*system, *self.messages, {"role": "user", "content": message}]

    def reset(self) -> None:
        """Begin a new conversation."""
        self.history, self.state, self.turns, self.messages = [], None, [], []

    def rewind(self, turns: int) -> None:
        """Take back the last turns; the state follows when the next message is read."""
        if not 1 <= turns <= len(self.turns):
            raise StateError(f"this chat has {len(self.turns)} turn(s) to take back, {turns} were asked for")
        begun = self.turns[-turns]
        self.history, self.turns, self.messages = self.history[:begun], self.turns[:-turns], self.messages[: -2 * turns]
        if begun == 0:
            self.reset()
        elif self.state is not None:
            self.state.rewind(min(begun, self.fed))

    def save(self, path: str) -> None:
        """Write the chat to a file."""
        if self.state is None:
            raise StateError("there is no chat to save yet")
        self.state.extra = {"history": self.history, "turns": self.turns, "messages": self.messages}
        self.state.save(path)

    def load(self, path: str) -> None:
        """Replace this chat by one from a file."""
        state = self.decoder.load_state(path)
        history: Any = state.extra.get("history")
        turns: Any = state.extra.get("turns")
        fits = isinstance(history, list) and isinstance(turns, list) and all(type(t) is int for t in history + turns)
        if not fits or state.batch != 1 or history[: int(state.lengths[0])] != state.tokens[0]:
            raise StateError(f"{path} holds a state, but no chat; expected a file of /save")
        messages = self._messages_of(state, len(turns), path)
        self.history, self.turns, self.state, self.messages = history, turns, state, messages

    def _messages_of(self, state: DecodeState, turns: int, path: str) -> list[dict[str, str]]:
        """Return the messages of a saved chat; older files have none, which only a template needs."""
        from lrt_deploy.text.chat import check_messages

        messages: Any = state.extra.get("messages") or []
        try:
            found = [{"role": role, "content": content} for role, content in check_messages(messages)]
        except InputError as error:
            raise StateError(f"{path} holds a state, but no chat: {error}") from error
        if self.tokenizer.chat is not None and len(found) < 2 * turns:
            raise StateError(f"{path} holds a chat without its messages, which this model's chat template needs")
        return found

    def branch(self) -> Conversation:
        """Return a copy of the conversation with a state of its own."""
        state = None if self.state is None else self.state.fork()
        history, turns, messages = list(self.history), list(self.turns), list(self.messages)
        return replace(self, history=history, state=state, turns=turns, messages=messages)

    def stats(self) -> str:
        """Describe how full the context is, and the token positions computed."""
        text = f"{self.fed} of {self.decoder.max_seq_len} tokens in the state"
        if self.state is None:
            return text
        computed, size = self.state.computed_tokens, output.bytes_text(self.state.num_bytes)
        passes = computed / max(1, self.fed)
        return f"{text}, {size}; {len(self.turns)} turns, {computed} token positions computed ({passes:.3g} passes)"
