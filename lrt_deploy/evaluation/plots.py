"""Charts of a parity run, drawn by matplotlib from the JSON fields of a report: PNG files, and for the HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrt_deploy.figures import INK, new_figure, save_figure, style, svg_uri
from lrt_deploy.types import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    """Write a bar for each precision as PNG: mean KL, share of equal first choices, and where present bits per byte.

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
        axes.barh(names, values, color=_BLUE, height=0.6)
        if field == "mean_kl":
            axes.set_xscale("log")
            axes.set_xlim(left=min(value for value in values if value > 0) / 10)
        else:
            spread = max(values) - min(values)
            axes.set_xlim(min(values) - 0.6 * spread - 1e-3, max(values) + 0.6 * spread + 1e-3)
        for index, value in enumerate(values):
            text = f"{value:.1e}" if field == "mean_kl" else f"{value:.4f}"
            axes.annotate(text, (value, index), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
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
    """KL in both runs, and the margin of the reference's first choice."""
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
