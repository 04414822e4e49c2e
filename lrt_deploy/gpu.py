"""The GPU of this process, if there is one, and why not if there is none.

Asks the CUDA runtime through `cuda.bindings`; that package missing, no driver and no device are all answers, not
errors. Allocates nothing.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One device as CUDA names it."""

    name: str
    compute_capability: tuple[int, int]

    @property
    def capability_text(self) -> str:
        """As sidecars and NVIDIA's tables have it: 8.9."""
        return ".".join(map(str, self.compute_capability))


def find_gpu() -> tuple[Gpu | None, str]:
    """The current device, or None; and a clause for people that says what was found."""
    try:
        cuda = importlib.import_module("cuda.bindings.runtime")
        error, count = cuda.cudaGetDeviceCount()
    except ModuleNotFoundError as missing:
        return None, f"{missing.name} is not installed (pip install cuda-bindings)"
    except Exception as broken:  # the driver's libraries may fail in any way
        return None, f"CUDA cannot be asked: {' '.join(str(broken).split())}"
    if error != cuda.cudaError_t.cudaSuccess or not count:
        text = cuda.cudaGetErrorString(error)[1].decode(errors="replace") if int(error) else "CUDA counts 0 devices"
        return None, f"no GPU: {text}"
    _, device = cuda.cudaGetDevice()
    error, properties = cuda.cudaGetDeviceProperties(device)
    if error != cuda.cudaError_t.cudaSuccess:
        return None, f"no usable GPU: {cuda.cudaGetErrorString(error)[1].decode(errors='replace')}"
    gpu = Gpu(properties.name.decode(errors="replace"), (int(properties.major), int(properties.minor)))
    return gpu, f"{gpu.name}, compute capability {gpu.capability_text}"
