"""Tokenizers: pickles opcode by opcode and state by state, `tokenizer.json`, and the byte counts beside it."""

from __future__ import annotations

import functools
import io
import json
import pickle
import pickletools
import random
import shutil
import struct
from pathlib import Path

from hostile.mutate import INTEGERS, changed_json, changed_text, damage, is_json, odd_file, scalar, text_of
from hostile.originals import PATTERN, SIZES, Originals, encoding_state, pickled
from hostile.trial import EQUAL, OTHER, WRONG, Trial

from .pickle_opcodes import one_opcode

SAMPLES = (
    "The thin king's in there, isn't it? 12345 things\n\n  def f(x):\n\treturn x\r\n",
    "naïve Ünïcödé 漢字 🙂 \u0301 ΣΑΣ ſ K <|bos|> <|user_start|>",
    " " * 40 + "\t\n \n" + "a" * 60 + "!?" * 30,
    "",
)
# What a pattern may be that hangs, panics or reads differently in another engine.
PATTERNS = (
    *(r"(a+)+$", r"(a|a)*b", r"[a]*" * 10, r"\p{L}*\p{L}*1|\p{L}", r".", r"", r"(", r"[", r"\\", r"(?=x)", r"(?<!a)b"),
    *(r"a{1000}{1000}", r"(a{100}){100}", r"\w+|\s+", r"[\p{L}]+|[^\p{L}]", r"\p{Han}+|\s|\S", r".*?x", r"a++", r"^|$"),
    *(
        r"(?i:k)",
        r"(?i:\u017f)",
        r"\p{Foo}",
        r"[z-a]",
        r"x*",
        r"\p{L}+|\s*",
        r"(?>a)",
        r"\1",
        r"(.)\1",
        "\0",
        "é+|.",
        r"\s+",
    ),
)


def pickles(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """A changed `tokenizer.pkl`."""
    folder = place / "tokenizer"
    folder.mkdir()
    path = folder / "tokenizer.pkl"
    kind = rng.choices(("state", "opcodes", "damage", "no file", "hostile"), (45, 30, 13, 2, 10))[0]
    if kind == "state":
        state, what = changed_state(rng)
        try:
            data = pickled(state, rng.choice((2, 3, 4, 4, 4, 5)))
        except (UnicodeEncodeError, pickle.PicklingError):
            data = pickled(encoding_state())
    elif kind == "opcodes":
        data, said = pickled(encoding_state(), rng.choice((2, 4, 4, 5))), []
        for _ in range(rng.choice((1, 1, 2, 3))):
            try:
                data, what = one_opcode(rng, data)
            except (ValueError, IndexError, struct.error, OverflowError) as error:
                what = f"no longer opcodes ({type(error).__name__})"
            said.append(what)
        what = "; ".join(said)
    elif kind == "hostile":
        data, what = hostile_pickle(rng)
    else:
        data, what = damage(rng, pickled(encoding_state()))
    path.write_bytes(data)
    if kind == "no file":
        what = odd_file(rng, path)
    return Trial(
        what=f"{kind}: {what}",
        parses=kind != "no file" and is_pickle(data),
        act=lambda: as_pickle_reads_it(path, data),
        names=("tokenizer.pkl", "tiktoken", "tokenizer"),
    )


def changed_state(rng: random.Random) -> tuple[dict[str, object], str]:
    """The state of an Encoding with other tokens, ids, names, pattern or keys."""
    state = encoding_state()
    ranks, special = state["mergeable_ranks"], state["special_tokens"]
    kind = rng.choice(
        [
            "pattern",
            "pattern",
            "rank",
            "rank",
            "token",
            "drop",
            "swap",
            "many",
            "long",
            "special",
            "special_id",
            "special_name",
            "key",
            "type",
            "empty",
            "gap",
            "tokens",
            "chain",
            "offset",
            "duplicate",
            "unmergeable",
            "larger",
            "smaller",
        ]
    )
    key = rng.choice(list(ranks))
    if kind == "pattern":
        state["pat_str"] = rng.choice(
            (
                *PATTERNS,
                PATTERN.replace("?", rng.choice("*+?")),
                PATTERN[: rng.randrange(len(PATTERN))],
                PATTERN + "|.",
                damaged_text(rng, PATTERN),
            )
        )
    elif kind == "rank":
        ranks[key] = rng.choice((rng.choice(INTEGERS), ranks[key] + 1, scalar(rng)))
    elif kind == "token":
        new = rng.choice((key * 2, key + b"\xff", b"", bytes(rng.choices(range(256), k=5)), b"<|bos|>"))
        ranks[new] = ranks.pop(key)
    elif kind == "drop":
        del ranks[key]
    elif kind == "swap":
        other = rng.choice(list(ranks))
        ranks[key], ranks[other] = ranks[other], ranks[key]
    elif kind == "many":
        count = rng.choice((20, 2000, 20_000))
        ranks |= {b"q%d" % i: 270 + i for i in range(count)}
    elif kind == "long":
        count = rng.choice((100, 5000, 400_000))
        ranks[b"a" * count] = rng.choice((len(ranks), 260))
        if rng.random() < 0.5:
            del ranks[b" a"]
    elif kind == "special":
        special[rng.choice(("<|bos|>", "the", "", " ", "\ud800", "<|x|>", "a" * 100_000, "\0"))] = len(ranks) + len(
            special
        )
    elif kind == "special_id":
        special[rng.choice(list(special))] = rng.choice((rng.choice(INTEGERS), 5, scalar(rng)))
    elif kind == "special_name":
        name = rng.choice(list(special))
        special[rng.choice((name.upper(), name[1:], "th", "a", ""))] = special.pop(name)
    elif kind == "key":
        name = rng.choice(list(state))
        state[rng.choice(("zz", name + "s", "explicit_n_vocab"))] = state.pop(name) if rng.random() < 0.5 else 1
    elif kind == "type":
        state[rng.choice(list(state))] = rng.choice(
            (scalar(rng), {1: 2}, {"a": "b"}, {b"a": b"b"}, b"x", [b"a"], ("a",))
        )
    elif kind == "empty":
        state["special_tokens" if rng.random() < 0.5 else "mergeable_ranks"] = {}
    elif kind == "gap":
        state["special_tokens"] = {name: token + rng.choice((1, 50)) for name, token in special.items()}
    elif kind == "tokens":
        state["mergeable_ranks"] = dict(rng.sample(list(ranks.items()), len(ranks)))  # another order, the same
    elif kind == "chain":
        count = rng.choice((10, 300, 1000))
        found = {bytes([i]): i for i in range(256)} | {b"a" * (2 + i): 256 + i for i in range(count)}
        state["mergeable_ranks"] = found
        state["special_tokens"] = {name: len(found) + i for i, name in enumerate(special)}
    elif kind == "offset":
        state["mergeable_ranks"] = {token: rank + 1 for token, rank in ranks.items()}
    elif kind == "duplicate":
        ranks[key] = ranks[rng.choice(list(ranks))]
    elif kind == "unmergeable":
        ranks[b"zqxj"] = ranks.pop(b"the")
    elif kind == "smaller":
        state["special_tokens"] = {"<|bos|>": len(ranks)}
    else:
        state["special_tokens"] = special | {
            f"<|x{i}|>": len(ranks) + len(special) + i for i in range(rng.choice((1, 60, 3000)))
        }
    return state, f"{kind} ({key!a})"


def damaged_text(rng: random.Random, text: str) -> str:
    """A text with a character left out, doubled or replaced."""
    at = rng.randrange(len(text))
    return text[:at] + rng.choice(("", text[at] * 2, "(", "\\", "*", "[", "{9}", "|", "\ud800", "+")) + text[at + 1 :]


def hostile_pickle(rng: random.Random) -> tuple[bytes, str]:
    """Pickles that would run something, or grow."""
    kind = rng.randrange(8)
    if kind == 0:
        return b"\x80\x04" + b"cos\nsystem\n\x8c\x04true\x85R.", "os.system"
    if kind == 1:
        count = rng.choice((10, 1000, 100_000))
        return b"\x80\x04" + b"(" * count + b"t" * count + b".", f"{count} nested tuples"
    if kind == 2:
        return b"\x80\x04]\x94" + b"h\x00h\x00\x86\x94" * 30 + b".", "doubling"
    if kind == 3:
        return b"\x80\x04\x95" + struct.pack("<Q", rng.choice((0, 2**40, 2**63))) + pickled(encoding_state())[
            11:
        ], "frame length"
    if kind == 4:
        size = rng.choice((2**31 - 1, 2**20))
        return b"\x80\x04" + rng.choice((b"B", b"X", b"T")) + struct.pack(
            "<I", size
        ) + b"abc.", f"a text of {size} bytes"
    if kind == 5:
        return b"\x80\x04" + b"N0" * rng.choice((1000, 1_000_000)) + pickled(encoding_state())[2:], "many instructions"
    if kind == 6:
        return b"\x80\x04cbuiltins\n" + b"A" * rng.choice((10, 100_000, 3_000_000)) + b"\n.", "a long global"
    return b"\x80\x04\x8a\xff" + b"\x7f" * 255 + b".", "a long number"


def is_pickle(data: bytes) -> bool:
    """Whether pickletools reads all of it as instructions; long ones by their first kilobytes."""
    try:
        for count, _ in enumerate(pickletools.genops(data)):
            if count > 5000:
                return True
    except Exception:
        return False
    return True


def without_frames(data: bytes) -> bytes:
    """The same instructions without the lengths of their frames, which say nothing about what is read."""
    starts = [position for op, _, position in pickletools.genops(data) if op.name == "FRAME"]
    for start in reversed(starts):
        data = data[:start] + data[start + 9 :]
    return data


class _Safe(pickle._Unpickler):  # the one in Python: the other's memo is as long as its largest index
    """Python's own reading of a pickled Encoding, with a stand-in for the class and nothing else."""

    def find_class(self, module, name):
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _Stand
        if (module, name) == ("_codecs", "encode"):
            import codecs

            return codecs.encode
        raise pickle.UnpicklingError(f"{module}.{name}")


class _Stand:
    def __setstate__(self, state):
        self.state = state


def as_pickle_reads_it(path: Path, data: bytes):
    """Convert it as export does; what is accepted must encode as tiktoken does with what Python reads."""
    import tiktoken

    from lrt_deploy.pickles import read_encoding
    from lrt_deploy.text.tokenizer import load_source_tokenizer

    source = load_source_tokenizer(path.parent, SIZES["vocab_size"])
    found = read_encoding(path)
    state = _Safe(io.BytesIO(without_frames(data))).load().state
    if {k: getattr(found, k) for k in state} != state:
        return WRONG, "read otherwise than pickle reads it"
    tokenizer = written(path.parent, source)
    try:
        encoding = tiktoken.Encoding(**state)
        expected = [encoding.encode_ordinary(text) for text in SAMPLES]
    except BaseException as error:  # a panic
        return WRONG, f"tiktoken itself cannot use it: {str(error)[:200]}"
    for text, ids in zip(SAMPLES, expected, strict=True):
        if tokenizer.encode(text) != ids:
            return WRONG, f"{text[:30]!a} encodes otherwise than in tiktoken"
    return (EQUAL if state == encoding_state() else OTHER), ""


def written(folder: Path, source):
    """The tokenizer as a bundle would hold it, opened; its files are removed again."""
    from lrt_deploy.text.tokenizer import Tokenizer, write_tokenizer

    place = folder / "bundle-tokenizer"
    place.mkdir()
    write_tokenizer(place, source)
    tokenizer = Tokenizer.open(place)
    shutil.rmtree(place)
    return tokenizer


# --- tokenizer.json -----------------------------------------------------------------------------------------------

NORMALIZERS = (
    *(None, {"type": "NFC"}, {"type": "NFKD"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "▁"}),
    *({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}, {"type": "StripAccents"}, {"type": "Nmt"}),
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
    {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "$0$0" * 9}] * 12},
)
SPLITS = (
    *(
        None,
        {"type": "Whitespace"},
        {"type": "Digits", "individual_digits": True},
        {"type": "Punctuation", "behavior": "Isolated"},
    ),
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    {"type": "Sequence", "pretokenizers": []},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
)
PROCESSORS = (
    None,
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [261], "tokens": ["<|bos|>"]}},
    },
    {"type": "BertProcessing", "sep": ["a", 5], "cls": ["b", 6]},
)


def tokenizer_json(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """A changed `tokenizer.json` beside a checkpoint, or in a bundle's tokenizer folder with its byte counts."""
    folder = place / "tokenizer"
    folder.mkdir()
    original = original_json(originals)
    in_bundle = rng.random() < 0.4
    kind = rng.choices(("part", "json", "vocabulary", "text", "no file"), (32, 34, 22, 10, 2))[0]
    if kind == "part":
        fields, what = changed_part(rng, original)
        data = text_of(fields, None).encode("utf-8", "surrogatepass")
    elif kind == "vocabulary":
        fields, what = changed_vocabulary(rng, original)
        data = text_of(fields, None).encode("utf-8", "surrogatepass")
    elif kind == "json":
        slim = json.loads(json.dumps(original))
        under = rng.choice(((), (), ("model",), ("added_tokens",), ("pre_tokenizer",)))
        fields, what = changed_json(rng, slim, under)
        data = text_of(fields, None).encode("utf-8", "surrogatepass")
    else:
        data, what = changed_text(rng, json.dumps(original))
    (folder / "tokenizer.json").write_bytes(data)
    if kind == "no file":
        what = odd_file(rng, folder / "tokenizer.json")
    if in_bundle:
        shutil.copy(originals.folder / "bundle/tokenizer/token_bytes.json", folder)
    return Trial(
        what=f"{'bundle ' if in_bundle else ''}{kind}: {what}",
        parses=kind != "no file" and is_json(data),
        act=lambda: as_the_library_reads_it(folder, data, originals, in_bundle),
        names=("tokenizer", "tiktoken"),
    )


@functools.lru_cache
def original_json(originals: Originals) -> dict:
    """The bundle's own `tokenizer.json`."""
    return json.loads(originals.bytes_of("bundle/tokenizer/tokenizer.json"))


def changed_part(rng: random.Random, original: dict) -> tuple[dict, str]:
    """Another normalizer, pre-tokenizer, decoder, post-processor or option, valid to the library as a rule."""
    fields = json.loads(json.dumps(original))
    split = fields["pre_tokenizer"]
    kind = rng.choice(
        [
            "normalizer",
            "pre_tokenizer",
            "pattern",
            "pattern",
            "behavior",
            "sequence",
            "decoder",
            "post_processor",
            "truncation",
            "padding",
            "options",
            "version",
        ]
    )
    what: object = ""
    if kind == "normalizer":
        fields["normalizer"] = what = rng.choice(NORMALIZERS)
    elif kind == "pre_tokenizer":
        fields["pre_tokenizer"] = what = rng.choice(SPLITS)
    elif kind == "pattern":
        what = rng.choice((*PATTERNS, damaged_text(rng, PATTERN)))
        first_split(split)["pattern"] = {rng.choice(("Regex", "Regex", "Regex", "String")): what}
    elif kind == "behavior":
        what = rng.choice(("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous", "x"))
        first_split(split).update(behavior=what, invert=rng.random() < 0.5)
    elif kind == "sequence":
        parts = split["pretokenizers"]
        what = rng.choice(("twice", "reversed", "more", "one", "nested"))
        split["pretokenizers"] = {
            "twice": parts * 2,
            "reversed": parts[::-1],
            "more": [rng.choice(SPLITS[1:]), *parts],
            "one": parts[:1],
            "nested": [split.copy()],
        }[what]
    elif kind == "decoder":
        fields["decoder"] = what = rng.choice(
            (
                None,
                {"type": "WordPiece", "prefix": "#", "cleanup": True},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Sequence", "decoders": []},
                fields["decoder"],
            )
        )
    elif kind == "post_processor":
        fields["post_processor"] = what = rng.choice(PROCESSORS)
    elif kind == "truncation":
        fields["truncation"] = what = {
            "direction": "Right",
            "max_length": rng.choice((0, 1, 5, 2**40)),
            "strategy": "LongestFirst",
            "stride": rng.choice((0, 3, 9)),
        }
    elif kind == "padding":
        fields["padding"] = what = {
            "strategy": rng.choice(("BatchLongest", {"Fixed": rng.choice((5, 10**9))})),
            "direction": "Right",
            "pad_to_multiple_of": rng.choice((None, 8, 0)),
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        }
    elif kind == "options":
        key = rng.choice(
            (
                "dropout",
                "unk_token",
                "continuing_subword_prefix",
                "end_of_word_suffix",
                "fuse_unk",
                "byte_fallback",
                "ignore_merges",
                "type",
            )
        )
        fields["model"][key] = rng.choice(
            (None, 0, 0.1, 1.0, "", "a", "##", True, False, "WordPiece", "Unigram", "BPE", [])
        )
        what = f"{key} {fields['model'][key]!a}"
    else:
        fields["version"] = what = rng.choice(("2.0", None, 1, ""))
    return fields, f"{kind} {str(what)[:120]}"


def first_split(split: dict) -> dict:
    """The pre-tokenizer that holds the pattern."""
    return next((part for part in split.get("pretokenizers", [split]) if part.get("type") == "Split"), split)


def changed_vocabulary(rng: random.Random, original: dict) -> tuple[dict, str]:
    """Other tokens, ids, merges or added tokens."""
    fields = json.loads(json.dumps(original))
    vocabulary, merges, added = fields["model"]["vocab"], fields["model"]["merges"], fields["added_tokens"]
    names = list(vocabulary)
    name, other = rng.choice(names), rng.choice(names)
    kind = rng.choice(
        [
            "swap",
            "id",
            "drop",
            "rename",
            "many",
            "long",
            "merge",
            "merge_drop",
            "merge_order",
            "merge_many",
            "added",
            "added_id",
            "added_flag",
            "added_drop",
            "chain",
        ]
    )
    if kind == "swap":
        vocabulary[name], vocabulary[other] = vocabulary[other], vocabulary[name]
    elif kind == "id":
        vocabulary[name] = rng.choice((vocabulary[other], rng.choice(INTEGERS), scalar(rng)))
    elif kind == "drop":
        del vocabulary[name]
    elif kind == "rename":
        vocabulary[rng.choice((name + "x", "<|bos|>", "€", "", " ", "\ud800", name * 3))] = vocabulary.pop(name)
    elif kind == "many":
        count = rng.choice((1, 100, 30_000))
        vocabulary |= {f"q{i}z": 270 + i for i in range(count)}
    elif kind == "long":
        vocabulary["a" * rng.choice((50, 5000, 1_000_000))] = rng.choice((270, 5))
    elif kind == "merge":
        merges.insert(
            rng.randrange(len(merges) + 1),
            rng.choice(([name, other], ["t", "h"], [name], f"{name} {other}", "a", ["a", ""], None, ["a", "b", "c"])),
        )
    elif kind == "merge_drop" and merges:
        merges.pop(rng.randrange(len(merges)))
    elif kind == "merge_order":
        rng.shuffle(merges)
    elif kind == "merge_many":
        merges += merges * rng.choice((1, 1000))
    elif kind == "added":
        entry = {
            "id": rng.choice((270, 5, 261)),
            "content": rng.choice(("x", "", "a", " ", "the", "<|x|>", "\n" * 5)),
            "single_word": False,
            "lstrip": rng.random() < 0.5,
            "rstrip": rng.random() < 0.5,
            "normalized": rng.random() < 0.5,
            "special": rng.random() < 0.5,
        }
        added.append(entry)
    elif kind == "added_id":
        rng.choice(added)["id"] = rng.choice((rng.choice(INTEGERS), 5, 260, 270, None))
    elif kind == "added_flag":
        rng.choice(added)[rng.choice(("single_word", "lstrip", "rstrip", "normalized", "special", "content"))] = (
            rng.choice((True, False, None, "a", 1))
        )
    elif kind == "added_drop":
        added.pop(rng.randrange(len(added)))
    elif kind == "chain":
        count = rng.choice((10, 1000))
        vocabulary |= {"a" * (2 + i): 270 + i for i in range(count)}
        merges += [["a", "a" * (1 + i)] for i in range(count)]
    return fields, f"{kind} {name!a}"


def as_the_library_reads_it(folder: Path, data: bytes, originals: Originals, in_bundle: bool):
    """Open it as export or a bundle does; what is accepted must encode as the library itself does, without loss."""
    import tokenizers

    from lrt_deploy.text.tokenizer import Tokenizer, load_source_tokenizer

    found = Tokenizer.open(folder) if in_bundle else written(folder, load_source_tokenizer(folder, SIZES["vocab_size"]))
    try:
        raw = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        raw.no_truncation()
        raw.no_padding()
        raw.encode_special_tokens = True
    except Exception:  # it is stricter about fields that mean nothing here: then nothing may have changed
        raw = None
    truth, equal = originals.decoder.tokenizer, True
    for text in SAMPLES:
        ids = found.encode(text)
        expected = truth.encode(text) if raw is None else raw.encode(text, add_special_tokens=False).ids
        if ids != expected:
            return WRONG, f"{text[:30]!a} encodes otherwise than in the library"
        if any(not 0 <= token < found.vocab_size for token in ids):
            return WRONG, f"{text[:30]!a} has ids beyond the vocabulary"
        found.decode(ids)
        equal = equal and ids == truth.encode(text)
    if found.vocab_size > SIZES["vocab_size"] and not in_bundle:
        return WRONG, "more tokens than the model has"
    return (EQUAL if equal else OTHER), ""


def byte_counts(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """A changed `token_bytes.json` of a bundle, or any `token_bytes.pt` beside a checkpoint, which is not read."""
    folder = place / "tokenizer"
    folder.mkdir()
    if rng.random() < 0.2:
        shutil.copy(originals.folder / "lrt/tokenizer/tokenizer.pkl", folder)
        data, what = damage(rng, originals.bytes_of("lrt/tokenizer/token_bytes.pt"))
        (folder / "token_bytes.pt").write_bytes(data)
        pickle_data = originals.bytes_of("lrt/tokenizer/tokenizer.pkl")
        return Trial(f"pt: {what}", True, lambda: as_pickle_reads_it(folder / "tokenizer.pkl", pickle_data), ("token",))
    shutil.copy(originals.folder / "bundle/tokenizer/tokenizer.json", folder)
    text = originals.bytes_of("bundle/tokenizer/token_bytes.json").decode()
    lengths = json.loads(text)
    if rng.random() < 0.75:
        changed, what = changed_json(rng, lengths)
        data = rng.choice(
            (text_of(changed, None), text_of(changed, 1), text_of({"a": changed}), text_of(lengths, 3))
        ).encode("utf-8", "surrogatepass")
    else:
        data, what = changed_text(rng, text)
    path = folder / "token_bytes.json"
    path.write_bytes(data)
    is_file = True
    if rng.random() < 0.02:
        what, is_file = odd_file(rng, path), False

    def act():
        from lrt_deploy.text.tokenizer import Tokenizer

        found = Tokenizer.open(folder)
        if list(found.byte_lengths) != lengths or any(type(n) is not int for n in found.byte_lengths):
            return WRONG, "other byte counts than the tokens have"
        return EQUAL, ""

    return Trial(f"json: {what}", is_file and is_json(data), act, ("token",))
