"""The state of B sequences between two steps: KV cache, latent state, lengths, and the logits of the next token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lrt_deploy.config import LRTConfig
from lrt_deploy.interface import FloatArray, IntArray, PrefillReport

from .backend import StateBuffers


class DecodeState:
    """Made by `Decoder.prefill` and advanced by `Decoder.step`; one state is used by one thread at a time.

    After an error in a step the state is what it was before: lengths and latent only move when a step has succeeded.
    """

    def __init__(self, buffers: StateBuffers, config: LRTConfig, owner: object) -> None:
        self.buffers, self.owner = buffers, owner
        self._memory = config.memory
        self._lengths = np.zeros(buffers.batch, np.int64)
        self._logits = np.zeros((buffers.batch, config.vocab_size), np.float32)
        self._tokens: list[list[int]] = [[] for _ in range(buffers.batch)]
        self.prefill = PrefillReport(policy="stepwise", passes=0.0)

    @property
    def batch(self) -> int:
        """How many sequences, B."""
        return self.buffers.batch

    @property
    def capacity(self) -> int:
        """How many tokens each sequence can hold."""
        return self.buffers.capacity

    @property
    def lengths(self) -> IntArray:
        """(B) tokens so far, a copy."""
        return self._lengths.copy()

    @property
    def logits(self) -> FloatArray:
        """(B, V) float32, for each row's next token, a copy."""
        return self._logits.copy()

    @property
    def latent(self) -> FloatArray | None:
        """(B, C) float32, carried to the next token, a copy; None for a model without memory."""
        return self.buffers.latent.copy() if self._memory else None

    def cache(self, layer: int) -> tuple[FloatArray, FloatArray]:
        """Keys (after RoPE and norm) and values (after gates), (B, G, max length, D) each, as copies.

        A row shorter than the longest one ends in undefined numbers.
        """
        keys, values = self.buffers.cache(layer, int(self._lengths.max()))
        return keys.copy(), values.copy()

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens of each row so far, copies."""
        return [list(row) for row in self._tokens]

    def advance(self, rows: Sequence[IntArray], logits: FloatArray) -> None:
        """Record that these tokens (one array per row) were read and led to `logits` (B, V); for the decoder."""
        for row, tokens in enumerate(rows):
            self._tokens[row].extend(tokens.tolist())
            self._lengths[row] += len(tokens)
        self._logits[:] = logits
