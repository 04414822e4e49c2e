"""Compare a decoder with a recording: token rows, and the logits and latents that another implementation computed.

The recording is an `.npz` archive with `ids` (B, T), `seq_logits` (B, T, V) or its last positions under a name that
begins so, and `seq_h_final` (B, T, C), the latents of a model with memory. So other code, such as the authors'
sequential evaluator, can be the reference, without torch and without a checkpoint.

The limits are those of a rollout. Imports no backend.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ParityError
from lrt_deploy.text.prompts import check_prompts
from lrt_deploy.tolerances import ParityLimits
from lrt_deploy.types import FloatArray, IntArray, StatefulDecoder

from .arrays import read_arrays
from .report import as_json
from .rollout import Progress, capacity_of, distance, kl_divergence, rollout, silent


@dataclass(frozen=True)
class Recording:
    """`logits` follow the last n tokens of each row; `latents` is None for a model without memory."""

    ids: IntArray  # (B, T)
    logits: FloatArray  # (B, n, V)
    latents: FloatArray | None  # (B, T, C)


@dataclass(frozen=True)
class RecordedCheck:
    """The comparison; errors are maxima of absolute differences over all recorded positions."""

    passed: bool
    line: str
    rows: int
    positions: int
    max_abs_logit_error: float
    max_abs_latent_error: float | None
    mean_kl: float
    top1_agreement: float
    name: str = "golden"

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        result: dict[str, Any] = as_json(asdict(self))
        return result


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
    logit_error, latent_error, kl, same = 0.0, 0.0, 0.0, 0
    first = length - recording.logits.shape[1]
    for row, ids in enumerate(recording.ids):
        for t, (state, logits) in enumerate(rollout(decoder, ids[:, None])):
            progress("golden", row * length + t + 1, rows * length)
            if recording.latents is not None:
                latent_error = max(latent_error, distance(recording.latents[row, t], state.latent[0]))
            if t >= first:
                expected, found = recording.logits[row, t - first], logits[0]
                logit_error = max(logit_error, distance(expected, found))
                kl += kl_divergence(expected, found)
                same += int(expected.argmax() == found.argmax())
    positions = rows * (length - first)
    latent = latent_error if recording.latents is not None else None
    kl, agreement = kl / positions, same / positions
    # By errors where the function is the same, by quality where the precision makes it another.
    if limits.top1_agreement is None:
        passed = logit_error <= limits.max_abs_logit_error and latent_error <= limits.max_abs_latent_error
        limit = f"limits {limits.max_abs_logit_error:.0e} and {limits.max_abs_latent_error:.0e}"
    else:
        passed = kl <= limits.mean_kl and agreement >= limits.top1_agreement and math.isfinite(logit_error)
        limit = f"limits: KL {limits.mean_kl:.0e}, first choices {limits.top1_agreement:.0%}"
    carried = "" if latent is None else f", latent within {latent:.1e}"
    line = (
        f"{'PASS' if passed else 'FAIL'}: golden, {positions} recorded positions of {rows} row(s): logits within "
        f"{logit_error:.1e}{carried}, mean KL {kl:.1e}, {agreement:.1%} equal first choices ({limit})"
    )
    return RecordedCheck(passed, line, rows, positions, logit_error, latent, kl, agreement)


def _check_shapes(path: Path, ids: Any, logits: Any, latents: Any, config: LRTConfig) -> None:  # noqa: ANN401
    """Refuse arrays whose shapes or types do not fit each other and the model."""
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
