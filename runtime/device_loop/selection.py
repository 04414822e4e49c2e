"""What the selection kernel reads and writes for each row: rules, penalties' counts, masks, and what it has chosen.

A row is set once, when it begins or its rules change; after each choice the kernel itself counts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrt_deploy.runtime.backends.cuda import Arena, Array, CudaDevice
from lrt_deploy.runtime.sampling import Sampler
from lrt_deploy.types import IntArray

from .kernels import Kernels

# As `Rules` and `Choice` in kernels.cu.
RULES = np.dtype(
    [(name, np.float64) for name in ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")]
    + [(name, np.uint64) for name in ("state_low", "state_high", "increment_low", "increment_high")]
    + [(name, np.uint64) for name in ("counts", "allowed", "bias_ids", "bias")]
    + [(name, np.int32) for name in ("bias_count", "top_k", "choices", "index")]
)
CHOICE = np.dtype([("token", np.int32), ("status", np.int32), ("logprob", np.float32), ("unused", np.int32)])
CHOSEN, NOT_FINITE, NOTHING_ALLOWED, INACTIVE = range(4)

IN_HISTORY = np.uint32(2**31)  # in the counts of a row
_MOST = np.iinfo(np.int32).max  # of top_k: more than any vocabulary
_64_BITS = 2**64 - 1


@dataclass(frozen=True)
class RowRules:
    """How the tokens of one row are chosen: as `Sampler.choose` does, among the ids below `choices`."""

    sampler: Sampler
    choices: int
    index: int = 0  # of the next token among the chosen ones
    history: Sequence[int] = ()  # all tokens so far, of which the last `index` were chosen

    def counts(self, vocab: int) -> NDArray[np.uint32]:
        """(vocab) how often each id was chosen, with `IN_HISTORY` added where it is in the history."""
        tokens = np.asarray(self.history, np.int64)
        found = np.bincount(tokens[len(tokens) - self.index :], minlength=vocab)[:vocab].astype(np.uint32)
        found[tokens] |= IN_HISTORY
        return found


class Selection:
    """Rules and choices of `rows` rows on the device. To be used with the device's lock held, all rows or the first."""

    def __init__(self, device: CudaDevice, kernels: Kernels, rows: int, vocab: int) -> None:
        self._device, self._kernels, self._vocab = device, kernels, vocab
        self._rules = device.pinned((rows,), RULES)
        self._arena = arena = Arena(device)
        self._counts, self._allowed, self._bias = [0] * rows, [0] * rows, [(0, 0)] * rows  # addresses, once needed
        self._rules_address = arena.allocate(self._rules.nbytes)
        self.choices_address = arena.allocate(rows * CHOICE.itemsize)
        self._working = arena.allocate(rows * vocab * 8), arena.allocate(rows * vocab * 8)

    def enqueue(self, logits: int, rows: int, places: int = 0) -> None:
        """Enqueue a choice for each of the first rows, from logits (rows, vocab) on the device.

        `places` is where it stands which rows are active; 0: all.
        """
        addresses = (self._rules_address, places, self.choices_address, *self._working)
        self._kernels.select_tokens(rows, logits, self._vocab, *addresses)

    def set_row(self, row: int, rules: RowRules) -> None:
        """Set how tokens of a row are chosen from now on, and enqueue what the device needs to know of it."""
        options, start = rules.sampler.options, rules.sampler.start
        found = self._rules[row]
        found["temperature"], found["top_p"], found["min_p"] = options.temperature, options.top_p, options.min_p
        found["repetition"] = options.repetition_penalty
        found["frequency"], found["presence"] = options.frequency_penalty, options.presence_penalty
        for name, number in zip(("state", "increment"), start, strict=True):
            found[f"{name}_low"], found[f"{name}_high"] = number & _64_BITS, number >> 64
        found["counts"] = self._send_counts(row, rules)
        found["bias_ids"], found["bias"] = self._send_bias(row, options.logit_bias)
        found["bias_count"] = len(options.logit_bias)
        found["top_k"] = min(options.top_k, _MOST)
        found["choices"], found["index"], found["allowed"] = rules.choices, rules.index, 0
        self._send(row)

    def set_allowed(self, row: int, allowed: IntArray | None) -> None:
        """Set which ids (n) the next token of a row may be; None: all. To be used between two choices."""
        self._rules[row]["allowed"] = 0
        if allowed is not None:
            bits = np.zeros(-(-self._vocab // 32) * 32, np.uint8)
            bits[allowed] = 1
            words = np.packbits(bits, bitorder="little")
            if not self._allowed[row]:
                self._allowed[row] = self._arena.allocate(words.nbytes)
            self._device.copy_in(self._allowed[row], words)
            self._rules[row]["allowed"] = self._allowed[row]
        self._send(row, "allowed")

    def _send(self, row: int, field: str | None = None) -> None:
        """Enqueue the copy of a row's rules, or of one field: the others are the kernel's."""
        start = self._rules_address + row * RULES.itemsize
        one: Array = self._rules[row : row + 1]
        if field is not None:
            start += RULES.fields[field][1]  # type: ignore[index]  # it has fields
            one = one[field]
        self._device.copy_in(start, one.copy())  # the rules may be set again before the copy is done

    def _send_counts(self, row: int, rules: RowRules) -> int:
        options = rules.sampler.options
        penalties = options.frequency_penalty or options.presence_penalty or options.repetition_penalty != 1
        if not penalties:
            return 0
        if not self._counts[row]:
            self._counts[row] = self._arena.allocate(self._vocab * 4)
        self._device.copy_in(self._counts[row], rules.counts(self._vocab))
        return self._counts[row]

    def _send_bias(self, row: int, bias: Mapping[int, float]) -> tuple[int, int]:
        if not bias:
            return 0, 0
        if not self._bias[row][0]:
            self._bias[row] = self._arena.allocate(self._vocab * 4), self._arena.allocate(self._vocab * 8)
        ids, values = self._bias[row]
        self._device.copy_in(ids, np.array(list(bias), np.int32))
        self._device.copy_in(values, np.array(list(bias.values()), np.float64))
        return ids, values
