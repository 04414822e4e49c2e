"""Parity: whether a decoder computes what the reference computes, along a whole rollout.

Puts the parts together: what can be compared at all is decided here, both sides are driven by `rollout`, the verdict
is made in `verdict` by the limits of `tolerances`. Written against `interface.StatefulDecoder`: it knows no
backend, no files and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .errors import ParityError
from .interface import PrefillPolicy, StatefulDecoder
from .parity_report import Drift, FreeRun, ParityReport, Rollout
from .prompts import check_prompts
from .rollout import Progress, Reading, kl_divergence, roll_out
from .tolerances import ParityLimits, limits
from .verdict import judge

__all__ = ["ParityReport", "Progress", "compare", "kl_divergence"]


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
    `tolerance` say how the decoder reads the prompt where that is checked.
    """
    bounds = limits(precision)
    _check_comparable(reference, decoder)
    tokens = check_prompts([prompt], reference.config.vocab_size)[0].tolist()
    _check_length(reference, decoder, len(tokens), steps)
    rollout = roll_out(reference, decoder, tokens, steps, Reading(prefill, tolerance), progress)
    return _report(rollout, bounds, precision, backend, checkpoint_matches)


def _report(
    rollout: Rollout, bounds: ParityLimits, precision: str, backend: str, checkpoint_matches: bool | None
) -> ParityReport:
    passed, verdict = judge(rollout, bounds)
    points = rollout.points
    kl = [point.kl for point in points] or [math.inf]
    return ParityReport(
        passed=passed,
        verdict=verdict,
        checkpoint_matches=checkpoint_matches,
        backend=backend,
        precision=precision,
        steps=rollout.steps,
        prompt_tokens=rollout.prompt_tokens,
        max_abs_logit_error=max((point.logit_error for point in points), default=math.inf),
        max_abs_latent_error=max((p.latent_error for p in points if p.latent_error is not None), default=None),
        mean_kl=sum(kl) / len(kl),
        max_kl=max(kl),
        top1_agreement=sum(point.same_top1 for point in points) / max(1, len(points)),
        first_divergence=rollout.first_divergence(bounds),
        prefill=rollout.prefill,
        limits=bounds,
        points=tuple(points),
        max_abs_key_error=max((error for point in points for error in point.key_errors), default=math.inf),
        max_abs_value_error=max((error for point in points for error in point.value_errors), default=math.inf),
        drift=Drift.of(points),
        free_running=FreeRun.of(rollout),
        tokens=tuple(rollout.tokens),
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
