"""Measure a decoder: decode steps, prefill policies side by side, the convergence of the iteration, and the roofline.

Measurements that are compared run in alternating rounds, so that a busy machine slows all of them alike; only ratios
within one run are meaningful. The roofline of a decode step is the memory traffic that it needs, computed from the
manifest and the contract, over the bandwidth of the memory that it runs on. Bandwidths are in GB/s (1e9 bytes), the
best of several rounds over arrays far larger than the caches: a processor's by a triad and by reading, a GPU's by
copies within its memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.contract import Flavour
from lrt_deploy.bundle.manifest import Manifest, weights_path
from lrt_deploy.bundle.precisions import BACKENDS, ITEM_BYTES, base_dtype
from lrt_deploy.bundle.weights import EMBEDDING_TABLES, matrix_shapes, weight_sources
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import InputError
from lrt_deploy.evaluation.rollout import Progress, distance, kl_divergence
from lrt_deploy.runtime.backends.cuda import Arena, CudaDevice
from lrt_deploy.runtime.decoder import Decoder
from lrt_deploy.runtime.fixed_point import JACOBI, SweepOptions, Sweeps, finish
from lrt_deploy.runtime.prefill import PrefillRequest, policy_of
from lrt_deploy.runtime.state import DecodeState
from lrt_deploy.tolerances import SMALLEST_PREFILL_TOLERANCE
from lrt_deploy.types import FloatArray, IntArray, PrefillPolicy, PrefillReport

_WARM_UP_TOKENS = 4
_WATCHED_STEPS = 32
_MOST_SWEEPS = 16
_P99_SAMPLES = 100


@contextlib.contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Append the seconds that the block takes, with the garbage collector disabled."""
    collecting = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    try:
        yield
        seconds.append(time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()


def random_tokens(count: int, vocab_size: int, seed: int) -> list[int]:
    """Random token ids, the same for the same seed; a longer list begins with the shorter one."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab_size, count)]


def measure_decode(
    decoder: Decoder, prompt: Sequence[int], new_tokens: int, repeats: int, tolerance: float | None, progress: Progress
) -> dict[str, Any]:
    """Time greedy decoding of one sequence, `repeats` times after a warm-up; stop tokens are ignored.

    Returns the JSON fields: times in ms, `first_ttft_ms` of the very first prompt, in which memory is committed and
    kernels run for the first time; the share of a step outside of the backend (checks, bookkeeping, copies of logits);
    and the memory traffic of a step with the mean number of tokens in the state. Raises InputError for counts too small
    to measure and for more tokens than the capacity.
    """
    if not (prompt and new_tokens >= 2 and repeats >= 1):
        raise InputError("decoding is measured over at least 1 prompt token, 2 new tokens and 1 repeat")
    if len(prompt) + new_tokens > decoder.max_seq_len:
        raise InputError(
            f"{len(prompt)} prompt tokens and {new_tokens} new ones do not fit the capacity of {decoder.max_seq_len}"
        )
    progress("decoding: warm-up", 0, repeats)
    warm_up = _decode_once(decoder, prompt, min(new_tokens, _WARM_UP_TOKENS), tolerance)
    first: list[float] = []
    following: list[float] = []
    for repeat in range(repeats):
        times = _decode_once(decoder, prompt, new_tokens, tolerance)
        progress("decoding", repeat + 1, repeats)
        first.append(times[0])
        following += times[1:]
    state = decoder.prefill([prompt], tolerance=tolerance)
    outside = outside_backend(decoder, state, min(new_tokens, _WATCHED_STEPS))
    flavour, tpot = BACKENDS[decoder.backend].flavour, percentiles(following)
    item = ITEM_BYTES[base_dtype(decoder.precision, flavour)]
    fields = {
        "first_ttft_ms": warm_up[0],
        "ttft_ms": percentiles(first),
        "tpot_ms": tpot,
        "samples": {"ttft_ms": len(first), "tpot_ms": len(following)},
        "tokens_per_s": 1e3 / float(tpot["p50"] or 0),
        "outside_backend_fraction": outside,
        "weight_bytes_per_step": weight_bytes_per_step(decoder.manifest, decoder.precision, flavour),
        # Written by the graph, from a GPU fetched, kept with the state, copied once more for whoever called the step.
        "logits_bytes_written_per_step": (3 if decoder.device is None else 4) * 4 * decoder.config.vocab_size,
        "state_bytes_copied_note": state.buffers.copies_note,
        **state_bytes_per_step(decoder.config, len(prompt) + new_tokens // 2, item),
    }
    return fields | ({"state_bytes_copied_per_step": None} if state.buffers.copies_note else {})


def percentiles(values: list[float]) -> dict[str, float | None]:
    """Return median and 99th percentile; the latter is None below 100 samples, where it would be the largest."""
    enough = len(values) >= _P99_SAMPLES
    return {"p50": float(np.percentile(values, 50)), "p99": float(np.percentile(values, 99)) if enough else None}


def outside_backend(decoder: Decoder, state: DecodeState, steps: int) -> float:
    """Share of the time of `steps` steps that is spent outside of `StateBuffers.decode`."""
    inside: list[float] = []
    whole: list[float] = []
    run = state.buffers.decode

    def watched(tokens: IntArray, positions: IntArray, head: bool) -> FloatArray | None:
        start = time.perf_counter()
        logits = run(tokens, positions, head)
        inside.append(time.perf_counter() - start)
        return logits

    buffers = vars(state.buffers)
    buffers["decode"] = watched
    try:
        for _ in range(steps):
            with timed(whole):
                decoder.step(state, np.zeros(state.batch, np.int64))
    finally:
        del buffers["decode"]
    return 1 - sum(inside) / sum(whole)


def _decode_once(decoder: Decoder, prompt: Sequence[int], new_tokens: int, tolerance: float | None) -> list[float]:
    """Milliseconds until the first token and for each following one, the choice of the token included."""
    seconds: list[float] = []
    with timed(seconds):
        state = decoder.prefill([prompt], tolerance=tolerance)
        token = int(state.logits[0].argmax())
    for _ in range(new_tokens - 1):
        with timed(seconds):
            token = int(decoder.step(state, [token])[0].argmax())
    return [each * 1e3 for each in seconds]


@dataclass
class PrefillTiming:
    """One way to prefill, over all rounds; errors after the last token, against the stepwise state.

    `sweeps` are the options of an iteration; `max_abs_latent_error` is None for a model without memory.
    """

    policy: PrefillPolicy
    algorithm: str
    sweeps: SweepOptions | None = None
    seconds: list[float] = field(default_factory=list)
    report: PrefillReport | None = None
    max_abs_latent_error: float | None = None
    kl: float = 0.0
    auto: bool = False  # whether the policy `auto` reads this prompt in this way

    def run(self, decoder: Decoder, tokens: Sequence[int], tolerance: float | None) -> DecodeState:
        """Time one prefill; a tolerance applies to iterations only."""
        kept = decoder.prefill_options
        if self.sweeps is not None:
            decoder.prefill_options = dataclasses.replace(kept, sweeps=self.sweeps)
        try:
            with timed(self.seconds):
                return decoder.prefill(
                    [tokens], policy=self.policy, tolerance=tolerance if self.policy == "fixed-point" else None
                )
        finally:
            decoder.prefill_options = kept

    def fields(self, tokens: int, stepwise: PrefillTiming) -> dict[str, Any]:
        """The JSON fields; `policy` is the requested one, `ran` differs from it where prefill fell back."""
        assert self.report is not None
        median, of_stepwise = (float(np.median(timing.seconds)) for timing in (self, stepwise))
        return {
            "tokens": tokens,
            "policy": self.policy,
            "algorithm": self.algorithm,
            "stride": None if self.sweeps is None else self.sweeps.stride,
            "ran": self.report.policy,
            "seconds": median,
            "min_seconds": min(self.seconds),
            "passes": self.report.passes,
            "residual": self.report.residual,
            "max_abs_latent_error": self.max_abs_latent_error,
            "kl": self.kl,
            "speedup": of_stepwise / median,
            "note": self.report.note,
            "auto": self.auto,
        }


def _iterations(decoder: Decoder) -> list[SweepOptions]:
    """Jacobi iteration, and the decoder's own where the backend allows another."""
    default = decoder.prefill_options.sweeps
    return [JACOBI, default] if default.stride > 1 else [JACOBI]


def _algorithm(stride: int) -> str:
    return "plain" if stride == 1 else f"interleaved, stride {stride}"


def compare_prefill(
    decoder: Decoder, tokens: Sequence[int], rounds: int, tolerance: float | None, progress: Progress
) -> list[dict[str, Any]]:
    """Prefill the same prompt in every way, in alternating rounds; returns the JSON fields of each, stepwise first.

    A model without memory needs no iteration: one pass is exact.
    """
    memory = decoder.config.memory
    ways = [PrefillTiming("stepwise", "stepwise")]
    if memory:
        iterations = _iterations(decoder)[::-1]
        ways += [PrefillTiming("fixed-point", _algorithm(sweeps.stride), sweeps) for sweeps in iterations]
        ways.append(PrefillTiming("zero", "one pass with zero memory"))
    else:
        ways.append(PrefillTiming("fixed-point", "one pass"))
    request = PrefillRequest.of("auto", tolerance, memory, decoder.precision)
    taken = policy_of(np.asarray(tokens), memory, request, decoder.prefill_options)
    next(way for way in ways if way.policy == taken).auto = True
    # Memory is committed and kernels have run before anything is timed.
    decoder.prefill([tokens], policy=ways[-1].policy)
    decoder.prefill([tokens[:_WARM_UP_TOKENS]], policy="stepwise")
    reference: DecodeState | None = None
    for number in range(rounds):
        for index, way in enumerate(ways):
            state = way.run(decoder, tokens, tolerance)
            progress(f"reading {len(tokens)} tokens", number * len(ways) + index + 1, rounds * len(ways))
            reference = reference or state
            if number == 0:
                way.report = state.prefill
                way.kl = kl_divergence(reference.logits[0], state.logits[0])
                way.max_abs_latent_error = distance(reference.latent, state.latent) if memory else None
    return [way.fields(len(tokens), ways[0]) for way in ways]


def measure_convergence(decoder: Decoder, tokens: Sequence[int], progress: Progress) -> list[dict[str, Any]]:
    """Error over all positions and seconds so far after every sweep of each iteration.

    Ends at the smallest error that float32 can estimate. Takes as many tokens as the backend reads in one block.
    """
    if not decoder.config.memory:
        return []
    state = decoder.prefill([tokens[:1]], policy="stepwise")  # for its buffers, overwritten from slot 0 on
    ids = np.asarray(tokens, np.int64)[: state.owner.backend.blocks.tokens]
    progress(f"reading {len(ids)} tokens stepwise for their latents", 0, 0)
    exact = _sweeps(state, ids, SweepOptions())
    finish(exact.finish_stepwise())
    points: list[dict[str, Any]] = []
    for sweeps in _iterations(decoder):
        progress(f"sweeping over {len(ids)} tokens with stride {sweeps.stride}", 0, 0)
        points += _converge(_sweeps(state, ids, sweeps), exact.latents)
    return points


def _sweeps(state: DecodeState, ids: IntArray, options: SweepOptions) -> Sweeps:
    return Sweeps(state.buffers, 0, ids, 0, np.zeros(state.buffers.latent.shape[1], np.float32), options)


def _converge(sweeps: Sweeps, exact: FloatArray) -> list[dict[str, Any]]:
    """The points of one iteration from a zero latent; restores the order of the slots."""
    points: list[dict[str, Any]] = []
    seconds: list[float] = []
    order = np.concatenate(sweeps.members)
    sweeps.buffers.reorder(0, 0, order, move=False)
    while len(points) < _MOST_SWEEPS and sweeps.exact < len(sweeps.tokens):
        with timed(seconds):
            sweeps.sweep()
        error = float(np.abs(sweeps.latents - exact).max())
        points.append(
            {
                "tokens": len(sweeps.tokens),
                "algorithm": _algorithm(sweeps.stride),
                "passes": sweeps.computed / len(sweeps.tokens),
                "seconds": sum(seconds),
                "max_abs_latent_error": error,
            }
        )
        if error <= SMALLEST_PREFILL_TOLERANCE:
            break
    sweeps.buffers.reorder(0, 0, order, move=True)
    return points


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


def state_bytes_per_step(config: LRTConfig, context: int, item_bytes: int = 4) -> dict[str, int]:
    """Bytes of one sequence's state that a step after `context` tokens moves, by the names of the JSON fields.

    Read: live windows of K and V, and the latent; not the token's own key and value, which are in the processor's cache
    when they are read. Written: a key and a value in each layer's cache, and the latent. Copied: caches that the
    contract does not update in place, which are none; of the latent, two buffers change places. Recorded: the latent,
    for rewinding, in float32 whatever the precision.
    """
    live, latent = sum(min(context, window) for window in config.windows), config.n_embd if config.memory else 0
    copied = [pair for pair in contract.state_pairs(config) if not pair.in_place and pair.past != "past_latent"]
    return {
        "state_bytes_read_per_step": item_bytes * (2 * live * config.kv_dim + latent),
        "state_bytes_written_per_step": item_bytes * (2 * config.n_layer * config.kv_dim + latent),
        "state_bytes_copied_per_step": item_bytes * len(copied) * context * config.kv_dim,
        "latent_record_bytes_per_step": 4 * latent,
    }


_ROUNDS = 5
_TRIAD_BLOCK = 2**14  # float64: the intermediate product stays in the fastest caches
_READ_PARTS = 16  # for each thread, so that a thread that is held up leaves work to the others
_SMALLEST_TRIAD_BYTES, _LARGEST_TRIAD_BYTES = 2**27, 2**29
_SMALLEST_COPY_BYTES = 2**28
_COPIES = 20  # in a round, so that waiting for them is little of it
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def measure_bandwidth(device: CudaDevice | None, threads: int = 1) -> tuple[dict[str, Any], int]:
    """Measure the memory that weights and state are read from: a GPU's, without `device` the host's by some threads.

    Returns the JSON fields (`read_bandwidth_gb_s`, of reading alone, is None where it was not measured), and the bytes
    of the largest cache in front of that memory, 0 where unknown. Raises BackendError where CUDA fails.
    """
    found: tuple[float, str, float | None, int]
    if device is not None:
        found = device_copy_gb_s(device), "device-to-device copy", None, device.cache_bytes()
    else:
        name = f"triad, {threads} thread{'s' if threads > 1 else ''}"
        found = triad_gb_s(threads), name, read_gb_s(threads), last_level_cache_bytes() or 0
    return dict(zip(("bandwidth_gb_s", "bandwidth_of", "read_bandwidth_gb_s"), found, strict=False)), found[3]


def device_copy_gb_s(device: CudaDevice, array_bytes: int | None = None) -> float:
    """Bandwidth of copies within a GPU's memory; bytes read and bytes written both count.

    `array_bytes`, of two arrays, defaults to four times the GPU's cache, at least 256 MiB; BackendError where they do
    not fit.
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

    It runs block by block, so that s * c stays in cache, each thread on its own part. As in STREAM, 3 arrays a round
    are counted; the processor also reads `a` before it overwrites it. `array_bytes` defaults to four times the
    last-level cache, 128 to 512 MiB.
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
