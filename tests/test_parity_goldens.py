"""Parity on real models: a golden passes against its bundle, and one changed weight does not.

Where no bundle is needed, a golden's reference is compared with itself.
"""

from __future__ import annotations

import dataclasses

import pytest

from lrt_deploy.evaluation.verdict import compare
from lrt_deploy.tolerances import FP32

slow = pytest.mark.slow

GOLDEN = "mr_gqa_SSSL"


def run(decoder, reference, prompt, steps, checkpoint_matches=None, **reading):
    return compare(
        reference,
        decoder,
        prompt,
        steps,
        precision="fp32",
        checkpoint_matches=checkpoint_matches,
        backend="ort-cpu",
        **reading,
    )


@pytest.fixture(scope="module")
def golden(golden_of):
    return golden_of(GOLDEN)


@pytest.fixture(scope="module")
def checkpoint(golden):
    torch = pytest.importorskip("torch")
    from lrt_deploy.model.checkpoint import open_checkpoint

    torch.set_num_threads(1)
    return open_checkpoint(golden.folder)


def scaled(tensor, factor):
    """The same tensor, multiplied when it is read."""
    return dataclasses.replace(tensor, load=lambda: tensor.load() * factor)


def reference_of(checkpoint, factors=None):
    """The reference with some of the checkpoint's matrices multiplied by a factor."""
    from lrt_deploy.model.reference import ReferenceDecoder

    changed = {name: scaled(checkpoint.tensors[name], factor) for name, factor in (factors or {}).items()}
    model = dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, **changed}).model()
    return ReferenceDecoder(model, max_seq_len=128)


def roll_out(reference, decoder, golden, steps=64):
    prompt, continuation = golden.greedy_runs()[0]
    return run(decoder, reference, prompt, steps), continuation


@pytest.mark.parametrize(
    "weight",
    [
        "interleaved_key_projections.2.W_v.weight",  # of all matrices, 1% of this one shows least: 6e-3
        "interleaved_projections.0.W_v.weight",
        "transformer.h.1.attn.triple_gate.weight",
        "transformer.h.3.mlp.c_fc.weight",
        "lm_head.weight",
    ],
)
def test_one_percent_of_one_matrix_fails_and_the_verdict_says_where_and_how_much(weight, checkpoint, golden):
    report, _ = roll_out(reference_of(checkpoint, {weight: 1.01}), reference_of(checkpoint), golden, steps=32)
    worst = max(report.points, key=lambda point: point.logit_error)
    assert not report.passed
    assert f"logits differ by {worst.logit_error:.1e} at position {worst.position} (limit 1.0e-04" in report.verdict
    assert worst.logit_error > 30 * FP32.max_abs_logit_error


def test_a_change_of_a_matrix_that_is_none_of_the_function_passes(checkpoint, golden):
    changed = reference_of(checkpoint, {"transformer.h.1.attn.c_q.weight": 1.01})  # queries are normed
    assert roll_out(changed, reference_of(checkpoint), golden, steps=32)[0].passed


@slow
def test_a_bundle_passes_against_its_checkpoint(checkpoint, golden, decoder_of):
    report, continuation = roll_out(reference_of(checkpoint), decoder_of(GOLDEN), golden)
    assert report.passed, report.verdict
    assert report.verdict.startswith("PASS: 64 of 64 greedy tokens equal, max KL ")
    assert [point.decoder_token for point in report.points[15:-1]] == continuation
    assert 0 < report.max_abs_logit_error < FP32.max_abs_logit_error / 5
    assert 0 < report.max_abs_latent_error < FP32.max_abs_latent_error / 5
    assert 0 < report.max_kl < 1e-10
    assert report.top1_agreement == 1.0


@slow
def test_a_bundle_fails_against_a_checkpoint_with_one_changed_matrix(checkpoint, golden, decoder_of):
    changed = reference_of(checkpoint, {"interleaved_key_projections.1.W_v.weight": 1.01})
    report, _ = roll_out(changed, decoder_of(GOLDEN), golden)
    assert not report.passed
    assert "first exceeded at position 1)" in report.verdict  # at position 0 there is no memory yet


@slow
def test_the_same_weights_saved_again_pass(checkpoint, golden, decoder_of, tmp_path):
    from random_models import write_native

    from lrt_deploy.model.checkpoint import open_checkpoint

    write_native(checkpoint.model(), tmp_path)
    again = open_checkpoint(tmp_path)
    matches = again.sha256 == decoder_of(GOLDEN).manifest.provenance["checkpoint"]["sha256"]
    prompt, _ = golden.greedy_runs()[0]
    report = run(decoder_of(GOLDEN), reference_of(again), prompt, 16, checkpoint_matches=matches)
    assert (report.checkpoint_matches, report.passed) == (False, True)


@slow
def test_a_plain_model_passes(golden_of, decoder_of):
    from lrt_deploy.model.reference import ReferenceDecoder

    plain = golden_of("baseline_ve")
    report, _ = roll_out(ReferenceDecoder(plain.model(), 128), decoder_of("baseline_ve"), plain)
    assert report.passed, report.verdict
    assert report.max_abs_latent_error is None


@slow
def test_a_long_prompt_is_read_by_iteration_and_checked_beside_the_rollout(checkpoint, golden, decoder_of):
    prompt, continuation = golden.greedy_runs()[0]
    reading = {"prefill": "fixed-point", "tolerance": 0.1}  # a random model contracts badly
    report = run(decoder_of(GOLDEN), reference_of(checkpoint), prompt + continuation, 8, **reading)
    assert report.passed, report.verdict
    assert report.prefill.policy == "fixed-point"
    assert report.prefill.passes > 1
    assert report.prefill.max_abs_latent_error <= report.prefill.residual + FP32.max_abs_latent_error
    assert report.max_abs_logit_error < FP32.max_abs_logit_error / 5  # the rollout knows nothing of it
