"""Check token ids from a caller, before anything is computed with them.

Ids from vocab_size up to the padded table size are rows without a token, and negative ids index from the end in ONNX
Gather: both would compute something.
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
    rows = [check_row(row, vocab_size, f"prompt {i}") for i, row in enumerate(prompts)]
    if empty := [i for i, row in enumerate(rows) if row.size == 0]:
        raise InputError(f"prompt {empty[0]} is empty; a sequence starts with at least one token, usually <|bos|>")
    return rows


def check_tokens(tokens: Sequence[int] | IntArray, vocab_size: int, batch: int) -> IntArray:
    """Return one token id per sequence, (B) int64."""
    ids = check_row(tokens, vocab_size, "tokens")
    if ids.shape != (batch,):
        raise InputError(f"step was given {ids.size} token(s) for a state of {batch} sequence(s); expected one each")
    return ids


def check_ids(ids: object, vocab_size: int, name: str) -> list[int]:
    """Return token ids in any number and order (also from a set) as a list."""
    listed: list[int] = check_row(list(ids) if isinstance(ids, (set, frozenset)) else ids, vocab_size, name).tolist()
    return listed


def check_row(row: object, vocab_size: int, name: str, least: int = 0) -> IntArray:
    """Return a flat list, which may be empty, of ids from `least` to `vocab_size` - 1 as an int64 array."""
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
    outside = np.flatnonzero((array < least) | (array >= vocab_size))
    if outside.size:
        where = int(outside[0])
        raise InputError(
            f"{name} holds the token id {array[where]} at index {where}; expected token ids {least} to "
            f"{vocab_size - 1}, those of the vocabulary"
        )
    return array.astype(np.int64)
