"""Reuse what a state has already read: cut it to the tokens that it shares with new prompts, and read only the rest.

An edited message in the middle of a chat costs what comes after the edit. Nothing is reused that was read less exactly
than the new request allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lrt_deploy.types import IntArray, PrefillReport

from .prefill import PrefillRequest
from .state import DecodeState


def common_prefix(first: IntArray, second: IntArray) -> int:
    """How many leading tokens are the same."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if different.size else length


def shared_tokens(state: DecodeState, rows: Sequence[IntArray], request: PrefillRequest) -> list[int]:
    """How many tokens of each prompt the state has already read.

    A prompt that is wholly there is left one token to read when others have some: all rows are read together.
    """
    shared = [common_prefix(np.array(tokens), row) for tokens, row in zip(state.tokens, rows, strict=True)]
    if state.read_within > request.allowed_error:
        shared = [0] * len(rows)
    if any(count < len(row) for count, row in zip(shared, rows, strict=True)):
        shared = [min(count, len(row) - 1) for count, row in zip(shared, rows, strict=True)]
    return shared


def reused(report: PrefillReport, shared: Sequence[int], rows: Sequence[IntArray]) -> PrefillReport:
    """The report of reading the rest, with passes counted over whole prompts."""
    total = sum(len(row) for row in rows)
    passes = report.passes * (total - sum(shared)) / total
    return replace(report, passes=passes, reused_tokens=sum(shared))
