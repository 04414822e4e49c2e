"""The one style of the pictures: sizes, colours for light and dark pages, a colour and a marker for each precision.

A picture is an SVG 5.6 inches wide whose letters can still be read at 400 pixels. The light one is white, so that it
can be shown anywhere; the dark one has no background and belongs on a dark page.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrt_deploy import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

WIDTH, HEIGHT, DPI = 5.6, 3.9, 100
FONT, SMALL_FONT = 11.5, 10.5


@dataclass(frozen=True)
class Theme:
    """Colours of one kind of page."""

    name: str
    background: str
    ink: str
    grid: str
    soft: str
    precisions: dict[str, str]


LIGHT = Theme(
    "light",
    "white",
    "#333333",
    "#dddddd",
    "#d4d9e0",
    {
        "fp32": "#333333",
        "fp16": "#00875f",
        "int8": "#a07000",
        "int8-weight-only": "#0072b2",
        "int4-weight-only": "#c24a00",
    },
)
DARK = Theme(
    "dark",
    "none",
    "#e2e4e9",
    "#444a57",
    "#4a5263",
    {
        "fp32": "#f2f2f2",
        "fp16": "#3ed2a5",
        "int8": "#f0b840",
        "int8-weight-only": "#62b8f2",
        "int4-weight-only": "#ff9257",
    },
)
MARKERS = {"fp32": "s", "fp16": "D", "int8": "^", "int8-weight-only": "o", "int4-weight-only": "v"}


@contextmanager
def drawn(theme: Theme) -> Iterator[tuple[Figure, Axes]]:
    """Give an empty figure with its axes in the style; the style is applied while the block draws."""
    figure = figures.new_figure(WIDTH, HEIGHT, DPI)  # before matplotlib is imported: it places its cache
    from matplotlib import rc_context

    settings: dict[str, Any] = {
        "font.size": FONT,
        "axes.labelsize": FONT,
        "xtick.labelsize": SMALL_FONT,
        "ytick.labelsize": SMALL_FONT,
        "legend.fontsize": SMALL_FONT,
        "axes.edgecolor": theme.ink,
        "axes.labelcolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "axes.facecolor": "none",
    }
    with rc_context(settings):
        figure.set_facecolor(theme.background)
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, color=theme.grid, linewidth=0.7)
        axes.set_axisbelow(True)
        yield figure, axes


def legend_below(axes: Axes, columns: int = 2) -> None:
    """Put the legend under the axes, where it can hide nothing."""
    axes.figure.legend(loc="outside lower center", ncols=columns, frameon=False, handlelength=1.8, columnspacing=1.4)


def svg(figure: Figure, digest: str) -> str:
    """Return a figure as SVG, the same for the same figure, with the digest of what it was drawn from as metadata."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "lrt-deploy"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Source": f"sha256:{digest}"})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def collisions(figure: Figure) -> list[tuple[str, str]]:
    """Return the pairs of texts that overlap, and texts with the edge that they cross."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [
        text for text in figure.findobj(Text) if text.get_text().strip() and not _of_a_tick_out_of_view(text, figure)
    ]
    shown = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]
    edge = figure.bbox.padded(1)
    outside = [(text, "edge") for text, box in shown if not (edge.contains(*box.min) and edge.contains(*box.max))]
    return outside + [(a, b) for (a, one), (b, two) in itertools.combinations(shown, 2) if one.overlaps(two)]


def whole_decades(values: Iterable[float]) -> tuple[float, float]:
    """Return the limits of a logarithmic axis that holds the values and ends at powers of ten."""
    logs = [math.log10(value) for value in values if value > 0]
    return 10.0 ** math.floor(min(logs)), 10.0 ** math.ceil(max(logs))


def _of_a_tick_out_of_view(text: Text, figure: Figure) -> bool:
    """Whether a text labels a tick beyond the ends of its axis, which is not drawn."""
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if text in (tick.label1, tick.label2):
                return not low <= tick.get_loc() <= high or not text.get_visible()
    return False
