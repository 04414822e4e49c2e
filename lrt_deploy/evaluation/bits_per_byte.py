"""Bits per byte as the model's authors count them, of the model as it decodes: stepwise, each row from a zero latent.

The sum of nats over all targets whose token has bytes, divided by ln 2 and by the sum of bytes. Special tokens have no
bytes and ignored targets are -1; both are read but not counted.
"""

from __future__ import annotations

import fnmatch
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lrt_deploy.errors import BackendError, InputError, LRTDeployError
from lrt_deploy.files import open_regular
from lrt_deploy.text.prompts import check_row
from lrt_deploy.types import IntArray, StatefulDecoder

from .rollout import Progress, capacity_of, nats, rollout, silent

if TYPE_CHECKING:
    from lrt_deploy.text.tokenizer import Tokenizer

IGNORED = -1  # a target that is not counted, as in the authors' data
# (N, T), or N rows of unequal lengths.
Rows = IntArray | Sequence[Sequence[int]] | Sequence[IntArray]
_FIRST_BUCKET = 16  # positions; each further bucket begins at twice the position of the one before


@dataclass(frozen=True)
class Bucket:
    """The counted targets that were predicted from positions `first` to `last` of their row."""

    first: int
    last: int
    bits_per_byte: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Evaluation:
    """`tokens` and `bytes` of the counted targets; `buckets` divide them by position in the row."""

    bits_per_byte: float
    tokens: int
    bytes: int
    buckets: tuple[Bucket, ...] = ()


_Row = tuple[IntArray, IntArray]  # inputs (T) and targets (T) of one sequence


def evaluate(
    decoder: StatefulDecoder,
    x: Rows,
    y: Rows,
    token_bytes: Sequence[int],
    batch_size: int,
    progress: Progress = silent,
) -> Evaluation:
    """Decode the rows of `x` and measure how well each position predicts its target in `y`.

    `token_bytes[id]` is the number of bytes of a token, 0 for a special one. Rows of one length run together,
    `batch_size` at a time. Raises InputError for rows, ids or a batch size that cannot be used, and where no target
    has bytes; BackendError for logits that are not finite.
    """
    sizes = np.asarray(token_bytes, np.int64)  # (V)
    rows = _checked_rows(decoder, x, y, min(decoder.config.vocab_size, sizes.size))
    if batch_size < 1:
        raise InputError(f"the batch size is {batch_size}, expected at least 1")
    tally = np.zeros((max(len(tokens) for tokens, _ in rows), 3))  # (T, 3): nats, tokens, bytes by position
    for _, targets in rows:
        counted_bytes = np.where(targets != IGNORED, sizes[targets], 0)
        tally[: len(targets), 1:] += np.stack([counted_bytes > 0, counted_bytes], axis=1)
    if not tally[:, 2].any():
        raise InputError("no target has bytes: all are special tokens or ignored (-1), so there is nothing to count")
    total, done = sum(len(tokens) for tokens, _ in rows), 0
    for batch in _batches(rows, batch_size):
        x_batch, y_batch = map(np.stack, zip(*batch, strict=True))  # (B, T)
        counted = (y_batch != IGNORED) & (sizes[y_batch] > 0)
        for t, (_, logits) in enumerate(rollout(decoder, x_batch.T)):
            step_nats = nats(logits, y_batch[:, t])  # (B); those of ignored targets are not used
            if not np.isfinite(step_nats).all():
                raise BackendError(
                    f"the decoder's logits at position {t} are not finite; nothing was counted from them"
                )
            tally[t, 0] += float(step_nats[counted[:, t]].sum())
            done += len(x_batch)
            progress("evaluating", done, total)
    return Evaluation(*_rate(tally), buckets=tuple(_buckets(tally)))


def _rate(tally: npt.NDArray[np.float64]) -> tuple[float, int, int]:
    """Bits per byte, tokens and bytes of these positions, (n, 3) as counted by `evaluate`."""
    total, tokens, size = tally.sum(axis=0)
    return float(total) / (math.log(2) * size), int(tokens), int(size)


def _buckets(tally: npt.NDArray[np.float64]) -> Iterator[Bucket]:
    """Ranges of positions that double in length, without those that have no counted target."""
    first, end = 0, _FIRST_BUCKET
    while first < len(tally):
        last = min(end, len(tally)) - 1
        if tally[first : last + 1, 2].any():
            yield Bucket(first, last, *_rate(tally[first : last + 1]))
        first, end = end, 2 * end


def rows_from_text(text: str, tokenizer: Tokenizer, max_seq_len: int) -> tuple[list[list[int]], list[list[int]]]:
    """Cut a text into rows (x, y) of at most `max_seq_len` tokens, so that every token is a target exactly once.

    The text is tokenized as a whole and its tokens are cut into pieces of `max_seq_len`; the last may be shorter. A
    piece is the row's y; x is <|bos|> followed by the piece without its last token, so that the first token of each row
    is predicted from <|bos|> alone.
    """
    if max_seq_len < 1:
        raise InputError(f"max_seq_len is {max_seq_len}, expected at least 1")
    tokens = tokenizer.encode(text)
    if not tokens:
        raise InputError("the text is empty; expected at least one token to predict")
    y = [tokens[start : start + max_seq_len] for start in range(0, len(tokens), max_seq_len)]
    return [[tokenizer.bos_id, *piece[:-1]] for piece in y], y


def rows_from_npz(path: str | Path) -> tuple[IntArray, IntArray]:
    """Read the arrays `x` and `y` of an `.npz` file, (N, T) whole numbers each, without pickles."""
    x, y = read_arrays(path, ("x", "y"), "token rows x and their targets y", InputError)
    for name, array in (("x", x), ("y", y)):
        if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "iu" or array.max() > np.iinfo(np.int64).max:
            raise InputError(
                f"{path}: {name} is {array.dtype} of shape {array.shape}, expected token ids (rows, tokens), not empty"
            )
    if x.shape != y.shape:
        raise InputError(f"{path}: x has the shape {x.shape} and y {y.shape}; expected a target for every token")
    return x.astype(np.int64), y.astype(np.int64)


def _checked_rows(decoder: StatefulDecoder, x: Rows, y: Rows, ids: int) -> list[_Row]:
    """Check and convert rows; token ids lie below the vocabulary size, targets below `ids` too."""
    capacity = capacity_of(decoder)
    if len(x) != len(y) or len(x) == 0:
        raise InputError(f"x has {len(x)} rows and y has {len(y)}; expected a row of targets for each, at least one")
    rows = []
    for i in range(len(x)):
        tokens = check_row(x[i], decoder.config.vocab_size, f"x row {i}")
        targets = check_row(y[i], ids, f"y row {i}", IGNORED)
        if len(tokens) != len(targets) or not len(tokens):
            raise InputError(
                f"x row {i} has {len(tokens)} tokens and y row {i} has {len(targets)}; expected as many, at least one"
            )
        if len(tokens) > capacity:
            raise InputError(
                f"x row {i} has {len(tokens)} tokens, and the decoder holds {capacity}; cut the rows shorter, or "
                "export with a larger --max-seq-len"
            )
        rows.append((tokens, targets))
    return rows


def _batches(rows: list[_Row], batch_size: int) -> Iterator[list[_Row]]:
    rows = sorted(rows, key=lambda row: len(row[0]))
    for _, same in groupby(rows, key=lambda row: len(row[0])):
        while batch := list(islice(same, batch_size)):
            yield batch


# Errors of damaged archives; numpy parses an array's header as Python literals.
_ERRORS = (
    *(OSError, ValueError, EOFError, MemoryError, RuntimeError, OverflowError, TypeError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
# Bounds of the uncompressed size: recorded numbers hardly compress, and token rows by less than this factor.
_MAX_EXPANSION, _FREE_BYTES, _MAX_BYTES = 64, 64 * 1024 * 1024, 8 * 1024**3


def read_arrays(
    path: str | Path, patterns: Sequence[str], expected: str, error_type: type[LRTDeployError]
) -> list[npt.NDArray[Any]]:
    """Read for each of `patterns` the first array whose name matches it.

    `expected` says what the archive should hold. Raises `error_type` for a file that is no archive, is damaged, would
    become too large, or lacks an array; InputError for one that is not a regular file.
    """
    try:
        with open_regular(Path(path), "the archive of arrays", InputError) as file:
            if file.read(6) == b"\x93NUMPY":
                raise error_type(f"{path} holds one array; expected an .npz archive of {expected}")
            size = os.fstat(file.fileno()).st_size
            with zipfile.ZipFile(file) as archive:
                total = sum(entry.file_size for entry in archive.infolist())
                if total > (limit := min(max(_MAX_EXPANSION * size, _FREE_BYTES), _MAX_BYTES)):
                    raise ValueError(f"its {size} bytes would become {total}; at most {limit} are accepted")
                members = {name.removesuffix(".npy"): name for name in archive.namelist()}
                found = [next((name for name in members if fnmatch.fnmatchcase(name, like)), None) for like in patterns]
                if missing := [pattern for pattern, name in zip(patterns, found, strict=True) if name is None]:
                    held = ", ".join(members) or "nothing"
                    raise error_type(f"{path} lacks {' and '.join(missing)}; it holds {held}. Expected {expected}")
                return [_read(archive, members[name]) for name in found if name is not None]
    except _ERRORS as error:
        reason = str(error)[:300]
        raise error_type(f"{path} cannot be read as an .npz archive: {reason}. Expected {expected}") from error


def _read(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    with archive.open(name) as member:
        array: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
        return array
