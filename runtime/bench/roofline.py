"""The roofline of a decode step: the bytes that it must read, copy and write, and how fast memory is where it runs.

Bandwidths are in GB/s (1e9 bytes), the best of several rounds over arrays far larger than the caches: the processor's
by a triad and by reading, a GPU's by copies within its memory.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lrt_deploy.bundle.contract import Flavour
from lrt_deploy.bundle.manifest import Manifest, weights_path
from lrt_deploy.bundle.precisions import base_dtype, item_bytes
from lrt_deploy.bundle.weights import matrix_shapes, weight_sources
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import BackendError
from lrt_deploy.runtime.backends.base import StateBuffers
from lrt_deploy.runtime.backends.cuda import Arena, Device

if TYPE_CHECKING:
    from lrt_deploy.runtime.state import DecodeState

TABLES = ("wte", "value_embeds")


def matrix_elements(config: LRTConfig) -> int:
    """Elements of all matrices that a step multiplies with.

    q, k, v, attention output, gates and both MLP matrices of each layer, the memory projections, and the head over the
    padded vocabulary. No tables, no scalars per layer (lambdas), no rotary tables.
    """
    sources = weight_sources(config)
    return sum(
        math.prod(shape)
        for name, source in sources.items()
        for shape in source.shapes
        if name not in TABLES and len(shape) > 1
    )


def weight_bytes_per_step(manifest: Manifest, precision: str, flavour: Flavour = "windowed") -> int:
    """Bytes of weights that one decode step with head reads: every matrix once, and one row of each embedding table.

    The same for every batch. Not counted, because they are a few numbers or in a cache: lambdas, scales of int8
    activations, and the rows of the rotary tables.
    """
    sources = weight_sources(manifest.model)
    columns = sum(width for name in TABLES if name in sources for _, width in sources[name].shapes)
    return matrix_bytes(manifest, precision, flavour) + _table_item_bytes(manifest, precision) * columns


def matrix_bytes(manifest: Manifest, precision: str, flavour: Flavour) -> int:
    """Bytes of all matrices as a flavour's products read them, scales included; there are no zero points.

    Integers are read as they are stored. Scales and matrices that are not quantized are widened to the flavour's base
    type when weights are loaded, or to float32 where the manifest says so. Held against the graphs by a test.
    """
    details = manifest.precision_details.get(precision, {})
    wide, kept = details.get("multiplied_in_float32", ()), details.get("keep_high", ())
    base, bits, block = item_bytes(base_dtype(precision, flavour)), details.get("bits"), details.get("block")
    total = 0
    for name, (rows, columns) in matrix_shapes(manifest.model).items():
        if bits is None or name in kept:
            total += rows * columns * (4 if name in wide else base)
        else:
            blocks = -(-rows // block) if block else 1  # the last one is stored whole, filled with zeros
            total += (blocks * block if block else rows) * columns * bits // 8 + blocks * columns * base
    return total


def _table_item_bytes(manifest: Manifest, precision: str) -> int:
    """Of a table element: 2, or in fp32 the 4 bytes in which it may have been trained, told by the size of the file."""
    if precision != "fp32":
        return 2
    if manifest.host_embeddings:
        return max(item_bytes(table.dtype) for table in manifest.tables[precision].values())
    sources = weight_sources(manifest.model)
    elements = sum(math.prod(shape) for name in TABLES if name in sources for shape in sources[name].shapes)
    stored = manifest.files[weights_path(precision)].bytes
    return 4 if stored >= matrix_bytes(manifest, precision, "windowed") + 4 * elements else 2


def state_bytes_per_step(config: LRTConfig, context: int, item_bytes: int = 4) -> int:
    """Bytes of one sequence's state that a step reads on top of `context` tokens: live windows of K and V, the latent.

    The token's own key and value are written and not counted: they are in cache when they are read.
    """
    live = sum(min(context, window) for window in config.windows)
    latent = config.n_embd if config.memory else 0
    return item_bytes * (2 * live * config.kv_dim + latent)


@dataclass(frozen=True)
class Copies:
    """Bytes of state that one step copied. `backend`: between past and present; `kept`: aside, by Python code."""

    backend: int
    kept: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.backend + self.kept


@dataclass(frozen=True)
class Writes:
    """Bytes that one step wrote: the token's cache entries, the new latent, the record of it that a rewind needs."""

    cache: int
    latent: int
    record: int


def count_writes(state: DecodeState, step: Callable[[], object]) -> Writes:
    """Run `step`, which appends one token to each row, and count what it wrote: what was poisoned there and is gone."""
    buffers, rows, lengths = state.buffers, range(state.batch), state.lengths
    record = [state.history.live(row, length + 1)[length:] for row, length in enumerate(lengths)]
    for row, length in zip(rows, lengths, strict=True):
        record[row][...] = np.nan
        entries = buffers.read_slots(row, length, length + 1)
        buffers.write_slots(row, length, {name: np.full_like(array, np.nan) for name, array in entries.items()})
    step()
    written = [array for row in rows for array in buffers.read_slots(row, lengths[row], lengths[row] + 1).values()]
    latent = buffers.latent[: state.batch].size * np.dtype(state.owner.state_dtype).itemsize
    return Writes(_finite_bytes(written), latent, _finite_bytes(record))


def _finite_bytes(arrays: Sequence[npt.NDArray[Any]]) -> int:
    return sum(int(np.isfinite(array.astype(np.float32)).sum()) * array.itemsize for array in arrays)


def count_copies(buffers: StateBuffers, positions: npt.NDArray[np.int64], step: Callable[[], object]) -> Copies:
    """Run `step`, which appends one token at `positions` (B), and count the state that it copies.

    A cache tensor is not copied if it lies afterwards where it lay before and the new token was written there: its slot
    is poisoned beforehand. Otherwise all of it was copied. The latent cannot be written where it is read, so two places
    swap; if it lies afterwards where it lay before, it was copied back. `kept` counts calls of `ndarray.copy` on any of
    this memory. Raises BackendError where the buffers do not show their memory.
    """
    before, latent = _caches(buffers, len(positions)), buffers.latent
    if [a.ctypes.data for a in before] != [a.ctypes.data for a in _caches(buffers, len(positions))]:
        raise BackendError("this backend shows copies of its caches, so that what a step copies cannot be counted")
    slots = np.repeat(positions, len(before) // len(positions))
    for cache, slot in zip(before, slots, strict=True):
        cache[:, slot] = np.nan
    kept = _bytes_copied_in_python([*before, latent], step)
    copied = sum(
        new.nbytes
        for old, new, slot in zip(before, _caches(buffers, len(positions)), slots, strict=True)
        if new.ctypes.data != old.ctypes.data or np.isnan(new[:, slot]).any()
    )
    if latent.size and buffers.latent.ctypes.data == latent.ctypes.data:
        copied += latent.nbytes
    return Copies(copied, kept)


def _caches(buffers: StateBuffers, rows: int) -> list[npt.NDArray[Any]]:
    """Every cache of every row, (G, S, D) each, in its own type: `cache` would widen what is narrower than float32."""
    return [array for row in range(rows) for array in buffers.read_slots(row, 0, buffers.capacity).values()]


def _bytes_copied_in_python(arrays: list[npt.NDArray[Any]], act: Callable[[], object]) -> int:
    """Bytes of these arrays on which `ndarray.copy` is called while `act` runs."""
    ranges = [np.lib.array_utils.byte_bounds(array) for array in arrays if array.size]
    copied = 0

    def see(frame: object, event: str, called: Any) -> None:  # noqa: ANN401 - whatever is called
        nonlocal copied
        owner = getattr(called, "__self__", None) if event == "c_call" and called.__name__ == "copy" else None
        if isinstance(owner, np.ndarray) and any(low <= owner.ctypes.data < high for low, high in ranges):
            copied += owner.nbytes

    sys.setprofile(see)
    try:
        act()
    finally:
        sys.setprofile(None)
    return copied


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
