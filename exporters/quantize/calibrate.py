"""Measure the activations of the model while it decodes text; what follows from them is decided in `plan`.

Activations depend on the latent, and that on all tokens before, so whole rows are decoded with the PyTorch reference,
and a torch function mode observes the inputs and outputs of each matrix product. The rows come from the user's text,
from the text shipped with the package, or, without a tokenizer, from an arithmetic progression of token ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lrt_deploy.errors import ExportError
from lrt_deploy.evaluation.rollout import Progress, rollout, silent
from lrt_deploy.fields import raised_as
from lrt_deploy.files import MAX_TEXT_BYTES, read_text
from lrt_deploy.model.model import LRT
from lrt_deploy.model.reference import ReferenceDecoder
from lrt_deploy.text.chat import BOS
from lrt_deploy.text.tokenizer import Tokenizer

INT8_LEVELS = 127  # symmetric: -127 to 127, no zero point
_BINS = 4096  # 32 a level at the full range
_TINY = 1e-30
# Candidates for the largest number that is still represented, as shares of the largest one seen.
_SHARES = np.geomspace(0.02, 1.0, 80)


class Histogram:
    """Counts of absolute values; `largest` is exact. `add` raises ValueError for a number that is not finite."""

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(_BINS, np.int64)
        self.limit, self.largest = 0.0, 0.0

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Count the values of an array of any shape."""
        sizes = np.abs(values.reshape(-1))
        largest = float(sizes.max(initial=0.0))
        if not np.isfinite(largest):
            raise ValueError("not finite")
        self.largest = max(self.largest, largest)
        if self.limit == 0.0:
            if largest == 0.0:
                self.counts[0] += sizes.size
                return
            self.limit = largest
        while self.largest > self.limit:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(_BINS // 2, np.int64)])
            self.limit *= 2
        if self.limit < _TINY:  # the factor would be infinite in float32
            sizes = sizes.astype(np.float64)
        bins = np.minimum((sizes * (_BINS / self.limit)).astype(np.int64), _BINS - 1)
        self.counts += np.bincount(bins, minlength=_BINS)

    def scale(self) -> float:
        """Return the step of a symmetric int8 grid with the least mean squared error, which may clip outliers.

        Where all values are zeros the grid spans -1 to 1.
        """
        if self.largest == 0.0:
            return 1.0 / INT8_LEVELS
        centers = (np.arange(_BINS) + 0.5) * (self.limit / _BINS)
        seen = np.flatnonzero(self.counts)
        seen = seen[seen > 0]  # the first bin is zero, or close enough
        values, counts = centers[seen], self.counts[seen]
        steps = self.largest * _SHARES / INT8_LEVELS
        rounded = np.minimum(np.rint(values / steps[:, None]), INT8_LEVELS) * steps[:, None]  # (candidates, bins)
        return float(steps[np.argmin(((rounded - values) ** 2 * counts).sum(1))])

    def clipped(self, scale: float) -> float:
        """Return the share of values beyond the range of a scale."""
        beyond = int(np.ceil(scale * INT8_LEVELS * _BINS / self.limit)) if self.limit else _BINS
        return float(self.counts[beyond:].sum() / max(1, self.counts.sum()))


ROWS, ROW_TOKENS = 16, 256
SHIPPED = "the text shipped with lrt-deploy"
_STRIDE, _OFFSET = 7919, 104_729  # primes: neighbouring tokens and rows differ


@dataclass(frozen=True)
class CalibrationRows:
    """Rows of one length, their source in words, and the hash of the text (None: no text)."""

    tokens: Sequence[Sequence[int]]
    source: str
    sha256: str | None


def calibration_rows(file: Path | None, tokenizer: Tokenizer | None, vocab_size: int, capacity: int) -> CalibrationRows:
    """Return at most 16 rows of at most 256 tokens, spread evenly over the text, each after <|bos|>; or ExportError."""
    length = min(ROW_TOKENS, capacity)
    if tokenizer is None:
        if file is not None:
            raise ExportError(
                f"{file} cannot be read for calibration: this checkpoint has no tokenizer; add --tokenizer"
            )
        made = [[(_STRIDE * t + _OFFSET * row) % vocab_size for t in range(length)] for row in range(ROWS)]
        return CalibrationRows(made, "token ids made up, because there is no tokenizer", None)
    if file is None:
        text = files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")
    else:
        text = read_text(file, "the calibration text", ExportError, MAX_TEXT_BYTES)
    ids, bos = tokenizer.encode(text), [tokenizer.bos_id] if BOS in tokenizer.special_tokens else []
    piece = length - len(bos)
    if piece < 1 or not ids:
        raise ExportError(f"the calibration text has {len(ids)} tokens and a row holds {piece}; expected at least one")
    length = min(piece, len(ids))
    count = min(ROWS, len(ids) // length)
    starts = [index * (len(ids) - length) // max(1, count - 1) for index in range(count)]
    rows = [bos + ids[start : start + length] for start in starts]
    source = SHIPPED if file is None else file.name
    return CalibrationRows(rows, source, hashlib.sha256(text.encode()).hexdigest())


_MOMENT_ROWS = 512  # inputs multiplied at once: a moment is large, and adding to it waits for memory
_PRODUCTS = (torch.Tensor.matmul, torch.Tensor.__matmul__)


@dataclass
class Calibration:
    """Measured activations. Keys are parameter names; `outputs` holds the largest absolute products of each matrix.

    `residual` is the largest number in the residual stream, `values` in the value caches.
    """

    rows: int
    row_tokens: int
    inputs: dict[str, Histogram] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    residual: float = 0.0
    values: float = 0.0
    # Sums (K, K) of x^T x over the inputs of each matrix, for GPTQ only: they are large.
    moments: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    @property
    def squared_relu(self) -> float:
        """The largest relu(x) ** 2."""
        return max(seen.largest for name, seen in self.inputs.items() if name.endswith("mlp_out"))


def calibrate(
    model: LRT,
    rows: Sequence[Sequence[int]],
    progress: Progress = silent,
    moments: bool = False,
) -> Calibration:
    """Decode rows of token ids, all of one length, together from an empty state, and measure.

    `moments`: add up the second moments of all inputs too. Raises ExportError where the model itself produces numbers
    that are not finite.
    """
    ops, length = model.ops, len(rows[0])
    found = Calibration(len(rows), length)
    decoder = ReferenceDecoder(model, max_seq_len=length)
    try:
        with _Watch(model, found, moments) as watch:
            for state, _ in rollout(decoder, zip(*rows, strict=True)):
                progress("calibrating", int(state.lengths[0]), length)
        watch.add_moments()
    finally:
        model.ops = ops
    found.values = max(float(values.abs().max()) for values in state.values)
    return found


class _Watch(TorchFunctionMode):
    """Observe every product with a matrix of the model and every norm of its width."""

    def __init__(self, model: LRT, found: Calibration, moments: bool) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.width, self.found, self.moments = model.config.n_embd, found, moments
        self.waiting: dict[str, list[npt.NDArray[np.float32]]] = {}  # (rows, K) not yet in the moments

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and (name := self.names.get(id(args[1]))):
            self.see(name, args[0], result)
        elif func is F.rms_norm and args[0].shape[-1] == self.width and args[0].dim() == 3:
            self.found.residual = max(self.found.residual, float(args[0].abs().max()))
        return result

    def see(self, name: str, x: torch.Tensor, product: torch.Tensor) -> None:
        largest = float(product.abs().max())
        self.found.outputs[name] = max(self.found.outputs.get(name, 0.0), largest)
        if self.moments:
            waiting = self.waiting.setdefault(name, [])
            waiting.append(x.reshape(-1, x.shape[-1]).numpy().copy())
            if sum(map(len, waiting)) >= _MOMENT_ROWS:
                self.add_moments(name)
        advice = "; the checkpoint itself does not decode this text, see `lrt-deploy inspect`"
        with raised_as(ExportError, f"calibration: what {name} is multiplied with is ", advice):
            self.found.inputs.setdefault(name, Histogram()).add(x.numpy())

    def add_moments(self, *names: str) -> None:
        """Add the inputs that wait to the moments of the named matrices, or of all."""
        for name in names or tuple(self.waiting):
            if waiting := self.waiting.pop(name, []):
                rows = np.concatenate(waiting)
                moment = self.found.moments.setdefault(name, np.zeros((rows.shape[1],) * 2, np.float32))
                moment += rows.T @ rows
