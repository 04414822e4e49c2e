"""Print: answers and generated text to stdout, tables, progress and notes to stderr.

Text is wrapped at words; streamed text holds back the word that is being written, because its line is known at its end.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO
from unicodedata import combining, east_asian_width

from . import signals

_PARTS = re.compile(r"\n|[^\S\n]*\S+|[^\S\n]+")  # words with the blanks before them


def columns(text: str) -> int:
    """Count the columns of a text on a terminal: two for wide characters, none for combining ones."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


class WordWrapper:
    """Breaks a stream of text into lines of at most `width` columns, at blanks where there are any."""

    def __init__(self, width: int) -> None:
        self._width = max(2, width)
        self._column = 0
        self._held = ""  # the last part, which may go on

    def push(self, text: str) -> str:
        """Add a piece of text; return the text that can be shown."""
        *parts, self._held = _PARTS.findall(self._held + text) or [""]
        shown = "".join(self._place(part) for part in parts)
        full, self._held = self._full_lines(self._held)
        return shown + full

    def finish(self) -> str:
        """Return the text that was held back, and start again."""
        text, self._held = self._place(self._held), ""
        self._column = 0
        return text

    def _place(self, part: str) -> str:
        """Return a part where it belongs: behind the text of the line, or on new lines."""
        full, rest = self._full_lines(part)
        return full + self._put(rest)

    def _full_lines(self, part: str) -> tuple[str, str]:
        """Return the full lines of a word that is longer than a line, and the rest of it."""
        shown = ""
        while columns(word := part.lstrip()) > self._width:
            size = 1
            while columns(word[: size + 1]) <= self._width:
                size += 1
            shown += self._put(part[: len(part) - len(word) + size])
            part = word[size:]
        return shown, part

    def _put(self, part: str) -> str:
        word = part.lstrip()
        if not word:  # the end of a line, or blanks before it
            self._column = 0
            return "\n" if part == "\n" else ""
        if self._column and self._column + columns(part) > self._width:
            self._column = columns(word)
            return f"\n{word}"
        self._column += columns(part)
        return part


def table_lines(label: str, value: str, label_width: int, width: int = 80) -> list[str]:
    """Wrap one row of a table into lines of at most `width` columns; a word that is longer stays whole."""
    indent = " " * (label_width + 2)
    first, *rest = value.split("\n") or [""]
    lines = textwrap.wrap(
        first, width, initial_indent=f"{label:{label_width}}  ", subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False, drop_whitespace=True, replace_whitespace=False,
    ) or [f"{label:{label_width}}"]  # fmt: skip
    return [*lines, *(f"{indent}{line}" for line in rest)]


Progress = Callable[[str, int, int], None]

_COLOURS = {"PASS": "32", "FAIL": "31"}  # green and red
_EVERY_S = 10.0  # between two lines on one thing
_has_document = False  # stdout has its one JSON document


def begin() -> None:
    """Prepare for one command: text that the terminal's encoding lacks is shown as escapes instead of failing."""
    global _has_document
    _has_document = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def answer(line: str) -> None:
    """Print one line on stdout; on a terminal the verdict that it begins with has its colour."""
    word = next((word for word in _COLOURS if re.match(rf"{word}\b", line)), None)
    if word is not None and _in_colour(sys.stdout):
        line = f"\x1b[{_COLOURS[word]}m{word}\x1b[0m{line[len(word) :]}"
    stream(f"{line}\n")


def _in_colour(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal with colours, which the user has not switched off (no-color.org)."""
    if stream is None or not stream.isatty() or os.environ.get("TERM") == "dumb":
        return False
    return not os.environ.get("NO_COLOR")


def text_width() -> int | None:
    """Return the columns of the terminal that stdout is; None if it is none."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size().columns


def stream(text: str) -> None:
    """Print text on stdout, at once; raise a signal whose exception got lost instead."""
    signals.check()
    _write(text)


def _write(text: str) -> None:
    if sys.stdout is None:  # started with stdout closed
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:
        silence_stdout()
        raise


def document(fields: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout, in UTF-8. Numbers that are not finite, which JSON lacks, become null."""
    signals.check()
    _document(fields)


def result(json: bool, fields: Mapping[str, Any], line: str, *tables: Mapping[str, object]) -> None:
    """Print the result of a verb: with `json` the document, else a line on stdout and tables on stderr."""
    if json:
        document(fields)
    else:
        answer(line)
        for rows in tables:
            table(rows)


def estimate(json: bool, what: str, fields: Mapping[str, Any]) -> None:
    """Print what a command would take, as `exporters.estimate.Estimate.to_dict` gives it."""
    memory, seconds = bytes_text(fields["peak_memory_bytes"]), fields["seconds"]
    line = f"would {what}: {bytes_text(fields['bytes'])}, about {memory} of memory and {seconds:.0f} s on one core"
    rows = {
        name: f"{bytes_text(file['bytes'])}{'' if file['exact'] else ', about'}"
        for name, file in fields["files"].items()
    }
    result(json, {"dry_run": True} | dict(fields), line, rows | {"free there": bytes_text(fields["free_bytes"])})


def failure(kind: str, message: str) -> None:
    """Print an error as the one JSON document on stdout, unless a document stands there already."""
    with contextlib.suppress(OSError):  # a full disk under stdout: the message stands on stderr too
        if not _has_document:
            _document({"error": {"type": kind, "message": message}})


def _document(fields: Mapping[str, Any]) -> None:
    global _has_document
    text = json.dumps(_plain(fields), indent=2, ensure_ascii=False, allow_nan=False)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    _has_document = True
    _write(f"{text}\n")


def say(line: str, end: str = "\n") -> None:
    """Print a line for a person on stderr; one that is closed is ignored."""
    with contextlib.suppress(OSError):
        if sys.stderr is not None:
            sys.stderr.write(f"{line}{end}")
            sys.stderr.flush()


def table(rows: Mapping[str, object]) -> None:
    """Print two columns for a person, on stderr, in the terminal's width or 80 columns; labels have a colour there."""
    signals.check()
    label_width = max(map(len, rows), default=0)
    width = shutil.get_terminal_size().columns if for_people() else 80
    for label, value in rows.items():
        text = "\n".join(table_lines(label, cell(value), label_width, width))
        say(f"\x1b[1;36m{label}\x1b[0m{text[len(label) :]}" if _in_colour(sys.stderr) else text)


def cell(value: object) -> str:
    """Format a value of a table: numbers in few digits, lists and objects in one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell, value)) or "none"
    return "none" if value is None else str(value)


def for_people() -> bool:
    """Return whether stderr is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def lines(quiet: bool = False) -> Progress:
    """Return a progress function that prints a line for each new `what`, its share every ten seconds, and its end.

    Nothing is printed if `quiet`; a signal whose exception got lost is raised all the same.
    """
    times: dict[str, float] = {}  # of each one's last line
    shares: dict[str, str] = {}  # each one's last share, where one was printed

    def show(what: str, done: int, total: int) -> None:
        signals.check()
        now = time.monotonic()
        due = now - times.get(what, -math.inf) >= _EVERY_S or (what in shares and done == total)
        share = f"{done / total:.0%}" if total else ""
        if quiet or not due or share == shares.get(what):
            return
        if what not in times:
            say(what)
        elif share:
            say(f"{what}: {share}")
            shares[what] = share
        times[what] = now

    return show


@contextlib.contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """Give a function (what, done, total) that shows progress; 0, 0 where there is nothing to count.

    On a terminal: a spinner, a bar and the time, which a thread keeps moving while nothing is reported. Elsewhere:
    `lines`.
    """
    if not for_people():
        yield lines(quiet)
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("starting", total=None)

        def show(what: str, done: int, total: int) -> None:
            signals.check()
            bars.update(task, description=what, completed=done, total=total or None)

        yield show


def silence_stdout() -> None:
    """Point stdout to the null device, so that not even Python's flush at exit can fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def bytes_text(count: int) -> str:
    """Format a size in bytes."""
    size = float(count)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def count_text(count: int) -> str:
    """Format a number of parameters."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _plain(value: Any) -> Any:  # noqa: ANN401 - anything a library puts into its report
    """Convert to JSON types: numpy's numbers and arrays, tuples, paths; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
