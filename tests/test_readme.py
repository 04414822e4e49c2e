"""What the documents tell people to type works: the README's commands and code are run, other documents' are checked.

Commands run in their order in a folder of their own, as a reader would, with the demo's checkpoint in it.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from lrt_deploy.cli.app import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
BIN = Path(sys.executable).parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"^```sh\n([^\n]+)\n```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MAKE_TARGET = re.compile(r"\bmake ([a-z]+)")
VERB = re.compile(r"\blrt-deploy ([a-z]+)((?: [^\n`]*)?)")


def blocks(document, language):
    return [body for kind, body in FENCE.findall(document.read_text()) if kind == language]


def commands(document):
    """The lines of all shell blocks, without comments."""
    lines = [line.partition("  #")[0].strip() for body in blocks(document, "sh") for line in body.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def run(line, folder):
    first, *arguments = shlex.split(line)
    result = subprocess.run(
        [BIN / Path(first).name, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A folder with what a checkout gives a reader."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("LICENSE", "README.md", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "demo").mkdir()
    for name in ("checkpoint", "prompt.txt"):
        (folder / "demo" / name).symlink_to(ROOT / "demo" / name)
    return folder


@pytest.mark.slow
def test_the_commands_of_the_readme_run(reader):
    # There are no wheels of TensorRT-RTX for Mac and Arm.
    left_out = ("make ",) if importlib.util.find_spec("tensorrt_rtx") else ("make ", "lrt-deploy build ")
    outputs = {line: run(line, reader) for line in commands(ROOT / "README.md") if not line.startswith(left_out)}
    assert len(outputs) >= 7
    verdict = next(text for line, text in outputs.items() if " parity " in line)
    assert verdict.startswith("PASS") and verdict.count("\n") == 1
    document = next(text for line, text in outputs.items() if line.endswith("--json"))
    assert json.loads(document)["prefill"]["policy"]
    shown = SHOWN.findall((ROOT / "README.md").read_text())
    assert len(shown) == 5
    for command, text in shown:
        if command in outputs:
            assert without_numbers(outputs[command]) == without_numbers(text)


def without_numbers(text):
    """What an output has on every machine: numbers vary, and with a GPU an engine is run."""
    return re.sub(r"\d[\d.e+-]*", "0", re.sub(r"; it (was not run here|passed the smoke test): .*", "", text.strip()))


@pytest.mark.slow
def test_the_code_of_the_readme_runs(reader):
    (code,) = blocks(ROOT / "README.md", "python")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=reader, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "(2, 2048) (2, 160) [3 2]" in result.stdout


@pytest.mark.slow
def test_the_demo_proves_parity_and_ends_with_text(reader):
    """The commands that `make demo` would run once the environment is there."""
    listed = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line for line in listed.splitlines() if line.startswith(".venv/bin/lrt-deploy")]
    assert [shlex.split(line)[1] for line in lines] == ["export", "parity", "generate"]
    _, verdict, text = [run(line, reader) for line in lines]
    assert verdict.startswith("PASS")
    assert len(text.split()) > 20


def test_the_targets_that_documents_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = {target for document in DOCUMENTS for target in MAKE_TARGET.findall(" ".join(quoted(document)))}
    assert {"demo", "test", "check", "install"} <= named
    assert [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_verbs_and_options_that_a_document_names_exist(document):
    group = typer.main.get_command(app)
    for text in quoted(document):
        for verb, rest in VERB.findall(text):
            assert verb in group.commands, text
            known = {name for option in group.commands[verb].params for name in option.opts}
            assert set(re.findall(r"(?<=\s)--[a-z-]+", rest)) <= known | {"--help"}, text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_files_that_a_document_links_to_exist(document):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if "://" not in link and not (document.parent / link).exists()] == []


def quoted(document):
    """Everything in a document that is meant to be typed: lines of code blocks and inline code."""
    text = document.read_text()
    inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    return [line for _, body in FENCE.findall(text) for line in body.splitlines()] + inline
