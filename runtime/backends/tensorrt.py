"""TensorRT and TensorRT-RTX: an engine of the bundle on the current GPU, with the whole state in its memory.

An engine is refused before it is used unless it fits this TensorRT, this GPU and this bundle: its sidecar is held
against the machine and the manifest, then the file against its hash, then the deserialized engine against the sidecar
(names, types, profiles, and which output lives in which input's memory).
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.engine_sidecar import (
    DECODE,
    PLAN,
    PREFILL,
    RUNTIME_CACHE,
    EngineSidecar,
    build_command,
    engine_folder,
    read_plan,
    read_sidecar,
    runs_on,
)
from lrt_deploy.bundle.manifest import Manifest, weights_path
from lrt_deploy.bundle.precisions import base_dtype
from lrt_deploy.bundle.tensorrt_libraries import LIBRARIES, TENSORRT_DTYPES, collecting_logger
from lrt_deploy.errors import BackendError, EngineError
from lrt_deploy.files import atomic_write, read_bytes
from lrt_deploy.machine import Gpu, find_gpu

from .cuda import Arena, CudaDevice
from .device import DeviceBackend, Setup
from .host_tables import HostTables

_LARGEST_CACHE = 2**30  # bytes of compiled kernels; those of one model take a few MB


@dataclass
class Errors:
    """What TensorRT has said went wrong."""

    said: list[str] = field(default_factory=list)

    def take(self, severity: str, text: str) -> None:
        """Keep an error."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.said.append(" ".join(text.split()))

    def last_words(self) -> str:
        """The latest, in one line."""
        return "; ".join(self.said[-3:]) or "it gave no reason"


@dataclass
class Engine:
    """A deserialized plan, what it was made from, and what must live as long as it does."""

    trt: Any
    runtime: Any
    engine: Any
    sidecar: EngineSidecar
    errors: Errors


class _Runner:
    """Contexts of one engine; see `device.Runner`. They share their working memory, and the kernels of TensorRT-RTX.

    One working memory is enough, because all contexts run on one stream. TensorRT-RTX compiles kernels when a shape is
    first run, and keeps them in `cache`, a file beside the plan.
    """

    def __init__(self, engine: Engine, device: CudaDevice, cache: Path | None = None) -> None:
        self.engine, self._arena, self._cache = engine, Arena(device), cache
        self._workspace_bytes = max(1, int(engine.engine.device_memory_size_v2))
        self._workspace = self._arena.allocate(self._workspace_bytes)
        self._rtx = engine.sidecar.backend == "tensorrt-rtx"
        self._kernels = self._read_cache() if self._rtx else None
        self._kept = b""  # what the cache's file holds, as far as this runner has written it

    def context(self, profile: str, stream: int) -> _Context:
        engine, trt = self.engine.engine, self.engine.trt
        index, _ = self.engine.sidecar.profile(profile)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._rtx:
            # By default kernels for a shape are compiled in the background while slower ones stand in. A CUDA graph
            # would keep those, and two runs of one prompt could differ. So compile them at once for decoding; prompts
            # have too many lengths for that, and run kernels for any length.
            kinds = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if profile == DECODE else kinds.NONE
            config.set_runtime_cache(self._kernels)
        made = engine.create_execution_context(config)
        context = _Context(self, made)
        context.expect(made is not None, "creating an execution context")
        context.expect(made.set_optimization_profile_async(index, stream), f"choosing the profile {profile}")
        made.set_device_memory(self._workspace, self._workspace_bytes)
        return context

    def keep_kernels(self) -> None:
        """Write the kernels that have been compiled beside the plan, unless the folder is read-only."""
        if self._kernels is None or self._cache is None or not os.access(self._cache.parent, os.W_OK):
            return
        found = bytes(self._kernels.serialize())
        if found != self._kept:
            # It saves time and nothing else, so a full disk must not fail a step.
            with suppress(OSError), atomic_write(self._cache) as partial:
                partial.write_bytes(found)
            self._kept = found

    def _read_cache(self) -> Any:  # noqa: ANN401
        """The kernels that an earlier process compiled; TensorRT-RTX refuses those of another GPU or version."""
        kernels = self.engine.engine.create_runtime_config().create_runtime_cache()
        if self._cache is not None and self._cache.exists():
            kernels.deserialize(read_bytes(self._cache, "the cache of compiled kernels", EngineError, _LARGEST_CACHE))
        return kernels


@dataclass
class _Context:
    """An execution context whose refusals, which TensorRT gives as False and a log message, become errors."""

    runner: _Runner
    context: Any

    def shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.expect(self.context.set_input_shape(name, shape), f"setting {name} to the shape {shape}")

    def bind(self, name: str, address: int) -> None:
        self.expect(self.context.set_tensor_address(name, address), f"binding {name}")

    def ready(self) -> None:
        unknown = self.context.infer_shapes()
        self.expect(not unknown, f"inferring shapes: {', '.join(unknown)} unknown")

    def enqueue(self, stream: int) -> None:
        self.expect(self.context.execute_async_v3(stream), "running the engine")

    def capturable(self, stream: int) -> bool:
        # Full TensorRT has no such question.
        return self.runner.engine.sidecar.backend != "tensorrt-rtx" or bool(self.context.is_stream_capturable(stream))

    def warmed(self) -> None:
        self.runner.keep_kernels()

    def expect(self, done: object, what: str) -> None:
        if not done:
            engine = self.runner.engine
            raise BackendError(f"{engine.sidecar.backend} failed while {what}: {engine.errors.last_words()}")


def open_engine(bundle: Path, manifest: Manifest, backend: str, precision: str, gpu: Gpu) -> Engine:
    """Open the engine of a backend and precision; EngineError for one that is missing or must not be used here."""
    plan, command = engine_folder(bundle, backend, precision) / PLAN, build_command(bundle, backend, precision)
    if not plan.exists():
        raise EngineError(f"{bundle} has no engine for {backend} in {precision}; build it with `{command}`")
    trt = LIBRARIES[backend].load()
    try:
        sidecar = read_sidecar(plan)
        if misfit := find_misfit(sidecar, manifest, (backend, precision), str(trt.__version__), gpu):
            raise EngineError(misfit)
        engine = _deserialize(trt, read_plan(plan, sidecar), sidecar)
        if misfit := find_io_misfit(engine):
            raise EngineError(misfit)
    except EngineError as error:
        raise EngineError(f"{plan} must not be used here: {error}; build it again with `{command}`") from error
    return engine


def find_misfit(
    sidecar: EngineSidecar, manifest: Manifest, asked: tuple[str, str], version: str, gpu: Gpu
) -> str | None:
    """What in the sidecar does not fit this bundle, this TensorRT or this GPU; None if all does."""
    files, weights = manifest.files, weights_path(asked[1])
    compared = {
        "backend and precision": ((sidecar.backend, sidecar.precision), asked),
        f"{asked[0]} version": (sidecar.tensorrt_version, version),
        f"SHA-256 of {sidecar.onnx}": (sidecar.onnx_sha256, getattr(files.get(sidecar.onnx), "sha256", None)),
        f"SHA-256 of {weights}": (sidecar.weights_sha256, getattr(files.get(weights), "sha256", None)),
    }
    for what, (made_for, found) in compared.items():
        if made_for != found:
            return f"it was made for {what} {made_for}, and here it is {found}"
    if not runs_on(sidecar.compute_capabilities, gpu.compute_capability):
        named = ", ".join(sidecar.compute_capabilities)
        return f"it was made for GPUs of compute capability {named}, and {gpu.name} has {gpu.capability_text}"
    if misfit := _find_contract_misfit(sidecar, manifest):
        return misfit
    if sidecar.max_seq_len < manifest.max_seq_len or sidecar.max_batch_size < manifest.max_batch_size:
        return (
            f"it holds {sidecar.max_seq_len} tokens and {sidecar.max_batch_size} sequences, the bundle "
            f"{manifest.max_seq_len} and {manifest.max_batch_size}"
        )
    return None


def _find_contract_misfit(sidecar: EngineSidecar, manifest: Manifest) -> str | None:
    """Which input, output or pair of state the sidecar describes otherwise than the model's configuration does."""
    base, sizes = base_dtype(sidecar.precision, "full"), {"capacity": sidecar.capacity, "rows": 1}
    expected = {
        "inputs": contract.graph_inputs(manifest.model, "full", base, manifest.host_embeddings),
        "outputs": contract.graph_outputs(manifest.model, base),
    }
    for way, specs in expected.items():
        found = {spec["name"]: (spec["dtype"], list(spec["shape"])) for spec in getattr(sidecar, way)}
        wanted = {s.name: (s.dtype, [sizes.get(d, d) if isinstance(d, str) else d for d in s.shape]) for s in specs}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                return (
                    f"its sidecar lists {name} among its {way} as {found.get(name)}, the model has {wanted.get(name)}"
                )
    pairs = [pair.to_dict() for pair in contract.state_pairs(manifest.model, base)]
    if list(sidecar.state) != pairs:
        return "its sidecar describes another state than the model has"
    return None


def _deserialize(trt: Any, plan: bytes, sidecar: EngineSidecar) -> Engine:  # noqa: ANN401
    errors = Errors()
    runtime = trt.Runtime(collecting_logger(trt, errors.take))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"{sidecar.backend} cannot read it: {errors.last_words()}")
    return Engine(trt, runtime, engine, sidecar, errors)


def find_io_misfit(opened: Engine) -> str | None:
    """What the engine itself says otherwise than its sidecar; None if nothing."""
    engine, sidecar = opened.engine, opened.sidecar
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    expected = [spec["name"] for spec in (*sidecar.inputs, *sidecar.outputs)]
    if sorted(names) != sorted(expected):
        return f"its inputs and outputs are {', '.join(names)}, its sidecar says {', '.join(expected)}"
    for spec in (*sidecar.inputs, *sidecar.outputs):
        dtype = TENSORRT_DTYPES.get(engine.get_tensor_dtype(spec["name"]).name)
        # A dimension that TensorRT leaves free is -1; of an output it may know more than the contract says.
        shape = tuple(engine.get_tensor_shape(spec["name"]))
        sizes = [-1 if isinstance(dim, str) else dim for dim in spec["shape"]]
        fits = len(shape) == len(sizes) and all(a == b or b == -1 for a, b in zip(shape, sizes, strict=True))
        if dtype != spec["dtype"] or not fits:
            return f"its {spec['name']} is {dtype} {shape}, its sidecar says {spec['dtype']} {spec['shape']}"
    if engine.num_optimization_profiles != len(sidecar.profiles):
        return f"it has {engine.num_optimization_profiles} profiles, its sidecar says {len(sidecar.profiles)}"
    for index, profile in enumerate(sidecar.profiles):
        smallest, _, largest = engine.get_tensor_profile_shape("position_ids", index)
        found = (tuple(smallest), tuple(largest))
        if found != ((profile.batch[0], profile.tokens[0]), (profile.batch[2], profile.tokens[2])):
            return (
                f"its profile {profile.name} takes position_ids from {found[0]} to {found[1]}, "
                f"its sidecar says {profile}"
            )
    for pair in sidecar.state:
        shared = engine.get_aliased_input_tensor(pair["present"])
        if pair["in_place"] and shared != pair["past"]:
            return f"it would copy {pair['past']} to {pair['present']} instead of updating it in place"
    return None


class TensorRTBackend(DeviceBackend):
    """An opened engine on a device; see `open`."""

    def __init__(
        self,
        engine: Engine,
        device: CudaDevice,
        manifest: Manifest,
        cuda_graph: bool = True,
        tables: HostTables | None = None,
        cache: Path | None = None,
    ) -> None:
        sidecar, base = engine.sidecar, base_dtype(engine.sidecar.precision, "full")
        with device.lock:
            device.begin()
            runner = _Runner(engine, device, cache)
        setup = Setup(
            runner=runner,
            device=device,
            config=manifest.model,
            dtype=np.dtype(base),
            inputs=sidecar.inputs,
            state=sidecar.state,
            capacity=sidecar.capacity,
            chunk_tokens=sidecar.profile(PREFILL)[1].tokens[2],
            cuda_graph=cuda_graph,
            tables=tables or HostTables({}),
        )
        graph = "decoding as a CUDA graph" if cuda_graph else "no CUDA graph"
        detail = f"{sidecar.backend} {sidecar.tensorrt_version}, {sidecar.precision} engine, {graph}"
        super().__init__(sidecar.backend, sidecar.precision, setup, manifest.max_seq_len, detail)

    @classmethod
    def open(
        cls, bundle: Path, manifest: Manifest, backend: str, precision: str, cuda_graph: bool = True
    ) -> TensorRTBackend:
        """Open the bundle's engine on the current GPU."""
        gpu, reason = find_gpu()
        if gpu is None:
            raise BackendError(f"{backend} needs an NVIDIA GPU: {reason}; take the backend ort-cpu")
        device = CudaDevice()  # first, so that TensorRT finds its context current
        engine = open_engine(bundle, manifest, backend, precision, gpu)
        tables = HostTables.open(bundle, manifest, precision)
        cache = engine_folder(bundle, backend, precision) / RUNTIME_CACHE
        opened = cls(engine, device, manifest, cuda_graph, tables, cache)
        opened.detail += f", {gpu.name}"
        return opened
