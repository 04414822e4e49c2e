"""Compensated rounding of int4 weights (GPTQ): products lose less by it than by rounding to nearest."""

from __future__ import annotations

import numpy as np

from lrt_deploy.bundle.precisions import FORMATS
from lrt_deploy.bundle.weights import StoredMatrix
from lrt_deploy.exporters.quantize.gptq import round_by_gptq
from lrt_deploy.exporters.quantize.qdq import quantized, weight_scales

INT4 = FORMATS["int4-weight-only"]


def dequantized(scales, integers, kind):
    return StoredMatrix("matrix", "int", integers, scales, kind.block).dequantized()


def rounded(weight, kind):
    scales = weight_scales(weight, kind)
    return dequantized(scales, quantized(weight, scales, kind), kind)


def matrix(rows=64, columns=24, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def moment(rows=64, seed=1):
    """Of strongly correlated inputs."""
    x = np.random.default_rng(seed).normal(size=(500, 12)) @ np.random.default_rng(seed + 1).normal(size=(12, rows))
    x += 0.1 * np.random.default_rng(seed + 2).normal(size=x.shape)
    return x.T @ x


def cost(weight, approximation, moment):
    error = (approximation - weight).astype(np.float64)
    return float(np.einsum("kn,kl,ln->", error, moment, error))


def test_compensated_rounding_costs_the_product_less_than_rounding_to_nearest():
    weight, seen = matrix(), moment()
    ours = dequantized(*round_by_gptq(weight, seen, INT4), INT4)
    assert cost(weight, ours, seen) < 0.5 * cost(weight, rounded(weight, INT4), seen)
    assert np.abs(ours - weight).sum() > np.abs(rounded(weight, INT4) - weight).sum()  # and the matrix itself more


def test_inputs_that_are_not_correlated_leave_nothing_to_make_up_for():
    weight = matrix()
    scales, integers = round_by_gptq(weight, np.eye(64), INT4)
    expected = weight_scales(weight, INT4)
    assert (scales == expected).all()
    assert (integers.astype(int) == quantized(weight, expected, INT4).astype(int)).all()
    assert np.abs(integers.astype(int)).max() <= INT4.largest


def test_inputs_that_were_never_seen_are_rounded_to_nearest():
    weight = matrix()
    assert (dequantized(*round_by_gptq(weight, np.zeros((64, 64)), INT4), INT4) == rounded(weight, INT4)).all()
