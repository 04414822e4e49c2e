"""How fast memory is where a decoder computes: the processor's by a triad and by reading, a GPU's by copies within it.

Each is the best of several rounds, in GB/s (1e9 bytes), over arrays far larger than the caches before that memory.
Measures nothing of a model; `traffic` says how many bytes a step moves.
"""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lrt_deploy.runtime.backends.cuda import Arena, Device

_ROUNDS = 5
_TRIAD_BLOCK = 2**14  # float64: the intermediate product stays in the fastest caches
_READ_PARTS = 16  # for each thread, so that a thread that is held up leaves work to the others
_SMALLEST_TRIAD_BYTES, _LARGEST_TRIAD_BYTES = 2**27, 2**29
_SMALLEST_COPY_BYTES = 2**28
_COPIES = 20  # in a round, so that waiting for them is little of it
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Bandwidth:
    """Of the memory that weights and state are read from."""

    gb_s: float
    read_gb_s: float | None  # reading alone; None: not measured
    of: str  # what moved, for people
    cache_bytes: int  # of the largest cache before that memory; 0: unknown


def measure(device: Device | None, threads: int = 1) -> Bandwidth:
    """Of a GPU, or (None) of this machine's own memory with so many threads. Raises BackendError where CUDA fails."""
    if device is not None:
        return Bandwidth(device_copy_gb_s(device), None, "device-to-device copy", device.cache_bytes())
    name = f"triad, {threads} thread{'s' if threads > 1 else ''}"
    return Bandwidth(triad_gb_s(threads), read_gb_s(threads), name, last_level_cache_bytes() or 0)


def device_copy_gb_s(device: Device, array_bytes: int | None = None) -> float:
    """Copies from one place in a GPU's memory to another; what is read and what is written both count.

    `array_bytes` None: four times the GPU's cache, at least 256 MiB, twice allocated meanwhile. Raises BackendError
    where there is no room for that.
    """
    count = array_bytes or max(4 * device.cache_bytes(), _SMALLEST_COPY_BYTES)
    arena = Arena(device)
    try:
        source, target = arena.allocate(count), arena.allocate(count)
        seconds = []
        for _ in range(_ROUNDS):
            device.synchronize()
            start = time.perf_counter()
            for _ in range(_COPIES):
                device.copy_within(target, source, count)
            device.synchronize()
            seconds.append(time.perf_counter() - start)
    finally:
        arena.release()
    return 2 * count * _COPIES / min(seconds) / 1e9


def triad_gb_s(threads: int = 1, array_bytes: int | None = None) -> float:
    """Memory bandwidth by a STREAM-like triad in numpy: a = b + s * c over arrays far larger than any cache.

    Block by block, so that s * c stays in cache; counted as STREAM counts, 3 arrays a round (what the processor reads
    before it overwrites a is left out, so true traffic is up to a third higher). The best of several rounds, each
    thread on its own part of the arrays. `array_bytes` None: four times the last-level cache, 128 to 512 MiB.
    """
    if array_bytes is None:
        cache = last_level_cache_bytes() or 0
        array_bytes = min(max(4 * cache, _SMALLEST_TRIAD_BYTES), _LARGEST_TRIAD_BYTES)
    count = array_bytes // 8
    a, b, c = np.zeros(count), np.ones(count), np.ones(count)
    a[:] = 2.0  # commits the pages
    bounds = np.linspace(0, count, threads + 1).astype(int)
    parts = [[array[low:high] for array in (a, b, c)] for low, high in itertools.pairwise(bounds)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            list(pool.map(_triad, parts))
            seconds.append(time.perf_counter() - start)
    return 3 * count * 8 / min(seconds) / 1e9


def read_gb_s(threads: int = 1, array_bytes: int | None = None) -> float:
    """The same of reading alone, which is what a decode step does: dot products over one array. The best of rounds."""
    values = np.ones((array_bytes or _LARGEST_TRIAD_BYTES) // 4, np.float32)
    parts = np.array_split(values, threads * _READ_PARTS)
    with ThreadPoolExecutor(threads) as pool:
        seconds = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), parts))
            seconds.append(time.perf_counter() - start)
    return values.nbytes / min(seconds) / 1e9


def _triad(arrays: list[npt.NDArray[np.float64]]) -> None:
    a, b, c = arrays
    product = np.empty(_TRIAD_BLOCK)
    for low in range(0, len(a), _TRIAD_BLOCK):
        part = slice(low, min(low + _TRIAD_BLOCK, len(a)))
        scaled = np.multiply(c[part], 3.0, out=product[: part.stop - low])
        np.add(b[part], scaled, out=a[part])


def last_level_cache_bytes() -> int | None:
    """Size of the largest cache of the first core, where the system tells it."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [path.read_text().strip() for path in _CPU_CACHES.glob("index*/size")] if _CPU_CACHES.is_dir() else []
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=None)
