"""The protocol of stateful decoders, which the runtime's Decoder and the PyTorch reference follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from .config import LRTConfig

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

PrefillPolicy = Literal["auto", "stepwise", "fixed-point", "zero"]
PREFILL_POLICIES: tuple[PrefillPolicy, ...] = ("auto", "stepwise", "fixed-point", "zero")


@dataclass(frozen=True)
class PrefillReport:
    """The way in which a prompt was read.

    `policy` is the one that ran (never `auto`); `passes` is token positions computed / prompt tokens, the zero-memory
    pass included; `residual` is the measured estimate of the latent's error, with margins (max abs; how often it was
    too low: docs/numerics.md), None where nothing was iterated.
    `stepwise_below` is the prompt length from which `auto` iterates, where `auto` was asked for. `reused_tokens` of the
    prompts were found in a state or a cache and not computed.
    """

    policy: str
    passes: float
    residual: float | None = None
    note: str | None = None
    stepwise_below: int | None = None
    reused_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON fields that scripts rely on."""
        return dataclasses.asdict(self)


class State(Protocol):
    """The state of B sequences between two steps."""

    @property
    def logits(self) -> FloatArray:
        """(B, V) for each row's next token."""

    @property
    def latent(self) -> FloatArray | None:
        """(B, C) carried to the next token; None for a model without memory."""

    @property
    def lengths(self) -> IntArray:
        """(B) tokens so far."""

    def cache(self, layer: int) -> tuple[FloatArray, FloatArray]:
        """Live keys and values of a layer, (B, G, max length, D) each; shorter rows end in undefined numbers."""


class StatefulDecoder(Protocol):
    """Reads prompts and advances states."""

    @property
    def config(self) -> LRTConfig:
        """The model that is run."""

    def prefill(
        self, prompts: Sequence[Sequence[int]], *, policy: PrefillPolicy = "auto", tolerance: float | None = None
    ) -> Any:  # noqa: ANN401
        """Start B sequences; returns a State."""

    def step(self, state: Any, tokens: Sequence[int] | IntArray) -> FloatArray:  # noqa: ANN401
        """Append one token to each row, in place; returns logits (B, V)."""
