"""How fast a decoder is: decoding as a share of the memory bandwidth, and prefill policies side by side.

What is compared runs in alternating rounds, so that a busy machine slows all of it alike; only ratios within one run
mean something. Measures and counts; does not print, plot, or know the machine's name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lrt_deploy.errors import InputError
from lrt_deploy.evaluation.rollout import kl_divergence
from lrt_deploy.runtime.decoder import Decoder
from lrt_deploy.runtime.fixed_point import PLAIN, SweepOptions
from lrt_deploy.runtime.state import DecodeState
from lrt_deploy.types import FloatArray, IntArray, PrefillPolicy, PrefillReport

from . import roofline

Progress = Callable[[str, int, int], None]

_WARM_UP_TOKENS = 4
_WATCHED_STEPS = 32


@contextlib.contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Append the seconds that the block takes, with the garbage collector off."""
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
    """The same ids for the same seed; a longer list begins with the shorter one."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab_size, count)]


# Decoding


@dataclass
class DecodeTimes:
    """What was measured of decoding, in milliseconds, and of one step's copies."""

    first_ttft_ms: float  # of the very first prompt: memory is committed, kernels run for the first time
    ttft_ms: list[float]  # one for each repeat: from the prompt to the first token
    tpot_ms: list[float]  # one for each following token
    copies: roofline.Copies | None
    copies_note: str | None  # why they were not counted
    writes: roofline.Writes
    context: int  # tokens in the state, on average over the steps
    outside_backend_fraction: float  # share of a step that is not the backend's: checks, bookkeeping, copies of logits


def measure_decode(
    decoder: Decoder, prompt: Sequence[int], new_tokens: int, repeats: int, tolerance: float | None, progress: Progress
) -> DecodeTimes:
    """Greedy decoding of one sequence after `prompt`, `repeats` times after a warm-up; stop tokens do not stop it."""
    if not (prompt and new_tokens >= 2 and repeats >= 1):
        raise InputError("decoding is measured over at least 1 prompt token, 2 new tokens and 1 repeat")
    if len(prompt) + new_tokens > decoder.max_seq_len:
        raise InputError(
            f"{len(prompt)} prompt tokens and {new_tokens} new ones do not fit the capacity of {decoder.max_seq_len}"
        )
    progress("decoding: warm-up", 0, repeats)
    warm_up = _decode_once(decoder, prompt, min(new_tokens, _WARM_UP_TOKENS), tolerance)
    observed = decoder.prefill([prompt[:1]], policy="stepwise")
    copies = count_step_copies(decoder, observed)
    writes = roofline.count_writes(observed, lambda: decoder.step(observed, [0]))
    first: list[float] = []
    following: list[float] = []
    for repeat in range(repeats):
        progress("decoding", repeat, repeats)
        times = _decode_once(decoder, prompt, new_tokens, tolerance)
        first.append(times[0] * 1e3)
        following += [seconds * 1e3 for seconds in times[1:]]
    outside = outside_backend(decoder, decoder.prefill([prompt], tolerance=tolerance), min(new_tokens, _WATCHED_STEPS))
    context = len(prompt) + new_tokens // 2
    note = observed.buffers.copies_note
    return DecodeTimes(warm_up[0] * 1e3, first, following, copies, note, writes, context, outside)


def outside_backend(decoder: Decoder, state: DecodeState, steps: int) -> float:
    """Share of the time of some steps that is spent outside of `StateBuffers.decode`."""
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


def count_step_copies(decoder: Decoder, state: DecodeState) -> roofline.Copies | None:
    """Take two steps, the second of them under observation: the first may still bind something.

    None, and no step, where the state's buffers say that it cannot be counted: see `StateBuffers.copies_note`.
    """
    if state.buffers.copies_note is not None:
        return None
    token = np.full(state.batch, int(state.logits[0].argmax()))
    decoder.step(state, token)
    return roofline.count_copies(state.buffers, state.lengths, lambda: decoder.step(state, token))


def _decode_once(decoder: Decoder, prompt: Sequence[int], new_tokens: int, tolerance: float | None) -> list[float]:
    """Seconds until the first token and for each following one, choosing it included."""
    seconds: list[float] = []
    with timed(seconds):
        state = decoder.prefill([prompt], tolerance=tolerance)
        token = int(state.logits[0].argmax())
    for _ in range(new_tokens - 1):
        with timed(seconds):
            token = int(decoder.step(state, [token])[0].argmax())
    return seconds


# Prefill


@dataclass(frozen=True)
class Variant:
    """A way to read a prompt: the policy, and for an iteration how it sweeps."""

    policy: PrefillPolicy
    algorithm: str
    sweeps: SweepOptions | None = None


def variants(decoder: Decoder) -> list[Variant]:
    """What is compared, stepwise first. A model without memory has nothing to iterate: one pass is exact."""
    default = decoder.prefill_options.sweeps
    if not decoder.config.memory:
        return [Variant("stepwise", "stepwise"), Variant("fixed-point", "one pass")]
    interleaved = [Variant("fixed-point", f"interleaved, stride {default.stride}", default)]
    return [
        Variant("stepwise", "stepwise"),
        *(interleaved if default.stride > 1 else []),
        Variant("fixed-point", "plain", PLAIN),
        Variant("zero", "one pass with zero memory"),
    ]


@dataclass
class Reading:
    """One variant at one length over all rounds. Errors are against the stepwise state, after the last token."""

    tokens: int
    variant: Variant
    seconds: list[float] = field(default_factory=list)
    report: PrefillReport | None = None
    max_abs_latent_error: float | None = 0.0  # None for a model without memory
    kl: float = 0.0

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))

    def fields(self, stepwise: Reading) -> dict[str, Any]:
        """The JSON fields. `policy` is what was asked for, `ran` what was done, which a fallback makes differ."""
        assert self.report is not None
        return {
            "tokens": self.tokens,
            "policy": self.variant.policy,
            "algorithm": self.variant.algorithm,
            "ran": self.report.policy,
            "seconds": self.median,
            "min_seconds": min(self.seconds),
            "passes": self.report.passes,
            "residual": self.report.residual,
            "max_abs_latent_error": self.max_abs_latent_error,
            "kl": self.kl,
            "speedup": stepwise.median / self.median,
            "note": self.report.note,
        }


def compare_prefill(
    decoder: Decoder, tokens: Sequence[int], rounds: int, tolerance: float | None, progress: Progress
) -> list[dict[str, Any]]:
    """Read the same prompt in every way, in alternating rounds; the JSON fields of each, stepwise first."""
    found = [Reading(len(tokens), variant) for variant in variants(decoder)]
    warm_up(decoder, tokens)
    reference: DecodeState | None = None
    for number in range(rounds):
        for index, reading in enumerate(found):
            progress(f"reading {len(tokens)} tokens", number * len(found) + index, rounds * len(found))
            state = _read(decoder, tokens, reading, tolerance)
            reference = reference or state
            if number == 0:
                reading.report, reading.kl = state.prefill, _kl(reference, state)
                reading.max_abs_latent_error = _latent_error(reference, state)
    return [reading.fields(found[0]) for reading in found]


def warm_up(decoder: Decoder, tokens: Sequence[int]) -> None:
    """One pass at full length and a few steps: memory is committed, kernels have run."""
    decoder.prefill([tokens], policy="zero" if decoder.config.memory else "fixed-point")
    decoder.prefill([tokens[:_WARM_UP_TOKENS]], policy="stepwise")


def _read(decoder: Decoder, tokens: Sequence[int], reading: Reading, tolerance: float | None) -> DecodeState:
    kept, sweeps = decoder.prefill_options, reading.variant.sweeps
    if sweeps is not None:
        decoder.prefill_options = dataclasses.replace(kept, sweeps=sweeps)
    try:
        with timed(reading.seconds):
            return decoder.prefill([tokens], policy=reading.variant.policy, tolerance=_for(reading, tolerance))
    finally:
        decoder.prefill_options = kept


def _for(reading: Reading, tolerance: float | None) -> float | None:
    """A tolerance speaks to iterations alone: stepwise and zero are what they are."""
    return tolerance if reading.variant.policy == "fixed-point" else None


def _kl(reference: DecodeState, state: DecodeState) -> float:
    return kl_divergence(reference.logits[0].astype(np.float64), state.logits[0].astype(np.float64))


def _latent_error(reference: DecodeState, state: DecodeState) -> float | None:
    if reference.latent is None or state.latent is None:
        return None
    return float(np.abs(reference.latent - state.latent).max())
