"""Check JSON values from files and arguments of public functions, and show values in messages.

`convert` is msgspec's strict conversion to the types that a class declares, with messages that name the field, its
value and what was expected. `check_...` return an argument or raise InputError with its name: whole numbers may be
Python's or NumPy's and never `True`, numbers are finite. Token ids: see `text.prompts`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeGuard, TypeVar

import msgspec
from msgspec import Meta

from .errors import InputError, LRTDeployError

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


@contextlib.contextmanager
def raised_as(error: type[LRTDeployError], before: str, after: str = "") -> Iterator[None]:
    """Raise a ValueError of the block as `error`, with a text before and after its message."""
    try:
        yield
    except ValueError as cause:
        raise error(f"{before}{cause}{after}") from cause


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


LARGEST_COUNT = 2**31 - 1  # of tokens, rows, slots: beyond any machine
_UNREACHABLE = (errno.ENAMETOOLONG, errno.EACCES)


def refuse(value: object, name: str, expected: str) -> NoReturn:
    """Raise InputError that says what the argument is and what was expected."""
    raise InputError(f"{name} is {shown(value)}, expected {expected}")


def check_whole(value: object, name: str, least: int = 0, most: float = LARGEST_COUNT) -> int:
    """Return a whole number from `least` to `most`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        refuse(value, name, f"a whole number, {least} {'or more' if most >= LARGEST_COUNT else f'to {most}'}")
    return int(value)


def check_list(value: object, name: str) -> list[Any]:
    """Return the items of a list, whatever they are."""
    if not _is_list(value):
        refuse(value, name, "a list of whole numbers")
    return list(value)


def check_wholes(value: object, name: str) -> list[int]:
    """Return a list of whole numbers from 0 on, in any number."""
    return [check_whole(item, f"{name}[{index}]") for index, item in enumerate(check_list(value, name))]


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Return whether it is a list, a tuple, a range or an array of one dimension; a text is none."""
    return (isinstance(value, Sequence) and not isinstance(value, (str, bytes))) or getattr(value, "ndim", 0) == 1


def check_number(value: object, name: str, least: float = -math.inf, most: float = math.inf) -> float:
    """Return a finite number from `least` to `most`."""
    try:
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            found = float(value)
            if math.isfinite(found) and least <= found <= most:
                return found
    except OverflowError:  # a whole number beyond float64
        pass
    ends = "" if math.isinf(least) and math.isinf(most) else f" from {least:g} to {most:g}"
    refuse(value, name, f"a finite number{ends}")


def check_is(value: object, kind: type[T], name: str, expected: str | None = None) -> T:
    """Return an object of the class `kind`."""
    if not isinstance(value, kind):
        refuse(value, name, expected or f"a {kind.__name__}")
    return value


def check_flag(value: object, name: str) -> bool:
    """Return True or False."""
    return check_is(value, bool, name, "True or False")


def check_text(value: object, name: str) -> str:
    """Return a text."""
    return check_is(value, str, name, "a text")


def check_texts(value: object, name: str) -> tuple[str, ...]:
    """Return several texts; one text alone is none of them."""
    if not _is_list(value) and not isinstance(value, (set, frozenset)):
        refuse(value, name, "a list of texts")
    return tuple(check_text(item, f"{name}[{index}]") for index, item in enumerate(value))


def check_path(value: object, name: str) -> Path:
    """Return a path, whose name is UTF-8: onnxruntime opens no other file."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        refuse(value, name, "a path")
    path = os.fspath(value)
    if "\0" in path or not path:
        refuse(path, name, "a path: it is empty or holds a NUL character")
    try:
        os.lstat(path)
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is {shown(path)}, which no file can be called: {error.reason}") from error
    except OSError as error:
        if error.errno in _UNREACHABLE:  # `Path.exists` and `Path.is_dir` would raise it
            raise InputError(f"{name} is {shown(path)}, which cannot be looked up: {error.strerror}") from error
    if any("\udc80" <= char <= "\udcff" for char in path):  # bytes that Python could not decode
        raise InputError(f"{name} is {shown(path)}, a name that is not UTF-8, which onnxruntime cannot open; rename it")
    return Path(path)


def check_choice(value: object, name: str, choices: Collection[str]) -> str:
    """Return one of the texts `choices`."""
    if not isinstance(value, str) or value not in choices:
        refuse(value, name, f"one of {', '.join(choices)}")
    return value


def check_callable(value: object, name: str) -> Any:  # noqa: ANN401 - whatever it takes and returns
    """Return a function or another object that can be called."""
    if not callable(value):
        refuse(value, name, "a function")
    return value
