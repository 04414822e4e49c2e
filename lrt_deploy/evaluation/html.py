"""Render the JSON fields of a parity report as one HTML page without scripts, pictures as `data:` addresses.

The template is `report.html.jinja`. Needs jinja2 and matplotlib (the extra `report`), imported when rendering.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrt_deploy.figures import charts

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_SHOWN_BEFORE, _SHOWN_AFTER = 12, 6  # shown around the first wrong activation: all that follow it are wrong too


def page(title: str, report: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of `report`, the JSON fields of a parity run; `others` are runs to show beside it, itself included."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = number
    ran = bool(report["positions"]["position"])
    word, _, rest = str(report["verdict"]).partition(" ")
    bisect = dict.fromkeys(("line", "position", "tensor")) | (report.get("bisect") or {})
    return environment.get_template(_TEMPLATE.name).render(
        title=title,
        verdict_word=word.rstrip(":"),
        verdict_rest=rest,
        report=report,
        ran=ran,
        bisect=bisect,
        parts=_parts(report),
        charts=charts(report) if ran else [],
        runs=others if ran and len(others) > 1 else [],
        stages=_shown(bisect),
        provenance={name: _words(value) for name, value in (report.get("provenance") or {}).items()},
    )


def _parts(report: Mapping[str, Any]) -> dict[str, str]:
    """The line of each part of the verdict; none in reports of versions without parts."""
    found = {name: report.get(name) for name in ("weights", "arithmetic", "quality")}
    return {
        f"{name}: {'PASS' if part['passed'] else 'FAIL'}": str(part["line"]).removeprefix(f"{name}: ")
        for name, part in found.items()
        if part
    }


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_words(item)}" for name, item in value.items() if item is not None)
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _shown(bisect: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The activations around the first wrong one; all of them where none is wrong."""
    stages: Sequence[Mapping[str, Any]] = bisect.get("stages") or ()
    names = [stage["name"] for stage in stages]
    if bisect["tensor"] not in names:
        return stages
    at = names.index(bisect["tensor"])
    return stages[max(0, at - _SHOWN_BEFORE) : at + _SHOWN_AFTER]


def number(value: float | None) -> str:
    """A number in few digits; `none` for None."""
    if value is None:
        return "none"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.1e}"
