"""Log-probabilities of tokens under the model, from logits as the model gives them.

Rows are read token by token from an empty state, with the true recurrence; no temperature, penalty or cut is applied.
Knows no files and no sampling; how much a text costs in bits is for `lrt_deploy.evaluation.bits_per_byte`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lrt_deploy.errors import InputError
from lrt_deploy.text.prompts import check_prompts
from lrt_deploy.types import FloatArray, IntArray

if TYPE_CHECKING:
    from .decoder import Decoder


def score(decoder: Decoder, rows: Sequence[Sequence[int]]) -> list[FloatArray]:
    """Return for each row of T token ids the T - 1 log-probabilities (natural, float32) of its tokens after the first.

    Any number of rows of any lengths; as many as the bundle allows run together. Raises InputError for a row that is
    empty, has ids outside the vocabulary or is longer than the capacity.
    """
    checked = check_prompts(rows, decoder.config.vocab_size)
    for index, row in enumerate(checked):
        if len(row) - 1 > decoder.max_seq_len:
            raise InputError(
                f"row {index} has {len(row)} tokens; a capacity of {decoder.max_seq_len} scores at most "
                f"{decoder.max_seq_len + 1}"
            )
    found: list[FloatArray] = [np.empty(0, np.float32)] * len(checked)
    order = sorted(range(len(checked)), key=lambda index: len(checked[index]))  # little padding in a batch
    size = decoder.manifest.max_batch_size
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        for index, scores in zip(chosen, _score_batch(decoder, [checked[i] for i in chosen]), strict=True):
            found[index] = scores
    return found


def _score_batch(decoder: Decoder, rows: list[IntArray]) -> list[FloatArray]:
    """Score rows together. A row that has ended repeats its last token, which no other row sees."""
    steps = max(map(len, rows)) - 1
    scores = np.zeros((len(rows), steps), np.float32)  # (B, T - 1)
    if steps == 0:
        return list(scores)
    state = decoder.prefill([row[:1].tolist() for row in rows], policy="stepwise")
    logits = state.logits  # (B, V)
    for step in range(1, steps + 1):
        tokens = np.array([row[min(step, len(row) - 1)] for row in rows], np.int64)  # (B)
        scores[:, step - 1] = log_probabilities(logits, tokens)
        if step < steps:
            logits = decoder.step(state, tokens)
    return [row_scores[: len(row) - 1].copy() for row_scores, row in zip(scores, rows, strict=True)]


def log_probabilities(logits: FloatArray, tokens: IntArray) -> npt.NDArray[np.float64]:
    """The log-probability of one token (B) in each row of logits (B, V), computed in float64."""
    wide = logits.astype(np.float64)
    largest = wide.max(axis=-1, keepdims=True)
    total = np.log(np.exp(wide - largest).sum(axis=-1)) + largest[:, 0]
    chosen: npt.NDArray[np.float64] = np.take_along_axis(wide, tokens[:, None], axis=-1)[:, 0] - total
    return chosen


def log_normalizers(logits: FloatArray) -> list[float]:
    """Return log-sum-exp (B) of logits (B, V) to float32's precision; a token's logit minus it is its log-probability.

    Quicker than `log_probabilities`, because every generated token waits for it. Graphs cap their logits at
    `LOGIT_SOFTCAP`, so that exponentials neither overflow nor vanish, and the largest logit need not be subtracted.
    """
    normalizers: list[float] = np.log(np.exp(logits).sum(axis=-1)).tolist()
    return normalizers
