"""Figures drawn by matplotlib, as PNG files or SVG addresses. Matplotlib is imported when one is drawn."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

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
