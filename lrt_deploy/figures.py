"""Charts of a parity run and of prefill policies, as PNG or SVG, and the page of a report, from their JSON fields.

The page (`report.html.jinja`) has no scripts, and pictures as `data:` addresses. Matplotlib and jinja2 are imported
when something is drawn.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import io
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrt_deploy.tolerances import DEFAULT_PREFILL_TOLERANCE
from lrt_deploy.types import FloatArray

from . import machine
from .errors import InputError
from .files import atomic_write, check_replaceable, user_cache_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PNG = b"\x89PNG\r\n\x1a\n"
INK, GRID = "#333333", "#dddddd"


def require(extra: machine.Extra, product: str, option: str) -> None:
    """Raise InputError where a module of an extra is missing, without which `option` cannot write its product."""
    if absent := machine.missing(extra):
        raise InputError(f"{machine.lack(product, absent, extra)}; or leave out {option}")


def new_figure(width: float, height: float, dpi: int, title: str = "") -> Figure:
    """Return an empty figure of `width` by `height` inches."""
    _set_cache_folder()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white")
    if title:
        figure.suptitle(title, fontsize=11, color=INK)
    return figure


def style(axes: Axes, title: str = "", across: str = "", up: str = "", legend: bool = False) -> None:
    """Apply the style of all charts: a light grid, no box, and title, labels of both axes and legend where given."""
    if title:
        axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(across, color=INK, fontsize=9)
    axes.set_ylabel(up, color=INK, fontsize=9)
    axes.grid(visible=True, which="major", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
    if legend:
        axes.legend(fontsize=8, frameon=False)


def check_target(path: Path) -> None:
    """Raise InputError for an existing file that is not a PNG."""
    check_replaceable(path, "the plot", lambda head: head.startswith(_PNG), InputError)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically; InputError for an existing file that is not a PNG."""
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, _no_warnings():
        figure.savefig(partial, format="png")


def svg_uri(figure: Figure) -> str:
    """A figure as the `data:` address of an SVG, the same for the same figure."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "lrt-deploy"}), _no_warnings():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Ignore warnings: of letters that a font lacks, drawn as boxes, and of numbers beyond what an axis can show."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _set_cache_folder() -> None:
    """Before matplotlib is imported, place its cache of fonts in our cache folder, or in a temporary one.

    By default it makes folders in the user's `.config` and `.cache`, and warns where there is no home.
    """
    if "matplotlib" in sys.modules or "MPLCONFIGDIR" in os.environ:
        return
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # says that it looks for fonts
    cache = user_cache_folder()
    folder = None if cache is None else cache / "matplotlib"
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder is None or not os.access(folder, os.W_OK | os.X_OK):
        folder = Path(tempfile.mkdtemp(prefix="lrt-deploy-matplotlib-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["MPLCONFIGDIR"] = str(folder)


_BLUE, _ORANGE, _PURPLE, _GREY, _RED = "#0072b2", "#d55e00", "#8a4fa8", "#8a8a8a", "#be1e1e"
_DPI = 130
_FLOOR = 1e-12  # zeros are drawn here
_MOST_COLUMNS = 400  # of the picture of the cache


@dataclass(frozen=True)
class Chart:
    """A chart of the page: `names` are those of its curves, `uri` the picture as a `data:` address."""

    title: str
    note: str
    names: tuple[str, ...]
    uri: str


def charts(report: Mapping[str, Any]) -> list[Chart]:
    """The charts of a report's page."""
    found = []
    for title, (note, draw) in _PANELS.items():
        figure = new_figure(4.0, 2.8, _DPI)
        axes = figure.subplots()
        names = draw(axes, report)
        if axes.get_legend() is not None:  # above the curves: a chart of the page has its title outside
            axes.legend(fontsize=7, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0.0, 1.0))
        found.append(Chart(title, note, tuple(names), svg_uri(figure)))
    return found


def plot_parity(path: Path, report: Mapping[str, Any], title: str) -> None:
    """Write the charts of a report side by side as PNG."""
    figure = new_figure(13.0, 4.2, _DPI, title)
    for axes, (name, (_, draw)) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        draw(axes, report)
        axes.set_title(name, loc="left", fontsize=10, color=INK)
    save_figure(figure, path)


def plot_precisions(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Write a point for each precision as PNG: mean KL, share of equal first choices, and where present bits per byte.

    Each row has `precision`, `mean_kl`, `top1_agreement`, and may have `bits_per_byte`.
    """
    panels = [("mean_kl", "mean KL, nats"), ("top1_agreement", "same first choice, share of positions")]
    if all(row.get("bits_per_byte") is not None for row in rows):
        panels.append(("bits_per_byte", "bits per byte"))
    figure = new_figure(4.2 * len(panels), 0.42 * len(rows) + 1.5, _DPI, title)
    names = [str(row["precision"]) for row in rows]
    drawn = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    drawn[0].invert_yaxis()
    for axes, (field, label) in zip(drawn, panels, strict=True):
        values = [float(row[field]) for row in rows]
        axes.plot(values, names, color=_BLUE, marker="o", markersize=7, linestyle="none")
        if field == "mean_kl":
            axes.set_xscale("log")
            axes.set_xlim(left=min(value for value in values if value > 0) / 10)
        else:
            spread = max(values) - min(values)
            axes.set_xlim(min(values) - 0.6 * spread - 1e-3, max(values) + 0.6 * spread + 1e-3)
        for index, value in enumerate(values):
            text = f"{value:.1e}" if field == "mean_kl" else f"{value:.4f}"
            axes.annotate(text, (value, index), (7, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
        style(axes, label)
    save_figure(figure, path)


def _draw_drift(axes: Axes, report: Mapping[str, Any]) -> list[str]:
    """Errors of logits and latent, with the limit of the logits where errors are bounded."""
    positions = report["positions"]
    curve(axes, positions["logit_error"], "logits", _ORANGE)
    if any(value is not None for value in positions["latent_error"]):
        curve(axes, positions["latent_error"], "latent, teacher-forced", _BLUE)
        _free_curve(axes, report, "latent_error", "latent, free-running", _PURPLE)
    if report["limits"].get("top1_agreement") is None:
        limit = report["limits"]["max_abs_logit_error"]
        axes.axhline(limit, color=_RED, linewidth=1, linestyle=":", label="limit of the logits")
    return _finish(axes, report)


def _draw_kl(axes: Axes, report: Mapping[str, Any]) -> list[str]:
    curve(axes, report["positions"]["kl"], "KL, teacher-forced", _BLUE)
    _free_curve(axes, report, "kl", "KL, free-running", _ORANGE)
    curve(axes, report["positions"]["margin"], "margin of the reference's first choice", _GREY, linestyle="--")
    return _finish(axes, report)


def _draw_cache(axes: Axes, report: Mapping[str, Any]) -> list[str]:
    """Errors of K above those of V of each layer, over positions."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    errors = cache_errors(report["positions"])
    finite = errors[np.isfinite(errors)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (_FLOOR, 1.0)
    count = len(report["positions"]["position"])
    image = axes.imshow(
        np.ma.masked_invalid(errors),
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps["viridis"].with_extremes(bad=_RED),
        norm=LogNorm(low, max(high, 10 * low)),
        extent=(-0.5, count - 0.5, len(errors) - 0.5, -0.5),
    )
    axes.set_yticks(range(0, len(errors), 2), [f"K, V {layer}" for layer in range(len(errors) // 2)])
    axes.figure.colorbar(image, ax=axes).ax.tick_params(colors=INK, labelsize=8)
    style(axes, across="position")
    axes.grid(visible=False)
    return [f"K and V of {len(errors) // 2} layers"]


# Title -> note and drawing function, which returns the names of its curves.
_PANELS: dict[str, tuple[str, Callable[[Any, Mapping[str, Any]], list[str]]]] = {
    "Drift": ("Largest absolute difference at each position.", _draw_drift),
    "KL by position": (
        "Nats between the next-token distributions, and by how much the reference prefers its first token.",
        _draw_kl,
    ),
    "Cache, layer by layer": (
        "Largest absolute difference of each cache entry; red is missing or not finite.",
        _draw_cache,
    ),
}


def cache_errors(positions: Mapping[str, Any]) -> FloatArray:
    """(2L, n) errors of K and V in turn, layer by layer; NaN where missing.

    Positions share a column where there are more than 400, which then holds the largest of them.
    """
    keys, values = (np.array(positions[name], float).T for name in ("key_errors", "value_errors"))  # (L, T) each
    rows = np.stack([keys, values], axis=1).reshape(-1, keys.shape[-1])
    starts = np.unique(np.linspace(0, rows.shape[1], min(rows.shape[1], _MOST_COLUMNS), endpoint=False).astype(int))
    result: FloatArray = np.maximum.reduceat(np.maximum(rows, _FLOOR), starts, axis=1)
    return result


def curve(
    axes: Axes, values: Sequence[float | None], name: str, color: str, begins: int = 0, linestyle: str = "-"
) -> None:
    """Draw values over positions from `begins` on, with gaps for None; draws nothing where all are None."""
    numbers = np.maximum(np.array(values, float), _FLOOR)
    if np.isfinite(numbers).any():
        places = np.arange(begins, begins + len(numbers))
        axes.plot(places, numbers, color=color, linewidth=1.3, linestyle=linestyle, label=name)


def _free_curve(axes: Axes, report: Mapping[str, Any], column: str, name: str, color: str) -> None:
    """Draw the free run from the first divergence on."""
    if (divergence := report.get("first_divergence")) and (free := report.get("free_running")):
        begins = divergence["position"]
        curve(axes, free["positions"][column][begins:], name, color, begins, "--")


def _finish(axes: Axes, report: Mapping[str, Any]) -> list[str]:
    """Add what charts over positions share; returns the names of the curves."""
    axes.set_yscale("log")
    axes.axvline(report["prompt_tokens"] - 0.5, color=_GREY, linewidth=1, linestyle="-.", label="end of the prompt")
    style(axes, across="position", legend=True)
    return [str(name) for name in axes.get_legend_handles_labels()[1]]


# Told apart in grey and by colour-blind eyes: Okabe and Ito's colours, and a marker each.
_STYLES = {
    "stepwise": ("#000000", "s"),
    "plain": ("#d55e00", "^"),
    "interleaved": ("#0072b2", "o"),
    "one pass": ("#8a8a8a", "D"),
}


def plot_prefill(
    path: Path, prefill: Sequence[dict[str, Any]], convergence: Sequence[dict[str, Any]], title: str
) -> None:
    """Write a PNG. `prefill` and `convergence` as in the JSON document of `bench`."""
    figure = new_figure(10.5, 4.4, 160, title)
    left, right = figure.subplots(1, 2)
    _draw_times(left, prefill)
    _draw_errors(right, convergence)
    save_figure(figure, path)


def _draw_times(axes: Axes, prefill: Sequence[dict[str, Any]]) -> None:
    _draw_lines(axes, prefill, "tokens", "seconds")
    lengths = list(dict.fromkeys(point["tokens"] for point in prefill))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    style(axes, "Time to read a prompt", "prompt length, tokens", "seconds", legend=True)


def _draw_errors(axes: Axes, convergence: Sequence[dict[str, Any]]) -> None:
    _draw_lines(axes, convergence, "passes", "max_abs_latent_error")
    if not convergence:
        axes.text(0.5, 0.5, "nothing was iterated", ha="center", va="center", transform=axes.transAxes, color=INK)
        axes.set_axis_off()
        return
    axes.set_yscale("log")
    axes.axhline(DEFAULT_PREFILL_TOLERANCE, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="tolerance by default")
    most = max(int(point["passes"]) for point in convergence)
    axes.set_xticks(range(1, most + 1, 1 if most <= 12 else 2))
    axes.minorticks_off()
    title = f"Error against stepwise, {convergence[0]['tokens']} tokens"
    style(axes, title, "passes over the prompt", "latent, max abs error", legend=True)


def _draw_lines(axes: Axes, points: Sequence[dict[str, Any]], x: str, y: str) -> None:
    """Draw a line for each algorithm, through the fields `x` and `y` of its points."""
    for algorithm in dict.fromkeys(point["algorithm"] for point in points):
        color, marker = next((style for name, style in _STYLES.items() if algorithm.startswith(name)), (INK, "o"))
        pairs = [(point[x], point[y]) for point in points if point["algorithm"] == algorithm]
        axes.plot(*zip(*pairs, strict=True), color=color, marker=marker, markersize=4.5, linewidth=1.6, label=algorithm)


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
