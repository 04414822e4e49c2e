"""Parity: what is measured, when it passes, and what the verdict says.

Two fakes whose logits are given per position. Real models: test_parity_goldens.
"""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import BackendError, InputError, ParityError
from lrt_deploy.evaluation.rollout import Comparison, Point, PrefillCheck, kl_divergence
from lrt_deploy.evaluation.verdict import Drift, Evidence, compare, report_of
from lrt_deploy.tolerances import FP32, ParityLimits, limits
from lrt_deploy.types import PrefillReport

CONFIG = LRTConfig(sequence_len=8, vocab_size=4, n_layer=2, n_head=1, n_kv_head=1, n_embd=2)
PROMPT, STEPS = [3, 0, 2], 4
POSITIONS = len(PROMPT) + STEPS
# Position p prefers the token p % 4 by 2 to the next best.
LOGITS = np.array([[4.0 * (v == p % 4) + 2.0 * (v == (p + 1) % 4) for v in range(4)] for p in range(POSITIONS)])


class Fake:
    """A decoder whose logits, latents and caches are given per position, whatever it is fed."""

    def __init__(self, config=CONFIG, max_seq_len=POSITIONS):
        self.config, self.max_seq_len = config, max_seq_len
        self.logits = LOGITS.astype(np.float32)
        self.latents = np.ones((POSITIONS, 2), np.float32)
        self.fails_at = None
        # What prefill with policy auto reports and gets wrong.
        self.report = PrefillReport("stepwise", 1.0)
        self.wrong = {"logits": 0.0, "latent": 0.0, "cache": 0.0}
        self.prefill_fails = False
        self.cache_errors = {}
        self.runs = []

    def prefill(self, prompts, *, policy="auto", tolerance=None):
        (tokens,) = prompts
        if policy == "auto":
            if self.prefill_fails:
                raise BackendError("fake ran out of memory")
            return self._state(tokens, self.wrong)
        assert policy == "stepwise"
        self.runs.append(list(tokens))
        state = self._state([], {})
        for _ in tokens:
            self._advance(state)
        return state

    def step(self, state, tokens):
        self.runs[-1] += list(tokens)
        self._advance(state)
        return state.logits

    def _state(self, tokens, wrong):
        at, count = max(0, len(tokens) - 1), SimpleNamespace(tokens=len(tokens))
        caches = np.full((2, 2, 1, 1, POSITIONS, 2), 1.0 + wrong.get("cache", 0.0), np.float32)
        for (layer, kind, position), error in self.cache_errors.items():
            caches[layer, kind, 0, 0, position, 1] += error
        return SimpleNamespace(
            logits=self.logits[at : at + 1] + np.float32(wrong.get("logits", 0.0)),
            latent=self.latents[at : at + 1] + np.float32(wrong.get("latent", 0.0)),
            prefill=self.report,
            count=count,
            lengths=np.array([len(tokens)]),
            cache=lambda layer: tuple(caches[layer][:, :, :, : count.tokens]),
        )

    def _advance(self, state):
        at = state.count.tokens
        if at == self.fails_at:
            raise BackendError("fake produced 3 logits that are not finite")
        state.logits, state.latent = self.logits[at : at + 1], self.latents[at : at + 1]
        state.count.tokens += 1
        state.lengths += 1


def judge(rollout, limits):
    report = report_of(rollout, Evidence("", "", None, limits))
    return report.passed, report.verdict


def run(decoder, reference=None, prompt=PROMPT, steps=STEPS, **options):
    options = {"precision": "fp32", "checkpoint_matches": True, "backend": "fake"} | options
    report = compare(reference or Fake(), decoder, prompt, steps, **options)
    assert "\n" not in report.verdict
    assert report.verdict.startswith("PASS" if report.passed else "FAIL: ")
    json.dumps(report.to_dict(), allow_nan=False)
    return report


def swapped(position, margin, error=0.0):
    """A reference and a decoder that prefer different tokens at `position`, the reference's best two `margin` apart."""
    reference, decoder = Fake(), Fake()
    best, second = position % 4, (position + 1) % 4
    reference.logits[position, [best, second]] = [2.0 + margin, 2.0]
    decoder.logits[position, [best, second]] = [2.0, 2.0 + margin]
    decoder.logits[position] += np.float32(error)
    return reference, decoder


def test_equal_decoders_pass_with_these_fields():
    fields = run(Fake()).to_dict()
    assert (
        fields.pop("verdict")
        == "PASS: 4 of 4 greedy tokens equal, max KL 0.0e+00, logits within 0.0e+00 (limit 1.0e-04)"
    )
    positions, prefill = fields.pop("positions"), fields.pop("prefill")
    assert positions["position"] == list(range(POSITIONS))
    assert positions["margin"] == [2.0] * POSITIONS
    assert {"logit_error", "latent_error", "kl"} <= positions.keys()
    assert {len(column) for column in positions.values()} == {POSITIONS}
    assert prefill["policy"] == "stepwise"
    assert prefill["passes"] == 1.0
    assert prefill["residual"] is None
    assert prefill["max_abs_latent_error"] == 0.0
    assert fields.pop("limits") == dataclasses.asdict(limits("fp32"))
    assert fields.pop("free_running") == {
        "token_agreement": 1.0,
        "equal_tokens": STEPS,
        "mean_kl": 0.0,
        "positions": positions,
    }
    assert fields == {
        "passed": True,
        "checkpoint_matches": True,
        "backend": "fake",
        "precision": "fp32",
        "steps": STEPS,
        "prompt_tokens": len(PROMPT),
        "max_abs_logit_error": 0.0,
        "max_abs_latent_error": 0.0,
        "mean_kl": 0.0,
        "max_kl": 0.0,
        "top1_agreement": 1.0,
        "first_divergence": None,
        "max_abs_key_error": 0.0,
        "max_abs_value_error": 0.0,
        "drift": {"first_quarter": 0.0, "last_quarter": 0.0, "growth": 1.0},
        "tokens": [*PROMPT, 2, 3, 0, 1],
        "weights": None,
        "arithmetic": None,
        "quality": None,
        "provenance": None,
    }


def test_both_sides_read_the_prompt_and_then_the_choices_of_the_reference():
    reference, decoder = swapped(position=3, margin=1e-5)
    run(decoder, reference)
    assert reference.runs == [[*PROMPT, 2, 3, 0, 1]] == decoder.runs[:1]


def test_on_its_own_choices_the_decoder_goes_another_way_from_the_divergence_on():
    reference, decoder = swapped(position=4, margin=1e-5)
    decoder.logits[5] = LOGITS[6]
    free = run(decoder, reference).to_dict()["free_running"]
    # Position 4 chooses 0 in the reference and 1 in the decoder, which then reads its own choices.
    assert decoder.runs == [[*PROMPT, 2, 3, 0, 1], [*PROMPT, 2, 3, 1, 2]]
    assert free["positions"]["decoder_token"] == [0, 1, 2, 3, 1, 2, 2]
    assert free["positions"]["reference_token"] == [0, 1, 2, 3, 0, 1, 2]
    assert (free["equal_tokens"], free["token_agreement"]) == (2, 0.5)


def test_without_a_divergence_the_free_run_is_the_other_one_and_costs_nothing():
    decoder = Fake()
    decoder.logits[:, 3] += np.float32(5e-5)
    report = run(decoder)
    assert report.free_running.points == report.points
    assert len(decoder.runs) == 1


def test_a_decoder_that_fails_on_its_own_choices_fails_parity():
    reference, decoder = swapped(position=4, margin=1e-5)

    def step(state, tokens):
        if len(decoder.runs) == 2 and state.count.tokens == 6:
            raise BackendError("fake ran out of memory")
        return Fake.step(decoder, state, tokens)

    decoder.step = step
    report = run(decoder, reference)
    assert not report.passed
    assert "ran out of memory" in report.verdict


def test_each_layers_cache_is_compared_at_each_position():
    decoder = Fake()
    decoder.cache_errors = {(1, 0, 4): 0.5, (0, 1, 2): 0.25, (1, 1, 5): math.nan}  # (layer, K or V, position)
    report = run(decoder)
    assert [point.key_errors for point in report.points] == [(0.0, 0.5 * (t == 4)) for t in range(POSITIONS)]
    assert [point.value_errors[0] for point in report.points] == [0.25 * (t == 2) for t in range(POSITIONS)]
    assert [point.value_errors[1] for point in report.points] == [math.inf if t == 5 else 0.0 for t in range(POSITIONS)]
    assert (report.max_abs_key_error, report.max_abs_value_error) == (0.5, math.inf)


def test_drift_is_how_the_latents_error_grows():
    points = [Point(t, 0.0, error, 0.0, 1.0, 0, 0) for t, error in enumerate([1, 2, 1, 9, 9, 4, 8, 4.0])]
    assert Drift.of(points) == Drift(1.5, 6.0, 4.0)
    assert Drift.of(points[:3]) is None
    assert Drift.of([dataclasses.replace(point, latent_error=None) for point in points]) is None


def test_a_prompt_of_one_token_and_one_step():
    assert run(Fake(), prompt=[1], steps=1).to_dict()["positions"]["position"] == [0, 1]


def test_progress_counts_every_position():
    seen = []
    run(Fake(), progress=lambda *progress: seen.append(progress))
    assert seen == [("rollout", i + 1, POSITIONS) for i in range(POSITIONS)]


def test_the_worst_position_and_the_first_one_beyond_the_limit_are_named():
    decoder = Fake()
    decoder.logits[[1, 4, 5], 0] += np.float32([2e-4, 7e-3, 5e-5])
    report = run(decoder)
    assert not report.passed
    assert report.verdict.startswith(
        "FAIL: numerically different though all 4 greedy tokens are equal: "
        "logits differ by 7.0e-03 at position 4 (limit 1.0e-04, first exceeded at position 1); max KL "
    )
    assert report.max_abs_logit_error == pytest.approx(7e-3, rel=1e-3)
    assert report.top1_agreement == 1.0


def test_an_error_in_the_prompt_alone_fails():
    decoder = Fake()
    decoder.logits[0, 0] += np.float32(1e-3)
    assert "at position 0" in run(decoder).verdict


def test_an_error_in_the_latent_alone_fails():
    decoder = Fake()
    decoder.latents[2] += np.float32(1e-3)
    report = run(decoder)
    assert "latents differ by 1.0e-03 at position 2 (limit 5.0e-05" in report.verdict
    assert report.max_abs_latent_error == pytest.approx(1e-3, rel=1e-3)


def test_kl_alone_can_fail():
    points = [Point(i, 0.0, None, kl, 1.0, 2, 2) for i, kl in enumerate((0.0, 3e-8))]
    passed, verdict = judge(Comparison(1, 1, points), FP32)
    assert not passed
    assert "mean KL is 1.5e-08 (limit 1.0e-08)" in verdict


def test_a_near_tie_passes_and_is_named():
    report = run(*swapped(position=4, margin=5e-5)[::-1])
    assert report.passed
    assert report.verdict.startswith(
        "PASS with a near tie at step 2 of 4 (position 4: 0 in the reference, 1 in the decoder)"
    )
    found = report.to_dict()["first_divergence"]
    assert found.pop("margin") == pytest.approx(5e-5, rel=0.01)
    assert found == {"step": 2, "position": 4, "reference_token": 0, "decoder_token": 1, "near_tie": True}
    assert report.top1_agreement == pytest.approx(6 / 7)


def test_another_token_that_is_no_near_tie_fails():
    report = run(*swapped(position=4, margin=0.5)[::-1])
    assert not report.passed
    assert not report.first_divergence.near_tie
    assert report.verdict.startswith("FAIL: greedy tokens part at step 2 of 4")
    assert (
        "5.0e-01 apart (a near tie would be at most 2.0e-04); logits differ by 5.0e-01 at position 4" in report.verdict
    )


def test_a_near_tie_excuses_no_error_elsewhere():
    reference, decoder = swapped(position=4, margin=5e-5)
    decoder.logits[6, 0] += np.float32(1e-2)
    report = run(decoder, reference)
    assert not report.passed
    assert report.first_divergence.near_tie
    assert "logits differ by 1.0e-02 at position 6" in report.verdict


@pytest.mark.parametrize("position", [0, 1, POSITIONS - 1])
def test_positions_that_choose_no_generated_token_are_no_divergence(position):
    report = run(*swapped(position, margin=5e-5)[::-1])
    assert report.passed
    assert report.first_divergence is None
    assert report.top1_agreement < 1


@pytest.mark.parametrize("step", range(STEPS))
def test_only_the_first_divergence_is_reported(step):
    reference, decoder = Fake(), Fake()
    for position in range(len(PROMPT) - 1 + step, POSITIONS):
        one, other = swapped(position, margin=1e-5)
        reference.logits[position], decoder.logits[position] = one.logits[position], other.logits[position]
    found = run(decoder, reference).first_divergence
    assert (found.step, found.position) == (step, step + len(PROMPT) - 1)


@pytest.mark.parametrize("side", ["reference", "decoder"])
@pytest.mark.parametrize("what", ["logits", "latent"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_fail(side, what, bad):
    sides = {"reference": Fake(), "decoder": Fake()}
    (sides[side].logits if what == "logits" else sides[side].latents)[3, 1] = bad
    report = run(**sides)
    count = 4 if what == "logits" else 2
    assert f"FAIL: the {side}'s {what} are not finite (1 of {count} numbers) at position 3" in report.verdict
    fields = report.to_dict()
    assert fields["max_abs_logit_error" if what == "logits" else "max_abs_latent_error"] is None
    assert fields["positions"]["position"] == [0, 1, 2, 3]


@pytest.mark.parametrize("position", range(POSITIONS))
def test_a_decoder_that_fails_on_the_way_fails_parity(position):
    decoder = Fake()
    decoder.fails_at = position
    report = run(decoder)
    assert f"stopped at position {position}: fake produced 3 logits" in report.verdict
    assert len(report.points) == position


def test_a_plain_model_has_no_latent_error():
    config = dataclasses.replace(CONFIG, memory=False)
    decoder = Fake(config)
    decoder.latents += 1
    report = run(decoder, Fake(config))
    assert report.passed
    assert report.max_abs_latent_error is None
    assert report.prefill.max_abs_latent_error is None


@pytest.mark.parametrize("known", [True, False, None])
@pytest.mark.parametrize("error", [0.0, 1e-2])
def test_hashes_are_reported_and_decide_nothing(known, error):
    decoder = Fake()
    decoder.logits[4, 0] += np.float32(error)
    report = run(decoder, checkpoint_matches=known)
    assert report.checkpoint_matches is known
    assert report.passed == (error == 0)


def test_iterated_prefill_may_be_off_by_its_residual_only():
    decoder = Fake()
    decoder.report = PrefillReport("fixed-point", 7.0, residual=1e-4)
    decoder.wrong = {"latent": 1e-4, "logits": 5e-3, "cache": 2e-3}
    report = run(decoder)
    assert report.passed
    assert report.prefill.max_abs_latent_error == pytest.approx(1e-4, rel=1e-2)
    decoder.wrong["latent"] = 3e-4
    report = run(decoder)
    assert report.verdict.startswith(
        "FAIL: fixed-point prefill of the prompt differs from reading it stepwise: "
        "latent by 3.0e-04 (limit 1.5e-04, its stated residual 1.0e-04 included); max KL"
    )
    assert report.max_abs_logit_error == 0.0


@pytest.mark.parametrize("part", ["logits", "latent", "cache"])
@pytest.mark.parametrize("residual", [None, 0.0])
def test_prefill_that_says_it_is_exact_must_be_so_in_every_part(part, residual):
    decoder = Fake()
    decoder.report = PrefillReport("stepwise", 1.0, residual)
    decoder.wrong = {part: 1e-3}
    report = run(decoder)
    assert (
        f"stepwise prefill of the prompt differs from reading it stepwise: {part.removesuffix('s')} by"
        in report.verdict
    )


def test_a_prefill_that_fails_does_not_end_the_rollout():
    decoder = Fake()
    decoder.prefill_fails = True
    report = run(decoder)
    assert "FAIL: prefill failed: fake ran out of memory" in report.verdict
    assert len(report.points) == POSITIONS


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"precision": "fp64"}, "fp64"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": STEPS + 1}, "8 tokens, and the decoder holds 7"),
        ({"reference": Fake(max_seq_len=6)}, "7 tokens, and the reference holds 6"),
        ({"reference": Fake(dataclasses.replace(CONFIG, vocab_size=5))}, "vocab_size 4, the reference's has 5"),
        ({"reference": Fake(dataclasses.replace(CONFIG, memory=False))}, "memory True, the reference's has False"),
    ],
)
def test_what_cannot_be_compared_is_an_error_before_any_work(options, named):
    decoder = Fake()
    with pytest.raises(ParityError, match=named):
        run(decoder, **options)
    assert decoder.runs == []


@pytest.mark.parametrize("prompt", [[], [4], [-1]])
def test_a_prompt_that_cannot_be_read_is_an_error(prompt):
    with pytest.raises(InputError):
        run(Fake(), prompt=prompt)


# Precisions that are another function: judged by quality.

QUALITY = ParityLimits(math.inf, 0.05, math.inf, mean_kl=1e-2, near_tie_margin=0.1, top1_agreement=0.9)


def points_of(kl, same):
    return [Point(i, 0.5, 0.3, kl, 1.0, 2, 2 if i < same else 3) for i in range(10)]


def test_fewer_bits_are_judged_by_kl_and_first_choices_and_tokens_may_part():
    passed, verdict = judge(Comparison(1, 9, points_of(5e-3, 9)), QUALITY)
    assert passed
    assert verdict.startswith("PASS: mean KL 5.0e-03 (limit 1.0e-02), first choice the same at 90.0% of positions; ")
    assert judge(Comparison(1, 9, points_of(5e-3, 10)), QUALITY)[1].endswith("all 9 greedy tokens equal")


@pytest.mark.parametrize(
    ("points", "named"),
    [
        (points_of(2e-2, 10), "FAIL: mean KL is 2.0e-02 (limit 1.0e-02); all 9 greedy tokens equal"),
        (
            points_of(0.0, 8),
            "FAIL: the first choice is the same at 80.0% of positions (limit 90.0%); greedy tokens part",
        ),
    ],
)
def test_fewer_bits_fail_where_the_model_is_worse(points, named):
    passed, verdict = judge(Comparison(1, 9, points), QUALITY)
    assert not passed
    assert verdict.startswith(named)


def test_fewer_bits_excuse_no_prefill_that_is_not_the_decoders_own_decoding():
    rollout = Comparison(1, 9, points_of(0.0, 10), prefill=PrefillCheck("zero", 1.0, None, 0.8, 3.0, 2.0))
    assert "FAIL: zero prefill of the prompt differs" in judge(rollout, QUALITY)[1]


rows = st.lists(st.floats(-15, 15, width=32), min_size=5, max_size=5).map(np.array)


@given(rows, rows, st.floats(-5, 5))
def test_kl_is_what_its_definition_says(p, q, shift):
    a, b = (np.exp(z.astype(np.longdouble)) / np.exp(z.astype(np.longdouble)).sum() for z in (p, q))
    assert kl_divergence(p, q) == pytest.approx(float((a * np.log(a / b)).sum()), rel=1e-9, abs=1e-14)
    assert kl_divergence(p, p + shift) <= 1e-14


@given(rows, st.lists(st.floats(-1e-4, 1e-4), min_size=5, max_size=5).map(np.array))
def test_logits_within_the_limit_bound_kl_as_the_tolerances_say(p, error):
    assert kl_divergence(p, p + error) <= FP32.max_abs_logit_error**2 / 2 * 1.001 + 1e-15 <= FP32.mean_kl
