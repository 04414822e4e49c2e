"""One contender in one process: takes commands from stdin, answers on stdout, one JSON document a line.

Needs nothing but numpy, because it also runs in environments without the project. A command is `{"do": "decode", ...}`
or `{"do": "logits", ...}`; the first line out says what runs.
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

WARM_UP_STEPS = 3


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


def decode(contender: Contender, rows: list[list[int]], steps: int) -> dict[str, Any]:
    """Milliseconds of each of `steps` steps after `rows`, choosing the largest logit included."""
    contender.start(rows, exact=False)
    tokens, times = [row[-1] for row in rows], []
    gc.collect()
    gc.disable()
    for _ in range(WARM_UP_STEPS + steps):
        begin = time.perf_counter()
        tokens = contender.greedy(tokens)
        times.append((time.perf_counter() - begin) * 1e3)
    gc.enable()
    return {"ms": times[WARM_UP_STEPS:], "tokens": tokens}


def logits(contender: Contender, rows: list[list[int]], tokens: list[list[int]]) -> dict[str, Any]:
    """Logits after each of `tokens` (steps, B), true recurrence from the first one of `rows` on."""
    contender.start(rows, exact=True)
    return {"logits": [contender.step(step).astype(np.float64).tolist() for step in tokens]}


def serve(contender: Contender) -> None:
    """Answer until stdin ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps(contender.facts), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        others = {"memory": lambda _: memory(), "facts": lambda found: found.facts}
        act = ({"decode": decode, "logits": logits} | others)[command.pop("do")]
        print(json.dumps(act(contender, **command)), file=answers)


def memory() -> dict[str, int]:
    """Resident bytes of this process now: of its own, and of files that it has mapped."""
    with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123 - one of the few lines that need no import
        lines = dict(line.split(":", 1) for line in file)
    names = {"own_bytes": "RssAnon", "mapped_bytes": "RssFile", "peak_bytes": "VmHWM"}
    return {name: int(lines[field].split()[0]) * 1024 for name, field in names.items()}
