"""CUDA's driver API in host memory, as strict as a GPU is or stricter: for tests of the code that runs on GPUs.

`FakeDriver` stands in for the module `cuda.bindings.driver`. What a GPU leaves open, it decides at random, and what a
GPU forbids, it refuses:
- work is queued; each call does a random part of what is queued, and only a synchronization does all of it
- new memory holds noise, freed memory too; the pinned target of a copy holds NaN until the copy is really done; a copy
  from pinned memory reads its source when it is done, not when it is asked for
- a thread must have made the context current; a forked child may call nothing
- while a stream captures, work of any thread goes into the graph, and waiting, allocating and freeing break the capture
  when the capturing thread does it; a capture is ended by the thread that began it
- after a fault every call fails with the same error
`before` and `after` are called with the name of each call: tests raise an interrupt there. `fail` makes a call fail.
Kernels are those of `host_kernels`, compiled by g++.
With `eager` everything is done at once, as ONNX Runtime on the host does it. Numbers of errors are CUDA's.
"""

# ruff: noqa: N802 - the names are CUDA's

from __future__ import annotations

import bisect
import ctypes
import functools
import os
import random
import threading
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace

import numpy as np


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_ECC_UNCORRECTABLE = 214
    CUDA_ERROR_INVALID_PTX = 218
    CUDA_ERROR_ILLEGAL_STATE = 401
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_LAUNCH_TIMEOUT = 702
    CUDA_ERROR_CONTEXT_IS_DESTROYED = 709
    CUDA_ERROR_ASSERT = 710
    CUDA_ERROR_HARDWARE_STACK_ERROR = 714
    CUDA_ERROR_ILLEGAL_INSTRUCTION = 715
    CUDA_ERROR_MISALIGNED_ADDRESS = 716
    CUDA_ERROR_INVALID_ADDRESS_SPACE = 717
    CUDA_ERROR_INVALID_PC = 718
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901
    CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD = 908
    CUDA_ERROR_UNKNOWN = 999


OK = CUresult.CUDA_SUCCESS
POISON = 0xFF  # four or two of them are NaN
STREAM = 7


class FaultError(Exception):
    """Work that touches memory that is not there."""


@dataclass
class Work:
    """One thing on the stream, and the pinned memory that it writes."""

    run: object
    target: np.ndarray | None = None


@dataclass
class Capture:
    thread: int
    works: list = field(default_factory=list)
    broken: bool = False


def call(context=True, safe=True):
    """One function of the driver. One that is not `safe` breaks a capture of its own thread."""

    def wrap(function):
        name = function.__name__

        @functools.wraps(function)
        def wrapped(self, *arguments):
            with self.mutex:
                self.before(name)
                answer = self.refusal(name, context, safe) or function(self, *arguments)
                self.run(len(self.queue) if self.eager else self.some())
            self.after(name)
            return answer if isinstance(answer, tuple) else (answer,)

        return wrapped

    return wrap


class Event:
    marks = happened = 0

    def happen(self):
        self.happened += 1


class FakeDriver:
    library = None  # returns the `HostKernels` that are taken where a test sets no others
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUresult = CUresult
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_HOST=1, CU_MEMORYTYPE_DEVICE=2)
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE=38)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUdeviceptr = int
    CUDA_MEMCPY2D = SimpleNamespace

    def __init__(self, seed=0, eager=False, memory_bytes=2**32):
        self.random, self.eager, self.memory_bytes = random.Random(seed), eager, memory_bytes  # noqa: S311
        self.mutex, self.process, self.current = threading.RLock(), os.getpid(), threading.local()
        self.memory, self.pinned, self.buried = {}, {}, []  # blocks by address; freed blocks stay, full of noise
        self.events = []
        self.queue, self.capture, self.templates, self.graphs = [], None, [], []
        self.sticky, self.failures = None, {}
        self.before = self.after = lambda name: None
        self.cache, self.launches, self.copies, self.copied_within = 2**14, 0, [], 0
        self.kernels = None  # `HostKernels`; the shipped ones by default
        self.violations = []  # what no GPU would notice at once

    # What tests and the fake engine ask of it

    def fail(self, name, error=CUresult.CUDA_ERROR_LAUNCH_FAILED, after=0):
        """Let a function fail once, after so many calls of it."""
        self.failures[name] = [error, after]

    def at(self, address, size):
        """The bytes at an address of the device, which must lie inside one allocation."""
        found = inside(self.memory, address, size)
        if found is None:
            raise FaultError(f"{size} bytes at {address} are not allocated")
        return found

    def enqueue(self, work):
        """Work of a library on the stream; False where CUDA would fail."""
        with self.mutex:
            return self.refusal("a library's work", True, True) is None and self.push(Work(work)) == OK

    # How it goes about it

    def refusal(self, name, context, safe):
        if os.getpid() != self.process:
            return CUresult.CUDA_ERROR_NOT_INITIALIZED, None
        if context and getattr(self.current, "context", None) is None:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        if self.sticky is not None and context:
            return self.sticky, None
        if name in self.failures:
            error, left = self.failures[name]
            if left == 0:
                del self.failures[name]
                if CUresult.CUDA_ERROR_ILLEGAL_ADDRESS <= error < CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED:
                    self.sticky = error
                return error, None
            self.failures[name][1] -= 1
        if not safe and self.capture is not None and self.capture.thread == threading.get_ident():
            self.capture.broken = True
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, None
        return None

    def push(self, work):
        if self.capture is None:
            self.poison(work)
            self.queue.append(work)
            if self.eager:
                self.run(len(self.queue))
            return self.sticky or OK
        if self.capture.thread != threading.get_ident():
            self.violations.append("a thread's work went into the graph that another one captures")
        self.capture.works.append(work)
        return CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED if self.capture.broken else OK

    def poison(self, work):
        if work.target is not None:
            work.target[:] = POISON

    def some(self):
        """How much of the queue a call does."""
        return self.random.choice((0, 0, self.random.randint(0, len(self.queue)), len(self.queue)))

    def run(self, count):
        for _ in range(count):
            work = self.queue.pop(0)
            try:
                work.run()
            except FaultError:
                self.sticky = self.sticky or CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
                self.queue.clear()
                return

    def block(self, blocks, size):
        raw = np.frombuffer(self.random.randbytes(256) * (size // 256 + 3), np.uint8).copy()
        start = -raw.ctypes.data % 256
        blocks[raw.ctypes.data + start] = raw[start : start + size]
        return raw.ctypes.data + start

    def drop(self, blocks, address):
        self.run(len(self.queue))  # freeing waits for the device
        if address not in blocks:
            self.violations.append(f"{address} was freed and is not allocated")
            return CUresult.CUDA_ERROR_INVALID_VALUE
        self.buried.append(blocks.pop(address))
        self.buried[-1][:] = POISON
        if len(self.buried) > 64:
            del self.buried[0]
        return self.sticky or OK

    # The driver's functions

    @call(context=False)
    def cuInit(self, flags):
        return OK

    @call(context=False)
    def cuCtxGetDevice(self):
        return (OK, 0) if getattr(self.current, "context", None) else (CUresult.CUDA_ERROR_INVALID_CONTEXT, None)

    @call(context=False)
    def cuDeviceGet(self, number):
        return OK, number

    @call(context=False)
    def cuDevicePrimaryCtxRetain(self, device):
        return OK, "the primary context"

    @call(context=False)
    def cuCtxSetCurrent(self, context):
        self.current.context = context
        return OK

    def cuGetErrorString(self, error):
        return OK, CUresult(error).name.removeprefix("CUDA_ERROR_").replace("_", " ").lower().encode()

    @call()
    def cuDeviceGetAttribute(self, attribute, device):
        return OK, {38: self.cache}[attribute]

    @call()
    def cuStreamCreate(self, flags):
        return OK, STREAM

    @call(safe=False)
    def cuMemAlloc(self, size):
        if sum(block.size for block in self.memory.values()) + size > self.memory_bytes:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        return OK, self.block(self.memory, size)

    @call(safe=False)
    def cuMemHostAlloc(self, size, flags):
        return OK, self.block(self.pinned, size)

    @call(safe=False)
    def cuMemFree(self, address):
        return self.drop(self.memory, address)

    @call(safe=False)
    def cuMemFreeHost(self, address):
        return self.drop(self.pinned, address)

    @call()
    def cuMemsetD8Async(self, address, value, size, stream):
        return self.push(Work(lambda: self.at(address, size).fill(value)))

    @call()
    def cuMemcpyHtoDAsync(self, address, source, size, stream):
        return self.copy_in(address, source, size)

    @call()
    def cuMemcpyDtoHAsync(self, target, address, size, stream):
        return self.copy_out(target, address, size)

    @call()
    def cuMemcpyDtoDAsync(self, target, source, size, stream):
        return self.copy_within(target, source, size)

    @call()
    def cuMemcpy2DAsync(self, copy, stream):
        host = self.CUmemorytype.CU_MEMORYTYPE_HOST
        for row in range(copy.Height):
            source = copy.srcHost if copy.srcMemoryType == host else copy.srcDevice
            target = copy.dstHost if copy.dstMemoryType == host else copy.dstDevice
            ends = target + row * copy.dstPitch, source + row * copy.srcPitch, copy.WidthInBytes
            do = {(1, 2): self.copy_in, (2, 1): self.copy_out, (2, 2): self.copy_within}
            if error := do[copy.srcMemoryType, copy.dstMemoryType](*ends):
                return error
        return OK

    @call()
    def cuStreamSynchronize(self, stream):
        if self.capture is not None:
            self.capture.broken = True
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        self.run(len(self.queue))
        return self.sticky or OK

    @call()
    def cuStreamBeginCapture(self, stream, mode):
        if self.capture is not None:
            return CUresult.CUDA_ERROR_ILLEGAL_STATE
        self.capture = Capture(threading.get_ident())
        return OK

    @call()
    def cuStreamEndCapture(self, stream):
        if self.capture is None:
            return CUresult.CUDA_ERROR_ILLEGAL_STATE, None
        if self.capture.thread != threading.get_ident():
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, None
        capture, self.capture = self.capture, None
        if capture.broken:
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        self.templates.append(capture.works)
        return OK, capture.works

    @call()
    def cuGraphInstantiate(self, graph, flags):
        self.graphs.append(list(graph))
        return OK, self.graphs[-1]

    @call(safe=False)
    def cuGraphDestroy(self, graph):
        return remove(self.templates, graph, self.violations)

    @call(safe=False)
    def cuGraphExecDestroy(self, graph):
        return remove(self.graphs, graph, self.violations)

    @call()
    def cuEventCreate(self, flags):
        self.events.append(Event())
        return OK, self.events[-1]

    @call()
    def cuEventRecord(self, event, stream):
        if event not in self.events or stream != STREAM or self.capture is not None:
            return CUresult.CUDA_ERROR_INVALID_VALUE
        event.marks += 1
        return self.push(Work(lambda: event.happen()))

    @call()
    def cuEventSynchronize(self, event):
        if event not in self.events or not event.marks:
            return CUresult.CUDA_ERROR_INVALID_VALUE
        if self.capture is not None:
            self.capture.broken = True
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        while event.happened < event.marks and self.queue:
            self.run(1)
        return self.sticky or OK

    @call(safe=False)
    def cuEventDestroy(self, event):
        return remove(self.events, event, self.violations)

    @call(safe=False)
    def cuModuleLoadData(self, data):
        self.kernels = self.kernels or FakeDriver.library()
        if not self.kernels.load(data):
            return CUresult.CUDA_ERROR_INVALID_PTX, None
        return OK, "the module"

    @call()
    def cuModuleGetFunction(self, module, name):
        if module != "the module" or name.decode() not in self.kernels.parameters:
            return CUresult.CUDA_ERROR_NOT_FOUND, None
        return OK, name.decode()

    @call()
    def cuLaunchKernel(self, function, *rest):
        *size, shared, stream, places, extra = rest
        blocks, threads = size[0], size[3]
        if stream != STREAM or shared or extra or (size[1:3], size[4:]) != ([1, 1], [1, 1]):
            return CUresult.CUDA_ERROR_INVALID_VALUE
        if not 0 < blocks < 2**31 or not 0 < threads <= 1024:
            return CUresult.CUDA_ERROR_INVALID_VALUE
        addresses, values = self.kernels.bind(function, places)

        def work():
            for address in addresses:
                if address:
                    self.at(address, 1)
            self.kernels.run(function, blocks, threads, values, self.random.randrange(2**32))

        return self.push(Work(work))

    @call()
    def cuGraphLaunch(self, graph, stream):
        if not any(graph is known for known in self.graphs):
            self.violations.append("a graph was launched that does not exist")
            return CUresult.CUDA_ERROR_INVALID_VALUE
        self.launches += 1
        for work in graph:
            if error := self.push(work):
                return error
        return OK

    # Copies

    def copy_in(self, address, source, size):
        self.copies.append((size, "in"))
        host = inside(self.pinned, source, size)
        if host is not None:
            return self.push(Work(lambda: self.at(address, size).__setitem__(slice(None), host)))
        if self.capture is not None:
            self.capture.broken = True
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        taken = ctypes.string_at(source, size)  # memory that is not pinned is read before the call returns
        return self.push(Work(lambda: self.at(address, size).__setitem__(slice(None), np.frombuffer(taken, np.uint8))))

    def copy_out(self, target, address, size):
        self.copies.append((size, "out"))
        host = inside(self.pinned, target, size)
        if host is not None:
            return self.push(Work(lambda: host.__setitem__(slice(None), self.at(address, size)), host))
        if self.capture is not None:
            self.capture.broken = True
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        self.run(len(self.queue))  # and written before it returns
        try:
            ctypes.memmove(target, self.at(address, size).ctypes.data, size)
        except FaultError:
            self.sticky = self.sticky or CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
        return self.sticky or OK

    def copy_within(self, target, source, size):
        def work():
            self.at(target, size)[:] = self.at(source, size)
            self.copied_within += size

        self.copies.append((size, "within"))
        return self.push(Work(work))


def inside(blocks, address, size):
    """The part of a block at an address; None where no block holds all of it."""
    starts = sorted(blocks)
    index = bisect.bisect_right(starts, address) - 1
    if index < 0 or address + size > starts[index] + blocks[starts[index]].size:
        return None
    return blocks[starts[index]][address - starts[index] :][:size]


def remove(known, graph, violations):
    """Drop one of the graphs that are known, by identity."""
    for index, one in enumerate(known):
        if one is graph:
            del known[index]
            return OK
    violations.append("a graph was given back that does not exist")
    return CUresult.CUDA_ERROR_INVALID_VALUE
