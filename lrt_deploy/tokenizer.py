"""Text to token ids and back: converts a checkpoint's tokenizer into the bundle's, and is the tokenizer at run time.

Knows byte-level byte-pair encoding, the authors' special tokens and their chat form. The bundle's tokenizer encodes
exactly as the tiktoken `Encoding` that the model was trained with, or the conversion refuses; decoding is done here,
from bytes, because a token may be a part of a character.
It imports neither torch nor tiktoken, and it does not read pickles (see `pickles`) or the authors' `token_bytes.pt`
(the byte lengths follow from the tokens). It does not hash or verify files: that is the manifest's work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from .chat_form import ASSISTANT_END, ASSISTANT_START, BOS, CONTROL_TOKENS, USER_END, USER_START, turns
from .errors import BundleError, CheckpointError, InputError
from .pickles import MAX_FILE_BYTES, EncodingData, read_encoding

TOKENIZER_FILE = "tokenizer.json"
BYTE_LENGTHS_FILE = "token_bytes.json"

# The printable stand-ins for the 256 bytes in byte-level vocabularies, GPT-2's table.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHAR_OF = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
_BYTE_OF = {char: byte for byte, char in _CHAR_OF.items()}

# What a split pattern may be made of: constructs that mean the same to tiktoken's regex engine and to tokenizers'
# (measured over all code points). `$`, `^`, `\w`, `{m,n}+` and lazy quantifiers are among those that do not.
_PATTERN = re.compile(
    r"""(?: \(\?i: (?:(?!s[st])[sdmtlver'|\[\]])+ \) | \(\?!\\S\)
        | \[\^?(?:\\p\{(?:L[ulmto]?|[NMPS]|Han)\}|\\[sSrnt]|[^\\\[\]&^-])+\]
        | \\p\{(?:L[ulmto]?|[NMPS]|Han)\} | \\[sSrnt] | [^\\\[\](){}.^$|?*+&-] | \|
        | [?*+]\+?(?![?*+]) | \{\d+(?:,\d*)?\}(?![?*+]) )+""",
    re.VERBOSE,
)


class SourceTokenizer(NamedTuple):
    """A checkpoint's tokenizer in the bundle's form: the text of `tokenizer.json`, and each token's byte length."""

    json: str
    byte_lengths: list[int]


class _Vocabulary(NamedTuple):
    """The bytes of each token by id, and the ids of the special tokens."""

    tokens: list[bytes]
    special: dict[str, int]


def load_source_tokenizer(folder: Path, vocab_size: int) -> SourceTokenizer:
    """Read the tokenizer beside a checkpoint: the authors' `tokenizer.pkl`, or else a byte-level `tokenizer.json`.

    The model's `vocab_size` must cover every token; it may be larger.
    """
    if (path := folder / "tokenizer.pkl").exists():
        text = convert_encoding(read_encoding(path)).to_str()
    elif (path := folder / TOKENIZER_FILE).exists():
        text = _read_text(path)
    else:
        raise CheckpointError(f"{folder} has neither tokenizer.pkl nor {TOKENIZER_FILE}; name the tokenizer's folder")
    _, vocabulary = _parse(text, str(path))
    if len(vocabulary.tokens) > vocab_size:
        raise CheckpointError(
            f"{path} has {len(vocabulary.tokens)} tokens, more than the model's vocab_size of {vocab_size}; take the "
            "tokenizer that the checkpoint was trained with"
        )
    return SourceTokenizer(text, token_byte_lengths(vocabulary.tokens, vocabulary.special.values()))


def write_tokenizer(folder: Path, source: SourceTokenizer) -> tuple[Path, Path]:
    """Write what `Tokenizer.open` reads into an existing folder; the paths of both files."""
    (table := folder / TOKENIZER_FILE).write_text(source.json, encoding="utf-8")
    (lengths := folder / BYTE_LENGTHS_FILE).write_text(json.dumps(source.byte_lengths), encoding="utf-8")
    return table, lengths


def token_byte_lengths(tokens: Sequence[bytes], special_ids: Collection[int]) -> list[int]:
    """Bytes that each token counts in bits per byte: its decoded text in UTF-8; 0 for a special token.

    A byte that is no text by itself decodes to the replacement character and counts 3, as the authors count it.
    """
    lengths = [len(token.decode("utf-8", errors="replace").encode("utf-8")) for token in tokens]
    for token in special_ids:
        lengths[token] = 0
    return lengths


def convert_encoding(data: EncodingData) -> tokenizers.Tokenizer:
    """The tokenizer that encodes every text as the tiktoken `Encoding` does.

    tiktoken merges any two neighbours that join to a token, lowest rank first, so every way to split a token in two
    is a merge here. Only one of them can ever occur: what happens inside a token's span does not depend on its
    surroundings. A piece that is a token as a whole is taken as it is (`ignore_merges`), and text that the pattern
    does not match is dropped, again as tiktoken does.
    """
    _check_encoding(data)
    ranks = dict(sorted(data.mergeable_ranks.items(), key=lambda item: item[1]))
    splits = ((token[:i], token[i:]) for token in ranks for i in range(1, len(token)))
    merges = [(_as_chars(left), _as_chars(right)) for left, right in splits if left in ranks and right in ranks]
    vocabulary = {_as_chars(token): rank for token, rank in ranks.items()}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(data.pat_str), behavior="removed", invert=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted(data.special_tokens, key=data.special_tokens.__getitem__)
    tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in special])
    return tokenizer


def _check_encoding(data: EncodingData) -> None:
    ordinary, special = sorted(data.mergeable_ranks.values()), sorted(data.special_tokens.values())
    _require_ids([*ordinary, *special], "tiktoken Encoding", "ordinary tokens first, then the special ones")
    if missing := [byte for byte in range(256) if bytes([byte]) not in data.mergeable_ranks]:
        raise CheckpointError(f"tiktoken Encoding: {len(missing)} of the 256 bytes are no tokens ({missing[0]} is one)")
    known = {_as_chars(token) for token in data.mergeable_ranks}
    if doubled := [name for name in data.special_tokens if name in known or not name]:
        raise CheckpointError(f"tiktoken Encoding: the special token {doubled[0]!r} is empty or an ordinary token too")
    if not _PATTERN.fullmatch(data.pat_str):
        raise CheckpointError(
            f"tiktoken Encoding: its split pattern {data.pat_str[:200]!r} has parts of which it is not known that both "
            f"regex engines read them alike; use a tokenizer folder with a {TOKENIZER_FILE} made for this model"
        )
    try:
        Regex(data.pat_str)
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(f"tiktoken Encoding: split pattern {data.pat_str[:200]!r}: {error}") from error


def _require_ids(ids: Sequence[int], source: str, expected: str) -> None:
    """Refuse ids other than 0 to n-1, in this order."""
    for position, token in enumerate(ids):
        if token != position:
            raise CheckpointError(f"{source} has the token id {token} where {position} is expected ({expected})")


def _as_chars(token: bytes) -> str:
    return "".join(map(_CHAR_OF.__getitem__, token))


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_FILE_BYTES} bytes; no tokenizer is")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _parse(text: str, source: str) -> tuple[tokenizers.Tokenizer, _Vocabulary]:
    """Load a byte-level BPE `tokenizer.json` and make sure that it does what its table of tokens says."""
    try:
        vocabulary = _read_vocabulary(json.loads(text), source)
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except CheckpointError:
        raise
    except Exception as error:  # json has several types for this, and the library raises bare exceptions
        found = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(f"{source} is not a tokenizer that the tokenizers library can read ({found})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    for content, token in vocabulary.special.items():
        if tokenizer.token_to_id(content) != token or token in _encode(tokenizer, content):
            raise CheckpointError(f"{source}: {content!r} is not kept apart from ordinary text as token {token}")
    return tokenizer, vocabulary


def _read_vocabulary(fields: dict[str, Any], source: str) -> _Vocabulary:
    model = fields["model"]
    _require_byte_level(fields, source)
    entries = fields.get("added_tokens") or []
    added = {entry["content"]: entry["id"] for entry in entries}
    special = {entry["content"]: entry["id"] for entry in entries if entry["special"]}
    if plain := sorted((added.keys() - special.keys()) & CONTROL_TOKENS):
        raise CheckpointError(f"{source}: {plain[0]} is not marked special, so any text could contain it")
    ids = model["vocab"] | added
    names = sorted(ids, key=ids.__getitem__)
    _require_ids([ids[name] for name in names], source, "every id once, without gaps")
    tokens = [name.encode() if name in added else bytes(map(_BYTE_OF.__getitem__, name)) for name in names]
    if missing := set(range(256)) - {token[0] for token in tokens if len(token) == 1}:
        raise CheckpointError(f"{source}: {len(missing)} of the 256 bytes are no tokens; some texts have no encoding")
    return _Vocabulary(tokens, special)


def _require_byte_level(fields: dict[str, Any], source: str) -> None:
    model, split = fields["model"], fields["pre_tokenizer"] or {}
    kinds = {split.get("type"), *(part["type"] for part in split.get("pretokenizers", []))}
    if model.get("type") != "BPE" or "ByteLevel" not in kinds:
        raise CheckpointError(f"{source} holds a {model.get('type')} model; only byte-level BPE decodes without loss")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise CheckpointError(
                f"{source} sets {option} to {str(model[option])[:50]}; byte-level BPE must not have it"
            )


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    # The batch call skips the offsets, which takes half the time.
    return list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)


class Tokenizer:
    """The tokenizer of an opened bundle. It never changes, and threads may share it.

    Special tokens are never read out of text: only `encode_prompt` and `render_chat` put them in.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocabulary: _Vocabulary, byte_lengths: list[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = vocabulary.tokens
        self.special_tokens: dict[str, int] = dict(vocabulary.special)
        self.byte_lengths: tuple[int, ...] = tuple(byte_lengths)

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """Read the bundle's tokenizer folder: `tokenizer.json` and `token_bytes.json`."""
        path = folder / BYTE_LENGTHS_FILE
        try:
            tokenizer, vocabulary = _parse(_read_text(folder / TOKENIZER_FILE), str(folder / TOKENIZER_FILE))
            lengths = json.loads(_read_text(path))
        except (CheckpointError, ValueError, RecursionError) as error:
            raise BundleError(f"the tokenizer of the bundle is damaged: {error}; export the bundle again") from error
        if lengths != token_byte_lengths(vocabulary.tokens, vocabulary.special.values()):
            raise BundleError(f"{path} does not fit the tokens of {TOKENIZER_FILE}; export the bundle again")
        return cls(tokenizer, vocabulary, lengths)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are; the model may have more rows."""
        return len(self._tokens)

    @property
    def bos_id(self) -> int:
        """The token that begins every text."""
        return self._special_id(BOS)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer; all others, special or not, are output."""
        return frozenset(self.special_tokens[name] for name in (ASSISTANT_END, BOS) if name in self.special_tokens)

    def encode(self, text: str) -> list[int]:
        """The tokens of ordinary text; the name of a special token in it is text like any other."""
        if not isinstance(text, str):
            raise InputError(f"a text is expected, found {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # surrogates: pairs become their character, lone ones U+FFFD, as in tiktoken
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return _encode(self._tokenizer, text)

    def encode_prompt(self, text: str) -> list[int]:
        """The tokens of a text prompt: `<|bos|>` and the text."""
        return [self.bos_id, *self.encode(text)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the tokens, special ones by name; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes_of, tokens)).decode("utf-8", errors="replace")

    def token_bytes_of(self, token: int) -> bytes:
        """The bytes of one token, which may be a part of a character; the name of a special token."""
        if not 0 <= token < len(self._tokens):
            raise InputError(f"token id {token} has no text; the tokenizer has the ids 0 to {len(self._tokens) - 1}")
        return self._tokens[token]

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation up to where the assistant answers.

        Messages are `{"role": …, "content": …}`: an optional system message, then user and assistant in turns, a user
        last. The system message is joined to the first user message by a blank line.
        """
        tokens = [self.bos_id]
        for role, content in turns(messages):
            start, end = (USER_START, USER_END) if role == "user" else (ASSISTANT_START, ASSISTANT_END)
            tokens += [self._special_id(start), *self.encode(content), self._special_id(end)]
        return [*tokens, self._special_id(ASSISTANT_START)]

    def _special_id(self, name: str) -> int:
        if name not in self.special_tokens:
            raise InputError(f"the tokenizer has no {name}, which prompts and chats need; give token ids instead")
        return self.special_tokens[name]
