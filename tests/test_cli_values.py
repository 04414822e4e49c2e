"""What the command line lists, completes, wraps and colours: values of options, tables, verdicts, generated text."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from typing import get_args

import pytest
import typer
from typer.testing import CliRunner

import lrt_deploy
from lrt_deploy import machine
from lrt_deploy.bundle.precisions import BACKENDS, INT4_BLOCKS, PLAN_BACKENDS, PRECISIONS, not_held
from lrt_deploy.bundle.tensorrt_libraries import LIBRARIES
from lrt_deploy.cli import bench, build, export, options, output, parity, summary
from lrt_deploy.cli.app import app, describe
from lrt_deploy.cli.output import WordWrapper, columns, table_lines
from lrt_deploy.cli.summary import product_words
from lrt_deploy.evaluation import checks
from lrt_deploy.runtime.bench import percentiles
from lrt_deploy.types import PREFILL_POLICIES

COMMAND = [sys.executable, "-m", "lrt_deploy"]
GROUP = typer.main.get_command(app)
# Verb, its arguments, option, and the values that the library knows.
VALUES = [
    ("export", ["a", "b"], "--precision", PRECISIONS),
    ("export", ["a", "b"], "--int4-block", [str(block) for block in INT4_BLOCKS]),
    ("build", ["a"], "--backend", ["auto", *PLAN_BACKENDS]),
    ("build", ["a"], "--precision", PRECISIONS),
    ("generate", ["a", "--prompt", "x"], "--backend", ["auto", *BACKENDS]),
    ("generate", ["a", "--prompt", "x"], "--precision", PRECISIONS),
    ("generate", ["a", "--prompt", "x"], "--prefill", PREFILL_POLICIES),
    ("parity", ["a"], "--check", [*checks.CHECKS, "all"]),
]


def run(*args):
    return CliRunner().invoke(app, list(args))


def test_the_lists_of_values_are_the_library_s():
    assert get_args(options.PolicyName) == PREFILL_POLICIES
    assert tuple(LIBRARIES) == PLAN_BACKENDS
    assert set(get_args(parity.CheckName)) == {*checks.CHECKS, "all"}


@pytest.mark.parametrize(("verb", "arguments", "option", "values"), VALUES)
def test_a_value_that_an_option_does_not_have_is_a_usage_error_that_lists_them(verb, arguments, option, values):
    result = run(verb, *arguments, option, "int4")
    assert (result.exit_code, result.stdout) == (2, "")
    assert option in result.stderr and all(f"'{value}'" in result.stderr for value in values)
    result = run(verb, *arguments, option, "int4", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "UsageError"


@pytest.mark.parametrize("verb", GROUP.commands)
def test_the_help_fits_80_columns_and_lists_values_whole(verb):
    text = run(verb, "--help").stdout
    assert all(len(line) <= 80 for line in text.splitlines())
    words = set(re.findall(r"[\w-]+", text))
    for _, _, option, values in (row for row in VALUES if row[0] == verb):
        assert {option, *values} <= words


@pytest.mark.parametrize("verb", GROUP.commands)
def test_the_help_shows_arguments_as_they_are_given_and_no_type_beside_flags(verb):
    text = run(verb, "--help").stdout
    assert "<bool>" not in text + run("--help").stdout and "{" not in text
    assert f"Usage: lrt-deploy {verb} [OPTIONS]" in " ".join(text.split()).replace("root ", "lrt-deploy ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lrt-deploy gen", {"generate"}),
        ("lrt-deploy generate x --backend ort", {"ort-cpu", "ort-cuda"}),
        ("lrt-deploy export x y --precision int8", {"int8", "int8-weight-only"}),
        ("lrt-deploy build x --back", {"--backend"}),
    ],
)
def test_the_shell_completes_verbs_options_and_values(words, expected):
    settings = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1), "_LRT_DEPLOY_COMPLETE": "complete_bash"}
    code = "import sys; sys.argv = ['lrt-deploy']; from lrt_deploy.__main__ import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True, timeout=60, check=False
    )
    assert set(result.stdout.split()) == expected, result.stderr


def test_the_help_imports_few_modules():
    code = (
        "import sys; sys.argv = ['lrt-deploy', '--help']\n"
        "from lrt_deploy.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: print(len(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.count("\n") > 10
    assert int(result.stderr) < 500


def test_the_package_runs_as_a_module():
    result = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0 and result.stdout.startswith("lrt-deploy ")


# missing extras


def test_a_missing_extra_names_all_that_is_missing_and_never_an_index(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    found = describe(ModuleNotFoundError("No", name="onnx"), "export")
    assert found.startswith("this command needs torch, onnx, which are not installed; install the extra 'export'")
    assert "pip install -e '.[export]'" in found and "pip install 'lrt-deploy" not in found
    monkeypatch.delitem(sys.modules, "torch")
    assert describe(ModuleNotFoundError("No", name="onnx.helper"), "parity").startswith(
        "this command needs onnx, which is not installed"
    )


def test_build_asks_for_the_extra_of_the_tensorrt_that_is_there(monkeypatch):
    monkeypatch.setattr(machine, "missing", lambda extra: ["onnx"])
    assert "'.[tensorrt-rtx]'" in describe(ModuleNotFoundError("No", name="onnx"), "build")
    assert "'.[export]'" in describe(ModuleNotFoundError("No", name="onnx"), "export")


def test_no_message_of_ours_installs_the_package_from_an_index():
    from pathlib import Path

    root = Path(__file__).parents[1]
    files = [p for folder in ("lrt_deploy", "runtime", "exporters", "docs") for p in (root / folder).rglob("*.*")]
    texts = {p: p.read_text() for p in (*files, root / "README.md") if p.suffix in (".py", ".md")}
    assert [path for path, text in texts.items() if re.search(r"pip install ['\"]?lrt[-_]deploy", text)] == []


def test_a_precision_that_does_not_exist_is_not_to_be_exported():
    assert not_held(("fp32",), "fp16").endswith(
        "not fp16; lrt-deploy export CHECKPOINT BUNDLE --add --precision fp16 adds it"
    )
    assert not_held(("fp32",), "fp23") == "there is no precision 'fp23'; this bundle holds fp32"


# text for people


@pytest.mark.parametrize("width", [10, 17, 80])
def test_streamed_text_is_wrapped_at_words_whatever_its_pieces(width):
    text = (
        "The river rose in the night, and by\n\nmorning  the lower meadows were under water; über 水水水水 " + "x" * 25
    )
    shown = set()
    for size in (1, 3, 7, 1000):
        wrapper = WordWrapper(width)
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        shown.add("".join(wrapper.push(piece) for piece in pieces) + wrapper.finish())
    (lines,) = [text.split("\n") for text in shown]
    assert all(columns(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    broken = [word for word in text.split() if columns(word) <= width and not any(word in line for line in lines)]
    assert broken == []


def test_rows_of_tables_fit_80_columns_and_keep_words_whole():
    lines = table_lines("state a step", "one two three " * 20, 16)
    assert all(len(line) <= 80 for line in lines) and len(lines) > 3
    assert lines[0].startswith("state a step      one") and lines[1].startswith(" " * 18 + "t")
    assert table_lines("path", "/" + "x" * 100, 4)[-1].endswith("x" * 100)
    assert table_lines("empty", "", 8) == ["empty   "]


def test_a_row_of_bench_fits_80_columns():
    rows = [
        {
            "tokens": 2048, "policy": policy, "stride": stride, "ran": policy, "seconds": 99.9999,
            "speedup": 99.99, "passes": 99.99, "max_abs_latent_error": 1e-3, "kl": 1e-9, "note": None,
            "auto": True,
        }
        for policy, stride in (("fixed-point", 16), ("fixed-point", None), ("zero", None))
    ]  # fmt: skip
    table = bench.prefill_rows({"prefill": rows, "prefill_lengths_left_out": [], "plot": None})
    width = max(map(len, table))
    assert all(len(table_lines(label, value, width)) == 1 for label, value in table.items())


def test_the_99th_percentile_needs_a_hundred_samples():
    assert percentiles([1.0] * 99)["p99"] is None
    assert percentiles([1.0] * 100)["p99"] == 1.0
    assert bench.percentile_text({"p50": 1.5, "p99": None}, 3) == "p50 1.5 ms, p99 - (3 samples are too few)"


def test_int8_products_are_told_in_words():
    assert product_words("int8, float32") == "W8A8: int8 weights times int8 activations, results in float32"
    assert product_words("int4 weights, float16") == "with int4 weights, computed in float16"
    assert product_words("float32") == "in float32"


class Terminal:
    """A stream that says that it is a terminal."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize(
    ("settings", "line", "shown"),
    [
        ({}, "PASS: 3 of 3", "\x1b[32mPASS\x1b[0m: 3 of 3\n"),
        ({}, "FAIL: max", "\x1b[31mFAIL\x1b[0m: max\n"),
        ({}, "exported x", "exported x\n"),
        ({"NO_COLOR": "1"}, "PASS: 3 of 3", "PASS: 3 of 3\n"),
        ({"TERM": "dumb"}, "PASS: 3 of 3", "PASS: 3 of 3\n"),
    ],
)
def test_verdicts_have_colours_on_terminals_only(monkeypatch, settings, line, shown):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    output.answer(line)
    assert terminal.text == shown


def test_verdicts_in_a_file_have_no_colours(capsys):
    output.answer("PASS: all")
    assert capsys.readouterr().out == "PASS: all\n"


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals of POSIX")
def test_progress_moves_on_a_terminal_while_nothing_is_reported():
    import pty

    code = (
        "import time; from lrt_deploy.cli import output\n"
        "with output.progress() as progress:\n    progress('tracing', 0, 0); time.sleep(1.5)"
    )
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stderr=slave, env=os.environ | {"TERM": "xterm"})
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert process.wait(timeout=60) == 0
    assert shown.count(b"tracing") > 3 and b"0:00:01" in shown


def test_progress_in_a_file_is_a_line_for_each_thing_and_its_share_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    progress = output.lines()
    for second in range(26):
        now[0] = float(second)
        progress("calibrating", second, 25)
    progress("calibrating", 25, 25)
    progress("hashing", 0, 0)
    expected = ["calibrating", "calibrating: 40%", "calibrating: 80%", "calibrating: 100%", "hashing"]
    assert capsys.readouterr().err.splitlines() == expected


def test_the_rows_of_a_bundle_say_which_backends_run_which_graphs(in_every_precision):
    from lrt_deploy.bundle.manifest import read_manifest

    rows = summary.precision_rows(read_manifest(in_every_precision("mr_gqa_SSSL")))
    assert rows["fp32"].startswith("matrix products: ")
    assert rows["int4-weight-only on GPUs"].endswith("computed in float16")
    assert rows["int4-weight-only on ort-cpu"].endswith("computed in float32")
    assert not any(name in row for row in rows for name in ("full", "windowed"))


def test_options_of_export_build_and_parity_are_arguments_of_the_functions_with_the_same_defaults():
    exported = export.ExportOptions().arguments() | {"precision": "fp32"}
    assert export.ExportOptions().arguments()["precision"] == ["fp32"]
    built, compared = asdict(build.BuildOptions()), asdict(parity.ComparisonOptions())
    functions = ((exported, lrt_deploy.export_bundle), (built, lrt_deploy.build_engine), (compared, lrt_deploy.parity))
    for chosen, function in functions:
        parameters = inspect.signature(function).parameters
        assert chosen == {name: parameters[name].default for name in chosen}
