"""The machine and the installation: processor, memory, the GPU, and the optional packages, which are not imported.

A missing package, driver or device is an answer, not an error. No message says to install `lrt-deploy` from a package
index, where the name may be another project's.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_CPU_INFO = Path("/proc/cpuinfo")


def cpu_model() -> str:
    """Return the name of the processor."""
    if _CPU_INFO.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", _CPU_INFO.read_text(errors="replace"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not count it so."""
    if os.name != "posix":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Gpu:
    """One device as CUDA names it."""

    name: str
    compute_capability: tuple[int, int]

    @property
    def capability_text(self) -> str:
        """The compute capability as text, as in sidecars and NVIDIA's tables: 8.9."""
        return ".".join(map(str, self.compute_capability))


def find_gpu() -> tuple[Gpu | None, str]:
    """Return the current device, or None, and a clause that says what was found."""
    try:
        cuda = importlib.import_module("cuda.bindings.runtime")
        error, count = cuda.cudaGetDeviceCount()
    except ModuleNotFoundError as missing:
        return (
            None,
            f"{missing.name} is not installed, which finds NVIDIA GPUs; the extras tensorrt and tensorrt-rtx bring it",
        )
    except Exception as broken:  # the driver's libraries may fail in any way
        return None, f"CUDA cannot be asked: {' '.join(str(broken).split())}"
    if error != cuda.cudaError_t.cudaSuccess or not count:
        if cuda.cudaDriverGetVersion() == (cuda.cudaError_t.cudaSuccess, 0):  # the error would speak of its version
            return None, "no NVIDIA driver is installed"
        if not int(error):
            return None, "CUDA counts 0 devices"
        return None, f"CUDA finds no device: {cuda.cudaGetErrorString(error)[1].decode(errors='replace')}"
    _, device = cuda.cudaGetDevice()
    error, properties = cuda.cudaGetDeviceProperties(device)
    if error != cuda.cudaError_t.cudaSuccess:
        return None, f"the device cannot be used: {cuda.cudaGetErrorString(error)[1].decode(errors='replace')}"
    gpu = Gpu(properties.name.decode(errors="replace"), (int(properties.major), int(properties.minor)))
    return gpu, f"{gpu.name}, compute capability {gpu.capability_text}"


# Packages that compute, and the other names that they may be installed under, for a device or a version of CUDA.
_PACKAGES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lrt-deploy", "numpy", "tokenizers", "torch", "onnx", "onnxscript", "onnx-ir"), ()),
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "onnxruntime": ("onnxruntime-gpu",),
}


def versions() -> dict[str, str | None]:
    """Versions of the packages that compute, None for one that is not installed; imports none of them."""
    return {name: next(filter(None, map(_version, (name, *others))), None) for name, others in _PACKAGES.items()}


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def onnxruntime_clash() -> str | None:
    """Say that two packages of ONNX Runtime are installed, and what to do; None where there is one at most."""
    found = {name: number for name in ("onnxruntime", "onnxruntime-gpu") if (number := _version(name))}
    if len(found) < 2:
        return None
    both = " and ".join(f"{name} {version}" for name, version in found.items())
    return (
        f"{both} are both installed, and their files overwrite each other; expected one of them. Remove both "
        "(pip uninstall onnxruntime onnxruntime-gpu), then install lrt-deploy again from where it came from"
    )


Extra = Literal["export", "serve", "ray", "grammar", "bench", "report", "tensorrt", "tensorrt-rtx"]

# The modules that each extra brings, in the order in which people would look for them.
MODULES: dict[Extra, tuple[str, ...]] = {
    "export": ("torch", "onnx", "onnxscript", "onnx_ir", "huggingface_hub"),
    "serve": ("starlette", "uvicorn", "jinja2"),
    "ray": ("ray",),
    "grammar": ("llguidance",),
    "bench": ("matplotlib",),
    "report": ("jinja2", "matplotlib"),
    "tensorrt": ("tensorrt", "polygraphy", "onnx", "onnx_ir"),
    "tensorrt-rtx": ("tensorrt_rtx", "polygraphy", "onnx", "onnx_ir"),
}


def install(extra: Extra) -> str:
    """Return how to install an extra, as a clause for messages."""
    return (
        f"install the extra {extra!r} from where lrt-deploy came from: pip install -e '.[{extra}]' in a clone, or "
        f"pip install 'WHEEL[{extra}]' for a wheel"
        + ("; without a GPU with --extra-index-url https://download.pytorch.org/whl/cpu" * (extra == "export"))
    )


def missing(extra: Extra) -> list[str]:
    """Return the modules of an extra that are not installed."""
    return [name for name in MODULES[extra] if importlib.util.find_spec(name) is None]


def lack(product: str, absent: Sequence[str], extra: Extra) -> str:
    """Return the message that something needs modules of an extra that are not installed."""
    verb = "is" if len(absent) == 1 else "are"
    return f"{product} needs {', '.join(absent)}, which {verb} not installed; {install(extra)}"


def explain(error: ModuleNotFoundError, extras: Sequence[Extra]) -> str | None:
    """Explain a failed import as a missing extra, naming all of its modules that are missing; None if it is not one.

    `extras` are the extras that the command could have needed, the likeliest first; the others come after them.
    """
    module = (error.name or "").split(".")[0].replace("-", "_")
    for extra in (*extras, *MODULES):
        if module in MODULES[extra]:
            absent = [name for name in MODULES[extra] if name == module or name in missing(extra)]
            return lack("this command", absent, extra)
    return None
