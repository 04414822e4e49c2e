"""Byte-pair encoding of one piece of text by the merges of a vocabulary.

Tokens are written in the printable characters of byte-level vocabularies, one for each byte (GPT-2's table). The
tokenizers library's BPE model merges them; it is given checked tokens and merges only.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence

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

        A long piece is cut into windows, and the result equals that of the piece as a whole. Let A and B be encoded
        apart, x be the last token of A and y the first of B. Merging AB takes the same steps as merging A and B, up to
        the first step that joins a part of A to a part of B. These parts lie in x and in y, and the earlier steps
        within x and y are those of merging xy. If xy by itself encodes to x and y, there is no such step. Windows are
        cut where this holds.
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
