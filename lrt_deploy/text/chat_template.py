"""Chat templates of checkpoints: Jinja programs that put a conversation into the form that a model was trained on.

They come from strangers, so a process of its own renders them (`chat_template_program`), whose time, memory and output
are bounded. Only what the template itself writes becomes a special token: text of a message never does. For that, each
conversation is rendered three times: as it is; with the letters of special tokens replaced in the messages; and with
the special tokens replaced in the template. A rendering with replacements counts only if it is otherwise the first one.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from lrt_deploy.errors import CheckpointError, InputError, LRTDeployError
from lrt_deploy.fields import shown
from lrt_deploy.files import read_json, read_text
from lrt_deploy.machine import lack, missing

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
MAX_TEMPLATE_BYTES = 2**18  # the longest ones in use have about 30 kB
_MAX_CONFIG_BYTES = 2**24
_MAX_OUTPUT = 2**22  # characters
_CPU_SECONDS, _SECONDS = 2, 30  # of CPU time, which a busy machine does not change; and in any case
_MEMORY_BYTES = 2**29
_TOO_MUCH = f"more than {_CPU_SECONDS} seconds or {_MEMORY_BYTES >> 20} MiB"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FIRST_PRIVATE, _LAST_PRIVATE = 0x100000, 0x10FFFD  # code points that stand for no character


class ChatTemplate(NamedTuple):
    """The text of a template, and the tokens that it can name: `bos_token`, `eos_token` and so on."""

    source: str
    tokens: dict[str, str]


class Piece(NamedTuple):
    """A part of a rendered conversation: the name of a special token, or text."""

    text: str
    special: bool


def load_template(folder: Path, error: type[LRTDeployError] = CheckpointError) -> ChatTemplate | None:
    """Read the chat template in a tokenizer's folder; None if it has none.

    That is `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`, where the tokens stand in any
    case. Raises `error` for files that cannot be read as that.
    """
    path, config_path = folder / TEMPLATE_FILE, folder / CONFIG_FILE
    config: Any = {}
    if config_path.exists():
        config = read_json(config_path, "the tokenizer's configuration", error, _MAX_CONFIG_BYTES, constants=True)
        if not isinstance(config, dict):
            raise error(f"{config_path} is {shown(config)}, expected a JSON object")
    if path.exists():
        source: object = read_text(path, "the chat template", error, MAX_TEMPLATE_BYTES)
    else:
        path, source = config_path, _default_of(config.get("chat_template"))
    if source is None:
        return None
    if not isinstance(source, str) or len(source) > MAX_TEMPLATE_BYTES:
        expected = f"expected a text of at most {MAX_TEMPLATE_BYTES} characters, or a list with one named default"
        raise error(f"chat_template in {path} is {shown(source)}, {expected}")
    return ChatTemplate(source, {name: text for name in _NAMED if (text := _token_of(config.get(name)))})


def _default_of(found: object) -> object:
    """Return the template of a configuration that may name several."""
    if not isinstance(found, list):
        return found
    named = [item.get("template") for item in found if isinstance(item, dict) and item.get("name") == "default"]
    return named[0] if named else found


def _token_of(found: object) -> str | None:
    """Return the text of a token, which stands by itself or with its properties."""
    text = found.get("content") if isinstance(found, dict) else found
    return text if isinstance(text, str) else None


def template_files(template: ChatTemplate) -> dict[str, str]:
    """Return the texts of the files that `load_template` reads, by name."""
    return {TEMPLATE_FILE: template.source, CONFIG_FILE: json.dumps(template.tokens, indent=2) + "\n"}


class ChatRenderer:
    """Renders conversations by a template, for a tokenizer with these special tokens. Threads may share it."""

    def __init__(self, template: ChatTemplate, special: Collection[str], name: str) -> None:
        self.template, self._name = template, name
        self._special = sorted(special, key=len, reverse=True)
        self._letters = sorted(set("".join(special)))
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def check(self) -> None:
        """Load the template; raises InputError, with the file's name, if it is none."""
        with self._lock:
            self._started("")

    def pieces(self, messages: Sequence[Mapping[str, str]]) -> list[Piece]:
        """Return a conversation with the beginning of the answer, in order.

        Raises InputError with the template's reason if it refuses or fails, and where text of a message cannot be told
        from the template's.
        """
        with self._lock:
            worker = self._started("".join(message["content"] for message in messages))
            plain, hidden, marked = self._render(worker, messages)
        if "error" in plain:
            raise InputError(f"the chat template {plain['error']}")
        text, signs = plain["text"], worker.signs
        if signs.shown(hidden.get("text")) == text:
            return [Piece(signs.shown(part) or "", special) for part, special in _cut(hidden["text"], self._special)]
        if signs.shown(marked.get("text")) == text and not any(name in marked["text"] for name in self._special):
            names = [signs.hidden(name) for name in self._special]
            return [Piece(signs.shown(part) or "", special) for part, special in _cut(marked["text"], names)]
        raise InputError(
            "the chat template depends on what the messages say in a way that does not tell the names of special "
            "tokens in them from its own; leave these out of the messages"
        )

    def _render(self, worker: _Worker, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        hidden = worker.signs.hidden
        tokens = self.template.tokens
        wanted = [
            (0, _variables(messages, tokens)),
            (0, _variables([{**message, "content": hidden(message["content"])} for message in messages], tokens)),
            (1, _variables(messages, {name: hidden(token) for name, token in tokens.items()})),
        ]
        try:
            return msgspec.convert(worker.ask(wanted), list[dict[str, str]])
        except BaseException as error:  # after an interrupt, its answer would be taken for that of the next question
            self._worker = None
            if not isinstance(error, EOFError):
                raise
            raise InputError(f"the chat template takes {_TOO_MUCH} to render these messages") from None

    def _started(self, text: str) -> _Worker:
        """Return the process, started where there is none or where `text` holds characters that it uses as signs."""
        if self._worker is not None and not self._worker.signs.used_in(text):
            return self._worker
        if "jinja2" in missing("serve"):
            raise InputError(lack(f"the chat template {self._name}", ["jinja2"], "serve"))
        signs = _Signs.unused(self._letters, text + self.template.source)
        source = self.template.source
        marked = re.sub("|".join(map(re.escape, self._special)), lambda found: signs.hidden(found[0]), source)
        worker = _Worker(signs)
        try:
            problem, _ = worker.start([source, marked if self._special else source])
        except EOFError:
            problem = f"it takes {_TOO_MUCH} to load"
        if problem:
            raise InputError(f"{self._name} cannot be used as a chat template: {problem}")
        self._worker = worker
        return worker


def _variables(messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str]) -> dict[str, Any]:
    """Return what transformers gives to a template."""
    return {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **tokens}


def _cut(text: str, names: Sequence[str]) -> list[tuple[str, bool]]:
    """Cut a text at the names in it."""
    if not names:
        return [(text, False)]
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
    return [(part, at % 2 == 1) for at, part in enumerate(parts) if part]


@dataclass(frozen=True)
class _Signs:
    """Private characters in the place of the letters of special tokens."""

    first: int
    to_signs: dict[int, str]
    to_letters: dict[int, str]

    @classmethod
    def unused(cls, letters: Sequence[str], text: str) -> _Signs:
        """Choose signs that do not occur in a text."""
        used = {ord(character) for character in text if ord(character) >= _FIRST_PRIVATE}
        count = len(letters)
        for first in range(_FIRST_PRIVATE, _LAST_PRIVATE - count, max(1, count)):
            if used.isdisjoint(range(first, first + count)):
                signs = [chr(first + i) for i in range(count)]
                return cls(
                    first,
                    {ord(letter): sign for letter, sign in zip(letters, signs, strict=True)},
                    {ord(sign): letter for letter, sign in zip(letters, signs, strict=True)},
                )
        raise InputError("the messages hold private-use characters of all kinds, which chat templates are read by")

    def used_in(self, text: str) -> bool:
        """Return whether a text holds a sign."""
        return not text.isascii() and not self.to_letters.keys().isdisjoint(map(ord, text))

    def hidden(self, text: str) -> str:
        """Replace letters by signs."""
        return text.translate(self.to_signs)

    def shown(self, text: str | None) -> str | None:
        """Replace signs by letters."""
        return None if text is None else text.translate(self.to_letters)


class _Worker:
    """A process that renders. It ends with this object, and when it takes more than it may."""

    def __init__(self, signs: _Signs) -> None:
        self.signs = signs
        program = [sys.executable, "-P", str(Path(__file__).with_name("chat_template_program.py"))]
        try:
            self._process = subprocess.Popen(  # an interrupt of the terminal is not for it
                program,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise InputError(f"no process could be started to render chats: {error.strerror}") from error
        weakref.finalize(self, _end, self._process)

    def start(self, templates: Sequence[str]) -> list[str]:
        """Load templates; return what is wrong with each, or an empty text."""
        limits = {"bytes": _MEMORY_BYTES, "characters": _MAX_OUTPUT, "cpu_seconds": _CPU_SECONDS, "seconds": _SECONDS}
        return msgspec.convert(self.ask({"templates": templates, **limits}), list[str])

    def ask(self, question: object) -> object:
        """Send a line and return the answer; raises EOFError if the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not written yet
            assert pipe is not None
            pipe.close()
    process.wait()
