"""What ONNX Runtime must be told on a CPU so that quantized products are fast and right."""

from __future__ import annotations

import platform
from pathlib import Path


def quantized_entries(precision: str) -> dict[str, str]:
    """Session entries for a precision.

    With weights alone quantized: to multiply in int8 (in float32, 8 bits were 10 to 45 times slower). With activations:
    sums of uint8 x int8 saturate at 16 bits where a processor has no VNNI instructions, unless asked not to; where it
    has them, asking costs 2.5 times the time. INT8 weights have a scale a column, which the product sees block by
    block: blocks of 128 take 12 to 20% less time than ORT's 32, for a mean KL of 1.6e-4 instead of 1.2e-4.
    """
    if precision == "int8":
        return {} if _has_vnni() else {"session.x64quantprecision": "1"}
    blocks = {"session.qdq_matmulnbits_block_size": "128"} if precision == "int8-weight-only" else {}
    return {"session.qdq_matmulnbits_accuracy_level": "4"} | blocks


def _has_vnni() -> bool:
    """Whether int8 products cannot saturate; False where that is not known. Only x86 has the problem."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
