"""Parity: whether a decoder computes what the reference computes, along a whole rollout.

Puts the parts together: what can be compared at all is decided here, both sides are driven by `rollout`, the verdict
is made in `verdict` by the limits of `tolerances`. Written against `interface.StatefulDecoder`: it knows no
backend, no files and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lrt_deploy.errors import ParityError
from lrt_deploy.text.prompts import check_prompts
from lrt_deploy.tolerances import ParityLimits, limits
from lrt_deploy.types import PrefillPolicy, StatefulDecoder

from .arithmetic import ArithmeticPart
from .report import Drift, FreeRun, ParityReport, Rollout
from .rollout import Progress, Reading, kl_divergence, roll_out
from .stored_weights import WeightsPart
from .verdict import judge_all

__all__ = ["About", "ParityReport", "Parts", "Progress", "compare", "follow", "kl_divergence", "report_of"]


def compare(
    reference: StatefulDecoder,
    decoder: StatefulDecoder,
    prompt: Sequence[int],
    steps: int,
    *,
    precision: str,
    checkpoint_matches: bool | None,
    backend: str,
    prefill: PrefillPolicy = "auto",
    tolerance: float | None = None,
    progress: Progress = lambda what, done, total: None,
) -> ParityReport:
    """Roll both out over `prompt` and `steps` greedy tokens, and judge by the limits of `precision`.

    A difference is a result, and so is a decoder that fails on the way. Raises ParityError for what cannot be compared,
    InputError for a prompt that cannot be read. `checkpoint_matches` is reported and decides nothing. `prefill` and
    `tolerance` say how the decoder reads the prompt where that is checked. Stored weights are not looked at: that, and
    the whole verdict, is `lrt_deploy.parity`'s.
    """
    about = About(precision, backend, checkpoint_matches, limits(precision))
    rollout = follow(reference, decoder, prompt, steps, Reading(prefill, tolerance), progress)
    return report_of(rollout, about)


def follow(
    reference: StatefulDecoder,
    decoder: StatefulDecoder,
    prompt: Sequence[int],
    steps: int,
    reading: Reading,
    progress: Progress = lambda what, done, total: None,
) -> Rollout:
    """Roll both out and judge nothing. Raises as `compare` does."""
    _check_comparable(reference, decoder)
    tokens = check_prompts([prompt], reference.config.vocab_size)[0].tolist()
    _check_length(reference, decoder, len(tokens), steps)
    return roll_out(reference, decoder, tokens, steps, reading, progress)


@dataclass(frozen=True)
class About:
    """What is compared, and by which limits it is judged."""

    precision: str
    backend: str
    checkpoint_matches: bool | None
    limits: ParityLimits


@dataclass(frozen=True)
class Parts:
    """What was found beside the rollout; None where a part was not judged."""

    weights: WeightsPart | None = None
    arithmetic: ArithmeticPart | None = None
    bits_per_byte: tuple[float, float] | None = None  # the reference's and the decoder's, on the prompt


def report_of(rollout: Rollout, about: About, parts: Parts | None = None) -> ParityReport:
    """The verdict on a rollout and all numbers behind it; with `parts`, on them as well."""
    parts, bounds, points = parts or Parts(), about.limits, rollout.points
    judgement = judge_all(rollout, bounds, parts.weights, parts.arithmetic, parts.bits_per_byte)
    verdict = judgement.verdict
    if about.checkpoint_matches is False:
        verdict += "; checkpoint_matches: no (the file is not the one that was exported)"
    kl = [point.kl for point in points] or [math.inf]
    return ParityReport(
        passed=judgement.passed,
        verdict=verdict,
        checkpoint_matches=about.checkpoint_matches,
        backend=about.backend,
        precision=about.precision,
        steps=rollout.steps,
        prompt_tokens=rollout.prompt_tokens,
        max_abs_logit_error=max((point.logit_error for point in points), default=math.inf),
        max_abs_latent_error=max((p.latent_error for p in points if p.latent_error is not None), default=None),
        mean_kl=sum(kl) / len(kl),
        max_kl=max(kl),
        top1_agreement=sum(point.same_top1 for point in points) / len(points) if points else math.nan,
        first_divergence=rollout.first_divergence(bounds),
        prefill=rollout.prefill,
        limits=bounds,
        points=tuple(points),
        max_abs_key_error=max((error for point in points for error in point.key_errors), default=math.inf),
        max_abs_value_error=max((error for point in points for error in point.value_errors), default=math.inf),
        drift=Drift.of(points),
        free_running=FreeRun.of(rollout),
        tokens=tuple(rollout.tokens),
        weights=parts.weights,
        arithmetic=parts.arithmetic,
        quality=judgement.quality,
    )


def _check_comparable(reference: StatefulDecoder, decoder: StatefulDecoder) -> None:
    """Refuse models whose logits or latents have no common shape; whatever else differs, the numbers will show."""
    for name in ("vocab_size", "memory", "n_embd", "n_layer"):
        expected, found = getattr(reference.config, name), getattr(decoder.config, name)
        if found != expected:
            raise ParityError(
                f"the decoder's model has {name} {found}, the reference's has {expected}, so there is nothing to "
                "compare; give the checkpoint that the bundle was exported from"
            )


def _check_length(reference: StatefulDecoder, decoder: StatefulDecoder, prompt_tokens: int, steps: int) -> None:
    if steps < 1:
        raise ParityError(f"steps is {steps}, expected at least 1: parity is a rollout")
    total = prompt_tokens + steps
    for name, side in (("decoder", decoder), ("reference", reference)):
        capacity = getattr(side, "max_seq_len", side.config.max_positions)
        if total > capacity:
            raise ParityError(
                f"{prompt_tokens} prompt tokens and {steps} steps are {total} tokens, and the {name} holds {capacity}; "
                "take fewer steps or a shorter prompt, or export with a larger --max-seq-len"
            )
