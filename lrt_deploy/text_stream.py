"""Turns tokens into text as they come: whole characters only, and nothing that a stop string might still take back.

A token can end in the middle of a character, and a stop string can begin in one token and end in another. This module
holds back exactly what is not settled yet. It knows neither tokenizers nor models: it is given a function from a token
to its bytes.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from .errors import InputError


class TextStream:
    """The text of one generated sequence.

    All that `push` and `finish` return, joined, is the decoded text of the tokens up to the first stop string. The
    first is the one that is complete first (of two complete at once, the longer), however the text is cut into tokens.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop_strings: Sequence[str] = ()) -> None:
        if isinstance(stop_strings, str) or not all(isinstance(s, str) and s for s in stop_strings):
            raise InputError(f"stop strings are a list of texts of at least one character, found {stop_strings!r}")
        self._token_bytes = token_bytes
        self._stops = tuple(stop_strings)
        self._longest = max(map(len, self._stops), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped: str | None = None
        """The stop string that ended the text, if one has."""

    def push(self, token: int) -> str:
        """Take one more token; the text that is now certain. Nothing follows a stop string."""
        return self._advance(self._decoder.decode(self._token_bytes(token)))

    def finish(self) -> str:
        """The rest of the text, after the last token: what was held back, U+FFFD for an unfinished character."""
        text = self._advance(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _advance(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + text
        if found := self._first_stop(text):
            self._held, self.stopped = "", found[1]
            return text[: found[0]]
        certain = len(text) - self._undecided(text)
        self._held = text[certain:]
        return text[:certain]

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """Where the stop string that is complete first begins, and which it is."""
        starts = [(text.find(stop), stop) for stop in self._stops]
        hits = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        return min(hits)[1:] if hits else None

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        lengths = range(min(len(text), self._longest - 1), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
