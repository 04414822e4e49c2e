"""Prefill: every policy gives the state that stepwise reading gives, within what it promises, and says what it did.

The trained models are read at lengths up to 2.7 x `sequence_len`; the random goldens contract badly and fall back.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass

import numpy as np
import pytest

import lrt_deploy
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import InputError
from lrt_deploy.evaluation.rollout import kl_divergence
from lrt_deploy.fields import LARGEST_COUNT
from lrt_deploy.runtime import fixed_point
from lrt_deploy.runtime.backends.base import BlockLimits
from lrt_deploy.runtime.fixed_point import SweepOptions, Sweeps, finish
from lrt_deploy.runtime.prefill import PrefillOptions, resolve
from lrt_deploy.tolerances import DEFAULT_PREFILL_TOLERANCE, FP32, SMALLEST_PREFILL_TOLERANCE

slow = pytest.mark.slow

LENGTHS = (16, 64, 200, 256, 700)
TIGHT = 1e-5
GREEDY_TOKENS = 64
PLAIN = PrefillOptions(sweeps=fixed_point.JACOBI)
BEST = PrefillOptions()
# What is allowed at TIGHT beside the latent's own tolerance. Values in a cache are not normed: where they pass 32 (the
# demo's reach 120, where float32 numbers are 8e-6 apart), the error is relative to that.
CACHE_ERROR, LARGE_VALUE, LOGIT_ERROR = 5e-5, 32.0, 5e-5
MAX_KL = 1e-6
TINY_CAPACITY = 320  # 10 x the smallest sequence_len among the goldens
RANDOM = ("gate32", "interleaved", "mr_gqa_SSSL", "mr_mha_L", "no_resid_lambdas", "no_x0", "padded_vocab")


@dataclass
class Truth:
    """A prompt read stepwise: the state after it, and the latents at all positions."""

    ids: list[int]
    state: object
    latents: np.ndarray  # (T, C)


def read_truth(decoder, ids) -> Truth:
    sweeps = Sweeps(decoder._backend.allocate(1), 0, np.array(ids), 0, zeros(decoder), SweepOptions())
    finish(sweeps.finish_stepwise())
    return Truth(list(ids), decoder.prefill([ids], policy="stepwise"), sweeps.latents[1:])


def zeros(decoder):
    return np.zeros(decoder.config.n_embd, np.float32)


@pytest.fixture
def read(monkeypatch):
    """(decoder, ids, options) -> state and the latents (T, C) at all positions of a prompt that is iterated."""
    seen: list[Sweeps] = []

    class Recorded(Sweeps):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append(self)

    monkeypatch.setattr(fixed_point, "Sweeps", Recorded)

    def prefill(decoder, ids, **options):
        seen.clear()
        state = decoder.prefill([ids], **options)
        return state, np.concatenate([sweeps.latents[1:] for sweeps in seen])

    return prefill


def errors(truth: Truth, state, latents) -> dict[str, float]:
    """What two readings of a prompt differ by."""
    expected = truth.state
    caches = [
        np.abs(a - b).max() / max(1.0, np.abs(a).max() / LARGE_VALUE)
        for layer in range(state.buffers.layers)
        for a, b in zip(expected.cache(layer), state.cache(layer), strict=True)
    ]
    return {
        "latents": float(np.abs(latents - truth.latents).max()),
        "carried": float(np.abs(state.latent - expected.latent).max()),
        "caches": float(max(caches)),
        "logits": float(np.abs(state.logits - expected.logits).max()),
    }


def too_large(found: dict[str, float], tolerance: float, turns: int = 1) -> dict[str, float]:
    """Each turn is estimated against stepwise reading on the same state, so that over several turns errors add up."""
    bounds = {"latents": tolerance, "carried": tolerance, "caches": CACHE_ERROR, "logits": LOGIT_ERROR}
    return {name: error for name, error in found.items() if not error <= turns * bounds[name]}


def continue_greedily(decoder, expected, state, count=GREEDY_TOKENS) -> int:
    """Decode from two states, each on its own tokens; returns how many agree before the first difference."""
    for made in range(count):
        token, other = int(expected.logits[0].argmax()), int(state.logits[0].argmax())
        if token != other:
            second, first = np.sort(expected.logits[0])[-2:]
            assert first - second <= FP32.near_tie_margin, f"token {made} differs at a margin of {first - second:.1e}"
            warnings.warn(f"near tie at token {made}: the top two logits are {first - second:.1e} apart", stacklevel=2)
            return made
        decoder.step(expected, [token])
        decoder.step(state, [token])
    return count


# Trained models


@pytest.fixture(scope="module", params=["held out", "other text"])
def trained(request, golden_of, make_once, root):
    """(bundle, 700 tokens) of a model that was trained, so that its memory contracts."""
    golden = golden_of("demo")
    bundle = make_once("prefill", lambda folder: lrt_deploy.export_bundle(golden.folder, folder, max_seq_len=1100))
    ids = golden.arrays["bpb_x"].reshape(-1)
    if request.param == "other text":
        with lrt_deploy.open_decoder(bundle) as decoder:
            ids = decoder.tokenizer.encode_prompt((root / "LICENSE").read_text())
    return bundle, np.resize(ids, max(LENGTHS)).tolist()


@pytest.fixture(scope="module")
def truths(trained):
    """Every length, read stepwise once."""
    bundle, ids = trained
    with lrt_deploy.open_decoder(bundle) as decoder:
        yield {length: read_truth(decoder, ids[:length]) for length in LENGTHS}


@pytest.fixture(scope="module", params=["plain", "best"])
def algorithm(request, trained):
    """(decoder, passes allowed up to sequence_len at TIGHT, passes allowed beyond)."""
    options, within, beyond = (PLAIN, 13, 17) if request.param == "plain" else (BEST, 10, 13)
    with lrt_deploy.open_decoder(trained[0], prefill_options=options) as decoder:
        yield decoder, within, beyond


@pytest.mark.parametrize("length", LENGTHS)
def test_at_the_tight_tolerance_everything_equals_stepwise(algorithm, truths, read, length):
    decoder, within, beyond = algorithm
    truth = truths[length]
    state, latents = read(decoder, truth.ids, policy="fixed-point", tolerance=TIGHT)
    assert too_large(errors(truth, state, latents), TIGHT) == {}, state.prefill
    assert state.prefill.passes <= (within if length <= decoder.config.sequence_len else beyond), state.prefill
    continue_greedily(decoder, decoder.prefill([truth.ids], policy="stepwise"), state)


@pytest.mark.parametrize("length", LENGTHS)
def test_at_the_default_tolerance_the_next_token_is_the_same(trained, truths, read, length):
    truth = truths[length]
    with lrt_deploy.open_decoder(trained[0]) as decoder:
        state, latents = read(decoder, truth.ids, policy="fixed-point")
    expected = truth.state.logits[0]
    assert kl_divergence(expected.astype(np.float64), state.logits[0].astype(np.float64)) <= MAX_KL, state.prefill
    assert float(np.abs(latents - truth.latents).max()) <= state.prefill.residual <= DEFAULT_PREFILL_TOLERANCE
    assert state.prefill.policy == "fixed-point"
    assert state.prefill.passes <= (7 if length <= 256 else 12)


@pytest.mark.parametrize("length", [16, 256])
def test_zero_memory_is_another_model_and_says_so(trained, truths, length):
    truth = truths[length]
    with lrt_deploy.open_decoder(trained[0]) as decoder:
        state = decoder.prefill([truth.ids], policy="zero")
        expected = decoder.prefill([truth.ids], policy="stepwise")
    latents = np.broadcast_to(state.latent[0], truth.latents.shape)
    found = errors(Truth(truth.ids, expected, latents), state, latents)
    assert too_large(found, TIGHT).keys() == {"carried", "caches", "logits"}
    assert kl_divergence(*(s.logits[0].astype(np.float64) for s in (expected, state))) > MAX_KL
    assert (state.prefill.policy, state.prefill.passes, state.prefill.residual) == ("zero", 1.0, None)
    assert "not the model as trained" in state.prefill.note


# Random models, which contract badly or not at all


@pytest.fixture(scope="module")
def random_decoder(make_once, golden_of):
    """name of a random golden -> decoder with room for the longest prompts."""
    opened = {}

    def get(name):
        if name not in opened:
            source = golden_of(name).folder
            make = lambda folder: lrt_deploy.export_bundle(source, folder, max_seq_len=TINY_CAPACITY)  # noqa: E731
            opened[name] = lrt_deploy.open_decoder(make_once(f"prefill-{name}", make))
        return opened[name]

    yield get
    for decoder in opened.values():
        decoder.close()


def prompt(decoder, length, seed=0):
    return np.random.default_rng(seed).integers(0, decoder.config.vocab_size, length).tolist()


@pytest.mark.parametrize("length", [16, 64, 256])
@pytest.mark.parametrize("name", [*(pytest.param(n, marks=slow) for n in RANDOM if n != "mr_gqa_SSSL"), "mr_gqa_SSSL"])
def test_a_random_golden_is_read_as_exactly(random_decoder, read, name, length):
    decoder = random_decoder(name)
    truth = read_truth(decoder, prompt(decoder, length))
    state, latents = read(decoder, truth.ids, policy="fixed-point", tolerance=TIGHT)
    assert too_large(errors(truth, state, latents), TIGHT) == {}, state.prefill
    report = state.prefill
    assert report.policy in ("fixed-point", "stepwise")
    assert (report.note is None) == (report.policy == "fixed-point")
    assert report.residual <= TIGHT
    continue_greedily(
        decoder, decoder.prefill([truth.ids], policy="stepwise"), state, min(GREEDY_TOKENS, TINY_CAPACITY - length)
    )
    zero = decoder.prefill([truth.ids], policy="zero")
    assert np.abs(zero.latent[0] - truth.latents[-1]).max() > 100 * TIGHT


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=slow) for n in RANDOM if n != "mr_gqa_SSSL"), "mr_gqa_SSSL"])
def test_plain_sweeps_are_the_authors_refinement_passes(random_decoder, golden_of, tolerances, name):
    decoder, golden = random_decoder(name), golden_of(name)
    ids, arrays = golden.ids[0], golden.arrays
    sweeps = Sweeps(decoder._backend.allocate(1), 0, ids, 0, zeros(decoder), SweepOptions(stride=1))
    for done, stored in enumerate(("zero_mem", "refine1", "refine2", "refine3")):
        sweeps.sweep()
        expected = arrays[f"{stored}_h_final"][0]
        assert np.abs(sweeps.latents[1:][-len(expected) :] - expected).max() <= tolerances.latent, stored
        assert np.abs(sweeps.logits - arrays[f"{stored}_logits_last8"][0, -1]).max() <= tolerances.logits, stored
        true = arrays["seq_h_final"][0]
        assert np.abs(sweeps.latents[1 : done + 2] - true[: done + 1]).max() <= tolerances.latent  # exact so far
        assert np.abs(sweeps.latents[1:] - true).max() > 100 * tolerances.latent  # and not as a whole
    while sweeps.exact < len(ids):
        sweeps.sweep()
    assert np.abs(sweeps.latents[1:] - arrays["seq_h_final"][0]).max() <= tolerances.latent


@pytest.fixture(scope="module")
def stubborn(export_model):
    """A model whose memory is so strong that iterating it leads nowhere."""
    from random_models import random_model

    config = LRTConfig(32, 64, 2, 2, 1, 32, "SL")
    bundle = export_model("prefill-stubborn", lambda: random_model(config, seed=1, memory_scale=5.0), max_seq_len=200)
    options = PrefillOptions(stepwise_below=64, sweeps=SweepOptions(stride=8, chunk_tokens=512))  # one chunk
    with lrt_deploy.open_decoder(bundle, prefill_options=options) as decoder:
        yield decoder


@pytest.mark.parametrize("length", [100, 150])
@pytest.mark.parametrize("policy", ["auto", "fixed-point"])
def test_a_model_that_does_not_contract_is_read_stepwise_and_says_so(stubborn, read, length, policy):
    truth = read_truth(stubborn, prompt(stubborn, length))
    state, latents = read(stubborn, truth.ids, policy=policy)
    assert too_large(errors(truth, state, latents), TIGHT) == {}, state.prefill
    assert (state.prefill.policy, state.prefill.residual) == ("stepwise", 0.0)
    assert "too slowly" in state.prefill.note
    assert "row 0 at token" in state.prefill.note
    assert state.prefill.passes < 8


def test_a_model_that_does_not_contract_is_far_off_when_it_is_not_finished(stubborn, monkeypatch):
    ids = prompt(stubborn, 150)
    expected = stubborn.prefill([ids], policy="stepwise")
    monkeypatch.setattr(Sweeps, "finish_stepwise", lambda self: ())
    assert np.abs(stubborn.prefill([ids], policy="fixed-point").latent - expected.latent).max() > 0.1


def test_a_fallback_in_a_later_chunk_still_reports_the_error_of_the_earlier_ones(stubborn, monkeypatch, read):
    """Chunks before it were iterated, so the whole is not exact."""
    monkeypatch.setattr(stubborn, "prefill_options", PrefillOptions(sweeps=SweepOptions(chunk_tokens=32)))
    truth = read_truth(stubborn, prompt(stubborn, 192))
    for tolerance in (0.5, 0.1, 2e-2):
        state, latents = read(stubborn, truth.ids, policy="fixed-point", tolerance=tolerance)
        error = np.abs(latents - truth.latents).max()
        assert error <= max(state.prefill.residual, TIGHT), state.prefill


# Policies, and what is said about them


@pytest.fixture
def decoder(random_decoder):
    return random_decoder("mr_gqa_SSSL")


@pytest.mark.parametrize(("length", "policy"), [(255, "stepwise"), (256, "fixed-point")])
def test_auto_goes_by_length_and_records_the_threshold(truths, trained, length, policy):
    """On a model that contracts, so that nothing falls back."""
    with lrt_deploy.open_decoder(trained[0], prefill_options=PrefillOptions(stepwise_below=256)) as decoder:
        state = decoder.prefill([trained[1][:length]])
        again = decoder.prefill([trained[1][:length]], policy=policy)
    assert (state.prefill.policy, state.prefill.stepwise_below) == (policy, 256)
    assert again.prefill.stepwise_below is None  # nothing was chosen
    assert np.array_equal(state.logits, again.logits)


def test_the_threshold_of_auto_goes_by_the_size_and_precision_of_the_model():
    small = LRTConfig(64, vocab_size=64, n_layer=4, n_head=4, n_kv_head=4, n_embd=256)
    medium, large = (dataclasses.replace(small, n_layer=layers) for layers in (12, 24))

    def below(precision):
        return [resolve(PrefillOptions(), config, precision).stepwise_below for config in (small, medium, large)]

    assert below("fp32") == below("unknown") == [LARGEST_COUNT, 32, 16]
    assert below("int8") == [16, 32, 16]
    assert below("int8-weight-only") == [32, LARGEST_COUNT, 32]
    assert resolve(PrefillOptions(stepwise_below=7), large).stepwise_below == 7


def test_chunks_grow_with_the_context_and_never_beyond_what_a_backend_reads():
    options = PrefillOptions().clamp(BlockLimits(tokens=200)).sweeps
    for sweeps, most in ((SweepOptions(), 512), (options, 200), (fixed_point.JACOBI, 512)):
        sizes, start = [], 0
        while start < 6000:
            sizes.append(fixed_point.chunk_size(start, 6000, sweeps))
            start += sizes[-1]
        assert start == 6000 and max(sizes) <= most
        assert sizes[0] <= sweeps.chunk_tokens and max(sizes) > 0.85 * most
        assert most == 200 or sizes[1] == 2 * sizes[0]
    assert fixed_point.chunk_size(0, 200, SweepOptions()) == 100  # parts are equal
    assert fixed_point.chunk_size(0, 5, SweepOptions()) == 5


def test_the_threshold_of_auto_can_be_pinned(decoder, monkeypatch):
    monkeypatch.setattr(decoder, "prefill_options", PrefillOptions(stepwise_below=10))
    assert decoder.prefill([prompt(decoder, 9)]).prefill.passes == 1.0
    report = decoder.prefill([prompt(decoder, 10)]).prefill
    assert report.passes > 1.0
    assert report.stepwise_below == 10


@pytest.mark.parametrize("tolerance", [0, 1e-9, 0.99 * SMALLEST_PREFILL_TOLERANCE])
@pytest.mark.parametrize("policy", ["auto", "fixed-point"])
def test_what_float32_cannot_estimate_is_read_stepwise_and_says_so(decoder, policy, tolerance):
    ids = prompt(decoder, 100)
    state = decoder.prefill([ids], policy=policy, tolerance=tolerance)
    assert (state.prefill.policy, state.prefill.passes) == ("stepwise", 1.0)
    assert "fp32 estimates no error below 1e-05" in state.prefill.note
    assert np.array_equal(state.logits, decoder.prefill([ids], policy="stepwise").logits)
    assert decoder.prefill([ids], policy="stepwise", tolerance=tolerance).prefill.note is None


@pytest.mark.parametrize("tolerance", [-1e-3, float("nan"), float("inf"), "1e-3", [1e-3]])
def test_a_tolerance_that_is_none_is_refused(decoder, tolerance):
    with pytest.raises(InputError, match="tolerance is"):
        decoder.prefill([[1, 2, 3]], tolerance=tolerance)


def test_an_unknown_policy_is_refused_with_the_known_ones(decoder):
    with pytest.raises(InputError, match="'fast', expected one of auto, stepwise, fixed-point, zero"):
        decoder.prefill([[1, 2, 3]], policy="fast")


@pytest.mark.parametrize("policy", ["auto", "fixed-point"])
@pytest.mark.parametrize("length", [1, 63, 128])
def test_a_model_without_memory_takes_one_exact_pass(decoder_of, policy, length):
    decoder = decoder_of("baseline_ve")
    ids = prompt(decoder, length)
    state, expected = decoder.prefill([ids], policy=policy), decoder.prefill([ids], policy="stepwise")
    assert (state.prefill.policy, state.prefill.passes, state.prefill.residual) == ("fixed-point", 1.0, 0.0)
    assert np.abs(state.logits - expected.logits).max() <= LOGIT_ERROR
    assert state.latent is None
    with pytest.raises(InputError, match="for models with memory"):
        decoder.prefill([ids], policy="zero")


@pytest.mark.parametrize("chunk_tokens", [7, 64, 512])
def test_a_second_turn_up_to_the_capacity_equals_one_stepwise_prompt(decoder, read, monkeypatch, chunk_tokens):
    """Windows of 16 and 32 tokens end within the turns, and chunks of 7 begin anywhere."""
    monkeypatch.setattr(decoder, "prefill_options", PrefillOptions(sweeps=SweepOptions(chunk_tokens=chunk_tokens)))
    ids = prompt(decoder, TINY_CAPACITY)
    first, more, rest = ids[:101], ids[101:283], ids[283:]
    state = decoder.prefill([first], policy="fixed-point", tolerance=TIGHT)
    decoder.prefill([more], state=state, policy="fixed-point", tolerance=TIGHT)
    decoder.prefill([rest], state=state, policy="fixed-point", tolerance=TIGHT)
    truth = Truth(ids, decoder.prefill([ids], policy="stepwise"), 0.0)
    assert too_large(errors(truth, state, 0.0), TIGHT, turns=3) == {}
    assert state.lengths.tolist() == [TINY_CAPACITY] == [state.capacity]
    wrong = decoder.prefill([[*first[:-1], (first[-1] + 1) % decoder.config.vocab_size]], policy="stepwise")
    decoder.prefill([more + rest], state=wrong, policy="stepwise")
    assert np.abs(wrong.cache(0)[0] - state.cache(0)[0]).max() > 100 * CACHE_ERROR


# What a pass costs


class Blocks:
    """Counts what a state's buffers are asked to compute."""

    def __init__(self, monkeypatch, buffers_type):
        self.heads, self.tokens, self.decodes = [], [], []
        read, decode = buffers_type.read, buffers_type.decode

        def counted_read(buffers, block, latents):
            self.heads.append(block.head)
            self.tokens.append(len(block.tokens))
            latents, logits = read(buffers, block, latents)
            assert len(logits) == (buffers._config.vocab_size if block.head else 0)
            return latents, logits

        def counted_decode(buffers, tokens, positions, head):
            self.decodes.append(head)
            return decode(buffers, tokens, positions, head)

        monkeypatch.setattr(buffers_type, "read", counted_read)
        monkeypatch.setattr(buffers_type, "decode", counted_decode)


@pytest.mark.parametrize("length", [50, 200])
def test_the_head_runs_once_a_sweep_and_passes_count_what_was_computed(decoder, monkeypatch, length):
    from lrt_deploy.runtime.backends.ort_cpu import OrtCpuBuffers

    blocks = Blocks(monkeypatch, OrtCpuBuffers)
    state = decoder.prefill([prompt(decoder, length)], policy="fixed-point", tolerance=TIGHT)
    assert sum(blocks.tokens) == pytest.approx(state.prefill.passes * length)
    assert sum(blocks.heads) <= state.prefill.passes + 2  # at most one a sweep over the last chunk
    chunks = -(-length // decoder.prefill_options.sweeps.chunk_tokens)
    assert chunks == 1 or not any(blocks.heads[: len(blocks.heads) // chunks // 2])
    blocks.tokens.clear()
    decoder.prefill([prompt(decoder, length)], policy="stepwise")
    assert blocks.tokens == []
    assert blocks.decodes == [False] * (length - 1) + [True]


def test_passes_write_the_same_slots_in_place(decoder):
    buffers = decoder._backend.allocate(1)
    sweeps = Sweeps(buffers, 0, np.array(prompt(decoder, 100)), 0, zeros(decoder), SweepOptions())
    sweeps.sweep()  # caches grow once, and nothing is moved any more
    caches = [array for layer in range(buffers.layers) for array in buffers.cache(layer, buffers.capacity)]
    addresses = [array.ctypes.data for array in caches]
    for _ in range(3):
        assert all(np.abs(array[0, :, :100]).max(axis=(0, 2)).min() > 0 for array in caches)
        assert all(not array[0, :, 100:].any() for array in caches)
        for array in caches:
            array[...] = 0
        sweeps.sweep()
    again = [array for layer in range(buffers.layers) for array in buffers.cache(layer, buffers.capacity)]
    assert [array.ctypes.data for array in again] == addresses
    assert all(array.base is not None for array in again)  # views of what the graph writes
