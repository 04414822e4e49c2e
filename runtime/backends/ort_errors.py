"""What ONNX Runtime raises, told from what merely came while it ran.

Its exceptions have no base of their own: each derives from Exception. An interrupt, or an exception that a signal
handler of the caller raised, surfaces in the same line as they do and must pass as it is.
"""

from __future__ import annotations

from typing import NoReturn

from onnxruntime.capi import onnxruntime_pybind11_state as _native

from lrt_deploy.errors import BackendError

# RuntimeError is what its bindings make of C++ exceptions that have no type of their own, ValueError and IndexError of
# two of the standard library's. UnicodeDecodeError: a message that quotes a damaged graph and is no text.
ORT_ERRORS: tuple[type[Exception], ...] = (
    *(RuntimeError, ValueError, IndexError, UnicodeDecodeError),
    *(found for found in vars(_native).values() if isinstance(found, type) and issubclass(found, Exception)),
)


def raise_backend_error(error: Exception, what: str) -> NoReturn:
    """Raise BackendError, which begins with `what`, for an error that `ORT_ERRORS` has caught.

    An error whose type is the caller's own, derived from one of these, is raised as it is.
    """
    if type(error) not in ORT_ERRORS:
        raise error
    raise BackendError(f"{what}: {error}") from error
