"""The decoder: what it refuses and by which words, that a refusal changes nothing, and that rows do not mix."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

import lrt_deploy
from lrt_deploy.errors import BackendError, BundleError, InputError, NonFiniteError, StateError
from lrt_deploy.runtime import decoder as decoder_module
from lrt_deploy.runtime.backends.base import check_finite
from lrt_deploy.runtime.backends.ort_cpu import OrtCpuBuffers
from lrt_deploy.runtime.state import DecodeState

NAME = "padded_vocab"  # ids 0 to 299; the tables have 320 rows
VOCAB, PADDED, CAPACITY, BATCH = 300, 320, 128, 8
RNG = np.random.default_rng(0)
LONG, SHORT, OTHER = (RNG.integers(0, VOCAB, n).tolist() for n in (40, 7, 23))

# Every way to read a prompt that is exact.
POLICIES = ("auto", "stepwise", "fixed-point")
EXACT = {"policy": "fixed-point", "tolerance": 1e-5}


@pytest.fixture
def decoder(decoder_of):
    return decoder_of(NAME)


@pytest.fixture
def fresh(export_once):
    """A decoder of the test's own."""
    with lrt_deploy.open_decoder(export_once(NAME)) as decoder:
        yield decoder


def snapshot(state):
    """Everything that a state is, by name: of the caches, what each row has written."""
    found = {"lengths": state.lengths, "logits": state.logits, "latent": state.latent}
    for layer in range(state.buffers.layers):
        for name, cache in zip(("keys", "values"), state.cache(layer), strict=True):
            for row, length in enumerate(state.lengths):
                found[f"{name} {layer} of row {row}"] = cache[row, :, :length]
    return found


def changes(first, second, tolerance=0.0):
    """What of two snapshots is further apart than a tolerance."""
    assert first.keys() == second.keys()
    far = {
        name: first[name].shape != second[name].shape or np.abs(first[name] - second[name]).max(initial=0) > tolerance
        for name in first
    }
    return [name for name in first if far[name]]


# What comes in


BAD_ROWS = [
    ([-1], "token id -1 at index 0"),
    ([5, VOCAB], "token id 300 at index 1"),
    ([PADDED - 1], "token id 319 at index 0"),
    ([PADDED], "token id 320"),
    ([2**63], "9223372036854775808"),
    ([2**70], "prompt 0"),
    ([-(2**63)], "token id -9223372036854775808"),
    ([], "prompt 0 is empty"),
    (np.zeros(0), "prompt 0 is empty"),
    ([1.0, 2.0], "float64"),
    ([float("nan")], "float64"),
    ([True, False], "bool"),
    (["1"], "prompt 0"),
    ("text", "prompt 0"),
    ([None], "prompt 0"),
    ([[1, 2]], "prompt 0 has 2 dimension"),
    ([[1], [2, 3]], "prompt 0 is not a flat list"),
    (7, "prompt 0 is 7, expected a flat list"),
    (None, "prompt 0"),
    ({1: 2}, "prompt 0"),
]


@pytest.mark.parametrize(("row", "words"), BAD_ROWS, ids=lambda value: str(value)[:20])
def test_a_bad_prompt_is_refused_by_name(decoder, row, words):
    with pytest.raises(InputError) as caught:
        decoder.prefill([row])
    assert words in str(caught.value)
    with pytest.raises(InputError, match="prompt 1"):
        decoder.prefill([[1], row])


@pytest.mark.parametrize("prompts", [[], (), "text", b"text", [1, 2, 3], np.zeros((0, 3), np.int64)], ids=repr)
def test_prompts_that_are_no_rows_are_refused(decoder, prompts):
    with pytest.raises(InputError, match="prompt"):
        decoder.prefill(prompts)


@pytest.mark.parametrize("prompts", [None, 5, iter([[1]]), {"a": [1]}], ids=["None", "5", "iterator", "dict"])
def test_prompts_of_a_wrong_type_are_refused(decoder, prompts):
    with pytest.raises(InputError, match="prompt"):
        decoder.prefill(prompts)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint8, np.uint64])
def test_prompts_may_be_arrays_of_whole_numbers(decoder, dtype):
    expected = decoder.prefill([[1, 2, 3]]).logits
    assert np.array_equal(decoder.prefill(np.array([[1, 2, 3]], dtype)).logits, expected)
    assert np.array_equal(decoder.prefill([np.array([1, 2, 3], dtype)]).logits, expected)
    assert np.array_equal(decoder.prefill(((1, 2, 3),)).logits, expected)


def test_the_last_id_and_the_last_place_are_allowed(decoder):
    state = decoder.prefill([[0, VOCAB - 1] * (CAPACITY // 2)])
    assert state.lengths.tolist() == [CAPACITY] == [state.capacity]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_beyond_the_capacity_is_refused(decoder, policy):
    words = "sequence 1 has 129 tokens, more than its capacity of 128; shorten it"
    with pytest.raises(StateError, match=words):
        decoder.prefill([[1], [1] * (CAPACITY + 1)], policy=policy)


def test_more_rows_than_the_bundle_was_exported_for_are_refused(decoder):
    assert decoder.prefill([[1]] * BATCH).batch == BATCH
    with pytest.raises(InputError, match=r"9 prompts were given; expected 1 to 8"):
        decoder.prefill([[1]] * (BATCH + 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "fast"}, "fast"),
        ({"policy": None}, "None"),
        ({"tolerance": -1.0}, "-1.0"),
        ({"tolerance": float("nan")}, "nan"),
        ({"tolerance": float("inf")}, "inf"),
        ({"tolerance": "1e-3"}, "1e-3"),
    ],
)
def test_unknown_ways_to_read_are_refused(decoder, options, words):
    with pytest.raises(InputError, match=words):
        decoder.prefill([[1]], **options)


BAD_STEPS = [
    ([1], "1 token.*2 sequence"),
    ([1, 2, 3], "3 token.*2 sequence"),
    ([], "0 token.*2 sequence"),
    ([1, -1], "token id -1 at index 1"),
    ([VOCAB, 1], "token id 300 at index 0"),
    ([1.0, 2.0], "float64"),
    ([True, True], "bool"),
    ([[1], [2]], "2 dimension"),
    (1, "tokens is 1, expected a flat list"),
    ("12", "tokens"),
    (None, "tokens"),
]


@pytest.mark.parametrize(("tokens", "words"), BAD_STEPS, ids=lambda value: str(value)[:20])
def test_a_bad_step_is_refused_and_changes_nothing(decoder, tokens, words):
    state = decoder.prefill([LONG, SHORT])
    before = snapshot(state)
    with pytest.raises(InputError, match=words):
        decoder.step(state, tokens)
    assert changes(snapshot(state), before) == []


def test_a_step_beyond_the_capacity_is_refused_and_changes_nothing(decoder):
    state = decoder.prefill([[1] * CAPACITY, [2]])
    before = snapshot(state)
    with pytest.raises(StateError, match="sequence 0 holds 128 tokens and 1 more"):
        decoder.step(state, [1, 1])
    assert changes(snapshot(state), before) == []


@pytest.mark.parametrize(
    ("prompts", "error"),
    [([[1]], InputError), ([[1], []], InputError), ([[1], [VOCAB]], InputError), ([[1], [1] * 128], StateError)],
    ids=["rows", "empty", "id", "capacity"],
)
def test_a_refused_continuation_changes_nothing(decoder, prompts, error):
    state = decoder.prefill([LONG, SHORT])
    before = snapshot(state)
    with pytest.raises(error):
        decoder.prefill(prompts, state=state)
    assert changes(snapshot(state), before) == []
    decoder.step(state, [1, 2])
    assert changes(snapshot(state), before)


# Rows and continuations


@pytest.mark.parametrize("policy", POLICIES)
def test_ragged_rows_equal_the_same_rows_alone(decoder, policy, tolerances):
    options = EXACT if policy == "fixed-point" else {"policy": policy}
    rows = [LONG, SHORT, OTHER]
    together, alone = decoder.prefill(rows, **options), [decoder.prefill([row], **options) for row in rows]
    tokens = [[3, 4, 5], [6, 7, 8], [9, 10, 11], [250, 251, 252]]
    for step in [None, *tokens]:
        if step is not None:
            decoder.step(together, step)
            for state, token in zip(alone, step, strict=True):
                decoder.step(state, [token])
        for i, state in enumerate(alone):
            assert together.lengths[i] == state.lengths[0]
            assert np.abs(together.logits[i] - state.logits[0]).max() <= tolerances.logits
            assert np.abs(together.latent[i] - state.latent[0]).max() <= tolerances.latent
            for layer in range(decoder.config.n_layer):
                for ours, theirs in zip(together.cache(layer), state.cache(layer), strict=True):
                    assert np.abs(ours[i, :, : state.lengths[0]] - theirs[0]).max() <= tolerances.cache
    assert np.abs(together.logits[0] - together.logits[1]).max() > tolerances.zero_memory


def test_a_row_does_not_depend_on_what_stands_beside_it(decoder, tolerances):
    first, second = decoder.prefill([SHORT, SHORT]), decoder.prefill([SHORT, LONG[: len(SHORT)]])
    for token in (5, 6, 7):
        decoder.step(first, [token, 9])
        decoder.step(second, [token, 200])
    assert np.abs(first.logits[0] - second.logits[0]).max() <= tolerances.logits
    assert np.abs(first.logits[1] - second.logits[1]).max() > tolerances.zero_memory


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cut", [1, 5, 39])
def test_a_prompt_in_two_parts_equals_it_in_one(decoder, policy, cut, tolerances):
    options = EXACT if policy == "fixed-point" else {"policy": policy}
    whole = decoder.prefill([LONG])
    parts = decoder.prefill([LONG[:cut]], **options)
    assert decoder.prefill([LONG[cut:]], state=parts, **options) is parts
    assert changes(snapshot(parts), snapshot(whole), tolerances.cache) == []
    decoder.step(parts, [1])
    decoder.step(whole, [1])
    assert changes(snapshot(parts), snapshot(whole), tolerances.cache) == []
    afresh = decoder.prefill([LONG[cut:]], **options)
    assert np.abs(afresh.logits - decoder.prefill([LONG]).logits).max() > tolerances.zero_memory


@pytest.mark.parametrize("policy", POLICIES)
def test_ragged_continuations_equal_the_rows_alone(decoder, policy, tolerances):
    options = EXACT if policy == "fixed-point" else {"policy": policy}
    state = decoder.prefill([LONG, SHORT])
    decoder.prefill([SHORT, OTHER], state=state, **options)
    for i, row in enumerate((LONG + SHORT, SHORT + OTHER)):
        alone = decoder.prefill([row])
        assert state.lengths[i] == len(row)
        assert np.abs(state.logits[i] - alone.logits[0]).max() <= tolerances.logits
        assert np.abs(state.latent[i] - alone.latent[0]).max() <= tolerances.latent


def test_what_a_state_gives_out_is_a_copy(decoder):
    state = decoder.prefill([SHORT])
    before = snapshot(state)
    for array in snapshot(state).values():
        array[...] = 77
    decoder.step(state, [1])[...] = 77
    again = decoder.prefill([SHORT])
    assert changes(snapshot(again), before) == []
    decoder.step(again, [1])
    assert changes(snapshot(again), snapshot(state)) == []


def test_two_states_of_one_decoder_do_not_touch_each_other(decoder):
    first, second = decoder.prefill([SHORT]), decoder.prefill([LONG])
    before = snapshot(first)
    decoder.step(second, [4])
    decoder.prefill([OTHER], state=second, **EXACT)
    assert changes(snapshot(first), before) == []


# What goes wrong inside


def poison(monkeypatch, method, value, calls_before=0):
    """Let one call of the buffers, after some good ones, fail with an error, or end with these logits."""
    original, seen = getattr(OrtCpuBuffers, method), []

    def call(self, *arguments, **options):
        seen.append(method)
        if len(seen) == calls_before + 1 and isinstance(value, Exception):
            raise value
        result = original(self, *arguments, **options)
        if len(seen) != calls_before + 1:
            return result
        logits = result if method == "decode" else result[1]
        if logits is not None:
            logits.reshape(-1)[3] = value
        return result

    monkeypatch.setattr(OrtCpuBuffers, method, call)
    return seen


def test_a_token_visits_five_files(decoder):
    state = decoder.prefill([SHORT, OTHER])
    decoder.step(state, [1, 2])
    visited = set()

    def visit(frame, event, argument):
        visited.add(frame.f_code.co_filename)

    sys.setprofile(visit)
    try:
        decoder.step(state, [3, 4])
    finally:
        sys.setprofile(None)
    ours = {Path(name).name for name in visited if f"{os.sep}lrt_deploy{os.sep}" in name or "/runtime/" in name}
    assert ours == {"decoder.py", "prompts.py", "state.py", "ort_cpu.py", "base.py"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_step_to_numbers_that_are_not_finite_is_refused_and_changes_nothing(fresh, monkeypatch, value, tolerances):
    state, healthy = fresh.prefill([LONG, SHORT]), fresh.prefill([LONG, SHORT])
    before = snapshot(state)
    with monkeypatch.context() as patch:
        poison(patch, "decode", value)
        words = r"ort-cpu in fp32 produced 1 logits that are not finite, first in row 0 after 41 tokens"
        with pytest.raises(BackendError, match=words):
            fresh.step(state, [1, 2])
    assert changes(snapshot(state), before) == []
    assert np.array_equal(fresh.step(state, [1, 2]), fresh.step(healthy, [1, 2]))
    assert changes(snapshot(state), snapshot(healthy)) == []


def test_without_taking_the_latent_back_a_failed_step_would_show(fresh, monkeypatch):
    """The twin of the test above."""
    state, healthy = fresh.prefill([LONG, SHORT]), fresh.prefill([LONG, SHORT])
    with monkeypatch.context() as patch:
        poison(patch, "decode", float("nan"))
        patch.setattr(DecodeState, "_set_latents", lambda self, rows, lengths, first=0: None)
        with pytest.raises(BackendError, match="not finite"):
            fresh.step(state, [1, 2])
        assert not np.array_equal(fresh.step(state, [1, 2]), fresh.step(healthy, [1, 2]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [(0, 0), (1, 150), (1, VOCAB - 1)])
def test_a_single_logit_that_is_not_finite_is_seen_wherever_it_is(decoder, value, at):
    logits = RNG.normal(size=(2, VOCAB)).astype(np.float32)
    check_finite(logits, np.array([6, 9]), decoder.prefill([SHORT]).owner.backend)
    logits[at] = value
    with pytest.raises(NonFiniteError, match=rf"1 logits .* in row {at[0]} after {[7, 10][at[0]]} tokens") as raised:
        check_finite(logits, np.array([6, 9]), decoder.prefill([SHORT]).owner.backend)
    assert raised.value.rows == [at[0]]


@pytest.mark.parametrize("policy", ["stepwise", "fixed-point"])
def test_a_prompt_to_numbers_that_are_not_finite_is_refused_and_changes_nothing(fresh, monkeypatch, policy, tolerances):
    state, healthy = fresh.prefill([SHORT]), fresh.prefill([SHORT])
    before = snapshot(state)
    with monkeypatch.context() as patch:
        patch.setattr(decoder_module, "check_finite", lambda logits, *rest: check_finite(logits * np.nan, *rest))
        with pytest.raises(BackendError, match="not finite"):
            fresh.prefill([OTHER], state=state, policy=policy)
    assert changes(snapshot(state), before) == []
    fresh.prefill([OTHER], state=state)
    fresh.prefill([OTHER], state=healthy)
    assert changes(snapshot(state), snapshot(healthy), tolerances.cache) == []


FAILING = [
    (policy, method, n) for policy, method in (("stepwise", "decode"), ("fixed-point", "read")) for n in (0, 1, 9)
]


@pytest.mark.parametrize(("policy", "method", "good_calls"), [*FAILING, ("zero", "read", 0)])
def test_a_backend_that_fails_amid_a_prompt_leaves_the_state_as_it_was(
    fresh, monkeypatch, policy, method, good_calls, tolerances
):
    state, healthy = fresh.prefill([SHORT]), fresh.prefill([SHORT])
    before = snapshot(state)
    with monkeypatch.context() as patch:
        seen = poison(patch, method, BackendError("the device is gone"), good_calls)
        with pytest.raises(BackendError, match="the device is gone"):
            fresh.prefill([LONG], state=state, policy=policy)
        assert len(seen) == good_calls + 1
    assert changes(snapshot(state), before) == []
    for s in (state, healthy):
        fresh.step(s, [1])
        fresh.prefill([OTHER], state=s, policy="stepwise")
    assert changes(snapshot(state), snapshot(healthy), tolerances.cache) == []


def test_a_session_that_fails_is_a_backend_error(fresh, monkeypatch):
    state = fresh.prefill([SHORT])
    before = snapshot(state)

    class Failing:
        io_binding = state.buffers._session.io_binding

        def run_with_iobinding(self, binding):
            raise RuntimeError("[ONNXRuntimeError] : 6 : out of memory")

    monkeypatch.setattr(state.buffers, "_session", Failing())
    with pytest.raises(BackendError, match="out of memory"):
        fresh.step(state, [1])
    assert changes(snapshot(state), before) == []


# Generating


def generated(decoder, *arguments, **options):
    return list(decoder.generate(*arguments, **options))


def test_events_carry_tokens_text_and_how_the_prompt_was_read(decoder):
    events = generated(decoder, SHORT, 20, stop_ids=[])
    assert len(events) == 20
    assert [event.finish_reason for event in events] == [None] * 19 + ["length"]
    assert "".join(event.text for event in events) == decoder.tokenizer.decode([event.token for event in events])
    assert {event.prefill for event in events} == {decoder.prefill([SHORT]).prefill}


def test_generated_tokens_are_those_of_prefill_and_step(decoder):
    tokens = [event.token for event in generated(decoder, SHORT, 10, stop_ids=[])]
    state = decoder.prefill([SHORT])
    for token in tokens:
        assert token == int(state.logits[0].argmax())
        decoder.step(state, [token])


def test_events_come_as_they_are_chosen(decoder, monkeypatch):
    steps = []
    decode = OrtCpuBuffers.decode
    state = decoder.prefill([SHORT])
    monkeypatch.setattr(OrtCpuBuffers, "decode", lambda self, *a, **k: steps.append(1) or decode(self, *a, **k))
    events = decoder.generate(None, 5, state=state, stop_ids=[])
    assert steps == []
    next(events)
    assert len(steps) == 0
    next(events)
    assert len(steps) == 1
    assert len(list(events)) == 3
    assert len(steps) == 4  # the last token is fed when something that follows from it is asked for
    assert state.lengths[0] == len(SHORT) + 5 and len(steps) == 4
    assert state.logits.shape == (1, decoder.config.vocab_size) and len(steps) == 5


def test_a_stop_token_ends_and_has_no_text(decoder):
    tokens = [event.token for event in generated(decoder, SHORT, 20, stop_ids=[])]
    stop = tokens[7]
    events = generated(decoder, SHORT, 20, stop_ids=[stop])
    assert [event.token for event in events] == tokens[: tokens.index(stop) + 1]
    assert events[-1].finish_reason == "stop_token"
    text = "".join(event.text for event in events)
    assert text == decoder.tokenizer.decode([event.token for event in events[:-1]])


def test_without_stop_ids_the_tokenizers_are_taken(decoder):
    stops = decoder.tokenizer.stop_ids
    assert len(stops) == 2
    for seed in range(40):
        events = generated(decoder, SHORT, 60, temperature=4.0, seed=seed)
        tokens = [event.token for event in events]
        if stops & set(tokens):
            assert tokens[-1] in stops
            assert not stops & set(tokens[:-1])
            assert events[-1].finish_reason == "stop_token"
            return
    pytest.fail("no stop token was drawn")


def test_a_stop_string_ends_and_is_cut_off(decoder):
    free = generated(decoder, SHORT, 40, stop_ids=[], temperature=1.0, seed=3)
    text = "".join(event.text for event in free)
    stop = text[8:11]
    events = generated(decoder, SHORT, 40, stop_ids=[], stop_strings=[stop], temperature=1.0, seed=3)
    assert events[-1].finish_reason == "stop_string"
    assert "".join(event.text for event in events) == text[: text.index(stop)]
    assert len(events) < len(free)
    assert [event.token for event in events] == [event.token for event in free[: len(events)]]


def test_a_full_state_ends_by_capacity(export_once):
    with lrt_deploy.open_decoder(export_once(NAME), max_seq_len=12) as decoder:
        events = generated(decoder, SHORT, 100, stop_ids=[])
        assert len(SHORT) + len(events) == 12 + 1  # the last token is chosen from the last place, and needs none itself
        assert events[-1].finish_reason == "capacity"
        assert generated(decoder, [1] * 12, 100, stop_ids=[])[-1].finish_reason == "capacity"
        with pytest.raises(StateError, match="capacity of 12"):
            generated(decoder, [1] * 13, 100)


def test_seeds_reproduce_and_differ(decoder):
    def run(seed):
        return [event.token for event in generated(decoder, SHORT, 16, stop_ids=[], temperature=1.0, seed=seed)]

    assert run(5) == run(5)
    assert run(5) != run(6)
    assert run(None) != run(None)


def test_sampling_options_are_used(decoder):
    greedy = [event.token for event in generated(decoder, SHORT, 16, stop_ids=[])]
    options = {"temperature": 3.0, "seed": 1, "stop_ids": []}
    assert [event.token for event in generated(decoder, SHORT, 16, top_k=1, **options)] == greedy
    assert [event.token for event in generated(decoder, SHORT, 16, **options)] != greedy


def test_a_text_prompt_is_read_with_bos_in_front(decoder):
    ids = [decoder.tokenizer.bos_id, *decoder.tokenizer.encode("Hello")]
    by_text, by_ids = (generated(decoder, prompt, 5, stop_ids=[]) for prompt in ("Hello", ids))
    assert [event.token for event in by_text] == [event.token for event in by_ids]


def test_generation_continues_a_state(decoder):
    state = decoder.prefill([LONG])
    continued = generated(decoder, SHORT, 8, state=state, stop_ids=[])
    afresh = generated(decoder, LONG + SHORT, 8, stop_ids=[])
    assert [event.token for event in continued] == [event.token for event in afresh]
    assert state.tokens == [LONG + SHORT + [event.token for event in continued]]


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "empty"),
        ([VOCAB], {}, "token id 300"),
        ([1.5], {}, "float64"),
        (SHORT, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (SHORT, {"max_new_tokens": -1}, "max_new_tokens is -1"),
        (SHORT, {"temprature": 1.0}, "temprature"),
        (SHORT, {"temperature": -1.0}, "temperature"),
        (SHORT, {"top_p": 0.0}, "top_p"),
        (SHORT, {"stop_strings": "end"}, "stop strings"),
        (SHORT, {"stop_strings": [""]}, "stop strings"),
    ],
    ids=str,
)
def test_a_bad_generation_is_refused_at_once(decoder, prompt, options, words):
    with pytest.raises(InputError, match=words):
        decoder.generate(prompt, **options)


# Opening and closing


def test_a_decoder_says_what_it_is(decoder, golden_of):
    assert (decoder.backend, decoder.precision, decoder.max_seq_len) == ("ort-cpu", "fp32", CAPACITY)
    assert "ONNX Runtime" in decoder.backend_detail
    assert "1 thread" in decoder.backend_detail
    assert decoder.config.vocab_size == VOCAB


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"backend": "gpu"}, BackendError, "no backend 'gpu'.*ort-cpu"),
        ({"backend": ""}, BackendError, "no backend ''"),
        ({"precision": "int8"}, BundleError, "holds fp32, not int8"),
        ({"threads": 0}, InputError, "threads is 0"),
        ({"threads": -2}, InputError, "threads is -2"),
        ({"threads": 10**6}, InputError, "threads is 1000000, expected 1 to"),
        ({"max_seq_len": 0}, InputError, "max_seq_len is 0.*1 to 128"),
        ({"max_seq_len": 129}, InputError, "max_seq_len is 129.*1 to 128"),
    ],
    ids=str,
)
def test_an_opening_that_cannot_be_is_refused(export_once, options, error, words):
    with pytest.raises(error, match=words):
        lrt_deploy.open_decoder(export_once(NAME), **options)


@pytest.mark.parametrize(
    "options",
    [{"backend": "auto"}, {"precision": "fp32"}, {"threads": 2}, {"verify": True}, {"max_seq_len": 64}],
    ids=str,
)
def test_however_it_is_opened_it_computes_the_same(export_once, decoder, options, tolerances):
    with lrt_deploy.open_decoder(export_once(NAME), **options) as other:
        state = other.prefill([LONG])
        assert np.abs(state.logits - decoder.prefill([LONG]).logits).max() <= tolerances.logits
        assert state.capacity == options.get("max_seq_len", CAPACITY)


def test_a_lower_capacity_takes_less_memory_and_is_kept(export_once):
    with lrt_deploy.open_decoder(export_once(NAME), max_seq_len=32) as decoder:
        state = decoder.prefill([[1] * 32])
        assert state.buffers.cache(0, state.capacity)[0].shape[2] == 32
        with pytest.raises(StateError, match="capacity of 32"):
            decoder.step(state, [1])


def test_a_closed_decoder_says_so(export_once):
    decoder = lrt_deploy.open_decoder(export_once(NAME))
    state = decoder.prefill([SHORT])
    decoder.close()
    decoder.close()
    with pytest.raises(BackendError, match="closed"):
        decoder.prefill([SHORT])
    with pytest.raises(BackendError, match="closed"):
        decoder.step(state, [1])


def test_a_state_of_another_decoder_is_refused(decoder, decoder_of):
    state = decoder_of("gate32").prefill([SHORT])
    with pytest.raises(StateError, match="another decoder"):
        decoder.step(state, [1])
    with pytest.raises(StateError, match="another decoder"):
        decoder.prefill([SHORT], state=state)
