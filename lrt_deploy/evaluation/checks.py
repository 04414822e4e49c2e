"""Checks of a decoder that need no checkpoint: against itself, and against recorded numbers.

Against itself: two ways to one state are compared there in logits, latent and every cache, and over further steps. A
recording is an `.npz` archive with `ids` (B, T), `seq_logits` (B, T, V) or its last positions under a name that begins
so, and `seq_h_final` (B, T, C), the latents of a model with memory. The limits are those of a rollout.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lrt_deploy.bundle.precisions import PLAN_BACKENDS
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import InputError, ParityError
from lrt_deploy.text.prompts import check_prompts
from lrt_deploy.tolerances import ParityLimits
from lrt_deploy.types import FloatArray, IntArray, PrefillPolicy, StatefulDecoder

from .bits_per_byte import read_arrays
from .rollout import Progress, capacity_of, distance, kl_divergence, rollout, silent, state_errors


class FullDecoder(StatefulDecoder, Protocol):
    """A runtime's decoder, which can also continue, save and load states."""

    backend: str

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        state: Any = None,  # noqa: ANN401 - the decoder's own state
        policy: PrefillPolicy = "auto",
        tolerance: float | None = None,
    ) -> Any:  # noqa: ANN401
        """Start sequences, or continue those of `state`."""

    def load_state(self, path: Path) -> Any:  # noqa: ANN401 - the decoder's own state
        """Load a saved state."""


@dataclass(frozen=True)
class Setting:
    """The inputs of all checks. `partner` opens the same bundle without CUDA graphs."""

    prompt: Sequence[int]
    steps: int
    limits: ParityLimits
    tolerance: float | None = None
    max_batch_size: int = 1
    partner: Callable[[], FullDecoder] | None = None


@dataclass(frozen=True)
class Check:
    """The result of a check; `line` says it in one line."""

    name: str
    passed: bool
    line: str


@dataclass(frozen=True)
class MutualCheck(Check):
    """Errors between two ways to a state, there and over `steps` further tokens. `bound` is that of the latent."""

    logits: float
    latent: float
    cache: float
    logits_after: float
    kl_after: float
    bound: float
    steps: int


def fixed_point_vs_stepwise(decoder: FullDecoder, setting: Setting) -> MutualCheck:
    """Prefill by iteration, which may be off by its stated residual, against stepwise."""
    iterated = decoder.prefill([setting.prompt], policy="fixed-point", tolerance=setting.tolerance)
    straight = decoder.prefill([setting.prompt], policy="stepwise")
    return _meet("fixed-point-vs-stepwise", (decoder, iterated), (decoder, straight), setting, _residual(iterated))


def chunked_vs_whole(decoder: FullDecoder, setting: Setting) -> MutualCheck:
    """Prefill in two turns against in one, both by iteration."""
    _two_tokens(setting)
    cut = len(setting.prompt) // 3 + 1  # not the half, where a prompt of two chunks is cut anyway
    whole = decoder.prefill([setting.prompt], policy="fixed-point", tolerance=setting.tolerance)
    turns = decoder.prefill([setting.prompt[:cut]], policy="fixed-point", tolerance=setting.tolerance)
    slack = _residual(whole) + _residual(turns)
    turns = decoder.prefill([setting.prompt[cut:]], state=turns, policy="fixed-point", tolerance=setting.tolerance)
    return _meet("chunked-vs-whole", (decoder, turns), (decoder, whole), setting, slack + _residual(turns))


def batch_vs_alone(decoder: FullDecoder, setting: Setting) -> MutualCheck:
    """The prompt as one row of a batch with other prompts and tokens, against alone."""
    _two_tokens(setting)
    rows = min(setting.max_batch_size, 3)
    if rows < 2:
        raise ParityError("batch-vs-alone needs a bundle for 2 rows or more; this one was exported for 1")
    others = [setting.prompt[: len(setting.prompt) // 2 + 1], setting.prompt[::-1]][: rows - 1]
    together = decoder.prefill([*others, setting.prompt], policy="stepwise")
    alone = decoder.prefill([setting.prompt], policy="stepwise")
    return _meet("batch-vs-alone", (decoder, together), (decoder, alone), setting, 0.0)


def restored_vs_straight(decoder: FullDecoder, setting: Setting) -> MutualCheck:
    """A state saved and loaded, against the original: equal to the bit."""
    straight = decoder.prefill([setting.prompt], policy="stepwise")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "check.state"
        straight.save(path)
        restored = decoder.load_state(path)
    return _meet("restored-vs-straight", (decoder, restored), (decoder, straight), setting, None)


def cuda_graph(decoder: FullDecoder, setting: Setting) -> MutualCheck:
    """Replaying a CUDA graph against launching every kernel."""
    if decoder.backend not in PLAN_BACKENDS or setting.partner is None:
        raise ParityError(
            f"backend {decoder.backend} runs no CUDA graph, so there is nothing to compare; this check is for "
            f"{' and '.join(PLAN_BACKENDS)}"
        )
    partner = setting.partner()
    replayed = decoder.prefill([setting.prompt], policy="stepwise")
    launched = partner.prefill([setting.prompt], policy="stepwise")
    return _meet("cuda-graph", (decoder, replayed), (partner, launched), setting, 0.0)


CHECKS: dict[str, Callable[[FullDecoder, Setting], MutualCheck]] = {
    "fixed-point-vs-stepwise": fixed_point_vs_stepwise,
    "chunked-vs-whole": chunked_vs_whole,
    "batch-vs-alone": batch_vs_alone,
    "restored-vs-straight": restored_vs_straight,
    "cuda-graph": cuda_graph,
}


def select_checks(names: Sequence[str], backend: str) -> list[str]:
    """Resolve names of checks; `all` stands for those that the backend can run. InputError for an unknown name."""
    if unknown := [name for name in names if name not in (*CHECKS, "all")]:
        raise InputError(f"there is no check {unknown[0]!r}; known are {', '.join(CHECKS)} and all")
    if "all" not in names:
        return list(dict.fromkeys(names))
    return [name for name in CHECKS if name != "cuda-graph" or backend in PLAN_BACKENDS]


_Side = tuple[FullDecoder, Any]  # a decoder and its state, whose last row is compared


def _meet(name: str, one: _Side, other: _Side, setting: Setting, slack: float | None) -> MutualCheck:
    """Compare the last rows of two states, now and over further steps.

    `slack` is the residual that iterated prefill stated for the latent; where it is above 0, logits and caches follow
    from the latent and have no bounds of their own. None asks for equality to the bit.
    """
    limits, errors = setting.limits, _measure(one, other, setting.steps)
    bounds = {"latent": 0.0 if slack is None else limits.max_abs_latent_error + slack}
    if slack is None:
        bounds |= dict.fromkeys(("logits", "cache", "logits_after"), 0.0)
    elif slack == 0:
        bounds |= dict.fromkeys(("logits", "logits_after"), limits.max_abs_logit_error)
        bounds["cache"] = limits.max_abs_cache_error
    beyond = [
        f"{part.replace('_', ' ')} by {errors[part]:.1e} (limit {bound:.1e})"
        for part, bound in bounds.items()
        if not errors[part] <= bound
    ]
    verdict = f"FAIL: {name}: the two differ in {', '.join(beyond)}" if beyond else f"PASS: {name}: the two agree"
    found = {part: f"{error:.1e}" for part, error in errors.items()}
    line = (
        f"{verdict}; latent within {found['latent']} (limit {bounds['latent']:.1e}), logits {found['logits']}, cache "
        f"{found['cache']}; over {setting.steps} further steps logits {found['logits_after']}, KL {found['kl_after']}"
    )
    return MutualCheck(name, not beyond, line, **errors, bound=bounds["latent"], steps=setting.steps)


def _measure(one: _Side, other: _Side, steps: int) -> dict[str, float]:
    """The errors of a `MutualCheck`: of the states, and over the greedy tokens of the second one, fed to both."""
    (decoder, state), (partner, straight) = one, other
    config, beside = decoder.config, len(state.logits) - 1
    logits, latent, cache = state_errors(state, straight, config)
    errors = {"logits": logits, "latent": latent or 0.0, "cache": cache, "logits_after": 0.0, "kl_after": 0.0}
    tokens = [int(straight.logits[-1].argmax())]
    # The rows beside the compared one read other tokens.
    batch = (
        [*((7919 * i + row) % config.vocab_size for row in range(beside)), token] for i, token in enumerate(tokens)
    )
    sides = rollout(decoder, batch, state), rollout(partner, ([token] for token in tokens), straight)
    for (_, found), (_, expected) in zip(*sides, strict=True):
        errors["logits_after"] = max(errors["logits_after"], distance(found[-1], expected[-1]))
        errors["kl_after"] = max(errors["kl_after"], kl_divergence(expected[-1], found[-1]))
        if len(tokens) < steps:
            tokens.append(int(expected[-1].argmax()))
    return errors


def _residual(state: Any) -> float:  # noqa: ANN401 - the decoder's own state
    """The residual that the last prefill stated; 0 where it was exact."""
    return float(state.prefill.residual or 0.0)


def _two_tokens(setting: Setting) -> None:
    if len(setting.prompt) < 2:
        raise InputError(f"the prompt has {len(setting.prompt)} token(s); this check needs 2 or more")


@dataclass(frozen=True)
class Recording:
    """`logits` follow the last n tokens of each row; `latents` is None for a model without memory."""

    ids: IntArray  # (B, T)
    logits: FloatArray  # (B, n, V)
    latents: FloatArray | None  # (B, T, C)


@dataclass(frozen=True)
class RecordedCheck(Check):
    """The comparison with a recording; errors are maxima of absolute differences over all recorded positions."""

    rows: int
    positions: int
    max_abs_logit_error: float
    max_abs_latent_error: float | None
    mean_kl: float
    top1_agreement: float


def read_recording(path: Path, config: LRTConfig) -> Recording:
    """Read and check a recording, without pickles. ParityError for one that is not of this model's shapes."""
    patterns = ("ids", "seq_logits*", "seq_h_final")[: 3 if config.memory else 2]
    expected = "token rows with the logits and latents computed for them"
    ids, logits, *rest = read_arrays(path, patterns, expected, ParityError)
    latents = rest[0] if rest else None
    _check_shapes(path, ids, logits, latents, config)
    check_prompts(list(ids), config.vocab_size)
    return Recording(ids.astype(np.int64), logits, latents)


def compare_with_recording(
    decoder: StatefulDecoder, recording: Recording, limits: ParityLimits, progress: Progress = silent
) -> RecordedCheck:
    """Decode every row from an empty state, one token at a time, and compare with the recorded numbers."""
    rows, length = recording.ids.shape
    if length > (capacity := capacity_of(decoder)):
        raise ParityError(f"the recorded rows have {length} tokens and the decoder holds {capacity}")
    logit_error, kl, same = 0.0, 0.0, 0
    latent = None if recording.latents is None else 0.0
    first = length - recording.logits.shape[1]
    for row, ids in enumerate(recording.ids):
        for t, (state, logits) in enumerate(rollout(decoder, ids[:, None])):
            progress("golden", row * length + t + 1, rows * length)
            if recording.latents is not None:
                latent = max(latent or 0.0, distance(recording.latents[row, t], state.latent[0]))
            if t >= first:
                expected, found = recording.logits[row, t - first], logits[0]
                logit_error = max(logit_error, distance(expected, found))
                kl += kl_divergence(expected, found)
                same += int(expected.argmax() == found.argmax())
    positions = rows * (length - first)
    kl, agreement = kl / positions, same / positions
    # By errors where the function is the same, by quality where the precision makes it another.
    if limits.top1_agreement is None:
        passed = logit_error <= limits.max_abs_logit_error and (latent or 0.0) <= limits.max_abs_latent_error
        limit = f"limits {limits.max_abs_logit_error:.0e} and {limits.max_abs_latent_error:.0e}"
    else:
        passed = kl <= limits.mean_kl and agreement >= limits.top1_agreement and math.isfinite(logit_error)
        limit = f"limits: KL {limits.mean_kl:.0e}, first choices {limits.top1_agreement:.0%}"
    carried = "" if latent is None else f", latent within {latent:.1e}"
    line = (
        f"{'PASS' if passed else 'FAIL'}: golden, {positions} recorded positions of {rows} row(s): logits within "
        f"{logit_error:.1e}{carried}, mean KL {kl:.1e}, {agreement:.1%} equal first choices ({limit})"
    )
    return RecordedCheck("golden", passed, line, rows, positions, logit_error, latent, kl, agreement)


def _check_shapes(path: Path, ids: Any, logits: Any, latents: Any, config: LRTConfig) -> None:  # noqa: ANN401
    fits = (
        ids.ndim == 2
        and ids.size > 0
        and ids.dtype.kind in "iu"
        and logits.ndim == 3
        and 1 <= logits.shape[1] <= ids.shape[1]
        and logits.shape[::2] == (ids.shape[0], config.vocab_size)
        and (latents is None or latents.shape == (*ids.shape, config.n_embd))
        and all(array is None or array.dtype.kind == "f" for array in (logits, latents))
    )
    if not fits:
        shapes = f"ids {ids.shape}, logits {logits.shape}, latents {getattr(latents, 'shape', None)}"
        raise ParityError(
            f"{path} holds {shapes}; expected (B, T), (B, n, {config.vocab_size}) and (B, T, {config.n_embd}): "
            "it was recorded from another model"
        )
