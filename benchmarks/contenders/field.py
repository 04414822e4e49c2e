"""The field: which contenders there are for a size and precision, what each runs, and the processes they run in.

Each contender has a process of its own, so that its memory is its own and what cannot share an environment need not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import models, plain_route
from .models import Size

HERE = Path(__file__).parent
NAMES = ("ours", "no-memory", "pytorch", "pytorch-compiled", "plain-route", "genai")
_GENAI_PRECISIONS = {"fp32": "fp32", "int8-weight-only": "int8", "int4-weight-only": "int4"}


@dataclass(frozen=True)
class Setting:
    """One model and how it is run."""

    folder: Path  # of this size: what is made once lies here
    size: Size
    precision: str
    threads: int
    genai_python: str | None


def prepare(name: str, setting: Setting) -> Path | None:
    """Make what a contender runs; None where it does not exist in this precision."""
    folder, size, precision = setting.folder, setting.size, setting.precision
    if name in ("ours", "no-memory"):
        return models.bundle(folder, size, precision, memory=name == "ours")
    if name == "genai":
        return _genai(setting) if setting.genai_python and precision in _GENAI_PRECISIONS else None
    if precision != "fp32":
        return None
    source = models.checkpoint(folder, size)
    if name == "plain-route":
        return models.made_once(folder / "plain-route", lambda target: plain_route.export(source, target))
    return source


def _genai(setting: Setting) -> Path:
    size, precision = setting.size, _GENAI_PRECISIONS[setting.precision]
    shape = [size.width, size.layers, size.heads, size.vocab, equal_inner(size.width), size.sequence_len]

    def make(target: Path) -> dict[str, Any]:
        command = [str(setting.genai_python), str(HERE / "genai.py"), "build", str(target), precision]
        done = subprocess.run([*command, *map(str, shape)], check=True, stdout=subprocess.PIPE, text=True)
        return dict(json.loads(done.stdout))

    return models.made_once(setting.folder / f"genai-{precision}", make)


def equal_inner(width: int) -> int:
    """The inner width with which a Llama layer has as many weights as an LRT layer.

    LRT: q, k, v, output 4 C^2, MLP 8 C^2, memory projections 2 C^2. Llama: 4 C^2 and three matrices of C x inner.
    Rounded up to a multiple of 32, which is the block of its 4-bit weights.
    """
    return -(-10 * width // 3 // 32) * 32


class Running:
    """A contender's process, answering commands."""

    def __init__(self, name: str, path: Path, setting: Setting) -> None:
        self.name, self.precision = name, setting.precision
        if name == "genai":
            command = [str(setting.genai_python), str(HERE / "genai.py"), "serve", str(path)]
        else:
            command = [sys.executable, str(HERE / "worker.py"), name, str(path)]
        self.process = subprocess.Popen(
            [*command, str(setting.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts = self._answer()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        """Send a command, wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process by ending its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}; its messages stand above")
        return dict(json.loads(line))


def run_all(names: list[str], settings: list[Setting], use: Callable[[list[Running]], None], part: float = 0.0) -> None:
    """Call `use` with the contenders that exist here, each in its process; ends the processes.

    They start in order from the one that is this part of the way along: which memory a process gets depends on who was
    there before it, and with it its speed.
    """
    found = [(name, path, setting) for setting in settings for name in names if (path := prepare(name, setting))]
    first = int(part * len(found))
    found = found[first:] + found[:first]
    with ExitStack() as stack:
        use([stack.enter_context(closing(Running(name, path, setting))) for name, path, setting in found])
