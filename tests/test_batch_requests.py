"""What a request to a batch may ask for: states and prompts together, several choices, scores, bounds, suspension.

Every answer equals the one of `Decoder.generate` for that request alone.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from lrt_deploy.errors import Busy, DeadlineExceeded, InputError, StateError
from lrt_deploy.runtime import batch as batch_module
from lrt_deploy.runtime.backends import ort_cpu
from lrt_deploy.runtime.backends.ort_cpu import OrtCpuBuffers
from lrt_deploy.runtime.batch import BatchDecoder
from lrt_deploy.runtime.generation import NO_TOKEN
from lrt_deploy.runtime.shard import Shard, divided

RNG = np.random.default_rng(9)
PROMPTS = [RNG.integers(0, 250, n).tolist() for n in (30, 12, 50, 5)]
SAMPLED = {"temperature": 1.2, "stop_ids": []}


@pytest.fixture
def one(decoder_of):
    return decoder_of("mr_gqa_SSSL")


def collected(batch):
    """Events by request, in their order; errors as they are."""
    found = {}
    for event in batch.run():
        found.setdefault(event.request, []).append(event.event or event.error)
    return found


def alone(decoder, prompt, budget, **options):
    return list(decoder.generate(prompt, budget, **({"policy": "stepwise"} | options)))


@pytest.fixture
def steps(monkeypatch):
    """The rows of each decode step that follows."""
    rows, decode = [], OrtCpuBuffers.decode

    def counted(self, tokens, positions, head):
        rows.append(len(tokens))
        return decode(self, tokens, positions, head)

    monkeypatch.setattr(OrtCpuBuffers, "decode", counted)
    return rows


# A state and a prompt


@pytest.mark.parametrize("policy", ["stepwise", "auto", "fixed-point"])
def test_a_prompt_that_goes_on_from_a_state_reads_what_is_new_and_equals_reading_it_in_the_state(one, policy):
    state = one.prefill([PROMPTS[0]], policy=policy, tolerance=1e-2)
    before = state.tokens
    for prompt in (PROMPTS[0] + PROMPTS[1], PROMPTS[0][:20] + PROMPTS[2], PROMPTS[0], PROMPTS[0][:9], PROMPTS[3]):
        options = {"policy": policy, "tolerance": 1e-2, "stop_ids": []}
        expected = alone(one, prompt, 6, state=state.fork(), reuse=True, **options)
        batch = BatchDecoder(one, 2)
        batch.submit(PROMPTS[2], 9, stop_ids=[])
        number = batch.submit(prompt, 6, state=state, **options)
        found = collected(batch)[number]
        assert [event.token for event in found] == [event.token for event in expected]
        if prompt != PROMPTS[0][:9]:  # one token of it is read again beside the other rows
            assert found[0].prefill == expected[0].prefill
        assert (found[0].prefill.reused_tokens > 0) == (prompt is not PROMPTS[3])
        assert state.tokens == before


def test_a_prompt_whose_beginning_is_held_runs_the_rest_only(one, steps):
    state = one.prefill([PROMPTS[0]], policy="stepwise")
    batch = BatchDecoder(one, 1)
    batch.submit(PROMPTS[0] + PROMPTS[1], 4, state=state, stop_ids=[])
    steps.clear()
    collected(batch)
    assert len(steps) == len(PROMPTS[1]) + 3


def test_a_state_that_was_read_less_exactly_than_asked_for_is_not_taken(one):
    state = one.prefill([PROMPTS[2]], policy="fixed-point", tolerance=1e-1)
    assert state.read_within > 0
    batch = BatchDecoder(one, 1)
    batch.submit(PROMPTS[2] + PROMPTS[1], 4, state=state, policy="stepwise", stop_ids=[])
    (found,) = collected(batch).values()
    assert found == alone(one, PROMPTS[2] + PROMPTS[1], 4, stop_ids=[])  # the report says that nothing was reused


@pytest.mark.parametrize("held", ["zero", "stepwise"])
def test_zero_memory_takes_no_state(one, held):
    state = one.prefill([PROMPTS[2]], policy=held)
    batch = BatchDecoder(one, 2)
    prompts = (PROMPTS[2], PROMPTS[2] + PROMPTS[1], PROMPTS[2][:20])
    numbers = [batch.submit(prompt, 6, state=state, policy="zero", stop_ids=[]) for prompt in prompts]
    found = collected(batch)
    for number, prompt in zip(numbers, prompts, strict=True):
        expected = alone(one, prompt, 6, policy="zero", stop_ids=[])
        assert [(event.token, event.prefill) for event in found[number]] == [(e.token, e.prefill) for e in expected]


# Several choices


@pytest.mark.parametrize(("slots", "lanes"), [(1, 1), (2, 1), (4, 2), (8, 1)])
@pytest.mark.parametrize("policy", ["stepwise", "fixed-point"])
def test_choices_of_one_prompt_are_told_apart_and_equal_requests_of_their_own(one, slots, lanes, policy):
    options = SAMPLED | {"policy": policy, "tolerance": 1e-2}
    with BatchDecoder(one, slots, lanes) as batch:
        numbers = batch.submit(PROMPTS[0], 8, n=4, seed=3, **options)
        single = batch.submit(PROMPTS[1], 5, seed=1, **SAMPLED)
        found = collected(batch)
    assert numbers == [0, 1, 2, 3] and single == 4
    for i, number in enumerate(numbers):
        assert found[number] == alone(one, PROMPTS[0], 8, seed=3 + i, **options)
    assert found[single] == alone(one, PROMPTS[1], 5, seed=1, **SAMPLED)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_the_prompt_of_several_choices_is_read_once(one, steps, slots):
    batch = BatchDecoder(one, slots)
    batch.submit(PROMPTS[0], 5, n=4, **SAMPLED)
    found = collected(batch)
    assert sum(steps) == len(PROMPTS[0]) + 4 * 4
    assert len({tuple(event.token for event in events) for events in found.values()}) > 1  # fresh entropy for each


def test_choices_go_on_when_the_one_that_reads_their_prompt_is_cancelled(one):
    batch = BatchDecoder(one, 4)
    numbers = batch.submit(PROMPTS[0], 5, n=3, seed=3, **SAMPLED)
    for _ in range(10):
        assert batch.step() == []
    assert (batch.running, batch.waiting) == (1, 2)
    batch.cancel(numbers[0])
    found = collected(batch)
    assert found == {number: alone(one, PROMPTS[0], 5, seed=3 + number, **SAMPLED) for number in numbers[1:]}


# Scores and log-probabilities


def test_the_chosen_and_the_likeliest_token_have_the_same_number(one):
    batch = BatchDecoder(one, 3)
    greedy = batch.submit(PROMPTS[0], 6, logprobs=3, stop_ids=[])
    sampled = batch.submit(PROMPTS[1], 6, logprobs=250, seed=1, **SAMPLED)
    plain = batch.submit(PROMPTS[1], 6, stop_ids=[])
    found = collected(batch)
    found["generate"] = alone(one, PROMPTS[0], 6, logprobs=3, stop_ids=[])
    for name, count in ((greedy, 3), (sampled, 250), (plain, 0), ("generate", 3)):
        for event in found[name]:
            numbers = [logprob for _, logprob in event.top_logprobs]
            assert len(numbers) == count and numbers == sorted(numbers, reverse=True)
            assert name in (plain, sampled) or event.top_logprobs[0] == (event.token, event.logprob)
            if name == sampled:
                assert dict(event.top_logprobs)[event.token] == event.logprob
                assert sum(math.exp(number) for number in numbers) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("policy", ["stepwise", "auto"])
def test_prompts_are_scored_and_a_request_for_no_tokens_does_only_that(one, policy):
    batch = BatchDecoder(one, 2)
    both = batch.submit(PROMPTS[0], 3, prompt_logprobs=2, stop_ids=[], policy=policy)
    only = batch.submit(PROMPTS[2], 0, prompt_logprobs=0)
    state = one.prefill([PROMPTS[0]])
    choices = batch.submit(PROMPTS[1], 2, n=2, prompt_logprobs=1, state=state, stop_ids=[])
    nothing = batch.submit(PROMPTS[3], 0)
    found = collected(batch)
    for number, prompt, top in ((both, PROMPTS[0], 2), (only, PROMPTS[2], 0), *((c, PROMPTS[1], 1) for c in choices)):
        first, *rest = found[number]
        scores = first.prompt_logprobs
        assert [score.token for score in scores] == prompt and scores[0][1:] == (None, ())
        (expected,) = one.score([prompt])
        assert np.abs(np.array([score.logprob for score in scores[1:]]) - expected).max() < 1e-4
        assert all(len(score.top) == top for score in scores[1:])
        for score in scores[1:]:
            assert dict(score.top).get(score.token, score.logprob) == score.logprob
        assert all(event.prompt_logprobs is None for event in rest)
    assert found[both] == alone(one, PROMPTS[0], 3, stop_ids=[])
    for number in (only, nothing):
        (event,) = found[number]
        assert (event.token, event.text, event.finish_reason) == (NO_TOKEN, "", "length")
    assert found[nothing][0].prompt_logprobs is None


def test_what_cannot_be_scored_is_refused(one):
    batch = BatchDecoder(one, 2)
    for options in ({"policy": "zero"}, {"policy": "fixed-point"}, {"prompt_logprobs": -1}, {"prompt_logprobs": 10**6}):
        with pytest.raises(InputError, match="prompt_logprobs"):
            batch.submit(PROMPTS[0], **({"prompt_logprobs": 1} | options))
    with pytest.raises(InputError, match="prompt_logprobs needs a prompt"):
        batch.submit(None, state=one.prefill([PROMPTS[0]]), prompt_logprobs=1)
    assert batch.waiting == 0


def test_the_stop_that_matched_is_named(decoder_of):
    demo = decoder_of("demo")
    text = "".join(event.text for event in demo.generate([5, 6, 7], 20, stop_ids=[]))
    tokens = [event.token for event in demo.generate([5, 6, 7], 20, stop_ids=[])]
    batch = BatchDecoder(demo, 4)
    string = batch.submit([5, 6, 7], 20, stop_ids=[], stop_strings=["\0\0", text[4:6]])
    token = batch.submit([5, 6, 7], 20, stop_ids=[tokens[9], 10**3])
    none = batch.submit([5, 6, 7], 3, stop_ids=[])
    found = {number: events[-1] for number, events in collected(batch).items()}
    assert (found[string].finish_reason, found[string].stop) == ("stop_string", text[4:6])
    assert (found[token].finish_reason, found[token].stop) == ("stop_token", tokens[9])
    assert (found[none].finish_reason, found[none].stop) == ("length", None)


# States that are kept


@pytest.mark.parametrize("policy", ["stepwise", "fixed-point"])
def test_a_state_that_is_kept_holds_every_token_and_goes_on_as_if_alone(one, policy):
    batch = BatchDecoder(one, 3)
    kept = batch.submit(PROMPTS[2], 7, keep_state=True, policy=policy, stop_ids=[])
    other = batch.submit(PROMPTS[0], 20, policy="fixed-point", tolerance=1e-1, stop_ids=[])
    long = batch.submit([1] * (one.max_seq_len - 2), 9, keep_state=True, stop_ids=[])
    found = collected(batch)
    assert all(event.state is None for number in (kept, long) for event in found[number][:-1])
    assert all(event.state is None for event in found[other])
    state = found[kept][-1].state
    assert state.tokens == [PROMPTS[2] + [event.token for event in found[kept]]]
    assert state.prefill == found[kept][0].prefill
    assert (state.read_within == 0) == (policy == "stepwise")  # whatever its neighbours were
    again = BatchDecoder(one, 1)
    again.submit(None, 5, state=state, stop_ids=[])
    expected = one.prefill([PROMPTS[2]], policy=policy)
    list(one.generate(None, 7, state=expected, stop_ids=[]))
    assert [e.token for e in collected(again)[0]] == [
        e.token for e in one.generate(None, 5, state=expected, stop_ids=[])
    ]
    full = found[long]
    assert full[-1].finish_reason == "capacity"
    assert full[-1].state.tokens == [[1] * (one.max_seq_len - 2) + [event.token for event in full[:-1]]]


# Penalties and bias


@pytest.mark.parametrize(
    "options",
    [
        {"frequency_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"logit_bias": {7: 100.0, 3: -5.0}},
        {"logit_bias": {7: 30.0}, "frequency_penalty": 2.0, "repetition_penalty": 1.1, "temperature": 0.8, "seed": 5},
    ],
)
def test_penalties_and_bias_of_a_batch_are_those_of_a_single_run(one, options):
    batch = BatchDecoder(one, 2)
    number = batch.submit(PROMPTS[0], 25, stop_ids=[], **options)
    plain = batch.submit(PROMPTS[0], 25, stop_ids=[])
    found = collected(batch)
    assert found[number] == alone(one, PROMPTS[0], 25, stop_ids=[], **options)
    assert [e.token for e in found[number]] != [e.token for e in found[plain]]
    assert found[plain] == alone(one, PROMPTS[0], 25, stop_ids=[])


# Order and bounds


def test_a_higher_priority_is_admitted_first_and_equal_ones_in_their_order(one):
    batch = BatchDecoder(one, 1)
    numbers = [batch.submit([n + 1], 1, priority=priority) for n, priority in enumerate((0, 5, -1, 5, 0))]
    order = [event.request for event in batch.run()]
    assert order == [numbers[i] for i in (1, 3, 0, 4, 2)]


def test_a_full_queue_refuses_at_once_and_loses_nothing(one, steps):
    batch = BatchDecoder(one, 2, max_waiting=1, max_waiting_tokens=40)
    numbers = [batch.submit(PROMPTS[i], 4, stop_ids=[]) for i in (0, 1)]
    with pytest.raises(Busy, match="tokens wait, this one has 50, and 40 may wait"):
        batch.submit(PROMPTS[2], 4)
    batch.step()
    numbers.append(batch.submit(PROMPTS[3], 4, stop_ids=[]))
    state = one.prefill([PROMPTS[0]])
    steps.clear()
    for more in ({"prompt": [1]}, {"prompt": [1], "n": 5}, {"prompt": None, "state": state}):
        with pytest.raises(Busy, match="1 requests wait for 0 free slots, and 1 more may"):
            batch.submit(**more)
    assert steps == [] and (batch.waiting, batch.running) == (1, 2)
    found = collected(batch)
    for number, i in zip(numbers, (0, 1, 3), strict=True):
        assert found[number] == alone(one, PROMPTS[i], 4, stop_ids=[])
    batch.submit([1], 1)  # there is room again


def test_a_deadline_ends_a_request_that_waits_runs_or_is_suspended_and_no_other(one):
    batch, now = BatchDecoder(one, 2), [100.0]
    batch._clock = lambda: now[0]
    running = batch.submit(PROMPTS[3], 50, deadline_s=5, stop_ids=[])
    free = batch.submit(PROMPTS[1], 20, stop_ids=[])
    waiting = batch.submit(PROMPTS[0], 5, deadline_s=5)
    patient = batch.submit(PROMPTS[0], 5, deadline_s=50, stop_ids=[])
    seen = [event for _ in range(8) for event in batch.step()]
    assert {event.request for event in seen} == {running}
    batch.suspend(running)
    now[0] = 105.0
    found = collected(batch)
    for number in (running, waiting):
        assert [type(error) for error in found[number]] == [DeadlineExceeded]
    assert found[free] == alone(one, PROMPTS[1], 20, stop_ids=[])
    assert found[patient] == alone(one, PROMPTS[0], 5, stop_ids=[])


# Suspension


@pytest.mark.parametrize("lanes", [1, 2])
def test_requests_that_are_suspended_and_resumed_at_any_point_give_what_they_give_alone(one, lanes):
    draw = np.random.default_rng(lanes)
    options = [
        {"stop_ids": [], "temperature": 1.0, "seed": 1},
        {"stop_ids": [], "policy": "fixed-point", "tolerance": 1e-2},
        {"stop_ids": [], "prompt_logprobs": 1, "keep_state": True},
        {"stop_ids": []},
    ]
    with BatchDecoder(one, 2, lanes) as batch:
        numbers = [batch.submit(p, 9, **o) for p, o in zip(PROMPTS, options, strict=True)]
        found = {number: [] for number in numbers}
        held = set()
        while batch.waiting or batch.running or held:
            for number in held & {int(draw.integers(4)), int(draw.integers(4))}:
                batch.resume(number)
                held.discard(number)
            if (number := int(draw.integers(4))) not in held and draw.random() < 0.5:
                ended = bool(found[number]) and found[number][-1].finish_reason is not None
                batch.suspend(number)
                held |= set() if ended else {number}
            for event in batch.step():
                assert event.error is None
                found[event.request].append(event.event)
                if event.last:
                    held.discard(event.request)
    for number, prompt, option in zip(numbers, PROMPTS, options, strict=True):
        option = {key: value for key, value in option.items() if key not in ("prompt_logprobs", "keep_state")}
        expected = alone(one, prompt, 9, **option)
        assert [e.token for e in found[number]] == [e.token for e in expected]
        assert found[number][0].prefill == expected[0].prefill
    scores = found[numbers[2]][0].prompt_logprobs
    assert np.abs(np.array([s.logprob for s in scores[1:]]) - one.score([PROMPTS[2]])[0]).max() < 1e-4
    assert found[numbers[2]][-1].state.tokens == [PROMPTS[2] + [event.token for event in found[numbers[2]]]]


def test_a_suspended_request_takes_no_step_and_no_slot(one, steps):
    batch = BatchDecoder(one, 1)
    first = batch.submit(PROMPTS[3], 9, stop_ids=[])
    second = batch.submit(PROMPTS[1], 4, stop_ids=[])
    events = [event for _ in range(7) for event in batch.step()]
    batch.suspend(first)
    steps.clear()
    assert {event.request for event in batch.run()} == {second}
    assert len(steps) == len(PROMPTS[1]) + 3 and (batch.waiting, batch.running) == (0, 0)
    batch.suspend(first)  # is suspended already
    batch.resume(first)
    events += list(batch.run())
    assert [event.event for event in events] == alone(one, PROMPTS[3], 9, stop_ids=[])
    for gone in (first, 99):
        batch.suspend(gone)
        batch.resume(gone)
    assert (batch.waiting, batch.running) == (0, 0)


# Turns


@pytest.mark.parametrize("lanes", [1, 2])
def test_requests_that_take_turns_give_what_they_give_alone(one, lanes):
    options = [
        {"temperature": 1.0, "seed": 1},
        {"policy": "fixed-point", "tolerance": 1e-2},
        {"keep_state": True, "logprobs": 2},
        {},
        {"frequency_penalty": 1.0, "priority": 1},
    ]
    prompts = [*PROMPTS, PROMPTS[0]]
    with BatchDecoder(one, 2, lanes) as batch:
        batch.turn_tokens = 3
        numbers = [batch.submit(p, 14, stop_ids=[], **o) for p, o in zip(prompts, options, strict=True)]
        found, paused = {number: [] for number in numbers}, 0
        while batch.waiting or batch.running:
            for event in batch.step():
                found[event.request].append(event.event)
            paused = max(paused, batch.paused)
            assert batch.running <= 2 and batch.paused <= 8
    assert paused >= 2
    for number, prompt, option in zip(numbers, prompts, options, strict=True):
        kept = {key: value for key, value in option.items() if key not in ("keep_state", "priority")}
        expected = alone(one, prompt, 14, stop_ids=[], **kept)
        assert [e.token for e in found[number]] == [e.token for e in expected]
        assert found[number][0].prefill == expected[0].prefill
    assert found[numbers[2]][-1].state.tokens == [PROMPTS[2] + [event.token for event in found[numbers[2]]]]


def test_a_turn_ends_only_for_others_that_wait_with_at_least_its_priority(one):
    batch = BatchDecoder(one, 1)
    batch.turn_tokens = 4
    high, low, late = (batch.submit([n + 1], 10, stop_ids=[], priority=p) for n, p in enumerate((5, 0, 0)))
    order = [event.request for event in batch.run()]
    assert order == [high] * 10 + ([low] * 4 + [late] * 4) * 2 + [low] * 2 + [late] * 2
    alone_again = batch.submit([9], 10, stop_ids=[])
    assert [event.request for event in batch.run()] == [alone_again] * 10 and batch.paused == 0


def test_no_more_rows_are_paused_than_copies_may_be_held(one):
    batch = BatchDecoder(one, 1)
    batch.turn_tokens, paused = 1, 0
    numbers = [batch.submit([n + 1], 3, stop_ids=[]) for n in range(9)]
    ended = []
    while batch.waiting or batch.running:
        ended += [event.request for event in batch.step() if event.last]
        paused = max(paused, batch.paused)
    assert paused == 4 and sorted(ended) == numbers


# Prompts beside steps


def test_steps_of_the_others_come_between_blocks_of_a_prompt_that_is_iterated(one, monkeypatch):
    calls, decode, read = [], OrtCpuBuffers.decode, OrtCpuBuffers.read
    monkeypatch.setattr(OrtCpuBuffers, "decode", lambda self, *a, **k: calls.append("step") or decode(self, *a, **k))
    monkeypatch.setattr(OrtCpuBuffers, "read", lambda self, *a, **k: calls.append("block") or read(self, *a, **k))
    for blocks in (1, 3):
        batch = BatchDecoder(one, 3, blocks_per_step=blocks)
        running = batch.submit(PROMPTS[3], 110, stop_ids=[])
        for _ in range(8):
            batch.step()
        calls.clear()
        options = {"policy": "fixed-point", "tolerance": 1e-2, "stop_ids": []}
        long = batch.submit(PROMPTS[2], 5, **options)
        also = batch.submit(PROMPTS[0], 5, **options)
        found = collected(batch)
        first = calls.index("step")
        assert calls[:first] == ["block"] * blocks
        assert all(calls[i : i + blocks + 1] != ["block"] * (blocks + 1) for i in range(len(calls)))
        assert calls.count("block") > 4 * blocks
        for number, prompt in ((long, PROMPTS[2]), (also, PROMPTS[0])):
            assert found[number] == alone(one, prompt, 5, **options)  # with policy, passes and residual
        tokens = [event.token for event in found[running]]
        assert tokens == [event.token for event in alone(one, PROMPTS[3], 110, stop_ids=[])][-len(tokens) :]


def test_blocks_of_a_prompt_are_computed_in_pieces_and_give_what_whole_ones_give(one, monkeypatch):
    sizes, read = [], OrtCpuBuffers.read
    monkeypatch.setattr(
        OrtCpuBuffers, "read", lambda self, block, *a: sizes.append(len(block.tokens)) or read(self, block, *a)
    )
    whole = {policy: alone(one, PROMPTS[0] * 4, 5, policy=policy, stop_ids=[]) for policy in ("fixed-point", "zero")}
    assert max(sizes) > 50
    monkeypatch.setattr(batch_module, "_PIECE_TOKENS", 7)
    for policy, expected in whole.items():
        sizes.clear()
        batch = BatchDecoder(one, 2)
        number = batch.submit(PROMPTS[0] * 4, 5, policy=policy, stop_ids=[])
        found = collected(batch)[number]
        assert max(sizes) <= 7
        assert [event.token for event in found] == [event.token for event in expected]
        report, same = found[0].prefill, expected[0].prefill
        assert (report.policy, report.passes) == (same.policy, same.passes)
        assert report.residual == pytest.approx(same.residual, rel=1e-2) if same.residual else not report.residual


def test_a_prompt_beyond_the_capacity_is_refused_with_a_state_too(one):
    state = one.prefill([PROMPTS[0]])
    with pytest.raises(StateError, match="129 tokens and a slot holds 128"):
        BatchDecoder(one, 1).submit(PROMPTS[0] + [1] * 99, state=state)


# Caches


def sizes(batch):
    """The slots of the caches of each shard."""
    return [{cache.shape[2] for cache in shard.state.buffers._caches.values()} for shard in batch._shards]


@pytest.fixture
def work(monkeypatch):
    """For each step that follows: caches that were filled between steps, and sizes that all changed at once."""
    counts, fit, move = [], OrtCpuBuffers.fit, OrtCpuBuffers._move_into

    def fitted(self, lengths, soon):
        before = len(self._resized.caches) if self._resized else 0
        fit(self, lengths, soon)
        counts.append(max(0, len(self._resized.caches) - before) if self._resized else 0)

    def moved(self, *arguments):
        if self.batch > 1:  # not where a prompt is iterated
            counts.append("all at once")
        return move(self, *arguments)

    monkeypatch.setattr(OrtCpuBuffers, "fit", fitted)
    monkeypatch.setattr(OrtCpuBuffers, "_move_into", moved)
    return counts


@pytest.fixture
def shrinking(monkeypatch):
    """Makes caches shrink that are as small as those of the models here."""
    monkeypatch.setattr(ort_cpu, "_SMALL_EXCESS_BYTES", 0)


def test_caches_grow_one_between_two_steps_and_every_token_stays(one, work):
    batch = BatchDecoder(one, 3)
    work.clear()
    numbers = [batch.submit([i + 1], 120 - 30 * i, stop_ids=[], temperature=1.0, seed=i) for i in range(3)]
    found = collected(batch)
    assert set(work) == {0, 1} and sum(work) > 2 * one.config.n_layer
    assert sizes(batch) == [{one.max_seq_len}] or sizes(batch)[0] < {one.max_seq_len}
    for i, number in enumerate(numbers):
        assert found[number] == alone(one, [i + 1], 120 - 30 * i, stop_ids=[], temperature=1.0, seed=i)


def test_caches_have_grown_when_the_row_of_a_prompt_that_was_iterated_is_added(one, work):
    prompt = np.random.default_rng(3).integers(0, 250, 100).tolist()
    options = {"policy": "fixed-point", "tolerance": 1e-2, "stop_ids": []}
    batch = BatchDecoder(one, 3)
    running = batch.submit(PROMPTS[3], 40, stop_ids=[])
    batch.step()
    assert sizes(batch) == [{32}]
    work.clear()
    number = batch.submit(prompt, 5, **options)
    found = collected(batch)
    assert "all at once" not in work
    assert found[number] == alone(one, prompt, 5, **options)
    assert found[running] == alone(one, PROMPTS[3], 40, stop_ids=[])


def test_caches_stay_as_large_as_they_are_where_little_is_read_in_vain(one, monkeypatch):
    monkeypatch.setattr(ort_cpu, "_SMALL_EXCESS_BYTES", 2**40)
    batch, seen = BatchDecoder(one, 2), []
    for _ in range(3):
        batch.submit([1, 2], 60, stop_ids=[])
        seen += [sizes(batch)[0] for _ in batch.run()]
    assert len({max(size) for size in seen[:59]}) > 1 and seen[60:] == [{max(seen[59])}] * 120


def test_caches_shrink_when_the_longest_row_has_left(one, work, shrinking):
    batch = BatchDecoder(one, 3)
    long = batch.submit([1] * 120, 3, stop_ids=[])
    short = batch.submit(PROMPTS[3], 30, stop_ids=[])
    events = []
    while not any(event.request == long and event.last for event in events[-3:]):
        events += batch.step()
    assert sizes(batch) == [{one.max_seq_len}]
    late = batch.submit(PROMPTS[1], 20, stop_ids=[])
    work.clear()
    events += batch.run()
    assert set(work) == {0, 1}
    assert max(sizes(batch)[0]) <= one.max_seq_len // 2
    for number, prompt, budget in ((short, PROMPTS[3], 30), (late, PROMPTS[1], 20)):
        assert [event.event for event in events if event.request == number] == alone(one, prompt, budget, stop_ids=[])


def test_caches_shrink_when_a_row_has_left_for_which_they_were_to_grow(one, shrinking):
    state, alone = one.prefill([[1] * 90, [2, 3]], policy="stepwise"), one.prefill([[2, 3]], policy="stepwise")
    while state.lengths[0] < 95:
        state.fit()
        assert np.abs(one.step(state, [7, 8])[1] - one.step(alone, [8])[0]).max() < 1e-4
    buffers = state.buffers
    assert buffers._resized.room > buffers._bound.room
    state.drop(0)
    for _ in range(2 * one.config.n_layer + 2):
        state.fit()
        assert np.abs(one.step(state, [9]) - one.step(alone, [9])).max() < 1e-4
    assert buffers._bound.room <= 64


def test_rows_that_come_go_and_move_while_caches_change_their_size_give_what_they_give_alone(one, shrinking):
    draw = np.random.default_rng(5)
    lengths = draw.choice([1, 2, 5, 30, 60, 100], 40).tolist()
    prompts = [draw.integers(0, 250, length).tolist() for length in lengths]
    budgets = [int(draw.integers(1, 25)) for _ in prompts]
    state = one.prefill([PROMPTS[2]], policy="stepwise")
    batch, expected, seen = BatchDecoder(one, 3), {}, set()
    for prompt, budget in zip(prompts, budgets, strict=True):
        number = batch.submit(prompt, budget, stop_ids=[])
        expected[number] = alone(one, prompt, budget, stop_ids=[])
    number = batch.submit(None, 9, state=state, stop_ids=[])
    expected[number] = alone(one, PROMPTS[2], 9, stop_ids=[])
    found = {number: [] for number in expected}
    for event in batch.run():
        found[event.request].append(event.event)
        seen |= sizes(batch)[0]
    assert len(seen) > 2
    for number, events in found.items():
        assert [e.token for e in events] == [e.token for e in expected[number]]


# Rows of different length


@pytest.fixture
def divides(monkeypatch):
    """Makes shards by length pay for short rows too, and counts the rows of each step by shard."""
    steps, run = [], Shard.run
    monkeypatch.setattr(batch_module, "slots_of_a_step", lambda decoder, state: 20.0)
    monkeypatch.setattr(Shard, "run", lambda self, made: steps.append(self.state.row_lengths) or run(self, made))
    return steps


def test_long_rows_are_stepped_apart_from_short_ones_and_every_request_gives_what_it_gives_alone(
    one, divides, shrinking
):
    draw = np.random.default_rng(6)
    lengths = draw.choice([1, 2, 5, 60, 100], 40).tolist()
    prompts = [draw.integers(0, 250, length).tolist() for length in lengths]
    options = [{"stop_ids": [], "temperature": float(i % 2), "seed": i} for i in range(len(prompts))]
    for i in (3, 9, 20):
        options[i] |= {"policy": "fixed-point", "tolerance": 1e-2}
    options[5] |= {"prompt_logprobs": 1}
    budgets = [int(draw.integers(1, 28)) for _ in prompts]
    batch, found, expected = BatchDecoder(one, 5), {}, {}
    for prompt, budget, option in zip(prompts, budgets, options, strict=True):
        expected[batch.submit(prompt, budget, **option)] = (prompt, budget, option)
    for event in batch.run():
        assert event.error is None
        found.setdefault(event.request, []).append(event.event)
        assert batch.running <= 5 and len(batch._shards) <= 2
    for number, (prompt, budget, option) in expected.items():
        option = {key: value for key, value in option.items() if key != "prompt_logprobs"}
        assert found[number] == alone(one, prompt, budget, **option)
    pairs = list(pairwise(divides))
    assert any(min(a) > 60 and max(b) < 60 for a, b in pairs if a and b)
    assert {len(lengths) for lengths in divides} >= {1, 2, 3, 4, 5}


def test_a_second_shard_comes_with_a_long_row_and_goes_with_it(one, divides, shrinking):
    batch = BatchDecoder(one, 4)
    for prompt in PROMPTS[:1] * 3:
        batch.submit(prompt, 40, stop_ids=[])
    for _ in range(4):
        batch.step()
    assert len(batch._shards) == 1
    long = batch.submit(None, 5, state=one.prefill([[1] * 100]), stop_ids=[])
    batch.step()
    assert sorted(shard.state.batch for shard in batch._shards) == [1, 3]
    assert min(sizes(batch), key=max) == {32}  # the others' caches did not grow
    while any(not event.last for event in batch.step() if event.request == long):
        pass
    batch.step()
    assert [shard.state.batch for shard in batch._shards] == [3] and sizes(batch) == [{32}]


def test_the_least_cost_is_found_for_rows_in_one_step_or_in_two():
    draw = np.random.default_rng(7)
    for _ in range(200):
        lengths = sorted(draw.choice([1, 5, 20, 100, 1000], draw.integers(1, 9)).tolist(), reverse=True)
        step = float(draw.choice([1, 50, 500, 5000]))
        cost, first = divided(lengths, step)
        ways = [(lengths[:count], lengths[count:]) for count in range(len(lengths) + 1)]
        costs = [sum(step + len(part) * max(part) for part in way if part) for way in ways]
        assert cost == min(costs) == costs[first]
    assert divided([1900, *[10] * 7], 6000.0)[1] == 1 and divided([100, *[10] * 7], 6000.0)[1] == 0
