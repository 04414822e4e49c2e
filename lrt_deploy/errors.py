"""Every error this package raises on purpose, as one tree.

LRTDeployError
├── ConfigError       a model configuration that contradicts itself or is not supported
├── CheckpointError   a checkpoint or tokenizer that is missing, damaged, hostile or does not fit its config
├── ExportError       tracing or rewriting a graph went wrong, or a target must not be overwritten
├── BundleError       a bundle that is incomplete, altered or of another format version
├── EngineError       a TensorRT engine that cannot be built or must not be used here
├── BackendError      a backend that is absent, failed, or produced non-finite numbers
│   └── NonFiniteError    the last of these, with the rows that it happened in
├── StateError        a decode state used in a way it does not allow (capacity, batch, foreign state)
├── InputError        a prompt, token id, option or file content that cannot be used
├── ParityError       a comparison that could not be made (a failed comparison is a result, not an error)
└── Busy              no room at the moment for one more request; the same request may be sent again later

A message says what was found, what was expected and who says so, and what to do.
This module knows nothing else of the project and imports nothing.
"""


class LRTDeployError(Exception):
    """Base of all errors raised on purpose; its message is meant for a person."""


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
