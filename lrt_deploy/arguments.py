"""Check the arguments of the public functions: a value that cannot be meant raises InputError with the argument's name.

Whole numbers may be Python's or NumPy's and never `True`; numbers are finite. Each function returns the value in the
type that the caller goes on with. Token ids are checked in `prompts`.
"""

from __future__ import annotations

import errno
import math
import numbers
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from .errors import InputError
from .fields import shown

T = TypeVar("T")
LARGEST_COUNT = 2**31 - 1  # of tokens, rows, slots: beyond any machine
_UNREACHABLE = (errno.ENAMETOOLONG, errno.EACCES)


def check_whole(value: object, name: str, least: int = 0, most: int = LARGEST_COUNT) -> int:
    """Return a whole number from `least` to `most`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        end = "or more" if most == LARGEST_COUNT else f"to {most}"
        raise InputError(f"{name} is {shown(value)}, expected a whole number, {least} {end}")
    return int(value)


def check_list(value: object, name: str) -> list[Any]:
    """Return the items of a list, whatever they are."""
    if not _is_list(value):
        raise InputError(f"{name} is {shown(value)}, expected a list of whole numbers")
    return list(value)


def check_wholes(value: object, name: str) -> list[int]:
    """Return a list of whole numbers from 0 on, in any number."""
    value = check_list(value, name)
    return [check_whole(item, f"{name}[{index}]") for index, item in enumerate(value)]


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    """A list, a tuple, a range or an array of one dimension, and no text."""
    return (isinstance(value, Sequence) and not isinstance(value, (str, bytes))) or getattr(value, "ndim", 0) == 1


def check_number(value: object, name: str, least: float = -math.inf, most: float = math.inf) -> float:
    """Return a finite number from `least` to `most`."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not _is_within(value, least, most):
        ends = "" if math.isinf(least) and math.isinf(most) else f" from {least:g} to {most:g}"
        raise InputError(f"{name} is {shown(value)}, expected a finite number{ends}")
    return float(value)


def _is_within(value: numbers.Real, least: float, most: float) -> bool:
    try:
        return math.isfinite(value) and least <= float(value) <= most
    except OverflowError:  # a whole number beyond float64
        return False


def check_flag(value: object, name: str) -> bool:
    """Return True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} is {shown(value)}, expected True or False")
    return value


def check_text(value: object, name: str) -> str:
    """Return a text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise InputError(f"{name} is {shown(value)}, expected a text")
    return value


def check_texts(value: object, name: str) -> tuple[str, ...]:
    """Return several texts; one text alone is none of them."""
    if not _is_list(value) and not isinstance(value, (set, frozenset)):
        raise InputError(f"{name} is {shown(value)}, expected a list of texts")
    return tuple(check_text(item, f"{name}[{index}]") for index, item in enumerate(value))


def check_path(value: object, name: str) -> Path:
    """Return a path."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise InputError(f"{name} is {shown(value)}, expected a path")
    path = os.fspath(value)
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is {shown(path)}, which no file can be called: {error.reason}") from error
    if "\0" in path or not path:
        raise InputError(f"{name} is {shown(path)}, expected a path: it is empty or holds a NUL character")
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno in _UNREACHABLE:  # `Path.exists` and `Path.is_dir` would raise it
            raise InputError(f"{name} is {shown(path)}, which cannot be looked up: {error.strerror}") from error
    return Path(path)


def check_choice(value: object, name: str, choices: Collection[str]) -> str:
    """Return one of the texts `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} is {shown(value)}, expected one of {', '.join(choices)}")
    return value


def check_is(value: object, kind: type[T], name: str) -> T:
    """Return an object of the class `kind`."""
    if not isinstance(value, kind):
        raise InputError(f"{name} is {shown(value)}, expected a {kind.__name__}")
    return value


def check_callable(value: object, name: str) -> Any:  # noqa: ANN401 - whatever it takes and returns
    """Return something that can be called."""
    if not callable(value):
        raise InputError(f"{name} is {shown(value)}, expected a function")
    return value
