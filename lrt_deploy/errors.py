"""The errors that this package raises on purpose, as one tree.

LRTDeployError
├── ConfigError, CheckpointError, ExportError, BundleError, EngineError, StateError, InputError, ParityError
├── BackendError
│   └── NonFiniteError
└── Busy
    └── DeadlineExceeded

A message says what was found, what was expected and according to what, and what to do. Imports nothing.
"""


class LRTDeployError(Exception):
    """Base of all errors raised on purpose; its message is for people."""


class ConfigError(LRTDeployError):
    """A model configuration contradicts itself or asks for something unsupported."""


class CheckpointError(LRTDeployError):
    """A checkpoint or tokenizer is missing, damaged, hostile, or does not fit its config."""


class ExportError(LRTDeployError):
    """A graph could not be traced, rewritten or written."""


class BundleError(LRTDeployError):
    """A bundle is incomplete, altered, or of a format this version does not read."""


class EngineError(LRTDeployError):
    """A TensorRT engine cannot be built, or must not be used here."""


class BackendError(LRTDeployError):
    """A backend is absent, failed, or produced non-finite numbers."""


class NonFiniteError(BackendError):
    """Some rows' logits are not finite; `rows` says which."""

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows


class StateError(LRTDeployError):
    """A decode state was used in a way it does not allow."""


class InputError(LRTDeployError):
    """A prompt, token id, option or input file cannot be used."""


class ParityError(LRTDeployError):
    """A comparison could not be made; a comparison that fails is a result instead."""


class Busy(LRTDeployError):  # noqa: N818 - a condition that passes, not a fault
    """There is no room at the moment for one more request; the same request may be sent again later."""


class DeadlineExceeded(Busy):
    """A request has not ended within the time that it was given; it was ended, and its row is free."""
