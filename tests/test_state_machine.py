"""Any history of a batch, drawn at random: rows join, leave, fork, rewind, are saved and loaded, in any order.

The model of the truth is a single row per sequence, read and stepped alone from its first token.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import lrt_deploy

SLOTS, CAPACITY = 4, 128
TOKENS = st.integers(0, 249)
PROMPT = st.lists(TOKENS, min_size=1, max_size=12)


class Batch(RuleBasedStateMachine):
    """`decoder` and `tolerances` are set on the subclass that a test makes."""

    decoder = tolerances = None
    truths: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}  # noqa: RUF012 - shared by all runs on purpose

    @initialize(prompt=PROMPT)
    def begin(self, prompt):
        self.state, self.rows = self.decoder.new_state(SLOTS), []
        self.folder = TemporaryDirectory()
        self.join(prompt)

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    @precondition(lambda self: len(self.rows) < SLOTS)
    @rule(prompt=PROMPT)
    def join(self, prompt):
        self.state.add(self.decoder.prefill([prompt], policy="stepwise"))
        self.rows.append(list(prompt))

    @precondition(lambda self: 0 < len(self.rows) < SLOTS)
    @rule(data=st.data())
    def fork_a_row(self, data):
        row = data.draw(st.integers(0, len(self.rows) - 1))
        self.state.add(self.state, row)
        self.rows.append(list(self.rows[row]))

    @precondition(lambda self: len(self.rows) > 1)
    @rule(data=st.data())
    def leave(self, data):
        row = data.draw(st.integers(0, len(self.rows) - 1))
        self.state.drop(row)
        last = self.rows.pop()
        if row < len(self.rows):
            self.rows[row] = last

    @rule(tokens=st.lists(TOKENS, min_size=SLOTS, max_size=SLOTS))
    def step(self, tokens):
        self.decoder.step(self.state, tokens[: len(self.rows)])
        for row, token in zip(self.rows, tokens, strict=False):
            row.append(token)

    @rule(data=st.data())
    def rewind(self, data):
        lengths = [data.draw(st.integers(1, len(row))) for row in self.rows]
        self.state.rewind(lengths)
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]

    @rule(order=st.permutations(range(SLOTS)))
    def permute(self, order):
        """In a new state, with as many slots again."""
        order = [row for row in order if row < len(self.rows)]
        picked, self.state = self.state.rows(order), self.decoder.new_state(SLOTS)
        for row in range(len(order)):
            self.state.add(picked, row)
        self.rows = [self.rows[row] for row in order]

    @rule()
    def save_and_load(self):
        path = Path(self.folder.name) / "batch.state"
        before = self.state.logits
        self.state.save(path)
        loaded = self.decoder.load_state(path)
        assert np.array_equal(loaded.logits, before)
        self.state = self.decoder.new_state(SLOTS)
        for row in range(loaded.batch):
            self.state.add(loaded, row)

    @rule(data=st.data(), rest=PROMPT)
    def edit(self, data, rest):
        """Read prompts that share a beginning with what the rows hold."""
        kept = [data.draw(st.integers(0, len(row))) for row in self.rows]
        self.rows = [row[:count] + rest for row, count in zip(self.rows, kept, strict=True)]
        self.decoder.prefill(self.rows, state=self.state, policy="stepwise", reuse=True)

    @invariant()
    def every_row_is_what_it_is_alone(self):
        if not hasattr(self, "rows"):
            return
        assert self.state.tokens == self.rows
        for row, tokens in enumerate(self.rows):
            logits, latent = self.truth(tuple(tokens))
            assert np.abs(self.state.logits[row] - logits).max() <= self.tolerances.logits
            if latent is not None:
                assert np.abs(self.state.latent[row] - latent).max() <= self.tolerances.latent

    def truth(self, tokens):
        if tokens not in self.truths:
            state = self.decoder.prefill([tokens], policy="stepwise")
            self.truths[tokens] = state.logits[0], None if state.latent is None else state.latent[0]
        return self.truths[tokens]


BUDGET = settings(
    max_examples=25, stateful_step_count=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("name", ["mr_gqa_SSSL", "baseline_ve", "demo"])
def test_any_history_of_a_batch_equals_single_rows(name, decoder_of, tolerances):
    fields = {"decoder": decoder_of(name), "tolerances": tolerances, "truths": {}}
    run_state_machine_as_test(type("Batch", (Batch,), fields), settings=BUDGET)


def test_so_does_that_of_another_architecture(export_model, tolerances):
    """Shared memory projections, an inner source layer, windows that bite, random weights."""
    from random_models import random_model

    from lrt_deploy.config import LRTConfig

    shape = {"sequence_len": 24, "vocab_size": 250, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    config = LRTConfig(**shape, window_pattern="SSL", memory_projections="shared", memory_source_layer=1)
    make = lambda: random_model(config, seed=3, memory_scale=0.5)  # noqa: E731
    bundle = export_model("state-shared", make, max_seq_len=CAPACITY, max_batch_size=SLOTS)
    with lrt_deploy.open_decoder(bundle) as decoder:
        fields = {"decoder": decoder, "tolerances": tolerances, "truths": {}}
        run_state_machine_as_test(type("Batch", (Batch,), fields), settings=BUDGET)


def test_a_state_that_forgets_its_latent_in_a_rewind_is_found_out(decoder_of, tolerances, monkeypatch):
    """The twin: the machine must see the fault that it is here for."""
    from lrt_deploy.runtime.state import DecodeState

    def zeros(self, rows, lengths, first=0):
        self.buffers.set_latent(np.arange(first, first + len(rows)), np.zeros((len(rows), self.owner.config.n_embd)))

    monkeypatch.setattr(DecodeState, "_set_latents", zeros)
    fields = {"decoder": decoder_of("mr_gqa_SSSL"), "tolerances": tolerances, "truths": {}}
    with pytest.raises(AssertionError):
        run_state_machine_as_test(type("Batch", (Batch,), fields), settings=settings(BUDGET, print_blob=False))
