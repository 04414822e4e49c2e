"""Cut a text into pieces by one of the known split patterns, the regular expressions of tokenizers.

Patterns from files are never given to a regex engine: hostile ones hang it or abort the process. A pattern is looked up
by its exact text in `PATTERNS`, and text is cut by Python's `re`, in time and memory proportional to the text.

`re` has no Unicode properties. Therefore every non-ASCII character is first replaced by an ASCII character of the same
class (letter, number, white space, other), and the pattern is applied to that text. The classes are those of Unicode
16.0, which the regex engines of tiktoken 0.14 and tokenizers 0.23 have.
"""

from __future__ import annotations

import functools
import itertools
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

# The property White_Space without ASCII; what `\s` of both engines matches.
_SPACES = frozenset(map(ord, "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000")) | frozenset(range(0x2000, 0x200B))
_LONG_S = 0x17F  # the only character beyond ASCII that case-insensitive [sdmtlvre] matches
_MAX_CACHED = 2**16


@functools.cache
def _bounds() -> list[list[int]]:
    """Return the ends of the runs in and out of the categories L and N; after an odd number of ends one is inside.

    The file has a paragraph for each: of the code points from 128, in turns the distance to the next run and the run's
    length, hexadecimal.
    """
    paragraphs = files(__package__).joinpath("unicode_16.txt").read_text(encoding="utf-8").split("\n\n")
    return [list(itertools.accumulate(int(number, 16) for number in text.split())) for text in paragraphs]


class _Stand(dict[int, str]):
    """For `str.translate`: the ASCII character that stands for a code point, computed at its first use."""

    def __init__(self, ignore_case: bool) -> None:
        super().__init__((point, chr(point)) for point in range(128))
        self._letters, self._numbers = _bounds()
        if ignore_case:
            self[_LONG_S] = "s"

    def __missing__(self, point: int) -> str:
        if bisect_right(self._letters, point) % 2:
            char = "x"  # in no contraction
        elif bisect_right(self._numbers, point) % 2:
            char = "0"
        else:
            char = "\t" if point in _SPACES else "\x00"
        if len(self) < _MAX_CACHED:
            self[point] = char
        return char


@dataclass(frozen=True)
class SplitPattern:
    """One known pattern: its text as tokenizers' `Regex` takes it, other spellings of it, and where it is from."""

    name: str
    text: str
    source: str
    spellings: tuple[str, ...] = ()


_OTHER_FORMS = r"""|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
_CONTRACTIONS = r"""'(?i:[sdmt]|ll|ve|re)"""

PATTERNS = (
    SplitPattern("nanochat", _CONTRACTIONS + _OTHER_FORMS % 2, "nanochat's SPLIT_PATTERN, also the LRT authors'"),
    SplitPattern("gpt4", _CONTRACTIONS + _OTHER_FORMS % 3, "GPT4_SPLIT_PATTERN of minbpe, the default of rustbpe"),
    SplitPattern(
        "cl100k",
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"""
        r"""|\s+(?!\S)|\s+""",
        "cl100k_base of older releases of tiktoken, and tokenizer.json files made from it",
    ),
    SplitPattern(
        "gpt2",
        r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
        "GPT-2's encoder.py; ByteLevel with use_regex in tokenizers",
        spellings=(
            # r50k_base of older releases of tiktoken
            r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
            # r50k_base of tiktoken 0.14; `$` is the end of the text there
            r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        ),
    ),
)
GPT2 = PATTERNS[-1]


def known_pattern(text: str) -> SplitPattern | None:
    """Return the known pattern that has this text, or a spelling of the same meaning, or None."""
    return next((pattern for pattern in PATTERNS if text in (pattern.text, *pattern.spellings)), None)


class Splitter:
    """Cuts texts into the pieces that a known pattern matches; together they are the text."""

    def __init__(self, pattern: SplitPattern) -> None:
        ascii_only = pattern.text.replace(r"\p{L}\p{N}]", "A-Za-z0-9]")
        ascii_only = ascii_only.replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]")
        self._pattern = re.compile(ascii_only, re.ASCII)
        self._stand = _Stand(ignore_case="(?i:" in pattern.text)

    def pieces(self, text: str) -> Iterator[str]:
        """Yield the pieces in order. The text must hold no surrogates."""
        if text.isascii():
            return (match.group() for match in self._pattern.finditer(text))
        classes = text.translate(self._stand)  # one character for each of the text's
        return (text[match.start() : match.end()] for match in self._pattern.finditer(classes))
