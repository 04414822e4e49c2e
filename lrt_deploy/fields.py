"""Turn JSON values from files into the types that a class declares, or say which field is something else.

For files that a stranger may have written: nothing is converted and nothing guessed. `true` is no number, `1.0` no
whole number, and a name that the class does not know is refused like one that is missing. Reads no files.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

LARGEST_INTEGER = 2**63 - 1
_SHOWN = 60  # characters of a value in a message

T = TypeVar("T")


def decode(kind: type[T], value: object, name: str = "") -> T:
    """Return the JSON value as the dataclass `kind`; fields may be of the types that `decode_as` knows.

    A class that reads its fields by itself, by a `from_dict`, does so and raises its own errors.
    Raises ValueError that names the field, what it holds and what was expected. `name` is put before the names.
    """
    if not isinstance(value, dict):
        raise _unexpected(name or "the document", value, "an object")
    if (read := getattr(kind, "from_dict", None)) is not None:
        result: T = read(value)
        return result
    known = _hints(kind)
    if unknown := [key for key in value if key not in known]:
        raise ValueError(f"{_joined(name, str(unknown[0]))} is not a known field")
    required = {f.name for f in dataclasses.fields(kind) if _is_required(f)}  # type: ignore[arg-type]
    if missing := [key for key in known if key in required and key not in value]:
        raise ValueError(f"{_joined(name, missing[0])} is missing")
    return kind(**{key: decode_as(known[key], item, _joined(name, key)) for key, item in value.items()})


def decode_as(hint: Any, value: Any, name: str) -> Any:  # noqa: ANN401 - any type, any JSON value
    """Return the JSON value as the type `hint`.

    That is int, float, str, bool, None, Any, a Literal, a dataclass, or a union, tuple, list or dict of such types; a
    tuple is a JSON array. Whole numbers are within 64 bits.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return decode(hint, value, name)  # type: ignore[arg-type]
    if origin in (types.UnionType, typing.Union):
        return _one_of(arguments, hint, value, name)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise _unexpected(name, value, f"one of {', '.join(map(repr, arguments))}")
        return value
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise _unexpected(name, value, "an object")
        inner = arguments[1] if arguments else Any
        return {key: decode_as(inner, item, _joined(name, key)) for key, item in value.items()}
    if origin in (tuple, list):
        return _array(origin, arguments, value, name)
    return _plain(hint, value, name)


def _plain(hint: Any, value: Any, name: str) -> Any:  # noqa: ANN401
    expected = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    allowed = (int, float) if hint is float else hint
    if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
        raise _unexpected(name, value, expected[hint])
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise _unexpected(name, value, "a number of up to 64 bits")
    return float(value) if hint is float else value


def _array(origin: Any, arguments: tuple[Any, ...], value: Any, name: str) -> Any:  # noqa: ANN401
    if not isinstance(value, list):
        raise _unexpected(name, value, "an array")
    if origin is tuple and arguments[-1:] != (...,):
        if len(value) != len(arguments):
            raise _unexpected(name, value, f"an array of {len(arguments)}")
        hints = list(arguments)
    else:
        hints = [arguments[0]] * len(value)
    pairs = zip(hints, value, strict=True)
    return origin(decode_as(hint, item, f"{name}[{index}]") for index, (hint, item) in enumerate(pairs))


def _one_of(kinds: tuple[Any, ...], hint: Any, value: Any, name: str) -> Any:  # noqa: ANN401
    if value is None and type(None) in kinds:
        return None
    errors = []
    for kind in kinds:
        try:
            return decode_as(kind, value, name)
        except ValueError as error:
            errors.append(error)
    if len(kinds) - (type(None) in kinds) == 1:
        raise next(error for kind, error in zip(kinds, errors, strict=True) if kind is not type(None))
    raise _unexpected(name, value, str(hint).replace("NoneType", "null"))


def _unexpected(name: str, value: object, expected: str) -> ValueError:
    return ValueError(f"{name} is {shown(value)}, expected {expected}")


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


def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
