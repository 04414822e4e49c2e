"""Check token ids from a caller, before anything is computed with them.

Ids from vocab_size up to the padded table size are rows without a token, and negative ids index from the end in ONNX
Gather: both would compute something, so both are refused here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lrt_deploy.errors import InputError
from lrt_deploy.fields import shown
from lrt_deploy.types import IntArray


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> list[IntArray]:
    """Return rows of token ids as int64 arrays; raises InputError for no rows, an empty row, or an unknown id."""
    is_list = (isinstance(prompts, np.ndarray) and prompts.ndim > 0) or isinstance(prompts, Sequence)
    if isinstance(prompts, (str, bytes)) or not is_list or not len(prompts):
        raise InputError(f"prompts is {shown(prompts)}, expected a list with one list of token ids per sequence")
    rows = [_as_ids(row, f"prompt {i}") for i, row in enumerate(prompts)]
    for i, row in enumerate(rows):
        if row.size == 0:
            raise InputError(f"prompt {i} is empty; a sequence starts with at least one token, usually <|bos|>")
        _check_range(row, vocab_size, f"prompt {i}")
    return rows


def check_tokens(tokens: Sequence[int] | IntArray, vocab_size: int, batch: int) -> IntArray:
    """Return one token id per sequence, (B) int64."""
    ids = _as_ids(tokens, "tokens")
    if ids.shape != (batch,):
        raise InputError(f"step was given {ids.size} token(s) for a state of {batch} sequence(s); expected one each")
    _check_range(ids, vocab_size, "tokens")
    return ids


def check_ids(ids: object, vocab_size: int, name: str) -> list[int]:
    """Return token ids in any number and order (also from a set) as a list."""
    found = _as_ids(list(ids) if isinstance(ids, (set, frozenset)) else ids, name)
    _check_range(found, vocab_size, name)
    listed: list[int] = found.tolist()
    return listed


def _as_ids(row: object, name: str) -> IntArray:
    if isinstance(row, (str, bytes)) or not isinstance(row, (Sequence, np.ndarray)):
        raise InputError(f"{name} is {shown(row)}, expected a flat list of token ids")
    if not isinstance(row, np.ndarray):  # NumPy would make numbers of bools
        for at, item in enumerate(row):
            if isinstance(item, (bool, np.bool_)):
                raise InputError(f"{name} holds a bool, {item}, at index {at}, expected token ids")
    try:
        array = np.asarray(row)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{name} is not a flat list of token ids: {error}") from error
    if array.size == 0 and array.ndim == 1:
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
