"""The two TensorRT libraries that engines are built and run with: full TensorRT, and TensorRT-RTX.

They share one Python API under two module names, and neither reads the other's plans.
"""

from __future__ import annotations

import importlib
import importlib.util
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lrt_deploy import machine
from lrt_deploy.errors import EngineError

from .precisions import BACKENDS


@dataclass(frozen=True)
class TensorRTLibrary:
    """One library, by the name of its backend, which is that of the extra that installs it."""

    backend: machine.Extra

    @property
    def module(self) -> str:
        """The name of its Python module."""
        return BACKENDS[self.backend].module

    @property
    def installed(self) -> bool:
        """Whether its module can be found; it is not imported."""
        return importlib.util.find_spec(self.module) is not None

    def load(self) -> Any:  # noqa: ANN401 - neither library ships types
        """Import the module; raises EngineError that says what to install."""
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            raise EngineError(
                f"the backend {self.backend} needs the Python module {error.name}, which is not installed; "
                f"{machine.install(self.backend)}"
            ) from error
        except Exception as error:  # a broken installation may raise anything
            raise EngineError(
                f"{self.module} is installed but cannot be loaded: {' '.join(str(error).split())}"
            ) from error


# TensorRT's names of types, in those of the contract.
TENSORRT_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT4": "int4",
    "INT64": "int64",
}

# `auto` takes the first one that is installed.
LIBRARIES = {"tensorrt": TensorRTLibrary("tensorrt"), "tensorrt-rtx": TensorRTLibrary("tensorrt-rtx")}


def choose_library(requested: str) -> tuple[TensorRTLibrary, str]:
    """Return the requested library, or for `auto` the best that is installed, and the reason as a clause."""
    if requested in LIBRARIES:
        return LIBRARIES[requested], "as asked for"
    if requested != "auto":
        raise EngineError(f"engines are built for {' or '.join(LIBRARIES)}, or auto; {requested!r} is none of them")
    found = [library for library in LIBRARIES.values() if library.installed]
    if not found:
        modules = " nor ".join(library.module for library in LIBRARIES.values())
        raise EngineError(
            f"neither {modules} is installed here; {machine.install('tensorrt-rtx')} (the extra 'tensorrt' is for GPUs "
            "in data centres)"
        )
    return found[0], f"because {'it is' if found[0].backend == 'tensorrt' else 'tensorrt is not'} installed"


_LOGGERS: dict[Any, Any] = {}  # by the library's base class


def collecting_logger(trt: Any, take: Callable[[str, str], None]) -> Any:  # noqa: ANN401
    """Return the process's logger of a library, which from now on also calls `take` with severity and text.

    TensorRT keeps the first logger that it is given and ignores all others, so there is one with several listeners.
    `take` is a bound method, of which a weak reference is kept. The base class is the library's, hence the class here.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.takers: list[weakref.WeakMethod[Callable[[str, str], None]]] = []

        def log(self, severity: Any, msg: str) -> None:  # noqa: ANN401
            self.takers = [taker for taker in self.takers if taker() is not None]
            for taker in self.takers:
                if (heard := taker()) is not None:
                    heard(severity.name, msg)

    if trt.ILogger not in _LOGGERS:
        _LOGGERS[trt.ILogger] = Logger()
    _LOGGERS[trt.ILogger].takers.append(weakref.WeakMethod(take))
    return _LOGGERS[trt.ILogger]
