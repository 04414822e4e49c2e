"""ONNX Runtime on a CUDA GPU: the bundle's `full` graph, with the whole state in device memory (see `device`).

Arrays are bound through IOBinding by address, on the device's own stream. What ONNX Runtime falls back to in silence is
refused: a session without the provider, and heavy operators that it has placed elsewhere.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.engine_sidecar import cache_capacity
from lrt_deploy.bundle.graph_file import check_graph_file
from lrt_deploy.bundle.manifest import Manifest, graph_path, weights_path
from lrt_deploy.bundle.precisions import QUANTIZED, base_dtype
from lrt_deploy.errors import BackendError
from lrt_deploy.machine import find_gpu

from .cuda import CudaDevice
from .device import Context, DeviceBackend, Setup
from .host_tables import HostTables
from .ort_session import DTYPES, ORT_ERRORS, check_session, raise_backend_error

CHUNK_TOKENS = 512
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7}  # ONNX's numbers
_HEAVY = ("MatMul", "Attention", "TensorScatter")
_LOG_LEVEL = 3  # errors
_KEPT = 8  # bindings of a context; decoding alternates between two, prefill between a few block lengths


class OrtCudaBackend(DeviceBackend):
    """A session on the CUDA provider. `kind` is where memory lies and kernels run: `cuda`, in tests `cpu`."""

    def __init__(
        self, folder: Path, manifest: Manifest, precision: str, device: CudaDevice, kind: str = "cuda"
    ) -> None:
        base = base_dtype(precision, "full")
        graph = folder / graph_path(precision, "prefill", "full")
        check_graph_file(graph, folder / weights_path(precision))
        session = open_session(graph, kind, device.stream)
        check_session(session, graph, manifest, precision, "full")
        inputs = contract.graph_inputs(manifest.model, "full", base, manifest.host_embeddings)
        outputs = [spec.to_dict() for spec in contract.graph_outputs(manifest.model, base)]
        setup = Setup(
            runner=_Runner(session, kind, outputs),
            device=device,
            config=manifest.model,
            dtype=np.dtype(base),
            inputs=[spec.to_dict() for spec in inputs],
            state=[pair.to_dict() for pair in contract.state_pairs(manifest.model, base)],
            capacity=cache_capacity(manifest.max_seq_len),
            chunk_tokens=min(CHUNK_TOKENS, manifest.max_seq_len),
            cuda_graph=False,
            tables=HostTables.open(folder, manifest, precision),
        )
        detail = f"ONNX Runtime {ort.__version__}, {_PROVIDERS[kind]}"
        super().__init__("ort-cuda", precision, setup, manifest.max_seq_len, detail)

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, precision: str) -> OrtCudaBackend:
        """Open a precision on the current GPU."""
        if precision in QUANTIZED:
            plain = [p for p in manifest.precisions if p not in QUANTIZED]
            instead = f"take {' or '.join(plain)}" if plain else "export with --precision fp16 as well"
            raise BackendError(
                f"ort-cuda does not run {precision}: its CUDA kernels would widen the weights first; {instead}, "
                "or build a TensorRT engine"
            )
        gpu, reason = find_gpu()
        if gpu is None:
            raise BackendError(f"ort-cuda needs an NVIDIA GPU: {reason}; take the backend ort-cpu")
        opened = cls(folder, manifest, precision, CudaDevice())
        opened.detail += f", {gpu.name}"
        return opened


class _Runner:
    """Contexts of one session; all of them may have any shape."""

    def __init__(self, session: Any, kind: str, outputs: list[dict[str, Any]]) -> None:  # noqa: ANN401
        self.session, self.kind = session, kind
        self.types = {value.name: _TYPES[DTYPES[value.type]] for value in session.get_inputs()}
        self.outputs = {spec["name"]: spec for spec in outputs}

    def context(self, profile: str, stream: int) -> _Context:
        return _Context(self)


class _Context(Context):
    """Shapes and addresses for a session, and the bindings made of them; runs are not known to allow a capture."""

    def __init__(self, runner: _Runner) -> None:
        self._runner = runner
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._bindings: dict[tuple[Any, ...], Any] = {}

    def shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._shapes[name] = shape

    def bind(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def ready(self) -> None:
        missing = sorted({*self._runner.types, *self._runner.outputs} - set(self._addresses))
        missing += sorted(set(self._runner.types) - set(self._shapes))
        if missing:
            raise BackendError(f"ort-cuda: {missing[0]} has no shape or no address")

    def enqueue(self, stream: int) -> None:  # the one that the session was made for
        self.ready()
        key = (*self._shapes.values(), *self._addresses.values())
        if key not in self._bindings:
            while len(self._bindings) >= _KEPT:
                del self._bindings[next(iter(self._bindings))]
            self._bindings[key] = self._bound()
        try:
            self._runner.session.run_with_iobinding(self._bindings[key])
        except ORT_ERRORS as error:
            raise_backend_error(error, f"ONNX Runtime failed on {self._runner.kind}")

    def _bound(self) -> Any:  # noqa: ANN401 - onnxruntime is untyped
        runner, binding = self._runner, self._runner.session.io_binding()
        sizes = dict(zip(("batch", "tokens"), self._shapes["position_ids"], strict=True)) | {"rows": 1}
        for name, element in runner.types.items():
            binding.bind_input(name, runner.kind, 0, element, self._shapes[name], self._addresses[name])
        for name, spec in runner.outputs.items():
            cache = name.replace("present_", "past_") if name != "logits" else ""
            known = self._shapes.get(cache) or tuple(sizes.get(dim, dim) for dim in spec["shape"])
            binding.bind_output(name, runner.kind, 0, _TYPES[spec["dtype"]], known, self._addresses[name])
        return binding


def open_session(graph: Path, kind: str, stream: int) -> Any:  # noqa: ANN401 - onnxruntime is untyped
    """A session whose heavy operators all run on the provider of this kind; BackendError names those that do not."""
    provider = _PROVIDERS[kind]
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_LEVEL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    settings = {"user_compute_stream": str(stream)} if kind == "cuda" else {}
    if provider not in ort.get_available_providers():
        raise BackendError(
            f"ONNX Runtime {ort.__version__} was built without {provider}; replace the package: "
            "pip uninstall onnxruntime, then pip install onnxruntime-gpu"
        )
    try:
        session = ort.InferenceSession(str(graph), options, providers=[(provider, settings)], enable_fallback=0)
    except ORT_ERRORS as error:
        raise_backend_error(error, f"ONNX Runtime {ort.__version__} cannot open {graph} with {provider}")
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"ONNX Runtime {ort.__version__} could not load {provider} and would run on {session.get_providers()[0]}; "
            "its libraries (CUDA, cuDNN) are missing or of another version"
        )
    if strays := misplaced(session, provider):
        named = ", ".join(f"{count} {op} on {where}" for (op, where), count in strays.items())
        raise BackendError(f"ONNX Runtime {ort.__version__} would not run all of {graph} with {provider}: {named}")
    return session


def misplaced(session: Any, provider: str) -> dict[tuple[str, str], int]:  # noqa: ANN401
    """Heavy operators by (name, provider) that another provider was given."""
    return Counter(
        (node.op_type, subgraph.ep_name)
        for subgraph in session.get_provider_graph_assignment_info()
        for node in subgraph.get_nodes()
        if subgraph.ep_name != provider and node.op_type in _HEAVY
    )
