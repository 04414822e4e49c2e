"""`lrt-deploy chat`: a conversation on stdin and stdout that never reads a token twice.

One state lives through all turns. A turn feeds only what the state has not seen: the last token of the answer before
(chosen but not fed), the closing `<|assistant_end|>`, and the new message in the chat form. There is no history of
texts: the state is the history, and `/reset` begins another.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrt_deploy.errors import InputError

from . import options, output
from .generate import Answer

if TYPE_CHECKING:
    from lrt_deploy.runtime.decoder import Decoder
    from lrt_deploy.runtime.state import DecodeState
    from lrt_deploy.tokenizer import Tokenizer

_HELP = "/reset begins anew, /stats tells how full the context is, /quit ends (so does the end of the input)"


def chat(
    bundle: options.BundlePath,
    system: Annotated[str | None, typer.Option(help="System message, joined to the first message.")] = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_stop_tokens: options.IgnoreStopTokens = False,
    prefill: options.Prefill = "auto",
    tolerance: options.Tolerance = None,
    backend: options.Backend = "ort-cpu",
    precision: options.Precision = None,
    max_seq_len: options.MaxSeqLen = None,
    threads: options.Threads = None,
    verify: options.Verify = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Talk with a model: one message a line, answers go to stdout as they come. /help lists the commands."""
    numbers = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    numbers |= {"repetition_penalty": repetition_penalty}
    sampling = options.Sampling(max_new_tokens, tuple(stop or ()), ignore_stop_tokens, numbers, seed)
    with options.Runner(backend, precision, max_seq_len, threads, verify).open(bundle) as decoder:
        reading: dict[str, Any] = {"policy": prefill, "tolerance": tolerance}
        conversation = Conversation(decoder, chat_tokenizer(decoder), system, sampling, reading)
        output.say(f"{decoder.backend}, {decoder.precision}, {decoder.max_seq_len} tokens; /help lists the commands")
        turns = [turn for line in messages(echo=not json) if (turn := conversation.take(line, not json))]
    if json:
        output.document({"turns": turns, "backend": decoder.backend, "precision": decoder.precision})


def chat_tokenizer(decoder: Decoder) -> Tokenizer:
    """The bundle's tokenizer, if it has what the chat form needs."""
    from lrt_deploy.chat_form import ASSISTANT_END, ASSISTANT_START, BOS, USER_END, USER_START

    if decoder.tokenizer is None:
        raise InputError("this bundle has no tokenizer, and a chat needs one; export it again with --tokenizer")
    needed = (BOS, USER_START, USER_END, ASSISTANT_START, ASSISTANT_END)
    if missing := [name for name in needed if name not in decoder.tokenizer.special_tokens]:
        raise InputError(f"the bundle's tokenizer has no {missing[0]}, which the chat form needs; use generate")
    return decoder.tokenizer


def messages(echo: bool) -> Iterator[str]:
    """Lines of stdin that are not blank, until its end or /quit; a prompt is shown only to a person."""
    by_hand = sys.stdin.isatty()
    editable = by_hand and echo and sys.stdout.isatty()
    if editable:
        _enable_line_editing()
    while True:
        if by_hand and not editable:
            output.ask("> ")
        try:
            line = input("> ") + "\n" if editable else sys.stdin.readline()
        except EOFError:
            line = ""
        except UnicodeDecodeError as error:
            raise InputError(f"the input is not text in {error.encoding}: {error.reason}") from error
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401 - importing it is what teaches input() to edit
    except ImportError:
        return


@dataclass
class Conversation:
    """The state of a chat and every token of it, fed or not."""

    decoder: Decoder
    tokenizer: Tokenizer
    system: str | None
    sampling: options.Sampling
    reading: dict[str, Any]  # policy and tolerance of prefill
    history: list[int] = field(default_factory=list)
    state: DecodeState | None = None
    count: int = 0

    def take(self, line: str, echo: bool) -> dict[str, Any] | None:
        """Obey a command, or answer a message and return its turn."""
        command = line.strip()
        if command == "/reset":
            self.history, self.state = [], None
            output.say("a new chat begins")
        elif command == "/stats":
            output.say(f"{self.fed} of {self.decoder.max_seq_len} tokens in the state")
        elif command == "/help":
            output.say(_HELP)
        elif command.startswith("/") and command[1:].isalpha():
            output.say(f"there is no command {command}; {_HELP}")
        else:
            return self.answer(line, echo)
        return None

    @property
    def fed(self) -> int:
        """Tokens in the state."""
        return 0 if self.state is None else int(self.state.lengths[0])

    def answer(self, message: str, echo: bool) -> dict[str, Any]:
        """One turn; a message that does not fit is told so and leaves the chat as it was."""
        history = self.with_message(message)
        if len(history) > self.decoder.max_seq_len:
            return self.refuse(message, len(history))
        unread = self.unread(history)
        self.count += 1
        arguments = self.reading | self.sampling.arguments(self.count)
        events = self.decoder.generate(unread, state=self.state, **arguments)
        answer = Answer()
        for event in answer.timed(events):
            if echo:
                output.stream(event.text)
        if echo:
            output.stream("\n")
        self.history = history + answer.tokens
        if answer.prefill and answer.prefill.note:
            output.say(f"prefill: {answer.prefill.note}")
        if answer.finish_reason == "capacity":
            output.say(f"the answer was cut: the context of {self.decoder.max_seq_len} tokens is full; {self.way_on}")
        return self.turn(message, answer)

    def with_message(self, message: str) -> list[int]:
        """The history with the last answer closed and a message opened for the next."""
        from lrt_deploy.chat_form import ASSISTANT_END, BOS

        if not self.history:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            return self.tokenizer.render_chat([*system, {"role": "user", "content": message}])
        end, bos = (self.tokenizer.special_tokens[name] for name in (ASSISTANT_END, BOS))
        history = self.history[:-1] if self.history[-1] in (end, bos) and len(self.history) > self.fed else self.history
        return [*history, end, *self.tokenizer.render_chat([{"role": "user", "content": message}])[1:]]

    def unread(self, history: list[int]) -> list[int]:
        """What the state has not been fed; a new chat's state begins with its first token, `<|bos|>`."""
        if self.state is None:
            self.state = self.decoder.prefill([history[:1]])
        return history[self.fed :]

    def refuse(self, message: str, needed: int) -> dict[str, Any]:
        """Say that the context is full and how to go on."""
        limit = self.decoder.max_seq_len
        output.say(f"no room for this message: the chat would have {needed} tokens of at most {limit}; {self.way_on}")
        return self.turn(message, Answer(finish_reason="capacity"))

    @property
    def way_on(self) -> str:
        """What to do about a full context."""
        return "/reset begins anew; for more room, export with a larger --max-seq-len"

    @staticmethod
    def turn(message: str, answer: Answer) -> dict[str, Any]:
        """The JSON fields of one turn."""
        return {
            "user": message,
            "assistant": answer.text,
            "finish_reason": answer.finish_reason,
            "tokens": answer.tokens,
            "prefill": answer.prefill.to_dict() if answer.prefill else None,
        }
