"""Write initializers once, into one external-data file that all graphs of a precision share.

Tensors start on page boundaries, so that a runtime can map the file instead of reading it. Small constants (shapes,
lambdas) stay inside the graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lrt_deploy.bundle.manifest import TABLE_ALIGNMENT as _PAGE_BYTES

_INLINE_BYTES = 1024
_CHUNK_BYTES = 16 * 2**20

Progress = Callable[[int, int], None]


def externalize(model: ir.Model, path: Path, progress: Progress = lambda done, total: None) -> int:
    """Move all large initializers of `model` into `path` and point them there by its bare name; return the bytes.

    Memory: one chunk beside the tensors themselves, whose buffers are written without a copy.
    """
    known = [(value, value.const_value) for value in model.graph.initializers.values() if value.const_value is not None]
    large = [(value, tensor) for value, tensor in known if tensor.nbytes > _INLINE_BYTES]
    for (value, tensor), offset in zip(large, write([tensor for _, tensor in large], path, progress), strict=True):
        shape, name = ir.Shape(tensor.shape.numpy()), value.name or ""
        value.const_value = ir.ExternalTensor(
            path.name, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name, base_dir=path.parent
        )
    return path.stat().st_size


def write(
    tensors: Sequence[ir.TensorProtocol], path: Path, progress: Progress = lambda done, total: None
) -> Iterator[int]:
    """Write tensors one after the other; yields the offset of each once it is written."""
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    with path.open("wb") as file:
        for tensor in tensors:
            file.write(b"\0" * (-file.tell() % _PAGE_BYTES))
            offset = file.tell()
            content = _bytes_of(tensor)
            for start in range(0, content.size, _CHUNK_BYTES):
                done += file.write(content[start : start + _CHUNK_BYTES].data)
                progress(done, total)
            yield offset


def _bytes_of(tensor: ir.TensorProtocol) -> np.ndarray:
    """The content as bytes, without a copy where it has whole bytes; bfloat16 has no buffer of its own."""
    if tensor.dtype.bitwidth < 8:
        return np.frombuffer(tensor.tobytes(), np.uint8)
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
