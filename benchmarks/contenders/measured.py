"""What was seen of a contender, and how it compares with another one.

Processes of one set run at the same time and in turns, so they are compared with each other; sets differ, because a
machine's memory does. The error of a ratio is how far the ratios of the sets scatter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """A geometric mean over sets, and its standard error as a factor: mean / error to mean * error."""

    mean: float
    error: float | None  # None of one set

    @classmethod
    def of(cls, ratios: list[float]) -> Ratio:
        """From the ratio of each set."""
        logs = np.log(ratios)
        error = float(np.exp(logs.std(ddof=1) / np.sqrt(len(logs)))) if len(logs) > 1 else None
        return cls(float(np.exp(logs.mean())), error)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.mean * (self.error - 1):.2f}" if self.error is not None else "")


@dataclass
class Measured:
    """Steps of one contender at one context and batch."""

    sets: list[list[float]] = dataclasses.field(default_factory=list)  # of each process: ms of every step
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the last process

    def summary(self, batch: int) -> dict[str, Any]:
        """Over all steps of all processes."""
        times = np.concatenate(self.sets)
        median = float(np.median(times))
        seen = {"min_ms": float(times.min()), "median_ms": median, "tokens_per_s": batch * 1e3 / median}
        return seen | {"steps": len(times)}

    def ratio(self, other: Measured, of: Callable[[list[float]], float]) -> Ratio:
        """Times of this one over the other's, set by set; `of` is what stands for a process: min, np.median."""
        return Ratio.of([float(of(mine) / of(its)) for mine, its in zip(self.sets, other.sets, strict=True)])
