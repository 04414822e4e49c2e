"""The page of a parity report: whole, offline, safe with any text, and honest about what is missing.

How it looks was judged in a browser; here is what can be held without one.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import zlib
from html.parser import HTMLParser

import pytest

from lrt_deploy.cli.parity import comparable
from lrt_deploy.evaluation.bisect import Bisection, StageError
from lrt_deploy.evaluation.html import number, page
from lrt_deploy.evaluation.report import Point, Rollout, as_json
from lrt_deploy.evaluation.svg_charts import Curve, curves, heat_map
from lrt_deploy.evaluation.verdict import About, report_of
from lrt_deploy.tolerances import FP32, limits

VOID = {"meta", "line", "path", "image", "br"}


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
    rollout = Rollout(4, len(seen) - 4, seen, free=seen, tokens=list(range(len(seen))))
    report = report_of(rollout, About(precision, "ort-cpu", True, FP32))
    if verdict:
        report = dataclasses.replace(report, verdict=verdict)
    return json.loads(json.dumps(report.to_dict(), allow_nan=False))


def text(html):
    return " ".join(" ".join(Outline(html).texts).split())


def test_a_page_is_well_formed_and_needs_nothing_from_elsewhere():
    outline = Outline(page("Parity of a bundle", fields()))
    assert all(link.startswith("data:image/png;base64,") for link in outline.links)
    assert not {"script", "link", "iframe", "img"} & set(outline.tags)
    assert outline.tags.count("svg") == 3
    assert "url(" not in page("x", fields()) and "@import" not in page("x", fields())


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
    assert not {"script", "img"} & set(outline.tags)


def test_precisions_stand_side_by_side_and_a_lone_one_does_not():
    one, other = fields(), fields("fp16", error=1e-3, differs_at=5)
    shown = text(page("A title", other, [one, other]))
    assert "Precisions side by side" in shown
    assert "fp16 (ort-cpu) FAIL" in shown and "fp32 (ort-cpu) PASS" in shown and "step 2" in shown
    assert "side by side" not in text(page("A title", one, [one]))


def test_the_stages_around_the_fault_are_shown():
    stages = tuple(StageError(f"blocks.{i}.mlp", 1e-7 if i < 30 else 0.5, 2.0) for i in range(60))
    found = Bisection("stage", "begins at position 4", 4, 30, "blocks.30.mlp", "MatMul", None, stages)
    shown = text(page("A title", fields() | {"bisect": as_json(found.to_dict())}))
    assert "begins at position 4" in shown
    assert "blocks.30.mlp 0.5 2" in shown and "blocks.18.mlp" in shown
    assert "blocks.17.mlp" not in shown and "blocks.36.mlp" not in shown


@pytest.mark.parametrize(
    "values", [[], [None], [None, None], [0.0, 0.0], [1.0], [1e-300, 1e300], [None, 1e-3, None, 1e-5, 2e-5, None]]
)
def test_curves_take_any_values_and_leave_gaps(values):
    chart = curves([Curve("x", values, "#000")], limit=1e-4, divider=1)
    assert "nan" not in chart and "inf" not in chart
    runs = "".join("-" if value is None else "x" for value in values).split("-")
    assert chart.count('class="curve"') == sum(bool(run) for run in runs)
    for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", chart):
        assert 0 <= float(x) <= 440 and 0 <= float(y) <= 250
    Outline(chart)


def test_higher_values_are_higher_up():
    (d,) = re.findall(r' d="M([^"]+)"', curves([Curve("x", [1e-6, 1e-4, 1e-2], "#000")]))
    heights = [float(point.split()[1]) for point in d.split("L")]
    assert heights[0] > heights[1] > heights[2]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def pixels(svg):
    """Rows of (r, g, b) of the picture inside a heat map."""
    data = base64.b64decode(re.search(r"base64,([^\"]+)", svg)[1])
    width = int.from_bytes(data[16:20], "big")
    start = data.index(b"IDAT") + 4
    raw = zlib.decompress(data[start : data.index(b"IEND") - 8])
    rows = [raw[i : i + 1 + 3 * width] for i in range(0, len(raw), 1 + 3 * width)]
    return [[tuple(row[1 + 3 * x : 4 + 3 * x]) for x in range(width)] for row in rows]


def test_a_heat_map_has_a_pixel_for_each_value_and_red_ones_for_what_is_missing():
    svg, meaning = heat_map([[1e-6, 1e-2], [None, 1e-6]], ["K 0", "V 0"])
    (low, high), (missing, again) = pixels(svg)
    assert low == again != high
    assert missing == (190, 30, 30)
    assert "K 0" in svg and "1e-06 or less" in meaning


def test_many_positions_share_a_pixel_that_shows_the_worst():
    row = [1e-6] * 5000
    row[2345] = 1e-1
    (colours,) = pixels(heat_map([row], ["K 0"])[0])
    assert len(colours) < 500
    assert len(set(colours)) == 2


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
    nothing = report_of(Rollout(0, 0), About("bf16", "none", True, limits("bf16"))).to_dict()
    outline = Outline(page("A title", json.loads(json.dumps(nothing, allow_nan=False))))
    assert "svg" not in outline.tags and "Drift" not in outline.texts
