"""Check token ids that come from outside, once, before anything is computed with them.

Ids from vocab_size up to the padded table size are rows that exist and mean nothing, and negative ids index from the
end in ONNX Gather: both would compute something, so both are refused here.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

import numpy as np

from .errors import InputError
from .interface import IntArray


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> list[IntArray]:
    """Rows of token ids as int64 arrays; refuses no rows, an empty row, and ids outside the vocabulary."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, (Sequence, np.ndarray)) or not len(prompts):
        raise InputError(f"prompts is {reprlib.repr(prompts)}, expected a list with one list of token ids per sequence")
    rows = [_as_ids(row, f"prompt {i}") for i, row in enumerate(prompts)]
    for i, row in enumerate(rows):
        if row.size == 0:
            raise InputError(f"prompt {i} is empty; a sequence starts with at least one token, usually <|bos|>")
        _check_range(row, vocab_size, f"prompt {i}")
    return rows


def check_tokens(tokens: Sequence[int] | IntArray, vocab_size: int, batch: int) -> IntArray:
    """One token id per sequence, (B) int64."""
    ids = _as_ids(tokens, "tokens")
    if ids.shape != (batch,):
        raise InputError(f"step was given {ids.size} token(s) for a state of {batch} sequence(s); expected one each")
    _check_range(ids, vocab_size, "tokens")
    return ids


def _as_ids(row: Sequence[int] | IntArray, name: str) -> IntArray:
    try:
        array = np.asarray(row)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{name} is not a flat list of token ids: {error}") from error
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"{name} has {array.ndim} dimension(s) of {array.dtype}, expected a flat list of whole numbers"
        )
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise InputError(f"{name} holds the token id {array.max()}, which no vocabulary has")
    return array.astype(np.int64)


def _check_range(ids: IntArray, vocab_size: int, name: str) -> None:
    if ids.size == 0 or (ids.min() >= 0 and ids.max() < vocab_size):
        return
    where = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
    raise InputError(
        f"{name} holds the token id {int(ids[where])} at index {where}; "
        f"this model's vocabulary has the ids 0 to {vocab_size - 1}"
    )
