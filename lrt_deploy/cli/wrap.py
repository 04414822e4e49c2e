"""Wrap text at words: of generated text as it streams to a terminal, and of tables where there is no terminal.

Streaming holds back the word that is being written until it ends, because only then its line is known. Knows nothing of
where the text goes.
"""

from __future__ import annotations

import re
import textwrap
from unicodedata import combining, east_asian_width

_PARTS = re.compile(r"\n|[^\S\n]+|\S+")


def columns(text: str) -> int:
    """Columns that a text takes on a terminal: two for wide characters, none for combining ones."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


class WordWrapper:
    """Breaks a stream of text into lines of at most `width` columns, at blanks where there are any."""

    def __init__(self, width: int) -> None:
        self._width = max(2, width)
        self._column = 0
        self._blanks = ""  # before the word that is held back
        self._word = ""

    def push(self, text: str) -> str:
        """Return what can be shown after this piece of text."""
        shown = []
        for part in _PARTS.findall(text):
            if part == "\n":
                shown.append(f"{self._take()}\n")
                self._column, self._blanks = 0, ""
            elif part.isspace():
                shown.append(self._take())
                self._blanks += part
            else:
                self._word += part
                shown.append(self._take_full_lines())
        return "".join(shown)

    def finish(self) -> str:
        """Return what was held back, and begin anew."""
        text = self._take()
        self._column, self._blanks = 0, ""
        return text

    def _take(self) -> str:
        """The word that was held back with the blanks before it, or on a line of its own."""
        if not self._word:
            return ""
        blanks, word = self._blanks, self._word
        self._blanks = self._word = ""
        if self._column and self._column + columns(blanks) + columns(word) > self._width:
            self._column = columns(word)
            return f"\n{word}"
        self._column += columns(blanks) + columns(word)
        return blanks + word

    def _take_full_lines(self) -> str:
        """Lines of a word that is longer than a line, as text without blanks is."""
        shown = []
        while columns(self._word) > self._width:
            size = 1
            while columns(self._word[: size + 1]) <= self._width:
                size += 1
            rest, self._word = self._word[size:], self._word[:size]
            shown.append(self._take())
            self._word = rest
        return "".join(shown)


def table_lines(label: str, value: str, label_width: int, width: int = 80) -> list[str]:
    """Lines of at most `width` columns for one row of a table; a word that is longer stays whole."""
    indent = " " * (label_width + 2)
    first, *rest = value.split("\n") or [""]
    lines = textwrap.wrap(
        first, width, initial_indent=f"{label:{label_width}}  ", subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False, drop_whitespace=True, replace_whitespace=False,
    ) or [f"{label:{label_width}}"]  # fmt: skip
    return [*lines, *(f"{indent}{line}" for line in rest)]
