"""Run a graph in ONNX Runtime over a whole sequence whose latents are given, with nothing fused and nothing rounded.

For parity, not for decoding. Because every position's latent is an input, all positions of a block are computed at once
and an error at one of them does not travel through the latent to the next. Which graph: `exporters.exact_graph`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lrt_deploy.bundle import contract
from lrt_deploy.config import LRTConfig
from lrt_deploy.types import FloatArray

from .host_tables import HostTables, RowArrays
from .ort_errors import ORT_ERRORS, raise_backend_error

_LOG_ERRORS = 3
BLOCK_TOKENS = 128


class OrtExact:
    """A float32 graph of either flavour, without optimizations: each op is computed as it stands."""

    def __init__(self, model: bytes, folder: Path, config: LRTConfig, tables: HostTables | None = None) -> None:
        self._config, self._tables = config, tables or HostTables({})
        self._rows = RowArrays(self._tables)
        options = ort.SessionOptions()
        options.log_severity_level = _LOG_ERRORS
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        try:
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        except ORT_ERRORS as error:
            raise_backend_error(error, f"ONNX Runtime {ort.__version__} cannot open the graph in float32")
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
