"""The GPU as the runtime uses it, on a CUDA driver that keeps its memory on the host: no GPU is here."""

# ruff: noqa: N802, N815 - the names are CUDA's

from __future__ import annotations

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_cuda import CUresult, FakeDriver

from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import BackendError
from lrt_deploy.machine import find_gpu
from lrt_deploy.runtime import bench
from lrt_deploy.runtime.backends.cuda import Arena, CudaDevice
from lrt_deploy.runtime.backends.device import DeviceBuffers, Setup, Steps
from lrt_deploy.runtime.backends.host_tables import HostTables


class FakeRuntime(ModuleType):
    """The calls of `cuda.bindings.runtime` that ask whether there is a GPU."""

    cudaError_t = SimpleNamespace(cudaSuccess=0)

    def __init__(self):
        super().__init__("cuda.bindings.runtime")
        self.fails, self.devices, self.version = None, 1, 13000

    def answer(self, name, *results):
        return (35, *tuple(None for _ in results)) if self.fails == name else (0, *results)

    def cudaGetErrorString(self, error):
        return (0, b"out of luck")

    def cudaDriverGetVersion(self):
        return self.answer("cudaDriverGetVersion", self.version)

    def cudaGetDeviceCount(self):
        return self.answer("cudaGetDeviceCount", self.devices)

    def cudaGetDevice(self):
        return (0, 0)

    def cudaGetDeviceProperties(self, device):
        return self.answer("cudaGetDeviceProperties", SimpleNamespace(name=b"Fake 8000", major=8, minor=9))


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake)
    yield fake
    assert fake.violations == []


@pytest.fixture
def device(cuda):
    return CudaDevice()


def test_memory_is_zeroed_copied_and_given_back(cuda, device):
    arena = Arena(device)
    address = arena.allocate(32)
    found = device.pinned((8,), np.dtype(np.int32))
    device.copy_out(found, address)
    device.synchronize()
    assert not found.any()
    device.copy_in(address, np.arange(8, dtype=np.int32))
    device.copy_out(found, address)
    device.synchronize()
    assert found.tolist() == list(range(8))
    arena.release()
    del found
    assert cuda.memory == cuda.pinned == {}


def test_memory_is_copied_within_the_device(cuda, device):
    source, target, found = device.allocate(16), device.allocate(16), np.zeros(4, np.int32)
    device.copy_in(source, np.arange(4, dtype=np.int32))
    device.copy_within(target + 4, source, 12)
    assert cuda.copies[-1] == (12, "within")
    device.copy_out(found, target)
    assert found.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(("asked", "count"), [(2**8, 2**8), (None, 4 * 2**14)])
def test_bandwidth_counts_what_is_read_and_written_in_the_best_round(cuda, device, monkeypatch, asked, count):
    clock = iter([0, 9, 10, 12, 20, 21, 30, 33, 40, 44])  # five rounds, of which one takes a second
    monkeypatch.setattr(bench, "_SMALLEST_COPY_BYTES", 2**8)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert bench.device_copy_gb_s(device, asked) == 2 * bench._COPIES * count / 1e9
    assert set(cuda.copies) == {(count, "within")} and len(cuda.copies) == 5 * bench._COPIES
    assert cuda.memory == {}


def test_a_copy_that_fails_while_measuring_leaves_no_memory(cuda, device):
    cuda.fail("cuMemcpyDtoDAsync", CUresult.CUDA_ERROR_INVALID_VALUE)
    with pytest.raises(BackendError, match="copying 64 bytes: invalid value"):
        bench.device_copy_gb_s(device, 64)
    with device.lock:
        device.begin()  # what was enqueued has ended
    assert cuda.memory == {}


def test_what_is_measured_of_a_device_is_named(device, monkeypatch):
    monkeypatch.setattr(bench, "device_copy_gb_s", lambda device: 1234.5)
    assert bench.measure_bandwidth(device) == (
        {"bandwidth_gb_s": 1234.5, "bandwidth_of": "device-to-device copy", "read_bandwidth_gb_s": None},
        2**14,
    )


def test_rows_go_to_and_from_addresses_a_pitch_apart(device):
    address = device.allocate(30)
    device.copy_rows_in(address + 2, 10, np.arange(12, dtype=np.uint8).reshape(3, 4))
    found, everything = np.zeros((3, 4), np.uint8), np.zeros(30, np.uint8)
    device.copy_rows_out(found, address + 2, 10)
    device.copy_out(everything, address)
    device.synchronize()
    assert found.tolist() == np.arange(12).reshape(3, 4).tolist()
    assert everything[2:6].tolist() == [0, 1, 2, 3] and everything[12:16].tolist() == [4, 5, 6, 7]
    assert not everything[6:12].any()


def test_rows_are_copied_within_the_device_and_nothing_between_them(cuda, device):
    source, target, found = device.allocate(30), device.allocate(30), np.zeros(30, np.uint8)
    device.copy_in(source, np.arange(1, 31, dtype=np.uint8))
    cuda.copies.clear()
    device.copy_rows_within(target + 2, source, 10, 3, 4)
    assert cuda.copies == [(4, "within")] * 3
    device.copy_out(found, target)
    assert found.reshape(3, 10)[:, 2:6].tolist() == [[1, 2, 3, 4], [11, 12, 13, 14], [21, 22, 23, 24]]
    assert not found.reshape(3, 10)[:, :2].any() and not found.reshape(3, 10)[:, 6:].any()


def test_pinned_memory_lives_as_long_as_a_view_of_it(cuda, device):
    array = device.pinned((2, 3), np.dtype(np.float32))
    assert array.shape == (2, 3) and not array.any()
    view = array[1]
    del array
    gc.collect()
    view[:] = 4
    assert len(cuda.pinned) == 1
    del view
    gc.collect()
    assert cuda.pinned == {}


def test_a_graph_is_recorded_without_running_and_runs_when_launched(cuda, device):
    arena = Arena(device)
    source, found = (device.pinned((4,), np.dtype(np.int32)) for _ in range(2))
    source[:], address = range(4), arena.allocate(16)

    def enqueue():
        device.copy_in(address, source)
        device.copy_out(found, address)

    graph = arena.capture(enqueue)
    assert not found.any() and cuda.templates == [] and len(cuda.graphs) == 1
    source[:] = 9  # a launch reads what is there then
    device.launch(graph)
    device.synchronize()
    assert found.tolist() == [9] * 4
    arena.release()
    assert cuda.graphs == []


def test_a_capture_that_fails_leaves_the_stream_usable(cuda, device):
    def enqueue():
        raise BackendError("no")

    with pytest.raises(BackendError, match="no"):
        device.capture(enqueue)
    assert cuda.capture is None


# What ends, in the next operation, what the one before could not


def interrupt_twice(cuda, device):
    """A capture that is interrupted, and again while it is being ended."""
    left = ["cuStreamEndCapture"]

    def interrupt(name):
        if name in left:
            left.remove(name)
            raise KeyboardInterrupt

    def enqueue():
        raise KeyboardInterrupt

    cuda.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        device.capture(enqueue)
    cuda.before = lambda name: None
    assert cuda.capture is not None


def test_a_capture_whose_ending_is_interrupted_is_ended_by_the_next_operation(cuda, device):
    arena = Arena(device)
    address = arena.allocate(16)
    device.synchronize()
    interrupt_twice(cuda, device)
    arena.release()  # freeing would break the capture, and waits
    assert address in cuda.memory and not cuda.capture.broken
    with device.lock:
        device.begin()
    assert cuda.capture is None and cuda.memory == {}


def test_a_capture_that_another_thread_left_cannot_be_ended_and_is_said_to_be(cuda, device):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: (device.begin(), interrupt_twice(cuda, device))).result()
    for _ in range(2):
        with pytest.raises(BackendError, match=r"cannot be used any more.*a capture was interrupted, and its thread"):
            device.begin()


def test_a_collector_that_an_interrupt_left_off_is_on_again_after_the_next_beginning(device, monkeypatch):
    enable, interrupts = gc.enable, [KeyboardInterrupt]

    def interrupted():
        if interrupts:
            raise interrupts.pop()
        enable()

    assert gc.isenabled()
    with monkeypatch.context() as patch:
        patch.setattr(gc, "enable", interrupted)
        with pytest.raises(KeyboardInterrupt):
            device.capture(lambda: None)
        assert not gc.isenabled()
        device.begin()
    assert gc.isenabled()


def test_a_collector_that_the_caller_has_switched_off_stays_off(device):
    gc.disable()
    try:
        device.capture(lambda: None)
        device.begin()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_memory_is_not_given_back_while_something_is_enqueued(cuda, device):
    arena = Arena(device)
    arena.allocate(16)  # zeroing is enqueued, and no operation runs
    arena.release()
    assert len(cuda.memory) == 1
    device.begin()
    assert cuda.memory == {}


def test_any_thread_gives_memory_back(cuda, device):
    arena = Arena(device)
    arena.allocate(16)
    device.synchronize()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(arena.release).result()
    assert cuda.memory == {}


def test_after_a_sticky_error_nothing_is_given_back(cuda, device):
    arenas = [Arena(device) for _ in range(2)]
    for arena in arenas * 3:
        arena.allocate(16)
    device.synchronize()
    called = []
    cuda.fail("cuMemFree", CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)
    cuda.before = called.append
    for arena in arenas:
        arena.release()
    assert called.count("cuMemFree") == 1 and called[-1] == "cuMemFree"
    with pytest.raises(BackendError, match=r"cannot be used any more.*giving memory back: illegal address"):
        device.begin()


@pytest.mark.parametrize(
    ("call", "act", "message"),
    [
        ("cuMemAlloc", lambda device: device.allocate(10), "CUDA failed while allocating 10 bytes: invalid value"),
        ("cuMemHostAlloc", lambda device: device.pinned((1,), np.dtype(np.int8)), "pinning host memory"),
        ("cuMemsetD8Async", lambda device: device.allocate(10), "zeroing memory"),
        ("cuMemcpyHtoDAsync", lambda device: device.copy_in(1, np.zeros(3, np.uint8)), "copying 3 bytes to the GPU"),
        ("cuMemcpyDtoDAsync", lambda device: device.copy_within(1, 2, 3), "copying 3 bytes"),
        ("cuDeviceGetAttribute", lambda device: device.cache_bytes(), "asking for the size of its cache"),
        ("cuStreamSynchronize", lambda device: device.synchronize(), "running on the GPU: invalid value"),
        ("cuStreamBeginCapture", lambda device: device.capture(lambda: None), "starting a capture"),
        ("cuStreamEndCapture", lambda device: device.capture(lambda: None), "capturing a CUDA graph"),
        ("cuGraphInstantiate", lambda device: device.capture(lambda: None), "instantiating a CUDA graph"),
        ("cuGraphLaunch", lambda device: device.launch([]), "launching a CUDA graph"),
        ("cuCtxSetCurrent", lambda device: device.begin(), "binding the device to a thread"),
    ],
)
def test_every_failure_is_named_and_leaves_neither_a_capture_nor_memory(cuda, device, call, act, message):
    cuda.fail(call, CUresult.CUDA_ERROR_INVALID_VALUE)
    with pytest.raises(BackendError, match=message):
        act(device)
    with device.lock:
        device.begin()
    assert cuda.capture is None and cuda.templates == [] and cuda.memory == {} and not cuda.failures


def test_a_gpu_is_found_or_its_absence_explained(monkeypatch):
    cuda = FakeRuntime()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    gpu, words = find_gpu()
    assert (gpu.name, gpu.compute_capability, gpu.capability_text) == ("Fake 8000", (8, 9), "8.9")
    assert words == "Fake 8000, compute capability 8.9"
    cuda.fails = "cudaGetDeviceProperties"
    assert find_gpu() == (None, "the device cannot be used: out of luck")
    cuda.fails = "cudaGetDeviceCount"
    assert find_gpu() == (None, "CUDA finds no device: out of luck")
    cuda.version = 0
    assert find_gpu() == (None, "no NVIDIA driver is installed")
    cuda.version = 13000
    cuda.fails, cuda.devices = None, 0
    assert find_gpu() == (None, "CUDA counts 0 devices")
    for name in ("runtime", "driver"):
        monkeypatch.setitem(sys.modules, f"cuda.bindings.{name}", None)
    gpu, words = find_gpu()
    assert gpu is None and "is not installed" in words
    with pytest.raises(BackendError, match="the extras tensorrt and tensorrt-rtx bring it"):
        CudaDevice()


class Idle:
    """A graph that does nothing."""

    def context(self, profile, stream):
        return self

    def shape(self, name, shape):
        pass

    bind = shape

    def ready(self):
        pass

    def enqueue(self, stream):
        pass

    def capturable(self, stream):
        return True

    def warmed(self):
        pass


def test_a_state_in_bfloat16_shows_float32_and_keeps_its_entries(device):
    config = LRTConfig(sequence_len=32, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=8)
    dtype = np.dtype(ml_dtypes.bfloat16)
    pairs = [
        {"past": f"past_{kind}_{i}", "present": f"present_{kind}_{i}", "in_place": True}
        for kind in ("key", "value")
        for i in range(2)
    ]
    sizes = {"capacity": 128, "chunk_tokens": 16}
    setup = Setup(Idle(), device, config, dtype, [], pairs, **sizes, cuda_graph=True, tables=HostTables({}))
    buffers = DeviceBuffers(Steps(setup), 2, 32)
    buffers.set_latent(np.array([1]), np.full((1, 8), 1.003, np.float32))
    assert buffers.latent.dtype == np.float32
    assert buffers.latent[1].tolist() == [1.0] * 8 and not buffers.latent[0].any()
    entries = {pair["past"]: np.arange(24).reshape(2, 3, 4).astype(dtype) for pair in pairs}
    buffers.write_slots(1, 5, entries)
    found = buffers.read_slots(1, 5, 8)
    assert all(np.array_equal(found[name], entries[name]) and found[name].dtype == dtype for name in entries)
    keys, values = buffers.cache(1, 9)
    assert keys.shape == values.shape == (2, 2, 9, 4) and keys.dtype == np.float32
    assert np.array_equal(keys[1, :, 5:8], np.arange(24).reshape(2, 3, 4)) and not keys[0].any()
    assert {name: array.shape for name, array in buffers.read_slots(0, 0, 0).items()}["past_key_0"] == (2, 0, 4)
