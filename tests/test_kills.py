"""Whatever writes files may be killed, or meet a full disk, at any byte: ten trials of `benchmarks/kills.py` each."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import time

import pytest

SCRIPT = "benchmarks/kills.py"
OPERATIONS = [
    "export",
    "export --force",
    "export --add",
    "package docker --force",
    "package kserve --force",
    "package ray --force",
    "package triton --force",
    "package",
    "package web --force",
    "build",
    "state save",
    "prompt cache",
]


@pytest.mark.slow
def test_after_a_kill_and_on_a_full_disk_the_old_or_the_new_is_there_and_leftovers_go(root, golden_of):
    command = [sys.executable, SCRIPT, golden_of("padded_vocab").folder, "--trials", "10"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert [name for name in report if name in OPERATIONS] == OPERATIONS and report["faults"] == 0
    done = [report[name] for name in OPERATIONS if not isinstance(report[name], str)]
    assert all(found["kills"]["killed"] == 10 for found in done)
    # How much room is left is drawn: ten tries of one operation may all succeed, but not those of all operations.
    for what in ("file limit", "full disk"):
        tried = [found[what] for found in done if "skipped" not in found[what]]
        assert not tried or sum(found.get("raised", 0) for found in tried) > 0


def write_badly(folder):
    """Truncate the old file, then write in two halves."""
    with (folder / "target").open("w", buffering=1) as file:
        file.write("ne\n")
        time.sleep(0.2)
        file.write("w\n")


def check_text(folder):
    return {"old": "old", "ne\nw\n": "new"}[(folder / "target").read_text()]


@pytest.mark.parametrize("kind", ["kills", "failing"])
def test_what_writes_in_place_is_found_out(root, tmp_path, kind):
    """The twin of the above."""
    spec = importlib.util.spec_from_file_location("kills", root / SCRIPT)
    kills = importlib.util.module_from_spec(spec)
    sys.modules["kills"] = kills  # its dataclass looks there for its own module
    spec.loader.exec_module(kills)
    operation = kills.Operation("bad", lambda folder: (folder / "target").write_text("old"), write_badly, check_text, 3)
    chance = random.Random(1)  # noqa: S311
    if kind == "kills":
        report = kills.kills(operation, tmp_path, 6, chance)
    else:
        report = kills.failing(operation, tmp_path, 6, chance, kills.file_limit)
    assert report["faults"] and all("a half" in fault for fault in report["faults"])
    assert os.listdir(tmp_path) == ["target"]  # noqa: PTH208
