"""Go back to an earlier token of a state, exactly.

The cache is cut and the latent of that token comes back from the history: nothing is computed, and what follows is
bit-equal to what would have followed then. Logits are not kept for every token (a vocabulary's worth each, often more
than the cache entry); they follow from the last token, so one step of it gives them again when somebody asks, and
leaves no trace. Where the last token was read by sweeps, its logits were kept, because a step would round differently.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lrt_deploy.errors import StateError
from lrt_deploy.interface import IntArray

from .backend import check_finite

if TYPE_CHECKING:
    from .state import DecodeState


def rewind(state: DecodeState, lengths: int | Sequence[int]) -> None:
    """Cut every row to a length; all are checked before the first is cut."""
    wanted = [lengths] * state.batch if isinstance(lengths, (int, np.integer)) else list(lengths)
    if len(wanted) != state.batch:
        raise StateError(f"{len(wanted)} lengths were given for a state of {state.batch} sequence(s); one each")
    for row, (length, held) in enumerate(zip(wanted, state.lengths, strict=True)):
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or not 0 <= length <= held:
            raise StateError(f"sequence {row} holds {held} tokens and cannot be rewound to {length!r}")
    for row, length in enumerate(wanted):
        state.truncate(row, int(length))
    if not any(wanted):
        state.read_within = 0.0


def recompute_logits(state: DecodeState, wanted: Sequence[int]) -> None:
    """Run every row's last token once more, from the latent before it, and put caches and latent back."""
    if empty := [row for row in wanted if state.length(row) == 0]:
        raise StateError(f"sequence {empty[0]} holds no token yet, so no logits follow; read a prompt first")
    buffers, rows, last = state.buffers, np.arange(state.batch), np.maximum(state.lengths - 1, 0)
    latent = buffers.latent[: state.batch].copy()
    entries = [
        {name: array.copy() for name, array in buffers.read_slots(row, at, at + 1).items()}
        for row, at in enumerate(last)
    ]
    try:
        buffers.set_latent(rows, np.stack([state.history.after(row, at) for row, at in enumerate(last)]))
        logits = buffers.decode(state.last_tokens, last, head=True)
        assert logits is not None
        check_finite(logits, last, state.owner)
        state.set_logits(logits)
    finally:
        buffers.set_latent(rows, latent)
        for row, at in enumerate(last):
            buffers.write_slots(row, int(at), entries[row])
    state.computed_tokens += state.batch


@contextlib.contextmanager
def unchanged_on_error(state: DecodeState, rows: Sequence[IntArray]) -> Iterator[None]:
    """Put the latent back when reading prompts, `rows`, fails; lengths have not moved. Copies it once a prompt."""
    before = state.buffers.latent[: state.batch].copy()
    try:
        yield
    except BaseException:
        state.buffers.set_latent(np.arange(state.batch), before)
        _clear_unread(state, [len(row) for row in rows])
        raise


def undo_step(state: DecodeState, mark: int) -> None:
    """The same after one `decode` that failed, without a copy: the latent from before it is where it was."""
    state.buffers.take_back(mark)
    _clear_unread(state, [1] * state.batch)


def _clear_unread(state: DecodeState, counts: Sequence[int]) -> None:
    """Zero the slots that tokens beyond each row's length may have been written to.

    They do not count, but what is not finite would: a row beside a longer one gives them the weight 0, and 0 times NaN
    is NaN.
    """
    for row, (length, count) in enumerate(zip(state.lengths, counts, strict=True)):
        state.clear_slots(row, int(length), int(length) + count)
