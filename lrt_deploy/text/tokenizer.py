"""The tokenizer: read a checkpoint's, write and open a bundle's, encode and decode text.

The bundle's tokenizer encodes exactly as the tiktoken `Encoding` that the model was trained with, or the conversion is
refused. The authors' `token_bytes.pt` is not read, since the byte lengths follow from the tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

from lrt_deploy.errors import BundleError, CheckpointError, InputError
from lrt_deploy.fields import shown
from lrt_deploy.files import read_json, read_text
from lrt_deploy.pickles import MAX_FILE_BYTES, read_encoding

from . import tokenizer_file
from .byte_pairs import BytePairs, Splitter, as_chars
from .chat import ASSISTANT_END, ASSISTANT_START, BOS, ROLES, USER_END, USER_START, check_messages, turns
from .chat_template import (
    CONFIG_FILE,
    TEMPLATE_FILE,
    ChatRenderer,
    ChatTemplate,
    load_template,
    template_files,
)
from .tokenizer_file import Vocabulary

PICKLE_FILE = "tokenizer.pkl"
TOKENIZER_FILE = "tokenizer.json"
BYTE_LENGTHS_FILE = "token_bytes.json"

# A token takes about 20 bytes of a pickle and 200 of an indented tokenizer.json with its merges.
_FILE_BYTES, _TOKEN_FILE_BYTES = 2**20, 1024
# Pieces whose tokens are remembered: most text is made of few words.
_CACHED_PIECES, _CACHED_LENGTH = 2**15, 32


class SourceTokenizer(NamedTuple):
    """A checkpoint's tokenizer in the bundle's form: the text of `tokenizer.json`, and each token's byte length.

    `template` is the chat template that lies beside it, if any.
    """

    json: str
    byte_lengths: list[int]
    template: ChatTemplate | None = None


def tokenizer_folder(checkpoint: Path) -> Path | None:
    """Return the folder with the tokenizer of the checkpoint in the folder `checkpoint`, by names alone; None: none.

    Searched are the checkpoint's folder `tokenizer`, the checkpoint's own folder, as on the Hub, and the authors'
    place, the folder `tokenizer` beside `base_checkpoints`.
    """
    home = checkpoint.resolve().parent.parent
    return next(filter(_held, (checkpoint / "tokenizer", checkpoint, home / "tokenizer")), None)


def source_files(folder: Path) -> list[Path]:
    """Return the files in a folder that `load_source_tokenizer` reads, by names alone."""
    beside = [folder / name for name in (TEMPLATE_FILE, CONFIG_FILE)]
    return _held(folder)[:1] + [path for path in beside if os.path.lexists(path)]


def _held(folder: Path) -> list[Path]:
    """Return the tokenizer's files in a folder, the one that is read first."""
    return [folder / name for name in (PICKLE_FILE, TOKENIZER_FILE) if os.path.lexists(folder / name)]


def load_source_tokenizer(path: Path, vocab_size: int) -> SourceTokenizer:
    """Read a checkpoint's tokenizer: the authors' `tokenizer.pkl`, or else a byte-level `tokenizer.json`.

    `path` is the folder that holds one of them, or the file itself. The model's `vocab_size` must cover every token; it
    may be larger. Raises CheckpointError.
    """
    if not os.path.lexists(path):
        raise CheckpointError(f"{path} does not exist; name the tokenizer's folder, or its file")
    if path.is_dir():
        if not (held := _held(path)):
            raise CheckpointError(
                f"{path} has neither {PICKLE_FILE} nor {TOKENIZER_FILE}; name the tokenizer's folder or file"
            )
        path = held[0]
    limit = _size_limit(vocab_size)
    if path.suffix == ".json":
        text = read_text(path, "the tokenizer", CheckpointError, limit)
        vocabulary = tokenizer_file.from_json(text, str(path), vocab_size)
    elif path.suffix == ".pkl":
        vocabulary = tokenizer_file.from_encoding(read_encoding(path, limit), str(path), vocab_size)
    else:
        raise CheckpointError(f"{path} is neither a folder nor a file whose name ends in .pkl or .json")
    lengths = token_byte_lengths(vocabulary.tokens, vocabulary.special.values())
    return SourceTokenizer(tokenizer_file.to_json(vocabulary), lengths, load_template(path.parent))


def _size_limit(tokens: int) -> int:
    return min(_FILE_BYTES + _TOKEN_FILE_BYTES * tokens, MAX_FILE_BYTES)


def tokenizer_texts(source: SourceTokenizer) -> dict[str, str]:
    """Return the text of each file that `Tokenizer.open` reads, by name."""
    texts = {TOKENIZER_FILE: source.json, BYTE_LENGTHS_FILE: json.dumps(source.byte_lengths)}
    return texts if source.template is None else texts | template_files(source.template)


def write_tokenizer(folder: Path, source: SourceTokenizer) -> None:
    """Write the files that `Tokenizer.open` reads into an existing folder."""
    for name, text in tokenizer_texts(source).items():
        (folder / name).write_text(text, encoding="utf-8", newline="")


def token_byte_lengths(tokens: Sequence[bytes], special_ids: Collection[int]) -> list[int]:
    """Return the bytes that each token counts in bits per byte: its decoded text in UTF-8; 0 for a special token.

    A byte that is no text by itself decodes to the replacement character and counts 3, as in the authors' code.
    """
    lengths = [len(token.decode("utf-8", errors="replace").encode("utf-8")) for token in tokens]
    for token in special_ids:
        lengths[token] = 0
    return lengths


class Tokenizer:
    """The tokenizer of an opened bundle. It never changes, and threads may share it.

    Special tokens are never read out of text: only `encode_prompt` and `render_chat` put them in.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary, self._tokens = vocabulary, vocabulary.tokens
        self._splitter = Splitter(vocabulary.pattern)
        self._pairs = BytePairs(vocabulary.ids, vocabulary.merges, vocabulary.whole)
        self._cache: dict[str, list[int]] = {}
        self.special_tokens: dict[str, int] = dict(vocabulary.special)
        self.byte_lengths: tuple[int, ...] = tuple(token_byte_lengths(self._tokens, self.special_tokens.values()))
        special = set(self.special_tokens.values())
        self.longest_token_bytes = max(len(token) for i, token in enumerate(self._tokens) if i not in special)
        """Bytes of the longest ordinary token."""
        self.chat: ChatRenderer | None = None
        """Renders chats by the checkpoint's own template; None: by the authors' chat form."""

    @classmethod
    def open(cls, folder: Path, tokens: int | None = None, template: bool = False) -> Tokenizer:
        """Read the bundle's tokenizer folder: `tokenizer.json` and `token_bytes.json`.

        With `template` also the chat template. `tokens` is the number of tokens that the manifest states (None: any
        number). Raises BundleError.
        """
        path, lengths_path = folder / TOKENIZER_FILE, folder / BYTE_LENGTHS_FILE
        most = MAX_FILE_BYTES if tokens is None else tokens
        limit = _size_limit(most)
        try:
            text = read_text(path, "the tokenizer", CheckpointError, limit)
            vocabulary = tokenizer_file.from_json(text, str(path), most)
            lengths = read_json(lengths_path, "the table of byte lengths", CheckpointError, limit)
        except CheckpointError as error:
            raise BundleError(f"the tokenizer of the bundle is damaged: {error}; export the bundle again") from error
        if tokens is not None and len(vocabulary.tokens) != tokens:
            raise BundleError(
                f"{path} has {len(vocabulary.tokens)} tokens where the manifest says {tokens}; export the bundle again"
            )
        opened = cls(vocabulary)
        if lengths != list(opened.byte_lengths):
            raise BundleError(f"{lengths_path} does not fit the tokens of {TOKENIZER_FILE}; export the bundle again")
        if template and (found := load_template(folder, BundleError)) is not None:
            opened.chat = ChatRenderer(found, opened.special_tokens, str(folder / TEMPLATE_FILE))
        return opened

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the model may have more rows."""
        return len(self._tokens)

    @property
    def bos_id(self) -> int:
        """Id of the token that begins every text."""
        return self._special_id(BOS)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids of the tokens that end an answer; all others, special or not, are output."""
        names = {ASSISTANT_END, BOS}
        if self.chat is not None:
            names.add(self.chat.template.tokens.get("eos_token", BOS))
        return frozenset(self.special_tokens[name] for name in names if name in self.special_tokens)

    def to_json(self) -> str:
        """Return the text of a `tokenizer.json` of this tokenizer."""
        return tokenizer_file.to_json(self._vocabulary)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of ordinary text; the name of a special token in it is text like any other."""
        if not isinstance(text, str):
            raise InputError(f"a text is expected, found {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # surrogates: pairs become their character, lone ones U+FFFD, as in tiktoken
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = []
        cached = self._cache.get
        for piece in self._splitter.pieces(text):
            ids += cached(piece) or self._encode_piece(piece)
        return ids

    def encode_prompt(self, text: str, capacity: int | None = None) -> list[int]:
        """Return the tokens of a text prompt: `<|bos|>` and the text.

        Raises InputError, before anything is encoded, for a text that cannot fit into `capacity` tokens because it has
        more bytes than so many of the longest token.
        """
        if capacity is not None:
            self.check_fits(text, capacity)
        return [self.bos_id, *self.encode(text)]

    def check_fits(self, text: str, capacity: int) -> None:
        """Raise InputError if a text has more bytes than `capacity` tokens can stand for."""
        longest, least = self.longest_token_bytes, len(text)  # a character has one byte or more
        if least <= capacity * longest:
            least = len(text.encode("utf-8", "replace"))
        if least > capacity * longest:
            raise InputError(
                f"the text has at least {least} bytes, which are {least // longest} tokens or more; "
                f"the capacity is {capacity} tokens. Shorten it, or export with a larger --max-seq-len"
            )

    def _encode_piece(self, piece: str) -> list[int]:
        ids = self._pairs.encode(as_chars(piece.encode()))
        if len(piece) <= _CACHED_LENGTH:
            if len(self._cache) >= _CACHED_PIECES:
                self._cache.clear()
            self._cache[piece] = ids
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of the tokens, special ones by name; bytes that are no UTF-8 become U+FFFD."""
        try:
            items = iter(tokens)
        except TypeError as error:
            raise InputError(f"tokens is {shown(tokens)}, expected a list of token ids") from error
        return b"".join(map(self.token_bytes_of, items)).decode("utf-8", errors="replace")

    def token_bytes_of(self, token: int) -> bytes:
        """Return the bytes of one token, which may be a part of a character; the name of a special token."""
        if type(token) is not int and (isinstance(token, bool) or not isinstance(token, Integral)):
            raise InputError(f"a token id is {shown(token)}, expected a whole number")
        if not 0 <= token < len(self._tokens):
            raise InputError(
                f"token id {shown(token)} has no text; the tokenizer has the ids 0 to {len(self._tokens) - 1}"
            )
        return self._tokens[token]

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the tokens of a conversation, messages `{"role": …, "content": …}`, up to where the assistant answers.

        By a template of the checkpoint, which says in what order roles may speak; without one, an optional system
        message comes first, then user and assistant in turns, a user last. Raises InputError for another order.
        """
        if self.chat is not None:
            listed = [{"role": role, "content": content} for role, content in check_messages(messages)]
            if unknown := [message["role"] for message in listed if message["role"] not in ROLES]:
                raise InputError(f"a message has the role {shown(unknown[0])}, expected one of {', '.join(ROLES)}")
            pieces = self.chat.pieces(listed)
            found = [[self.special_tokens[text]] if special else self.encode(text) for text, special in pieces]
            if not any(found):
                raise InputError("the chat template makes an empty text of these messages")
            return [token for piece in found for token in piece]
        tokens = [self.bos_id]
        for role, content in turns(messages):
            start, end = (USER_START, USER_END) if role == "user" else (ASSISTANT_START, ASSISTANT_END)
            tokens += [self._special_id(start), *self.encode(content), self._special_id(end)]
        return [*tokens, self._special_id(ASSISTANT_START)]

    def _special_id(self, name: str) -> int:
        if name not in self.special_tokens:
            raise InputError(f"the tokenizer has no {name}, which prompts and chats need; give token ids instead")
        return self.special_tokens[name]
