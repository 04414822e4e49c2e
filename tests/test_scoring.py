"""`Decoder.score`: log-probabilities of given tokens, against the authors' logits and against the steps of a state."""

from __future__ import annotations

import numpy as np
import pytest

from lrt_deploy.config import LOGIT_SOFTCAP
from lrt_deploy.errors import InputError
from lrt_deploy.runtime.batch import BatchDecoder
from lrt_deploy.runtime.sampling import log_normalizers

NAME = "mr_gqa_SSSL"


@pytest.fixture(scope="module")
def decoder(decoder_of):
    return decoder_of(NAME)


def expected(logits, tokens):
    """Log-probabilities of tokens (T) from the logits (T, V) before them, by the definition."""
    wide = logits.astype(np.float64)
    return np.array([wide[t, token] - np.logaddexp.reduce(wide[t]) for t, token in enumerate(tokens)])


def test_scores_are_those_of_the_authors_logits(decoder, golden_of):
    golden = golden_of(NAME)
    scores = decoder.score(golden.ids.tolist())
    for row, (ids, logits) in enumerate(zip(golden.ids, golden.last_logits, strict=True)):
        assert scores[row].shape == (len(ids) - 1,) and scores[row].dtype == np.float32
        assert np.abs(scores[row] - expected(logits[:-1], ids[1:])).max() < 1e-4


def test_the_twin_another_token_has_another_score(decoder):
    first, second = decoder.score([[1, 2, 3], [1, 2, 4]])
    assert first[0] == pytest.approx(second[0], abs=1e-5) and abs(first[1] - second[1]) > 1e-3


def test_rows_of_any_length_and_number_score_as_alone(decoder):
    draw = np.random.default_rng(0)
    sizes = [1, 2, 9, 30, 3, 1, 17, 5, 4, 6, 2]
    rows = [draw.integers(0, decoder.config.vocab_size, size).tolist() for size in sizes]
    assert len(rows) > decoder.manifest.max_batch_size
    together = decoder.score(rows)
    for row, scores in zip(rows, together, strict=True):
        assert scores.shape == (len(row) - 1,)
        (alone,) = decoder.score([row])
        assert np.abs(scores - alone).max(initial=0) < 1e-4


def test_a_row_may_have_one_token_more_than_the_capacity(decoder):
    row = [1] * (decoder.max_seq_len + 1)
    assert len(decoder.score([row])[0]) == decoder.max_seq_len
    with pytest.raises(InputError, match="row 1 has "):
        decoder.score([[1], [*row, 1]])


def test_what_cannot_be_scored_is_refused(decoder):
    for rows in ([[]], [[1, 10**6]], [[-1]]):
        with pytest.raises(InputError):
            decoder.score(rows)


@pytest.mark.parametrize("center", [-LOGIT_SOFTCAP, 0.0, LOGIT_SOFTCAP])
def test_the_normalizers_of_a_step_are_those_of_float64_wherever_the_logits_lie(center):
    rng = np.random.default_rng(0)
    spread = np.array([[0.0], [0.1], [5.0], [30.0]])
    logits = np.clip(center + spread * rng.normal(size=(4, 50_000)), -LOGIT_SOFTCAP, LOGIT_SOFTCAP).astype(np.float32)
    tokens = rng.integers(0, 50_000, 4)
    found = logits[range(4), tokens] - log_normalizers(logits)
    np.testing.assert_allclose(found, expected(logits, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.5, "top_k": 20, "seed": 3}])
def test_events_carry_the_log_probability_that_the_score_gives(decoder, sampling):
    prompt = [5, 6, 7]
    events = list(decoder.generate(prompt, 12, stop_ids=[], **sampling))
    (scores,) = decoder.score([prompt + [event.token for event in events]])
    assert np.abs(scores[len(prompt) - 1 :] - [event.logprob for event in events]).max() < 1e-4


def test_events_of_a_batch_carry_it_too(decoder):
    batch = BatchDecoder(decoder, slots=2)
    prompts = [[5, 6, 7], [8, 9]]
    numbers = [batch.submit(prompt, 8, stop_ids=[], temperature=1.0, seed=i) for i, prompt in enumerate(prompts)]
    events = {number: [] for number in numbers}
    for event in batch.run():
        events[event.request].append(event.event)
    for number, prompt in zip(numbers, prompts, strict=True):
        (scores,) = decoder.score([prompt + [event.token for event in events[number]]])
        assert np.abs(scores[len(prompt) - 1 :] - [event.logprob for event in events[number]]).max() < 1e-4
