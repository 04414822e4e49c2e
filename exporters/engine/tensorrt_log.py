"""What TensorRT says while it parses and builds: its messages collected, its progress handed on, its work cancelled.

TensorRT wants objects of its own base classes, and which library is loaded is known only at run time; so the monitor's
class is made when it is needed. Nothing is printed.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

Progress = Callable[[str, int, int], None]
T = TypeVar("T")

_KEPT = 40  # messages of a kind; a build repeats itself
_STOPPING_S = 2.0  # how long an interrupted build is waited for
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
    listener: Callable[[str, str], None] | None = None  # hears every message as it comes

    def take(self, severity: str, text: str) -> None:
        """Sort one message in."""
        text = " ".join(text.split())
        if self.listener is not None:
            self.listener(severity, text)
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


class Cancellation:
    """Whether a build is to stop, and the exception that its caller's progress function raised."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.error: BaseException | None = None

    def report(self, progress: Progress, what: str, done: int, total: int) -> None:
        """Call `progress`. What it raises stops the build: TensorRT would swallow it."""
        try:
            progress(what, done, total)
        except BaseException as error:
            self.error = self.error or error
            self.asked.set()


def progress_monitor(trt: Any, progress: Progress, cancellation: Cancellation) -> Any:  # noqa: ANN401 - chosen at run time
    """Make a TensorRT progress monitor that reports the innermost phase with steps, and stops a cancelled build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            if parent_phase is None:
                cancellation.report(progress, f"TensorRT: {phase_name.lower()}", 0, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            total = self.steps.get(phase_name, 0)
            if total > 1:
                cancellation.report(progress, f"TensorRT: {phase_name.lower()}", min(step + 1, total), total)
            return not cancellation.asked.is_set()

    return Monitor()


def run_interruptibly(work: Callable[[], T], cancellation: Cancellation) -> T:
    """Run `work` in a thread of its own, so that an interrupt reaches this one while TensorRT is busy.

    TensorRT calls back into Python, and an exception that a signal handler raises in such a call is lost. After an
    interrupt `cancellation.asked` is set; the thread is given a moment to stop and is left behind if it does not.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="tensorrt", daemon=True).start()
    try:
        done.wait()
    except BaseException:
        cancellation.asked.set()
        done.wait(_STOPPING_S)
        raise
    if cancellation.error is not None:
        raise cancellation.error
    if errors:
        raise errors[0]
    return results[0]
