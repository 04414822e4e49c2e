"""Plot a comparison of prefill policies: time against prompt length, and error against passes.

Drawn from the JSON fields of `lrt-deploy bench`. Needs matplotlib (the extra `bench`), imported when drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrt_deploy.figures import INK, new_figure, save_figure, style
from lrt_deploy.tolerances import DEFAULT_PREFILL_TOLERANCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
