"""Measure the convergence of the fixed-point iteration over one prompt: error and seconds, sweep by sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lrt_deploy.evaluation.rollout import Progress
from lrt_deploy.runtime.decoder import Decoder
from lrt_deploy.runtime.fixed_point import PLAIN, SweepOptions, Sweeps
from lrt_deploy.runtime.state import DecodeState
from lrt_deploy.tolerances import SMALLEST_PREFILL_TOLERANCE
from lrt_deploy.types import FloatArray, IntArray

from .measure import timed

_MOST_SWEEPS = 16


def measure_convergence(decoder: Decoder, tokens: Sequence[int], progress: Progress) -> list[dict[str, Any]]:
    """Error over all positions and seconds so far after every sweep of Jacobi and of Gauss-Seidel iteration.

    Ends at the smallest error that float32 can estimate. Takes as many tokens as the backend reads in one block; only
    Jacobi iteration where the backend allows no other.
    """
    if not decoder.config.memory:
        return []
    state = decoder.prefill([tokens[:1]], policy="stepwise")  # for its buffers, overwritten from slot 0 on
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
    """The points of one iteration from a zero latent; restores the order of the slots."""
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
