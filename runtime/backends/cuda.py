"""One GPU as the runtime uses it: memory by address, one stream, copies, and CUDA graphs.

`Device` is the protocol; tests run the same code on one that computes on the host. Everything is enqueued on the one
stream, in order; nothing has happened before `synchronize`. Addresses are plain integers, as TensorRT takes them.
Knows neither tensors nor TensorRT.
"""

from __future__ import annotations

import ctypes
import importlib
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lrt_deploy.errors import BackendError

Array = NDArray[Any]


class Device(Protocol):
    """Memory and a stream."""

    stream: int

    def allocate(self, count_bytes: int) -> int:
        """Address of zeroed device memory, aligned to 256 bytes."""

    def free(self, address: int) -> None:
        """Give memory back."""

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A zeroed host array that copies may use while the host goes on; freed with its last view."""

    def copy_in(self, address: int, array: Array) -> None:
        """Enqueue a copy of a contiguous host array to the device."""

    def copy_out(self, array: Array, address: int) -> None:
        """Enqueue a copy from the device into a contiguous host array."""

    def copy_rows_in(self, address: int, pitch: int, array: Array) -> None:
        """Enqueue a copy of each row of a contiguous array (rows, bytes) to addresses that are `pitch` apart."""

    def copy_rows_out(self, array: Array, address: int, pitch: int) -> None:
        """Enqueue the reverse of `copy_rows_in`."""

    def copy_within(self, target: int, source: int, count_bytes: int) -> None:
        """Enqueue a copy from one address on the device to another."""

    def cache_bytes(self) -> int:
        """Size of the last cache before the device's memory; 0 where it does not say."""

    def synchronize(self) -> None:
        """Wait until everything enqueued has happened."""

    def capture(self, enqueue: Callable[[], None]) -> Any:  # noqa: ANN401 - an opaque handle
        """Record what `enqueue` enqueues, without running it, as a graph."""

    def launch(self, graph: Any) -> None:  # noqa: ANN401
        """Enqueue a recorded graph."""

    def forget(self, graph: Any) -> None:  # noqa: ANN401
        """Give a recorded graph back."""


class Arena:
    """Device memory and graphs that belong together, given back at once."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._addresses: list[int] = []
        self._graphs: list[Any] = []

    def allocate(self, count_bytes: int) -> int:
        """See `Device`."""
        self._addresses.append(self.device.allocate(count_bytes))
        return self._addresses[-1]

    def capture(self, enqueue: Callable[[], None]) -> Any:  # noqa: ANN401
        """See `Device`."""
        self._graphs.append(self.device.capture(enqueue))
        return self._graphs[-1]

    def release(self) -> None:
        """Give everything back, graphs first."""
        while self._graphs:
            self.device.forget(self._graphs.pop())
        while self._addresses:
            self.device.free(self._addresses.pop())


class CudaDevice:
    """The current CUDA device, through `cuda.bindings`; see `Device`."""

    def __init__(self) -> None:
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.runtime")
        except ModuleNotFoundError as error:
            raise BackendError(f"{error.name} is not installed; pip install cuda-bindings") from error
        stream = self._ask("creating a stream", self._cuda.cudaStreamCreateWithFlags(self._cuda.cudaStreamNonBlocking))
        self.stream = int(stream)

    def allocate(self, count_bytes: int) -> int:
        """See `Device`."""
        address = int(self._ask(f"allocating {count_bytes} bytes", self._cuda.cudaMalloc(count_bytes)))
        self._ask("zeroing memory", self._cuda.cudaMemsetAsync(address, 0, count_bytes, self.stream))
        return address

    def free(self, address: int) -> None:
        """See `Device`."""
        self._ask("freeing memory", self._cuda.cudaFree(address))

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """See `Device`."""
        count_bytes = max(1, int(np.prod(shape)) * dtype.itemsize)
        flags = self._cuda.cudaHostAllocDefault
        address = int(self._ask("pinning host memory", self._cuda.cudaHostAlloc(count_bytes, flags)))
        buffer = (ctypes.c_byte * count_bytes).from_address(address)
        weakref.finalize(buffer, self._cuda.cudaFreeHost, address).atexit = False  # the array's base keeps it alive
        array: Array = np.frombuffer(memoryview(buffer).cast("B"), np.uint8)[
            : int(np.prod(shape)) * dtype.itemsize
        ].view(dtype)
        array = array.reshape(shape)
        array[...] = 0
        return array

    def copy_in(self, address: int, array: Array) -> None:
        """See `Device`."""
        self._copy(address, array.ctypes.data, array.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def copy_out(self, array: Array, address: int) -> None:
        """See `Device`."""
        self._copy(array.ctypes.data, address, array.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def copy_rows_in(self, address: int, pitch: int, array: Array) -> None:
        """See `Device`."""
        rows, width = array.shape
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        copied = self._cuda.cudaMemcpy2DAsync(address, pitch, array.ctypes.data, width, width, rows, kind, self.stream)
        self._ask("copying rows to the GPU", copied)

    def copy_rows_out(self, array: Array, address: int, pitch: int) -> None:
        """See `Device`."""
        rows, width = array.shape
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        copied = self._cuda.cudaMemcpy2DAsync(array.ctypes.data, width, address, pitch, width, rows, kind, self.stream)
        self._ask("copying rows from the GPU", copied)

    def copy_within(self, target: int, source: int, count_bytes: int) -> None:
        """See `Device`."""
        self._copy(target, source, count_bytes, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def cache_bytes(self) -> int:
        """See `Device`."""
        device, attribute = self._ask("finding the device", self._cuda.cudaGetDevice()), self._cuda.cudaDeviceAttr
        answer = self._cuda.cudaDeviceGetAttribute(attribute.cudaDevAttrL2CacheSize, device)
        return int(self._ask("asking for the size of its cache", answer))

    def synchronize(self) -> None:
        """See `Device`."""
        self._ask("running on the GPU", self._cuda.cudaStreamSynchronize(self.stream))

    def capture(self, enqueue: Callable[[], None]) -> Any:  # noqa: ANN401
        """See `Device`."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._ask("starting a capture", self._cuda.cudaStreamBeginCapture(self.stream, mode))
        try:
            enqueue()
        finally:  # also after an error: the stream must not stay in capture
            ended = self._cuda.cudaStreamEndCapture(self.stream)
        graph = self._ask("capturing a CUDA graph", ended)
        made = self._ask("instantiating a CUDA graph", self._cuda.cudaGraphInstantiate(graph, 0))
        self._ask("dropping a template", self._cuda.cudaGraphDestroy(graph))
        return made

    def launch(self, graph: Any) -> None:  # noqa: ANN401
        """See `Device`."""
        self._ask("launching a CUDA graph", self._cuda.cudaGraphLaunch(graph, self.stream))

    def forget(self, graph: Any) -> None:  # noqa: ANN401
        """See `Device`."""
        self._ask("dropping a CUDA graph", self._cuda.cudaGraphExecDestroy(graph))

    def _copy(self, target: int, source: int, count_bytes: int, kind: Any) -> None:  # noqa: ANN401
        if count_bytes:
            copied = self._cuda.cudaMemcpyAsync(target, source, count_bytes, kind, self.stream)
            self._ask(f"copying {count_bytes} bytes", copied)

    def _ask(self, what: str, answer: tuple[Any, ...]) -> Any:  # noqa: ANN401
        """The result of a CUDA call, which comes as (error, result)."""
        error, *results = answer
        if error != self._cuda.cudaError_t.cudaSuccess:
            text = self._cuda.cudaGetErrorString(error)[1].decode(errors="replace")
            raise BackendError(f"CUDA failed while {what}: {text}")
        return results[0] if results else None
