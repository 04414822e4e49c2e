"""SIGINT and SIGTERM end every verb with their exit code and one line, and leave nothing behind.

Real processes get real signals at moments drawn from a seed: while Python imports, while torch traces, while TensorRT
builds in C++. Each process is given a fixed time to end, far beyond what it needs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "data" / "golden"
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated by SIGTERM"}
COMMAND = [sys.executable, "-m", "lrt_deploy"]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def started(*args, **options):
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*COMMAND, *map(str, args)], **(pipes | options))


def stopped(process, number, delay=0.0):
    """The exit code, stdout and last line of stderr of a process that gets a signal after a while."""
    time.sleep(delay)
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert "Traceback" not in err, err
    return process.returncode, out, err


def wait_for(process, words):
    """Read stderr up to a line that has these words."""
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"the process never said {words!r}")


@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_the_command_line_is_imported_ends_quietly(number):
    draw = random.Random(int(number))  # noqa: S311 - moments, not secrets
    ends = []
    for _ in range(8):
        # Before its first line runs, what a signal does is for the interpreter to say.
        code = "from lrt_deploy.__main__ import main; print(flush=True); main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        ends.append(stopped(process, number, 0.02 + draw.random() * 0.3))
    for rc, out, err in ends:
        # Once the answer stands there and Python is shutting down, signals do what the system does with them.
        answered = rc == 0 or (rc == -number and out.strip())
        assert answered or (rc, err.splitlines()[-1:]) == (CODES[number], [WORDS[number]]), (rc, err)
    assert CODES[number] in [rc for rc, _, _ in ends]


def test_a_signal_while_an_extension_module_is_loaded_is_raised_after_it():
    code = """
import os, signal
from lrt_deploy.cli import signals
class ExtensionFileLoader:
    def exec_module(self):
        os.kill(os.getpid(), signal.SIGINT)
        return "loaded"
signals.install()
print(ExtensionFileLoader().exec_module())
try:
    signals.check()
except KeyboardInterrupt:
    print("raised")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (result.stdout.split(), result.stderr) == (["loaded", "raised"], "")


@pytest.mark.parametrize("number", CODES)
def test_an_export_that_is_stopped_leaves_nothing(number, tmp_path):
    draw = random.Random(int(number))  # noqa: S311 - moments, not secrets
    for moment in (0.1, draw.random() * 3):
        process = started("export", GOLDEN / "mr_gqa_SSSL", tmp_path / "bundle")
        wait_for(process, "tracing")
        rc, out, err = stopped(process, number, moment)
        assert (rc, out) == (CODES[number], ""), err
        assert err.splitlines()[-1] == WORDS[number]
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", CODES)
def test_an_export_that_is_stopped_with_json_says_so_in_one_document(number, tmp_path):
    process = started("export", GOLDEN / "mr_gqa_SSSL", tmp_path / "bundle", "--json")
    rc, out, _ = stopped(process, number, 2.0)
    assert rc == CODES[number]
    assert json.loads(out)["error"]["message"] == WORDS[number]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", CODES)
def test_a_build_that_is_stopped_leaves_no_engine(number, export_once, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheels for this platform")
    bundle = tmp_path / "bundle"
    shutil.copytree(export_once("mr_gqa_SSSL"), bundle)
    before = sorted(bundle.rglob("*"))
    draw = random.Random(int(number))  # noqa: S311 - moments, not secrets
    for words, moment in (("parsing", 0.0), ("TensorRT", 0.0), ("TensorRT", draw.random() * 0.5)):
        process = started("build", bundle, "--backend", "tensorrt-rtx")
        wait_for(process, words)
        rc, out, err = stopped(process, number, moment)
        assert (rc, out) == (CODES[number], ""), err
        assert err.splitlines()[-1] == WORDS[number]
        assert [path for path in sorted(bundle.rglob("*")) if path not in before and path.name != "engines"] == []


def test_progress_that_raises_cancels_a_build(export_once, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheels for this platform")
    from lrt_deploy import build_engine

    bundle = tmp_path / "bundle"
    shutil.copytree(export_once("mr_gqa_SSSL"), bundle)

    class EnoughError(Exception):
        pass

    def progress(what, done, total):
        if what.startswith("TensorRT"):
            raise EnoughError

    with pytest.raises(EnoughError):
        build_engine(bundle, backend="tensorrt-rtx", progress=progress)
    assert not list(bundle.rglob("*.plan"))


def test_a_signal_that_the_parent_ignores_stays_ignored():
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from lrt_deploy.cli import signals; signals.install(); signal.raise_signal(signal.SIGINT); print('on')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "on\n", result.stderr


def test_importing_the_library_installs_no_handler():
    code = (
        "import signal; before = [signal.getsignal(n) for n in (2, 15)]\n"
        "import lrt_deploy.cli.app, lrt_deploy.exporters.bundle, lrt_deploy.runtime.decoder\n"
        "assert before == [signal.getsignal(n) for n in (2, 15)]"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def chat_bundle(tmp_path):
    """A bundle whose context holds an answer of some seconds."""
    from lrt_deploy import export_bundle

    export_bundle(Path(__file__).parents[1] / "demo" / "checkpoint", tmp_path / "chat", max_seq_len=2560)
    return tmp_path / "chat"


def test_an_interrupt_stops_the_answer_of_a_chat_and_keeps_the_conversation(chat_bundle):
    command = ["chat", chat_bundle, "--max-new-tokens", 2400, "--ignore-stop-tokens"]
    process = started(*command, stdin=subprocess.PIPE)
    wait_for(process, "/help lists")
    process.stdin.write("Where does the river go?\n")
    process.stdin.flush()
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    wait_for(process, "the answer was stopped")
    process.stdin.write("/stats\n")
    process.stdin.flush()
    wait_for(process, "; 1 turns")
    process.stdin.write("And then?\n/stats\n")
    process.stdin.flush()
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    wait_for(process, "; 2 turns")
    rc, _, err = stopped(process, signal.SIGINT, 0.2)  # at the prompt
    assert (rc, err.splitlines()[-1]) == (130, "interrupted")
