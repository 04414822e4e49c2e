"""What is measured: for each JSON file the commands that are run, and which of their figures are kept.

Commands are the measuring scripts and `lrt-deploy bench`, each in a process of its own. They run in the root of the
clone on two bundles that are made first, in build/measurements. Full mode has more rounds. Figures are kept as they
come; tables and pictures are made of them elsewhere.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import record
from .record import ROOT, Start

PRECISIONS = ("fp32", "fp16", "int8", "int8-weight-only", "int4-weight-only")
WORK = Path("build/measurements")
DEMO, WIDE = WORK / "demo", WORK / "768-12" / "bundle"
THREADS = 2
GOLDEN = "tests/data/demo_golden.npz"


@dataclass
class Commands:
    """Runs commands and remembers them as they are typed in a clone."""

    full: bool
    typed: list[str] = field(default_factory=list)

    def run(self, *words: object, one_thread: bool = False, show: bool = True) -> str:
        """Run `.venv/bin/WORDS`, or a script with this interpreter; return what it prints."""
        line = [str(word) for word in words]
        environment = dict(os.environ)
        if one_thread:  # two threads of PyTorch gain nothing in small models, and wait for each other on a busy machine
            environment["OMP_NUM_THREADS"] = "1"
        if show:
            prefix = "OMP_NUM_THREADS=1 " if one_thread else ""
            python = ".venv/bin/python " if line[0].endswith(".py") else ".venv/bin/"
            self.typed.append(prefix + python + shlex.join(line))
        first = [sys.executable] if line[0].endswith(".py") else [str(Path(sys.executable).parent / line.pop(0))]
        done = subprocess.run([*first, *line], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
        return done.stdout.decode()

    def json(self, *words: object, one_thread: bool = False) -> Any:  # noqa: ANN401 - JSON
        """Run a script that writes `--out FILE.json`; return the document."""
        path = ROOT / WORK / "out.json"
        path.unlink(missing_ok=True)
        self.run(*words, "--out", path.relative_to(ROOT), one_thread=one_thread)
        self.typed[-1] = self.typed[-1].replace(f" --out {path.relative_to(ROOT)}", "")
        return json.loads(path.read_text(encoding="utf-8"))


def bundles(commands: Commands) -> None:
    """Export the demo, and a random model of 12 layers and width 768, where they are not there yet."""
    if not (ROOT / DEMO).is_dir():
        precisions = [word for precision in PRECISIONS for word in ("--precision", precision)]
        commands.run("lrt-deploy", "export", "demo/checkpoint", DEMO, "--max-seq-len", 1024, *precisions)
    if not (ROOT / WIDE).is_dir():
        commands.run("benchmarks/random_models.py", WIDE.parent, "--precisions", ",".join(PRECISIONS))


def decode(commands: Commands) -> dict[str, Any]:
    """Decode with every precision in turns."""
    turns = 24 if commands.full else 6
    found = []
    for bundle, name in ((WIDE, "random 768/12"), (DEMO, "demo")):
        words = ("benchmarks/precision_decode.py", bundle, "--turns", turns)
        found.append({"model": name} | commands.json(*words, one_thread=True))
    return {"models": found}


def prefill(commands: Commands) -> dict[str, Any]:
    """Read prompts in every way, on the demo's text and on the wide model, with the error after each sweep."""
    size = ("--tokens", "512,2048", "--rounds", "9,3") if commands.full else ("--tokens", 512, "--rounds", 2)
    words = ("--folder", WIDE.parent, *size, "--threads", THREADS)
    wide = commands.json("benchmarks/prefill_speed.py", *words)["results"]
    words = ("lrt-deploy", "bench", DEMO, "--precision", "fp32", "--threads", THREADS, "--text", "README.md")
    first, *_ = [result.pop("convergence") for result in wide]  # all are of the same first chunk
    curves = [{"model": "random 768/12"} | point for point in first]
    for length in (64, 512):
        text = commands.run(*words, "--new-tokens", 2, "--prefill-lengths", length, "--json")
        found = json.loads(text)
        curves += [{"model": "demo"} | point for point in found["convergence"]]
        wide.append({"model": "demo", "tokens": length, "rounds": found["repeats"], "rows": found["prefill"]})
    return {"lengths": [{"model": "random 768/12"} | result for result in wide], "convergence": curves}


def quality(commands: Commands) -> dict[str, Any]:
    """Roll out every precision of the demo against PyTorch, and count bits per byte."""
    words = ("demo/checkpoint", "--recording", GOLDEN, "--bundle", DEMO, "--steps", 256)
    return dict(commands.json("benchmarks/precision_rollouts.py", *words, one_thread=True))


def batches(commands: Commands) -> dict[str, Any]:
    """Operations on states, and many requests at once; `states` takes its part from the same run."""
    words = ("--bundle", DEMO, "--text", "README.md", "--threads", THREADS)
    return dict(commands.json("benchmarks/state_costs.py", *words))


def serving(commands: Commands) -> dict[str, Any]:
    """Serve the demo beside the batch that the server runs."""
    rounds, requests = (5, 64) if commands.full else (3, 32)
    words = (DEMO, "--rounds", rounds, "--requests", requests, "--tokens", 64)
    return {"rounds": commands.json("benchmarks/serving_load.py", *words)}


def opening(commands: Commands) -> dict[str, Any]:
    """Open the wide model in three precisions, each in a fresh process; memory after each part."""
    words = ("benchmarks/opening.py", WIDE, "--threads", THREADS, "--precision")
    return {"precisions": [commands.json(*words, name) for name in ("fp32", "int8-weight-only", "int4-weight-only")]}


RUNS: dict[str, Callable[[Commands], dict[str, Any]]] = {
    "decode": decode,
    "prefill": prefill,
    "quality": quality,
    "batches": batches,
    "serving": serving,
    "opening": opening,
}


def run(names: list[str], full: bool) -> None:
    """Measure and write the JSON files of these names."""
    (ROOT / WORK).mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    bundles(Commands(full))
    say(f"bundles: {time.perf_counter() - began:.0f} s")
    for name in names:
        begin, start, commands = time.perf_counter(), Start.now(), Commands(full)
        results = RUNS[name](commands)
        record.write(name, "full" if full else "quick", start, commands.typed, results)
        say(f"{name}: {time.perf_counter() - begin:.0f} s")
    say(f"in all {time.perf_counter() - began:.0f} s")


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)
