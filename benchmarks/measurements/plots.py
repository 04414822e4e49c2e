"""The pictures of the documents, from the JSON documents alone: each is written for light and for dark pages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lrt_deploy.files import atomic_write
from lrt_deploy.tolerances import DEFAULT_PREFILL_TOLERANCE

from . import record, style, tables
from .style import DARK, LIGHT, MARKERS, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Documents = dict[str, dict[str, Any]]
WINDOW = 8  # steps of a rollout whose largest error is one point of a curve


def convergence(axes: Axes, theme: Theme, documents: Documents) -> None:
    """Draw the error of the latent after each pass, for models, lengths and kinds of iteration."""
    points = documents["prefill"]["results"]["convergence"]
    colors = theme.precisions
    shown = {
        ("demo", 64, "interleaved"): ("demo, 64 tokens", colors["int4-weight-only"], "v", "-"),
        ("demo", 512, "interleaved"): ("demo, 512 tokens", colors["int8-weight-only"], "o", "-"),
        ("random 768/12", 128, "interleaved"): ("random 768/12, 128", colors["fp16"], "D", "-"),
        ("demo", 512, "plain"): ("demo, 512, Jacobi", colors["int8-weight-only"], "o", (0, (4, 2))),
    }
    for (model, tokens, algorithm), (label, color, marker, line) in shown.items():
        curve = [
            (point["passes"], point["max_abs_latent_error"])
            for point in points
            if (point["model"], point["tokens"]) == (model, tokens) and point["algorithm"].startswith(algorithm)
        ]
        filled = "none" if algorithm == "plain" else color
        axes.plot(*zip(*curve, strict=True), label=label, color=color, marker=marker, linestyle=line, mfc=filled, ms=5)
    tolerance = DEFAULT_PREFILL_TOLERANCE
    axes.axhline(tolerance, color=theme.ink, linewidth=1, linestyle=(0, (1, 2)), label=f"tolerance, {tolerance:g}")
    axes.set_yscale("log")
    axes.set_ylim(*style.whole_decades(point["max_abs_latent_error"] for point in points))
    axes.set_xlim(left=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("passes over the prompt")
    axes.set_ylabel("error of the latent")
    style.legend_below(axes)


def drift(axes: Axes, theme: Theme, documents: Documents) -> None:
    """Draw the largest error of the logits in windows of a rollout, by precision."""
    results = documents["quality"]["results"]
    for row in results["rows"]:
        errors, name = row["positions"]["logit_error"], row["precision"]
        starts = range(0, len(errors), WINDOW)
        largest = [max(errors[start : start + WINDOW]) for start in starts]
        middle = [start + min(WINDOW, len(errors) - start) / 2 for start in starts]
        axes.plot(middle, largest, color=theme.precisions[name], linewidth=1.6, label=name)
        axes.plot(middle[::8], largest[::8], color=theme.precisions[name], marker=MARKERS[name], linestyle="none", ms=6)
    axes.set_yscale("log")
    axes.set_ylim(*style.whole_decades(error for row in results["rows"] for error in row["positions"]["logit_error"]))
    axes.set_xlim(0, results["steps"])
    axes.set_xticks(range(0, results["steps"] + 1, 64))
    axes.set_xlabel("generated tokens")
    axes.set_ylabel("largest error of a logit")
    style.legend_below(axes, columns=3)


def wide_runs(documents: Documents) -> list[dict[str, Any]]:
    """Return the decoding of the model whose weights do not fit a cache."""
    return [run for run in tables.decode_runs(documents["decode"]["results"]) if not run["weights_fit_cache"]]


def roofline(axes: Axes, theme: Theme, documents: Documents) -> None:
    """Draw a bar of tokens per second for each precision, before one of what the memory allows."""
    runs = wide_runs(documents)
    names = [run["precision"] for run in runs]
    bound = [run["bound_tokens_per_s"] for run in runs]
    axes.barh(names, bound, height=0.72, color=theme.soft, label="memory allows")
    colors = [theme.precisions[name] for name in names]
    rates = [run["tokens_per_s"] for run in runs]
    axes.barh(names, rates, height=0.36, color=colors, label="measured")
    for index, (rate, most) in enumerate(zip(rates, bound, strict=True)):
        text = f"{rate:.0f} of {most:.0f}"
        axes.annotate(text, (max(rate, most), index), (5, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.28 * max(bound))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("tokens/s: measured, of what the memory allows")


# Where the name of a precision stands beside its point, in points, and how it is aligned.
LABELS = {
    "fp32": ((-8, -4), "right"),
    "fp16": ((8, -13), "left"),
    "int8": ((-9, -4), "right"),
    "int8-weight-only": ((0, 10), "center"),
    "int4-weight-only": ((-10, -4), "right"),
}


def quality_speed(axes: Axes, theme: Theme, documents: Documents) -> None:
    """Draw the share of equal first choices over the speed of decoding, by precision."""
    runs = wide_runs(documents)
    same = {row["precision"]: 100 * row["top1_agreement"] for row in documents["quality"]["results"]["rows"]}
    for run in runs:
        name, color = run["precision"], theme.precisions[run["precision"]]
        point = (run["times_fp32"], same[name])
        axes.plot(*point, marker=MARKERS[name], color=color, ms=9)
        offset, side = LABELS[name]
        axes.annotate(name, point, offset, textcoords="offset points", ha=side, color=color, fontweight="bold")
    axes.set_xlim(0, 1.12 * max(run["times_fp32"] for run in runs))
    least = min(same.values())
    axes.set_ylim(least - 0.12 * (100 - least) - 0.1, 100 + 0.25 * (100 - least))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("tokens/s, as a multiple of fp32's")
    axes.set_ylabel("same first choice as PyTorch, %")


# Name -> (documents that it is drawn from, drawing function).
PICTURES: dict[str, tuple[tuple[str, ...], Callable[[Any, Theme, Documents], None]]] = {
    "convergence": (("prefill",), convergence),
    "drift": (("quality",), drift),
    "roofline": (("decode",), roofline),
    "quality-speed": (("decode", "quality"), quality_speed),
}


def digest(name: str, documents: Documents) -> str:
    """Return the SHA-256 of the documents that a picture is drawn from."""
    used = {source: documents[source] for source in PICTURES[name][0]}
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()


def draw(name: str, theme: Theme, documents: Documents) -> tuple[Figure, str]:
    """Return a picture as a figure and as SVG."""
    with style.drawn(theme) as (figure, axes):
        PICTURES[name][1](axes, theme, documents)
        return figure, style.svg(figure, digest(name, documents))


def write_pictures() -> None:
    """Draw all pictures into docs/measurements."""
    documents = record.read()
    for name in PICTURES:
        for theme, suffix in ((LIGHT, ""), (DARK, "-dark")):
            with atomic_write(record.FOLDER / f"{name}{suffix}.svg") as partial:
                partial.write_text(draw(name, theme, documents)[1], encoding="utf-8")
