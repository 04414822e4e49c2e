"""Check JSON values from files against the types that a class declares, and show values in messages.

`convert` is msgspec's strict conversion with messages that name the field, its value and what was expected.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

LARGEST_INTEGER = 2**63 - 1
Whole = Annotated[int, Meta(ge=-LARGEST_INTEGER, le=LARGEST_INTEGER)]
Count = Annotated[int, Meta(ge=0, le=LARGEST_INTEGER)]
Size = Annotated[int, Meta(ge=1, le=LARGEST_INTEGER)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]

_SHOWN = 60  # characters of a value in a message
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "an array",
    "object": "an object",
}

T = TypeVar("T")


def convert(kind: type[T], value: object, name: str = "") -> T:
    """Return the JSON value as `kind`, a type that msgspec knows.

    Raises ValueError that names the field, what it holds and what was expected. `name` is put before the field's name.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        for part in _parts(kind, value, name):
            convert(*part)
        raise ValueError(_message(kind, value, name, str(error))) from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{name or 'the document'} holds text that is no Unicode: {shown(error.object)}") from error


def _parts(kind: Any, value: object, name: str) -> Iterator[tuple[Any, object, str]]:  # noqa: ANN401 - any type
    """Yield the type, value and name of each part of a value whose parts have declared types."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):  # with None
        yield from _parts(arguments[0], value, name)
    elif (
        isinstance(value, dict)
        and isinstance(kind, type)
        and (dataclasses.is_dataclass(kind) or issubclass(kind, msgspec.Struct))
    ):
        hints = typing.get_type_hints(kind, include_extras=True)
        yield from ((hints[key], item, _joined(name, key)) for key, item in value.items() if key in hints)
    elif isinstance(value, dict) and typing.get_origin(kind) is dict:
        yield from ((arguments[1], item, _joined(name, key)) for key, item in value.items())
    elif isinstance(value, list) and typing.get_origin(kind) in (tuple, list):
        kinds = arguments if len(arguments) == len(value) and ... not in arguments else [arguments[0]] * len(value)
        yield from ((kinds[i], item, f"{name}[{i}]") for i, item in enumerate(value))


def _message(kind: Any, value: object, name: str, said: str) -> str:  # noqa: ANN401 - any type
    if field := re.fullmatch(r"Object (missing required|contains unknown) field `(.*)`", said, re.DOTALL):
        ending = "is missing" if field[1] == "missing required" else "is not a known field"
        return f"{_joined(name, shown(field[2])[1:-1])} {ending}"
    if said.startswith("Expected"):
        expected = re.sub(r"`(\w+)( \| null)?`", lambda word: _WORDS.get(word[1], word[0]), said.partition(",")[0][9:])
    elif typing.get_origin(kind) is typing.Literal:
        expected = f"one of {', '.join(map(repr, typing.get_args(kind)))}"
    else:  # a class's own check, which names its fields
        return f"{name}: {said}" if name else said
    return f"{name or 'the document'} is {shown(value)}, expected {expected}"


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def shown(value: object) -> str:
    """Return a short text of a value for a message; never long, never an error."""
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (list, tuple, dict, str, bytes)) and len(value) > _SHOWN:
        kind = {list: "array", tuple: "array", dict: "object"}.get(type(value), type(value).__name__)
        return f"{'an' if kind[0] in 'ao' else 'a'} {kind} of length {len(value)}"
    try:
        text = repr(value)
    except Exception:  # an object of the caller's, or a number of too many digits within one
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
