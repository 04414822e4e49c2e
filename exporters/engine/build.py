"""Build an engine from a bundle: copy the graph, parse, verify, build, and write plan and sidecar beside the graphs.

Engines are a cache: they can always be made again from the bundle, they are not in its manifest, and they are used only
where the sidecar fits. Needs no torch and no GPU (full TensorRT itself wants one; TensorRT-RTX does not).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrt_deploy.bundle import contract, engine_sidecar
from lrt_deploy.bundle.engine_sidecar import PLAN, EngineSidecar, Profile
from lrt_deploy.bundle.graph_file import check_graph_file
from lrt_deploy.bundle.manifest import Manifest, graph_path, read_manifest, verify_files, weights_path
from lrt_deploy.bundle.precisions import not_held
from lrt_deploy.bundle.tensorrt_libraries import TENSORRT_DTYPES, TensorRTLibrary, choose_library
from lrt_deploy.errors import EngineError
from lrt_deploy.exporters.atomic_folder import atomic_folder, recover
from lrt_deploy.exporters.estimate import Estimate, estimate_build
from lrt_deploy.fields import check_callable, check_flag, check_path, check_text, check_whole
from lrt_deploy.files import check_writable
from lrt_deploy.machine import find_gpu, peak_rss_bytes

from .tensorrt import Listener, NoFusedAttentionError, Parsed, Plan, Progress, build, parse, tensorrt_copy
from .verify import expected_network, find_slow_decoding, parse_layers, summarize, verify

CHUNK_TOKENS = 512  # tokens that the prefill profile takes at once, at most
_LARGEST = 2**63 - 1  # bytes that TensorRT can be told
# What a plan of TensorRT-RTX that names none runs on, by NVIDIA's support matrix (versions 1.0 to 1.5).
_RTX_CAPABILITIES = ("8.6", "8.9", "12.0")


@dataclass(frozen=True)
class _Job:
    """One engine to build."""

    bundle: Path
    manifest: Manifest
    library: TensorRTLibrary
    precision: str
    capacity: int
    profiles: tuple[Profile, ...]
    max_batch_size: int
    compute_capabilities: tuple[str, ...]
    workspace_bytes: int | None
    timing_cache: Path | None
    listener: Listener | None

    @property
    def graph(self) -> str:
        return graph_path(self.precision, "prefill", "full")


def build_engine(
    bundle: str | Path,
    *,
    backend: str = "auto",
    precision: str | None = None,
    chunk_tokens: int | None = None,
    max_batch_size: int | None = None,
    workspace_bytes: int | None = None,
    timing_cache: str | Path | None = None,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
    on_message: Listener | None = None,
) -> EngineSidecar:
    """Build a TensorRT engine beside the graphs of a bundle and return its sidecar.

    Args:
        bundle: the bundle folder.
        backend: `tensorrt`, `tensorrt-rtx`, or `auto` for the first of the two that is installed.
        precision: which precision of the bundle; None: the only one in it.
        chunk_tokens: most prompt tokens that the engine takes at once; None: 512, or the capacity if that is less.
        max_batch_size: most sequences that the engine decodes together; None: the bundle's, which it may not exceed.
        workspace_bytes: most scratch memory that a layer may take, in bytes; None: TensorRT's own limit.
        timing_cache: a file with measured kernel times, read where it exists and replaced after the build; None: one
            beside the engines. TensorRT-RTX has none.
        force: replace an existing engine.
        progress: called with (what, done, total). What it raises cancels the build.
        on_message: called with severity and text of each message of TensorRT.

    Raises:
        BundleError: the bundle is not intact.
        EngineError: the engine cannot be built, or its network is not what the precision expects. What was there
            before stays.
        InputError: an argument is not of its type.

    """
    folder, backend = check_path(bundle, "bundle"), check_text(backend, "backend")
    precision = None if precision is None else check_text(precision, "precision")
    chunk = None if chunk_tokens is None else check_whole(chunk_tokens, "chunk_tokens", 1)
    batch = None if max_batch_size is None else check_whole(max_batch_size, "max_batch_size", most=_LARGEST)
    workspace = None if workspace_bytes is None else check_whole(workspace_bytes, "workspace_bytes", most=_LARGEST)
    cache = None if timing_cache is None else check_path(timing_cache, "timing_cache")
    check_flag(force, "force")
    check_callable(progress, "progress")
    manifest = read_manifest(folder)
    library, _ = choose_library(backend)
    library.load()  # raises before anything is hashed if it is not installed
    chunk = _checked_size("chunk_tokens", chunk, manifest.max_seq_len, CHUNK_TOKENS)
    batch = _checked_size("max_batch_size", batch, manifest.max_batch_size, manifest.max_batch_size)
    if workspace == 0:
        raise EngineError("workspace_bytes is 0, expected at least 1")
    job = _Job(
        folder,
        manifest,
        library,
        _precision(manifest, precision),
        engine_sidecar.cache_capacity(manifest.max_seq_len),
        profiles(manifest.max_seq_len, batch, chunk),
        batch,
        _compute_capabilities(library),
        workspace,
        _timing_cache(folder, library, cache),
        on_message,
    )
    return _build(job, force, progress)


def estimate_engine(
    bundle: str | Path, backend: str = "auto", precision: str | None = None, force: bool = False
) -> Estimate:
    """Estimate what `build_engine` would take, and refuse what it would refuse for these arguments; write nothing."""
    folder = check_path(bundle, "bundle")
    manifest = read_manifest(folder)
    library, _ = choose_library(backend)
    name = _precision(manifest, precision)
    target = engine_sidecar.engine_folder(folder, library.backend, name)
    _check_target(target, force)
    return estimate_build(folder, manifest, (target / PLAN).relative_to(folder).as_posix(), name)


def _build(job: _Job, force: bool, progress: Progress) -> EngineSidecar:
    target = engine_sidecar.engine_folder(job.bundle, job.library.backend, job.precision)
    recover(target)
    _check_target(target, force)
    verify_files(job.bundle, job.manifest, progress=lambda done, total: progress("hashing", done, total))
    check_graph_file(job.bundle / job.graph, job.bundle / weights_path(job.precision))
    started = time.perf_counter()
    built = None
    with suppress(NoFusedAttentionError):
        built = _built(job, progress, decompose=False)
    if built is None:
        progress("building again, with attention decomposed", 0, 0)
        built = _built(job, progress, decompose=True)
    parsed, layers, plan = built
    seconds = time.perf_counter() - started
    with atomic_folder(target, _check_replaceable if force else None, EngineError) as out:
        progress("writing the plan", 0, 0)
        (out / PLAN).write_bytes(plan[0])
        sidecar = _sidecar(job, parsed, plan, layers, seconds)
        engine_sidecar.write_sidecar(out / PLAN, sidecar)
    return sidecar


def _check_target(target: Path, force: bool) -> None:
    """Raise EngineError if the engine's folder exists and `force` is False, or cannot be made or replaced."""
    if os.path.lexists(target):
        if not force:
            raise EngineError(f"{target} exists; pass --force (force=True) to build it again")
        _check_replaceable(target)
    check_writable(target, EngineError)


def _check_replaceable(target: Path) -> None:
    """Raise EngineError for a folder that holds anything besides a plan and its sidecar."""
    written = rf"{PLAN}\.json|{engine_sidecar.RUNTIME_CACHE}"
    ours = re.compile(rf"{PLAN}|{written}|\.({written})\.partial-[0-9a-f]{{16}}|\.sidecar\.\w+")
    foreign = [path.name for path in target.iterdir() if not ours.fullmatch(path.name)] if target.is_dir() else []
    if foreign or not target.is_dir():
        raise EngineError(
            f"{target} holds {min(foreign, default='something else')}, expected only {PLAN} and its sidecar; "
            "it is left as it is: remove it yourself, then build again"
        )


def _built(job: _Job, progress: Progress, decompose: bool) -> tuple[Parsed, dict[str, Any], Plan]:
    """Parse, verify and build; return the network, the counts of its layers, and the plan."""
    graph, expected = job.bundle / job.graph, expected_network(job.manifest, job.precision)
    progress("parsing", 0, 0)
    parsed = parse(job.library, tensorrt_copy(graph, job.capacity, decompose), graph, job.listener)
    progress("verifying", 0, 0)
    layers = verify(parsed.trt, parsed.network, expected)
    decomposable = decompose or expected.base == "float32"
    plan = build(job.library, parsed, job.profiles, progress, job.workspace_bytes, job.timing_cache)
    names = [profile.name for profile in job.profiles]
    fused = parse_layers(parsed.log.fused_layers)
    slow = find_slow_decoding(fused, expected, job.capacity, names, decomposable)
    if slow and job.library.backend == "tensorrt-rtx":  # what full TensorRT lists has not been seen
        raise EngineError(
            f"the plan that {job.library.backend} {parsed.trt.__version__} built for {job.precision} would decode "
            f"slowly, so it was not kept: {'; '.join(slow[:4])}; expected are attentions in one kernel each that reads "
            "the caches themselves, and quantized weights dequantized inside their products; build another precision "
            "of the bundle, or with the version in constraints.txt"
        )
    kernels = summarize(fused, expected, job.capacity, names)
    return parsed, layers | {"attention_decomposable": decomposable, "kernels": kernels}, plan


def profiles(max_seq_len: int, max_batch_size: int, chunk_tokens: int) -> tuple[Profile, ...]:
    """Return the profiles: decode, 1 token in up to `max_batch_size` rows; prefill, a chunk of tokens in 1 row."""
    chunk = min(chunk_tokens, max_seq_len)
    return (
        Profile(engine_sidecar.DECODE, batch=(1, 1, max_batch_size), tokens=(1, 1, 1)),
        Profile(engine_sidecar.PREFILL, batch=(1, 1, 1), tokens=(1, max(1, chunk // 2), chunk)),
    )


def _checked_size(name: str, asked: int | None, largest: int, default: int) -> int:
    """Return `asked`, which must be 1 to `largest`; where it is None, `default` or `largest` if that is less."""
    if asked is None:
        return min(default, largest)
    if not 1 <= asked <= largest:
        limit = "max_seq_len" if name == "chunk_tokens" else name
        raise EngineError(
            f"{name} is {asked}; this bundle was exported with {limit} {largest}: expected 1 to {largest}"
        )
    return asked


def _precision(manifest: Manifest, requested: str | None) -> str:
    held = manifest.precisions
    if requested is None and len(held) == 1:
        return held[0]
    if requested is None:
        raise EngineError(f"this bundle holds {', '.join(held)}; say with --precision which one to build")
    if requested not in held:
        raise EngineError(not_held(held, requested))
    return requested


def _timing_cache(bundle: Path, library: TensorRTLibrary, asked: Path | None) -> Path | None:
    """Return the file of measured kernel times; None for TensorRT-RTX, which measures none when it builds."""
    if library.backend == "tensorrt-rtx":
        if asked is not None:
            raise EngineError("tensorrt-rtx measures no kernels when it builds and has no timing cache; leave it out")
        return None
    if asked is not None:
        check_writable(asked, EngineError)
        return asked
    (bundle / engine_sidecar.ENGINES).mkdir(exist_ok=True)
    return bundle / engine_sidecar.ENGINES / f"{library.backend}.timing"


def _sidecar(job: _Job, parsed: Parsed, plan: Plan, layers: dict[str, Any], seconds: float) -> EngineSidecar:
    manifest, network, files = job.manifest, parsed.network, job.manifest.files
    data, flags = plan
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    expected, (gpu, reason) = expected_network(manifest, job.precision), find_gpu()
    return EngineSidecar(
        backend=job.library.backend,
        precision=job.precision,
        plan_sha256=hashlib.sha256(data).hexdigest(),
        plan_bytes=data.nbytes,
        onnx=job.graph,
        onnx_sha256=files[job.graph].sha256,
        weights_sha256=files[weights_path(job.precision)].sha256,
        tensorrt_version=str(parsed.trt.__version__),
        compute_capabilities=job.compute_capabilities,
        profiles=job.profiles,
        flags=flags,
        capacity=job.capacity,
        max_seq_len=manifest.max_seq_len,
        max_batch_size=job.max_batch_size,
        inputs=_described(
            inputs, contract.graph_inputs(manifest.model, "full", expected.base, manifest.host_embeddings)
        ),
        outputs=_described(outputs, contract.graph_outputs(manifest.model, expected.base)),
        state=tuple(pair.to_dict() for pair in contract.state_pairs(manifest.model, expected.base)),
        layers=layers,
        build={
            "seconds": round(seconds, 3),
            "peak_host_bytes": peak_rss_bytes(),
            "memory": parsed.log.memory,
            "fused_layers": [layer.name for layer in parse_layers(parsed.log.fused_layers)],
            "warnings": parsed.log.warnings,
            "platform": platform.platform(),
        },
        smoke={"ran": False, "reason": reason if gpu is None else "building does not run it"},
    )


def _compute_capabilities(library: TensorRTLibrary) -> tuple[str, ...]:
    """Return the GPUs that the plan is for: those documented for RTX, otherwise the one that it is built on."""
    if library.backend == "tensorrt-rtx":
        return _RTX_CAPABILITIES
    gpu, reason = find_gpu()
    if gpu is None:
        raise EngineError(f"{library.backend} builds for the GPU that it runs on, and there is none here: {reason}")
    return (gpu.capability_text,)


def _described(tensors: Sequence[Any], specs: Sequence[contract.TensorSpec]) -> tuple[dict[str, Any], ...]:
    """Describe network inputs or outputs by name, type and shape; free dimensions have the contract's names."""
    dims = {spec.name: spec.shape for spec in specs}
    return tuple(
        {
            "name": tensor.name,
            "dtype": TENSORRT_DTYPES.get(tensor.dtype.name, tensor.dtype.name),
            "shape": [dims[tensor.name][axis] if size < 0 else int(size) for axis, size in enumerate(tensor.shape)],
        }
        for tensor in tensors
    )
