"""Turn tokens into text while they are generated: whole characters only, and no part of a stop string.

A token can end in the middle of a character, and a stop string can begin in one token and end in another. Text that is
not certain yet is held back. Time is proportional to the length of the text times the number of stop strings (the
search is Knuth, Morris and Pratt's).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from lrt_deploy.errors import InputError
from lrt_deploy.fields import check_texts, shown


class TextStream:
    """The text of one generated sequence.

    All that `push` and `finish` return, joined, is the decoded text of the tokens up to the first stop string. The
    first is the one that is complete first (of two complete at once, the longer), however the text is cut into tokens.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop_strings: Sequence[str] = ()) -> None:
        stop_strings = check_texts(stop_strings, "stop strings")
        if not all(stop_strings):
            raise InputError(f"stop strings are {shown(stop_strings)}, expected texts of at least one character")
        self._token_bytes = token_bytes
        self._searches = [_Search(stop) for stop in dict.fromkeys(stop_strings)]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stopped: str | None = None
        """The stop string that ended the text, if one has."""

    def push(self, token: int) -> str:
        """Take one more token; return the text that is now certain. Nothing follows a stop string."""
        return self._advance(self._decoder.decode(self._token_bytes(token)))

    def finish(self) -> str:
        """Return the text that was held back, with U+FFFD for an unfinished character; nothing more follows."""
        last = self._advance(self._decoder.decode(b"", final=True))
        held, stop = self._held_back()
        self._searches.clear()
        return last if self.stopped is not None else last + stop[:held]

    def _held_back(self) -> tuple[int, str]:
        """Number of characters that are held back, and a stop string that begins with them."""
        return max(((search.matched, search.stop) for search in self._searches), default=(0, ""))

    def _advance(self, text: str) -> str:
        if self.stopped is not None or not text:
            return ""
        if not self._searches:
            return text
        held, stop = self._held_back()
        for position, char in enumerate(text, start=1):
            if found := [search.stop for search in self._searches if search.advance(char)]:
                self.stopped = max(found, key=len)
                certain = held + position - len(self.stopped)
                break
        else:
            certain = held + len(text) - self._held_back()[0]
        return stop[: min(certain, held)] + text[: max(0, certain - held)]


class _Search:
    """The longest beginning of one stop string that the text ends with: `matched` characters."""

    def __init__(self, stop: str) -> None:
        self.stop, self.matched = stop, 0
        # For each prefix of the stop string, by length: the longest shorter prefix that it ends with. Built as needed.
        self._shorter = [0, 0]

    def advance(self, char: str) -> bool:
        """Append one character to the text; return whether the stop string is now complete."""
        self.matched = self._extended(self.matched, char)
        if self.matched == len(self._shorter):
            self._shorter.append(self._extended(self._shorter[-1], self.stop[self.matched - 1]))
        return self.matched == len(self.stop)

    def _extended(self, length: int, char: str) -> int:
        while length and self.stop[length] != char:
            length = self._shorter[length]
        return length + 1 if self.stop[length] == char else 0
