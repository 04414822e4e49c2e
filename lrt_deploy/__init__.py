"""lrt-deploy: Latent Recurrent Transformers, from checkpoint to running deployment.

    lrt_deploy.export_bundle("checkpoint_dir", "bundle_dir")            # checkpoint -> ONNX graphs, weights, manifest
    with lrt_deploy.open_decoder("bundle_dir") as decoder:              # -> Decoder
        state = decoder.prefill([[1, 2, 3], [4, 5]])                    # -> DecodeState: KV caches, latent, positions
        logits = decoder.step(state, [7, 8])                            # (B, V) float32
        for event in decoder.generate([1, 2, 3], max_new_tokens=64):    # -> Event: token, text, ...
            print(event.text)

Functions: `export_bundle`, `build_engine`, `open_decoder`, `parity`. Classes: `Decoder`, `DecodeState`, `BatchDecoder`,
`PromptCache`, `SamplingOptions`, `PrefillOptions`, `Event`. Errors: all are `LRTDeployError`.

Importing this package is cheap: torch, onnx and onnxruntime are imported when a function needs them, torch only by
exports and parity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import check_callable, check_flag, check_path, check_text, check_texts, check_whole
from .errors import (
    BackendError,
    BundleError,
    Busy,
    CheckpointError,
    ConfigError,
    EngineError,
    ExportError,
    InputError,
    LRTDeployError,
    NonFiniteError,
    ParityError,
    StateError,
)

# ONNX Runtime reads it when it is first loaded. Without it, opening a session writes a device id and a database of
# events below the user's cache folder and looks up a collector. Whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from lrt_deploy.bundle.engine_sidecar import EngineSidecar
    from lrt_deploy.bundle.manifest import Manifest
    from lrt_deploy.evaluation.report import ParityReport
    from lrt_deploy.runtime.batch import BatchDecoder
    from lrt_deploy.runtime.decoder import Decoder, open_decoder
    from lrt_deploy.runtime.generation import Event
    from lrt_deploy.runtime.prefill import PrefillOptions
    from lrt_deploy.runtime.prompt_cache import PromptCache
    from lrt_deploy.runtime.sampling import SamplingOptions
    from lrt_deploy.runtime.state import DecodeState

    from .types import PrefillPolicy

    __version__: str

__all__ = [
    "BackendError",
    "BatchDecoder",
    "BundleError",
    "Busy",
    "CheckpointError",
    "ConfigError",
    "DecodeState",
    "Decoder",
    "EngineError",
    "Event",
    "ExportError",
    "InputError",
    "LRTDeployError",
    "NonFiniteError",
    "ParityError",
    "PrefillOptions",
    "PromptCache",
    "SamplingOptions",
    "StateError",
    "__version__",
    "build_engine",
    "export_bundle",
    "open_decoder",
    "parity",
]

# Public names that are imported when they are first used, and the modules that have them.
_LAZY = {
    "BatchDecoder": "runtime.batch",
    "DecodeState": "runtime.state",
    "Decoder": "runtime.decoder",
    "Event": "runtime.generation",
    "PrefillOptions": "runtime.prefill",
    "PromptCache": "runtime.prompt_cache",
    "SamplingOptions": "runtime.sampling",
    "open_decoder": "runtime.decoder",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("lrt-deploy")
    elif name in _LAZY:
        from importlib import import_module

        value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Show the public names only."""
    return sorted(__all__)


def export_bundle(
    checkpoint: str | Path,
    bundle: str | Path,
    *,
    precision: str | Sequence[str] = "fp32",
    max_seq_len: int | None = None,
    max_batch_size: int = 8,
    tokenizer: str | Path | None = None,
    step: int | None = None,
    force: bool = False,
    calibration: str | Path | None = None,
    keep_high: Sequence[str] | None = None,
    compensate: bool = False,
    int4_block: int | None = None,
    host_embeddings: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Manifest:
    """Export a checkpoint to a bundle folder and return the bundle's manifest.

    Args:
        checkpoint: a checkpoint folder or weights file, in the authors' layout or the native one.
        bundle: the folder to make. It is whole or absent.
        precision: one or several of `fp32`, `fp16`, `bf16`, `int8` (W8A8), `int8-weight-only`, `int4-weight-only`.
        max_seq_len: tokens that a sequence can hold; None: the model's `sequence_len`. At most 10 times that.
        max_batch_size: sequences that can run together.
        tokenizer: a folder with `tokenizer.pkl` or `tokenizer.json`; None: the one beside the checkpoint, if any.
        step: which of several saved steps; None: the last.
        force: replace an existing bundle.
        calibration: a text file on which ranges and int8 activations are measured; None: the one that is shipped.
        keep_high: matrices that stay precise, as `gate`, `lm_head`, `blocks.3.mlp_in` or `blocks.0`; None: the
            default of each precision; empty: none.
        compensate: round int4 weights so that later rows make up for the error of earlier ones (GPTQ).
        int4_block: rows of a column that share an int4 scale, 32, 64 or 128; None: 32.
        host_embeddings: keep the embedding tables out of graphs and engines; the runtime maps them.
        progress: called with (what, done, total), in bytes or 0, 0. What it raises ends the export.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be read, or is of no model that this version knows.
        ExportError: the bundle cannot be made as asked for. Nothing is left behind.

    """
    checkpoint, bundle = check_path(checkpoint, "checkpoint"), check_path(bundle, "bundle")
    precisions = (precision,) if isinstance(precision, str) else check_texts(precision, "precision")
    for name, value, least in (("max_seq_len", max_seq_len, 0), ("step", step, 0), ("int4_block", int4_block, 0)):
        if value is not None:
            check_whole(value, name, least)
    check_whole(max_batch_size, "max_batch_size")
    flags = {"force": force, "compensate": compensate, "host_embeddings": host_embeddings}
    for name, flag in flags.items():
        check_flag(flag, name)
    check_callable(progress, "progress")
    from lrt_deploy.exporters.bundle import ExportOptions
    from lrt_deploy.exporters.bundle import export_bundle as export

    options = ExportOptions(
        precisions=precisions,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        tokenizer=None if tokenizer is None else check_path(tokenizer, "tokenizer"),
        step=step,
        force=force,
        calibration=None if calibration is None else check_path(calibration, "calibration"),
        keep_high=None if keep_high is None else check_texts(keep_high, "keep_high"),
        compensate=compensate,
        int4_block=int4_block,
        host_embeddings=host_embeddings,
    )
    return export(checkpoint, bundle, options, progress)


def build_engine(
    bundle: str | Path,
    *,
    backend: str = "auto",
    precision: str | None = None,
    chunk_tokens: int | None = None,
    max_batch_size: int | None = None,
    workspace_bytes: int | None = None,
    timing_cache: str | Path | None = None,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    on_message: Callable[[str, str], None] | None = None,
) -> EngineSidecar:
    """Build a TensorRT engine beside the graphs of a bundle and return what its sidecar says.

    Args:
        bundle: the bundle folder.
        backend: `tensorrt`, `tensorrt-rtx`, or `auto` for the first of the two that is installed.
        precision: which precision of the bundle; None: the only one in it.
        chunk_tokens: most prompt tokens that the engine takes at once; None: 512, or the capacity if that is less.
        max_batch_size: most sequences that the engine decodes together; None: the bundle's, which it may not exceed.
        workspace_bytes: most scratch memory that a layer may take, in bytes; None: TensorRT's own limit.
        timing_cache: a file with measured kernel times, read where it exists and replaced after the build; None: one
            beside the engines. TensorRT-RTX has none.
        force: replace an existing engine.
        progress: called with (what, done, total). What it raises cancels the build.
        on_message: called with severity and text of each message of TensorRT.

    Raises:
        BundleError: the bundle is not intact.
        EngineError: the engine cannot be built, or its network is not what the precision promises. What was there
            before stays.

    """
    bundle, backend = check_path(bundle, "bundle"), check_text(backend, "backend")
    if precision is not None:
        check_text(precision, "precision")
    if chunk_tokens is not None:
        check_whole(chunk_tokens, "chunk_tokens", 1)
    check_flag(force, "force")
    for name, value in (("max_batch_size", max_batch_size), ("workspace_bytes", workspace_bytes)):
        if value is not None:
            check_whole(value, name, most=2**63 - 1)
    check_callable(progress, "progress")
    from lrt_deploy.exporters.engine.build import BuildOptions
    from lrt_deploy.exporters.engine.build import build_engine as build

    options = BuildOptions(
        backend=backend,
        precision=precision,
        force=force,
        chunk_tokens=chunk_tokens,
        max_batch_size=max_batch_size,
        workspace_bytes=workspace_bytes,
        timing_cache=None if timing_cache is None else check_path(timing_cache, "timing_cache"),
        listener=on_message,
    )
    return build(bundle, options, progress)


def parity(
    bundle: str | Path,
    checkpoint: str | Path,
    *,
    backend: str = "ort-cpu",
    precision: str | None = None,
    prompt: str | Sequence[int] | None = None,
    steps: int | None = None,
    step: int | None = None,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    prefill: PrefillPolicy = "fixed-point",
    tolerance: float | None = None,
    float64: bool = False,
    bisect: bool = False,
    threads: int | None = None,
    max_seq_len: int | None = None,
    verify: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> ParityReport:
    """Compare a bundle with the checkpoint that it should be, as the verb `parity` does; for tests of your own.

    `report.passed` is the answer and `report.verdict` says why in a line; `report.weights`, `.arithmetic` and
    `.quality` are its parts, and `report.to_dict()` has the fields of the JSON document. A difference is a result:
    nothing is raised for it. `prompt` is text or token ids (default: a text of our own) and `steps` greedy tokens
    follow (default: 128, or what the capacity leaves); `step` is which saved step of the checkpoint to read. `max_kl`
    and `min_agreement` take the place of the limits of a precision that is judged by quality. `prefill` and `tolerance`
    say how the decoder reads the prompt where that is checked, `float64` runs the reference in float64, `bisect` looks
    for the place of a fault (`report.bisect`); the rest is as in `open_decoder`. Raises CheckpointError, BundleError
    and BackendError for what cannot be opened, ParityError for models that cannot be compared, InputError for a prompt
    or limit that cannot be used.
    """
    from lrt_deploy.evaluation.parity import ParityOptions, parity_of, parity_of_stored, stored_only_precision
    from lrt_deploy.runtime.decoder import open_decoder as open_

    folder, source = check_path(bundle, "bundle"), check_path(checkpoint, "checkpoint")
    options = ParityOptions(prompt, steps, step, prefill, tolerance, float64, bisect, max_kl, min_agreement)
    stored_only = stored_only_precision(folder, backend, precision)
    if stored_only is not None:
        return parity_of_stored(folder, source, stored_only, options, verify, progress)
    with open_(folder, backend, precision, threads=threads, max_seq_len=max_seq_len, verify=verify) as decoder:
        return parity_of(folder, decoder, source, options, progress)
