"""Cut a text into pieces by a known split pattern, and encode each piece by byte pairs, by the merges of a vocabulary.

Patterns from files are never given to a regex engine: hostile ones hang it or abort the process. A pattern is looked up
by its exact text in `PATTERNS`, and text is cut by Python's `re`, in time and memory proportional to the text. `re` has
no Unicode properties, so every non-ASCII character is first replaced by an ASCII character of the same class (letter,
number, white space, other). The classes are those of Unicode 16.0, which the regex engines of tiktoken 0.14 and
tokenizers 0.23 have.

Tokens are written in the printable characters of byte-level vocabularies, one for each byte (GPT-2's table). The
tokenizers library's BPE model merges them; it is given checked tokens and merges only.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import tokenizers
from tokenizers import models

from lrt_deploy.errors import InputError, LRTDeployError

# The longest token of a public byte-level vocabulary has 128 bytes; 200 thousand tokens have 1.4 MB together.
MAX_TOKEN_BYTES = 1024
MAX_VOCABULARY_BYTES = 2**22
_WINDOW = 4096
_MAX_WINDOW = 2**22

# The printable stand-ins for the 256 bytes.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHAR_OF = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
BYTE_OF = {char: byte for byte, char in _CHAR_OF.items()}

Merge = tuple[str, str]


def as_chars(data: bytes) -> str:
    """Return the printable characters that stand for these bytes."""
    return data.decode("latin-1").translate(_CHAR_OF)


def size_problem(tokens: Collection[bytes]) -> str | None:
    """Return the fault in the tokens' lengths; None if they are within the bounds of time and memory."""
    longest, total = max(map(len, tokens), default=0), sum(map(len, tokens))
    if longest > MAX_TOKEN_BYTES:
        return f"a token of {longest} bytes; at most {MAX_TOKEN_BYTES} are accepted"
    if total > MAX_VOCABULARY_BYTES:
        return f"tokens of {total} bytes together; at most {MAX_VOCABULARY_BYTES} are accepted"
    return None


def merges_of(ranks: Mapping[bytes, int]) -> list[Merge]:
    """Return the merges with which BPE encodes as tiktoken does with these ranks, in the order of their priority.

    tiktoken joins any two neighbours that form a token, lowest rank first. A token is still only ever formed from one
    pair, since the merges inside its span do not depend on the text around it. Encoding the token itself finds that
    pair. A token that its own bytes do not lead to has no merge.
    """
    pairs = ((rank, _last_pair(token, ranks)) for token, rank in ranks.items() if len(token) > 1)
    found = sorted((rank, pair) for rank, pair in pairs if pair is not None)
    return [(as_chars(left), as_chars(right)) for _, (left, right) in found]


def _last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """Return the two parts that are joined last to form `token`; None if merging ends with more than one part."""
    size = len(token)
    end, before = list(range(1, size + 1)), list(range(-1, size - 1))  # by the start of a part; end 0: joined away
    waiting: list[tuple[int, int, int, int]] = []  # rank, start, middle, end of a pair; of equal ranks the leftmost

    def consider(start: int, middle: int) -> None:
        rank = ranks.get(token[start : end[middle]])
        if rank is not None:
            heapq.heappush(waiting, (rank, start, middle, end[middle]))

    for start in range(size - 1):
        consider(start, start + 1)
    while waiting:
        _, start, middle, stop = heapq.heappop(waiting)
        if end[start] != middle or end[middle] != stop:
            continue  # one of its parts has been joined to another
        if stop - start == size:
            return token[:middle], token[middle:]
        end[start], end[middle] = stop, 0
        if stop < size:
            before[stop] = start
            consider(start, stop)
        if start > 0:
            consider(before[start], start)
    return None


@contextlib.contextmanager
def panics_as(error: type[LRTDeployError], message: str) -> Iterator[None]:
    """Raise `error` for a panic of a library written in Rust, which is no Exception; let everything else through."""
    try:
        yield
    except BaseException as cause:
        if type(cause).__name__ != "PanicException":
            raise
        raise error(f"{message}: the tokenizers library failed with {str(cause)[:200]!r}") from None


class BytePairs:
    """The merging of one vocabulary. It never changes, and threads may share it.

    `ids` has the id of every token; each merge joins two of them to a third. With `whole` a piece that is a token is
    taken as it is, even if no merges lead to it.
    """

    def __init__(self, ids: Mapping[str, int], merges: Sequence[Merge], whole: bool, window: int = _WINDOW) -> None:
        self._model = models.BPE(vocab=dict(ids), merges=list(merges), ignore_merges=whole)
        # More than the longest token, so that `whole` cannot apply to a window.
        self._window = max(window, 8 * max(map(len, ids)))

    def encode(self, chars: str) -> list[int]:
        """Return the token ids of one piece.

        A long piece is cut into windows, with the result of the piece as a whole. Let A and B be encoded apart, x be
        the last token of A and y the first of B. Merging AB takes the same steps as merging A and B, up to the first
        step that joins a part of A to a part of B. These parts lie in x and in y, and the earlier steps within x and y
        are those of merging xy. If xy by itself encodes to x and y, there is no such step. Windows are cut where this
        holds.
        """
        with panics_as(InputError, f"a text of {len(chars)} bytes without a break cannot be encoded"):
            return self._encode(chars, self._window)

    def _encode(self, chars: str, width: int) -> list[int]:
        if width > _MAX_WINDOW:
            raise InputError(
                f"a text of {len(chars)} bytes without a break cannot be encoded: no place was found where this "
                "tokenizer's tokens could be cut; break the text with spaces or new lines"
            )
        found: list[int] = []
        start, tokens = 0, self._tokens(chars, 0, width)
        while len(chars) - start > 2 * width:
            for keep in range(3 * len(tokens) // 4, max(0, 3 * len(tokens) // 4 - 16), -1):
                after = start + sum(len(token.value) for token in tokens[:keep])
                following = self._tokens(chars, after, width)
                pair = [tokens[keep - 1], following[0]]
                joined = self._model.tokenize("".join(token.value for token in pair))
                if [token.id for token in joined] == [token.id for token in pair]:
                    break
            else:
                return self._encode(chars, 4 * width)
            found += [token.id for token in tokens[:keep]]
            start, tokens = after, following
        return found + [token.id for token in tokens]

    def _tokens(self, chars: str, start: int, width: int) -> list[tokenizers.Token]:
        """Return the tokens of a window, or of the rest of the text if that is less than two windows."""
        end = len(chars) if len(chars) - start <= 2 * width else start + width
        return self._model.tokenize(chars[start:end])


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
