"""Bits per byte, as the model's authors count it, of the model as it decodes: token by token, each row from m = 0.

Over all targets whose token has bytes: the sum of nats, divided by ln 2 and by the sum of bytes. Special tokens have no
bytes and ignored targets are -1; both are read but not counted.

Written against `interface.StatefulDecoder`, so any backend and the reference count alike. It knows no file format but
the `.npz` of token rows, and does not decide how many rows fit the decoder at once.
"""

from __future__ import annotations

import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lrt_deploy.errors import BackendError, InputError
from lrt_deploy.files import open_regular
from lrt_deploy.types import FloatArray, IntArray, StatefulDecoder

if TYPE_CHECKING:
    from lrt_deploy.text.tokenizer import Tokenizer

IGNORED = -1  # a target that is not counted, as in the authors' data

# Called with what is being done, and done and total of it in tokens.
Progress = Callable[[str, int, int], None]
# (N, T), or N rows of unequal lengths.
Rows = IntArray | Sequence[Sequence[int]] | Sequence[IntArray]


_FIRST_BUCKET = 16  # positions; each further bucket begins at twice the position of the one before


@dataclass(frozen=True)
class Bucket:
    """Targets whose token was predicted from positions `first` to `last`: how much the past so far helps."""

    first: int
    last: int
    bits_per_byte: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Evaluation:
    """`tokens` and `bytes` are those of the counted targets; `buckets` share them out by position in the row."""

    bits_per_byte: float
    tokens: int
    bytes: int
    buckets: tuple[Bucket, ...] = ()


@dataclass(frozen=True)
class _Row:
    """Inputs (T) and targets (T) of one sequence."""

    x: IntArray
    y: IntArray


def evaluate(
    decoder: StatefulDecoder,
    x: Rows,
    y: Rows,
    token_bytes: Sequence[int],
    batch_size: int,
    progress: Progress = lambda what, done, total: None,
) -> Evaluation:
    """Decode the rows of `x` and count how well each token predicts its target in `y`.

    `token_bytes[id]` is the number of bytes of a token, 0 for a special one. Rows of one length run together,
    `batch_size` at a time. Raises InputError for rows, ids or a batch size that cannot be used, and when no target
    has bytes.
    """
    sizes = np.asarray(token_bytes, np.int64)  # (V)
    rows = _checked_rows(decoder, x, y, min(decoder.config.vocab_size, sizes.size))
    if batch_size < 1:
        raise InputError(f"the batch size is {batch_size}, expected at least 1")
    tally = np.zeros((max(len(row.x) for row in rows), 3))  # (T, 3): nats, tokens, bytes by position
    for row in rows:
        counted_bytes = np.where(row.y != IGNORED, sizes[row.y], 0)
        tally[: len(row.x), 1:] += np.stack([counted_bytes > 0, counted_bytes], axis=1)
    if not tally[:, 2].any():
        raise InputError("no target has bytes: all are special tokens or ignored (-1), so there is nothing to count")
    total, done = sum(len(row.x) for row in rows), 0
    for batch in _batches(rows, batch_size):
        counted = np.stack([(row.y != IGNORED) & (sizes[row.y] > 0) for row in batch])  # (B, T)
        for t, (step_nats, step_counted) in enumerate(zip(_decode(decoder, batch), counted.T, strict=True)):
            tally[t, 0] += float(step_nats[step_counted].sum())
            done += len(batch)
            progress("evaluating", done, total)
    return Evaluation(*_rate(tally), buckets=tuple(_buckets(tally)))


def _rate(tally: npt.NDArray[np.float64]) -> tuple[float, int, int]:
    """Bits per byte, tokens and bytes of these positions, (n, 3) as counted by `evaluate`."""
    nats, tokens, size = tally.sum(axis=0)
    return float(nats) / (math.log(2) * size), int(tokens), int(size)


def _buckets(tally: npt.NDArray[np.float64]) -> Iterator[Bucket]:
    """Ranges of positions that double in length; those without a counted target are left out."""
    first, end = 0, _FIRST_BUCKET
    while first < len(tally):
        last = min(end, len(tally)) - 1
        if tally[first : last + 1, 2].any():
            yield Bucket(first, last, *_rate(tally[first : last + 1]))
        first, end = end, 2 * end


def rows_from_text(text: str, tokenizer: Tokenizer, max_seq_len: int) -> tuple[list[list[int]], list[list[int]]]:
    """Cut a text into rows (x, y) of at most `max_seq_len` tokens, so that every token is a target exactly once.

    The text is tokenized as a whole and its tokens are cut into pieces of `max_seq_len`; the last may be shorter. A
    piece is the row's y; x is <|bos|> and the piece without its last token. So every row starts afresh, its first token
    predicted from <|bos|> alone, and the model reads at most `max_seq_len` tokens.
    """
    if max_seq_len < 1:
        raise InputError(f"max_seq_len is {max_seq_len}, expected at least 1")
    tokens = tokenizer.encode(text)
    if not tokens:
        raise InputError("the text is empty; expected at least one token to predict")
    y = [tokens[start : start + max_seq_len] for start in range(0, len(tokens), max_seq_len)]
    return [[tokenizer.bos_id, *piece[:-1]] for piece in y], y


# What numpy raises on archives that are damaged or none; a header is parsed as Python's literals.
NPZ_ERRORS = (
    *(OSError, ValueError, EOFError, MemoryError, NotImplementedError, RecursionError, OverflowError, TypeError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


def rows_from_npz(path: str | Path) -> tuple[IntArray, IntArray]:
    """The arrays `x` and `y` of an `.npz` file, (N, T) whole numbers each, as they are. Runs nothing in the file."""
    arrays = _read_arrays(path, ("x", "y"))
    for name, array in arrays.items():
        if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
            raise InputError(f"{path}: {name} holds the token id {array.max()}, which no vocabulary has")
        if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "iu":
            raise InputError(
                f"{path}: {name} is {array.dtype} of shape {array.shape}, expected token ids (rows, tokens), not empty"
            )
    if arrays["x"].shape != arrays["y"].shape:
        raise InputError(
            f"{path}: x has the shape {arrays['x'].shape} and y {arrays['y'].shape}; expected a target for every token"
        )
    return arrays["x"].astype(np.int64), arrays["y"].astype(np.int64)


# Recorded numbers hardly compress and token rows by less than this; a small file must not become a large array.
_MAX_EXPANSION, _FREE_BYTES, _MAX_BYTES = 64, 64 * 1024 * 1024, 8 * 1024**3


def load_archive(path: str | Path) -> Any:  # noqa: ANN401 - an array or NpzFile, as np.load has it
    """np.load without pickles, of a regular file whose arrays are of bounded size; an array alone is mapped, not read.

    Of a file that is neither archive nor array, numpy would say how to unpickle it.
    """
    with open_regular(Path(path), "the archive of arrays", InputError) as file:
        head, size = file.read(6), os.fstat(file.fileno()).st_size
        if head == b"\x93NUMPY":
            return np.load(path, allow_pickle=False, mmap_mode="r")
        if not head.startswith(b"PK"):
            raise ValueError("it begins like no such archive")
        with zipfile.ZipFile(file) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
    if total > (limit := min(max(_MAX_EXPANSION * size, _FREE_BYTES), _MAX_BYTES)):
        raise ValueError(f"its {size} bytes would become {total}; at most {limit} are accepted")
    return np.load(path, allow_pickle=False)


def _read_arrays(path: str | Path, names: tuple[str, ...]) -> dict[str, npt.NDArray[Any]]:
    try:
        archive = load_archive(path)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{path} holds one array; expected an .npz archive with token rows x and targets y")
        with archive:
            if missing := [name for name in names if name not in archive]:
                raise InputError(
                    f"{path} has no array {' and no array '.join(missing)}, but {', '.join(archive) or 'none'}; "
                    "expected token rows x and their targets y"
                )
            return {name: read_member(archive, name) for name in names}
    except NPZ_ERRORS as error:
        reason = str(error)[:300]
        raise InputError(f"{path} cannot be read as an .npz archive of token rows x and y: {reason}") from error


def read_member(archive: Any, name: str) -> npt.NDArray[Any]:  # noqa: ANN401 - an NpzFile
    """An array of an archive; ValueError for a member that is none, which numpy gives as bytes."""
    array = archive[name]
    if not isinstance(array, np.ndarray):
        raise ValueError(f"its member {name} is no array")
    return array


def _checked_rows(decoder: StatefulDecoder, x: Rows, y: Rows, ids: int) -> list[_Row]:
    """Rows that can be decoded and counted; targets must have an entry in token_bytes too, so are below `ids`."""
    vocab_size = decoder.config.vocab_size
    capacity = getattr(decoder, "max_seq_len", decoder.config.max_positions)
    if len(x) != len(y) or len(x) == 0:
        raise InputError(f"x has {len(x)} rows and y has {len(y)}; expected a row of targets for each, at least one")
    rows = []
    for i, (tokens, targets) in enumerate(zip(x, y, strict=True)):
        row = _Row(_as_ids(tokens, f"x row {i}", 0, vocab_size), _as_ids(targets, f"y row {i}", IGNORED, ids))
        if len(row.x) != len(row.y):
            raise InputError(f"x row {i} has {len(row.x)} tokens and y row {i} has {len(row.y)}; expected as many")
        if len(row.x) > capacity:
            raise InputError(
                f"x row {i} has {len(row.x)} tokens, and the decoder holds {capacity}; cut the rows shorter, or export "
                "with a larger --max-seq-len"
            )
        rows.append(row)
    return rows


def _as_ids(values: Sequence[int] | IntArray, name: str, lowest: int, end: int) -> IntArray:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise InputError(f"{name} is {array.dtype} of shape {array.shape}, expected a flat row of whole numbers")
    outside = np.flatnonzero((array < lowest) | (array >= end))
    if outside.size:
        where = int(outside[0])
        raise InputError(f"{name} holds {array[where]} at index {where}; expected token ids {lowest} to {end - 1}")
    return array.astype(np.int64)


def _batches(rows: list[_Row], batch_size: int) -> Iterator[list[_Row]]:
    """Rows of one length together, `batch_size` at a time."""
    for _, group in groupby(sorted(rows, key=lambda row: len(row.x)), key=lambda row: len(row.x)):
        same = list(group)
        for start in range(0, len(same), batch_size):
            yield same[start : start + batch_size]


def _decode(decoder: StatefulDecoder, batch: list[_Row]) -> Iterator[npt.NDArray[np.float64]]:
    """The nats (B) of each target, one array per position; what stands for ignored targets means nothing."""
    x, y = np.stack([row.x for row in batch]), np.stack([row.y for row in batch])  # (B, T)
    state = decoder.prefill(x[:, :1].tolist(), policy="stepwise")
    yield _nats(state.logits, y[:, 0], 0)
    for t in range(1, x.shape[1]):
        yield _nats(decoder.step(state, x[:, t]), y[:, t], t)


def _nats(logits: FloatArray, targets: IntArray, position: int) -> npt.NDArray[np.float64]:
    """-log softmax of each row (B, V) at its target (B), in float64."""
    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    nats: npt.NDArray[np.float64] = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(targets)), targets]
    if not np.isfinite(nats).all():
        raise BackendError(f"the decoder's logits at position {position} are not finite; nothing was counted from them")
    return nats
