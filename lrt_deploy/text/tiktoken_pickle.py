"""Read the plain data of a pickled tiktoken `Encoding` of protocol 2 to 5 without running pickle: see `pickle_machine`.

Whether the ranks make sense is checked in `tokenizer_file`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrt_deploy.errors import CheckpointError
from lrt_deploy.files import read_bytes
from lrt_deploy.pickle_machine import Global, Machine, type_name

# Bounds for memory and time: 15 and 2 times the need of the largest public vocabulary (200 thousand tokens).
MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_OPCODES = 2_000_000
PROTOCOLS = range(2, 6)
STATE_KEYS = ("name", "pat_str", "mergeable_ranks", "special_tokens")


@dataclass(frozen=True)
class EncodingData:
    """The fields of a tiktoken `Encoding`. Types are checked; whether the ids fit together is not."""

    name: str
    pat_str: str
    mergeable_ranks: dict[bytes, int]
    special_tokens: dict[str, int]


# The object itself, and how protocol 2 spells a bytes literal: _codecs.encode(text, 'latin1').
_ENCODING, _ENCODE = Global("tiktoken.core", "Encoding"), Global("_codecs", "encode")


class _Object:
    """The `Encoding` under construction: no type of its own, only the state that BUILD brings."""

    state: object = None


def read_encoding(path: Path, limit: int | None = None) -> EncodingData:
    """Read the tiktoken `Encoding` pickled in a file of at most `limit` bytes (None: `MAX_FILE_BYTES`); run nothing."""
    return parse_encoding(read_bytes(path, "the tokenizer", CheckpointError, limit or MAX_FILE_BYTES), str(path))


def parse_encoding(data: bytes, source: str) -> EncodingData:
    """Read a pickled `Encoding` from bytes; `source` names them in errors."""
    if len(data) < 2 or data[0] != 0x80 or data[1] not in PROTOCOLS:
        raise CheckpointError(
            f"{source} does not begin as a pickle of protocol 2 to 5 (found the bytes {data[:2]!r}); the authors' "
            "training code writes protocol 4. Take the tokenizer.pkl that training wrote"
        )
    return _validated(_Machine(data, source, MAX_OPCODES).run(), source)


class _Machine(Machine):
    globals = frozenset((_ENCODING, _ENCODE))
    key_types = (str, bytes)
    longest_text = MAX_FILE_BYTES
    contents = (
        "Expected nothing but a pickled tiktoken Encoding, as the authors' training code writes it; do not open this "
        "file with pickle"
    )

    def __init__(self, data: bytes, source: str, most_instructions: int) -> None:
        super().__init__(data, source, most_instructions)
        self._encodable_chars = len(data)  # an honest file spells out every text that it encodes

    def call(self, opcode: str, function: Global, arguments: tuple[object, ...]) -> object:
        """Begin an `Encoding`, which takes no arguments here, or make a bytes literal of protocol 2."""
        if (opcode, function, arguments) == ("NEWOBJ", _ENCODING, ()):
            return _Object()
        if (opcode, function, arguments[1:]) != ("REDUCE", _ENCODE, ("latin1",)) or type(arguments[0]) is not str:
            self.refuse(
                f"calls {function} with {len(arguments)} arguments; known are only a new {_ENCODING} with none and "
                f"{_ENCODE} with a text and 'latin1'"
            )
        self._encodable_chars -= len(arguments[0])
        if self._encodable_chars < 0:
            self.refuse("encodes the same text again and again")
        return arguments[0].encode("latin1")

    def build(self, target: object, state: object) -> None:
        """Give the `Encoding` its state, once."""
        if not isinstance(target, _Object):
            self.refuse(f"sets attributes of a {type_name(target)}")
        if target.state is not None:
            self.refuse("sets the state of one object twice")
        target.state = state


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
    if problem := next(_problems(state), None):
        raise CheckpointError(f"{source}: {problem}; tiktoken would not take it either. The file is damaged")
    return EncodingData(**state)


def _problems(state: dict[str, Any]) -> Iterator[str]:
    for key in ("name", "pat_str"):
        if not is_text(state[key]):
            yield f"{key} is a {type_name(state[key])}, expected valid Unicode text"
    for key, kind in (("mergeable_ranks", bytes), ("special_tokens", str)):
        if type(table := state[key]) is not dict:
            yield f"{key} is a {type_name(table)}, expected a dict"
        for token, rank in table.items():
            if type(token) is not kind or (kind is str and not is_text(token)):
                yield f"{key} has the token {token[:100]!a}, expected {kind.__name__}"
            if type(rank) is not int or not 0 <= rank < 2**31:
                shown = str(rank) if type(rank) is int else f"of type {type_name(rank)}"
                yield f"{key}[{token[:100]!a}] is {shown}, expected a whole number from 0 to 2**31 - 1"


def is_text(value: object) -> bool:
    """Return whether it is a str without lone surrogates, which pickle can carry and Unicode cannot."""
    try:
        return type(value) is str and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False
