"""What TensorRT says while it parses and builds: its messages collected, its progress handed on.

TensorRT wants objects of its own base classes, and which library is loaded is known only at run time; so the monitor's
class is made when it is needed. Nothing is printed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Progress = Callable[[str, int, int], None]

_KEPT = 40  # messages of a kind; a build repeats itself
_SERIOUS = ("INTERNAL_ERROR", "ERROR")
# TensorRT says so of every int64 input; the contract says that they are int64.
_EXPECTED = re.compile(r"Make sure input \S+ has Int64 binding")
_MEMORY = re.compile(r"Total (Activation|Scratch|Weights|Host Persistent|Device Persistent) Memory: (\d+) bytes")


@dataclass
class BuildLog:
    """Messages by severity, each text once, and the memory figures in the order in which they came."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    memory: dict[str, list[int]] = field(default_factory=dict)

    def take(self, severity: str, text: str) -> None:
        """Sort one message in."""
        text = " ".join(text.split())
        if found := _MEMORY.search(text):
            name = f"{found[1].lower().replace(' ', '_')}_bytes"
            self.memory.setdefault(name, []).append(int(found[2]))
        if severity not in (*_SERIOUS, "WARNING") or _EXPECTED.search(text):
            return
        kept = self.errors if severity in _SERIOUS else self.warnings
        if text not in kept and len(kept) < _KEPT:
            kept.append(text)

    def last_words(self) -> str:
        """The errors in one line, for a message."""
        return "; ".join(self.errors[:4]) or "it gave no reason"


def progress_monitor(trt: Any, progress: Progress) -> Any:  # noqa: ANN401 - a class of a library chosen at run time
    """A TensorRT progress monitor that reports the innermost phase with steps."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            if parent_phase is None:
                progress(f"TensorRT: {phase_name.lower()}", 0, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            total = self.steps.get(phase_name, 0)
            if total > 1:
                progress(f"TensorRT: {phase_name.lower()}", min(step + 1, total), total)
            return True

    return Monitor()
