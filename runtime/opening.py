"""Steps of `open_decoder`: check the contract and the threads, limit capacity and batch, load the backend."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import msgspec

from lrt_deploy.arguments import check_whole
from lrt_deploy.bundle import contract
from lrt_deploy.bundle.backends import PLAN_BACKENDS
from lrt_deploy.bundle.engine_sidecar import PLAN, engine_folder, read_sidecar
from lrt_deploy.bundle.manifest import Manifest, table_path, weights_path
from lrt_deploy.bundle.precisions import base_dtype
from lrt_deploy.errors import BundleError, InputError
from lrt_deploy.runtime.backends.base import Backend
from lrt_deploy.runtime.backends.memory_pages import read_ahead
from lrt_deploy.runtime.backends.select import Choice

_MOST_THREADS = 8  # for each core


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


def load_backend(choice: Choice, folder: Path, manifest: Manifest, threads: int | None, cuda_graph: bool) -> Backend:
    """Load the weights on the selected backend; embedding tables that it leaves on disk are read ahead."""
    backend = _load(choice, folder, manifest, threads, cuda_graph)
    if manifest.host_embeddings:
        read_ahead(folder / table_path(choice.precision))
    elif choice.backend == "ort-cpu":  # after its matrices, which it has packed by now
        read_ahead(folder / weights_path(choice.precision))
    return backend


def _load(choice: Choice, folder: Path, manifest: Manifest, threads: int | None, cuda_graph: bool) -> Backend:
    name, precision, _ = choice
    if name == "ort-cpu":
        from lrt_deploy.runtime.backends.ort_cpu import OrtCpuBackend

        return OrtCpuBackend(folder, manifest, precision, threads)
    if name == "ort-cuda":
        from lrt_deploy.runtime.backends.ort_cuda import OrtCudaBackend

        return OrtCudaBackend.open(folder, manifest, precision)
    assert name in PLAN_BACKENDS, name
    from lrt_deploy.runtime.backends.tensorrt import TensorRTBackend

    return TensorRTBackend.open(folder, manifest, name, precision, cuda_graph)
