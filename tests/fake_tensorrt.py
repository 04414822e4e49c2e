"""TensorRT-RTX in name only: an engine that enforces TensorRT's rules and computes with ONNX Runtime on the host.

It refuses what TensorRT refuses, on a stream of `fake_cuda.FakeDriver`: what is unbound, shapes outside the profile, a
working memory that is too small, a capture without a run before it. Kernels are compiled for each shape, and without a
strategy that forbids it the first run of a shape rounds differently.
"""

from __future__ import annotations

import functools
import hashlib
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import onnxruntime as ort
from fake_cuda import STREAM

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.engine_sidecar import (
    PLAN,
    EngineSidecar,
    Profile,
    cache_capacity,
    engine_folder,
    read_sidecar,
    write_sidecar,
)
from lrt_deploy.bundle.manifest import graph_path, read_manifest
from lrt_deploy.bundle.precisions import base_dtype
from lrt_deploy.bundle.tensorrt_libraries import TENSORRT_DTYPES
from lrt_deploy.machine import Gpu

GPU = Gpu("Fake 8000", (8, 9))
VERSION = "1.7.1.116"
MAGIC = b"fake plan"


class FakeContext:
    """An execution context that answers False, and says why, wherever TensorRT would."""

    def __init__(self, engine):
        self.engine, self.profile, self.shapes, self.addresses = engine, None, {}, {}
        self.ran_with = None  # shapes of the last real run: capture needs one
        self.workspace, self.profiler = (0, 0), None

    def refuse(self, reason):
        self.engine.logger.log(SimpleNamespace(name="ERROR"), reason)
        return False

    def set_optimization_profile_async(self, index, stream):
        if not 0 <= index < self.engine.num_optimization_profiles:
            return self.refuse(f"there is no profile {index}")
        self.profile, self.shapes = index, {}
        return True

    def set_input_shape(self, name, shape):
        smallest, largest = self.engine.limits(name, self.profile)
        if len(shape) != len(smallest) or not all(
            a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True)
        ):
            return self.refuse(f"{name} {shape} is not within {smallest} and {largest}")
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name, address):
        if name not in self.engine.names or address <= 0 or address % 256:
            return self.refuse(f"{name} cannot lie at {address}")
        self.addresses[name] = address
        return True

    def infer_shapes(self):
        return [spec["name"] for spec in self.engine.sidecar.inputs if spec["name"] not in self.shapes]

    def is_stream_capturable(self, stream):
        return "REQUIRE_USER_ALLOCATION" in self.engine.sidecar.flags

    def set_device_memory(self, memory, size):
        assert memory % 256 == 0
        self.workspace = (memory, size)

    def execute_async_v3(self, stream):
        engine, driver = self.engine, self.engine.driver
        if stream != STREAM:
            return self.refuse(f"there is no stream {stream}")
        if self.workspace[1] < engine.device_memory_size_v2:
            return self.refuse(f"it needs {engine.device_memory_size_v2} bytes, and was given {self.workspace[1]}")
        unbound = [name for name in engine.names if name not in self.addresses]
        if unbound or self.infer_shapes():
            return self.refuse(f"not specified: {unbound or self.infer_shapes()}")
        for pair in engine.sidecar.state:
            same = self.addresses[pair["past"]] == self.addresses[pair["present"]]
            if same != pair["in_place"]:
                return self.refuse(f"{pair['past']} and {pair['present']} {'' if same else 'do not '}share an address")
        if driver.capture is not None and self.ran_with != self.shapes:
            return self.refuse("a capture needs a run with the same shapes before it")
        if self.profiler is not None:
            self.profiler.report_layer_time("all of it", 0.5)
        stand_in = self.compile()
        self.ran_with = dict(self.shapes)
        shapes, addresses, workspace = dict(self.shapes), dict(self.addresses), self.workspace

        def work():
            driver.at(*workspace).fill(driver.random.randrange(256))
            engine.compute(shapes, addresses)
            if stand_in:  # a kernel that stands in while another one is compiled rounds differently
                engine.view("logits", shapes, addresses)[...] *= np.float32(1 + 2**-22)

        return driver.enqueue(work) or self.refuse("CUDA failed")

    def compile(self):
        """Compile kernels for these shapes where they are new; whether others stand in for this run."""
        strategy, known = self.config.dynamic_shapes_kernel_specialization_strategy, self.config.cache.kernels
        shape = str(self.shapes["position_ids"])
        if strategy == "none" or shape in known:
            return False
        known.append(shape)
        self.engine.compiled.append(shape)
        return strategy == "lazy"


@functools.lru_cache(maxsize=8)
def session_of(graph):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


class FakeRuntimeCache:
    """Kernels by the shape that they were compiled for."""

    def __init__(self):
        self.kernels = []

    def deserialize(self, blob):
        if not bytes(blob).startswith(b"kernels:"):
            return False
        self.kernels = bytes(blob).decode().split(":")[1].split(";")
        return True

    def serialize(self):
        return ("kernels:" + ";".join(self.kernels)).encode()


class FakeRuntimeConfig:
    def __init__(self):
        self.allocation, self.dynamic_shapes_kernel_specialization_strategy = None, "lazy"
        self.cache = FakeRuntimeCache()

    def set_execution_context_allocation_strategy(self, strategy):
        self.allocation = strategy

    def create_runtime_cache(self):
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


class FakeEngine:
    """What `ICudaEngine` tells, from the sidecar; computes with ONNX Runtime on the bundle's graph."""

    def __init__(self, bundle, sidecar, driver, logger):
        self.sidecar, self.driver, self.logger = sidecar, driver, logger
        self.device_memory_size_v2, self.compiled = 4096, []  # shapes that kernels were compiled for
        self.names = [spec["name"] for spec in (*sidecar.inputs, *sidecar.outputs)]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(sidecar.profiles)
        self.session = session_of(bundle / sidecar.onnx)
        self.runs, self.contexts, self.types, self.shapes = [], [], {}, {}  # types and shapes other than the sidecar's
        self.aliased = {pair["present"]: pair["past"] for pair in sidecar.state if pair["in_place"]}

    def get_tensor_name(self, index):
        return self.names[index]

    def spec(self, name):
        return next(spec for spec in (*self.sidecar.inputs, *self.sidecar.outputs) if spec["name"] == name)

    def get_tensor_dtype(self, name):
        names = {dtype: theirs for theirs, dtype in TENSORRT_DTYPES.items()}
        return SimpleNamespace(name=names[self.types.get(name, self.spec(name)["dtype"])])

    def get_tensor_shape(self, name):
        return self.shapes.get(name, [-1 if isinstance(dim, str) else dim for dim in self.spec(name)["shape"]])

    def get_tensor_profile_shape(self, name, index):
        smallest, largest = self.limits(name, index)
        return smallest, smallest, largest

    def get_aliased_input_tensor(self, name):
        return self.aliased.get(name)

    def create_runtime_config(self):
        return FakeRuntimeConfig()

    def create_execution_context(self, config):
        assert config.allocation == "user managed"
        self.contexts.append(FakeContext(self))
        self.contexts[-1].config = config
        return self.contexts[-1]

    def limits(self, name, index):
        profile = self.sidecar.profiles[index]
        shape = next(spec["shape"] for spec in self.sidecar.inputs if spec["name"] == name)
        ranges = {"batch": profile.batch, "tokens": profile.tokens}
        return tuple(tuple(ranges[d][w] if isinstance(d, str) else d for d in shape) for w in (0, 2))

    def compute(self, shapes, addresses):
        self.runs.append(shapes["position_ids"])
        outputs = [spec["name"] for spec in self.sidecar.outputs]
        inputs = [spec["name"] for spec in self.sidecar.inputs]
        found = self.session.run(outputs, {name: self.view(name, shapes, addresses).copy() for name in inputs})
        for name, value in zip(outputs, found, strict=True):
            self.view(name, shapes, addresses)[...] = value

    def view(self, name, shapes, addresses):
        """An input or output, where it is bound."""
        spec, sizes = self.spec(name), dict(zip(("batch", "tokens"), shapes["position_ids"], strict=True))
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec["shape"])
        dtype = np.dtype(spec["dtype"])
        return self.driver.at(addresses[name], int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)


def fake_library(bundle, driver, precision="fp32"):
    """A module in TensorRT's place."""

    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, data):
            if not data.startswith(MAGIC):
                self.logger.log(SimpleNamespace(name="ERROR"), "magic tag does not match")
                return None
            named = data.removeprefix(MAGIC).decode()  # where it lies; nothing of most plans
            plan = Path(named) if named else engine_folder(bundle, "tensorrt-rtx", precision) / PLAN
            return FakeEngine(plan.parents[2], read_sidecar(plan), driver, self.logger)

    class Logger:
        pass

    class Profiler:
        pass

    strategy = SimpleNamespace(EAGER="eager", NONE="none", LAZY="lazy")
    return SimpleNamespace(
        __version__=VERSION,
        __spec__=ModuleSpec("tensorrt_rtx", None),
        Runtime=Runtime,
        ILogger=Logger,
        IProfiler=Profiler,
        DynamicShapesKernelSpecializationStrategy=strategy,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
    )


def sidecar_for(bundle, chunk_tokens=32, precision="fp32"):
    """What `build` would have written for the graph of a precision."""
    manifest, graph = read_manifest(bundle), graph_path(precision, "prefill", "full")
    capacity = cache_capacity(manifest.max_seq_len)
    dtype = base_dtype(precision, "full")
    config, sizes = manifest.model, {"capacity": capacity, "rows": 1}

    def described(specs):
        return tuple(
            {"name": s.name, "dtype": s.dtype, "shape": [sizes.get(dim, dim) for dim in s.shape]} for s in specs
        )

    return EngineSidecar(
        backend="tensorrt-rtx",
        precision=precision,
        plan_sha256=hashlib.sha256(MAGIC).hexdigest(),
        plan_bytes=len(MAGIC),
        onnx=graph,
        onnx_sha256=manifest.files[graph].sha256,
        weights_sha256=manifest.files[f"graphs/{precision}/weights.bin"].sha256,
        tensorrt_version=VERSION,
        compute_capabilities=("8.6", "8.9", "12.0"),
        profiles=(
            Profile("decode", (1, 1, manifest.max_batch_size), (1, 1, 1)),
            Profile("prefill", (1, 1, 1), (1, 16, chunk_tokens)),
        ),
        flags=("REQUIRE_USER_ALLOCATION", "STRONGLY_TYPED"),
        capacity=capacity,
        max_seq_len=manifest.max_seq_len,
        max_batch_size=manifest.max_batch_size,
        inputs=described(contract.graph_inputs(config, "full", dtype, host_embeddings=manifest.host_embeddings)),
        outputs=described(contract.graph_outputs(config, dtype)),
        state=tuple(pair.to_dict() for pair in contract.state_pairs(config, dtype)),
        layers={},
        build={},
    )


def put_engine(folder, built="fp32", **changes):
    plan = engine_folder(folder, "tensorrt-rtx", built) / PLAN
    plan.parent.mkdir(parents=True, exist_ok=True)
    plan.write_bytes(MAGIC)
    write_sidecar(plan, msgspec.structs.replace(sidecar_for(folder, precision=built), **changes))
    return plan


def build_fake_engine(folder, *, backend, precision):
    """In place of `build_engine`: an engine that names itself, so that one library opens those of several bundles."""
    plan = engine_folder(folder, backend, precision) / PLAN
    data = MAGIC + str(plan).encode()
    put_engine(folder, precision, plan_sha256=hashlib.sha256(data).hexdigest(), plan_bytes=len(data))
    plan.write_bytes(data)
    return read_sidecar(plan)
