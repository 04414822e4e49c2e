"""A decoder against a recording: token rows, and what another implementation computed for them, position by position.

The recording is an `.npz` with the names of this project's goldens: `ids` (B, T), `seq_logits` (B, T, V) or its last
positions under a name that begins so, and `seq_h_final` (B, T, C), the latents, where the model has any. So code that
is not ours, such as the authors' sequential evaluator, can be the reference, without torch and without a checkpoint.

Judges by the same limits as a rollout. Knows no backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ParityError
from lrt_deploy.text.prompts import check_prompts
from lrt_deploy.tolerances import ParityLimits
from lrt_deploy.types import FloatArray, IntArray, StatefulDecoder

from .bits_per_byte import NPZ_ERRORS, load_archive, read_member
from .report import as_json
from .rollout import distance, kl_divergence

_LOGITS, _LATENTS = "seq_logits", "seq_h_final"


@dataclass(frozen=True)
class Recording:
    """`logits` are those after the last n tokens of each row; `latents` is None for a model without memory."""

    ids: IntArray  # (B, T)
    logits: FloatArray  # (B, n, V)
    latents: FloatArray | None  # (B, T, C)


@dataclass(frozen=True)
class RecordedCheck:
    """The comparison; errors are maxima of absolute differences over all positions that were recorded."""

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
    """Read and check a recording; runs nothing in the file. ParityError for one that is not of this model's shapes."""
    try:
        archive = load_archive(path)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ParityError(f"{path} holds one array; expected an .npz archive of recorded arrays")
        with archive as file:
            names = [name for name in file if name.startswith(_LOGITS)]
            if "ids" not in file or not names or (config.memory and _LATENTS not in file):
                raise ParityError(
                    f"{path} lacks ids, {_LOGITS} or {_LATENTS}; it holds {', '.join(file) or 'nothing'}. Expected "
                    "token rows with the logits and latents computed for them (the names are in "
                    "lrt_deploy/evaluation/recorded.py)"
                )
            ids, logits = read_member(file, "ids"), read_member(file, names[0])
            latents = read_member(file, _LATENTS) if config.memory else None
    except NPZ_ERRORS as error:
        raise ParityError(f"{path} cannot be read as an .npz of recorded arrays: {str(error)[:300]}") from error
    _check_shapes(path, ids, logits, latents, config)
    check_prompts(list(ids), config.vocab_size)
    return Recording(ids.astype(np.int64), logits, latents)


def compare_with_recording(
    decoder: StatefulDecoder,
    recording: Recording,
    limits: ParityLimits,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> RecordedCheck:
    """Decode every row from an empty state, one token at a time, and compare what was recorded."""
    rows, length = recording.ids.shape
    capacity = getattr(decoder, "max_seq_len", decoder.config.max_positions)
    if length > capacity:
        raise ParityError(f"the recorded rows have {length} tokens and the decoder holds {capacity}")
    logit_error, latent_error, kl, same = 0.0, 0.0, 0.0, 0
    first = length - recording.logits.shape[1]
    for row in range(rows):
        for t in range(length):
            token = [int(recording.ids[row, t])]
            if t == 0:
                state = decoder.prefill([token], policy="stepwise")
            else:
                decoder.step(state, token)
            progress("golden", row * length + t + 1, rows * length)
            if recording.latents is not None:
                latent_error = max(latent_error, distance(recording.latents[row, t], state.latent[0]))
            if t >= first:
                expected, found = recording.logits[row, t - first], state.logits[0]
                logit_error = max(logit_error, distance(expected, found))
                kl += kl_divergence(expected.astype(np.float64), found.astype(np.float64))
                same += int(expected.argmax() == found.argmax())
    positions = rows * (length - first)
    errors = (logit_error, latent_error if recording.latents is not None else None)
    return _judged(rows, positions, errors, (kl / positions, same / positions), limits)


def _judged(
    rows: int,
    positions: int,
    errors: tuple[float, float | None],
    quality: tuple[float, float],
    limits: ParityLimits,
) -> RecordedCheck:
    """By errors where the function is the same, by quality where the precision makes it another."""
    (logits, latent), (kl, same) = errors, quality
    if limits.top1_agreement is None:
        passed = logits <= limits.max_abs_logit_error and (latent or 0.0) <= limits.max_abs_latent_error
        limit = f"limits {limits.max_abs_logit_error:.0e} and {limits.max_abs_latent_error:.0e}"
    else:
        passed = kl <= limits.mean_kl and same >= limits.top1_agreement
        limit = f"limits: KL {limits.mean_kl:.0e}, first choices {limits.top1_agreement:.0%}"
    carried = "" if latent is None else f", latent within {latent:.1e}"
    line = (
        f"{'PASS' if passed and math.isfinite(logits) else 'FAIL'}: golden, {positions} recorded positions of {rows} "
        f"row(s): logits within {logits:.1e}{carried}, mean KL {kl:.1e}, {same:.1%} equal first choices ({limit})"
    )
    return RecordedCheck(line.startswith("PASS"), line, rows, positions, logits, latent, kl, same)


def _check_shapes(path: Path, ids: Any, logits: Any, latents: Any, config: LRTConfig) -> None:  # noqa: ANN401
    """The arrays must be of one another's and of the model's sizes, and numbers."""
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
