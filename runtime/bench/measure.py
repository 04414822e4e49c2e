"""Measure a decoder: decode steps, prefill policies side by side, and the convergence of the fixed-point iteration.

Measurements that are compared run in alternating rounds, so that a busy machine slows all of them alike; only ratios
within one run are meaningful.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lrt_deploy.errors import InputError
from lrt_deploy.evaluation.rollout import Progress, distance, kl_divergence
from lrt_deploy.runtime.decoder import Decoder
from lrt_deploy.runtime.fixed_point import JACOBI, SweepOptions, Sweeps, finish
from lrt_deploy.runtime.prefill import PrefillRequest, policy_of
from lrt_deploy.runtime.state import DecodeState
from lrt_deploy.tolerances import SMALLEST_PREFILL_TOLERANCE
from lrt_deploy.types import FloatArray, IntArray, PrefillPolicy, PrefillReport

_WARM_UP_TOKENS = 4
_WATCHED_STEPS = 32
_MOST_SWEEPS = 16


@contextlib.contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Append the seconds that the block takes, with the garbage collector disabled."""
    collecting = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    try:
        yield
        seconds.append(time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()


def random_tokens(count: int, vocab_size: int, seed: int) -> list[int]:
    """Random token ids, the same for the same seed; a longer list begins with the shorter one."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab_size, count)]


@dataclass
class DecodeTimes:
    """Times of decoding one sequence, in milliseconds.

    `first_ttft_ms` is that of the very first prompt, in which memory is committed and kernels run for the first time.
    `ttft_ms` has the time from prompt to first token of each repeat, `tpot_ms` that of each following token. `context`
    is the mean number of tokens in the state. `outside_backend_fraction` is the share of a step outside of the backend:
    checks, bookkeeping, copies of logits. `copies_note` is that of `StateBuffers`.
    """

    first_ttft_ms: float
    ttft_ms: list[float]
    tpot_ms: list[float]
    context: int
    outside_backend_fraction: float
    copies_note: str | None


def measure_decode(
    decoder: Decoder, prompt: Sequence[int], new_tokens: int, repeats: int, tolerance: float | None, progress: Progress
) -> DecodeTimes:
    """Time greedy decoding of one sequence, `repeats` times after a warm-up; stop tokens are ignored.

    Raises InputError for counts too small to measure and for more tokens than the capacity.
    """
    if not (prompt and new_tokens >= 2 and repeats >= 1):
        raise InputError("decoding is measured over at least 1 prompt token, 2 new tokens and 1 repeat")
    if len(prompt) + new_tokens > decoder.max_seq_len:
        raise InputError(
            f"{len(prompt)} prompt tokens and {new_tokens} new ones do not fit the capacity of {decoder.max_seq_len}"
        )
    progress("decoding: warm-up", 0, repeats)
    warm_up = _decode_once(decoder, prompt, min(new_tokens, _WARM_UP_TOKENS), tolerance)
    first: list[float] = []
    following: list[float] = []
    for repeat in range(repeats):
        times = _decode_once(decoder, prompt, new_tokens, tolerance)
        progress("decoding", repeat + 1, repeats)
        first.append(times[0])
        following += times[1:]
    state = decoder.prefill([prompt], tolerance=tolerance)
    outside = outside_backend(decoder, state, min(new_tokens, _WATCHED_STEPS))
    context = len(prompt) + new_tokens // 2
    return DecodeTimes(warm_up[0], first, following, context, outside, state.buffers.copies_note)


def outside_backend(decoder: Decoder, state: DecodeState, steps: int) -> float:
    """Share of the time of `steps` steps that is spent outside of `StateBuffers.decode`."""
    inside: list[float] = []
    whole: list[float] = []
    run = state.buffers.decode

    def watched(tokens: IntArray, positions: IntArray, head: bool) -> FloatArray | None:
        start = time.perf_counter()
        logits = run(tokens, positions, head)
        inside.append(time.perf_counter() - start)
        return logits

    buffers = vars(state.buffers)
    buffers["decode"] = watched
    try:
        for _ in range(steps):
            with timed(whole):
                decoder.step(state, np.zeros(state.batch, np.int64))
    finally:
        del buffers["decode"]
    return 1 - sum(inside) / sum(whole)


def _decode_once(decoder: Decoder, prompt: Sequence[int], new_tokens: int, tolerance: float | None) -> list[float]:
    """Milliseconds until the first token and for each following one, the choice of the token included."""
    seconds: list[float] = []
    with timed(seconds):
        state = decoder.prefill([prompt], tolerance=tolerance)
        token = int(state.logits[0].argmax())
    for _ in range(new_tokens - 1):
        with timed(seconds):
            token = int(decoder.step(state, [token])[0].argmax())
    return [each * 1e3 for each in seconds]


@dataclass
class PrefillTiming:
    """One way to prefill, over all rounds; errors after the last token, against the stepwise state.

    `sweeps` are the options of an iteration; `max_abs_latent_error` is None for a model without memory.
    """

    policy: PrefillPolicy
    algorithm: str
    sweeps: SweepOptions | None = None
    seconds: list[float] = field(default_factory=list)
    report: PrefillReport | None = None
    max_abs_latent_error: float | None = None
    kl: float = 0.0
    auto: bool = False  # whether the policy `auto` reads this prompt in this way

    def run(self, decoder: Decoder, tokens: Sequence[int], tolerance: float | None) -> DecodeState:
        """Time one prefill; a tolerance applies to iterations only."""
        kept = decoder.prefill_options
        if self.sweeps is not None:
            decoder.prefill_options = dataclasses.replace(kept, sweeps=self.sweeps)
        try:
            with timed(self.seconds):
                return decoder.prefill(
                    [tokens], policy=self.policy, tolerance=tolerance if self.policy == "fixed-point" else None
                )
        finally:
            decoder.prefill_options = kept

    def fields(self, tokens: int, stepwise: PrefillTiming) -> dict[str, Any]:
        """The JSON fields; `policy` is the requested one, `ran` differs from it where prefill fell back."""
        assert self.report is not None
        median, of_stepwise = (float(np.median(timing.seconds)) for timing in (self, stepwise))
        return {
            "tokens": tokens,
            "policy": self.policy,
            "algorithm": self.algorithm,
            "stride": None if self.sweeps is None else self.sweeps.stride,
            "ran": self.report.policy,
            "seconds": median,
            "min_seconds": min(self.seconds),
            "passes": self.report.passes,
            "residual": self.report.residual,
            "max_abs_latent_error": self.max_abs_latent_error,
            "kl": self.kl,
            "speedup": of_stepwise / median,
            "note": self.report.note,
            "auto": self.auto,
        }


def _iterations(decoder: Decoder) -> list[SweepOptions]:
    """Jacobi iteration, and the decoder's own where the backend allows another."""
    default = decoder.prefill_options.sweeps
    return [JACOBI, default] if default.stride > 1 else [JACOBI]


def _algorithm(stride: int) -> str:
    return "plain" if stride == 1 else f"interleaved, stride {stride}"


def compare_prefill(
    decoder: Decoder, tokens: Sequence[int], rounds: int, tolerance: float | None, progress: Progress
) -> list[dict[str, Any]]:
    """Prefill the same prompt in every way, in alternating rounds; returns the JSON fields of each, stepwise first.

    A model without memory needs no iteration: one pass is exact.
    """
    memory = decoder.config.memory
    ways = [PrefillTiming("stepwise", "stepwise")]
    if memory:
        iterations = _iterations(decoder)[::-1]
        ways += [PrefillTiming("fixed-point", _algorithm(sweeps.stride), sweeps) for sweeps in iterations]
        ways.append(PrefillTiming("zero", "one pass with zero memory"))
    else:
        ways.append(PrefillTiming("fixed-point", "one pass"))
    request = PrefillRequest.of("auto", tolerance, memory, decoder.precision)
    taken = policy_of(np.asarray(tokens), memory, request, decoder.prefill_options)
    next(way for way in ways if way.policy == taken).auto = True
    # Memory is committed and kernels have run before anything is timed.
    decoder.prefill([tokens], policy=ways[-1].policy)
    decoder.prefill([tokens[:_WARM_UP_TOKENS]], policy="stepwise")
    reference: DecodeState | None = None
    for number in range(rounds):
        for index, way in enumerate(ways):
            state = way.run(decoder, tokens, tolerance)
            progress(f"reading {len(tokens)} tokens", number * len(ways) + index + 1, rounds * len(ways))
            reference = reference or state
            if number == 0:
                way.report = state.prefill
                way.kl = kl_divergence(reference.logits[0], state.logits[0])
                way.max_abs_latent_error = distance(reference.latent, state.latent) if memory else None
    return [way.fields(len(tokens), ways[0]) for way in ways]


def measure_convergence(decoder: Decoder, tokens: Sequence[int], progress: Progress) -> list[dict[str, Any]]:
    """Error over all positions and seconds so far after every sweep of each iteration.

    Ends at the smallest error that float32 can estimate. Takes as many tokens as the backend reads in one block.
    """
    if not decoder.config.memory:
        return []
    state = decoder.prefill([tokens[:1]], policy="stepwise")  # for its buffers, overwritten from slot 0 on
    ids = np.asarray(tokens, np.int64)[: state.owner.backend.blocks.tokens]
    progress(f"reading {len(ids)} tokens stepwise for their latents", 0, 0)
    exact = _sweeps(state, ids, SweepOptions())
    finish(exact.finish_stepwise())
    points: list[dict[str, Any]] = []
    for sweeps in _iterations(decoder):
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
                "algorithm": _algorithm(sweeps.stride),
                "passes": sweeps.computed / len(sweeps.tokens),
                "seconds": sum(seconds),
                "max_abs_latent_error": error,
            }
        )
        if error <= SMALLEST_PREFILL_TOLERANCE:
            break
    sweeps.buffers.reorder(0, 0, order, move=True)
    return points
