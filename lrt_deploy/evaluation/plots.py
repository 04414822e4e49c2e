"""Pictures of a parity run as PNG: drift, KL by position, the cache layer by layer; and of several precisions together.

Drawn from the JSON fields of a report. Needs matplotlib (the extra `bench`), imported when drawing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrt_deploy.figures import GRID, INK, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#8a8a8a"
_DPI = 130
_FLOOR = 1e-12  # zeros are drawn here


def plot_parity(path: Path, report: Mapping[str, Any], title: str) -> None:
    """Three panels of one report."""
    figure = new_figure(13.0, 4.2, _DPI, title)
    drift, kl, cache = figure.subplots(1, 3)
    positions = report["positions"]
    _curve(drift, positions["logit_error"], _ORANGE, "logits")
    _curve(drift, positions["latent_error"], _BLUE, "latent")
    if report["limits"].get("top1_agreement") is None:
        drift.axhline(report["limits"]["max_abs_logit_error"], color=INK, linewidth=1, linestyle=":", label="limit")
    _dress(drift, "Drift: largest error", report)
    _curve(kl, positions["kl"], _BLUE, "teacher-forced")
    if divergence := report.get("first_divergence"):
        begins = divergence["position"]
        free = report["free_running"]["positions"]["kl"][begins:]
        _curve(kl, free, _ORANGE, "free-running, from where it parts", begins)
    _dress(kl, "KL by position, nats", report)
    _heat(figure, cache, positions)
    save_figure(figure, path)


def plot_precisions(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Mean KL, share of equal first choices, and where present bits per byte: a bar for each precision.

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
        _style(axes, label)
    save_figure(figure, path)


def _curve(axes: Axes, values: Sequence[float | None], color: str, label: str, begins: int = 0) -> None:
    """Gaps where there is no number."""
    numbers = np.array([np.nan if value is None else max(value, _FLOOR) for value in values], float)
    if np.isfinite(numbers).any():
        axes.plot(np.arange(begins, begins + len(numbers)), numbers, color=color, linewidth=1.3, label=label)


def _dress(axes: Axes, title: str, report: Mapping[str, Any]) -> None:
    axes.set_yscale("log")
    axes.axvline(report["prompt_tokens"] - 0.5, color=_GREY, linewidth=1, linestyle="--", label="end of the prompt")
    axes.set_xlabel("position", color=INK)
    axes.legend(fontsize=8, frameon=False)
    _style(axes, title)


def _heat(figure: Figure, axes: Axes, positions: Mapping[str, Any]) -> None:
    """K above V of each layer."""
    from matplotlib.colors import LogNorm

    columns = [np.array(positions[name], float).T for name in ("key_errors", "value_errors")]  # (L, T) each
    rows = np.stack(columns, axis=1).reshape(-1, columns[0].shape[-1])  # (2 L, T)
    rows = np.where(rows > 0, rows, _FLOOR)
    finite = rows[np.isfinite(rows)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (_FLOOR, 1.0)
    image = axes.imshow(
        rows, aspect="auto", interpolation="nearest", cmap="viridis", norm=LogNorm(low, max(high, 10 * low))
    )
    axes.set_yticks(range(0, len(rows), 2), [f"K, V {layer}" for layer in range(len(rows) // 2)])
    axes.set_xlabel("position", color=INK)
    axes.set_title("Cache: largest error by layer", loc="left", fontsize=10, color=INK)
    axes.tick_params(colors=INK, labelsize=8)
    figure.colorbar(image, ax=axes)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(visible=True, which="major", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
