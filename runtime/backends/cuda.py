"""One GPU as the runtime uses it: memory by address, one stream, copies, and CUDA graphs, on CUDA's driver API.

Everything is enqueued on the one stream, in order; nothing has happened before `synchronize`. Addresses are plain
integers, as TensorRT takes them.

Several threads may use a device, one at a time: an operation, from its first call to its last `synchronize`, holds
`lock` and begins with `begin`, which ends what an interrupted one left: copies that still run, or a stream that still
captures. Finalizers run at any moment, also while a graph is captured, where freeing is forbidden: they hand memory to
`give_back`, which frees it when no operation runs.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrt_deploy.errors import BackendError

Array = NDArray[Any]

# What gives each kind of thing back.
_MEMORY, _PINNED, _GRAPH, _EVENT = "cuMemFree", "cuMemFreeHost", "cuGraphExecDestroy", "cuEventDestroy"
# Errors after which CUDA answers every call of the process with the same error.
_STICKY = (
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_UNKNOWN",
)


class Arena:
    """Device memory and graphs that belong together; given back by `release`, or when the arena is no longer used."""

    def __init__(self, device: CudaDevice) -> None:
        self.device = device
        self._addresses: list[int] = []
        self._graphs: list[Any] = []
        self._events: list[Any] = []
        weakref.finalize(self, device.give_back, self._addresses, self._graphs, self._events).atexit = False

    def allocate(self, count_bytes: int) -> int:
        """Address of zeroed device memory, aligned to 256 bytes."""
        self._addresses.append(self.device.allocate(count_bytes))
        return self._addresses[-1]

    def capture(self, enqueue: Callable[[], None]) -> Any:  # noqa: ANN401
        """Record what `enqueue` enqueues, without running it, as a graph."""
        self._graphs.append(self.device.capture(enqueue))
        return self._graphs[-1]

    def event(self) -> Any:  # noqa: ANN401
        """Return an event; see `CudaDevice.event`."""
        self._events.append(self.device.event())
        return self._events[-1]

    def release(self) -> None:
        """Give everything back."""
        things = [list(kind) for kind in (self._addresses, self._graphs, self._events)]
        for kind in (self._addresses, self._graphs, self._events):
            kind.clear()
        self.device.give_back(*things)


class _Rows(NamedTuple):
    """Where rows of bytes lie: the first, and the bytes from one to the next."""

    address: int
    pitch: int
    on_host: bool = False


class CudaDevice:
    """The current CUDA device, or the first one, through `cuda.bindings.driver`: memory and a stream."""

    def __init__(self) -> None:
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.driver")
        except ModuleNotFoundError as error:
            raise BackendError(
                f"{error.name} is not installed; the extras tensorrt and tensorrt-rtx bring it"
            ) from error
        cuda, self._process, self._lock = self._cuda, os.getpid(), threading.Lock()
        self._failure: str | None = None  # the first error after which CUDA fails every call
        self._enqueued = self._capturing = self._keeps_garbage = False
        self._sound = False  # whether what is enqueued may go on while an operation begins
        self._returned: deque[tuple[str, Any]] = deque()
        self._ask("initializing CUDA", cuda.cuInit(0))
        status, self._number = cuda.cuCtxGetDevice()
        if status != cuda.CUresult.CUDA_SUCCESS:  # no context is current in this thread
            self._number = self._ask("finding the device", cuda.cuDeviceGet(0))
        # The primary context is the one that TensorRT and ONNX Runtime use.
        self._context = self._ask("opening the device", cuda.cuDevicePrimaryCtxRetain(self._number))
        self._ask("binding the device to a thread", cuda.cuCtxSetCurrent(self._context))
        flags = cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.stream = int(self._ask("creating a stream", cuda.cuStreamCreate(flags)))

    @property
    def lock(self) -> threading.Lock:
        """The lock of all operations; raises BackendError in a process that was forked from the one that opened it."""
        if os.getpid() != self._process:  # checked before the lock, which another thread may have held at the fork
            raise BackendError(
                f"this process ({os.getpid()}) was forked from the one that opened the GPU ({self._process}), and CUDA "
                "does not work across a fork; open the bundle again in a new process (start method spawn)"
            )
        return self._lock

    def begin(self, go_on: bool = False) -> None:
        """Begin an operation, with `lock` held: bind the device to this thread, and end what an earlier one left.

        With `go_on`, what an operation has enqueued that ended with `leave_running` is not waited for.
        Raises BackendError with the first error where an earlier one has made the device unusable.
        """
        if self._failure is None:
            self._ask("binding the device to a thread", self._cuda.cuCtxSetCurrent(self._context))
            if self._capturing:
                self._drop_capture()
            self._collect_garbage(True)
        if self._failure is not None:
            raise BackendError(
                f"the GPU cannot be used any more in this process, because of an earlier error: {self._failure}; "
                "start the process again"
            )
        sound, self._sound = self._sound, False
        if self._enqueued and go_on and sound:
            return
        if self._enqueued:
            self.synchronize()
        self._free_returned()

    def leave_running(self) -> None:
        """End an operation without waiting for what it has enqueued, which uses memory that will not be used otherwise.

        Any operation that begins, but for one that goes on, waits for it.
        """
        self._sound = True

    def give_back(self, memory: Iterable[int], graphs: Iterable[Any] = (), events: Iterable[Any] = ()) -> None:
        """Free memory, graphs and events as soon as no operation runs; may be called in any thread at any time."""
        things = [(_GRAPH, graph) for graph in graphs] + [(_EVENT, event) for event in events]
        self._return(things + [(_MEMORY, address) for address in memory])

    def allocate(self, count_bytes: int) -> int:
        """Address of zeroed device memory, aligned to 256 bytes."""
        address = int(self._ask(f"allocating {count_bytes} bytes", self._cuda.cuMemAlloc(count_bytes)))
        try:
            self.zero(address, count_bytes)
        except BaseException:
            self._returned.append((_MEMORY, address))
            raise
        return address

    def zero(self, address: int, count_bytes: int) -> None:
        """Enqueue the zeroing of device memory."""
        self._enqueued = True
        self._ask("zeroing memory", self._cuda.cuMemsetD8Async(address, 0, count_bytes, self.stream))

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A zeroed host array that copies may use while the host goes on; freed with its last view."""
        size = int(np.prod(shape)) * dtype.itemsize
        address = int(self._ask("pinning host memory", self._cuda.cuMemHostAlloc(max(1, size), 0)))
        buffer = (ctypes.c_byte * max(1, size)).from_address(address)
        # The array's base keeps the buffer alive.
        weakref.finalize(buffer, self._return, [(_PINNED, address)]).atexit = False
        array: Array = np.frombuffer(memoryview(buffer).cast("B"), np.uint8)[:size].view(dtype).reshape(shape)
        array[...] = 0
        return array

    def copy_in(self, address: int, array: Array) -> None:
        """Enqueue a copy of a contiguous host array to the device."""
        if array.nbytes:
            self._enqueued = True
            copied = self._cuda.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, self.stream)
            self._ask(f"copying {array.nbytes} bytes to the GPU", copied)

    def copy_out(self, array: Array, address: int) -> None:
        """Enqueue a copy from the device into a contiguous host array."""
        if array.nbytes:
            self._enqueued = True
            copied = self._cuda.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, self.stream)
            self._ask(f"copying {array.nbytes} bytes from the GPU", copied)

    def copy_rows_in(self, address: int, pitch: int, array: Array) -> None:
        """Enqueue a copy of each row of a contiguous array (rows, bytes) to addresses that are `pitch` apart."""
        host, device = _Rows(array.ctypes.data, array.shape[1], on_host=True), _Rows(address, pitch)
        self._copy_rows("copying rows to the GPU", device, host, array.shape)

    def copy_rows_out(self, array: Array, address: int, pitch: int) -> None:
        """Enqueue the reverse of `copy_rows_in`."""
        host, device = _Rows(array.ctypes.data, array.shape[1], on_host=True), _Rows(address, pitch)
        self._copy_rows("copying rows from the GPU", host, device, array.shape)

    def copy_rows_within(self, target: int, source: int, pitch: int, rows: int, width: int) -> None:
        """Enqueue a copy of rows of `width` bytes, which are `pitch` apart in both places on the device."""
        self._copy_rows("copying rows", _Rows(target, pitch), _Rows(source, pitch), (rows, width))

    def copy_within(self, target: int, source: int, count_bytes: int) -> None:
        """Enqueue a copy from one address on the device to another."""
        if count_bytes:
            self._enqueued = True
            copied = self._cuda.cuMemcpyDtoDAsync(target, source, count_bytes, self.stream)
            self._ask(f"copying {count_bytes} bytes", copied)

    def cache_bytes(self) -> int:
        """Size of the last cache before the device's memory; 0 where it does not say."""
        attribute = self._cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE
        answer = self._cuda.cuDeviceGetAttribute(attribute, self._number)
        return int(self._ask("asking for the size of its cache", answer))

    def synchronize(self) -> None:
        """Wait until everything enqueued has happened."""
        self._ask("running on the GPU", self._cuda.cuStreamSynchronize(self.stream))
        self._enqueued = False

    def event(self) -> Any:  # noqa: ANN401
        """Return a place in the stream that can be waited for, once it is marked."""
        flags = self._cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING
        return self._ask("making an event", self._cuda.cuEventCreate(flags))

    def mark(self, event: Any) -> None:  # noqa: ANN401
        """Let an event stand for all that is enqueued by now."""
        self._ask("marking an event", self._cuda.cuEventRecord(event, self.stream))

    def wait(self, event: Any) -> None:  # noqa: ANN401
        """Wait for what an event stands for."""
        self._ask("running on the GPU", self._cuda.cuEventSynchronize(event))

    def capture(self, enqueue: Callable[[], None]) -> Any:  # noqa: ANN401
        """Record what `enqueue` enqueues, without running it, as a graph."""
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        try:
            self._collect_garbage(False)  # a collected engine would free memory, which breaks a capture
            self._capturing = True
            self._ask("starting a capture", self._cuda.cuStreamBeginCapture(self.stream, mode))
            enqueue()
            graph = self._ask("capturing a CUDA graph", self._cuda.cuStreamEndCapture(self.stream))
            self._capturing = False
        except BaseException:
            self._drop_capture()
            raise
        finally:
            self._collect_garbage(True)
        try:
            return self._ask("instantiating a CUDA graph", self._cuda.cuGraphInstantiate(graph, 0))
        finally:
            self._cuda.cuGraphDestroy(graph)  # an error of its own would hide the first one

    def load(self, ptx: bytes) -> Any:  # noqa: ANN401
        """Compile kernels for this GPU, which the process keeps."""
        return self._ask("loading kernels", self._cuda.cuModuleLoadData(ptx + b"\0"))

    def function(self, module: Any, name: str) -> Any:  # noqa: ANN401
        """Return a kernel by its name."""
        return self._ask(f"looking for the kernel {name}", self._cuda.cuModuleGetFunction(module, name.encode()))

    def run_kernel(self, function: Any, blocks: int, threads: int, values: Sequence[Any]) -> None:  # noqa: ANN401
        """Enqueue a kernel with these parameters, numbers of `ctypes`; they are read before this returns."""
        places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        found, stream = ctypes.addressof(places), self.stream
        self._enqueued = True
        launched = self._cuda.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, found, 0)
        self._ask("launching a kernel", launched)

    def launch(self, graph: Any) -> None:  # noqa: ANN401
        """Enqueue a recorded graph."""
        self._enqueued = True
        self._ask("launching a CUDA graph", self._cuda.cuGraphLaunch(graph, self.stream))

    def _copy_rows(self, what: str, target: _Rows, source: _Rows, shape: tuple[int, ...]) -> None:
        rows, width = shape
        if not rows * width:
            return
        cuda, copy = self._cuda, self._cuda.CUDA_MEMCPY2D()
        host, device = cuda.CUmemorytype.CU_MEMORYTYPE_HOST, cuda.CUmemorytype.CU_MEMORYTYPE_DEVICE
        for side, place in (("src", source), ("dst", target)):
            setattr(copy, f"{side}MemoryType", host if place.on_host else device)
            address = place.address if place.on_host else cuda.CUdeviceptr(place.address)
            setattr(copy, f"{side}Host" if place.on_host else f"{side}Device", address)
            setattr(copy, f"{side}Pitch", place.pitch)
        copy.WidthInBytes, copy.Height = width, rows
        self._enqueued = True
        self._ask(what, cuda.cuMemcpy2DAsync(copy, self.stream))

    def _collect_garbage(self, wanted: bool) -> None:
        """Switch Python's garbage collector off, or on again where this device has switched it off."""
        if not wanted and gc.isenabled():
            self._keeps_garbage = True
            gc.disable()
        elif wanted and self._keeps_garbage:
            gc.enable()
            self._keeps_garbage = False

    def _drop_capture(self) -> None:
        """End a capture that did not come to its end. What it recorded is dropped."""
        cuda = self._cuda
        error, graph = cuda.cuStreamEndCapture(self.stream)  # any error here would hide the one that is being raised
        if error == cuda.CUresult.CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD:
            self._failure = self._failure or "a capture was interrupted, and its thread has not ended it"
        if error == cuda.CUresult.CUDA_SUCCESS:
            cuda.cuGraphDestroy(graph)
        self._capturing = False

    def _return(self, things: Iterable[tuple[str, Any]]) -> None:
        """Free things, each named by the call that frees it, now or when the operation that runs has ended."""
        if os.getpid() != self._process or self._failure is not None:
            return
        self._returned.extend(things)
        # A finalizer must not wait for the lock where its own thread may hold it.
        if not self._lock.locked():
            with self._lock:
                if not self._enqueued and not self._capturing:
                    self._cuda.cuCtxSetCurrent(self._context)
                    self._free_returned()

    def _free_returned(self) -> None:
        while self._returned and self._failure is None:
            call, handle = self._returned.popleft()
            try:
                self._ask("giving memory back", getattr(self._cuda, call)(handle))
            except BackendError:  # the others are freed all the same; if it is sticky, the next operation reports it
                continue

    def _ask(self, what: str, answer: tuple[Any, ...]) -> Any:  # noqa: ANN401
        """The result of a CUDA call, which comes as (error, result)."""
        error, *results = answer
        if error == self._cuda.CUresult.CUDA_SUCCESS:
            return results[0] if results else None
        _, text = self._cuda.cuGetErrorString(error)
        words = f"CUDA failed while {what}: {text.decode(errors='replace') if text else error}"
        if error in [getattr(self._cuda.CUresult, name) for name in _STICKY]:
            self._failure = self._failure or words
        raise BackendError(words)
