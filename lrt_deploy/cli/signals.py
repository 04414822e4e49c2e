"""SIGINT, SIGTERM and SIGHUP of this process: each becomes an exception of the main thread, and is remembered.

An exception raised by a signal handler can be lost: C++ libraries swallow what is raised in their callbacks, and torch
turns it into an error of its own. So every report of progress, the last one before a file gets its name, and every
answer call `check`, which raises it again. Imports almost nothing, because it must be loaded before anything else is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_CLEANING_S = 2.0  # further signals are ignored this long, so that they do not interrupt the cleaning up

_received: int | None = None
_received_at = 0.0


class Terminated(BaseException):
    """SIGTERM or SIGHUP was received; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"terminated by {signal.Signals(number).name}")
        self.number = number


def install() -> None:
    """Turn the signals into exceptions; one that the parent process has set to be ignored stays so."""
    _replace((signal.SIG_DFL, signal.default_int_handler), _raise)
    sys.excepthook, sys.unraisablehook = _except_hook, _unraisable_hook


def received() -> BaseException | None:
    """Return the exception of a signal that was received and not forgotten, or None."""
    if _received is None:
        return None
    return KeyboardInterrupt() if _received == signal.SIGINT else Terminated(_received)


def check() -> None:
    """Raise the exception of a signal whose first exception got lost."""
    if (error := received()) is not None:
        raise error


def forget() -> None:
    """Forget the signal, as a chat does after it has stopped its answer."""
    global _received
    _received = None


def exit_code(error: BaseException) -> int:
    """Return 128 + the number of the signal, as shells report it."""
    return 128 + (error.number if isinstance(error, Terminated) else int(signal.SIGINT))


def describe(error: BaseException) -> str:
    """Return the line for stderr."""
    return str(error) if isinstance(error, Terminated) else "interrupted"


def end_at_once() -> None:
    """Let further signals end the process with their exit codes: the answer is given, Python may be shutting down."""
    _replace((_raise,), _exit)


def _replace(handlers: tuple[Any, ...], new: Any) -> None:  # noqa: ANN401 - signal's own type is private
    for name in _NAMES:
        number = getattr(signal, name, None)  # not all are on Windows
        if number is not None and signal.getsignal(number) in handlers:
            signal.signal(number, new)


def _exit(number: int, frame: FrameType | None) -> None:
    error = KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
    with contextlib.suppress(OSError):
        os.write(2, f"{describe(error)}\n".encode())
    os._exit(exit_code(error))


def _raise(number: int, frame: FrameType | None) -> None:
    global _received, _received_at
    now = time.monotonic()
    if _received is not None and now - _received_at < _CLEANING_S:
        return
    _received, _received_at = number, now
    if not _loads_extension(frame):
        check()


def _loads_extension(frame: FrameType | None) -> bool:
    """Return whether an extension module is being loaded: those of nanobind (onnx) end the process at an exception."""
    while frame is not None:
        if frame.f_code.co_qualname.startswith("ExtensionFileLoader."):
            return True
        frame = frame.f_back
    return False


def _except_hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print no traceback where C code prints and drops the exception of a signal, or an error that follows from it."""
    if _received is None:
        sys.__excepthook__(kind, error, trace)


def _unraisable_hook(lost: Any) -> None:  # noqa: ANN401 - its type has no name at run time
    if _received is None:
        sys.__unraisablehook__(lost)
