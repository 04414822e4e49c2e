"""Steps of `open_decoder`: choose the backend, check contract and threads, limit capacity and batch, load the weights.

A backend is present if its library is installed, and there are the GPU and the engine that it needs. Choosing imports
none of them.
"""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import msgspec

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.engine_sidecar import PLAN, build_command, engine_folder, read_sidecar
from lrt_deploy.bundle.manifest import Manifest, table_path, weights_path
from lrt_deploy.bundle.precisions import BACKENDS, PLAN_BACKENDS, PRECISIONS, QUANTIZED, base_dtype, not_held
from lrt_deploy.errors import BackendError, BundleError, InputError
from lrt_deploy.fields import check_whole
from lrt_deploy.machine import find_gpu
from lrt_deploy.runtime.backends.base import Backend
from lrt_deploy.runtime.backends.memory_pages import read_ahead

_MOST_THREADS = 8  # for each core


class Choice(NamedTuple):
    """What runs, and why."""

    backend: str
    precision: str
    reason: str


def choose(folder: Path, manifest: Manifest, backend: str, precision: str | None) -> Choice:
    """Resolve `auto`, and a precision of None: the most precise one that the backend has an engine or graph for."""
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(f"there is no backend {backend!r}; this version has {', '.join(BACKENDS)} and auto")
    if precision is not None and precision not in manifest.precisions:
        raise BundleError(not_held(manifest.precisions, precision))
    wanted = sorted(manifest.precisions, key=PRECISIONS.index) if precision is None else [precision]
    if backend != "auto":
        ready = [p for p in wanted if missing(folder, backend, p) is None]
        return Choice(backend, (ready or wanted)[0], "as asked for")
    passed_over: list[str] = []
    for name in BACKENDS:
        reasons = {p: missing(folder, name, p) for p in wanted}
        ready = [p for p, reason in reasons.items() if reason is None]
        if ready:
            return Choice(name, ready[0], "; ".join(["the best that is present", *passed_over]))
        passed_over.append(f"not {name}: {reasons[wanted[0]]}")
    raise BackendError(f"no backend can run {' or '.join(wanted)} here: {'; '.join(passed_over)}")


def find_reference(folder: Path, manifest: Manifest) -> Choice:
    """Select what an engine is compared with: ONNX Runtime on the CPU, or on the GPU where the CPU runs no precision.

    The most precise one that runs. Raises BackendError where ONNX Runtime can run none of them here.
    """
    reasons = []
    for backend in ("ort-cpu", "ort-cuda"):
        for precision in sorted(manifest.precisions, key=PRECISIONS.index):
            if backend == "ort-cuda" and precision in QUANTIZED:
                continue
            if (reason := missing(folder, backend, precision)) is None:
                return Choice(backend, precision, "the most precise reference that runs here")
            reasons.append(f"{backend} in {precision}: {reason}")
    raise BackendError(f"there is no reference to compare with here; {'; '.join(reasons)}")


def missing(folder: Path, backend: str, precision: str) -> str | None:
    """What a backend lacks to run a precision of this bundle here; None if nothing."""
    info = BACKENDS[backend]
    if importlib.util.find_spec(info.module) is None:
        return f"{info.module} is not installed"
    if backend == "ort-cpu" and precision == "bf16":
        return "ONNX Runtime has no bfloat16 on a CPU"
    if info.needs_gpu:
        gpu, reason = find_gpu()
        if gpu is None:
            return reason
    if backend in PLAN_BACKENDS and not (engine_folder(folder, backend, precision) / PLAN).exists():
        return f"no engine is built for it (`{build_command(folder, backend, precision)}`)"
    return None


def check_contract(folder: Path, manifest: Manifest, precision: str) -> None:
    """Raise BundleError unless the graphs have the inputs and outputs that this version binds."""
    for flavour in contract.FLAVOURS:
        expected = contract.describe(manifest.model, flavour, base_dtype(precision, flavour), manifest.host_embeddings)
        if manifest.contracts.get(precision, {}).get(flavour) != expected:
            made_by = manifest.provenance.get("versions", {}).get("lrt-deploy", "an unknown version")
            raise BundleError(
                f"{folder}: its {flavour} graphs in {precision} have another contract than this lrt-deploy "
                f"{version('lrt-deploy')} binds (they were made by {made_by}); export the bundle again"
            )


def limit_capacity(manifest: Manifest, max_seq_len: int | None) -> Manifest:
    """Return the manifest with a lower capacity, in tokens."""
    if max_seq_len is None:
        return manifest
    if not 1 <= check_whole(max_seq_len, "max_seq_len") <= manifest.max_seq_len:
        raise InputError(
            f"max_seq_len is {max_seq_len}; this bundle was exported for 1 to {manifest.max_seq_len} tokens"
        )
    return msgspec.structs.replace(manifest, max_seq_len=max_seq_len)


def limit_batch(folder: Path, manifest: Manifest, choice: Choice) -> Manifest:
    """Return the manifest with the batch of the selected engine, which may be smaller than the bundle's."""
    plan = engine_folder(folder, choice.backend, choice.precision) / PLAN
    if choice.backend not in PLAN_BACKENDS or not plan.exists():  # a missing engine is reported where it is loaded
        return manifest
    return msgspec.structs.replace(
        manifest, max_batch_size=min(manifest.max_batch_size, read_sidecar(plan).max_batch_size)
    )


def check_threads(threads: int | None) -> None:
    """Refuse more threads than are of use: ONNX Runtime takes minutes to start thousands."""
    most = _MOST_THREADS * (os.cpu_count() or 1)
    if threads is not None and not 1 <= check_whole(threads, "threads") <= most:
        raise InputError(f"threads is {threads}, expected 1 to {most} ({_MOST_THREADS} for each core of this machine)")


def load_backend(
    choice: Choice, folder: Path, manifest: Manifest, threads: int | None, cuda_graph: bool, device_loop: bool
) -> Backend:
    """Load the weights on the selected backend; embedding tables that it leaves on disk are read ahead."""
    name, precision, _ = choice
    backend: Backend
    if name == "ort-cpu":
        from lrt_deploy.runtime.backends.ort_cpu import OrtCpuBackend

        backend = OrtCpuBackend(folder, manifest, precision, threads)
    elif name == "ort-cuda":
        from lrt_deploy.runtime.backends.ort_cuda import OrtCudaBackend

        backend = OrtCudaBackend.open(folder, manifest, precision)
        backend.loops = device_loop
    else:
        from lrt_deploy.runtime.backends.tensorrt import TensorRTBackend

        backend = TensorRTBackend.open(folder, manifest, name, precision, cuda_graph)
        backend.loops = device_loop
    if manifest.host_embeddings:
        read_ahead(folder / table_path(precision))
    elif name == "ort-cpu":  # after its matrices, which it has packed by now
        read_ahead(folder / weights_path(precision))
    return backend
