"""Read prompts into a state. Here: stepwise, the exact and sequential way.

Rows of different length start at different times and end together, so that one last step gives all logits. Until a row
starts, its slot holds a placeholder token whose effects are undone: the cache slot is overwritten by the row's first
token, and the latent is put back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lrt_deploy.interface import FloatArray, IntArray, PrefillReport

from .state import DecodeState


def read_stepwise(state: DecodeState, rows: Sequence[IntArray]) -> tuple[FloatArray, PrefillReport]:
    """Append `rows`, one decode step per token, the head in the last one alone; returns logits (B, V) and the report.

    The lengths of the state are left to the caller, who advances it when the logits are found good.
    """
    buffers, past = state.buffers, state.lengths
    counts = np.array([len(row) for row in rows])
    steps = int(counts.max())
    starts = steps - counts  # (B) the step at which each row begins
    padded = np.stack(
        [np.concatenate([np.repeat(row[:1], start), row]) for row, start in zip(rows, starts, strict=True)]
    )
    carried = buffers.latent.copy()
    logits: FloatArray | None = None
    for t in range(steps):
        logits = buffers.decode(padded[:, t], past + np.maximum(0, t - starts), head=t == steps - 1)
        waiting = np.flatnonzero(t < starts)
        if waiting.size:
            buffers.set_latent(waiting, carried[waiting])
    assert logits is not None
    return logits, PrefillReport(policy="stepwise", passes=steps * len(rows) / int(counts.sum()))
