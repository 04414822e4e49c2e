"""`lrt-deploy doctor`: which backends this machine and this installation can run, and the reasons against the others.

Imports the runtime libraries to try them, and runs no model.
"""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
from typing import TYPE_CHECKING, Any

import typer

from lrt_deploy import machine
from lrt_deploy.bundle.precisions import BACKENDS, BackendInfo

from . import options, output

if TYPE_CHECKING:
    from lrt_deploy.machine import Gpu


def doctor(json: options.Json = False) -> None:
    """Tell which backends can run here, and why the others cannot. Exits with 1 if none can."""
    gpu = machine.find_gpu()
    backends = [report_backend(name, info, gpu) for name, info in sorted(BACKENDS.items())]
    here = environment()
    usable = [backend["name"] for backend in backends if backend["available"]]
    line = f"ready: {', '.join(usable)}" if usable else "no backend can run here"
    problems = [clash] if (clash := machine.onnxruntime_clash()) else []
    rows: dict[str, object] = {b["name"]: f"{'ready' if b['available'] else 'no'}: {b['reason']}" for b in backends}
    rows |= {"problem": "; ".join(problems)} if problems else {}
    fields = {"backends": backends, "problems": problems, "environment": here}
    output.result(json, fields, line, rows | here)
    if not usable:
        raise typer.Exit(1)


def report_backend(name: str, info: BackendInfo, gpu: tuple[Gpu | None, str]) -> dict[str, Any]:
    """Import the library of a backend and report whether it works, and whether there is the GPU that it needs.

    The device is not tried.
    """
    version, works = None, False
    try:
        library: Any = importlib.import_module(info.module)
        version = getattr(library, "__version__", None)
        works = info.provider is None or info.provider in library.get_available_providers()
        reason = f"ONNX Runtime {version} {'offers' if works else 'was built without'} {info.provider}"
        reason = f"{info.module} {version} can be imported" if info.provider is None else reason
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed"
    except Exception as error:  # a broken installation may raise anything
        reason = f"{info.module} is installed but fails: {' '.join(str(error).split())[:200]}"
    if info.needs_gpu:
        works, reason = works and gpu[0] is not None, f"{reason}; {gpu[1]}"
    return {"name": name, "available": works, "version": version, "reason": reason}


def environment() -> dict[str, Any]:
    """Describe the machine and the installed versions; None for the unknown."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "gpus": gpus(),
        "versions": machine.versions(),
    }


def memory_bytes() -> int | None:
    """Return the bytes of physical memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def gpus() -> list[str]:
    """List name, memory and driver of each NVIDIA GPU, from nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in found.stdout.splitlines() if line.strip()]
