"""Continuous batching: every request gives what it gives alone, whoever comes and goes beside it."""

from __future__ import annotations

import numpy as np
import pytest

from lrt_deploy.errors import BackendError, InputError, StateError
from lrt_deploy.runtime.backends.ort_cpu import OrtCpuBuffers
from lrt_deploy.runtime.batch import BatchDecoder

RNG = np.random.default_rng(8)
PROMPTS = [RNG.integers(0, 250, n).tolist() for n in (3, 40, 1, 70, 12, 25, 90, 2, 8, 33, 5)]
BUDGETS = [9, 4, 20, 30, 1, 7, 12, 33, 2, 16, 5]


@pytest.fixture(params=["padded_vocab", "mr_gqa_SSSL", "baseline_ve", "demo"])
def decoder(request, decoder_of):
    return decoder_of(request.param)


@pytest.fixture
def one(decoder_of):
    return decoder_of("padded_vocab")


def alone(decoder, prompt, budget, **options):
    return list(decoder.generate(prompt, budget, **({"policy": "stepwise"} | options)))


def collected(batch):
    """Events by request, in their order."""
    found = {}
    for event in batch.run():
        assert event.error is None
        found.setdefault(event.request, []).append(event.event)
    return found


@pytest.mark.parametrize(("slots", "lanes"), [(1, 1), (3, 1), (4, 2)])
def test_every_output_equals_its_single_run(decoder, slots, lanes):
    with BatchDecoder(decoder, slots, lanes) as batch:
        numbers = [batch.submit(p, n, stop_ids=[]) for p, n in zip(PROMPTS, BUDGETS, strict=True)]
        assert (batch.waiting, batch.running) == (len(PROMPTS), 0)
        found = collected(batch)
        assert (batch.waiting, batch.running) == (0, 0)
    for number, prompt, budget in zip(numbers, PROMPTS, BUDGETS, strict=True):
        assert found[number] == alone(decoder, prompt, budget, stop_ids=[])
    assert found[numbers[0]] != found[numbers[9]][: BUDGETS[0]]


@pytest.mark.parametrize("policy", ["auto", "fixed-point", "stepwise"])
def test_a_prompt_is_read_as_it_was_asked_for(one, policy):
    batch = BatchDecoder(one, 2)
    for prompt in PROMPTS[:4]:
        batch.submit(prompt, 5, policy=policy, tolerance=1e-4)
    found = collected(batch)
    for number, prompt in enumerate(PROMPTS[:4]):
        assert found[number] == alone(one, prompt, 5, policy=policy, tolerance=1e-4)  # with how it was read


def test_each_request_has_its_own_seed_and_stop_rules(one):
    batch = BatchDecoder(one, 3)
    options = [{"temperature": 1.5, "seed": seed, "stop_ids": [seed]} for seed in range(8)]
    options += [{"temperature": 0.7, "seed": 3, "top_k": 5, "repetition_penalty": 1.3}, {"repetition_penalty": 1.2}]
    for option in options:
        batch.submit(PROMPTS[0], 15, **option)
    found = collected(batch)
    for number, option in enumerate(options):
        assert found[number] == alone(one, PROMPTS[0], 15, **option)
    assert len({tuple(e.token for e in events) for events in found.values()}) > 5


def test_a_seed_draws_the_same_whatever_runs_beside_it(one):
    def draw(neighbours):
        batch = BatchDecoder(one, 3)
        for prompt in neighbours:
            batch.submit(prompt, 20, temperature=1.0, seed=1)
        number = batch.submit(PROMPTS[4], 20, temperature=1.0, seed=7)
        return [event.token for event in collected(batch)[number]]

    assert draw([]) == draw(PROMPTS[:2]) == draw(PROMPTS[5:9])


def test_n_continuations_of_one_prompt_read_it_once(one, monkeypatch):
    state = one.prefill([PROMPTS[3]], policy="stepwise")
    batch = BatchDecoder(one, 4)
    for seed in range(6):
        batch.submit(None, 8, state=state, temperature=1.0, seed=seed)
    steps = []
    decode = OrtCpuBuffers.decode
    monkeypatch.setattr(
        OrtCpuBuffers, "decode", lambda self, t, *a, **k: steps.append(len(t)) or decode(self, t, *a, **k)
    )
    found = collected(batch)
    assert sum(steps) == 6 * 7
    for seed in range(6):
        assert found[seed] == alone(one, PROMPTS[3], 8, temperature=1.0, seed=seed)
    assert state.tokens == [PROMPTS[3]]


def test_a_row_that_ends_costs_nothing_more(one, monkeypatch):
    rows = []
    decode = OrtCpuBuffers.decode
    monkeypatch.setattr(
        OrtCpuBuffers, "decode", lambda self, t, *a, **k: rows.append(len(t)) or decode(self, t, *a, **k)
    )
    batch = BatchDecoder(one, 8)
    for budget in (2, 5, 9):
        batch.submit([1], budget)
    collected(batch)
    # Each request is fed its prompt of one token and all tokens but its last.
    assert sum(rows) == 2 + 5 + 9 and rows == [3] * 2 + [2] * 3 + [1] * 4


def test_requests_may_come_and_be_cancelled_between_steps(one):
    batch = BatchDecoder(one, 2)
    first, second, third = (batch.submit(PROMPTS[i], 30, stop_ids=[]) for i in range(3))
    seen = [event for _ in range(6) for event in batch.step()]
    batch.cancel(first)
    late = batch.submit(PROMPTS[4], 3, stop_ids=[])
    batch.cancel(third)
    batch.cancel(99)
    rest = collected(batch)
    assert rest.keys() == {second, late}
    tokens = [e.event for e in seen if e.request == second] + rest[second]
    assert tokens == alone(one, PROMPTS[1], 30, stop_ids=[])
    assert rest[late] == alone(one, PROMPTS[4], 3, stop_ids=[])


def test_a_full_row_ends_with_capacity(one):
    batch = BatchDecoder(one, 2)
    long = [1] * (one.max_seq_len - 2)
    batch.submit(long, 50, stop_ids=[])
    batch.submit([2], 6, stop_ids=[])
    found = collected(batch)
    assert found[0] == alone(one, long, 50, stop_ids=[]) and found[0][-1].finish_reason == "capacity"
    assert len(found[1]) == 6


BAD = [
    (([],), {}, InputError, "empty"),
    (([300],), {}, InputError, "token id 300"),
    (([1],), {"max_new_tokens": -1}, InputError, "max_new_tokens"),
    (([1],), {"n": 0}, InputError, "n is 0"),
    (([1],), {"logprobs": -1}, InputError, "logprobs"),
    (([1],), {"keep_state": 1}, InputError, "keep_state"),
    (([1],), {"latent_cosine": 1}, InputError, "latent_cosine"),
    (([1],), {"priority": "high"}, InputError, "priority"),
    (([1],), {"deadline_s": -1}, InputError, "deadline_s"),
    (([1],), {"logit_bias": {300: 1.0}}, InputError, "logit_bias holds the token id 300"),
    (([1],), {"logit_bias": [1]}, InputError, "logit_bias"),
    (([1],), {"frequency_penalty": "1"}, InputError, "frequency_penalty"),
    (([1],), {"policy": "fast"}, InputError, "fast"),
    (([1],), {"temperature": -1}, InputError, "temperature"),
    (([1] * 129,), {}, StateError, "129 tokens and a slot holds 128"),
    ((None,), {}, InputError, "there is neither"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "words"), BAD, ids=lambda value: str(value)[:15])
def test_a_bad_request_is_refused_when_it_is_submitted(one, arguments, options, error, words):
    batch = BatchDecoder(one, 2)
    with pytest.raises(error, match=words):
        batch.submit(*arguments, **options)
    assert batch.waiting == 0


def test_a_state_that_cannot_be_continued_is_refused(one, decoder_of):
    batch = BatchDecoder(one, 2)
    for state, words in (
        (one.prefill([[1], [2]]), "2 sequence"),
        (decoder_of("gate32").prefill([[1]]), "another model"),
    ):
        with pytest.raises((InputError, StateError), match=words):
            batch.submit(None, state=state)
    for limits in ({"max_waiting": -1}, {"max_waiting_tokens": "1"}, {"blocks_per_step": 0}):
        with pytest.raises(InputError, match=next(iter(limits))):
            BatchDecoder(one, 2, **limits)
    for slots, lanes in ((0, 1), (9, 1), (2, 3), (2, 0)):
        with pytest.raises(InputError, match=r"slots|lanes"):
            BatchDecoder(one, slots, lanes)


def test_one_request_that_fails_does_not_take_the_others_with_it(one, monkeypatch):
    batch = BatchDecoder(one, 3)
    for prompt in PROMPTS[:4]:
        batch.submit(prompt, 12, stop_ids=[])
    decode, calls = OrtCpuBuffers.decode, []

    def spoiled(self, tokens, positions, head):
        calls.append(len(tokens))
        logits = decode(self, tokens, positions, head)
        if len(calls) == 5:
            logits[1, 3] = np.nan
            for layer in range(self.layers):
                for cache in self.cache(layer, self.capacity):
                    cache[1, :, positions[1]] = np.nan
        return logits

    monkeypatch.setattr(OrtCpuBuffers, "decode", spoiled)
    found, errors = {}, []
    for event in batch.run():
        if event.error:
            errors.append(event)
        else:
            found.setdefault(event.request, []).append(event.event)
    assert [event.request for event in errors] == [1] and errors[0].last
    assert "not finite" in str(errors[0].error)
    monkeypatch.undo()
    for number in (0, 2, 3):
        assert found[number] == alone(one, PROMPTS[number], 12, stop_ids=[])


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_backend_that_fails_now_and_then_loses_no_token_and_doubles_none(one, monkeypatch, lanes):
    decode, calls = OrtCpuBuffers.decode, []

    def fail(self, *arguments, **options):
        calls.append(1)
        if len(calls) % 5 == 0:
            raise BackendError("the device is gone")
        return decode(self, *arguments, **options)

    found, failures = {}, 0
    with BatchDecoder(one, 4, lanes) as batch, monkeypatch.context() as patch:
        for prompt in PROMPTS[:6]:
            batch.submit(prompt, 12, stop_ids=[], temperature=1.0, seed=4)
        patch.setattr(OrtCpuBuffers, "decode", fail)
        while batch.waiting or batch.running:
            try:
                for event in batch.step():
                    found.setdefault(event.request, []).append(event.event)
            except BackendError:
                failures += 1
    assert failures > 5
    for number in range(6):
        assert found[number] == alone(one, PROMPTS[number], 12, stop_ids=[], temperature=1.0, seed=4)
