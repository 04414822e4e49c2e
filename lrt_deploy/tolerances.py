"""Every numeric limit of comparisons, with the measured value and the reason.

All errors are maxima of absolute differences. Logits are softly capped to +-15 and latents are RMS-normed, so absolute
bounds mean the same for every model. Measured on the goldens (eight random models and a trained one of 6 layers), 250
to 300 tokens of rollout each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from .errors import ParityError

T = TypeVar("T")


@dataclass(frozen=True)
class ParityLimits:
    """Limits of the differences between decoder and reference, fed the same tokens, each with its own state.

    `max_abs_cache_error` bounds prefill that states no residual, against decoding. A first divergence at a position
    where the reference's best two logits are within `near_tie_margin` is a near tie and no fault. `top1_agreement` is
    the smallest share of positions with the same first choice, None where the function must be the same. Where it is
    given, mean KL and that share are judged, tokens may part, and the bounds on errors apply to prefill alone, compared
    with the decoder's own decoding.
    """

    max_abs_logit_error: float
    max_abs_latent_error: float
    max_abs_cache_error: float
    mean_kl: float
    near_tie_margin: float
    top1_agreement: float | None = None


# Between correct float32 implementations (ORT, the reference, the same in float64): logits up to 1.6e-5, latent up to
# 4.8e-6, caches up to 4.3e-6, KL up to 7e-12. The smallest effect that 1% more in one weight matrix has: logits 4e-3
# (all memory lambdas; one K memory projection: 5e-3 to 4e-2), latent 1.5e-3. So both limits lie 6 to 10 times above
# the noise and 30 to 40 times below the smallest fault. (1% more in all of c_q or wte is no fault: norms undo it.)
_FP32_LOGIT_ERROR = 1e-4
FP32 = ParityLimits(
    max_abs_logit_error=_FP32_LOGIT_ERROR,
    max_abs_latent_error=5e-5,
    max_abs_cache_error=5e-5,
    # Logits within e of each other bound KL by e^2 / 2 = 5e-9, so this can only fail together with the logits.
    mean_kl=1e-8,
    # Two logits that are each off by up to the limit can change places when they are closer than twice that.
    near_tie_margin=2 * _FP32_LOGIT_ERROR,
)


# Bisecting compares an activation of one step, both sides given the same state, relative to its largest number.
# Between ORT and the reference in float32: up to 3e-6 (all activations, all goldens). 1% in one matrix shows by 1e-3.
ACTIVATION_ERROR = 2e-5


def _quality(mean_kl: float, top1_agreement: float, latent: float) -> ParityLimits:
    """Limits of a precision that is judged by quality; `latent` bounds the difference between two ways of prefill."""
    return ParityLimits(
        max_abs_logit_error=2 * latent,  # measured: up to 1.0 times
        max_abs_latent_error=latent,
        max_abs_cache_error=10 * latent,  # measured: up to 5 times; values are not normed and reach 140
        mean_kl=mean_kl,
        near_tie_margin=2 * latent,
        top1_agreement=top1_agreement,
    )


# Measured on ONNX Runtime's CPU provider against the reference, trained golden and demo checkpoint, text and made-up
# tokens (`benchmarks/precisions.py` and docs/precisions.md): mean KL up to 8.9e-7 in fp16, 3.2e-3 in W8A8, 4.6e-4 and
# 4.8e-2 with int8 and int4 weights alone; equal first choices from 99.9%, 95.9%, 97.8% and 87.1% on (int4 on made-up
# tokens, which have no margins: 77%, beyond its limit). A forgotten memory has a mean KL of 0.12 to 0.17 and 76 to 82%;
# 10% more in one MLP matrix has 1.9e-4, so fp16 tells it and int8 cannot.
# bf16 runs on GPUs only: 64 times fp16's KL, for 3 bits less, not measured.
_PARITY = {
    "fp32": FP32,
    "fp16": _quality(mean_kl=1e-5, top1_agreement=0.98, latent=2e-2),
    "bf16": _quality(mean_kl=6e-4, top1_agreement=0.95, latent=0.16),
    "int8": _quality(mean_kl=1e-2, top1_agreement=0.9, latent=1.0),
    "int8-weight-only": _quality(mean_kl=2e-3, top1_agreement=0.93, latent=0.25),
    "int4-weight-only": _quality(mean_kl=0.1, top1_agreement=0.8, latent=0.25),
}


# A model whose best two logits are this near to one another in the median hardly prefers any token, so that rounding
# changes its first choices often. It decides words of the verdict alone. Measured on the reference over prompt and
# greedy tokens: 47 of 48 random models 0.14 to 0.42, one 0.56; a model of `examples/train_tiny.py` 0.002 untrained,
# 0.11 after 10 steps, 0.46 and 0.36 after 20 and 40, 0.71 and 0.84 after 80 and 131; trained golden 0.70, demo 2.7.
# Random weights may also give logits that are not level: those of the tiny goldens are 0.44 to 0.74 apart, and as
# peaked as a trained model's (entropy 0.44 to 0.53 of ln V; random models 0.87 to 0.93, trained ones 0.22 to 0.48).
LEVEL_MARGIN = 0.5


# Weights that were rounded to nearest (`evaluation.stored_weights`); measured on goldens, the demo and random models.
# Half a step is 0.5; dividing in float32 moves a weight of up to 127 steps by 127 x 6e-8: 0.5 + 4e-6 at most.
ROUNDING_STEPS = 0.5 + 2e-5
# Relative error of a scale, which is computed in float32: three roundings, 2e-7.
SCALE_ERROR = 1e-6
# Squared error of a block, as a multiple of the smallest of all grids; two that tie in float32 differ by 1e-6.
SHARE_ERROR = 1 + 1e-4

# Matrices that GPTQ rounded: norms of the errors of a matrix, a row and a column, relative to the expected numbers'.
# Measured (`benchmarks/right_exports.py`), blocks of 32 to 128: up to 0.196 for a matrix, 1.13 for a row whose input
# calibration hardly saw (the next 0.97 and 0.48), 0.31 for a column. Another matrix, or another row, is off by
# the square root of 2. The first block's scales and its first row are held to plain rounding.
GPTQ_MATRIX, GPTQ_ROW, GPTQ_COLUMN = 0.3, 1.3, 0.5
# The least-squares factor of the whole matrix, below 1 because grids may end below the largest weight: 0.9875 to 0.993.
# 1% more in a matrix is 0.01 in it.
GPTQ_SHRUNK = 0.99


def gptq_slope(size: int) -> float:
    """Return the limit of the difference from `GPTQ_SHRUNK`, for `size` weights: the factor of few varies more."""
    return float(0.007 + 0.4 * size**-0.5)


@dataclass(frozen=True)
class KernelLimits:
    """Limits of the kernels that run, against PyTorch on the same stored weights and from the same latent.

    `logit` and `latent` bound the largest absolute errors, `typical` the median over positions of the logits' largest.
    """

    logit: float
    latent: float
    typical: float


# Measured on ONNX Runtime's CPU provider by `benchmarks/right_exports.py` and in trials before: demo, trained golden,
# 8 tiny goldens and random models, up to 6 layers and width 192, rounded to nearest and by GPTQ, each from its
# own latents, up to 320 positions. Largest errors of logits and latent, largest median: fp16 1.6e-2, 8.7e-3, 5e-3; W8A8
# 0.48, 0.12, 0.25; int8 weights 0.26, 0.11, 0.13; int4 0.27, 7.5e-2, 0.13. W8A8 is at 1e-5 until the first sum that
# lies at a rounding limit (position 8 to 274 in the demo and the trained golden); from there on the caches carry the
# difference, and it does not grow. With a memory read as zeros the demo and the trained golden are off by at least 3.5,
# 1.9 and 1.4. Limits lie 3 times above what was measured.
_KERNELS = {
    "fp16": KernelLimits(logit=5e-2, latent=3e-2, typical=2e-2),
    "int8": KernelLimits(logit=1.5, latent=0.4, typical=0.75),
    "int8-weight-only": KernelLimits(logit=0.85, latent=0.35, typical=0.4),
    "int4-weight-only": KernelLimits(logit=0.85, latent=0.35, typical=0.4),
}


def kernel_limits(precision: str) -> KernelLimits:
    """Return the limits of a precision's kernels; ParityError where none were measured."""
    return _measured(_KERNELS, precision, "kernel")


# Successive float32 passes at the fixed point itself still differ by 2e-6 to 8e-6 (max abs, latent).
FLOAT32_RESIDUAL_NOISE = 5e-6
# Below this, no float32 iteration can estimate the latent's error; the prompt is read stepwise instead.
SMALLEST_PREFILL_TOLERANCE = 1e-5
# Error of the latent (max abs, RMS 1) up to which a prompt is read by default: the largest round one at which the next
# token's KL stayed below 1e-6 on every prompt measured (docs/numerics.md).
DEFAULT_PREFILL_TOLERANCE = 1e-2


@dataclass(frozen=True)
class PrefillLimits:
    """Exactness of prefill by iteration in a precision: max abs error of the latent, whose RMS is 1.

    `noise` is the difference between passes at the fixed point, `noise_rms` the same as root mean square where the
    precision rounds activations to integers, else 0 (see `fixed_point.noisy_error_bound`), `smallest` the smallest
    tolerance to which errors can be estimated, `default` the default tolerance. `mean_kl` bounds the mean KL, in nats,
    of tokens after a prompt that was read to the default tolerance, against stepwise reading.
    """

    noise: float
    smallest: float
    default: float
    mean_kl: float
    noise_rms: float = 0.0


# Measured on the trained golden, the demo checkpoint and random models of 256/6 and 768/12, 24 to 384 tokens, up to
# sweep 9 (`benchmarks/prefill_noise.py`, docs/numerics.md): passes differ by up to 1.3e-2 in fp16, 0.15 with int8
# weights and 0.12 with int4 weights (ONNX Runtime rounds activations to int8 by block there), 0.5 in W8A8, where one
# number that falls to the other side of a rounding limit moves the latent by that. The RMS of the same differences is
# 6e-4 to 8e-4, 9.3e-3 to 1.6e-2, 7e-3 to 1.2e-2, and 2.6e-2 to 3.2e-2. Stepwise reading has this noise too: that is
# what the precision is. KL is 2 to 8 times the largest mean measured. bf16 runs on GPUs only and has 3 bits less than
# fp16: 8 times its noise and 64 times its KL, not measured.
_FP32_PREFILL = PrefillLimits(FLOAT32_RESIDUAL_NOISE, SMALLEST_PREFILL_TOLERANCE, DEFAULT_PREFILL_TOLERANCE, 1e-6)
_PREFILL = {
    "fp32": _FP32_PREFILL,
    "fp16": PrefillLimits(noise=1e-2, smallest=2e-2, default=2e-2, mean_kl=1e-5),
    "bf16": PrefillLimits(noise=8e-2, smallest=0.16, default=0.16, mean_kl=6e-4),
    "int8": PrefillLimits(noise=0.5, smallest=1.0, default=1.5, mean_kl=1e-2, noise_rms=3e-2),
    "int8-weight-only": PrefillLimits(noise=0.15, smallest=0.3, default=0.3, mean_kl=1e-3, noise_rms=1.2e-2),
    "int4-weight-only": PrefillLimits(noise=0.12, smallest=0.25, default=0.25, mean_kl=8e-4, noise_rms=9e-3),
}


def prefill_limits(precision: str) -> PrefillLimits:
    """The limits of a precision; those of fp32 for an unknown name, as fakes in tests have."""
    return _PREFILL.get(precision, _FP32_PREFILL)


# The largest number of float16, and the share of it that calibration may reach: a factor of 4 is left for other text.
FLOAT16_LARGEST = 65504.0
FLOAT16_RANGE_USED = 0.25


def limits(precision: str) -> ParityLimits:
    """Return the limits of a precision; ParityError where none were measured."""
    return _measured(_PARITY, precision, "parity")


def _measured(known: Mapping[str, T], precision: str, what: str) -> T:
    if precision not in known:
        raise ParityError(
            f"there are no {what} limits for precision {precision}; limits were measured for {', '.join(known)}"
        )
    return known[precision]
