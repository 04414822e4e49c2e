"""The tables of docs/formats.md name the fields that the commands print with `--json`: all of them, and no others."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lrt_deploy.cli.app import app

ROOT = Path(__file__).parents[1]
NAME = "mr_gqa_SSSL"

pytestmark = pytest.mark.slow  # for the exports


@pytest.fixture(scope="module")
def tables():
    """Heading of docs/formats.md -> its tables in order, each a set of names; those from the code are filled in."""
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "tools" / "pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    text = re.sub(r"<!-- fields of ([\w.]+):(\w+) -->", lambda found: pages.field_table(found[1], found[2]), text)
    sections = re.split(r"^#+ `?([^`\n]+)`?$", text, flags=re.MULTILINE)[1:]
    return {head: named_in(body) for head, body in zip(sections[::2], sections[1::2], strict=True)}


def named_in(text):
    """The names in the first column of each table."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [
        set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in block.splitlines()))) for block in blocks
    ]


def listed(field):
    """The names that the last line of docs/formats.md on a field lists after it."""
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    *_, line = re.findall(rf"^\| `{field}` \|(.*)$", text, re.MULTILINE)
    return set(re.findall(r"`(\w+)`", line))


def answer(*words, exit_code=0):
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def test_the_check_can_fail():
    text = "| field | meaning |\n| --- | --- |\n| `a`, `b` | `c` |\n\n| `d` | |\n"
    assert named_in(text) == [{"a", "b"}, {"d"}]


def test_generate(tables, export_once):
    found = answer("generate", export_once(NAME), "--tokens", "1,2,3", "--max-new-tokens", "2")
    assert tables["generate"] == [set(found)]
    assert tables["prefill"] == [set(found["prefill"])]


def test_eval(tables, export_once, tmp_path):
    (tmp_path / "text").write_text("Return the value of the name. " * 8)
    found = answer("eval", export_once("demo"), tmp_path / "text")
    assert tables["eval"] == [set(found), set(found["buckets"][0])]


def test_bench(tables, export_once):
    sizes = ("--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1, "--prefill-lengths", 8)
    found = answer("bench", export_once(NAME), *sizes)
    assert tables["bench"] == [set(found)]
    for name in ("prefill", "convergence"):
        assert set(found[name][0]) == listed(name)


def test_inspect_and_export(tables, export_once, golden_of, tmp_path):
    checkpoint, graph = tables["inspect"]
    assert checkpoint == set(answer("inspect", golden_of(NAME).folder))
    assert graph == set(answer("inspect", export_once(NAME) / "graphs" / "fp32" / "prefill.onnx"))
    found = answer("inspect", export_once(NAME))
    fields, model = tables["manifest.json"]
    assert set(found) <= fields | {"format_version"}
    assert fields - set(found) <= {"tables", "draft"}  # of bundles that have them
    assert model == set(found["model"])
    made = answer("export", golden_of(NAME).folder, tmp_path / "bundle", "--max-seq-len", 16)
    (named,) = tables["export"]
    assert set(made) == named | set(found)


def test_parity(tables, in_every_precision, golden_of):
    bundle, checkpoint = in_every_precision(NAME), golden_of(NAME).folder
    report, point, weights, arithmetic, quality, prefill = tables["parity"]
    for precision in ("fp32", "int8-weight-only"):
        words = ("parity", bundle, "--checkpoint", checkpoint, "--precision", precision, "--steps", 4)
        found = json.loads(CliRunner().invoke(app, [*map(str, words), "--json"]).stdout)
        assert set(found) == (report - {"points", "bisect"}) | {"positions", "checks"}
        assert set(found["positions"]) == point
        assert set(found["weights"]) == weights
        assert set(found["arithmetic"] or arithmetic) == arithmetic
        assert set(found["quality"] or quality) == quality
        assert set(found["prefill"]) == prefill
    assert found["arithmetic"] and found["quality"]


def test_doctor(tables):
    found = answer("doctor")
    assert tables["doctor"] == [set(found)]
    assert set(found["backends"][0]) == listed("backends")
    assert set(found["environment"]) == listed("environment")


def test_an_error(export_once):
    found = answer("generate", export_once(NAME), "--tokens", "99999999", exit_code=1)
    assert list(found) == ["error"] and set(found["error"]) == {"type", "message"}
