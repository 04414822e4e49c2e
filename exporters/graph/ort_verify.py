"""Open every graph of an export, to find those that ONNX Runtime would refuse.

ONNX Runtime's CPU provider has kernels for all precisions but bfloat16, whose graphs get ONNX's own check of types and
shapes. Nothing is optimized, packed or run: the weights are mapped and not read, so it takes little time and memory.
That a graph computes the right numbers is for parity.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort

from lrt_deploy.bundle.contract import FLAVOURS
from lrt_deploy.bundle.manifest import PHASES, graph_path
from lrt_deploy.bundle.precisions import base_dtype
from lrt_deploy.errors import ExportError

_LOG_NOTHING = 4  # but what ends the process; errors are raised


def verify_graphs(folder: Path, precision: str) -> None:
    """Open all graphs of a precision below `folder`; raises ExportError with the reason for one that cannot be."""
    for flavour in FLAVOURS:
        verify = _check_types if base_dtype(precision, flavour) == "bfloat16" else _open
        for phase in PHASES:
            path = folder / graph_path(precision, phase, flavour)
            try:
                verify(path)
            except Exception as error:  # onnx and onnxruntime raise their own unrelated types
                raise ExportError(
                    f"the {flavour} {phase} graph in {precision} cannot be opened, so nothing was written: "
                    f"{_one_line(error)}. Please report this with the checkpoint's config"
                ) from error


def _open(path: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_NOTHING
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)


def _check_types(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
