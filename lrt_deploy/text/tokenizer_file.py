"""The vocabulary of a `tokenizer.json` or of a tiktoken Encoding, checked.

Files come from strangers, so only these forms are read; others are refused by name before a library sees them:

    model           BPE over bytes; byte_fallback is accepted because all 256 bytes are tokens, so that it never acts
    pre_tokenizer   ByteLevel with use_regex, or Sequence[Split, ByteLevel], by a pattern of `byte_pairs`
    decoder         ByteLevel
    normalizer      none
    post_processor  none, or ByteLevel, which changes offsets only
    added_tokens    special ones

tokenizers writes these forms for GPT-2's tokenizer and for nanochat's `HuggingFaceTokenizer`. `truncation` and
`padding` are ignored: no text is cut or padded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tokenizers
from msgspec import Struct
from tokenizers import decoders, models, pre_tokenizers

from lrt_deploy.errors import CheckpointError
from lrt_deploy.fields import Whole, convert, raised_as, shown
from lrt_deploy.files import parse_json
from lrt_deploy.pickles import EncodingData, is_text

from . import byte_pairs
from .byte_pairs import Merge, SplitPattern
from .chat import CONTROL_TOKENS

# Parts of a pre-tokenizer, without trim_offsets, which changes no piece. Both splits are equal in meaning, because the
# known patterns match all of a text.
_PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": None}
_SPLITS = [
    {"type": "Split", "behavior": behavior, "invert": invert, "trim_offsets": None}
    for behavior, invert in (("Removed", True), ("Isolated", False))
]
_PARTS: dict[str, list[str | None]] = {
    "normalizer": [None],
    "post_processor": [None, "ByteLevel"],
    "decoder": ["ByteLevel"],
}
_UNUSED = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk")


class _Model(Struct):
    type: Literal["BPE"]
    vocab: dict[str, Whole]
    merges: list[str | tuple[str, str]]
    dropout: Any = None
    unk_token: Any = None
    continuing_subword_prefix: Any = None
    end_of_word_suffix: Any = None
    fuse_unk: Any = None
    byte_fallback: bool | None = None
    ignore_merges: bool | None = None


class _AddedToken(Struct):
    id: Whole
    content: str
    special: bool = False


class _File(Struct):
    """The fields of a `tokenizer.json` that are read; see `_check_forms` for those of type Any."""

    model: _Model
    added_tokens: list[_AddedToken] | None = None
    version: Literal["1.0"] = "1.0"
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    decoder: Any = None


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE tokenizer: the bytes of each token by id, special tokens by name, merges by priority.

    With `whole` a piece of text that is a token is taken as it is, whether or not merges lead to it, as in tiktoken.
    """

    tokens: list[bytes]
    special: dict[str, int]
    merges: list[Merge]
    whole: bool
    pattern: SplitPattern

    @property
    def ids(self) -> dict[str, int]:
        """Ids of the ordinary tokens, which are written in printable characters."""
        special = set(self.special.values())
        return {byte_pairs.as_chars(token): i for i, token in enumerate(self.tokens) if i not in special}


def from_encoding(data: EncodingData, source: str, vocab_size: int) -> Vocabulary:
    """Return the vocabulary that encodes every text as the tiktoken `Encoding` does.

    Raises CheckpointError for one that has more than `vocab_size` tokens, is not complete, or cannot be equalled.
    """
    ranks, special = data.mergeable_ranks, data.special_tokens
    ordinary = sorted(ranks, key=ranks.__getitem__)
    named = sorted(special, key=special.__getitem__)
    ids = [*(ranks[token] for token in ordinary), *(special[name] for name in named)]
    with raised_as(CheckpointError, f"{source}: "):
        _check_count(len(ids), vocab_size)
        _check_ids(ids, "ordinary tokens first, then the special ones")
        _check_tokens(ordinary, named)
        pattern = _known(data.pat_str)
    return Vocabulary([*ordinary, *map(str.encode, named)], dict(special), byte_pairs.merges_of(ranks), True, pattern)


def from_json(text: str, source: str, vocab_size: int) -> Vocabulary:
    """Read the text of a `tokenizer.json`.

    Raises CheckpointError for more than `vocab_size` tokens, for a form that is not known, and for a table of tokens
    that contradicts itself.
    """
    fields = parse_json(text, source, CheckpointError)
    with raised_as(CheckpointError, f"{source} is no tokenizer.json of byte-level BPE: "):
        file = convert(_File, fields)
    with raised_as(CheckpointError, f"{source}: "):
        return _vocabulary(file, vocab_size)


def _vocabulary(file: _File, vocab_size: int) -> Vocabulary:
    """Check a file whose fields have the right types; raises ValueError."""
    _check_forms(file)
    pattern, special, table = (
        _pattern_of(file.pre_tokenizer),
        _special_tokens(file.added_tokens or []),
        file.model.vocab,
    )
    _check_count(len(table.keys() | special.keys()), vocab_size)
    if wrong := [name for name in special if table.get(name, special[name]) != special[name]]:
        raise ValueError(f"{wrong[0][:100]!a} has the token id {table[wrong[0]]} and {special[wrong[0]]}")
    ids = table | special
    names = sorted(ids, key=ids.__getitem__)
    _check_ids([ids[name] for name in names], "every id once, without gaps")
    tokens = [name.encode() if name in special else _as_bytes(name) for name in names]
    _check_tokens([tokens[i] for name, i in table.items() if name not in special], list(special))
    merges = _merges(file.model.merges, table.keys() - special.keys())
    return Vocabulary(tokens, special, merges, bool(file.model.ignore_merges), pattern)


def to_json(vocabulary: Vocabulary) -> str:
    """Return the text of a `tokenizer.json` that tokenizers reads as the same tokenizer."""
    special = sorted(vocabulary.special.items(), key=lambda item: item[1])
    vocab = vocabulary.ids
    if any(token < len(vocab) for _, token in special):  # else the library gives them other ids: the next free ones
        vocab |= vocabulary.special
    model = models.BPE(vocab=vocab, merges=vocabulary.merges, ignore_merges=vocabulary.whole)
    made = tokenizers.Tokenizer(model)
    split = pre_tokenizers.Split(tokenizers.Regex(vocabulary.pattern.text), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name, _ in special])
    return made.to_str()


def _check_forms(file: _File) -> None:
    for option in _UNUSED:
        if value := getattr(file.model, option):
            raise ValueError(f"it sets {option} to {shown(value)}; byte-level BPE must not have it")
    for part, allowed in _PARTS.items():
        if (kind := _kind(getattr(file, part))) not in allowed:
            known = " and ".join(name or "none" for name in allowed)
            raise ValueError(f"it has the {part} {kind and shown(kind)}; known for byte-level BPE is {known}")


def _kind(part: object) -> object:
    return part.get("type") if isinstance(part, dict) else part


def _pattern_of(value: object) -> SplitPattern:
    """Return the split pattern of a pre-tokenizer of a known form."""
    listed = value.get("pretokenizers") if isinstance(value, dict) and value.get("type") == "Sequence" else None
    parts = listed if isinstance(listed, list) else [value]
    *first, last = [{**part, "trim_offsets": None} if isinstance(part, dict) else {} for part in parts] or [{}]
    if not first and last in (_PLAIN, _PLAIN | {"use_regex": True}):
        return byte_pairs.GPT2
    if len(first) == 1 and last == _PLAIN | {"use_regex": False}:
        pattern = first[0].pop("pattern", None)
        if first[0] in _SPLITS and isinstance(pattern, dict):
            return _known(pattern.get("Regex"))
    found = ascii(parts[0] if len(parts) == 1 else list(map(_kind, parts)))[:150]
    raise ValueError(
        f"it has the pre-tokenizer {found}; known are ByteLevel with use_regex, and a Sequence of Split (by a "
        "regex, Isolated or inverted and Removed) and ByteLevel, both without add_prefix_space"
    )


def _known(text: object) -> SplitPattern:
    found = byte_pairs.known_pattern(text) if isinstance(text, str) else None
    if found is None:
        names = ", ".join(pattern.name for pattern in byte_pairs.PATTERNS)
        raise ValueError(
            f"it has the split pattern {ascii(text)[:300]}, which is none of those that are known ({names}); "
            "export with --tokenizer none and give token ids instead of text"
        )
    return found


def _special_tokens(entries: Sequence[_AddedToken]) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in entries:
        name = entry.content
        if not is_text(name):
            raise ValueError(f"it has the added token {name[:100]!a}, expected its content to be Unicode text")
        if not entry.special:
            reason = ", so any text could contain it" if name in CONTROL_TOKENS else "; only special tokens are known"
            raise ValueError(f"the added token {name[:100]!a} is not marked special{reason}")
        if name in found:
            raise ValueError(f"it has the added token {name[:100]!a} twice")
        found[name] = entry.id
    return found


def _merges(entries: Sequence[str | tuple[str, str]], known: set[str]) -> list[Merge]:
    """Return pairs of ordinary tokens that join to an ordinary token."""
    merges = []
    for entry in entries:
        left, _, right = entry.partition(" ") if isinstance(entry, str) else (entry[0], "", entry[1])
        if left not in known or right not in known or left + right not in known:
            raise ValueError(f"it has the merge {shown(entry)}, whose parts or result are no tokens")
        merges.append((left, right))
    return merges


def _check_count(tokens: int, vocab_size: int) -> None:
    if tokens > vocab_size:
        raise ValueError(
            f"it has {tokens} tokens, more than the model's vocab_size of {vocab_size}; take the "
            "tokenizer that the checkpoint was trained with"
        )


def _check_ids(ids: Sequence[int], expected: str) -> None:
    """Raise ValueError for ids other than 0 to n-1, in this order."""
    for position, token in enumerate(ids):
        if token != position:
            raise ValueError(f"it has the token id {token} where {position} is expected ({expected})")


def _check_tokens(ordinary: Sequence[bytes], special: Sequence[str]) -> None:
    """Raise ValueError unless all bytes are tokens, special tokens are no ordinary ones, and lengths in bounds."""
    known, written = set(ordinary), set(map(byte_pairs.as_chars, ordinary))
    if missing := [byte for byte in range(256) if bytes([byte]) not in known]:
        raise ValueError(f"{len(missing)} of the 256 bytes are no tokens ({missing[0]} is one), so texts have none")
    for name in special:
        if not name or len(name) > byte_pairs.MAX_TOKEN_BYTES or name in written or name.encode() in known:
            raise ValueError(f"the special token {name[:100]!a} is empty, too long, or an ordinary token too")
    if problem := byte_pairs.size_problem(ordinary):
        raise ValueError(f"it has {problem}")


def _as_bytes(name: str) -> bytes:
    try:
        return bytes(map(byte_pairs.BYTE_OF.__getitem__, name))
    except KeyError as error:
        raise ValueError(
            f"the token {name[:100]!a} has the character {error.args[0]!a}, which stands for no byte in byte-level BPE"
        ) from error
