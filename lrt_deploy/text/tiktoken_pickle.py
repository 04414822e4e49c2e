"""Reads the plain data of a pickled tiktoken `Encoding` without running pickle.

A pickle is a program, and `tokenizer.pkl` comes from strangers. This module interprets only the instructions that a
pickled `Encoding` of protocol 2 to 5 is made of: strings, bytes, numbers, dicts, tuples, the memo, and the one way in
which the object is built. Names of globals are text to it; nothing is ever imported, looked up or called. Whatever
else a file holds is refused, and every refusal is a `CheckpointError`.
It knows nothing of byte-pair encoding: whether the ranks make sense is for `tokenizer` to say. It deliberately reads
less than Python's pickle does (no lists, sets, numbers as keys, protocols 0 and 1): a real file has none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lrt_deploy.errors import CheckpointError
from lrt_deploy.files import read_bytes
from lrt_deploy.pickle_machine import Machine, type_name

# Bounds for memory and time, 15 and 2 times what the largest public vocabulary (200 thousand tokens) needs.
MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_OPCODES = 2_000_000
PROTOCOLS = range(2, 6)
STATE_KEYS = ("name", "pat_str", "mergeable_ranks", "special_tokens")


@dataclass(frozen=True)
class EncodingData:
    """What a tiktoken `Encoding` is made of. Types are checked; whether the ids fit together is not."""

    name: str
    pat_str: str
    mergeable_ranks: dict[bytes, int]
    special_tokens: dict[str, int]


class _Global(NamedTuple):
    """The name of a global: inert text."""

    module: str
    name: str

    def __str__(self) -> str:
        return ascii(f"{self.module}.{self.name}"[:200])


# The object itself, and how protocol 2 spells a bytes literal: _codecs.encode(text, 'latin1').
_ENCODING = _Global("tiktoken.core", "Encoding")
_ENCODE = _Global("_codecs", "encode")
_ALLOWED = (_ENCODING, _ENCODE)


class _Object:
    """The `Encoding` under construction: no type of its own, only the state that BUILD brings."""

    state: object = None


def read_encoding(path: Path, limit: int | None = None) -> EncodingData:
    """Read the tiktoken `Encoding` pickled in a file of at most `limit` bytes (None: `MAX_FILE_BYTES`); run nothing."""
    limit = MAX_FILE_BYTES if limit is None else limit
    return parse_encoding(read_bytes(path, "the tokenizer", CheckpointError, limit), str(path))


def parse_encoding(data: bytes, source: str) -> EncodingData:
    """As `read_encoding`, from bytes; `source` names them in errors."""
    if len(data) < 2 or data[0] != 0x80 or data[1] not in PROTOCOLS:
        raise CheckpointError(
            f"{source} does not begin as a pickle of protocol 2 to 5 (found the bytes {data[:2]!r}); the authors' "
            "training code writes protocol 4. Take the tokenizer.pkl that training wrote"
        )
    try:
        return _validated(_Machine(data, source, MAX_OPCODES).run(), source)
    except CheckpointError:
        raise
    except Exception as error:  # the opcode reader raises many types on damaged files; all mean the same here
        text = ascii(str(error))[:200]
        raise CheckpointError(f"{source} is not a readable pickle ({text}); it is cut off or damaged") from error


class _Machine(Machine):
    """Dict keys are strings or bytes only, so that no hash can be made slow or to collide."""

    too_many = "; no tokenizer needs so many"
    no_other = "instruction {}, which no pickled tiktoken Encoding contains"
    its_end = "its end"

    def __init__(self, data: bytes, source: str, most_instructions: int) -> None:
        super().__init__(data, source, most_instructions)
        self._encodable_chars = len(data)  # an honest file spells out every text that it encodes

    def set_items(self, items: tuple[object, ...]) -> None:
        """Put keys and values, in turns, into the dict below them."""
        target = self.pop(dict)
        self.stack.append(target)
        if len(items) % 2:
            self.refuse("has a dict key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, bytes):
                self.refuse(f"has a dict key of type {type_name(key)}; only str and bytes belong there")
            target[key] = value

    def push_global(self, module: str, name: str) -> None:
        """Push the name of one of the two known globals."""
        found = _Global(module, name)
        if found not in _ALLOWED:
            allowed = " and ".join(map(str, _ALLOWED))
            self.refuse(f"names the global {found}, which could run code when unpickled; allowed are only {allowed}")
        self.stack.append(found)

    def new_object(self) -> None:
        """Begin an `Encoding`, which takes no arguments here."""
        arguments, kind = self.pop(tuple), self.pop(_Global)
        if kind != _ENCODING or arguments:
            self.refuse(f"builds {kind} from {len(arguments)} arguments; only {_ENCODING} from none is allowed")
        self.stack.append(_Object())

    def bytes_literal(self) -> None:
        """Turn a text into the bytes that protocol 2 means by it."""
        arguments, function = self.pop(tuple), self.pop(_Global)
        if function != _ENCODE or len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] != "latin1":
            self.refuse(f"calls {function}; only {_ENCODE} with a text and 'latin1' is known (a bytes literal)")
        self._encodable_chars -= len(arguments[0])
        if self._encodable_chars < 0:
            self.refuse("encodes the same text again and again")
        self.stack.append(arguments[0].encode("latin1"))

    def build(self) -> None:
        """Give the `Encoding` its state, once."""
        state, target = self.pop(object), self.pop(_Object)
        if target.state is not None:
            self.refuse("sets the state of one object twice")
        target.state = state
        self.stack.append(target)

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self.source} {what}. Expected nothing but a pickled tiktoken Encoding, as the authors' training code "
            "writes it; do not open this file with pickle"
        )


_AS_READ = (
    *("BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
)
_Machine.literals = {**Machine.literals, **dict.fromkeys(_AS_READ, lambda arg: arg)}
_Machine.actions = {
    **Machine.actions,
    "NEWOBJ": lambda machine, _: machine.new_object(),
    "REDUCE": lambda machine, _: machine.bytes_literal(),
    "BUILD": lambda machine, _: machine.build(),
}


def _validated(result: object, source: str) -> EncodingData:
    state = result.state if isinstance(result, _Object) else None
    if isinstance(state, str):
        raise CheckpointError(
            f"{source} holds only the name {state[:100]!a} of an encoding that tiktoken downloads by itself, not "
            "the tokens. Write the tokens out: a tokenizer.json for this folder, or an Encoding of a name of your own"
        )
    if not isinstance(state, dict) or set(state) != set(STATE_KEYS):
        found = "other keys" if isinstance(state, dict) else f"only the type {type_name(state or result)}"
        raise CheckpointError(f"{source} holds {found}; a tiktoken Encoding has {', '.join(STATE_KEYS)}")
    problems = [*_text_problems(state), *_table_problems(state, "mergeable_ranks", bytes)]
    problems += _table_problems(state, "special_tokens", str)
    if problems:
        raise CheckpointError(f"{source}: {problems[0]}; tiktoken would not take it either. The file is damaged")
    return EncodingData(**state)


def _text_problems(state: dict[str, Any]) -> Iterator[str]:
    for key in ("name", "pat_str"):
        if not _is_text(state[key]):
            yield f"{key} is a {type_name(state[key])}, expected valid Unicode text"


def _table_problems(state: dict[str, Any], key: str, kind: type) -> Iterator[str]:
    table = state[key]
    if type(table) is not dict:
        yield f"{key} is a {type_name(table)}, expected a dict"
        return
    for token, rank in table.items():
        if type(token) is not kind or (kind is str and not _is_text(token)):
            yield f"{key} has the token {token[:100]!a}, expected {kind.__name__}"
        if type(rank) is not int or not 0 <= rank < 2**31:
            shown = str(rank) if type(rank) is int else f"of type {type_name(rank)}"
            yield f"{key}[{token[:100]!a}] is {shown}, expected a whole number from 0 to 2**31 - 1"


def _is_text(value: object) -> bool:
    """Whether it is a str without lone surrogates, which pickle can carry and Unicode cannot."""
    try:
        return type(value) is str and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False
