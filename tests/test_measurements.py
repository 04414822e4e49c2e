"""docs/measurements.md and its pictures are what the committed JSON says, and the pictures can be read.

Nothing is measured here: `make bench` does that.
"""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path

import pytest
from measurements import plots, record, runs, style, tables

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def documents():
    return record.read()


def test_the_page_is_what_the_json_says(documents):
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.render(text, documents) == text
    assert sorted(name for _, name, _ in tables.MARKED.findall(text)) == sorted(tables.TABLES)


@pytest.mark.parametrize("name", tables.TABLES)
def test_another_measurement_gives_another_page(name, documents):
    text = tables.PAGE.read_text(encoding="utf-8")
    changed = copy.deepcopy(documents)
    results = changed[tables.SOURCES.get(name, name)]["results"]
    multiply(results, 3)
    assert tables.TABLES[name](results) not in text
    assert tables.TABLES[name](documents[tables.SOURCES.get(name, name)]["results"]) in text


def multiply(value, by):
    """Multiply every number of a document in place."""
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, item in pairs:
        if isinstance(item, dict | list):
            multiply(item, by)
        elif isinstance(item, int | float) and not isinstance(item, bool):
            value[key] = item * by


def test_every_document_says_when_on_what_and_how_it_was_measured(documents):
    assert sorted(documents) == sorted(runs.RUNS)
    for document in documents.values():
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", document["date"])
        assert document["processor"] and document["cores"] >= 1 and document["versions"]["onnxruntime"]
        assert set(document["load_average"]) == {"start", "end"} and re.match(r"[0-9a-f]{8}", document["revision"])
        assert document["commands"]
        for line in document["commands"]:
            words = [word for word in shlex.split(line) if "=" not in word]
            assert words[0].startswith(".venv/bin/")
            assert not words[1].endswith(".py") or (ROOT / words[1]).is_file()
            assert not any(word.startswith("/") for word in words)


@pytest.mark.parametrize("name", plots.PICTURES)
def test_pictures_are_drawn_from_the_json(name, documents):
    for suffix in ("", "-dark"):
        text = (record.FOLDER / f"{name}{suffix}.svg").read_text(encoding="utf-8")
        assert f"sha256:{plots.digest(name, documents)}" in text
    changed = copy.deepcopy(documents)
    multiply(changed[plots.PICTURES[name][0][0]]["results"], 3)
    assert plots.digest(name, changed) != plots.digest(name, documents)


@pytest.mark.parametrize("theme", [style.LIGHT, style.DARK], ids=lambda theme: theme.name)
@pytest.mark.parametrize("name", plots.PICTURES)
def test_no_text_of_a_picture_collides_with_another_or_leaves_it(name, theme, documents):
    figure, svg = plots.draw(name, theme, documents)
    assert style.collisions(figure) == []
    assert svg.startswith("<?xml")


def test_the_check_for_collisions_can_fail():
    with style.drawn(style.LIGHT) as (figure, axes):
        axes.annotate("one", (0.5, 0.5))
        axes.annotate("other", (0.51, 0.5))
        axes.annotate(long := "wider than the whole picture" * 8, (0.1, 0.1))
    assert {("one", "other"), (long, "edge")} <= set(style.collisions(figure))


def test_bars_begin_at_zero(documents):
    figure, _ = plots.draw("roofline", style.LIGHT, documents)
    (axes,) = figure.axes
    assert axes.get_xlim()[0] == 0
    assert len(axes.patches) >= 6
    assert all(bar.get_x() == 0 for bar in axes.patches)


def test_every_measured_picture_is_shown_with_a_text():
    shown = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    for name in plots.PICTURES:
        assert re.search(rf"!\[[^\]]{{20,}}\]\(measurements/{name}\.svg\)", shown), name
