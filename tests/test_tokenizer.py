"""The bundle's tokenizer equals the tiktoken Encoding it was made from, and refuses what it cannot equal."""

import dataclasses
import json
import pickle
import pydoc_data.topics
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers

from lrt_deploy.errors import BundleError, CheckpointError, InputError
from lrt_deploy.pickles import EncodingData, read_encoding
from lrt_deploy.text.byte_pairs import PATTERNS, known_pattern
from lrt_deploy.text.tokenizer import (
    SourceTokenizer,
    Tokenizer,
    load_source_tokenizer,
    token_byte_lengths,
    write_tokenizer,
)
from lrt_deploy.text.tokenizer_file import Vocabulary, from_encoding

GOLDEN = Path(__file__).parent / "data" / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/tokenizer/tokenizer.pkl"))
PATTERN = read_encoding(FOLDERS[0] / "tokenizer.pkl").pat_str
KNOWN_PATTERNS = {f"{p.name} {i}": text for p in PATTERNS for i, text in enumerate((p.text, *p.spellings))}
SPECIAL = (
    *("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
    *("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
)
TEXTS = [
    "",
    " ",
    "\n",
    "\x00",
    "Hello, world! It's 12345 o'clock; WE'LL see, they'Ve, I'ſ, 'K K's",
    "  two  spaces\t\ttabs \r\n\r\n  \n \u00a0\u2003\u3000 wide \u200b\u200d\ufeff end   ",
    "Größe, naïve café, ÅÉÎ, straße ẞ ﬁ ﬆ, İstanbul ıi, Ελληνικά, русский язык, עברית, العربية ١٢٣",
    "中文分词很有趣。日本語のテキスト、カタカナ、한국어 문장, ไทย, हिन्दी, தமிழ், ქართული 𐍈 𝔘𝔫𝔦 Ⅷ ½ ²³",
    "😀👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽 e\u0301 a\u0308\u0323 \U000e0041\U0010ffff\ue000\ufffe\ufffd",
    "def f(x):\n\treturn x**2  # comment\n\n\nclass A:\n    pass\n",
    " ".join(SPECIAL) + "".join(SPECIAL) + "<|bos|" + "<|endoftext|>",
    "a" * 3000 + " " * 3000 + "\n" * 300 + "=" * 777 + "ab" * 900 + "1" * 501,
    "".join(map(chr, range(0x20, 0x2FF))),
]


def encoding_of(data: EncodingData) -> tiktoken.Encoding:
    return tiktoken.Encoding(**dataclasses.asdict(data))


def opened(data: EncodingData, folder: Path) -> Tokenizer:
    """Through the same files as an export."""
    source = folder / "source"
    bundle = folder / "bundle"
    source.mkdir()
    bundle.mkdir()
    (source / "tokenizer.pkl").write_bytes(pickle.dumps(encoding_of(data), 4))
    write_tokenizer(bundle, load_source_tokenizer(source, 2**20))
    return Tokenizer.open(bundle)


def with_special(ranks: dict[bytes, int], pattern: str = PATTERN) -> EncodingData:
    return EncodingData("test", pattern, ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL)})


def trained(size: int) -> EncodingData:
    """A vocabulary of real size with the authors' pattern, trained on what Python ships."""
    trainee = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    trainee.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    trainee.train_from_iterator(corpus(), trainer)
    ranks, table = {bytes([byte]): byte for byte in range(256)}, byte_of_character()
    for left, right in json.loads(trainee.to_str())["model"]["merges"]:
        ranks.setdefault(bytes(table[char] for char in left + right), len(ranks))
    return with_special(ranks)


def byte_of_character() -> dict[str, int]:
    """The library's byte-level characters, read off texts that hold every byte that UTF-8 has."""
    split = pre_tokenizers.ByteLevel(False, use_regex=False)
    points = [*range(0xD800), *range(0x10000, 0x110000, 4093)]
    words = ((split.pre_tokenize_str(chr(point))[0][0], chr(point).encode()) for point in points)
    return {char: byte for word, data in words for char, byte in zip(word, data, strict=True)}


def corpus() -> list[str]:
    library = Path(json.__file__).parents[1]
    return [*pydoc_data.topics.topics.values(), *(p.read_text(errors="replace") for p in sorted(library.glob("*.py")))]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return from_encoding(trained(8192), "f", 2**20)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[tiktoken.Encoding, Tokenizer]:
    data = trained(32768)
    return encoding_of(data), opened(data, tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> tuple[tiktoken.Encoding, Tokenizer]:
    data = read_encoding(FOLDERS[0] / "tokenizer.pkl")
    return encoding_of(data), opened(data, tmp_path_factory.mktemp("golden"))


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)  # noqa: S311
    ranges = [
        (0x20, 0x7F),
        (0x20, 0x7F),
        (0xA0, 0x250),
        (0x370, 0x600),
        (0x900, 0xE00),
        (0x3040, 0x9FFF),
        (0x1F300, 0x1FAFF),
    ]
    spaces = [" ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", ""]

    def word() -> str:
        low, high = rng.choice(ranges)
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 12)))

    return ["".join(word() + rng.choice(spaces) for _ in range(rng.randrange(12))) for _ in range(count)]


# --- equal to tiktoken -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parts[-2])
def test_golden_tokenizers_encode_and_count_as_the_authors_do(folder, tmp_path):
    with (folder / "tokenizer.pkl").open("rb") as file:
        encoding = pickle.load(file)
    source = load_source_tokenizer(folder, encoding.n_vocab)
    assert source.byte_lengths == torch.load(folder / "token_bytes.pt", weights_only=True).tolist()
    write_tokenizer(tmp_path, source)
    tokenizer = Tokenizer.open(tmp_path)
    assert list(tokenizer.byte_lengths) == source.byte_lengths
    assert (tokenizer.vocab_size, tokenizer.special_tokens) == (encoding.n_vocab, encoding._special_tokens)
    for text in [*TEXTS, *random_texts(300, 1)]:
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)
    for token in range(encoding.n_vocab):
        assert tokenizer.token_bytes_of(token) == encoding.decode_single_token_bytes(token)


@pytest.mark.parametrize("which", ["golden", "large"])
def test_thousands_of_texts_encode_and_decode_as_in_tiktoken(which, request):
    encoding, tokenizer = request.getfixturevalue(which)
    for text in [*TEXTS, *random_texts(2000, 2)]:
        tokens = tokenizer.encode(text)
        assert tokens == encoding.encode_ordinary(text)
        assert tokenizer.decode(tokens) == text


def test_long_real_text_encodes_as_in_tiktoken(large):
    encoding, tokenizer = large
    assert tokenizer.vocab_size > 30000
    text = "\n".join(corpus()[:150])
    assert tokenizer.encode(text) == encoding.encode_ordinary(text)


def test_every_code_point_encodes_as_in_tiktoken(large):
    encoding, tokenizer = large
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for text in ("".join(points), "a".join(points[:0x3000]), " 1".join(points[:0x3000]), "'".join(points[:0x3000])):
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)


@settings(max_examples=500, deadline=None)
@given(text=st.text(st.characters(codec=None), max_size=60))
def test_any_str_encodes_as_in_tiktoken(golden, text):
    encoding, tokenizer = golden
    assert tokenizer.encode(text) == encoding.encode_ordinary(text)


@settings(max_examples=500, deadline=None)
@given(text=st.text(" \t\r\n'sdmtlvreSſK09½é中😀<|>bos_", max_size=40))
def test_any_str_of_the_patterns_corner_cases(large, text):
    encoding, tokenizer = large
    assert tokenizer.encode(text) == encoding.encode_ordinary(text)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83d\ude00", "\ude00\ud83d", "x\ud83d\ude00\ud83d"])
def test_surrogates_are_read_as_in_tiktoken(golden, text):
    encoding, tokenizer = golden
    assert tokenizer.encode(text) == encoding.encode_ordinary(text)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_tokens_decode_as_in_tiktoken(golden, large, data):
    encoding, tokenizer = data.draw(st.sampled_from([golden, large]))
    tokens = data.draw(st.lists(st.one_of(st.integers(0, 255), st.integers(0, encoding.n_vocab - 1)), max_size=30))
    assert tokenizer.decode(tokens) == encoding.decode(tokens)
    assert b"".join(map(tokenizer.token_bytes_of, tokens)) == encoding.decode_bytes(tokens)


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(
        st.binary(min_size=2, max_size=6).map(lambda b: bytes(97 + c % 3 for c in b)), unique=True, max_size=25
    ),
    seed=st.integers(0, 99),
)
def test_vocabularies_that_no_training_would_make(words, seed):
    """Any set of tokens with any ranks: out of reach of merges, in no order, byte ids shuffled."""
    rng = random.Random(seed)  # noqa: S311
    tokens = [*(bytes([byte]) for byte in range(256)), *words]
    rng.shuffle(tokens)
    data = with_special({token: rank for rank, token in enumerate(tokens)}, rng.choice(list(KNOWN_PATTERNS.values())))
    encoding, tokenizer = encoding_of(data), Tokenizer(from_encoding(data, "f", 2**20))
    for _ in range(20):
        text = "".join(rng.choices("abc -", [9, 9, 9, 1, 1], k=rng.randrange(60)))
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)


def test_byte_lengths_of_a_large_vocabulary(large):
    encoding, tokenizer = large
    expected = [len(encoding.decode([token]).encode()) for token in range(encoding.n_vocab)]
    expected[-len(SPECIAL) :] = [0] * len(SPECIAL)
    assert list(tokenizer.byte_lengths) == expected


def test_a_lone_byte_of_a_character_counts_three():
    assert token_byte_lengths([b"a", "é".encode(), b"\xc3", b"\xf0\x9f", b"<|bos|>"], [4]) == [1, 2, 3, 3, 0]


@pytest.mark.parametrize("pattern", KNOWN_PATTERNS)
def test_every_known_pattern_cuts_as_in_tiktoken(pattern, vocabulary):
    other = encoding_of(
        with_special(dict(zip(vocabulary.tokens[: -len(SPECIAL)], range(10**6), strict=False)), KNOWN_PATTERNS[pattern])
    )
    tokenizer = Tokenizer(dataclasses.replace(vocabulary, pattern=known_pattern(KNOWN_PATTERNS[pattern])))
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    whole = [between.join(points[:0x3000] + points[0x3000::97]) for between in ("", "a", " 1", "'", "\n ")]
    for text in [*TEXTS, *random_texts(100, 3), *whole]:
        assert tokenizer.encode(text) == other.encode_ordinary(text)


@pytest.mark.parametrize("pattern", KNOWN_PATTERNS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(" \t\r\n\u00a0'sSſdlL09½é中!\x1c", max_size=30))
def test_any_text_is_cut_by_every_known_pattern_as_in_tiktoken(pattern, text):
    data = with_special(
        {bytes([i]): i for i in range(256)} | {b"  ": 256, b" s": 257, b"\n ": 258, b"'s": 259}, KNOWN_PATTERNS[pattern]
    )
    assert Tokenizer(from_encoding(data, "f", 300)).encode(text) == encoding_of(data).encode_ordinary(text)


# --- special tokens, prompts and chats -------------------------------------------------------------------------------


def test_special_tokens_in_text_are_text(large):
    _, tokenizer = large
    special = set(tokenizer.special_tokens.values())
    assert not special & set(tokenizer.encode("".join(SPECIAL)))
    assert not special & set(tokenizer.render_chat([{"role": "user", "content": "<|user_end|>"}])[2:-2])


def test_special_tokens_decode_to_their_names(golden):
    _, tokenizer = golden
    assert tokenizer.decode([tokenizer.bos_id, 97, *tokenizer.stop_ids]).startswith("<|bos|>a<|")
    assert tokenizer.stop_ids == {tokenizer.special_tokens["<|assistant_end|>"], tokenizer.special_tokens["<|bos|>"]}
    assert tokenizer.token_bytes_of(tokenizer.bos_id) == b"<|bos|>"


def test_a_text_prompt_begins_with_bos(golden):
    encoding, tokenizer = golden
    assert tokenizer.encode_prompt("hi there") == [
        encoding._special_tokens["<|bos|>"],
        *encoding.encode_ordinary("hi there"),
    ]
    assert tokenizer.encode_prompt("") == [tokenizer.bos_id]


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        (chat(("user", "hi")), "<|bos|><|user_start|>hi<|user_end|><|assistant_start|>"),
        (
            chat(("user", "hi"), ("assistant", "yo"), ("user", "so?")),
            "<|bos|><|user_start|>hi<|user_end|><|assistant_start|>yo<|assistant_end|>"
            "<|user_start|>so?<|user_end|><|assistant_start|>",
        ),
        (chat(("system", "Be"), ("user", "hi")), "<|bos|><|user_start|>Be\n\nhi<|user_end|><|assistant_start|>"),
        (chat(("user", "")), "<|bos|><|user_start|><|user_end|><|assistant_start|>"),
    ],
)
def test_chats_are_rendered_as_trained(golden, messages, rendered):
    encoding, tokenizer = golden
    assert tokenizer.render_chat(messages) == encoding.encode(rendered, allowed_special="all")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        chat(("assistant", "a")),
        chat(("user", "a"), ("user", "b")),
        chat(("user", "a"), ("assistant", "b")),
        chat(("system", "a")),
        chat(("system", "a"), ("assistant", "b"), ("user", "c")),
        chat(("user", "a"), ("assistant", "b"), ("system", "c")),
        chat(("tool", "a")),
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": 1, "content": "a"}],
        ["user"],
    ],
)
def test_chats_of_another_form_are_refused(golden, messages):
    with pytest.raises(InputError):
        golden[1].render_chat(messages)


@pytest.mark.parametrize("token", [-1, 320, 10**12])
def test_ids_without_a_token_are_refused(golden, token):
    with pytest.raises(InputError, match="0 to 319"):
        golden[1].decode([97, token])


def test_what_is_no_text_is_refused(golden):
    with pytest.raises(InputError, match="bytes"):
        golden[1].encode(b"abc")


def test_without_special_tokens_prompts_are_refused(tmp_path):
    data = EncodingData("plain", PATTERN, {bytes([i]): i for i in range(256)}, {})
    tokenizer = opened(data, tmp_path)
    assert (tokenizer.encode("é"), tokenizer.stop_ids) == ([0xC3, 0xA9], frozenset())
    for use in (
        lambda: tokenizer.bos_id,
        lambda: tokenizer.encode_prompt("a"),
        lambda: tokenizer.render_chat(chat(("user", ""))),
    ):
        with pytest.raises(InputError, match="bos"):
            use()


# --- refusals --------------------------------------------------------------------------------------------------------

BYTES = {bytes([i]): i for i in range(256)}


@pytest.mark.parametrize(
    ("ranks", "special", "pattern", "message"),
    [
        ({}, {}, PATTERN, "256 of the 256 bytes"),
        (BYTES | {b"ab": 257}, {}, PATTERN, "token id 257 where 256"),
        (BYTES | {b"ab": 5}, {}, PATTERN, "token id 5 where 6"),
        (BYTES, {"<|bos|>": 300}, PATTERN, "token id 300 where 256"),
        ({token: rank + 1 for token, rank in BYTES.items()}, {"<|bos|>": 0}, PATTERN, "special ones"),
        ({bytes([i]): i for i in range(255)}, {}, PATTERN, r"1 of the 256 bytes are no tokens \(255"),
        (BYTES | {b"<|bos|>": 256}, {"<|bos|>": 257}, PATTERN, "ordinary token too"),
        (BYTES, {"": 256}, PATTERN, "empty"),
        (BYTES, {}, r"\w+|\s+", "split pattern"),
        (BYTES, {}, r"\p{N}{1,3}+", "split pattern"),
        (BYTES, {}, r"\s+$|\s+", "split pattern"),
        (BYTES, {}, r"a+?", "split pattern"),
        (BYTES, {}, r"(?i:ss)|a", "split pattern"),
        (BYTES, {}, r"(a+)+", "split pattern"),
        (BYTES, {}, "", "split pattern"),
        (BYTES, {}, r"?a", "split pattern"),
        (BYTES, {}, r"a{100000000}", "split pattern"),
    ],
)
def test_encodings_that_cannot_be_equalled_are_refused(ranks, special, pattern, message):
    with pytest.raises(CheckpointError, match=message):
        from_encoding(EncodingData("bad", pattern, ranks, special), "f", 2**20)


def test_a_tokenizer_larger_than_the_model_is_refused():
    assert len(load_source_tokenizer(FOLDERS[0], 400).byte_lengths) == 320
    with pytest.raises(CheckpointError, match=r"320 tokens.*vocab_size of 319"):
        load_source_tokenizer(FOLDERS[0], 319)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither"):
        load_source_tokenizer(tmp_path, 320)


@pytest.fixture
def fields() -> dict:
    return json.loads(load_source_tokenizer(FOLDERS[0], 320).json)


def load_json(folder: Path, fields: object) -> SourceTokenizer:
    (folder / "tokenizer.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return load_source_tokenizer(folder, 330)


def test_a_ready_tokenizer_json_is_taken(tmp_path, fields):
    assert load_json(tmp_path, fields) == load_source_tokenizer(FOLDERS[0], 320)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["model"].update(type="WordPiece"), "byte-level BPE"),
        (lambda f: f["model"].update(dropout=0.1), "dropout"),
        (lambda f: f["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda f: f["model"].update(ignore_merges="no"), "ignore_merges is 'no'"),
        (lambda f: f["model"]["vocab"].update(zz=5), "token id 5"),
        (lambda f: f["model"]["vocab"].update(zz=310), "token id 310"),
        (lambda f: f["model"]["vocab"].update(a=97.0), r"vocab\.a is 97\.0, expected a whole number"),
        (lambda f: f["model"]["vocab"].update(a="97"), r"vocab\.a is '97', expected a whole number"),
        (lambda f: f["model"]["vocab"].pop("a"), "token id"),
        (lambda f: f["model"]["vocab"].update({"\u4e00": f["model"]["vocab"].pop("a")}), "stands for no byte"),
        (lambda f: f["model"].update(vocab=[]), "model.vocab is"),
        (lambda f: f["added_tokens"][0].update(special=False), "not marked special"),
        (lambda f: f["added_tokens"][0].update(id=319), "token id"),
        (lambda f: f["added_tokens"][0].update(id=5), "token id"),
        (lambda f: f["added_tokens"][1].update(content="<|bos|>"), "twice"),
        (lambda f: f["added_tokens"][0].update(content="\ud800"), "expected its content"),
        (lambda f: f["added_tokens"][0].pop("content"), r"added_tokens\[0\]\.content is missing"),
        (lambda f: f["model"].update(merges=[["zz", "zz"]]), "are no tokens"),
        (lambda f: f["model"]["merges"].append(["<|bos", "|>"]), "are no tokens"),
        (lambda f: f["model"].update(merges=["a b c"]), "are no tokens"),
        (lambda f: f["model"].update(merges=None), "model.merges is None"),
        (lambda f: f.pop("model"), "model is missing"),
        (lambda f: f.update(version="2.0"), "version is '2.0'"),
    ],
)
def test_json_that_is_no_lossless_tokenizer_is_refused(tmp_path, fields, change, message):
    change(fields)
    with pytest.raises(CheckpointError, match=message):
        load_json(tmp_path, fields)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "5", '"x"', "[" * 100000, '{"model": 3}', '{"model": {"type": []}}']
)
def test_json_of_any_other_form_is_refused(tmp_path, text):
    with pytest.raises(CheckpointError):
        load_json(tmp_path, text)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_json_is_read_or_refused(tmp_path_factory, data):
    text = bytearray(load_source_tokenizer(FOLDERS[0], 320).json.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 127))
    folder = tmp_path_factory.mktemp("json")
    (folder / "tokenizer.json").write_bytes(text)
    try:
        load_source_tokenizer(folder, 320)
    except CheckpointError as error:
        assert len(str(error)) < 1000


def test_an_incomplete_or_altered_bundle_is_refused(tmp_path):
    write_tokenizer(tmp_path, load_source_tokenizer(FOLDERS[0], 320))
    for path in (tmp_path / "tokenizer.json", tmp_path / "token_bytes.json"):
        good = path.read_text()
        for bad in (None, "", "[", "[" * 100000, "[1]", "{}", good.replace("1", "2", 1), "\udcff"):
            path.unlink()
            if bad is not None:
                path.write_bytes(bad.encode("utf-8", "surrogateescape"))
            else:
                path.mkdir()
            with pytest.raises(BundleError, match=r"export the bundle again"):
                Tokenizer.open(tmp_path)
            path.rmdir() if bad is None else path.unlink()
            with pytest.raises(BundleError):
                Tokenizer.open(tmp_path)
            path.write_text(good)
        Tokenizer.open(tmp_path)


def test_neither_torch_nor_tiktoken_is_needed(tmp_path):
    write_tokenizer(tmp_path, load_source_tokenizer(FOLDERS[0], 320))
    code = (
        "import sys; from pathlib import Path; from lrt_deploy.text.tokenizer import Tokenizer, load_source_tokenizer;"
        f"load_source_tokenizer(Path({str(FOLDERS[0])!r}), 320); t = Tokenizer.open(Path({str(tmp_path)!r}));"
        "assert t.decode(t.encode('hello')) == 'hello'; assert not {'torch', 'tiktoken', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
