"""Run a graph with extra outputs in ONNX Runtime, one step at a time, from a state given in full.

For finding faults, not for decoding: it binds nothing, copies everything, and turns off whatever fuses values away.
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
from .ort_errors import ORT_ERRORS, raise_backend_error

_LOG_ERRORS = 3
_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(int64)": np.int64,
}


class OrtProbe:
    """Shows the stages of single steps; see `stages.Observer`. `model` is a serialized graph of either flavour.

    `fused` False computes each op as it stands: quantized products as float32 ones.
    """

    def __init__(
        self, model: bytes, folder: Path, config: LRTConfig, tables: HostTables | None = None, fused: bool = True
    ) -> None:
        self._config, self._tables = config, tables or HostTables({})
        self._rows = RowArrays(self._tables).of(1, 1)
        options = ort.SessionOptions()
        options.log_severity_level = _LOG_ERRORS
        options.intra_op_num_threads = 1
        options.enable_mem_pattern = False
        if not fused:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        try:
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        except ORT_ERRORS as error:
            raise_backend_error(error, f"ONNX Runtime {ort.__version__} cannot open the graph with probes")
        self._inputs = {value.name: _DTYPES[value.type] for value in self._session.get_inputs()}
        wanted = {*activations.in_order(config)}
        self._outputs = [value.name for value in self._session.get_outputs() if value.name in wanted]

    def observe(self, step: StepInput) -> dict[str, FloatArray]:
        """Stage name -> value of one step at T = 1."""
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
            feed[contract.past_key(i)] = _with_room(step.keys[i])
            feed[contract.past_value(i)] = _with_room(step.values[i])
        return feed


def _with_room(cache: FloatArray) -> FloatArray:
    """(G, P, D) -> (1, G, P + 1, D), its last slot free."""
    return np.pad(cache, ((0, 0), (0, 1), (0, 0)))[None]
