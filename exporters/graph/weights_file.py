"""Write initializers once, into one external-data file that all graphs of a precision share.

Tensors start on page boundaries, so that a runtime can map the file instead of reading it. Small constants (shapes,
lambdas) stay inside the graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.external_data import CallbackInfo, convert_tensors_to_external

from lrt_deploy.bundle.manifest import TABLE_ALIGNMENT

_INLINE_BYTES = 1024

Progress = Callable[[int, int], None]


def externalize(model: ir.Model, path: Path, progress: Progress = lambda done, total: None) -> None:
    """Move all large initializers of `model` into the file `path`, and point them there by its bare name."""
    known = [(value, value.const_value) for value in model.graph.initializers.values() if value.const_value is not None]
    large = [(value, tensor) for value, tensor in known if tensor.nbytes > _INLINE_BYTES]
    for (value, _), tensor in zip(large, write([tensor for _, tensor in large], path, progress), strict=True):
        value.const_value = tensor


def write(
    tensors: Sequence[ir.TensorProtocol], path: Path, progress: Progress = lambda done, total: None
) -> list[ir.ExternalTensor]:
    """Write tensors one after the other into `path` and return them as they lie there; `progress` gets bytes."""
    sizes = [tensor.nbytes for tensor in tensors]

    def report(tensor: ir.TensorProtocol, info: CallbackInfo) -> None:
        progress(sum(sizes[: info.index]), sum(sizes))

    written = convert_tensors_to_external(
        tensors, path.parent, path.name, report, alignment=TABLE_ALIGNMENT, align_threshold=0
    )
    progress(sum(sizes), sum(sizes))
    return written
