"""Counters and histograms of a server, and their text in Prometheus' exposition format 0.0.4.

The engine's thread is the only one that writes `EngineMetrics`; a reader may see a step half counted.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from lrt_deploy.runtime.generation import Event

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_PASSES = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


class Histogram:
    """Numbers of observations up to each bound, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, as often as it was observed."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def lines(self, name: str, text: str) -> Iterable[str]:
        """Return the lines of the exposition format."""
        yield from _head(name, "histogram", text)
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.9g}"
        yield f"{name}_count {total}"


class EngineMetrics:
    """What the engine counts."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter(ok=0, error=0, cancelled=0, refused=0)
        self.prompt_tokens = self.reused_tokens = self.generated_tokens = self.backend_errors = 0
        self.steps = 0  # that gave tokens
        self.first_token_s, self.token_s = Histogram(_FIRST_TOKEN_SECONDS), Histogram(_TOKEN_SECONDS)
        self.passes = Histogram(_PASSES)
        self._last_step = 0.0

    def step(self, now: float, tokens: int) -> None:
        """Count the tokens of one step; each has taken the time since the step before."""
        if tokens and self._last_step:
            self.token_s.observe(now - self._last_step, tokens)
        self.generated_tokens += tokens
        self.steps += tokens > 0
        self._last_step = now

    def idle(self) -> None:
        """Note that no step was run: the time until the next one is no token's."""
        self._last_step = 0.0

    def first_token(self, seconds: float) -> None:
        """Count a request's time to its first token."""
        self.first_token_s.observe(seconds)

    def prompt(self, tokens: int, event: Event) -> None:
        """Count a prompt that was read, by the first event after it."""
        self.prompt_tokens += tokens
        self.reused_tokens += event.prefill.reused_tokens
        self.passes.observe(event.prefill.passes)

    def ended(self, outcome: str) -> None:
        """Count a request that has ended."""
        self.requests[outcome] += 1

    def lines(self) -> Iterable[str]:
        """Return the lines of the exposition format."""
        yield from _head("lrt_requests_total", "counter", "Requests by outcome.")
        for outcome, count in self.requests.items():
            yield f'lrt_requests_total{{outcome="{outcome}"}} {count}'
        yield from counter("lrt_prompt_tokens_total", "Tokens of prompts, reused ones included.", self.prompt_tokens)
        yield from counter("lrt_reused_tokens_total", "Tokens of prompts found in a kept state.", self.reused_tokens)
        yield from counter("lrt_generated_tokens_total", "Tokens that were generated.", self.generated_tokens)
        yield from counter("lrt_steps_total", "Decode steps that gave tokens.", self.steps)
        yield from counter("lrt_backend_errors_total", "Decode steps that failed.", self.backend_errors)
        yield from self.first_token_s.lines("lrt_time_to_first_token_seconds", "From submitting to the first token.")
        yield from self.token_s.lines("lrt_time_per_token_seconds", "Time between two steps, for each token of a step.")
        yield from self.passes.lines("lrt_prefill_passes", "Token positions computed by tokens of the prompt.")


def counter(name: str, text: str, value: float) -> Iterable[str]:
    """Return the lines of a counter."""
    yield from _head(name, "counter", text)
    yield f"{name} {value}"


def gauges(values: Mapping[str, tuple[str, float]]) -> Iterable[str]:
    """Return the lines of gauges: name -> description, value."""
    for name, (text, value) in values.items():
        yield from _head(name, "gauge", text)
        yield f"{name} {value}"


def process_gauges() -> dict[str, tuple[str, float]]:
    """Return resident memory and open file descriptors, where the system tells them in /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only their number
    except OSError:
        return {}
    return {
        "process_resident_memory_bytes": ("Resident memory.", pages * os.sysconf("SC_PAGE_SIZE")),
        "process_open_fds": ("Open file descriptors.", files),
    }


def _head(name: str, kind: str, text: str) -> Iterable[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
