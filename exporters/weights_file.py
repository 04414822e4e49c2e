"""Write initializers once, into one external-data file that all graphs of a precision share.

Tensors start on page boundaries, so that a runtime can map the file instead of reading it. Small constants (shapes,
lambdas) stay inside the graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

_INLINE_BYTES = 1024
_PAGE_BYTES = 4096
_CHUNK_BYTES = 16 * 2**20

Progress = Callable[[int, int], None]


def externalize(model: ir.Model, path: Path, progress: Progress = lambda done, total: None) -> int:
    """Move all large initializers of `model` into `path` and point them there by its bare name; return the bytes.

    Memory: one chunk beside the tensors themselves, whose buffers are written without a copy.
    """
    large = [
        v
        for v in model.graph.initializers.values()
        if v.const_value is not None and v.const_value.nbytes > _INLINE_BYTES
    ]
    total = sum(v.const_value.nbytes for v in large if v.const_value is not None)
    done = 0
    with path.open("wb") as file:
        for value in large:
            tensor = value.const_value
            assert tensor is not None
            file.write(b"\0" * (-file.tell() % _PAGE_BYTES))
            offset = file.tell()
            view = (
                memoryview(tensor.numpy()).cast("B")
                if tensor.dtype == ir.DataType.FLOAT
                else memoryview(tensor.numpy().view("u1").reshape(-1))
            )
            for start in range(0, len(view), _CHUNK_BYTES):
                done += file.write(view[start : start + _CHUNK_BYTES])
                progress(done, total)
            value.const_value = ir.ExternalTensor(
                path.name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=value.name or "",
                base_dir=path.parent,
            )
        size = file.tell()
    return size
