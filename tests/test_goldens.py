"""Ours equals the authors' own code, on every golden: the PyTorch reference, and the decoder of an exported bundle.

The comparisons are shown to see a forgotten memory and each of the export faults that were met before.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lrt_deploy.config import LRTConfig
from lrt_deploy.model import model as model_module
from lrt_deploy.model.model import CacheOps
from lrt_deploy.model.reference import ReferenceDecoder

# Each golden that is decoded with ONNX Runtime is exported first, which takes seconds.
slow = pytest.mark.slow


class Forgetful:
    """A decoder that is given no memory: what a deployment would run that does not feed the latent back."""

    def __init__(self, decoder):
        self.decoder, self.config, self.max_seq_len = decoder, decoder.config, decoder.max_seq_len

    def prefill(self, prompts, *, policy="auto", tolerance=None):
        state = self.decoder.prefill([row[:1] for row in prompts])
        self._forget(state)
        for tokens in zip(*(row[1:] for row in prompts), strict=True):
            self.step(state, list(tokens))
        return state

    def step(self, state, tokens):
        logits = self.decoder.step(state, tokens)
        self._forget(state)
        return logits

    @staticmethod
    def _forget(state):
        state.buffers.set_latent(np.arange(state.batch), np.zeros_like(state.buffers.latent))


class Run:
    """Teacher-forced decoding of a golden's rows: what came out at every position."""

    def __init__(self, decoder, golden):
        ids = golden.ids
        self.golden = golden
        state = decoder.prefill([[int(row[0])] for row in ids])
        logits, latents = [state.logits.copy()], [state.latent]
        for t in range(1, ids.shape[1]):
            logits.append(decoder.step(state, ids[:, t]).copy())
            latents.append(state.latent)
        self.logits = np.stack(logits, 1)  # (B, T, V)
        self.latents = np.stack(latents, 1) if latents[0] is not None else None  # (B, T, C)
        caches = [state.cache(layer) for layer in range(decoder.config.n_layer)]  # (B, G, T, D) twice
        self.keys, self.values = (np.stack([pair[i].swapaxes(1, 2) for pair in caches]) for i in (0, 1))

    def logit_error(self):
        """Max abs error, over the positions whose logits are given."""
        expected = self.golden.last_logits
        return worst(self.logits[:, -expected.shape[1] :], expected)

    def latent_error(self):
        return worst(self.latents, self.golden.arrays["seq_h_final"])

    def cache_error(self):
        arrays = self.golden.arrays
        return max(worst(self.keys, arrays["k_cache"]), worst(self.values, arrays["v_cache"]))

    def nll_error(self):
        return worst(nll(self.logits, self.golden.arrays["targets"]), self.golden.arrays["seq_nll"])


def worst(ours, theirs):
    """Max abs error; not a number counts as infinitely wrong."""
    assert ours.shape == theirs.shape
    return float(np.nan_to_num(np.abs(ours.astype(np.float64) - theirs), nan=np.inf).max())


def nll(logits, targets):
    """(B, T) nats of the targets."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(shifted, targets[..., None], -1)[..., 0]
    return np.log(np.exp(shifted).sum(-1)) - chosen


def greedy(decoder, prompt, count):
    state = decoder.prefill([prompt])
    tokens = [int(state.logits[0].argmax())]
    while len(tokens) < count:
        tokens.append(int(decoder.step(state, [tokens[-1]])[0].argmax()))
    return tokens


@pytest.fixture(scope="session")
def reference_runs(golden_of):
    runs = {}

    def get(name):
        if name not in runs:
            runs[name] = Run(ReferenceDecoder(golden_of(name).model(), 200), golden_of(name))
        return runs[name]

    return get


@pytest.fixture(scope="session")
def decoder_runs(golden_of, decoder_of):
    runs = {}

    def get(name):
        if name not in runs:
            runs[name] = Run(decoder_of(name), golden_of(name))
        return runs[name]

    return get


@pytest.fixture(params=["reference", pytest.param("onnxruntime", marks=slow)])
def run(request, golden, reference_runs, decoder_runs):
    """Each golden, run by each implementation."""
    return (reference_runs if request.param == "reference" else decoder_runs)(golden.name)


@pytest.fixture
def forgetful_run(golden, decoder_of):
    if not golden.has_memory:
        pytest.skip("a plain model has no memory to forget")
    return Run(Forgetful(decoder_of(golden.name)), golden)


def test_all_tiny_goldens_are_here(tiny_names):
    assert len(tiny_names) == 8


def test_logits_equal_the_authors_at_every_position(run, tolerances):
    assert run.logit_error() <= tolerances.logits


def test_the_latent_equals_the_authors_at_every_position(run, golden, tolerances):
    if run.latents is None:
        assert not golden.has_memory
    else:
        assert run.latent_error() <= tolerances.latent


def test_nats_of_the_targets_equal_the_authors_at_every_position(run, tolerances):
    assert run.nll_error() <= tolerances.nll


def test_likeliest_tokens_equal_the_authors_at_every_position(run, golden):
    assert np.array_equal(run.logits.argmax(-1), golden.arrays["seq_argmax"])


def test_caches_equal_the_authors(run, golden, tolerances):
    if "k_cache" not in golden.arrays:
        pytest.skip("this golden holds no caches")
    assert run.cache_error() <= tolerances.cache


@slow
def test_greedy_continuations_equal_the_authors_in_all_tokens(golden, decoder_of):
    runs = golden.greedy_runs()
    assert len(runs) == (3 if golden.name == "demo" else 1)
    for prompt, expected in runs:
        events = list(decoder_of(golden.name).generate(prompt, len(expected), stop_ids=[]))
        assert [event.token for event in events] == expected
        assert len(expected) == 64
        assert events[-1].finish_reason == "length"


def test_the_reference_continues_greedily_as_the_authors_do(golden):
    decoder = ReferenceDecoder(golden.model(), 80)
    for prompt, expected in golden.greedy_runs():
        assert greedy(decoder, prompt, 64) == expected


@slow
def test_a_forgotten_memory_shows_in_every_comparison(forgetful_run, golden, tolerances):
    assert forgetful_run.logit_error() > tolerances.zero_memory
    assert forgetful_run.latent_error() > tolerances.zero_memory
    assert forgetful_run.nll_error() > tolerances.zero_memory
    assert not np.array_equal(forgetful_run.logits.argmax(-1), golden.arrays["seq_argmax"])
    if "k_cache" in golden.arrays:
        assert forgetful_run.cache_error() > tolerances.zero_memory


@slow
def test_a_forgotten_memory_shows_in_the_greedy_continuation(golden, decoder_of):
    if not golden.has_memory:
        pytest.skip("a plain model has no memory to forget")
    decoder = Forgetful(decoder_of(golden.name))
    assert all(greedy(decoder, prompt, 64) != expected for prompt, expected in golden.greedy_runs())


@slow
def test_a_forgotten_memory_is_the_authors_zero_memory_pass(forgetful_run, golden, tolerances):
    """The twin fails for the right reason: with m = 0 at every step we compute exactly their zero-memory goldens."""
    expected = golden.arrays["zero_mem_logits_last8"]
    assert worst(forgetful_run.logits[:, -8:], expected) <= tolerances.logits


def test_zero_memory_goldens_differ_from_what_is_decoded(run, golden, tolerances):
    distance = worst(run.logits[:, -8:], golden.arrays["zero_mem_logits_last8"])
    if golden.has_memory:
        assert distance > tolerances.zero_memory
    else:
        assert distance <= tolerances.logits


@torch.inference_mode()
def test_parallel_passes_equal_the_authors(golden, tolerances):
    model, arrays = golden.model(), golden.arrays
    ids = torch.from_numpy(golden.ids)
    memory = torch.zeros(*ids.shape, model.config.n_embd)
    names = ["zero_mem", "refine1", "refine2", "refine3"] if golden.has_memory else ["zero_mem"]
    previous = None
    for name in names:
        hidden, latent = model.parallel(ids, memory)
        expected = arrays[f"{name}_h_final"]
        ours, logits = hidden[:, -expected.shape[1] :].numpy(), model.logits(hidden[:, -8:]).numpy()
        assert worst(ours, expected) <= tolerances.latent, name
        assert worst(logits, arrays[f"{name}_logits_last8"]) <= tolerances.logits, name
        if previous is not None:  # the passes differ by more than what is compared, so each is told from its neighbour
            assert worst(previous, arrays[f"{name}_logits_last8"]) > 10 * tolerances.logits, name
        previous = logits
        memory = torch.cat([torch.zeros_like(latent[:, :1]), latent[:, :-1]], dim=1)


@slow
@pytest.mark.parametrize("batch_size", [1, 4])
def test_bits_per_byte_equal_the_authors(golden, decoder_of, tolerances, batch_size):
    from lrt_deploy.evaluation.bits_per_byte import evaluate

    if golden.name == "demo" and batch_size == 1:
        pytest.skip("one batch size is enough for the large one")
    arrays = golden.arrays
    result = evaluate(
        decoder_of(golden.name), arrays["bpb_x"], arrays["bpb_y"], arrays["token_bytes"], batch_size=batch_size
    )
    assert abs(result.bits_per_byte - float(arrays["bpb_sequential_recurrent"])) <= tolerances.bits_per_byte


@slow
def test_bits_per_byte_without_memory_are_the_authors_zero_memory_ones(golden, decoder_of, tolerances):
    from lrt_deploy.evaluation.bits_per_byte import evaluate

    if not golden.has_memory:
        pytest.skip("a plain model has no memory to forget")
    arrays = golden.arrays
    decoder = Forgetful(decoder_of(golden.name))
    found = evaluate(decoder, arrays["bpb_x"], arrays["bpb_y"], arrays["token_bytes"], batch_size=4).bits_per_byte
    assert abs(found - float(arrays["bpb_sequential_zero"])) <= tolerances.bits_per_byte
    assert abs(found - float(arrays["bpb_sequential_recurrent"])) > 100 * tolerances.bits_per_byte


# Faults that export code has had, planted into the reference: (golden, plant(model, monkeypatch)).


def turn_the_other_way(model, monkeypatch):
    model.sin.neg_()


def norm_before_rope(model, monkeypatch):
    norm, rotary = model_module.norm, CacheOps.rotary
    monkeypatch.setattr(CacheOps, "rotary", lambda self, x, *tables: rotary(self, norm(x), *tables))
    monkeypatch.setattr(model_module, "norm", lambda x: x if x.ndim == 4 else norm(x))


def exact_rotary_tables(model, monkeypatch):
    exponents = torch.arange(0, model.config.head_dim, 2) / model.config.head_dim
    angles = torch.outer(torch.arange(model.cos.shape[0]).float(), 10000.0**-exponents)
    model.cos, model.sin = angles.cos(), angles.sin()


def window_without_its_left_end(model, monkeypatch):
    def visible(position_ids, slots, window):
        t = position_ids[:, None, :, None]
        return (slots <= t) & (slots > t - window)

    monkeypatch.setattr(model_module, "visible", visible)


def unlimited_long_windows(model, monkeypatch):
    visible, limit = model_module.visible, model.config.sequence_len
    monkeypatch.setattr(model_module, "visible", lambda p, s, w: visible(p, s, 10**6 if w == limit else w))


def last_layer_not_long(model, monkeypatch):
    config = model.config
    pattern = [config.window_pattern[i % len(config.window_pattern)] for i in range(config.n_layer)]
    windows = tuple(config.sequence_len // (1 if letter == "L" else 2) for letter in pattern)
    assert windows != config.windows
    monkeypatch.setattr(LRTConfig, "windows", property(lambda self: windows))


def gates_in_another_order(model, monkeypatch):
    for block in model.blocks:
        local, feedback, embedded = block.gate.chunk(3, dim=-1)
        block.gate.copy_(torch.cat([feedback, local, embedded], dim=-1))


def only_the_first_gate_is_used_twice(model, monkeypatch):
    for block in model.blocks:
        third = block.gate.shape[-1] // 3
        block.gate[:, 2 * third :] = block.gate[:, :third].clone()


def _memory_halves(model):
    """(C, L, 2, G * D): keys are 0, values are 1."""
    return model.memory_kv.view(model.config.n_embd, model.config.n_layer, 2, -1)


def no_key_memory(model, monkeypatch):
    _memory_halves(model)[:, :, 0] = 0


def no_value_memory(model, monkeypatch):
    _memory_halves(model)[:, :, 1] = 0


def key_and_value_memory_exchanged(model, monkeypatch):
    halves = _memory_halves(model)
    halves.copy_(halves.flip(2))


def no_residual_memory(model, monkeypatch):
    model.memory_lambdas.zero_()


def no_value_embeddings(model, monkeypatch):
    model.value_embeds.zero_()


def no_x0(model, monkeypatch):
    model.x0_lambdas.zero_()


def no_resid_lambdas(model, monkeypatch):
    model.resid_lambdas.fill_(1)


def no_softcap(model, monkeypatch):
    model.logits = lambda hidden: (hidden @ model.lm_head)[..., : model.config.vocab_size]


def relu_not_squared(model, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "square", lambda self: self)


def larger_epsilon(model, monkeypatch):
    monkeypatch.setattr(model_module, "RMS_NORM_EPS", 1e-6)


def one_percent_of_one_matrix(model, monkeypatch):
    _memory_halves(model)[:, 1, 0] *= 1.01


FAULTS = [
    turn_the_other_way,
    norm_before_rope,
    exact_rotary_tables,
    window_without_its_left_end,
    unlimited_long_windows,
    gates_in_another_order,
    only_the_first_gate_is_used_twice,
    no_key_memory,
    no_value_memory,
    key_and_value_memory_exchanged,
    no_residual_memory,
    no_value_embeddings,
    no_x0,
    no_resid_lambdas,
    no_softcap,
    relu_not_squared,
    one_percent_of_one_matrix,
]
PLANTED = [("mr_gqa_SSSL", fault) for fault in FAULTS]
PLANTED += [("gate32", last_layer_not_long), ("demo", larger_epsilon), ("mr_mha_L", no_key_memory)]


@pytest.mark.parametrize(("name", "plant"), PLANTED, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_fault_is_seen(name, plant, golden_of, tolerances, monkeypatch):
    golden = golden_of(name)
    model = golden.model()
    plant(model, monkeypatch)
    assert Run(ReferenceDecoder(model, 200), golden).logit_error() > 2 * tolerances.logits
