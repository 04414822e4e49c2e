"""The precisions of a bundle, the types in which each flavour computes and keeps its state, and the backends.

    precision          matrices                    full (TensorRT, CUDA)   windowed (ONNX Runtime on a CPU)
    fp32               float32                     float32                 float32
    fp16               float16                     float16                 float16
    bf16               bfloat16                    bfloat16                bfloat16
    int8               int8, and int8 activations  float16                 float32
    int8-weight-only   int8                        float16                 float32
    int4-weight-only   int4, in blocks of rows     float16                 float32

The type of a flavour is that of its matrix products, attention, caches and latent. Norms, gates, residual stream,
rotary embedding and softcap are float32 in all of them. Quality: docs/precisions.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .contract import Flavour

# From the most precise on; the default is the first one that a bundle holds.
PRECISIONS: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8", "int8-weight-only", "int4-weight-only")
INT4 = "int4-weight-only"
# Rows of a column that may share an int4 scale. More of them cost quality and save time.
INT4_BLOCKS: tuple[int, ...] = (32, 64, 128)
# Gates are 1% of the weights: quantizing them would gain nothing, and cost a product of its own in W8A8. The others are
# quantized; what keeping them would be worth: docs/precisions.md.
DEFAULT_KEEP_HIGH = ("gate",)


@dataclass(frozen=True)
class Format:
    """Storage of matrices: bits, rows of a block that share a scale (None: a whole column), int8 activations."""

    bits: int
    block: int | None
    activations: bool

    @property
    def largest(self) -> int:
        """Largest integer; the smallest is its negative."""
        return int(2 ** (self.bits - 1) - 1)

    def missing_rows(self, rows: int) -> int:
        """Return the number of rows missing to whole blocks."""
        return 0 if self.block is None else -rows % self.block


FORMATS = {
    "int8": Format(bits=8, block=None, activations=True),
    "int8-weight-only": Format(bits=8, block=None, activations=False),
    INT4: Format(bits=4, block=INT4_BLOCKS[0], activations=False),
}
QUANTIZED: tuple[str, ...] = tuple(FORMATS)

Dtype = Literal["float32", "float16", "bfloat16"]
ITEM_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

_PLAIN: dict[str, Dtype] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_QUANTIZED: dict[Flavour, Dtype] = {"full": "float16", "windowed": "float32"}


def not_held(held: Sequence[str], requested: str) -> str:
    """Return the message for a bundle that does not hold the requested precision."""
    if requested in PRECISIONS:
        adding = f"lrt-deploy export CHECKPOINT BUNDLE --add --precision {requested}"
        return f"this bundle holds {', '.join(held)}, not {requested}; {adding} adds it"
    return f"there is no precision {requested!r}; this bundle holds {', '.join(held)}"


def base_dtype(precision: str, flavour: Flavour) -> Dtype:
    """Return the type of a flavour's state and of its products that are not quantized."""
    return _PLAIN.get(precision) or _QUANTIZED[flavour]


class BackendInfo(NamedTuple):
    """A backend: the flavour of graphs that it runs, and what must be there for it."""

    flavour: Flavour
    module: str  # of its library
    provider: str | None  # of ONNX Runtime; None where it runs plans that `lrt-deploy build` compiles
    needs_gpu: bool = True


# Best first: `auto` takes the first that can run. `--backend` and what `doctor` asks follow from this table.
BACKENDS = {
    "tensorrt": BackendInfo("full", "tensorrt", None),
    "tensorrt-rtx": BackendInfo("full", "tensorrt_rtx", None),
    "ort-cuda": BackendInfo("full", "onnxruntime", "CUDAExecutionProvider"),
    "ort-cpu": BackendInfo("windowed", "onnxruntime", "CPUExecutionProvider", needs_gpu=False),
}
PLAN_BACKENDS = tuple(name for name, info in BACKENDS.items() if info.provider is None)
