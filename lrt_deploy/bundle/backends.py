"""The backends that run bundles, and what each needs; their code is in `runtime/backends/`.

The names of `--backend`, the order in which `auto` takes them, and what `doctor` asks of each come from this table.
"""

from __future__ import annotations

from typing import NamedTuple

from .contract import Flavour


class BackendInfo(NamedTuple):
    """A backend: the flavour of graphs that it runs, and what must be there for it."""

    flavour: Flavour
    module: str  # of its library
    provider: str | None  # of ONNX Runtime; None where it runs plans that `lrt-deploy build` compiles
    needs_gpu: bool = True


# Best first: `auto` takes the first that can run.
BACKENDS = {
    "tensorrt": BackendInfo("full", "tensorrt", None),
    "tensorrt-rtx": BackendInfo("full", "tensorrt_rtx", None),
    "ort-cuda": BackendInfo("full", "onnxruntime", "CUDAExecutionProvider"),
    "ort-cpu": BackendInfo("windowed", "onnxruntime", "CPUExecutionProvider", needs_gpu=False),
}
PLAN_BACKENDS = tuple(name for name, info in BACKENDS.items() if info.provider is None)
