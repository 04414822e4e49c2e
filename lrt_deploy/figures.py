"""Figures drawn by matplotlib and written as PNG. Matplotlib (the extra `bench`) is imported when one is drawn."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from . import machine
from .errors import InputError
from .files import atomic_write, check_replaceable, user_cache_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PNG = b"\x89PNG\r\n\x1a\n"
INK, GRID = "#333333", "#dddddd"


def available() -> bool:
    """Whether matplotlib is installed; it is not imported."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raise InputError where it is not installed."""
    if not available():
        raise InputError(
            f"a plot needs matplotlib, which is not installed; {machine.install('bench')}; or leave out --plot"
        )


def new_figure(width: float, height: float, dpi: int, title: str) -> Figure:
    """Return an empty figure of `width` by `height` inches."""
    require_matplotlib()
    _keep_to_our_folder()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


def check_target(path: Path) -> None:
    """Raise InputError for a file that is no PNG, which a plot would replace."""
    check_replaceable(path, "the plot", lambda head: head.startswith(_PNG), InputError)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, in place of an older PNG only; raises InputError for another file."""
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # About letters of a title that its fonts lack: they are drawn as boxes.
    with warnings.catch_warnings(), atomic_write(path) as partial:
        warnings.simplefilter("ignore")
        figure.savefig(partial, format="png")


def _keep_to_our_folder() -> None:
    """Before matplotlib is first imported: its cache of fonts lies in our cache folder, or in a temporary one.

    Left to itself it makes folders in the user's `.config` and `.cache`, and warns where there is no home.
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
