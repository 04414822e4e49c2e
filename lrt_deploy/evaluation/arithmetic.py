"""Judge the part `arithmetic` of parity: whether a quantized bundle computes right with the weights that it stores.

Two comparisons with PyTorch on the dequantized weights, over the tokens of the rollout. At every position both sides
start from the same latent, so that no error accumulates:

- the graph in float32, without activations rounded to int8, from the reference's latents: within float32's noise;
- the decoder that ran, from its own latents: within the measured limits of its kernels.
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
    """Errors of one comparison, maxima of absolute differences; the typical one is the median over positions.

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
        """Whether all three errors lie within their limits."""
        return (
            self.max_abs_logit_error <= self.limit_logit
            and self.max_abs_latent_error <= self.limit_latent
            and self.typical_logit_error <= self.limit_typical
        )

    def fault(self, side: str) -> str | None:
        """A clause that says what is beyond a limit; None if nothing is."""
        if self.passed:
            return None
        where = f"at position {self.worst_position}"
        if self.first_exceeded is not None and self.first_exceeded != self.worst_position:
            where += f", first exceeded at position {self.first_exceeded}"
        return (
            f"{side} is off from PyTorch on the stored weights: logits by {self.max_abs_logit_error:.1e} (limit "
            f"{self.limit_logit:.1e}), typically {self.typical_logit_error:.1e} (limit {self.limit_typical:.1e}), "
            f"latent by {self.max_abs_latent_error:.1e} (limit {self.limit_latent:.1e}), {where}"
        )


@dataclass(frozen=True)
class ArithmeticPart:
    """The part `arithmetic` of a verdict. `max_abs_logit_error` is the graph's; `kernels` are the decoder's errors.

    `fault` says what is wrong; None where nothing is.
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
    """Judge pairs of (found, expected): the graph's by float32's limits, the decoder's by those of its kernels.

    `kernels` is None where nothing ran; `scale_fault` is the result of `activation_scale_fault`.
    """
    exact = forced_errors(*graph, KernelLimits(FP32.max_abs_logit_error, FP32.max_abs_latent_error, math.inf))
    ran = None if kernels is None else forced_errors(*kernels, limits)
    fault = scale_fault or exact.fault("the graph") or (None if ran is None else ran.fault("the decoder"))
    decoded = "and nothing was decoded"
    if ran is not None:
        decoded = f"the kernels that run within {ran.max_abs_logit_error:.1e} (limit {ran.limit_logit:.1e})"
    right = (
        f"the graph within {exact.max_abs_logit_error:.1e} (limit {exact.limit_logit:.1e}) of PyTorch on the stored "
        f"weights, {decoded}"
    )
    return ArithmeticPart(fault is None, f"arithmetic: {fault or right}", exact.max_abs_logit_error, exact, ran, fault)


def forced_errors(found: Computed, expected: Computed, limits: KernelLimits) -> ForcedErrors:
    """Errors of logits (T, V) and latents (T, C); inf for numbers that are not finite."""
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
    """How the graph's int8 scales differ from those that the manifest states; None where they do not."""
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
    """(T) the largest absolute difference of each row; zeros for empty rows."""
    difference = np.abs(found.astype(np.float64) - expected)
    result: FloatArray = np.nan_to_num(difference.max(axis=1, initial=0.0), nan=np.inf, posinf=np.inf)
    return result
