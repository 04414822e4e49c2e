"""States as things: forked, picked apart, rewound and moved, each bit-equal to the run that went straight on.

What is copied or put back is compared to the bit; what is computed in a batch of another shape, within `tolerances`.
"""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest

import lrt_deploy
from lrt_deploy.errors import BackendError, InputError, StateError
from lrt_deploy.runtime import decoder as decoder_module
from lrt_deploy.runtime.backends import ort_cpu
from lrt_deploy.runtime.backends.base import check_finite
from lrt_deploy.runtime.backends.ort_cpu import OrtCpuBuffers

NAMES = (*sorted(path.name for path in (Path(__file__).parent / "data" / "golden").iterdir()), "demo")
CAPACITY = 128
RNG = np.random.default_rng(5)
LONG, SHORT, OTHER = (RNG.integers(0, 250, n).tolist() for n in (40, 7, 23))
STEPS = [[3, 4], [5, 6], [7, 8], [9, 10]]


@pytest.fixture(params=NAMES)
def decoder(request, decoder_of):
    return decoder_of(request.param)


@pytest.fixture
def one(decoder_of):
    return decoder_of("padded_vocab")


def snapshot(state):
    """Everything that decides what follows, per row."""
    caches = [state.cache(layer) for layer in range(state.buffers.layers)]
    return [
        {
            "tokens": np.array(state.tokens[row]),
            "latent": np.zeros(0) if state.latent is None else state.latent[row],
            "logits": state.logits[row],
            "cache": np.stack([array[row, :, : state.lengths[row]] for pair in caches for array in pair]),
        }
        for row in range(state.batch)
    ]


def equal(first, second):
    """Bit for bit."""
    pairs = zip(first, second, strict=True)
    return all(a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in pairs)


def straight(decoder, prompts, steps, **options):
    state = decoder.prefill(prompts, **options)
    for tokens in steps:
        decoder.step(state, tokens)
    return state


# Fork and rows


@pytest.mark.parametrize("policy", ["stepwise", "fixed-point"])
def test_a_fork_continues_to_the_bit_and_leaves_the_original_alone(decoder, policy):
    state = straight(decoder, [LONG, SHORT], STEPS[:2], policy=policy)
    before = snapshot(state)
    twin = state.fork()
    assert equal(snapshot(twin), before)
    for tokens in STEPS[2:]:
        decoder.step(twin, tokens)
    assert equal(snapshot(state), before)
    expected = snapshot(straight(decoder, [LONG, SHORT], STEPS, policy=policy))
    assert equal(snapshot(twin), expected)
    assert not equal(snapshot(twin), before)


def test_a_fork_of_a_fork_and_a_fork_that_goes_elsewhere(one):
    state = one.prefill([SHORT])
    twin = state.fork().fork()
    one.step(twin, [1])
    one.step(state, [2])
    assert equal(snapshot(twin), snapshot(straight(one, [SHORT], [[1]])))
    assert equal(snapshot(state), snapshot(straight(one, [SHORT], [[2]])))


def test_rows_are_picked_repeated_and_reordered(decoder, tolerances):
    state = straight(decoder, [LONG, SHORT, OTHER], [[1, 2, 3]])
    picked = state.rows([2, 0, 2])
    assert equal(snapshot(picked), [snapshot(state)[row] for row in (2, 0, 2)])
    decoder.step(picked, [4, 5, 6])
    decoder.step(state, [5, 9, 4])
    for row, source in ((0, 2), (1, 0)):
        assert np.abs(picked.logits[row] - state.logits[source]).max() <= tolerances.logits
    assert np.abs(picked.logits[2] - picked.logits[0]).max() > tolerances.zero_memory


@pytest.mark.parametrize(
    ("rows", "words"),
    [([3], "no row 3"), ([-1], r"rows\[0\] is -1"), ([True], "is True"), ([], "0 rows"), ([0] * 9, "9 rows")],
)
def test_rows_that_are_not_there_are_refused(one, rows, words):
    with pytest.raises((StateError, InputError), match=words):
        one.prefill([LONG, SHORT, OTHER]).rows(rows)


def test_only_the_live_part_is_copied(one):
    written = []
    write = OrtCpuBuffers.write_slots
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            OrtCpuBuffers,
            "write_slots",
            lambda self, *a: (
                written.extend(x.shape[1] for n, x in a[2].items() if n.startswith("past_")) or write(self, *a)
            ),
        )
        state = one.prefill([SHORT])
        state.fork()
    assert set(written) == {len(SHORT)}


def test_num_bytes_counts_what_is_live(one):
    config, state = one.config, one.prefill([SHORT])
    per_token = 4 * (2 * config.n_layer * config.kv_dim + config.n_embd) + 8
    logits = 4 * config.vocab_size
    assert state.num_bytes == len(SHORT) * per_token + logits
    one.step(state, [1])
    assert state.num_bytes == (len(SHORT) + 1) * per_token + logits == state.fork().num_bytes
    state.rewind(2)
    assert state.num_bytes == 2 * per_token + logits
    iterated = one.prefill([LONG], policy="fixed-point", tolerance=1e-4)  # keeps the logits that no step gives again
    assert iterated.num_bytes == len(LONG) * per_token + 2 * logits


# Rewind


@pytest.mark.parametrize("policy", ["stepwise", "fixed-point", "auto"])
def test_a_rewind_returns_to_the_bit_and_replays_to_the_bit(decoder, policy):
    at_prompt = straight(decoder, [LONG, SHORT], [], policy=policy)
    after_two = snapshot(straight(decoder, [LONG, SHORT], STEPS[:2], policy=policy))
    state = straight(decoder, [LONG, SHORT], STEPS, policy=policy)
    expected = snapshot(state)
    state.rewind([len(LONG) + 2, len(SHORT) + 2])
    assert equal(snapshot(state), after_two)
    for tokens in STEPS[2:]:
        decoder.step(state, tokens)
    assert equal(snapshot(state), expected)
    state.rewind([len(LONG), len(SHORT)])
    assert equal(snapshot(state), snapshot(at_prompt))
    for tokens in STEPS:
        decoder.step(state, tokens)
    assert equal(snapshot(state), expected)


def test_a_rewind_computes_nothing_until_logits_are_wanted_and_then_one_step(one, monkeypatch):
    steps = []
    decode = OrtCpuBuffers.decode
    monkeypatch.setattr(OrtCpuBuffers, "decode", lambda self, *a, **kw: steps.append(1) or decode(self, *a, **kw))
    state = straight(one, [LONG], [[1], [2], [3]], policy="stepwise")
    del steps[:]
    state.rewind(len(LONG) + 1)
    assert steps == [] and state.lengths.tolist() == [len(LONG) + 1] and state.latent is not None
    first, second = state.logits, state.logits
    assert len(steps) == 1 and np.array_equal(first, second)
    state.rewind(5)
    one.step(state, [9])
    assert len(steps) == 2


def test_logits_inside_an_iterated_prompt_are_computed_without_touching_the_state(one, tolerances):
    state = one.prefill([LONG], policy="fixed-point", tolerance=1e-5)
    cut = 30
    keys = [state.cache(layer)[0][:, :, :cut].copy() for layer in range(one.config.n_layer)]
    state.rewind(cut)
    latent = state.latent
    assert np.abs(state.logits - one.prefill([LONG[:cut]], policy="stepwise").logits).max() <= tolerances.logits
    assert np.array_equal(state.latent, latent)
    assert all(np.array_equal(state.cache(layer)[0], keys[layer]) for layer in range(one.config.n_layer))


def test_without_the_latent_a_rewind_would_go_wrong(one, tolerances):
    """The twin: cutting the cache alone, as one may in a plain transformer."""
    state, expected = straight(one, [LONG], [[1], [2]]), straight(one, [LONG], [[1]])
    carried = state.buffers.latent.copy()
    state.rewind(len(LONG) + 1)
    one.step(expected, [5])
    wrong = state.fork()
    wrong.buffers.set_latent(np.array([0]), carried)
    assert np.array_equal(one.step(state, [5]), expected.logits)
    assert np.abs(one.step(wrong, [5]) - expected.logits).max() > tolerances.zero_memory


BAD_LENGTHS = [
    ([40, 48], "sequence 1 holds 7 tokens and cannot be rewound to 48"),
    ([41, 2], "sequence 0 holds 40 tokens and cannot be rewound to 41"),
    ([1], "1 lengths were given for a state of 2"),
    (-1, "rewound to -1"),
    ([1.0, 2], "rewound to 1.0"),
    ([5, True], "rewound to True"),
]


@pytest.mark.parametrize(("lengths", "words"), BAD_LENGTHS, ids=str)
def test_a_rewind_that_cannot_be_is_refused_and_changes_nothing(one, lengths, words):
    state = one.prefill([LONG, SHORT])
    before = snapshot(state)
    with pytest.raises(StateError, match=words):
        state.rewind(lengths)
    assert equal(snapshot(state), before)


def test_logits_that_a_row_lacks_are_refused_before_any_are_computed(one):
    state = one.prefill([LONG, SHORT], policy="stepwise")
    state.rewind([len(LONG) - 1, 0])
    computed = state.computed_tokens
    with pytest.raises(StateError, match="sequence 1 holds no token yet"):
        _ = state.logits
    assert state.computed_tokens == computed


def test_a_row_that_was_copied_holds_no_memory_of_its_neighbours(one):
    state = one.prefill([LONG, SHORT, OTHER], policy="stepwise")
    for tokens in STEPS:
        one.step(state, [*tokens, 1])
    row = state.rows([1])._now.rows[0]
    arrays = [row.logits, *row.latents]
    assert sum(
        {id(a if a.base is None else a.base): (a if a.base is None else a.base).nbytes for a in arrays}.values()
    ) == (sum(array.nbytes for array in arrays))


def test_a_state_rewound_to_nothing_has_no_logits_and_begins_anew(one):
    state = one.prefill([LONG])
    state.rewind(0)
    with pytest.raises(StateError, match="holds no token"):
        _ = state.logits
    assert not state.latent.any()
    one.prefill([SHORT], state=state, policy="stepwise")
    assert equal(snapshot(state), snapshot(one.prefill([SHORT], policy="stepwise")))


# Rows that come and go


def test_rows_join_and_leave_between_steps(decoder, tolerances):
    state = decoder.new_state(3)
    assert (state.batch, state.slots, state.logits.shape[0]) == (0, 3, 0)
    for prompt in (LONG, SHORT):
        state.add(decoder.prefill([prompt]))
    decoder.step(state, [1, 2])
    state.add(decoder.prefill([OTHER, SHORT]), 0)
    decoder.step(state, [3, 4, 5])
    state.drop(0)  # the last row takes its place
    decoder.step(state, [6, 7])
    assert state.tokens == [[*OTHER, 5, 6], [*SHORT, 2, 4, 7]]
    for row, tokens in enumerate(state.tokens):
        alone = decoder.prefill([tokens], policy="stepwise")
        assert np.abs(state.logits[row] - alone.logits[0]).max() <= tolerances.logits
        assert np.abs(state.logits[1 - row] - alone.logits[0]).max() > tolerances.logits


def test_a_state_without_rows_is_not_stepped(one):
    with pytest.raises(StateError, match="no rows"):
        one.step(one.new_state(2), [])


def test_an_empty_row_is_fed_from_its_first_token(one, tolerances):
    state = one.new_state(2)
    state.add(one.prefill([LONG]))
    state.add()
    one.step(state, [1, SHORT[0]])
    one.step(state, [2, SHORT[1]])
    assert np.abs(state.logits[1] - one.prefill([SHORT[:2]]).logits[0]).max() <= tolerances.logits


def test_there_is_no_room_beyond_the_slots(one):
    state = one.new_state(1)
    state.add()
    with pytest.raises(StateError, match="all 1 slots"):
        state.add()
    assert state.batch == 1
    with pytest.raises(InputError, match=r"9 slots.*8"):
        one.new_state(9)


def test_a_dropped_row_is_not_computed(one, monkeypatch):
    rows = []
    decode = OrtCpuBuffers.decode
    monkeypatch.setattr(
        OrtCpuBuffers, "decode", lambda self, t, *a, **kw: rows.append(len(t)) or decode(self, t, *a, **kw)
    )
    state = one.prefill([SHORT, SHORT, SHORT], policy="stepwise")
    del rows[:]
    state.drop(1)
    one.step(state, [1, 2])
    assert rows == [2] and state.batch == 2


# Between decoders


def test_a_state_moves_to_another_decoder_of_the_same_model(one, export_once):
    with lrt_deploy.open_decoder(export_once("padded_vocab"), max_seq_len=64) as other:
        moved = other.adopt(one.prefill([LONG]))
        assert moved.capacity == 64
        assert np.array_equal(other.step(moved, [1]), straight(one, [LONG], [[1]]).logits)
        with pytest.raises(StateError, match="holds 70 tokens, more than the capacity of 64"):
            other.adopt(one.prefill([LONG + LONG[:30]]))


def test_a_state_of_another_model_is_not_adopted(one, decoder_of):
    with pytest.raises(StateError, match="of another model"):
        one.adopt(decoder_of("gate32").prefill([SHORT]))
    with pytest.raises(StateError, match="of another model"):
        one.new_state(1).add(decoder_of("gate32").prefill([SHORT]))


# What goes wrong inside


@pytest.mark.parametrize("policy", ["stepwise", "fixed-point"])
def test_numbers_that_are_not_finite_never_reach_a_neighbour(one, monkeypatch, policy):
    """A failed reading must not leave NaN in the slots beyond a row: 0 times NaN is NaN."""
    state, healthy = one.prefill([SHORT, LONG]), one.prefill([SHORT, LONG])
    with monkeypatch.context() as patch:

        def spoil(logits, *rest):
            keys, _ = state.buffers.cache(0, state.capacity)
            keys[0, :, len(SHORT) : len(SHORT) + len(OTHER)] = np.nan
            check_finite(logits * np.nan, *rest)

        patch.setattr(decoder_module, "check_finite", spoil)
        with pytest.raises(BackendError, match="not finite"):
            one.prefill([OTHER, OTHER], state=state, policy=policy)
    for tokens in STEPS:
        assert np.array_equal(one.step(state, tokens), one.step(healthy, tokens))


# Caches that grow


class Short:
    """numpy, whose n-th large `zeros` fails."""

    def __init__(self, fail_at):
        self.left = fail_at

    def __getattr__(self, name):
        return getattr(np, name)

    def zeros(self, shape, *rest):
        if np.prod(shape) > 1000:
            self.left -= 1
            if self.left == 0:
                raise MemoryError(f"Unable to allocate {shape}")
        return np.zeros(shape, *rest)


@pytest.mark.parametrize("fail_at", range(1, 7))  # a cache each
def test_a_cache_that_cannot_grow_leaves_the_state_as_it_was(one, monkeypatch, fail_at):
    tokens = (LONG * 3)[:100]
    expected, state, failures = one.prefill([tokens], policy="stepwise"), one.prefill([tokens[:1]]), 0
    for token in tokens[1:]:
        with monkeypatch.context() as patch:
            patch.setattr(ort_cpu, "np", Short(fail_at))
            try:
                one.step(state, [token])
                continue
            except MemoryError:
                failures += 1
        assert np.isfinite(state.logits).all()  # what needs no memory still works
        one.step(state, [token])
    assert failures and equal(snapshot(state), snapshot(expected))


def test_growing_keeps_one_old_cache_at_most_beside_the_larger_ones(one, monkeypatch):
    state, alive = one.prefill([list(range(31))], policy="stepwise"), []
    old = [weakref.ref(cache) for cache in state.buffers._caches.values()]
    move = OrtCpuBuffers._move_into

    class Watched(dict):
        def __getitem__(self, name):
            alive.append(sum(cache() is not None for cache in old))
            return super().__getitem__(name)

    monkeypatch.setattr(OrtCpuBuffers, "_move_into", lambda self, larger, bound: move(self, Watched(larger), bound))
    for token in (1, 2, 3):
        one.step(state, [token])
    assert alive == list(range(len(old), 0, -1))
    assert not any(cache() is not None for cache in old)


# After generating


def emitted(one, state, prompt, count, **options):
    return [event.token for event in one.generate(prompt, count, state=state, **({"stop_ids": []} | options))]


def test_two_generations_give_the_tokens_of_one(decoder):
    whole = [event.token for event in decoder.generate(LONG, 20, stop_ids=[])]
    state = decoder.prefill([LONG])
    assert emitted(decoder, state, None, 8) + emitted(decoder, state, None, 12) == whole
    assert state.tokens == [LONG + whole]


def test_what_follows_an_answer_knows_all_of_it(decoder):
    state = decoder.prefill([LONG], policy="stepwise")
    said = emitted(decoder, state, None, 8)
    kept, saved = state.fork(), state.rows([0])
    decoder.prefill([SHORT], state=state, policy="stepwise")
    assert equal(snapshot(state), snapshot(decoder.prefill([LONG + said + SHORT], policy="stepwise")))
    assert equal(snapshot(kept), snapshot(decoder.prefill([LONG + said], policy="stepwise")))
    assert equal(snapshot(saved), snapshot(kept))


def test_a_saved_state_holds_the_last_token_that_was_emitted(one, tmp_path):
    state = one.prefill([LONG])
    said = emitted(one, state, None, 3)
    state.save(tmp_path / "one.state")
    loaded = one.load_state(tmp_path / "one.state")
    assert loaded.tokens == [LONG + said] and equal(snapshot(loaded), snapshot(state))


def test_an_answer_that_is_not_listened_to_the_end_leaves_what_was_heard(one):
    state = one.prefill([LONG], policy="stepwise")
    events = one.generate(SHORT, 9, state=state, policy="stepwise", stop_ids=[])
    heard = [next(events).token for _ in range(3)]
    events.close()
    assert equal(snapshot(state), snapshot(one.prefill([LONG + SHORT + heard], policy="stepwise")))


def test_stop_tokens_and_the_tokens_of_stop_strings_are_in_the_state(one):
    whole = [event.token for event in one.generate(LONG, 9, stop_ids=[])]
    at = next(i for i, token in enumerate(whole) if i and token not in whole[:i])
    state = one.prefill([LONG])
    assert emitted(one, state, None, 9, stop_ids=[whole[at]]) == whole[: at + 1]
    assert state.tokens == [LONG + whole[: at + 1]]


def test_the_token_that_found_the_state_full_is_not_in_it(export_once):
    with lrt_deploy.open_decoder(export_once("padded_vocab"), max_seq_len=12) as small:
        state = small.prefill([LONG[:9]])
        events = list(small.generate(None, 20, state=state, stop_ids=[]))
        assert (len(events), events[-1].finish_reason) == (4, "capacity")
        assert state.tokens == [LONG[:9] + [event.token for event in events[:3]]]
        assert int(state.logits.argmax()) == events[-1].token  # it follows from what is there
        with pytest.raises(StateError, match="do not fit its capacity of 12"):
            small.step(state, [events[-1].token])


def test_taking_back_the_last_token_of_an_answer_computes_nothing(one, monkeypatch):
    state = one.prefill([LONG])
    said, steps = emitted(one, state, None, 3), []
    decode = OrtCpuBuffers.decode
    monkeypatch.setattr(OrtCpuBuffers, "decode", lambda self, *a, **k: steps.append(1) or decode(self, *a, **k))
    assert state.lengths[0] == len(LONG) + 3 and state.computed_tokens == len(LONG) + 2
    state.rewind(len(LONG) + 3)
    state.rewind(len(LONG) + 2)
    assert state.tokens == [LONG + said[:2]] and state.latent is not None and steps == []


def test_a_closed_decoder_does_not_go_on_with_an_answer(export_once):
    decoder = lrt_deploy.open_decoder(export_once("padded_vocab"))
    events = decoder.generate(LONG, 5, stop_ids=[])
    next(events)
    decoder.close()
    with pytest.raises(BackendError, match="closed"):
        next(events)
