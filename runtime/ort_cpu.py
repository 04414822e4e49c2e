"""ONNX Runtime on the CPU: one session on the windowed prefill graph serves prefill and decode.

Caches are numpy arrays that ORT updates in place, because input and output of a cache are bound to one OrtValue. The
latent goes in and out through two small arrays that swap roles (every layer reads it, so it cannot be overwritten).
All that a decode step needs is bound once; a step writes a few integers and runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from lrt_deploy import contract
from lrt_deploy.errors import BackendError
from lrt_deploy.interface import FloatArray, IntArray
from lrt_deploy.manifest import WEIGHTS, Manifest, graph_path

# Below this, handing work to a second thread costs more than it saves (measured: benchmarks/README.md).
_ONE_THREAD_BYTES = 64 * 2**20
_LOG_ERRORS = 3


class OrtCpuBackend:
    """A session on the CPU provider. `threads` None: one for small models, else ORT's choice (all physical cores)."""

    name = "ort-cpu"

    def __init__(
        self, folder: Path, manifest: Manifest, precision: str, threads: int | None = None, log_level: int = _LOG_ERRORS
    ) -> None:
        self.config, self.precision, self.capacity = manifest.model, precision, manifest.max_seq_len
        graph = folder / graph_path(precision, "prefill", "windowed")
        if threads is None and (graph.parent / WEIGHTS).stat().st_size < _ONE_THREAD_BYTES:
            threads = 1
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = log_level
        # Live windows grow with every step: a plan of memory by input shapes would never be right.
        options.enable_mem_pattern = False
        try:
            self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own unrelated types
            raise BackendError(f"ONNX Runtime {ort.__version__} cannot open {graph}: {error}") from error
        self.detail = f"ONNX Runtime {ort.__version__}, CPU, {f'{threads} thread(s)' if threads else 'all cores'}"

    def allocate(self, batch: int) -> OrtCpuBuffers:
        """Zeroed buffers; the system commits their pages only when they are first written."""
        return OrtCpuBuffers(self, batch)

    def close(self) -> None:
        """Release the session and with it the weights."""
        del self.session


class OrtCpuBuffers:
    """Caches and latent of B sequences, and everything a decode step binds."""

    def __init__(self, backend: OrtCpuBackend, batch: int) -> None:
        config = backend.config
        self._backend, self._config = backend, config
        self.batch, self.capacity = batch, backend.capacity
        shape = (batch, config.n_kv_head, self.capacity, config.head_dim)
        self._caches = {
            pair.past: np.zeros(shape, np.float32)
            for pair in contract.state_pairs(config)
            if pair.past != "past_latent"
        }
        self._latents = [np.zeros((batch, 1, config.n_embd), np.float32) for _ in range(2)]
        self._turn = 0  # which of the two holds the current latent
        self._ids = np.zeros((batch, 1), np.int64)
        self._positions = np.zeros((batch, 1), np.int64)
        self._write_index = np.zeros(batch, np.int64)
        self._starts = {w: np.zeros(1, np.int64) for w in contract.distinct_windows(config)}
        self._end = np.zeros(1, np.int64)
        self._logits = np.zeros((batch, 1, config.vocab_size), np.float32)
        self._cache_values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self._caches.items()}
        self._bindings = {(head, turn): self._bind(head, turn) for head in (False, True) for turn in (0, 1)}

    @property
    def latent(self) -> FloatArray:
        """(B, C), a view of the current latent; (B, 0) for a model without memory."""
        latent = self._latents[self._turn][:, 0]
        return latent if self._config.memory else latent[:, :0]

    def set_latent(self, rows: IntArray, latent: FloatArray) -> None:
        """Replace the latent of some rows: rows (n), latent (n, C)."""
        if self._config.memory:
            self._latents[self._turn][rows, 0] = latent

    def decode(self, tokens: IntArray, positions: IntArray, head: bool) -> FloatArray | None:
        """Run one token per row; see `backend.StateBuffers.decode`."""
        self._ids[:, 0] = tokens
        self._positions[:, 0] = positions
        self._write_index[:] = positions
        oldest, newest = int(positions.min()), int(positions.max())
        for window, start in self._starts.items():
            start[0] = max(0, oldest - window)
        self._end[0] = newest + 1
        self._run(self._bindings[head, self._turn])
        self._turn = 1 - self._turn
        return self._logits[:, 0] if head else None

    def cache(self, layer: int, length: int) -> tuple[FloatArray, FloatArray]:
        """Views (B, G, length, D) of a layer's keys and values."""
        keys, values = self._caches[contract.past_key(layer)], self._caches[contract.past_value(layer)]
        return keys[:, :, :length], values[:, :, :length]

    def _run(self, binding: Any) -> None:  # noqa: ANN401 - onnxruntime is untyped
        try:
            self._backend.session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in a step: {error}") from error

    def _bind(self, head: bool, turn: int) -> Any:  # noqa: ANN401 - onnxruntime is untyped
        """Bind a decode step that reads the latent `turn` and writes the other; without head, for zero logit rows."""
        binding = self._backend.session.io_binding()
        rows = 1 if head else 0
        inputs: dict[str, np.ndarray] = {
            "input_ids": self._ids,
            "position_ids": self._positions,
            "write_index": self._write_index,
            "last_index": np.zeros((self.batch, rows), np.int64),
            contract.WINDOW_END: self._end,
        }
        inputs |= {contract.window_start(window): start for window, start in self._starts.items()}
        outputs = {"logits": self._logits[:, :rows]}
        if self._config.memory:
            inputs["past_latent"], outputs["present_latent"] = self._latents[turn], self._latents[1 - turn]
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        for pair in contract.state_pairs(self._config):
            if pair.in_place:
                binding.bind_ortvalue_input(pair.past, self._cache_values[pair.past])
                binding.bind_ortvalue_output(pair.present, self._cache_values[pair.past])
        return binding
