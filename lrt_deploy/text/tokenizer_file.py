"""`tokenizer.json`: what it may hold, and the checked vocabulary that is read from it or from a tiktoken Encoding.

Files come from strangers, so only forms that are known are read, listed here with their source. Whatever else a file
holds is refused by name, before a library sees any of it:

    model           BPE over bytes; byte_fallback is accepted because all 256 bytes are tokens, so that it never acts
    pre_tokenizer   ByteLevel with use_regex, or Sequence[Split, ByteLevel], by a pattern of `split_patterns`
    decoder         ByteLevel
    normalizer      none
    post_processor  none, or ByteLevel, which changes offsets only
    added_tokens    special ones

They are what tokenizers writes for GPT-2's tokenizer, for nanochat's `HuggingFaceTokenizer`, and what this module
writes. `truncation` and `padding` are ignored: no text is cut or padded here.
This module encodes nothing, and it opens no files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrt_deploy.errors import CheckpointError
from lrt_deploy.files import parse_json

from .byte_pairs import BYTE_OF, MAX_TOKEN_BYTES, Merge, as_chars, merges_of, size_problem
from .chat import CONTROL_TOKENS
from .split_patterns import GPT2, PATTERNS, SplitPattern, known_pattern
from .tiktoken_pickle import EncodingData

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
# The two ways to say that every piece which the pattern matches is one; the known patterns match all of a text.
_WAYS = (("Removed", True), ("Isolated", False))


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
        """The ids of the ordinary tokens, which are written in printable characters."""
        special = set(self.special.values())
        return {as_chars(token): i for i, token in enumerate(self.tokens) if i not in special}


def from_encoding(data: EncodingData, source: str, vocab_size: int) -> Vocabulary:
    """The vocabulary that encodes every text as the tiktoken `Encoding` does.

    Raises CheckpointError for one that has more than `vocab_size` tokens, is not complete, or cannot be equalled.
    """
    ranks, special = data.mergeable_ranks, data.special_tokens
    _check_count(len(ranks) + len(special), vocab_size, source)
    ordinary = sorted(ranks, key=ranks.__getitem__)
    named = sorted(special, key=special.__getitem__)
    ids = [*(ranks[token] for token in ordinary), *(special[name] for name in named)]
    _check_ids(ids, source, "ordinary tokens first, then the special ones")
    _check_tokens(ordinary, named, source)
    pattern = _known(data.pat_str, source)
    return Vocabulary([*ordinary, *map(str.encode, named)], dict(special), merges_of(ranks), True, pattern)


def from_json(text: str, source: str, vocab_size: int) -> Vocabulary:
    """Read the text of a `tokenizer.json`.

    Raises CheckpointError for more than `vocab_size` tokens, for a form that is not known, and for a table of tokens
    that contradicts itself.
    """
    fields = _mapping(parse_json(text, source, CheckpointError), source, "the file")
    if fields.get("version", "1.0") != "1.0":
        raise CheckpointError(f"{source} has the version {_shown(fields['version'])}; known is 1.0")
    model = _mapping(fields.get("model"), source, "model")
    _check_model(model, source)
    for part in ("normalizer", "post_processor", "decoder"):
        _check_part(part, fields.get(part), source)
    pattern = _pattern_of(fields.get("pre_tokenizer"), source)
    special = _special_tokens(fields.get("added_tokens"), source)
    table = _ids(model.get("vocab"), source)
    _check_count(len(table.keys() | special.keys()), vocab_size, source)
    if wrong := [name for name in special if table.get(name, special[name]) != special[name]]:
        raise CheckpointError(
            f"{source}: {wrong[0][:100]!a} has the token id {table[wrong[0]]} and {special[wrong[0]]}"
        )
    ids = table | special
    names = sorted(ids, key=ids.__getitem__)
    _check_ids([ids[name] for name in names], source, "every id once, without gaps")
    tokens = [name.encode() if name in special else _as_bytes(name, source) for name in names]
    _check_tokens([tokens[i] for name, i in table.items() if name not in special], list(special), source)
    merges = _merges(model.get("merges"), table.keys() - special.keys(), source)
    return Vocabulary(tokens, special, merges, bool(model.get("ignore_merges")), pattern)


def to_json(vocabulary: Vocabulary) -> str:
    """The text of a `tokenizer.json` that tokenizers reads as the same tokenizer."""
    split = {"type": "Split", "pattern": {"Regex": vocabulary.pattern.text}, "behavior": "Isolated", "invert": False}
    special = sorted(vocabulary.special.items(), key=lambda item: item[1])
    vocab = vocabulary.ids
    if any(token < len(vocab) for _, token in special):  # else the library gives them other ids: the next free ones
        vocab = dict(sorted({**vocab, **vocabulary.special}.items(), key=lambda item: item[1]))
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    fields = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": name, **off, "special": True} for name, token in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL]},
        "post_processor": None,
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": vocabulary.whole,
            "vocab": vocab,
            "merges": vocabulary.merges,
        },
    }
    return json.dumps(fields, ensure_ascii=False)


# --- the forms -------------------------------------------------------------------------------------------------------


def _check_model(model: Mapping[str, Any], source: str) -> None:
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"{source} holds a {_shown(model.get('type'))} model; only byte-level BPE decodes without loss"
        )
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"):
        if model.get(option):
            raise CheckpointError(f"{source} sets {option} to {_shown(model[option])}; byte-level BPE must not have it")
    for option in ("byte_fallback", "ignore_merges"):
        if not isinstance(model.get(option, False), bool | None):
            raise CheckpointError(f"{source} sets {option} to {_shown(model[option])}, expected true or false")


def _check_part(part: str, value: object, source: str) -> None:
    kind = value.get("type") if isinstance(value, dict) else value
    if (value is None and part != "decoder") or (kind == "ByteLevel" and part != "normalizer"):
        return
    known = {"normalizer": "none", "post_processor": "none and ByteLevel", "decoder": "ByteLevel"}[part]
    raise CheckpointError(f"{source} has the {part} {_shown(kind)}; known for byte-level BPE is {known}")


def _pattern_of(value: object, source: str) -> SplitPattern:
    """The split pattern that a pre-tokenizer of a known form has."""
    parts = [value]
    if isinstance(value, dict) and value.get("type") == "Sequence" and isinstance(value.get("pretokenizers"), list):
        parts = value["pretokenizers"]
    kinds = [part.get("type") if isinstance(part, dict) else part for part in parts]
    byte_level = parts[-1] if kinds[-1:] == ["ByteLevel"] else None
    if not isinstance(byte_level, dict) or byte_level.get("add_prefix_space") is not False:
        found = "ByteLevel with add_prefix_space" if byte_level else _shown(kinds[:5] if value else value)
        raise CheckpointError(f"{source} has the pre-tokenizer {found}; {_KNOWN_PRE_TOKENIZERS}")
    if kinds == ["ByteLevel"] and byte_level.get("use_regex", True) is True:
        return GPT2
    if kinds == ["Split", "ByteLevel"] and byte_level.get("use_regex", True) is False:
        split = parts[0]
        assert isinstance(split, dict)
        pattern = split.get("pattern")
        if (split.get("behavior"), split.get("invert")) in _WAYS and isinstance(pattern, dict):
            return _known(pattern.get("Regex"), source)
    raise CheckpointError(f"{source} has the pre-tokenizer {_shown(value)}; {_KNOWN_PRE_TOKENIZERS}")


_KNOWN_PRE_TOKENIZERS = (
    "known are ByteLevel with use_regex, and a Sequence of Split (by a regex, Isolated or inverted and Removed) and "
    "ByteLevel, both without add_prefix_space"
)


def _known(text: object, source: str) -> SplitPattern:
    found = known_pattern(text) if isinstance(text, str) else None
    if found is None:
        names = ", ".join(pattern.name for pattern in PATTERNS)
        raise CheckpointError(
            f"{source} has the split pattern {_shown(text, 300)}, which is none of those that are known ({names}); "
            "export with --tokenizer none and give token ids instead of text"
        )
    return found


# --- the table of tokens ---------------------------------------------------------------------------------------------


def _special_tokens(entries: object, source: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in _list(entries or [], source, "added_tokens"):
        name, token = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or type(token) is not int or not _encodable(name):
            raise CheckpointError(
                f"{source} has the added token {_shown(entry)}, expected its content (Unicode text) and id"
            )
        if entry.get("special") is not True:
            reason = ", so any text could contain it" if name in CONTROL_TOKENS else "; only special tokens are known"
            raise CheckpointError(f"{source}: the added token {name[:100]!a} is not marked special{reason}")
        if name in found:
            raise CheckpointError(f"{source} has the added token {name[:100]!a} twice")
        found[name] = token
    return found


def _ids(table: object, source: str) -> dict[str, int]:
    ids = _mapping(table, source, "model.vocab")
    if wrong := [name for name, token in ids.items() if type(token) is not int]:
        raise CheckpointError(f"{source}: {wrong[0][:100]!a} has the token id {_shown(ids[wrong[0]])}, no whole number")
    return ids


def _merges(entries: object, known: set[str], source: str) -> list[Merge]:
    """Pairs of ordinary tokens that join to an ordinary token."""
    merges = []
    for entry in _list(entries, source, "model.merges"):
        parts = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise CheckpointError(f"{source} has the merge {_shown(entry)}, expected two tokens")
        left, right = parts
        if left not in known or right not in known or left + right not in known:
            raise CheckpointError(f"{source} has the merge {_shown(entry)}, whose parts or result are no tokens")
        merges.append((left, right))
    return merges


def _check_count(tokens: int, vocab_size: int, source: str) -> None:
    if tokens > vocab_size:
        raise CheckpointError(
            f"{source} has {tokens} tokens, more than the model's vocab_size of {vocab_size}; take the "
            "tokenizer that the checkpoint was trained with"
        )


def _check_ids(ids: Sequence[int], source: str, expected: str) -> None:
    """Refuse ids other than 0 to n-1, in this order."""
    for position, token in enumerate(ids):
        if token != position:
            raise CheckpointError(f"{source} has the token id {token} where {position} is expected ({expected})")


def _check_tokens(ordinary: Sequence[bytes], special: Sequence[str], source: str) -> None:
    """All bytes are tokens, special tokens are apart from ordinary ones, and lengths are within their bounds."""
    known, written = set(ordinary), set(map(as_chars, ordinary))
    if missing := [byte for byte in range(256) if bytes([byte]) not in known]:
        raise CheckpointError(
            f"{source}: {len(missing)} of the 256 bytes are no tokens ({missing[0]} is one), so texts have none"
        )
    for name in special:
        if not name or len(name) > MAX_TOKEN_BYTES or name in written or name.encode() in known:
            raise CheckpointError(
                f"{source}: the special token {name[:100]!a} is empty, too long, or an ordinary token too"
            )
    if problem := size_problem(ordinary):
        raise CheckpointError(f"{source} has {problem}")


def _as_bytes(name: str, source: str) -> bytes:
    try:
        return bytes(map(BYTE_OF.__getitem__, name))
    except KeyError as error:
        raise CheckpointError(
            f"{source}: the token {name[:100]!a} has the character {error.args[0]!a}, which stands for no byte in "
            "byte-level BPE"
        ) from error


def _encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _mapping(value: object, source: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: {what} is {_shown(value)}, expected an object; it is no tokenizer.json")
    return value


def _list(value: object, source: str, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise CheckpointError(f"{source}: {what} is {_shown(value)}, expected a list")
    return value


def _shown(value: object, length: int = 100) -> str:
    """A JSON value in few characters."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return ascii(value[:length])
    if isinstance(value, dict):
        return ascii({key: item for key, item in list(value.items())[:6] if not isinstance(item, dict | list)})[:length]
    return ascii(value[:6] if isinstance(value, list) else value)[:length]
