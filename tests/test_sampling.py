"""Sampling against a plain reference that sorts everything, and against the definitions it claims to follow."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lrt_deploy.errors import InputError
from lrt_deploy.fields import shown
from lrt_deploy.runtime.sampling import Sampler, SamplingOptions

# The reference decides a border of top-p or min-p by other roundings; closer than this to one, nothing is claimed.
BORDER = 1e-9


def row(*values):
    return np.array(values, dtype=np.float32)


class Stream(Sampler):
    """A sampler that counts the tokens that it has chosen, and shows what it chooses from."""

    made = 0

    def choose(self, logits, history):
        self.made += 1
        return super().choose(logits, history, self.made - 1)

    def distribution(self, logits, history):
        """The ids that may be chosen, ascending, and their probabilities."""
        scores = self._changed(logits, history, 0)
        if self.options.temperature == 0:
            return np.array([scores.argmax()]), np.ones(1)
        ids, weights = self._kept(scores)
        return ids, weights / weights.sum()


def kept(logits, history=(), **options):
    return Stream(SamplingOptions(**options)).distribution(logits, history)[0].tolist()


def reference(logits, history, o):
    """Every step by the book on the whole row: id -> probability, or None where a border is too close to call."""
    scores = [float(x) for x in logits]
    for token in set(history):
        x = scores[token]
        scores[token] = x / o.repetition_penalty if x > 0 else x * o.repetition_penalty
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if o.temperature == 0:
        return {order[0]: 1.0}
    order = order[: o.top_k or None]
    order, probabilities = softmax(order, scores, o.temperature)
    if o.top_p < 1:
        reached = np.cumsum(probabilities)
        if np.abs(reached - o.top_p).min() < BORDER:
            return None
        order = order[: int((reached < o.top_p).sum()) + 1]
        order, probabilities = softmax(order, scores, o.temperature)
    if o.min_p > 0:
        share = probabilities / probabilities[0]
        if 0 < np.abs(share - o.min_p).min() < BORDER:
            return None
        order = [i for i, s in zip(order, share, strict=True) if s >= o.min_p]
        order, probabilities = softmax(order, scores, o.temperature)
    return dict(zip(order, probabilities, strict=True))


def softmax(order, scores, temperature):
    chosen = np.array([scores[i] for i in order])
    weights = np.exp((chosen - chosen[0]) / temperature)
    return order, weights / weights.sum()


# Few distinct values make ties common; the others make every size of nucleus.
VALUES = st.one_of(
    st.sampled_from([-2.0, -1.0, 0.0, 0.0, 1.0, 3.0]),
    st.floats(-15, 15, width=32),
)
ROWS = st.lists(VALUES, min_size=1, max_size=300).map(lambda values: np.array(values, dtype=np.float32))
OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.one_of(st.just(0.0), st.floats(0.05, 5)),
    top_k=st.integers(0, 310),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 3)),
    seed=st.integers(0, 2**64),
)
repeatable = settings(deadline=None, derandomize=True, max_examples=300)


@st.composite
def cases(draw):
    logits = draw(ROWS)
    return logits, draw(st.lists(st.integers(0, logits.size - 1), max_size=8)), draw(OPTIONS)


@repeatable
@given(cases())
def test_kept_set_and_distribution_equal_the_sorting_reference(case):
    logits, history, options = case
    expected = reference(logits, history, options)
    assume(expected is not None)
    ids, probabilities = Stream(options).distribution(logits, history)
    assert ids.tolist() == sorted(expected)
    np.testing.assert_allclose(probabilities, [expected[i] for i in ids], rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("options", [{"top_k": 50}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 900, "top_p": 0.6}])
def test_a_real_vocabulary_equals_the_reference(spread, options):
    logits = (np.random.default_rng(5).standard_normal(50_304) * spread).astype(np.float32)
    o = SamplingOptions(temperature=1.0, **options)
    expected = reference(logits, (), o)
    assert expected is not None
    assert Stream(o).distribution(logits, ())[0].tolist() == sorted(expected)


def test_the_reference_can_tell_a_wrong_nucleus():
    logits = (np.random.default_rng(5).standard_normal(500)).astype(np.float32)
    wrong = Stream(SamplingOptions(temperature=1.0, top_p=0.899)).distribution(logits, ())
    assert wrong[0].tolist() != sorted(reference(logits, (), SamplingOptions(temperature=1.0, top_p=0.9)))


@repeatable
@given(cases())
def test_choices_come_from_the_distribution_and_leave_the_row_alone(case):
    logits, history, options = case
    before = logits.copy()
    sampler = Stream(options)
    ids, probabilities = sampler.distribution(logits, history)
    assert math.isclose(probabilities.sum(), 1.0, rel_tol=1e-12)
    assert (np.diff(ids) > 0).all()
    likely = set(ids[probabilities > 0].tolist())
    assert all(sampler.choose(logits, history) in likely for _ in range(5))
    np.testing.assert_array_equal(logits, before)


@repeatable
@given(cases())
def test_one_seed_gives_one_stream(case):
    logits, history, options = case
    first, second = Stream(options), Stream(options)
    second.distribution(logits, history)  # looking is not drawing
    assert [first.choose(logits, history) for _ in range(8)] == [second.choose(logits, history) for _ in range(8)]


def test_a_stream_does_not_depend_on_what_runs_beside_it():
    rows = np.random.default_rng(0).standard_normal((20, 100)).astype(np.float32)
    options = SamplingOptions(temperature=1.0, seed=7)
    alone, beside, other = Stream(options), Stream(options), Stream(SamplingOptions(temperature=1.0, seed=8))
    tokens = [alone.choose(r, ()) for r in rows]
    pairs = [(beside.choose(r, ()), other.choose(r, ())) for r in rows]
    assert tokens == [ours for ours, _ in pairs]
    assert tokens != [theirs for _, theirs in pairs]


def test_the_stream_of_a_seed_is_the_same_in_every_release():
    sampler = Stream(SamplingOptions(temperature=1.0, seed=1234))
    # PCG64's numbers times ten: a row of ten equal logits reads off their first digit.
    assert [sampler.choose(np.zeros(10, np.float32), ()) for _ in range(8)] == [9, 3, 9, 2, 3, 1, 2, 3]
    numbers = np.random.Generator(np.random.PCG64(1234)).random(100)
    assert [sampler._number(index) for index in range(100)] == numbers.tolist()
    assert sampler._number(3) == numbers[3]  # again, at any time


@pytest.mark.parametrize(("number", "expected"), [(0.0, 1), (0.5, 2), (math.nextafter(1, 0), 2)])
def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token(number, expected):
    sampler = Stream(SamplingOptions(temperature=1.0))
    sampler._drawn = (0, [number])
    assert sampler.choose(row(-1e9, 1, 1, -1e9), ()) == expected


def test_no_seed_means_fresh_entropy():
    logits = np.zeros(1 << 16, np.float32)
    first, second = (Stream(SamplingOptions(temperature=1.0)) for _ in range(2))
    assert [first.choose(logits, ()) for _ in range(8)] != [second.choose(logits, ()) for _ in range(8)]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.3, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 7, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.3},
    ],
)
def test_frequencies_follow_the_distribution(options):
    logits, history, draws = row(2.0, 0.5, -1.0, 1.5, 0.0, 2.5, -0.5, 1.0), (5, 5, 2), 20_000
    o = SamplingOptions(**options, seed=2024)
    expected = reference(logits, history, o)
    sampler = Stream(o)
    counts = np.bincount([sampler.choose(logits, history) for _ in range(draws)], minlength=logits.size)
    assert set(np.flatnonzero(counts).tolist()) == set(expected)
    chi_square = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in expected.items())
    assert chi_square < 24.3  # 99.9% of chi-square with at most 7 degrees of freedom; the seed is fixed


def test_greedy_takes_the_largest_and_the_lowest_id_of_equals():
    assert Stream(SamplingOptions()).choose(row(1, 3, 2, 3), ()) == 1
    assert Stream(SamplingOptions()).choose(row(7, 7, 7), ()) == 0
    assert Stream(SamplingOptions()).choose(row(-5), ()) == 0


def test_greedy_ignores_the_filters_and_draws_nothing():
    sampler = Stream(SamplingOptions(top_k=3, top_p=0.5, min_p=0.5, seed=1))
    before = sampler._drawn
    assert sampler.choose(row(0, 1, 4, 2), ()) == 2
    assert sampler._drawn == before


@repeatable
@given(ROWS, st.integers(0, 99))
def test_low_temperature_and_single_candidates_tend_to_greedy(logits, seed):
    greedy = Stream(SamplingOptions()).choose(logits, ())
    for options in ({"top_k": 1}, {"top_p": 1e-12}):
        assert kept(logits, temperature=1.0, **options) == [greedy]
    largest = np.flatnonzero(logits == logits.max())
    for temperature in (1e-300, 5e-324):
        assert Stream(SamplingOptions(temperature=temperature, seed=seed)).choose(logits, ()) in largest


def test_ties_at_the_border_keep_the_lowest_ids():
    logits = row(1, 2, 1, 2, 1, 1)
    assert kept(logits, temperature=1.0, top_k=3) == [0, 1, 3]
    assert kept(logits, temperature=1.0, top_k=4) == [0, 1, 2, 3]
    assert kept(np.zeros(10, np.float32), temperature=1.0, top_p=0.5) == [0, 1, 2, 3, 4]
    assert kept(np.zeros(10, np.float32), temperature=1.0, min_p=1.0) == list(range(10))


def test_top_k_beyond_the_vocabulary_keeps_everything():
    assert kept(row(3, 1, 2), temperature=1.0, top_k=99) == [0, 1, 2]


def test_top_p_keeps_the_token_that_reaches_p():
    logits = np.log(np.array([0.1, 0.5, 0.25, 0.15])).astype(np.float32)
    assert kept(logits, temperature=1.0, top_p=0.45) == [1]
    assert kept(logits, temperature=1.0, top_p=0.55) == [1, 2]
    assert kept(logits, temperature=1.0, top_p=0.8) == [1, 2, 3]
    assert kept(logits, temperature=1.0, top_p=math.nextafter(1, 0)) == [0, 1, 2, 3]


def test_top_p_counts_among_what_top_k_left():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1])).astype(np.float32)
    assert kept(logits, temperature=1.0, top_p=0.5) == [0, 1]
    assert kept(logits, temperature=1.0, top_k=2, top_p=0.5) == [0]  # 0.4 / 0.7 is beyond a half


def test_min_p_is_a_share_of_the_largest_probability():
    logits = np.log(np.array([0.6, 0.25, 0.1, 0.05])).astype(np.float32)
    assert kept(logits, temperature=1.0, min_p=0.4) == [0, 1]
    assert kept(logits, temperature=1.0, min_p=0.15) == [0, 1, 2]
    assert kept(logits, temperature=2.0, min_p=0.4) == [0, 1, 2]  # after temperature: shares become their roots


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once():
    options = SamplingOptions(temperature=1.0, repetition_penalty=2.0)
    penalized = Stream(options).distribution(row(4, -1, 0, 3), [0, 1, 2, 0, 0])
    plain = Stream(SamplingOptions(temperature=1.0)).distribution(row(2, -2, 0, 3), ())
    np.testing.assert_array_equal(penalized[1], plain[1])


def test_repetition_penalty_changes_the_greedy_choice_and_below_one_invites_repetition():
    assert Stream(SamplingOptions(repetition_penalty=1.5)).choose(row(3, 2.5, 1), [0]) == 1
    assert Stream(SamplingOptions(repetition_penalty=0.5)).choose(row(3, 2.5, 1), [1]) == 1
    assert Stream(SamplingOptions(repetition_penalty=1.5)).choose(row(3, 2.5, 1), []) == 0


@pytest.mark.parametrize("extreme", [1e6, 1e-6])
def test_extreme_penalties_and_logits_stay_finite(extreme):
    big = float(np.finfo(np.float32).max)
    options = SamplingOptions(temperature=1.0, repetition_penalty=extreme)
    _, probabilities = Stream(options).distribution(row(big, -big, 0, 1), [0, 1, 2])
    assert np.isfinite(probabilities).all()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, 1e5, 10**400, "1", None, True]),
        ("top_k", [-1, 1.0, math.nan, "5", None, True]),
        ("top_p", [0, -0.1, 1.1, math.nan, "1", None, True]),
        ("min_p", [-0.1, 1.1, math.nan, "0", None, False]),
        ("repetition_penalty", [0, -1, 1e7, math.nan, math.inf, "1", None, True]),
        ("seed", [-1, 1.5, math.nan, "7", True]),
    ],
)
def test_options_out_of_range_are_named(name, values):
    for value in values:
        with pytest.raises(InputError) as raised:
            SamplingOptions(**{name: value})
        assert str(raised.value).startswith(f"sampling option {name} is {shown(value)}, expected a ")


def test_options_accept_their_borders_and_numpy_numbers():
    SamplingOptions(temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1, seed=0)
    options = SamplingOptions(
        temperature=np.float32(0.5), top_k=np.int64(3), top_p=np.float64(0.5), min_p=1, seed=2**100
    )
    assert Stream(options).choose(row(1, 2, 3), ()) == 2


def test_frequency_and_presence_count_what_was_chosen_and_not_the_prompt():
    logits, history = row(1, 1, 1, 1), [3, 3, 3, 1, 1, 2]
    sampler = Sampler(SamplingOptions(frequency_penalty=0.5, presence_penalty=0.25))
    changed = sampler._changed(logits, history, 3)  # the last three were chosen
    np.testing.assert_array_equal(changed, [1, 1 - 2 * 0.5 - 0.25, 1 - 0.5 - 0.25, 1])
    np.testing.assert_array_equal(sampler._changed(logits, history, 0), logits)
    assert sampler.choose(row(0, 0.9, 0.5, 0.2), history, 3) == 3
    assert Sampler(SamplingOptions(frequency_penalty=-1.0)).choose(row(0, 0, 0, 0.9), history, 3) == 1


def test_a_bias_is_added_to_the_logits_of_its_tokens_after_the_penalties():
    options = SamplingOptions(temperature=1.0, logit_bias={0: 2.0, 2: -100.0, 9: 5.0}, repetition_penalty=2.0, seed=1)
    changed = Sampler(options)._changed(row(4, 1, 3), [0, 9], 0)
    np.testing.assert_array_equal(changed, [4 / 2 + 2, 1, 3 - 100])
    chosen = {Sampler(options).choose(row(4, 1, 3), [0], i) for i in range(200)}
    assert chosen == {0, 1}
    assert Sampler(SamplingOptions(logit_bias={1: 10.0})).choose(row(4, 1, 3), [], 0) == 1


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_penalties_and_bias_out_of_range_are_named(name):
    for value in (math.nan, math.inf, 1e5, -1e5, "1", None, True):
        with pytest.raises(InputError, match=f"^sampling option {name} is "):
            SamplingOptions(**{name: value})
        with pytest.raises(InputError, match=r"^sampling option logit_bias\[3\] is "):
            SamplingOptions(logit_bias={3: value})
    for bias in ({"3": 1.0}, {-1: 1.0}, {True: 1.0}, {1.5: 1.0}, [(3, 1.0)], "3"):
        with pytest.raises(InputError, match=r"^sampling option logit_bias"):
            SamplingOptions(logit_bias=bias)
