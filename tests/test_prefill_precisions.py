"""Iterated prompts where a precision rounds activations: reading ends at the noise of rounding, and not above it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import lrt_deploy
from lrt_deploy.bundle.precisions import PRECISIONS, QUANTIZED
from lrt_deploy.evaluation.rollout import kl_divergence
from lrt_deploy.runtime.fixed_point import SweepOptions, above_noise, finish, noisy_error_bound, read_row
from lrt_deploy.runtime.prefill import PrefillOptions
from lrt_deploy.tolerances import limits, prefill_limits

FOLLOWING = 16
ROUNDED = {"noise": 0.15, "noise_rms": 1e-2}


@pytest.fixture(scope="module", params=QUANTIZED)
def decoder(request, in_every_precision):
    with lrt_deploy.open_decoder(in_every_precision("demo"), precision=request.param, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def prompts(golden_of):
    """Held-out text of three lengths, with what follows, and random tokens."""
    text = golden_of("demo").arrays["bpb_x"].reshape(-1)
    parts = [text[:40], text[300 : 300 + 120], text[600 : 600 + 230]]
    return [*parts, np.random.default_rng(0).integers(0, int(text.max()), 150)]


def follow(decoder, ids, prompt_tokens, **options):
    """The state after the prompt, and the logits (1 + FOLLOWING, V) over it and what follows."""
    state = decoder.prefill([ids[:prompt_tokens].tolist()], **options)
    report, logits = state.prefill, [state.logits[0].astype(np.float64)]
    logits += [decoder.step(state, [token])[0].astype(np.float64) for token in ids[prompt_tokens:].tolist()]
    return report, np.stack(logits)


def mean_kl(expected, found):
    return float(np.mean([kl_divergence(a, b) for a, b in zip(expected, found, strict=True)]))


def options_of(decoder, **changes):
    bounds = prefill_limits(decoder.precision)
    return replace(SweepOptions(), noise=bounds.noise, noise_rms=bounds.noise_rms, **changes)


def read_directly(decoder, ids, tolerance, options):
    return finish(read_row(decoder._backend.allocate(1), 0, ids, 0, tolerance, options))


def test_a_prompt_at_its_noise_has_converged_and_leads_to_the_same_tokens(decoder, prompts):
    bounds, kls = prefill_limits(decoder.precision), []
    for ids in prompts:
        count = len(ids) - FOLLOWING
        _, expected = follow(decoder, ids, count, policy="stepwise")
        report, found = follow(decoder, ids, count, policy="fixed-point")
        assert (report.policy, report.note) == ("fixed-point", None)
        assert bounds.noise <= report.residual <= bounds.default
        kls.append(mean_kl(expected, found))
        best = np.sort(expected, axis=1)
        clear = best[:, -1] - best[:, -2] > limits(decoder.precision).near_tie_margin
        assert clear.any()
        assert (expected.argmax(1) == found.argmax(1))[clear].all()
    assert np.mean(kls) <= bounds.mean_kl


def test_one_pass_less_than_needed_is_beyond_the_limit_of_kl(decoder, prompts):
    """So that the limit can fail: zero memory, one pass, leads to other tokens."""
    kls = []
    for ids in prompts:
        count = len(ids) - FOLLOWING
        expected, found = (follow(decoder, ids, count, policy=policy)[1] for policy in ("stepwise", "zero"))
        kls.append(mean_kl(expected, found))
    assert np.mean(kls) > 5 * prefill_limits(decoder.precision).mean_kl


def test_the_stated_residual_is_not_below_the_error_of_any_latent(decoder, prompts):
    for ids in prompts:
        truth = read_directly(decoder, ids, None, options_of(decoder))
        found = read_directly(decoder, ids, prefill_limits(decoder.precision).default, options_of(decoder))
        assert found.fallback is None
        assert np.abs(found.latents - truth.latents).max() <= found.residual


def test_changes_that_stay_above_the_stated_noise_are_no_convergence(decoder, prompts):
    """As in a model that is noisier than those that were measured: the prompt is finished stepwise, exactly."""
    ids, bounds = prompts[2], prefill_limits(decoder.precision)
    truth = read_directly(decoder, ids, None, options_of(decoder))
    options = replace(options_of(decoder), noise_rms=bounds.noise_rms / 20)
    found = read_directly(decoder, ids, bounds.default, options)
    assert found.fallback is not None and "too slowly" in found.fallback
    assert found.computed < 12 * len(ids)
    assert np.abs(found.latents - truth.latents).max() <= max(found.residual, bounds.noise)


def test_a_larger_tolerance_reads_no_less_exactly_than_the_noise(decoder, prompts):
    ids, default = prompts[1], prefill_limits(decoder.precision).default
    first, second = (read_directly(decoder, ids, tolerance, options_of(decoder)) for tolerance in (default, 9.0))
    assert second.computed <= first.computed
    assert second.residual <= 2 * default


def test_reading_ends_at_the_noise_in_quantized_precisions_alone():
    for precision in PRECISIONS:
        bounds = prefill_limits(precision)
        assert (bounds.noise_rms > 0) == (precision in QUANTIZED)
        assert bounds.noise_rms <= bounds.noise / 10
    assert SweepOptions().noise_rms == 0


def test_auto_iterates_by_precision_as_well_as_by_size(in_every_precision):
    found = {}
    for precision in ("fp32", *QUANTIZED):
        with lrt_deploy.open_decoder(in_every_precision("demo"), precision=precision) as decoder:
            below = decoder.prefill_options.stepwise_below
            for count in (below - 1, below):
                if count <= decoder.max_seq_len:
                    report = decoder.prefill([[1] * count]).prefill
                    assert report.policy == ("stepwise" if count < below else "fixed-point")
                    assert report.stepwise_below == below
            found[precision] = below
            decoder.prefill_options = PrefillOptions(stepwise_below=7)
            assert decoder.prefill_options.stepwise_below == 7
    assert found["fp32"] > 2048  # steps of a small model are as quick as its passes
    assert found["int8"] < found["int8-weight-only"] < 256


# The estimate, on changes that are made up


def changes_of(q, sweeps, noise, rng, size=2000, outliers=8.0):
    """Largest and root-mean-square changes of one block, and the error left after each, max abs."""
    shape = rng.standard_normal(size) * np.where(rng.random(size) < 0.01, outliers, 1.0)
    shape /= np.sqrt(np.mean(shape**2))
    rounding = [noise * rng.standard_normal(size) / math.sqrt(2) for _ in range(sweeps + 1)]
    read = [q**k * shape + rounding[k] for k in range(sweeps + 1)]
    steps = [b - a for a, b in pairwise(read)]
    largest = [float(np.abs(step).max()) for step in steps]
    rms = [float(np.sqrt(np.mean(step**2))) for step in steps]
    return largest, rms, [float(np.abs(each).max()) for each in read[1:]]


@pytest.mark.parametrize("q", [0.05, 0.2, 0.4, 0.6])
@pytest.mark.parametrize("noise_rms", [1e-3, 1e-2, 3e-2])
def test_the_bound_holds_and_is_reached_wherever_changes_shrink_to_noise(q, noise_rms):
    rng = np.random.default_rng(1)
    largest, rms, errors = changes_of(q, 20, noise_rms, rng)
    bounds = [noisy_error_bound(largest[:n], rms[:n], 1, 10 * noise_rms, noise_rms) for n in range(1, 21)]
    assert all(error <= bound for error, bound in zip(errors, bounds, strict=True))
    assert math.isinf(bounds[0])
    assert bounds[-1] <= 20 * noise_rms


def test_the_bound_is_infinite_until_what_is_missing_is_noise():
    assert noisy_error_bound([1.0, 0.5], [0.1, 0.05], 2, **ROUNDED) == math.inf  # one sweep alone has no ratio
    assert noisy_error_bound([5.0, 0.9], [1.0, 0.5], 1, **ROUNDED) == math.inf  # half of 0.5 and more is to come
    assert noisy_error_bound([5.0, 5.0], [1.0, 1.0], 1, **ROUNDED) == math.inf  # does not contract
    assert noisy_error_bound([5.0, 0.1], [1.0, 1e-2], 1, **ROUNDED) == 0.15  # nothing but noise
    assert noisy_error_bound([0.0, 0.0], [0.0, 0.0], 1, **ROUNDED) == 0.15
    assert not noisy_error_bound([5.0, math.nan], [1.0, math.nan], 1, **ROUNDED) <= 9e9
    assert above_noise([1e-3, 5e-2], 3e-2) == [0.0, pytest.approx(4e-2)]
