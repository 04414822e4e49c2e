"""Check the arguments of the public functions: an unusable value raises InputError with the argument's name.

Whole numbers may be Python's or NumPy's and never `True`; numbers are finite. Token ids: see `text.prompts`.
"""

from __future__ import annotations

import errno
import math
import numbers
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeGuard, TypeVar

from .errors import InputError
from .fields import shown

T = TypeVar("T")
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
