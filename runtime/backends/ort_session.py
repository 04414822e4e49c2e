"""ONNX Runtime sessions: hold an opened one against the contract, turn what it raises into our errors, and find faults.

`OrtDebugger` runs a graph over a whole sequence whose latents are given, or shows the activations of a step; it binds
nothing and copies everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as _native

from lrt_deploy import activations
from lrt_deploy.activations import StepInput
from lrt_deploy.bundle import contract
from lrt_deploy.bundle.contract import Flavour, TensorSpec
from lrt_deploy.bundle.manifest import Manifest
from lrt_deploy.bundle.precisions import base_dtype
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import BackendError, BundleError, ConfigError
from lrt_deploy.fields import shown
from lrt_deploy.files import parse_json
from lrt_deploy.types import FloatArray

from .host_tables import HostTables, RowArrays

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


# Names of types by those of ONNX Runtime.
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
}


def check_session(session: Any, graph: Path, manifest: Manifest, precision: str, flavour: Flavour) -> None:  # noqa: ANN401
    """Raise BundleError unless the session's graph is the prefill graph of this model, precision and flavour."""
    base = base_dtype(precision, flavour)
    try:
        faults = [
            *_tensor_faults(
                "input",
                session.get_inputs(),
                contract.graph_inputs(manifest.model, flavour, base, manifest.host_embeddings),
            ),
            *_tensor_faults("output", session.get_outputs(), contract.graph_outputs(manifest.model, base)),
            *_metadata_faults(session.get_modelmeta().custom_metadata_map, manifest.model, precision),
        ]
    except UnicodeDecodeError as error:
        faults = [f"its names or metadata are not UTF-8 ({error.reason} at byte {error.start})"]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise BundleError(
            f"{graph} is not the {flavour} graph in {precision} of the model that the manifest describes: "
            f"{faults[0]}{more}; export the bundle again"
        )


def _tensor_faults(way: str, found: Sequence[Any], expected: Sequence[TensorSpec]) -> Iterator[str]:
    known = {value.name: (DTYPES.get(value.type, value.type), tuple(value.shape)) for value in found}
    for spec in expected:
        if spec.name not in known:
            yield f"it has no {way} {spec.name}"
        elif (tensor := known[spec.name]) != (spec.dtype, spec.shape):
            yield f"its {way} {spec.name} is {_described(*tensor)}, expected {_described(spec.dtype, spec.shape)}"
    if strays := known.keys() - {spec.name for spec in expected}:
        yield f"it has the {way} {shown(min(strays))}, which the contract does not know"


def _metadata_faults(metadata: dict[str, str], model: LRTConfig, precision: str) -> Iterator[str]:
    if (found := metadata.get("lrt_deploy.precision")) != precision:
        yield f"its metadata say that the precision is {shown(found)}"
    try:
        fields = parse_json(metadata.get("lrt_deploy.model", "null"), "the model in its metadata", BundleError)
        same = LRTConfig.from_dict(fields) == model
    except (BundleError, ConfigError) as error:
        yield f"its metadata do not say what model it is of: {error}"
        return
    if not same:
        yield "its metadata describe another model"


def _described(dtype: str, shape: Sequence[object]) -> str:
    return f"{dtype} ({', '.join(map(str, shape))})"


BLOCK_TOKENS = 128
_LOG_ERRORS = 3


class OrtDebugger:
    """A serialized graph of either flavour, whose weights lie in `folder`; without `fused`, no op is optimized."""

    def __init__(
        self, model: bytes, folder: Path, config: LRTConfig, tables: HostTables | None = None, fused: bool = True
    ) -> None:
        self._config, self._tables = config, tables or HostTables({})
        self._rows = RowArrays(self._tables)
        options = ort.SessionOptions()
        options.log_severity_level = _LOG_ERRORS
        options.enable_mem_pattern = False
        if not fused:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        try:
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        except ORT_ERRORS as error:
            raise_backend_error(error, f"ONNX Runtime {ort.__version__} cannot open the graph for debugging")
        self._inputs = {value.name: np.dtype(DTYPES[value.type]) for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, tokens: list[int], latents: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return logits (T, V) and latents (T, C) after each token; `latents` (T, C) are those before it.

        A model without memory ignores `latents` and returns none, (T, 0).
        """
        config, count = self._config, len(tokens)
        pairs = [pair for pair in contract.state_pairs(config) if pair.in_place]
        caches = {pair.past: np.zeros((1, config.n_kv_head, count, config.head_dim), np.float32) for pair in pairs}
        logits, after = [], []
        for start in range(0, count, BLOCK_TOKENS):
            block = slice(start, start + BLOCK_TOKENS)
            found = self._run(tokens[block], start, latents[block], caches)
            logits.append(found["logits"][0])
            after.append(found["present_latent"][0] if config.memory else np.zeros((len(logits[-1]), 0), np.float32))
            caches = {pair.past: found[pair.present] for pair in pairs}
        return np.concatenate(logits), np.concatenate(after)

    def observe(self, step: StepInput) -> dict[str, FloatArray]:
        """Return the activations of one step, by name; see `activations.Observer`."""
        caches: dict[str, NDArray[Any]] = {}
        for layer, pair in enumerate(zip(step.keys, step.values, strict=True)):
            padded = (np.pad(cache, ((0, 0), (0, 1), (0, 0)))[None] for cache in pair)  # (1, G, P + 1, D)
            caches |= zip(contract.past_cache(layer), padded, strict=True)
        found = self._run([step.token], step.position, step.latent[None], caches)
        wanted = set(activations.in_order(self._config))
        return {name: value for name, value in found.items() if name in wanted}

    def _run(
        self, tokens: list[int], start: int, latents: FloatArray, caches: Mapping[str, NDArray[Any]]
    ) -> dict[str, FloatArray]:
        """Run tokens (T) from position `start` on, with the latents (T, C) before them; all outputs, by name.

        `caches` (1, G, S, D), by the contract's names, have room for the tokens.
        """
        ids, count = np.array([tokens]), len(tokens)
        rows = self._rows.of(1, count)
        self._tables.take(ids, rows)
        values: dict[str, Any] = {
            **caches,
            **rows,
            **{contract.window_start(w): [max(0, start - w)] for w in contract.distinct_windows(self._config)},
            "input_ids": ids,
            "position_ids": np.arange(start, start + count)[None],
            "write_index": [start],
            "last_index": np.arange(count)[None],
            "past_latent": latents[None],
            contract.WINDOW_END: [start + count],
            contract.SLOT_POSITIONS: np.arange(next(iter(caches.values())).shape[2]),
        }
        feed = {name: np.asarray(values[name], dtype) for name, dtype in self._inputs.items()}
        try:
            found = self._session.run(self._outputs, feed)
        except ORT_ERRORS as error:
            raise_backend_error(error, "ONNX Runtime failed on the graph for debugging")
        return {name: np.asarray(value, np.float32) for name, value in zip(self._outputs, found, strict=True)}
