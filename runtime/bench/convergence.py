"""How the fixed-point iteration over one prompt closes in on stepwise reading: error and seconds, sweep by sweep.

Measures; what is compared around it, and how often, is `benchmark`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lrt_deploy.runtime.decoder import Decoder
from lrt_deploy.runtime.fixed_point import PLAIN, SweepOptions, Sweeps
from lrt_deploy.runtime.state import DecodeState
from lrt_deploy.tolerances import SMALLEST_PREFILL_TOLERANCE
from lrt_deploy.types import FloatArray, IntArray

from .measure import Progress, timed

_MOST_SWEEPS = 16


def measure_convergence(decoder: Decoder, tokens: Sequence[int], progress: Progress) -> list[dict[str, Any]]:
    """Error over all positions and seconds so far after every sweep, plain and interleaved, until float32 ends it.

    Of as many tokens as the backend reads in one block, and interleaved where it may.
    """
    if not decoder.config.memory:
        return []
    state = decoder.prefill([tokens[:1]], policy="stepwise")  # lends its buffers, which are read over from slot 0 on
    ids = np.asarray(tokens, np.int64)[: state.owner.blocks.tokens]
    progress(f"reading {len(ids)} tokens stepwise for their latents", 0, 0)
    exact = _sweeps(state, ids, SweepOptions())
    exact.finish_stepwise()
    points: list[dict[str, Any]] = []
    default = decoder.prefill_options.sweeps
    for sweeps in (PLAIN, default) if default.stride > 1 else (PLAIN,):
        progress(f"sweeping over {len(ids)} tokens with stride {sweeps.stride}", 0, 0)
        points += _converge(_sweeps(state, ids, sweeps), exact.latents)
    return points


def _sweeps(state: DecodeState, ids: IntArray, options: SweepOptions) -> Sweeps:
    return Sweeps(state.buffers, 0, ids, 0, np.zeros(state.buffers.latent.shape[1], np.float32), options)


def _converge(sweeps: Sweeps, exact: FloatArray) -> list[dict[str, Any]]:
    """One iteration from nothing; the slots are in order again afterwards."""
    points: list[dict[str, Any]] = []
    seconds: list[float] = []
    order = np.concatenate(sweeps.members)
    sweeps.buffers.reorder(0, 0, order, move=False)
    while len(points) < _MOST_SWEEPS and sweeps.exact < len(sweeps.tokens):
        with timed(seconds):
            sweeps.sweep()
        error = float(np.abs(sweeps.latents - exact).max())
        points.append(
            {
                "tokens": len(sweeps.tokens),
                "algorithm": "plain" if sweeps.stride == 1 else f"interleaved, stride {sweeps.stride}",
                "passes": sweeps.computed / len(sweeps.tokens),
                "seconds": sum(seconds),
                "max_abs_latent_error": error,
            }
        )
        if error <= SMALLEST_PREFILL_TOLERANCE:
            break
    sweeps.buffers.reorder(0, 0, order, move=True)
    return points
