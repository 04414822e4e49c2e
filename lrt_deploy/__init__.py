"""lrt-deploy: Latent Recurrent Transformers, from checkpoint to running deployment.

    lrt_deploy.export_bundle("checkpoint_dir", "bundle_dir")            # checkpoint -> ONNX graphs, weights, manifest
    with lrt_deploy.open_decoder("bundle_dir") as decoder:              # -> Decoder
        state = decoder.prefill([[1, 2, 3], [4, 5]])                    # -> DecodeState: KV caches, latent, positions
        logits = decoder.step(state, [7, 8])                            # (B, V) float32
        for event in decoder.generate([1, 2, 3], max_new_tokens=64):    # -> Event: token, text, ...
            print(event.text)

Functions: `export_bundle`, `build_engine`, `open_decoder`, `parity`. Classes: `Decoder`, `DecodeState`, `BatchDecoder`,
`PromptCache`, `SamplingOptions`, `PrefillOptions`, `Grammar`, `Event`. Errors: all are `LRTDeployError`.

Importing this package is cheap: torch, onnx and onnxruntime are imported when a function needs them, torch only by
exports and parity.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import errors
from .errors import *  # noqa: F403 - all of them are public

# ONNX Runtime reads it when it is first loaded. Without it, opening a session writes a device id and a database of
# events below the user's cache folder and looks up a collector. To have that, set it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from .evaluation.parity import parity as parity
    from .exporters.bundle import export_bundle as export_bundle
    from .exporters.engine.build import build_engine as build_engine
    from .runtime.batch import BatchDecoder as BatchDecoder
    from .runtime.decoder import Decoder as Decoder
    from .runtime.decoder import open_decoder as open_decoder
    from .runtime.generation import Event as Event
    from .runtime.prefill import PrefillOptions as PrefillOptions
    from .runtime.prompt_cache import PromptCache as PromptCache
    from .runtime.sampling import SamplingOptions as SamplingOptions
    from .runtime.state import DecodeState as DecodeState
    from .text.grammar import Grammar as Grammar

    __version__: str

# Public names that are imported when they are first used, and the modules that have them.
_LAZY = {
    "BatchDecoder": "runtime.batch",
    "DecodeState": "runtime.state",
    "Decoder": "runtime.decoder",
    "Event": "runtime.generation",
    "Grammar": "text.grammar",
    "PrefillOptions": "runtime.prefill",
    "PromptCache": "runtime.prompt_cache",
    "SamplingOptions": "runtime.sampling",
    "build_engine": "exporters.engine.build",
    "export_bundle": "exporters.bundle",
    "open_decoder": "runtime.decoder",
    "parity": "evaluation.parity",
}
__all__ = sorted(["__version__", *_LAZY, *(name for name, thing in vars(errors).items() if isinstance(thing, type))])

# Modules that documents and examples of version 0.1 named, and where they are now.
_MOVED = {
    "lrt_deploy.chat_form": "lrt_deploy.text.chat",
    "lrt_deploy.checkpoint": "lrt_deploy.model.checkpoint",
    "lrt_deploy.contract": "lrt_deploy.bundle.contract",
    "lrt_deploy.interface": "lrt_deploy.types",
    "lrt_deploy.manifest": "lrt_deploy.bundle.manifest",
    "lrt_deploy.reference": "lrt_deploy.model.reference",
    "lrt_deploy.runtime.batch_decoder": "lrt_deploy.runtime.batch",
    "lrt_deploy.tokenizer": "lrt_deploy.text.tokenizer",
    "lrt_deploy.weights": "lrt_deploy.bundle.weights",
}


class _MovedModules(Loader):
    """Import finder and loader for the old names of modules: warns, and gives the module of the new name."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = _MOVED[module.__name__]
        text = f"{module.__name__} is now {new}; the old name goes with the next version"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)


sys.meta_path.append(_MovedModules())


def __getattr__(name: str) -> Any:  # noqa: ANN401 - the type of the name
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("lrt-deploy")
    elif name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names only."""
    return __all__
