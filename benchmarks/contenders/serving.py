"""One contender in one process: takes commands from stdin, answers on stdout, one JSON document a line.

Needs nothing but numpy, because it also runs in environments without the project. A command is a method of `Served`,
such as `{"do": "decode", "steps": 4}`; the first line out says what runs.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

WARM_UP_STEPS = 3  # after a prompt
COLD_STEPS = 1  # of each turn: the turns of others have left nothing of this one in the processor's caches


class Contender(Protocol):
    """Something that decodes greedily."""

    facts: dict[str, Any]  # what runs, for people: versions, threads, what a step allocates

    def start(self, rows: list[list[int]], exact: bool) -> None:
        """Begin anew with these rows of one length; `exact` asks for true recurrence, else one fast pass will do."""

    def step(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Append one token to each row; logits (B, V) of the next."""

    def greedy(self, tokens: list[int]) -> list[int]:
        """Append one token to each row; the most likely next ones."""


class Greedy:
    """`greedy` for those whose loop is the caller's."""

    def greedy(self: Contender, tokens: list[int]) -> list[int]:
        """See `Contender`."""
        chosen: list[int] = self.step(tokens).argmax(axis=-1).tolist()
        return chosen


class Served:
    """A contender and the tokens with which it goes on."""

    def __init__(self, contender: Contender) -> None:
        self.contender, self.tokens = contender, [0]

    def start(self, rows: list[list[int]]) -> dict[str, Any]:
        """Begin anew after `rows`, read in one fast pass."""
        self.contender.start(rows, exact=False)
        self.tokens = [row[-1] for row in rows]
        self._steps(WARM_UP_STEPS)
        return {}

    def decode(self, steps: int) -> dict[str, Any]:
        """A turn: milliseconds of each of `steps` steps, choosing the largest logit included."""
        gc.collect()
        gc.disable()
        times = self._steps(COLD_STEPS + steps)
        gc.enable()
        return {"ms": times[COLD_STEPS:]}

    def logits(self, rows: list[list[int]], tokens: list[list[int]]) -> dict[str, Any]:
        """Logits after each of `tokens` (steps, B), true recurrence from the first one of `rows` on."""
        self.contender.start(rows, exact=True)
        return {"logits": [self.contender.step(step).astype(np.float64).tolist() for step in tokens]}

    def facts(self) -> dict[str, Any]:
        """What runs."""
        return self.contender.facts

    def memory(self) -> dict[str, Any]:
        """What the process holds."""
        return memory()

    def _steps(self, count: int) -> list[float]:
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            self.tokens = self.contender.greedy(self.tokens)
            times.append((time.perf_counter() - begin) * 1e3)
        return times


def serve(contender: Contender) -> None:
    """Answer until stdin ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps(contender.facts), file=answers)
    served = Served(contender)
    commands = {act.__name__: act for act in (served.start, served.decode, served.logits, served.facts, served.memory)}
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(commands[command.pop("do")](**command)), file=answers)


def memory() -> dict[str, int]:
    """Resident bytes of this process now: of its own, and of files that it has mapped."""
    with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123 - one of the few lines that need no import
        lines = dict(line.split(":", 1) for line in file)
    names = {"own_bytes": "RssAnon", "mapped_bytes": "RssFile", "peak_bytes": "VmHWM"}
    return {name: int(lines[field].split()[0]) * 1024 for name, field in names.items()}
