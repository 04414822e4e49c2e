"""Prompts that share a beginning with a state cost what is new, and give what reading them whole gives."""

from __future__ import annotations

import numpy as np
import pytest

from lrt_deploy.errors import InputError, StateError
from lrt_deploy.runtime.batch import BatchDecoder

RNG = np.random.default_rng(9)
LONG, OTHER = RNG.integers(0, 250, 60).tolist(), RNG.integers(0, 250, 20).tolist()


@pytest.fixture
def decoder(decoder_of):
    return decoder_of("padded_vocab")


def read(decoder, prompts, state, **options):
    return decoder.prefill(prompts, state=state, reuse=True, **options)


@pytest.mark.parametrize("name", ["padded_vocab", "mr_gqa_SSSL", "baseline_ve", "demo"])
@pytest.mark.parametrize("kept", [0, 1, 31, 59, 60])
def test_an_edited_prompt_gives_what_reading_it_whole_gives_to_the_bit(name, kept, decoder_of):
    decoder, edited = decoder_of(name), LONG[:kept] + OTHER
    state = decoder.prefill([LONG], policy="stepwise")
    decoder.step(state, [7])
    assert read(decoder, [edited], state, policy="stepwise") is state
    whole = decoder.prefill([edited], policy="stepwise")
    memory = decoder.config.memory
    compared = [state.logits, whole.logits] if not memory else [state.latent, whole.latent]
    if memory:  # without memory there is no stepwise way: a block of another size rounds differently
        assert np.array_equal(state.logits, whole.logits)
    assert np.abs(compared[0] - compared[1]).max() <= (0 if memory else 5e-5)
    assert (state.prefill.reused_tokens, state.tokens) == (kept, [edited])
    if memory:
        assert state.prefill.passes == pytest.approx(len(OTHER) / len(edited))


def test_only_the_new_part_is_computed(decoder):
    state = decoder.prefill([LONG], policy="stepwise")
    before = state.computed_tokens
    assert before == len(LONG)
    read(decoder, [LONG[:40] + OTHER], state, policy="stepwise")
    assert state.computed_tokens - before == len(OTHER)


@pytest.mark.parametrize("policy", ["stepwise", "fixed-point"])
def test_a_prompt_that_is_wholly_there_computes_nothing(decoder, policy):
    state = decoder.prefill([LONG], policy=policy, tolerance=1e-4)
    logits, before = state.logits, state.computed_tokens
    decoder.step(state, [3])
    read(decoder, [LONG], state, policy=policy, tolerance=1e-4)
    assert state.computed_tokens - before == 1  # the step
    assert (state.prefill.passes, state.prefill.reused_tokens) == (0.0, len(LONG))
    assert np.array_equal(state.logits, logits)


def test_rows_share_what_each_of_them_shares(decoder, tolerances):
    state = decoder.prefill([LONG, OTHER, LONG[:9]])
    prompts = [[*LONG[:50], 1, 2], OTHER, [5]]
    read(decoder, prompts, state)
    assert state.prefill.reused_tokens == 50 + len(OTHER) - 1  # a row wholly there is left one token to read
    for row, prompt in enumerate(prompts):
        alone = decoder.prefill([prompt], policy="stepwise")
        assert np.abs(state.logits[row] - alone.logits[0]).max() <= tolerances.logits


def test_nothing_is_reused_that_was_read_less_exactly_than_asked_for(decoder):
    rough = decoder.prefill([LONG], policy="zero")
    for policy in ("auto", "fixed-point", "stepwise"):
        found = read(decoder, [LONG + OTHER], rough.fork(), policy=policy, tolerance=1e6)
        assert found.prefill.reused_tokens == 0
    exact = decoder.prefill([LONG], policy="stepwise").logits
    again = decoder.prefill([LONG], policy="zero")
    assert np.array_equal(read(decoder, [LONG], again, policy="stepwise").logits, exact)
    loose = decoder.prefill([LONG], policy="fixed-point", tolerance=0.1)
    assert loose.read_within > 1e-4
    assert read(decoder, [LONG + OTHER], loose, tolerance=1e-4).prefill.reused_tokens == 0


@pytest.mark.parametrize("held", ["zero", "stepwise", "fixed-point"])
@pytest.mark.parametrize("prompt", [LONG, LONG + OTHER, LONG[:40] + OTHER, LONG[:40]])
def test_zero_memory_gives_the_same_numbers_whatever_the_state_holds(decoder, held, prompt):
    expected = decoder.prefill([prompt], policy="zero")
    state = read(decoder, [prompt], decoder.prefill([LONG], policy=held), policy="zero")
    assert np.array_equal(state.logits, expected.logits) and np.array_equal(state.latent, expected.latent)
    assert state.prefill == expected.prefill


@pytest.mark.parametrize("prompt", [LONG, LONG + OTHER, LONG[:40]])
@pytest.mark.parametrize("policy", ["fixed-point", "auto"])
def test_the_residual_is_not_below_that_of_what_is_reused(decoder, policy, prompt):
    state = decoder.prefill([LONG], policy="fixed-point", tolerance=100)
    within = state.read_within
    assert within > 0 and state.prefill.residual == within
    decoder.step(state, [3])
    batch = BatchDecoder(decoder, 1)
    batch.submit(prompt, 1, state=state, policy=policy, tolerance=100, stop_ids=[])
    assert next(iter(batch.run())).event.prefill.residual >= within
    assert read(decoder, [prompt], state, policy=policy, tolerance=100).prefill.residual >= within
    assert read(decoder, [OTHER], state, policy="stepwise").prefill.residual is None


def test_what_is_refused_changes_nothing(decoder):
    state = decoder.prefill([LONG])
    for prompts, error in (([[300]], InputError), ([[1], [2]], InputError), ([[1] * 129], StateError)):
        with pytest.raises(error):
            read(decoder, prompts, state)
    assert state.tokens == [LONG]
    read(decoder, [LONG + [1] * 68], state)  # whole prompts count, not what is added
    assert state.lengths.tolist() == [128]


def test_generation_reuses_and_goes_on_without_a_prompt(decoder):
    state = decoder.prefill([LONG])
    events = list(decoder.generate(LONG[:30] + OTHER, 5, state=state, reuse=True, policy="stepwise", stop_ids=[]))
    assert events[0].prefill.reused_tokens == 30
    assert events == [
        e.__class__(e.token, e.text, e.finish_reason, events[0].prefill, e.logprob)
        for e in decoder.generate(LONG[:30] + OTHER, 5, policy="stepwise", stop_ids=[])
    ]
    decoder.step(state, [events[-1].token])
    more = [e.token for e in decoder.generate(None, 3, state=state, stop_ids=[])]
    whole = [e.token for e in decoder.generate(LONG[:30] + OTHER, 8, policy="stepwise", stop_ids=[])]
    assert whole == [e.token for e in events] + more
    for bad in (None, decoder.prefill([[1], [2]])):
        with pytest.raises(InputError, match="state of one sequence"):
            list(decoder.generate(None, 3, state=bad))
