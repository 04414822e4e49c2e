"""The part `arithmetic` of parity: whether a quantized bundle computes right with the weights that it stores.

Two comparisons with PyTorch on the dequantized weights, position by position over the tokens of the rollout. At every
position both sides start from the same latent, so no error travels on through the recurrence.

- The graph as it stands, in float32 and without activations rounded to int8 (`exporters.exact_graph`): equal up to
  float32's noise, whatever the precision. The reference's latents are given.
- The decoder that ran, with the kernels that it has. It decoded token by token; the latents given are its own. Kernels
  round: their limits are measured for each precision. Where activations are rounded to int8, PyTorch rounds them alike.

Knows arrays only: no torch, no graphs and no backend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lrt_deploy.tolerances import FP32, KernelLimits
from lrt_deploy.types import FloatArray


@dataclass(frozen=True)
class ForcedErrors:
    """One comparison: largest absolute errors, the typical one (median over positions of the largest), and where.

    `first_exceeded` is the first position beyond a limit.
    """

    max_abs_logit_error: float
    max_abs_latent_error: float
    typical_logit_error: float
    worst_position: int
    first_exceeded: int | None
    limit_logit: float
    limit_latent: float
    limit_typical: float

    @property
    def passed(self) -> bool:
        """Whether all three lie within their limits."""
        return (
            self.max_abs_logit_error <= self.limit_logit
            and self.max_abs_latent_error <= self.limit_latent
            and self.typical_logit_error <= self.limit_typical
        )

    def fault(self, what: str) -> str | None:
        """What is beyond a limit, in words; None if nothing is."""
        if self.passed:
            return None
        where = f"at position {self.worst_position}"
        if self.first_exceeded is not None and self.first_exceeded != self.worst_position:
            where += f", first exceeded at position {self.first_exceeded}"
        return (
            f"{what} is off from PyTorch on the stored weights: logits by {self.max_abs_logit_error:.1e} (limit "
            f"{self.limit_logit:.1e}), typically {self.typical_logit_error:.1e} (limit {self.limit_typical:.1e}), "
            f"latent by {self.max_abs_latent_error:.1e} (limit {self.limit_latent:.1e}), {where}"
        )


@dataclass(frozen=True)
class ArithmeticPart:
    """The part of the verdict. `max_abs_logit_error` is the graph's; `kernels` what the decoder that ran is off by.

    `fault` says what is off in words, None where nothing is.
    """

    passed: bool
    line: str
    max_abs_logit_error: float
    graph: ForcedErrors
    kernels: ForcedErrors | None = None
    fault: str | None = None


Computed = tuple[FloatArray, FloatArray]  # logits (T, V) and latents (T, C), or (T, 0) without memory


def judge_arithmetic(
    graph: tuple[Computed, Computed],
    kernels: tuple[Computed, Computed] | None,
    limits: KernelLimits,
    scale_fault: str | None = None,
) -> ArithmeticPart:
    """Judge pairs of (found, expected): the graph's, by float32's limits, and the decoder's, by its kernels'.

    `kernels` None: nothing ran. `scale_fault` is what `activation_scale_fault` found.
    """
    exact = forced_errors(*graph, KernelLimits(FP32.max_abs_logit_error, FP32.max_abs_latent_error, math.inf))
    ran = None if kernels is None else forced_errors(*kernels, limits)
    faults = (scale_fault, exact.fault("the graph"), None if ran is None else ran.fault("the decoder"))
    fault = next((fault for fault in faults if fault), None)
    line = f"arithmetic: {fault}"
    if fault is None:
        line = f"arithmetic: the graph within {exact.max_abs_logit_error:.1e} (limit {exact.limit_logit:.1e})"
        line += " of PyTorch on the stored weights, "
        if ran is None:
            line += "and nothing was decoded"
        else:
            line += f"the kernels that run within {ran.max_abs_logit_error:.1e} (limit {ran.limit_logit:.1e})"
    return ArithmeticPart(fault is None, line, exact.max_abs_logit_error, exact, ran, fault)


def forced_errors(found: Computed, expected: Computed, limits: KernelLimits) -> ForcedErrors:
    """Errors of logits (T, V) and latents (T, C); what is not finite is off by inf."""
    logits, latents = (_largest(one, other) for one, other in zip(found, expected, strict=True))  # (T) each
    beyond = np.flatnonzero((logits > limits.logit) | (latents > limits.latent))
    return ForcedErrors(
        max_abs_logit_error=float(logits.max()),
        max_abs_latent_error=float(latents.max()),
        typical_logit_error=float(np.median(logits)),
        worst_position=int(logits.argmax()),
        first_exceeded=int(beyond[0]) if beyond.size else None,
        limit_logit=limits.logit,
        limit_latent=limits.latent,
        limit_typical=limits.typical,
    )


def activation_scale_fault(found: Mapping[str, float], stated: Mapping[str, float]) -> str | None:
    """What the graph's int8 scales are other than those that calibration gave, which the manifest states."""
    for name in [*stated, *found]:
        if name not in found:
            return f"the input of {name} is not rounded to int8, as the manifest says"
        if name not in stated:
            return f"the input of {name} is rounded to int8, and the manifest says nothing of it"
        expected = float(np.float16(stated[name]))
        if found[name] != expected:
            return f"the input of {name} is rounded in steps of {found[name]:.6g}, and the manifest says {expected:.6g}"
    return None


def _largest(found: FloatArray, expected: FloatArray) -> FloatArray:
    """(T) the largest absolute difference of each row; zeros where rows are empty."""
    difference = np.abs(found.astype(np.float64) - expected)
    result: FloatArray = np.nan_to_num(difference.max(axis=1, initial=0.0), nan=np.inf, posinf=np.inf)
    return result
