"""The paper's other variants, and every toggle: three implementations agree on random non-zero weights.

The formulas of the paper spelled out in numpy, position by position and in float64; the PyTorch reference, stepwise and
as a fixed point of its parallel form; and the exported graphs in ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from random_models import random_model

import lrt_deploy
from lrt_deploy.bundle.weights import weight_sources
from lrt_deploy.config import LRTConfig
from lrt_deploy.model.reference import ReferenceDecoder

# Windows of 8 and 16 bite within 24 tokens; the vocabulary is padded from 100 to 128.
BASE = LRTConfig(
    sequence_len=16, vocab_size=100, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL"
)  # fmt: skip
BATCH, TOKENS = 2, 24

DEVIATIONS = {
    "as released": {},
    "shared": {"memory_projections": "shared"},
    "source 0": {"memory_source_layer": 0},
    "source 1": {"memory_source_layer": 1},
    "source last": {"memory_source_layer": 2},
    "kv only": {"memory_residual": False},
    "residual only": {"memory_kv": False},
    "every head": {"n_kv_head": 4},
    "one kv head": {"n_kv_head": 1},
    "no x0": {"use_x0_residual": False},
    "no resid": {"use_resid_lambdas": False},
    "gate channels": {"ve_gate_channels": 8},
    "no value embeds": {"use_value_embeds": False},
    "long windows": {"window_pattern": "L"},
}
PLAIN = {
    "plain": {},
    "plain, value embeds everywhere": {"ve_every_layer": True},
    "plain, no value embeds": {"use_value_embeds": False},
    "plain, every head": {"n_kv_head": 4},
    "plain, gate channels": {"ve_gate_channels": 8},
    "plain, no lambdas": {"use_x0_residual": False, "use_resid_lambdas": False},
}


def configs():
    """Each deviation from the released variant, and each two that do not contradict each other."""
    for (name, first), (other, second) in itertools.combinations(DEVIATIONS.items(), 2):
        contradiction = set(first) & set(second) or {"memory_kv", "memory_residual"} <= {*first, *second}
        if not contradiction:
            label = other if name == "as released" else f"{name}, {other}"
            yield label, dataclasses.replace(BASE, **first, **second)
    yield "as released", BASE
    for name, fields in PLAIN.items():
        yield name, dataclasses.replace(BASE, memory=False, **fields)


CONFIGS = dict(configs())


def tokens_for(config, seed=1):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (BATCH, TOKENS))


def stepwise(decoder, ids):
    """Logits (B, T, V) and latents (B, T, C) of teacher-forced decoding."""
    state = decoder.prefill([[int(row[0])] for row in ids])
    logits, latents = [state.logits.copy()], [state.latent]
    for t in range(1, ids.shape[1]):
        logits.append(decoder.step(state, ids[:, t]).copy())
        latents.append(state.latent)
    return np.stack(logits, 1), None if latents[0] is None else np.stack(latents, 1)


def worst(a, b):
    assert a.shape == b.shape
    return float(np.nan_to_num(np.abs(a - b), nan=np.inf).max())


class Literal:
    """The forward pass as the paper's formulas say it, one token of one sequence at a time, in float64.

    It shares no code with the model, only its weights, under the names of the authors.
    """

    def __init__(self, model):
        self.config = model.config
        self.weights = {}
        for name, source in weight_sources(model.config).items():
            start, parameter = 0, model.get_parameter(name).double().numpy()
            for key, shape in zip(source.names, source.shapes, strict=True):
                size = shape[0] if source.transposed else shape[-1]
                part = parameter[..., start : start + size]
                self.weights[key], start = (part.T if source.transposed else part), start + size
        config, half = model.config, model.config.head_dim // 2
        speeds = (10000.0 ** (-np.arange(half) * 2 / config.head_dim)).astype(np.float32)
        angles = torch.from_numpy(np.outer(np.arange(TOKENS, dtype=np.float32), speeds))
        self.cos, self.sin = (f(angles).bfloat16().double().numpy() for f in (torch.cos, torch.sin))

    def run(self, ids):
        """Logits (B, T, V) and latents (B, T, C)."""
        rows = [self._sequence(row) for row in ids]
        return tuple(np.stack([row[i] for row in rows]) for i in (0, 1))

    def _sequence(self, ids):
        self.keys, self.values = ([[] for _ in range(self.config.n_layer)] for _ in range(2))
        m, logits, latents = np.zeros(self.config.n_embd), [], []
        for t, token in enumerate(ids):
            h, m = self._token(int(token), t, m)
            raw = self.weights["lm_head.weight"] @ h
            logits.append(15 * np.tanh(raw[: self.config.vocab_size] / 15))
            latents.append(m)
        return np.stack(logits), np.stack(latents)

    def _token(self, token, t, m):
        config, w = self.config, self.weights
        source = config.n_layer - 1 if config.memory_source_layer is None else config.memory_source_layer
        x = x0 = norm(w["transformer.wte.weight"][token])
        for i in range(config.n_layer):
            if config.use_resid_lambdas:
                x = w["resid_lambdas"][i] * x
            if config.use_x0_residual:
                x = x + w["x0_lambdas"][i] * x0
            if config.memory and config.memory_residual:
                x = x + w["interleaved_lambdas"][i] * m
            x = x + self._attention(i, norm(x), token, t, m)
            up = np.maximum(w[f"transformer.h.{i}.mlp.c_fc.weight"] @ norm(x), 0) ** 2
            x = x + w[f"transformer.h.{i}.mlp.c_proj.weight"] @ up
            if i == source:
                latent = norm(x)
        return norm(x), latent

    def _attention(self, i, a, token, t, m):
        config, w = self.config, self.weights
        prefix, heads, width = f"transformer.h.{i}.attn", config.n_kv_head, config.head_dim
        q, k, v = (
            (w[f"{prefix}.{name}.weight"] @ a).reshape(-1, width) for name in ("c_q", "c_k", "c_v")
        )  # (H, D), (G, D), (G, D)
        channels = config.ve_gate_channels or config.n_embd
        if config.memory:
            gate = 2 / (1 + np.exp(-w[f"{prefix}.triple_gate.weight"] @ a[:channels]))
            local, feedback, embedded = gate.reshape(3, heads, 1)
            k, v = local * k, local * v
            if config.memory_kv:
                pair = 0 if config.memory_projections == "shared" else i
                k = k + feedback * (w[f"interleaved_key_projections.{pair}.W_v.weight"] @ m).reshape(heads, width)
                v = v + feedback * (w[f"interleaved_projections.{pair}.W_v.weight"] @ m).reshape(heads, width)
            if config.use_value_embeds:
                v = v + embedded * w[f"interleaved_init_value_embeds.{i}.weight"][token].reshape(heads, width)
        elif config.use_value_embeds and (config.ve_every_layer or i % 2 == (config.n_layer - 1) % 2):
            gate = 2 / (1 + np.exp(-w[f"{prefix}.ve_gate.weight"] @ a[:channels]))
            v = v + gate[:, None] * w[f"value_embeds.{i}.weight"][token].reshape(heads, width)
        self.keys[i].append(norm(self._turn(k, t)))
        self.values[i].append(v)
        return w[f"{prefix}.c_proj.weight"] @ self._read(i, norm(self._turn(q, t)), t)

    def _turn(self, x, t):
        half = x.shape[-1] // 2
        left, right = x[:, :half], x[:, half:]
        return np.concatenate([left * self.cos[t] + right * self.sin[t], right * self.cos[t] - left * self.sin[t]], -1)

    def _read(self, i, q, t):
        config = self.config
        letter = "L" if i == config.n_layer - 1 else config.window_pattern[i % len(config.window_pattern)]
        first = max(0, t - (config.sequence_len if letter == "L" else config.sequence_len // 2))
        keys, values = np.stack(self.keys[i][first:]), np.stack(self.values[i][first:])  # (n, G, D)
        out = []
        for head in range(config.n_head):
            group = head // (config.n_head // config.n_kv_head)
            scores = np.exp(keys[:, group] @ q[head] / np.sqrt(config.head_dim))
            out.append(scores / scores.sum() @ values[:, group])
        return np.concatenate(out)


def norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 2.0**-23)


@torch.inference_mode()
def fixed_point(model, ids, passes):
    """Logits and latents after this many passes of the parallel form, from zeros."""
    memory = torch.zeros(*ids.shape, model.config.n_embd)
    for _ in range(passes):
        hidden, latent = model.parallel(torch.from_numpy(ids), memory)
        memory = torch.cat([torch.zeros_like(latent[:, :1]), latent[:, :-1]], dim=1)
    return model.logits(hidden).numpy(), latent.numpy()


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(", ", "+").replace(" ", "_"))
def model(request):
    return random_model(CONFIGS[request.param])


def test_stepwise_equals_the_formulas(model, tolerances):
    ids = tokens_for(model.config)
    logits, latents = stepwise(ReferenceDecoder(model), ids)
    expected, expected_latents = Literal(model).run(ids)
    assert worst(logits, expected) <= tolerances.logits
    assert worst(latents, expected_latents) <= tolerances.latent


def test_stepwise_equals_the_fixed_point_of_the_parallel_form(model, tolerances):
    ids = tokens_for(model.config)
    logits, latents = stepwise(ReferenceDecoder(model), ids)
    expected, expected_latents = fixed_point(model, ids, passes=TOKENS if model.config.memory else 1)
    assert worst(logits, expected) <= tolerances.logits
    assert worst(latents, expected_latents) <= tolerances.latent


def test_one_parallel_pass_is_not_enough_where_there_is_memory(model, tolerances):
    ids = tokens_for(model.config)
    logits, _ = stepwise(ReferenceDecoder(model), ids)
    distance = worst(logits, fixed_point(model, ids, passes=1)[0])
    assert distance > tolerances.zero_memory if model.config.memory else distance <= tolerances.logits


@pytest.mark.parametrize("name", [name for name in DEVIATIONS if name not in ("as released", "source last")])
def test_every_toggle_changes_the_numbers(name, tolerances):
    """The comparisons above compare something: no toggle is without effect on what it is compared with."""
    released, changed = random_model(BASE), random_model(CONFIGS[name])
    if name != "every head" and name != "one kv head":  # those have weights of another shape
        for key, parameter in changed.named_parameters():
            if key in dict(released.named_parameters()) and released.get_parameter(key).shape == parameter.shape:
                parameter.copy_(released.get_parameter(key))
    ids = tokens_for(BASE)
    first, second = (stepwise(ReferenceDecoder(m), ids)[0] for m in (released, changed))
    assert worst(first, second) > 100 * tolerances.logits


def test_the_last_source_layer_is_the_released_variant():
    ids = tokens_for(BASE)
    first, second = (random_model(CONFIGS[name]) for name in ("as released", "source last"))
    assert np.array_equal(stepwise(ReferenceDecoder(first), ids)[0], stepwise(ReferenceDecoder(second), ids)[0])


# What is exported: few graphs that hold every pair of settings between them (see the test of that).
EXPORTED_BASE = dataclasses.replace(BASE, n_layer=2, window_pattern="SL")
SETTINGS = {
    "memory_projections": ("layerwise", "shared"),
    "memory_source_layer": (None, 0),
    "memory paths": ("both", "kv", "residual"),
    "n_kv_head": (2, 4),
    "use_x0_residual": (True, False),
    "use_resid_lambdas": (True, False),
    "ve_gate_channels": (0, 8),
    "use_value_embeds": (True, False),
}
ROWS = [
    ("shared", 0, "both", 4, True, False, 8, True),
    ("layerwise", 0, "both", 2, True, True, 0, False),
    ("layerwise", None, "residual", 2, False, False, 8, False),
    ("shared", 0, "residual", 2, False, False, 0, True),
    ("shared", None, "kv", 2, True, False, 8, False),
    ("layerwise", 0, "kv", 4, False, True, 0, True),
    ("shared", None, "residual", 4, True, True, 8, True),
    ("layerwise", None, "both", 4, False, False, 0, False),
]


def exported_config(row):
    fields = dict(zip(SETTINGS, row, strict=True))
    paths = fields.pop("memory paths")
    return dataclasses.replace(
        EXPORTED_BASE, **fields, memory_kv=paths != "residual", memory_residual=paths != "kv"
    )  # fmt: skip


EXPORTED = {"-".join(map(str, row)): exported_config(row) for row in ROWS}
EXPORTED["plain"] = dataclasses.replace(
    EXPORTED_BASE, memory=False, n_layer=3, use_x0_residual=False, use_resid_lambdas=False, ve_gate_channels=8
)


def test_exported_variants_hold_every_pair_of_settings():
    for (i, (first, a)), (j, (second, b)) in itertools.combinations(enumerate(SETTINGS.items()), 2):
        held = {(row[i], row[j]) for row in ROWS}
        assert held == set(itertools.product(a, b)), (first, second)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_exported_graphs_equal_the_reference(name, export_model, tolerances):
    config = EXPORTED[name]
    dtype = torch.bfloat16 if "shared" in name else torch.float32
    bundle = export_model(f"variant-{name}", lambda: random_model(config, table_dtype=dtype), max_seq_len=40)
    ids = tokens_for(config)
    logits, latents = stepwise(ReferenceDecoder(random_model(config, table_dtype=dtype)), ids)
    with lrt_deploy.open_decoder(bundle) as decoder:
        assert decoder.config == config
        found, found_latents = stepwise(decoder, ids)
    assert worst(found, logits) <= tolerances.logits
    if config.memory:
        assert worst(found_latents, latents) <= tolerances.latent
    other, _ = stepwise(ReferenceDecoder(random_model(config, seed=1)), ids)
    assert worst(found, other) > tolerances.zero_memory
