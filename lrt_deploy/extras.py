"""The optional dependencies of the package, its extras: which modules each brings, and how to install one.

The name `lrt-deploy` on a package index may be somebody else's, so no message tells people to install it from there.
Only looks for modules; imports none of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal

Extra = Literal["export", "bench", "tensorrt", "tensorrt-rtx"]

# The modules that each extra brings, in the order in which people would look for them.
MODULES: dict[Extra, tuple[str, ...]] = {
    "export": ("torch", "onnx", "onnxscript", "onnx_ir"),
    "bench": ("matplotlib",),
    "tensorrt": ("tensorrt", "polygraphy", "onnx", "onnx_ir"),
    "tensorrt-rtx": ("tensorrt_rtx", "polygraphy", "onnx", "onnx_ir"),
}


def install(extra: Extra) -> str:
    """Say how to install an extra, as a clause for messages."""
    return (
        f"install the extra {extra!r} from where lrt-deploy came from: pip install -e '.[{extra}]' in a clone, or "
        f"pip install 'WHEEL[{extra}]' for a wheel"
    )


def missing(extra: Extra) -> list[str]:
    """The modules of an extra that are not installed."""
    return [name for name in MODULES[extra] if importlib.util.find_spec(name) is None]


def explain(error: ModuleNotFoundError, extras: Sequence[Extra]) -> str | None:
    """Explain a failed import as a missing extra, naming all of its modules that are missing; None if it is not one.

    `extras` are the extras that the command could have needed, the likeliest first; the others come after them.
    """
    module = (error.name or "").split(".")[0].replace("-", "_")
    for extra in (*extras, *MODULES):
        if module in MODULES[extra]:
            absent = [name for name in MODULES[extra] if name == module or name in missing(extra)]
            verb = "is" if len(absent) == 1 else "are"
            return f"this command needs {', '.join(absent)}, which {verb} not installed; {install(extra)}"
    return None
