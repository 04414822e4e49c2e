"""The page of a parity report: whole, offline, safe with any text, and honest about what is missing.

How it looks was judged in a browser; here is what can be held without one.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from html.parser import HTMLParser
from importlib import util
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from lrt_deploy.cli.app import app
from lrt_deploy.cli.parity import comparable
from lrt_deploy.evaluation.bisect import ActivationError, Bisection
from lrt_deploy.evaluation.rollout import Comparison, Point
from lrt_deploy.evaluation.verdict import Evidence, as_json, report_of
from lrt_deploy.figures import cache_errors, charts, curve, number, page
from lrt_deploy.tolerances import FP32, limits

VOID = {"meta", "img", "br"}
SVG = "data:image/svg+xml;base64,"


class Outline(HTMLParser):
    """Tags must close in order; texts and attributes are kept."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.links, self.tags = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href")]
        self.texts += [value for name, value in attrs if name == "alt"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def points(count=12, layers=2, differs_at=None, error=1e-6):
    return [
        Point(t, error, error / 2, 1e-12, 1.0, 3, 4 if t == differs_at else 3, (error,) * layers, (math.inf,) * layers)
        for t in range(count)
    ]


def fields(precision="fp32", verdict=None, **options):
    seen = points(**options)
    run = Comparison(4, len(seen) - 4, seen, free=seen, tokens=list(range(len(seen))))
    report = report_of(run, Evidence(precision, "ort-cpu", True, FP32))
    if verdict:
        report = dataclasses.replace(report, verdict=verdict)
    return json.loads(json.dumps(report.to_dict(), allow_nan=False))


def text(html):
    return " ".join(" ".join(Outline(html).texts).split())


def test_a_page_is_well_formed_and_needs_nothing_from_elsewhere():
    html = page("Parity of a bundle", fields())
    assert html == page("Parity of a bundle", fields())
    outline = Outline(html)
    assert all(link.startswith(SVG) for link in outline.links)
    assert not {"script", "link", "iframe", "svg"} & set(outline.tags)
    assert outline.tags.count("img") == 3
    assert "url(" not in html and "@import" not in html
    for link in outline.links:
        picture = ElementTree.fromstring(base64.b64decode(link.removeprefix(SVG)))  # noqa: S314 - our own
        used = [value for part in picture.iter() for name, value in part.attrib.items() if name.endswith("href")]
        assert used and all(value.startswith(("#", "data:image/png;base64,")) for value in used)


def test_the_verdict_stands_first_with_its_numbers():
    shown = text(page("A title", fields()))
    assert shown.startswith("A title A title PASS 8 of 8 greedy tokens equal")
    assert "4 prompt tokens, 8 greedy steps" in shown
    assert "100.00% of positions" in shown
    assert "1.0e-06, inf" not in shown  # JSON has no inf: it says none
    assert "FAIL" in text(page("A title", fields(error=1e-2)))


def test_a_divergence_is_drawn_and_named():
    shown = text(page("A title", fields(differs_at=6)))
    assert "step 3, margin 1: not a tie" in shown
    assert "latent, free-running" in shown
    assert "free-running" not in text(page("A title", fields())).split("Drift")[1].split("Cache")[0]


def test_any_text_is_shown_as_text():
    html = page("<script>alert(1)</script>", fields(verdict='FAIL: <img src="http://x/">'))
    outline = Outline(html)
    assert "<script>alert(1)</script>" in " ".join(outline.texts)
    assert "script" not in outline.tags
    assert outline.tags.count("img") == 3 and all(link.startswith(SVG) for link in outline.links)


def test_precisions_stand_side_by_side_and_a_lone_one_does_not():
    one, other = fields(), fields("fp16", error=1e-3, differs_at=5)
    shown = text(page("A title", other, [one, other]))
    assert "Precisions side by side" in shown
    assert "fp16 (ort-cpu) FAIL" in shown and "fp32 (ort-cpu) PASS" in shown and "step 2" in shown
    assert "side by side" not in text(page("A title", one, [one]))


def test_the_stages_around_the_fault_are_shown():
    stages = tuple(ActivationError(f"blocks.{i}.mlp", 1e-7 if i < 30 else 0.5, 2.0) for i in range(60))
    found = Bisection("stage", "begins at position 4", 4, 30, "blocks.30.mlp", "MatMul", None, stages)
    shown = text(page("A title", fields() | {"bisect": as_json(found)}))
    assert "begins at position 4" in shown
    assert "blocks.30.mlp 0.5 2" in shown and "blocks.18.mlp" in shown
    assert "blocks.17.mlp" not in shown and "blocks.36.mlp" not in shown


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of ticks beyond what matplotlib can place
@pytest.mark.parametrize(
    "values", [[None], [None, None], [0.0, 0.0], [1.0], [1e-300, 1e300], [None, 1e-3, None, 1e-5, 2e-5, None]]
)
def test_curves_take_any_values_and_leave_gaps(values):
    axes = Figure().subplots()
    curve(axes, values, "x", "#000000", begins=3)
    drawn = [line.get_xydata() for line in axes.lines]
    assert len(drawn) == any(value is not None for value in values)
    for data in drawn:
        assert data[:, 0].tolist() == list(range(3, 3 + len(values)))
        assert np.isnan(data[:, 1]).tolist() == [value is None for value in values]
    report = fields(count=len(values) + 4)
    for column in ("logit_error", "latent_error", "kl", "margin"):
        report["positions"][column] = [*values, None, None, None, None]
    assert [chart.title for chart in charts(report)] == ["Drift", "KL by position", "Cache, layer by layer"]


def test_the_picture_of_the_cache_has_a_value_for_each_entry_and_gaps_for_what_is_missing():
    found = cache_errors({"key_errors": [[1e-6, 0.5], [1e-2, 0.0]], "value_errors": [[None, 0.5], [1e-6, 0.25]]})
    assert found.shape == (4, 2)  # K 0, V 0, K 1, V 1
    assert found[0].tolist() == [1e-6, 1e-2]
    assert np.isnan(found[1, 0]) and found[1, 1] == 1e-6
    assert found[3].tolist() == [0.5, 0.25]


def test_many_positions_share_a_column_that_shows_the_worst():
    errors = [[1e-6]] * 5000
    errors[2345] = [1e-1]
    keys, values = cache_errors({"key_errors": errors, "value_errors": [[1e-6]] * 5000})
    assert len(keys) < 500
    assert sorted(set(keys)) == [1e-6, 1e-1] and set(values) == {1e-6}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "none"), (0.0, "0"), (0.5, "0.5"), (123.456, "123"), (1.23e-7, "1.2e-07"), (1e6, "1.0e+06")],
)
def test_numbers_in_few_digits(value, shown):
    assert number(value) == shown


def test_only_runs_over_the_same_prompt_stand_together(tmp_path):
    ours = fields()
    others = {
        "same": fields("fp16"),
        "longer": ours | {"steps": 99},
        "another": ours | {"tokens": [9, 9, 9, 9]},
        "stranger": {"x": 1},
    }
    for name, other in (others | {"ours": ours}).items():
        (tmp_path / f"parity-{name}.json").write_text(json.dumps(other))
    (tmp_path / "parity-broken.json").write_text("{")
    assert [found["precision"] for found in comparable(tmp_path, ours)] == ["fp32", "fp16"]


def test_a_page_shows_the_parts_and_where_they_come_from():
    shown = fields("int8", error=1e-3)
    shown["weights"] = {"passed": False, "line": "weights: wte is not the checkpoint's"}
    shown["quality"] = {"passed": True, "line": "mean KL 1e-3"}
    shown["provenance"] = {
        "date": "2030-01-01",
        "versions": {"torch": "2"},
        "prompt": {"text": "<b>", "tokens": [1, 2]},
    }
    found = text(page("A title", shown))
    assert "weights: FAIL wte is not the checkpoint's" in found and "quality: PASS mean KL 1e-3" in found
    assert "torch 2" in found and "text <b>; tokens 1 2" in found


def test_a_page_of_stored_weights_alone_has_no_curves():
    nothing = report_of(Comparison(0, 0), Evidence("bf16", "none", True, limits("bf16"))).to_dict()
    outline = Outline(page("A title", json.loads(json.dumps(nothing, allow_nan=False))))
    assert "img" not in outline.tags and "Drift" not in outline.texts


def test_without_the_extra_a_report_is_refused_before_any_work(monkeypatch, tmp_path):
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "jinja2" else find(name, *rest))
    (tmp_path / "checkpoint").mkdir()
    arguments = ["parity", str(tmp_path / "none"), "--checkpoint", str(tmp_path / "checkpoint")]
    for option in (["--report"], ["--report-dir", str(tmp_path)]):
        result = CliRunner().invoke(app, [*arguments, *option])
        assert result.exit_code == 1
        assert "a report needs jinja2, which is not installed; install the extra 'report'" in result.stderr
        assert "or leave out --report" in result.stderr
