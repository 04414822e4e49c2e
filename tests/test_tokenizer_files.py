"""Tokenizer files as users have them and as attackers make them: read exactly, or refused by name and within bounds."""

import dataclasses
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from typer.testing import CliRunner

from lrt_deploy import open_decoder
from lrt_deploy.bundle.manifest import read_manifest
from lrt_deploy.cli.app import app
from lrt_deploy.errors import BundleError, CheckpointError, InputError
from lrt_deploy.pickles import EncodingData, parse_encoding
from lrt_deploy.runtime.batch import BatchDecoder
from lrt_deploy.text.byte_pairs import GPT2, PATTERNS, BytePairs, as_chars, panics_as
from lrt_deploy.text.tokenizer import Tokenizer, load_source_tokenizer, write_tokenizer
from lrt_deploy.text.tokenizer_file import from_encoding

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden" / "mr_gqa_SSSL"
HF = DATA / "tokenizers" / "hf1k.json"
SMALL = DATA / "tokenizers" / "rust600.pkl"
NANOCHAT = PATTERNS[0].text
BYTES = {bytes([i]): i for i in range(256)}
TEXTS = [
    "Hello World, it's 12345 o'clock; WE'LL see\n\n  two  spaces\t\ttabs \r\n end   ",
    "Größe, naïve 中文分词 日本語 😀👩‍👩‍👧‍👦 \u00a0\u2003 wide",
    " " * 5000 + "x" + "\t" * 3000 + "\n" * 700 + "a" * 9000 + "1" * 501 + "=" * 777,
    "<|bos|> <|user_start|>",
]


def ranks_of(words: list[bytes]) -> dict[bytes, int]:
    return BYTES | {word: 256 + i for i, word in enumerate(words)}


def encoding_data(words: list[bytes], pattern: str = NANOCHAT) -> EncodingData:
    return EncodingData("test", pattern, ranks_of(words), {"<|bos|>": 256 + len(words)})


def opened(source: Path, folder: Path, vocab_size: int = 2048) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder, load_source_tokenizer(source, vocab_size))
    return Tokenizer.open(folder)


@pytest.fixture
def fields() -> dict:
    return json.loads(HF.read_text(encoding="utf-8"))


def load(folder: Path, fields: object, vocab_size: int = 1024):
    (path := folder / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    return load_source_tokenizer(path, vocab_size)


# --- files that are known --------------------------------------------------------------------------------------------


def test_the_authors_hugging_face_tokenizer_encodes_as_the_library_does(tmp_path):
    library = tokenizers.Tokenizer.from_file(str(HF))
    library.encode_special_tokens = True
    tokenizer = opened(HF, tmp_path / "bundle")
    assert tokenizer.special_tokens == {t.content: i for i, t in library.get_added_tokens_decoder().items()}
    for text in TEXTS:
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("source", [HF, SMALL], ids=["json", "pickle"])
def test_the_library_reads_the_written_file_as_the_same_tokenizer(source, tmp_path):
    tokenizer = opened(source, tmp_path / "bundle")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "bundle" / "tokenizer.json"))
    library.encode_special_tokens = True
    for text in TEXTS:
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    library.encode_special_tokens = False
    assert library.encode("<|bos|>").ids == [tokenizer.bos_id]


def test_gpt2s_byte_level_splits_as_the_library_does(fields, tmp_path):
    fields["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    fields["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    source = load(tmp_path, fields)
    assert GPT2.text in json.loads(source.json)["pre_tokenizer"]["pretokenizers"][0]["pattern"].values()
    library = tokenizers.Tokenizer.from_str(json.dumps(fields))
    library.encode_special_tokens = True
    tokenizer = opened(tmp_path / "tokenizer.json", tmp_path / "bundle")
    for text in TEXTS:
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_other_spellings_of_the_same_tokenizer_are_read(fields, tmp_path):
    plain = load(tmp_path, fields)
    fields["model"]["merges"] = [" ".join(pair) for pair in fields["model"]["merges"]]
    fields["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    fields["added_tokens"].reverse()
    del fields["model"]["unk_token"], fields["normalizer"], fields["version"]
    fields["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    assert load(tmp_path, fields) == plain


# --- where tokenizers lie --------------------------------------------------------------------------------------------


def checkpoint(folder: Path, tokenizer: str | None) -> Path:
    """A golden checkpoint in a folder of its own, with its tokenizer under the given name."""
    folder.mkdir(parents=True)
    for path in GOLDEN.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    if tokenizer:
        (folder / tokenizer).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(GOLDEN / "tokenizer" / "tokenizer.pkl", folder / tokenizer)
    return folder


@pytest.mark.parametrize("place", ["tokenizer/tokenizer.pkl", "tokenizer.pkl", "../../tokenizer/tokenizer.pkl"])
def test_a_tokenizer_is_found_where_people_have_it(place, tmp_path):
    from lrt_deploy.exporters.bundle import find_tokenizer
    from lrt_deploy.model.checkpoint import open_checkpoint

    found = open_checkpoint(checkpoint(tmp_path / "base_checkpoints" / "d4", place))
    assert find_tokenizer(found, None) == load_source_tokenizer(GOLDEN / "tokenizer", 320)
    assert find_tokenizer(found, Path("none")) is None


def test_a_tokenizer_may_be_named_by_its_folder_or_its_file():
    by_folder = load_source_tokenizer(GOLDEN / "tokenizer", 320)
    assert load_source_tokenizer(GOLDEN / "tokenizer" / "tokenizer.pkl", 320) == by_folder


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "does not exist"), ("x.bin", "neither a folder nor a file"), ("empty", "neither tokenizer.pkl nor")],
)
def test_what_is_no_tokenizer_is_told_from_one_that_is_absent(name, message, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=message):
        load_source_tokenizer(tmp_path / name, 320)


# --- fewer tokens than the model has rows ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(make_once) -> Path:
    """A folder with a checkpoint of 320 ids, a tokenizer of 257 tokens, a bundle of both and what its export said."""

    def make(folder: Path) -> None:
        source = checkpoint(folder / "checkpoint", None)
        encoding = tiktoken.Encoding("few", pat_str=NANOCHAT, mergeable_ranks=BYTES, special_tokens={"<|bos|>": 256})
        (source / "tokenizer.pkl").write_bytes(pickle.dumps(encoding, 4))
        result = CliRunner().invoke(app, ["export", str(source), str(folder / "bundle")])
        (folder / "said").write_text(result.stdout + result.stderr)

    return make_once("few-tokens", make)


OPTIONS = [
    {},
    {"repetition_penalty": 1.3},
    {"temperature": 1.5, "seed": 3},
    {"temperature": 1.0, "top_p": 0.9, "seed": 4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "penalty", "sampled", "top-p"])
def test_ids_without_a_token_are_never_generated_alone_or_in_a_batch(few, options):
    prompt = [256, 300, 5, 319, 17]  # ids without a token may be read
    with open_decoder(few / "bundle") as decoder:
        assert (decoder.tokenizer.vocab_size, decoder.config.vocab_size) == (257, 320)
        alone = [event.token for event in decoder.generate(prompt, 20, policy="stepwise", stop_ids=[], **options)]
        assert len(alone) == 20 and max(alone) < 257
        batch = BatchDecoder(decoder, 2)
        for _ in range(2):
            batch.submit(prompt, 20, stop_ids=[], **options)
        found = {0: [], 1: []}
        for event in batch.run():
            found[event.request].append(event.event.token)
        assert found == {0: alone, 1: alone}


def test_greedy_takes_the_largest_logit_of_those_with_a_token(few):
    masked = 0
    with open_decoder(few / "bundle") as decoder:
        for start in range(0, 320, 40):
            state, expected = decoder.prefill([[start, 7, 8]], policy="stepwise"), []
            for _ in range(20):
                masked += int(state.logits[0].argmax()) >= 257
                expected.append(int(state.logits[0][:257].argmax()))
                decoder.step(state, [expected[-1]])
            events = decoder.generate([start, 7, 8], 20, policy="stepwise", stop_ids=[])
            assert [event.token for event in events] == expected
    assert masked, "the mask was never needed; choose other prompts"


def test_export_and_inspect_say_that_ids_have_no_token(few):
    said = [(few / "said").read_text()]
    for path in ("bundle", "checkpoint"):
        result = CliRunner().invoke(app, ["inspect", str(few / path)])
        assert result.exit_code == 0
        said.append(result.stdout + result.stderr)
    for text in said:
        assert "257 tokens for a vocab_size of 320" in " ".join(text.split())


def test_a_bundle_whose_tokenizer_has_another_number_of_tokens_is_refused(few, tmp_path):
    write_tokenizer(tmp_path, load_source_tokenizer(few / "checkpoint" / "tokenizer.pkl", 320))
    assert Tokenizer.open(tmp_path, read_manifest(few / "bundle").tokenizer_tokens).vocab_size == 257
    for count in (256, 258):
        with pytest.raises(BundleError, match="257 tokens"):
            Tokenizer.open(tmp_path, count)


# --- forms that are not known ----------------------------------------------------------------------------------------

HOSTILE_PATTERNS = ["[a]*" * 10, r"\p{L}*\p{L}*1|\p{L}", "(a+)+$", r"\w+|\s+", "a{100000000}", "", "(", NANOCHAT + "|x"]


def split(pattern: object, behavior: str = "Isolated", invert: object = False) -> list[dict]:
    first = {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}
    return [first, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]


def sequence(parts: object) -> dict:
    return {"type": "Sequence", "pretokenizers": parts}


@pytest.mark.parametrize("pattern", HOSTILE_PATTERNS)
def test_patterns_that_are_not_known_are_refused_by_their_text(pattern, fields, tmp_path):
    fields["pre_tokenizer"] = sequence(split({"Regex": pattern}))
    with pytest.raises(CheckpointError, match="split pattern") as caught:
        load(tmp_path, fields)
    assert ascii(pattern) in str(caught.value) and "nanochat, gpt4, cl100k, gpt2" in str(caught.value)
    with pytest.raises(CheckpointError, match="split pattern"):
        from_encoding(encoding_data([], pattern), "f", 300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": None}, "pre-tokenizer None"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer .*Whitespace"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}}, "use_regex': False"),
        ({"pre_tokenizer": sequence(split({"String": " "}))}, "split pattern None"),
        ({"pre_tokenizer": sequence(split({"Regex": [NANOCHAT]}))}, "split pattern"),
        ({"pre_tokenizer": sequence(split({"Regex": NANOCHAT}, "MergedWithNext"))}, "pre-tokenizer"),
        ({"pre_tokenizer": sequence(split({"Regex": NANOCHAT}, "Removed"))}, "pre-tokenizer"),
        ({"pre_tokenizer": sequence(split({"Regex": NANOCHAT}, "Isolated", "no"))}, "pre-tokenizer"),
        ({"pre_tokenizer": sequence(split({"Regex": NANOCHAT})[:1])}, "pre-tokenizer .*'Split'"),
        ({"pre_tokenizer": sequence([*split({"Regex": NANOCHAT}), {"type": "Digits"}])}, "'Digits'"),
        ({"pre_tokenizer": sequence([])}, "pre-tokenizer"),
        ({"pre_tokenizer": sequence(5)}, "pre-tokenizer"),
        ({"pre_tokenizer": [[]]}, "pre-tokenizer"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": "xx"}}, "normalizer 'Replace'"),
        ({"normalizer": {"type": "NFC"}}, "normalizer 'NFC'; known for byte-level BPE is none"),
        ({"normalizer": {"type": "ByteLevel"}}, "normalizer 'ByteLevel'"),
        ({"decoder": {"type": "ByteFallback"}}, "decoder 'ByteFallback'"),
        ({"decoder": None}, "decoder None"),
        ({"post_processor": {"type": "TemplateProcessing"}}, "post_processor 'TemplateProcessing'"),
    ],
)
def test_forms_that_are_not_known_are_refused_by_name(change, message, fields, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, fields | change)


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.pkl", "tokenizer.json"])
def test_only_regular_files_within_a_size_are_read(name, tmp_path):
    def kinds():
        os.mkfifo(tmp_path / name)
        yield "named pipe"
        (tmp_path / name).symlink_to("/dev/zero")
        yield "character device"
        (tmp_path / name).symlink_to(name)
        yield "cannot be opened"
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**21)
        yield "at most"

    for message in kinds():
        with pytest.raises(CheckpointError, match=message):
            load_source_tokenizer(tmp_path, 320)
        (tmp_path / name).unlink()


def bounded(code: str, megabytes: int, timeout: int = 120) -> str:
    """Run Python code with so much memory for data; what it prints, or how it ends."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({megabytes << 20},) * 2)\n"
    result = subprocess.run(
        [sys.executable, "-c", limit + code], capture_output=True, text=True, check=False, timeout=timeout
    )
    return result.stdout.strip() or result.stderr.strip()[-500:]


LOAD = """
from pathlib import Path
from lrt_deploy.errors import LRTDeployError
from lrt_deploy.text.tokenizer import Tokenizer, load_source_tokenizer, write_tokenizer
try:
    source = load_source_tokenizer(Path({path!r}), {vocab_size})
    write_tokenizer(Path({folder!r}), source)
    print(len(Tokenizer.open(Path({folder!r})).encode("a" * 5000)))
except LRTDeployError as error:
    print("refused:", str(error)[-200:])
"""

RUNS = {
    "1,000": [b"a" * n for n in range(2, 1001)],
    "2,000": [b"a" * n for n in range(2, 2001)],
    "one of 400 kB": [b"a" * 400_000],
    "one of 64 MB": [b"a" * 64_000_000],
    "doubling": [b"a" * 2**n for n in range(1, 11)],
    "many long ones": [b"%04d" % n + b"a" * 1000 for n in range(5000)],
}


@pytest.mark.parametrize(
    ("run", "vocab_size", "expected"),
    [
        ("1,000", 2048, None),
        ("1,000", 1024, "1255 tokens, more than the model's vocab_size of 1024"),
        ("2,000", 4096, "a token of 2000 bytes; at most 1024"),
        ("one of 400 kB", 1024, "a token of 400000 bytes; at most 1024"),
        ("one of 64 MB", 65536, "at most"),
        ("doubling", 1024, None),
        ("many long ones", 65536, "together; at most 4194304"),
    ],
)
@pytest.mark.parametrize("write", ["pickle", "json"])
def test_vocabularies_of_long_runs_are_read_or_refused_within_bounds(run, vocab_size, expected, write, tmp_path):
    path = (write_pickle if write == "pickle" else write_json)(tmp_path, ranks_of(RUNS[run]))
    (folder := tmp_path / "bundle").mkdir()
    found = bounded(LOAD.format(path=str(path), folder=str(folder), vocab_size=vocab_size), 400)
    if expected is None:
        assert found == str(len(encode(path, "a" * 5000)))
    else:
        assert found.startswith("refused:") and expected in found


def encode(path: Path, text: str) -> list[int]:
    """The ids that the library gives for which the file was made."""
    if path.suffix == ".json":
        return tokenizers.Tokenizer.from_file(str(path)).encode(text).ids
    return tiktoken.Encoding(**dataclasses.asdict(parse_encoding(path.read_bytes(), "f"))).encode_ordinary(text)


def write_json(folder: Path, ranks: dict[bytes, int]) -> Path:
    """A tokenizer.json in which each run of letters has one merge: the first that gives it."""
    vocab = {as_chars(token): rank for token, rank in ranks.items()}
    merges = [[word[: len(word) // 2], word[len(word) // 2 :]] for word in vocab if word[: len(word) // 2] in vocab]
    model = {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": [m for m in merges if m[1] in vocab]}
    fields = {"model": model, "decoder": split(None)[1]}
    (path := folder / "tokenizer.json").write_text(
        json.dumps(fields | {"pre_tokenizer": sequence(split({"Regex": NANOCHAT}))})
    )
    return path


def write_pickle(folder: Path, ranks: dict[bytes, int]) -> Path:
    state = {"name": "x", "pat_str": NANOCHAT, "mergeable_ranks": ranks, "special_tokens": {}}
    (path := folder / "tokenizer.pkl").write_bytes(pickled(state))
    return path


def pickled(state: dict) -> bytes:
    """The pickle that tiktoken would write, without making the Encoding, which takes long for long tokens."""
    body = pickle.dumps(state, 4)
    frame = body[11:] if body[2:3] == b"\x95" else body[2:]
    return b"\x80\x04ctiktoken.core\nEncoding\n)\x81" + frame[:-1] + b"b."


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab", min_size=2, max_size=9).map(str.encode), unique=True, max_size=30), st.integers(0, 99))
def test_merges_recovered_from_ranks_encode_as_tiktoken_does(words, seed):
    rng = random.Random(seed)  # noqa: S311
    rng.shuffle(words)
    data = encoding_data(words)
    encoding, tokenizer = tiktoken.Encoding(**dataclasses.asdict(data)), Tokenizer(from_encoding(data, "f", 400))
    for _ in range(10):
        text = "".join(rng.choices("ab", k=rng.randrange(80)))
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)


# --- long texts ------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("ab", min_size=2, max_size=8), unique=True, max_size=25), st.integers(0, 10**6), st.booleans())
def test_a_piece_cut_into_windows_has_the_ids_of_the_whole(words, seed, whole):
    rng = random.Random(seed)  # noqa: S311
    rng.shuffle(words)
    data = encoding_data([word.encode() for word in words])
    vocabulary = from_encoding(data, "f", 400)
    windowed = BytePairs(vocabulary.ids, vocabulary.merges, whole, window=8)
    at_once = BytePairs(vocabulary.ids, vocabulary.merges, whole, window=10**6)
    for piece in ("a" * rng.randrange(2000), "".join(rng.choices("ab", k=rng.randrange(2000))), "aab" * 500):
        assert windowed.encode(piece) == at_once.encode(piece)


def test_long_runs_have_the_ids_of_tiktoken(tmp_path):
    tokenizer = opened(HF, tmp_path / "bundle")
    library = tokenizers.Tokenizer.from_file(str(HF))
    rng = random.Random(5)  # noqa: S311
    for run in (" ", "\t", "ab", "e", "=", "é", "日本", "".join(rng.choices("acgt", k=5000))):
        text = (run * 50_000)[:50_000]
        assert tokenizer.encode(text) == library.encode(text).ids


def test_millions_of_spaces_tabs_letters_or_digits_are_encoded_in_bounded_memory(tmp_path):
    opened(HF, tmp_path)
    code = f"""
from pathlib import Path
from lrt_deploy.text.tokenizer import Tokenizer
tokenizer = Tokenizer.open(Path({str(tmp_path)!r}))
for run in (" ", "\\t", "\\n", "a", "1", "-", " \\n", "xy z"):
    text = (run * 1_000_000)[:1_000_000]
    assert tokenizer.decode(tokenizer.encode(text)) == text
print("done")
"""
    assert bounded(code, 400) == "done"


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(few):
    with open_decoder(few / "bundle") as decoder:
        decoder.tokenizer.encode = None  # it must not come to this
        text = "x" * (decoder.max_seq_len + 1)
        for use in (decoder.generate, BatchDecoder(decoder).submit):
            with pytest.raises(InputError, match=f"{len(text)} bytes.*capacity is {decoder.max_seq_len} tokens"):
                use(text)
        with pytest.raises(InputError, match=f"{2 * decoder.max_seq_len} bytes"):
            decoder.generate("é" * decoder.max_seq_len)


# --- panics ----------------------------------------------------------------------------------------------------------


def test_a_panic_of_the_library_becomes_an_error_of_ours_and_nothing_else_does():
    catastrophic = pre_tokenizers.Split(Regex("(a+)+$"), behavior="isolated")
    with (
        pytest.raises(InputError, match=r"the text cannot be encoded.*retry-limit"),
        panics_as(InputError, "the text cannot be encoded"),
    ):
        catastrophic.pre_tokenize_str("a" * 40 + "b")
    for other in (KeyboardInterrupt, SystemExit, ValueError):
        with pytest.raises(other), panics_as(InputError, "x"):
            raise other
