"""`lrt-deploy chat`: a conversation on stdin and stdout that never reads a token twice.

One message a line. The commands, lines that begin with `/`, are here; `conversation` has the chat itself.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrt_deploy.errors import InputError, LRTDeployError

from . import options, output, signals
from .conversation import Conversation

if TYPE_CHECKING:
    from lrt_deploy.runtime.decoder import Decoder
    from lrt_deploy.text.tokenizer import Tokenizer

_HELP = """\
/reset          begin again, with an empty conversation
/rewind [N]     take back the last N turns (1)
/fork NAME      go on in a copy; /switch NAME goes to another one
/save FILE      write the conversation; /load FILE continues it
/stats          how full the context is, and what it cost
/quit           end (so does the end of the input)"""


@dataclass(frozen=True)
class ChatOptions(options.GenerationOptions):
    """Options of the answers; they may be longer than those of `generate`."""

    max_new_tokens: Annotated[int, options.option("Stop after this many tokens.", panel=options.SAMPLING)] = 256


def chat(
    bundle: options.BundlePath,
    *,
    system: Annotated[str | None, typer.Option(help="System message, joined to the first message.")] = None,
    generation: ChatOptions,
    reading: options.PromptOptions,
    opening: options.DecoderOptions,
    json: options.Json = False,
) -> None:
    """Talk with a model: one message a line, answers go to stdout as they come. /help lists the commands."""
    cache = reading.open_cache()
    with opening.open(bundle) as decoder:
        conversation = Conversation(decoder, chat_tokenizer(decoder), system, generation, reading, cache=cache)
        conversation.check()
        branches = _Branches({"main": conversation})
        output.say(f"{decoder.backend}, {decoder.precision}, {decoder.max_seq_len} tokens; /help lists the commands")
        turns = [turn for line in messages(echo=not json) if (turn := branches.take(line, not json))]
    if json:
        output.document({"turns": turns, "backend": decoder.backend, "precision": decoder.precision})


def chat_tokenizer(decoder: Decoder) -> Tokenizer:
    """Return the bundle's tokenizer; InputError if it lacks tokens of the chat form, or its template cannot be used."""
    from lrt_deploy.text.chat import ASSISTANT_END, ASSISTANT_START, BOS, USER_END, USER_START

    if decoder.tokenizer is None:
        raise InputError("this bundle has no tokenizer, and a chat needs one; export it again with --tokenizer")
    if decoder.tokenizer.chat is not None:
        decoder.tokenizer.chat.check()
        return decoder.tokenizer
    needed = (BOS, USER_START, USER_END, ASSISTANT_START, ASSISTANT_END)
    if missing := [name for name in needed if name not in decoder.tokenizer.special_tokens]:
        raise InputError(f"the bundle's tokenizer has no {missing[0]}, which the chat form needs; use generate")
    return decoder.tokenizer


def messages(echo: bool) -> Iterator[str]:
    """Yield lines of stdin that are not blank, until its end or /quit; a prompt is shown on terminals only."""
    by_hand = sys.stdin.isatty()
    editable = by_hand and echo and sys.stdout.isatty()
    if editable:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - importing it is what teaches input() to edit
    while True:
        if by_hand and not editable:
            output.say("> ", end="")
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


@dataclass
class _Branches:
    """Chats that share a beginning, by name; the first is `main`. Passes messages on, and runs commands: `do_NAME`."""

    chats: dict[str, Conversation]
    current: str = "main"

    @property
    def chat(self) -> Conversation:
        return self.chats[self.current]

    def take(self, line: str, echo: bool) -> dict[str, Any] | None:
        """Run a command, or answer a message and return its turn."""
        command = line.strip()
        if not (command.startswith("/") and command[1:].split(maxsplit=1)[:1] and command[1:].split()[0].isalpha()):
            return self.chat.answer(line, echo)
        name, _, argument = command[1:].partition(" ")
        action = getattr(self, f"do_{name}", None)
        if action is None:
            output.say(f"there is no command /{name}; /help lists the commands")
            return None
        try:
            output.say(action(argument.strip()))
        except (LRTDeployError, ValueError) as error:
            output.say(f"/{name}: {error}")
        except KeyboardInterrupt:
            signals.forget()
            output.say(f"/{name}: interrupted")
        return None

    def do_help(self, argument: str) -> str:
        return _HELP

    def do_reset(self, argument: str) -> str:
        self.chat.reset()
        return "a new chat begins"

    def do_stats(self, argument: str) -> str:
        others = ", ".join(name for name in self.chats if name != self.current)
        return self.chat.stats() + (f"; this is {self.current}, beside {others}" if others else "")

    def do_rewind(self, argument: str) -> str:
        if not (argument or "1").isdecimal():
            raise InputError(f"expected a number of turns, not {argument!r}")
        turns = int(argument or 1)
        self.chat.rewind(turns)
        return f"{turns} turn(s) taken back, {len(self.chat.turns)} left"

    def do_save(self, argument: str) -> str:
        self.chat.save(_needed(argument, "a file name"))
        return f"saved to {argument}: {self.chat.stats()}"

    def do_load(self, argument: str) -> str:
        self.chat.load(_needed(argument, "a file name"))
        return f"loaded from {argument}: {self.chat.stats()}"

    def do_fork(self, argument: str) -> str:
        if _needed(argument, "a name") in self.chats:
            raise InputError(f"there is a chat {argument} already; /switch {argument} goes there")
        self.chats[argument], left = self.chat.branch(), self.current
        self.current = argument
        return f"now in {argument}; /switch {left} goes back"

    def do_switch(self, argument: str) -> str:
        if argument not in self.chats:
            raise InputError(f"there is no chat {argument!r}; there are {', '.join(self.chats)}")
        self.current = argument
        return f"now in {argument}: {self.chat.stats()}"


def _needed(argument: str, what: str) -> str:
    if not argument:
        raise InputError(f"{what} is missing")
    return argument
