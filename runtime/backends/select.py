"""Which backend runs a bundle: the one asked for, or for `auto` the best that is present, with the reason in words.

Present means: its library is installed, there is a GPU if it needs one, and the bundle has an engine for it if it needs
one. Imports no backend; asking costs no more than asking CUDA for its devices.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from lrt_deploy.bundle.backends import BACKENDS, PLAN_BACKENDS
from lrt_deploy.bundle.engine_sidecar import PLAN, build_command, engine_folder
from lrt_deploy.bundle.manifest import Manifest
from lrt_deploy.bundle.precisions import PRECISIONS, QUANTIZED, not_held
from lrt_deploy.errors import BackendError, BundleError
from lrt_deploy.machine import find_gpu


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
