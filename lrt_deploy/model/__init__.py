"""The reference model in PyTorch, and the checkpoints that it is read from."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:  # noqa: ANN401 - the type of the name
    """Find `LRT`, which was here in version 0.1."""
    if name != "LRT":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    text = f"{__name__}.LRT is now {__name__}.model.LRT; the old name goes with the next version"
    warnings.warn(text, DeprecationWarning, stacklevel=2)
    return importlib.import_module(f"{__name__}.model").LRT
