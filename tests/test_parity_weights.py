"""The part `weights` on single matrices: what rounding may do passes, and the next number beyond it fails."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from lrt_deploy.bundle.precisions import FORMATS
from lrt_deploy.bundle.weights import StoredMatrix
from lrt_deploy.evaluation.stored_weights import check_matrix
from lrt_deploy.evaluation.verdict import activation_scale_fault, forced_errors, judge_arithmetic
from lrt_deploy.exporters.quantize.gptq import round_by_gptq
from lrt_deploy.exporters.quantize.qdq import quantized, weight_scales
from lrt_deploy.tolerances import (
    FP32,
    GPTQ_COLUMN,
    GPTQ_MATRIX,
    GPTQ_ROW,
    ROUNDING_STEPS,
    KernelLimits,
    kernel_limits,
)

BLOCK = {"int8": None, "int8-weight-only": None, "int4-weight-only": 32}


def matrix(rows=96, columns=40, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def stored(weight, precision):
    kind = FORMATS.get(precision)
    scales = weight_scales(weight, kind)
    dtype = "int4" if kind.bits == 4 else "int8"
    return StoredMatrix("m", dtype, quantized(weight, scales, kind).astype(np.int8), scales, BLOCK[precision])


@pytest.mark.parametrize("precision", BLOCK)
@pytest.mark.parametrize("seed", range(5))
def test_the_rounding_of_a_matrix_passes_and_half_a_step_is_all_that_it_needs(precision, seed):
    weight = matrix(seed=seed)
    found = check_matrix(stored(weight, precision), weight, precision)
    assert found.passed, found.fault
    assert 0.4 < found.found <= ROUNDING_STEPS == found.allowed


@pytest.mark.parametrize("precision", BLOCK)
def test_a_scale_off_by_one_code_fails_wherever_it_is(precision):
    weight = matrix()
    right = stored(weight, precision)
    for at in np.ndindex(right.scales.shape):
        for toward in (0, np.inf):
            scales = right.scales.copy()
            scales[at] = np.nextafter(scales[at], np.float16(toward))
            wrong = check_matrix(dataclasses.replace(right, scales=scales), weight, precision)
            assert not wrong.passed and "the scale of column" in wrong.fault


@pytest.mark.parametrize("precision", BLOCK)
def test_an_integer_off_by_one_fails_and_is_named(precision):
    weight = matrix()
    right = stored(weight, precision)
    values = right.values.copy()
    values[50, 7] += -1 if values[50, 7] > 0 else 1
    wrong = check_matrix(dataclasses.replace(right, values=values), weight, precision)
    assert wrong.fault.startswith("row 50, column 7 is ")


def test_a_change_of_less_than_half_a_step_is_found_when_it_changes_an_integer_and_only_then():
    weight = matrix()
    right = stored(weight, "int8")
    steps = weight / right.steps()
    inside = np.abs(steps - np.rint(steps)) < 0.3  # such a weight may move by 0.2 steps and round alike
    inside &= np.abs(steps) < 100  # and is not what its column's scale comes from
    moved = np.where(inside, weight + 0.19 * right.steps(), weight).astype(np.float32)
    assert check_matrix(stored(moved, "int8"), weight, "int8").passed
    assert not check_matrix(stored((weight + right.steps()).astype(np.float32), "int8"), weight, "int8").passed


@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1.0, 300.0])
def test_very_small_and_large_weights_and_columns_of_zeros_pass(scale):
    weight = matrix() * np.float32(scale)
    weight[:, 3] = 0
    for precision in BLOCK:
        assert check_matrix(stored(weight, precision), weight, precision).passed


@pytest.mark.parametrize(
    ("precision", "dtype", "kind"),
    [("fp32", "float32", np.float32), ("fp16", "float16", np.float16), ("bf16", "bfloat16", ml_dtypes.bfloat16)],
)
def test_floats_are_the_nearest_of_their_type_and_the_next_one_fails(precision, dtype, kind):
    weight = matrix()
    right = StoredMatrix("m", dtype, weight.astype(kind))
    assert check_matrix(right, weight, precision).passed
    values = right.values.copy()
    values[4, 5] = np.nextafter(values[4, 5], np.array(np.inf, kind))
    wrong = check_matrix(dataclasses.replace(right, values=values), weight, precision)
    assert not wrong.passed and wrong.fault.startswith("row 4, column 5 is ")
    values[4, 5] = np.nan
    assert not check_matrix(dataclasses.replace(right, values=values), weight, precision).passed


def test_fewer_bits_than_the_precision_promises_fail():
    weight = matrix()
    half = StoredMatrix("m", "float16", weight.astype(np.float16))
    assert not check_matrix(half, weight, "fp32").passed
    assert not check_matrix(StoredMatrix("m", "bfloat16", weight.astype(ml_dtypes.bfloat16)), weight, "fp16").passed
    exact = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert check_matrix(StoredMatrix("m", "bfloat16", weight.astype(ml_dtypes.bfloat16)), exact, "fp32").passed


def gptq(weight, seed=1):
    rows = len(weight)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(500, 24)) @ rng.normal(size=(24, rows)) + 0.3 * rng.normal(size=(500, rows))
    scales, integers = round_by_gptq(weight, x.T @ x, FORMATS["int4-weight-only"])
    return StoredMatrix("m", "int4", integers.astype(np.int8), scales, 32)


def test_compensated_rounding_passes_by_limits_of_its_own_only():
    weight = matrix()
    found = gptq(weight)
    assert not check_matrix(found, weight, "int4-weight-only").passed
    assert check_matrix(found, weight, "int4-weight-only", compensated=True).passed


@pytest.mark.parametrize(
    "fault",
    [
        lambda w: w * np.float32(1.01),
        lambda w: np.roll(w, 1, axis=0),
        lambda w: np.roll(w, 1, axis=1),
        lambda w: np.concatenate([w[:32], np.roll(w[32:], 1, axis=0)]),  # not in the first block
        lambda w: matrix(seed=9),
    ],
)
def test_a_faulty_matrix_fails_compensated_too(fault):
    weight = matrix()
    assert not check_matrix(gptq(fault(weight)), weight, "int4-weight-only", compensated=True).passed


def test_limits_of_gptq_lie_below_what_another_matrix_is_off_by():
    assert max(GPTQ_MATRIX, GPTQ_ROW, GPTQ_COLUMN) < 2**0.5


# The part `arithmetic`


def computed(error=0.0, latent=0.0, at=3):
    logits, latents = np.zeros((8, 5), np.float32), np.ones((8, 4), np.float32)
    logits[at, 1] += error
    latents[at, 2] += latent
    return logits, latents


def test_arithmetic_passes_at_its_limits_and_fails_beyond_them():
    limits = kernel_limits("int4-weight-only")
    exact = FP32.max_abs_logit_error
    right = judge_arithmetic((computed(0.9 * exact), computed()), (computed(0.9 * limits.logit), computed()), limits)
    assert right.passed and right.max_abs_logit_error == pytest.approx(0.9 * exact)
    graph = judge_arithmetic((computed(1.1 * exact), computed()), (computed(), computed()), limits)
    assert not graph.passed and "the graph is off" in graph.line and "at position 3" in graph.line
    kernels = judge_arithmetic((computed(), computed()), (computed(latent=1.1 * limits.latent), computed()), limits)
    assert not kernels.passed and "the decoder is off" in kernels.line and kernels.kernels.first_exceeded == 3
    nan = judge_arithmetic((computed(np.nan), computed()), (computed(), computed()), limits)
    assert not nan.passed


def test_small_errors_everywhere_fail_where_a_large_one_may_stand_alone():
    limits = KernelLimits(logit=1.0, latent=1.0, typical=0.1)
    one, every = computed(0.9), (np.full((8, 5), 0.2, np.float32), np.ones((8, 4), np.float32))
    assert forced_errors(one, computed(), limits).passed
    assert not forced_errors(every, computed(), limits).passed


def test_int8_steps_of_the_graph_are_those_of_the_manifest():
    stated = {"a": 0.1, "b": 0.2}
    found = {name: float(np.float16(step)) for name, step in stated.items()}
    assert activation_scale_fault(found, stated) is None
    assert "the input of b is rounded in steps of" in activation_scale_fault(found | {"b": 0.25}, stated)
    assert "is not rounded" in activation_scale_fault({"a": found["a"]}, stated)
    assert "the manifest says nothing" in activation_scale_fault(found | {"c": 0.1}, stated)


def test_an_engine_is_allowed_the_noise_of_float16_as_well():
    for precision in ("fp16", "int8", "int8-weight-only", "int4-weight-only"):
        full, half = kernel_limits(precision), kernel_limits("fp16")
        assert full.logit >= half.logit and full.latent >= half.latent
