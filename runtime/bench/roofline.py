"""The roofline of a decode step: the memory traffic that it needs, and the bandwidth of the memory that it runs on.

Traffic is computed from the manifest and the contract. Bandwidths are measured in GB/s (1e9 bytes), the best of several
rounds over arrays far larger than the caches: a processor's by a triad and by reading, a GPU's by copies within its
memory.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.contract import Flavour
from lrt_deploy.bundle.manifest import Manifest, weights_path
from lrt_deploy.bundle.precisions import ITEM_BYTES, base_dtype
from lrt_deploy.bundle.weights import EMBEDDING_TABLES, matrix_shapes, weight_sources
from lrt_deploy.config import LRTConfig
from lrt_deploy.runtime.backends.cuda import Arena, CudaDevice


def weight_bytes_per_step(manifest: Manifest, precision: str, flavour: Flavour = "windowed") -> int:
    """Bytes of weights that one decode step with head reads: every matrix once, and one row of each embedding table.

    The same for every batch size. Lambdas, scales of int8 activations and rows of the rotary tables are not counted:
    they are few or in a cache.
    """
    sources = weight_sources(manifest.model)
    columns = sum(width for name in EMBEDDING_TABLES if name in sources for _, width in sources[name].shapes)
    return matrix_bytes(manifest, precision, flavour) + _table_item_bytes(manifest, precision) * columns


def matrix_bytes(manifest: Manifest, precision: str, flavour: Flavour) -> int:
    """Bytes of all matrices as the products of a flavour read them, scales included; there are no zero points.

    Integers are read as they are stored. Scales and matrices that are not quantized are cast to the flavour's base type
    when weights are loaded, or to float32 where the manifest says so. A test compares the result with the graphs.
    """
    details = manifest.precision_details.get(precision, {})
    wide, kept = details.get("multiplied_in_float32", ()), details.get("keep_high", ())
    base, bits, block = ITEM_BYTES[base_dtype(precision, flavour)], details.get("bits"), details.get("block")
    total = 0
    for name, (rows, columns) in matrix_shapes(manifest.model).items():
        if bits is None or name in kept:
            total += rows * columns * (4 if name in wide else base)
        else:
            blocks = -(-rows // block) if block else 1  # the last one is stored whole, filled with zeros
            total += (blocks * block if block else rows) * columns * bits // 8 + blocks * columns * base
    return total


def _table_item_bytes(manifest: Manifest, precision: str) -> int:
    """Bytes of an element of an embedding table: 2, or in fp32 possibly 4, told by the size of the weights file."""
    if precision != "fp32":
        return 2
    if manifest.host_embeddings:
        return max(ITEM_BYTES[table.dtype] for table in manifest.tables[precision].values())
    sources = weight_sources(manifest.model)
    elements = sum(math.prod(shape) for name in EMBEDDING_TABLES if name in sources for shape in sources[name].shapes)
    stored = manifest.files[weights_path(precision)].bytes
    return 4 if stored >= matrix_bytes(manifest, precision, "windowed") + 4 * elements else 2


def state_bytes_per_step(config: LRTConfig, context: int, item_bytes: int = 4) -> int:
    """Bytes of one sequence's state that a step reads after `context` tokens: live windows of K and V, and the latent.

    The token's own key and value are not counted: they are in the processor's cache when they are read.
    """
    live = sum(min(context, window) for window in config.windows)
    latent = config.n_embd if config.memory else 0
    return item_bytes * (2 * live * config.kv_dim + latent)


def state_bytes_written_per_step(config: LRTConfig, item_bytes: int = 4) -> int:
    """Bytes that a step writes to one sequence's state: a key and a value in each layer's cache, and the latent."""
    latent = config.n_embd if config.memory else 0
    return item_bytes * (2 * config.n_layer * config.kv_dim + latent)


def state_bytes_copied_per_step(config: LRTConfig, context: int, item_bytes: int = 4) -> int:
    """Bytes of one sequence's state that a step copies: all caches that the contract does not update in place.

    By the contract these are none. The latent is not updated in place, but it is written to a second buffer that
    changes places with the first, not copied. A test measures that the backends keep to the contract.
    """
    copied = [pair for pair in contract.state_pairs(config) if not pair.in_place and pair.past != "past_latent"]
    return len(copied) * item_bytes * context * config.kv_dim


def latent_record_bytes_per_step(config: LRTConfig) -> int:
    """Bytes of the record of latents that a step appends for rewinding, in float32 whatever the precision."""
    return 4 * config.n_embd if config.memory else 0


_ROUNDS = 5
_TRIAD_BLOCK = 2**14  # float64: the intermediate product stays in the fastest caches
_READ_PARTS = 16  # for each thread, so that a thread that is held up leaves work to the others
_SMALLEST_TRIAD_BYTES, _LARGEST_TRIAD_BYTES = 2**27, 2**29
_SMALLEST_COPY_BYTES = 2**28
_COPIES = 20  # in a round, so that waiting for them is little of it
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Bandwidth:
    """Bandwidth of the memory that weights and state are read from.

    `read_gb_s` is that of reading alone, None where not measured; `of` names the measurement; `cache_bytes` is the size
    of the largest cache in front of that memory, 0 where unknown.
    """

    gb_s: float
    read_gb_s: float | None
    of: str
    cache_bytes: int


def measure(device: CudaDevice | None, threads: int = 1) -> Bandwidth:
    """Measure a GPU, or without `device` the host's memory with `threads` threads. BackendError where CUDA fails."""
    if device is not None:
        return Bandwidth(device_copy_gb_s(device), None, "device-to-device copy", device.cache_bytes())
    name = f"triad, {threads} thread{'s' if threads > 1 else ''}"
    return Bandwidth(triad_gb_s(threads), read_gb_s(threads), name, last_level_cache_bytes() or 0)


def device_copy_gb_s(device: CudaDevice, array_bytes: int | None = None) -> float:
    """Bandwidth of copies within a GPU's memory; bytes read and bytes written both count.

    `array_bytes` defaults to four times the GPU's cache, at least 256 MiB; two such arrays are allocated meanwhile.
    Raises BackendError where they do not fit.
    """
    count = array_bytes or max(4 * device.cache_bytes(), _SMALLEST_COPY_BYTES)
    arena = Arena(device)

    def copies() -> None:
        for _ in range(_COPIES):
            device.copy_within(target, source, count)
        device.synchronize()

    try:
        with device.lock:
            device.begin()
            source, target = arena.allocate(count), arena.allocate(count)
            device.synchronize()
            return 2 * count * _COPIES / _best_seconds(copies) / 1e9
    finally:
        arena.release()


def triad_gb_s(threads: int = 1, array_bytes: int | None = None) -> float:
    """Memory bandwidth of a STREAM triad in numpy: a = b + s * c over arrays far larger than any cache.

    It runs block by block, so that s * c stays in cache, each thread on its own part of the arrays. As in STREAM, 3
    arrays a round are counted; the processor also reads `a` before it overwrites it, so true traffic is up to a third
    higher. `array_bytes` defaults to four times the last-level cache, 128 to 512 MiB.
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
        return 3 * count * 8 / _best_seconds(lambda: list(pool.map(_triad, parts))) / 1e9


def read_gb_s(threads: int = 1, array_bytes: int | None = None) -> float:
    """Memory bandwidth of reading alone, as a decode step does: dot products over one array."""
    values = np.ones((array_bytes or _LARGEST_TRIAD_BYTES) // 4, np.float32)
    parts = np.array_split(values, threads * _READ_PARTS)
    with ThreadPoolExecutor(threads) as pool:
        return values.nbytes / _best_seconds(lambda: list(pool.map(lambda part: np.dot(part, part), parts))) / 1e9


def _best_seconds(act: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _triad(arrays: list[npt.NDArray[np.float64]]) -> None:
    a, b, c = arrays
    product = np.empty(_TRIAD_BLOCK)
    for low in range(0, len(a), _TRIAD_BLOCK):
        part = slice(low, min(low + _TRIAD_BLOCK, len(a)))
        scaled = np.multiply(c[part], 3.0, out=product[: part.stop - low])
        np.add(b[part], scaled, out=a[part])


def last_level_cache_bytes() -> int | None:
    """Size of the largest cache of the first core; None where the system does not report it."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [path.read_text().strip() for path in _CPU_CACHES.glob("index*/size")] if _CPU_CACHES.is_dir() else []
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=None)
