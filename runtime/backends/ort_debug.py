"""Run a graph in ONNX Runtime to find faults: over a whole sequence whose latents are given, or with extra outputs.

Binds nothing, copies everything, and turns off what fuses values away or rounds otherwise. Not for decoding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lrt_deploy import activations
from lrt_deploy.activations import StepInput
from lrt_deploy.bundle import contract
from lrt_deploy.config import LRTConfig
from lrt_deploy.types import FloatArray

from .host_tables import HostTables, RowArrays
from .ort_session import ORT_ERRORS, raise_backend_error

_LOG_ERRORS = 3
BLOCK_TOKENS = 128


def _open(model: bytes, folder: Path, options: ort.SessionOptions, kind: str, fused: bool) -> ort.InferenceSession:
    """Open a serialized graph whose weights lie in `folder`; without `fused`, each op is computed as it stands."""
    options.log_severity_level = _LOG_ERRORS
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except ORT_ERRORS as error:
        raise_backend_error(error, f"ONNX Runtime {ort.__version__} cannot open the graph {kind}")


class OrtExact:
    """A float32 graph of either flavour, without optimizations: each op is computed as it stands."""

    def __init__(self, model: bytes, folder: Path, config: LRTConfig, tables: HostTables | None = None) -> None:
        self._config, self._tables = config, tables or HostTables({})
        self._rows = RowArrays(self._tables)
        self._session = _open(model, folder, ort.SessionOptions(), "in float32", fused=False)
        self._inputs = {value.name for value in self._session.get_inputs()}
        state = [pair.present for pair in contract.state_pairs(config) if pair.in_place]
        self._outputs = ["logits", *(["present_latent"] if config.memory else []), *state]

    def run(self, tokens: list[int], latents: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Logits (T, V) and latents (T, C) after each token; `latents` (T, C) are those before it.

        A model without memory ignores `latents` and returns none, (T, 0).
        """
        config, count = self._config, len(tokens)
        shape = (1, config.n_kv_head, count, config.head_dim)
        caches = {pair.past: np.zeros(shape, np.float32) for pair in contract.state_pairs(config) if pair.in_place}
        logits = np.zeros((count, config.vocab_size), np.float32)
        after = np.zeros((count, config.n_embd if config.memory else 0), np.float32)
        for start in range(0, count, BLOCK_TOKENS):
            end = min(start + BLOCK_TOKENS, count)
            feed = self._feed(tokens, latents, start, end) | caches
            try:
                found = self._session.run(self._outputs, {k: v for k, v in feed.items() if k in self._inputs})
            except ORT_ERRORS as error:
                raise_backend_error(error, "ONNX Runtime failed on the graph in float32")
            logits[start:end] = found[0][0]
            if config.memory:
                after[start:end] = found[1][0]
            caches = dict(zip(caches, found[-len(caches) :], strict=True))
        return logits, after

    def _feed(self, tokens: list[int], latents: FloatArray, start: int, end: int) -> dict[str, NDArray[Any]]:
        """The inputs of one block but for its caches."""
        ids, positions = np.array([tokens[start:end]]), np.arange(start, end)[None]
        rows = self._rows.of(1, end - start)
        self._tables.take(ids, rows)
        starts = {
            contract.window_start(w): np.array([max(0, start - w)]) for w in contract.distinct_windows(self._config)
        }
        return {
            **rows,
            **starts,
            "input_ids": ids,
            "position_ids": positions,
            "write_index": np.array([start]),
            "last_index": np.arange(end - start)[None],
            "past_latent": np.asarray(latents[None, start:end], np.float32),
            contract.WINDOW_END: np.array([end]),
            contract.SLOT_POSITIONS: np.arange(len(tokens)),
        }


_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(int64)": np.int64,
}


class OrtObserver:
    """Shows the activations of single steps; see `activations.Observer`. `model` is a serialized graph of a flavour.

    `fused` False computes each op as it stands: quantized products as float32 ones.
    """

    def __init__(
        self, model: bytes, folder: Path, config: LRTConfig, tables: HostTables | None = None, fused: bool = True
    ) -> None:
        self._config, self._tables = config, tables or HostTables({})
        self._rows = RowArrays(self._tables).of(1, 1)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_mem_pattern = False
        self._session = _open(model, folder, options, "with probes", fused)
        self._inputs = {value.name: _DTYPES[value.type] for value in self._session.get_inputs()}
        wanted = {*activations.in_order(config)}
        self._outputs = [value.name for value in self._session.get_outputs() if value.name in wanted]

    def observe(self, step: StepInput) -> dict[str, FloatArray]:
        """Return activation name -> value of one step at T = 1."""
        arrays = self._feed(step)
        feed = {name: np.asarray(arrays[name], dtype) for name, dtype in self._inputs.items()}
        try:
            found = self._session.run(self._outputs, feed)
        except ORT_ERRORS as error:
            raise_backend_error(error, "ONNX Runtime failed on the graph with probes")
        return {name: np.asarray(value, np.float32) for name, value in zip(self._outputs, found, strict=True)}

    def _feed(self, step: StepInput) -> dict[str, NDArray[Any]]:
        config, at = self._config, step.position
        self._tables.take(np.array([[step.token]]), self._rows)
        feed: dict[str, Any] = {
            **(self._rows or {"input_ids": np.array([[step.token]])}),
            "position_ids": [[at]],
            "write_index": [at],
            "last_index": [[0]],
            "past_latent": step.latent[None, None],
            contract.WINDOW_END: [at + 1],
            contract.SLOT_POSITIONS: np.arange(at + 1),
        } | {contract.window_start(w): [max(0, at - w)] for w in contract.distinct_windows(config)}
        for i in range(config.n_layer):
            caches = map(_with_room, (step.keys[i], step.values[i]))
            feed |= zip(contract.past_cache(i), caches, strict=True)
        return feed


def _with_room(cache: FloatArray) -> FloatArray:
    """(G, P, D) -> (1, G, P + 1, D), its last slot free."""
    return np.pad(cache, ((0, 0), (0, 1), (0, 0)))[None]
