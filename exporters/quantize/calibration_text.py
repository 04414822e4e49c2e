"""The token rows that calibration decodes: from the user's text, the one shipped with the package, or made up.

A bundle without tokenizer cannot read text; its rows are a fixed arithmetic progression through the vocabulary, which
is better than nothing and says so in the manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from lrt_deploy.errors import ExportError
from lrt_deploy.files import MAX_TEXT_BYTES, read_text
from lrt_deploy.text.chat import BOS
from lrt_deploy.text.tokenizer import Tokenizer

ROWS, ROW_TOKENS = 16, 256
SHIPPED = "the text shipped with lrt-deploy"
_STRIDE, _OFFSET = 7919, 104_729  # primes: neighbouring tokens and rows differ


@dataclass(frozen=True)
class CalibrationRows:
    """Rows of one length, what they are in words, and the hash of the text (None: made up)."""

    tokens: Sequence[Sequence[int]]
    source: str
    sha256: str | None


def calibration_rows(file: Path | None, tokenizer: Tokenizer | None, vocab_size: int, capacity: int) -> CalibrationRows:
    """At most 16 rows of at most 256 tokens, spread evenly over the text, each begun with <|bos|>.

    Raises ExportError for a text that cannot be read, is too short, or that there is no tokenizer for.
    """
    length = min(ROW_TOKENS, capacity)
    if tokenizer is None:
        if file is not None:
            raise ExportError(
                f"{file} cannot be read for calibration: this checkpoint has no tokenizer; add --tokenizer"
            )
        made = [[(_STRIDE * t + _OFFSET * row) % vocab_size for t in range(length)] for row in range(ROWS)]
        return CalibrationRows(made, "token ids made up, because there is no tokenizer", None)
    text = _read(file)
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


def _read(file: Path | None) -> str:
    if file is None:
        return files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")
    return read_text(file, "the calibration text", ExportError, MAX_TEXT_BYTES)
