"""What ONNX Runtime raises, told from what merely came while it ran.

Its exceptions have no base of their own: each derives from Exception. An interrupt, or an exception that a signal
handler of the caller raised, surfaces in the same line as they do and must pass as it is.
"""

from __future__ import annotations

from onnxruntime.capi import onnxruntime_pybind11_state as _native

# RuntimeError is what its bindings make of C++ exceptions that have no type of their own, ValueError and IndexError of
# two of the standard library's. UnicodeDecodeError: a message that quotes a damaged graph and is no text.
ORT_ERRORS: tuple[type[Exception], ...] = (
    *(RuntimeError, ValueError, IndexError, UnicodeDecodeError),
    *(found for found in vars(_native).values() if isinstance(found, type) and issubclass(found, Exception)),
)


def is_foreign(error: Exception) -> bool:
    """Whether what `ORT_ERRORS` has caught is of a type of the caller's own: it must be raised as it is."""
    return type(error) not in ORT_ERRORS
