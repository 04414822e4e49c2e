"""A pickled Encoding is read exactly, and nothing that a pickle can say ever runs."""

import os
import pickle
import struct
import sys
import time
from pathlib import Path

import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrt_deploy import pickles
from lrt_deploy.errors import CheckpointError
from lrt_deploy.pickles import EncodingData, parse_encoding, read_encoding

GOLDEN = Path(__file__).parent / "data" / "golden"
GOLDEN_FILES = sorted(GOLDEN.glob("*/tokenizer/tokenizer.pkl"))
RANKS = {bytes([i]): i for i in range(256)} | {b"ab": 256, b" the": 257, bytes(range(250, 256)): 258}
SPECIAL = {"<|bos|>": 259, "<|é…😀|>": 70000}
DATA = EncodingData("mine", r"\p{L}+|\s+", RANKS, SPECIAL)
ENCODING = tiktoken.Encoding("mine", pat_str=DATA.pat_str, mergeable_ranks=RANKS, special_tokens=SPECIAL)
SMALL = tiktoken.Encoding("s", pat_str=".", mergeable_ranks={b"a": 0, b"b": 1}, special_tokens={"<|bos|>": 2})
SMALL_PICKLE = pickle.dumps(SMALL, 4)


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def state_pickle(
    ranks: bytes = b"}", name: bytes = text("n"), special: bytes = b"}", pattern: bytes = text(".")
) -> bytes:
    """An Encoding whose state's values are the given pickle code."""
    items = text("name") + name + text("pat_str") + pattern
    items += text("mergeable_ranks") + ranks + text("special_tokens") + special
    return b"\x80\x03ctiktoken.core\nEncoding\n)\x81}(" + items + b"ub."


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.parts[-3])
def test_the_authors_files_are_read_as_pickle_reads_them(path):
    with path.open("rb") as file:
        assert read_encoding(path) == EncodingData(**pickle.load(file).__getstate__())


def test_there_are_golden_files():
    assert len(GOLDEN_FILES) == 8


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dumps", [pickle.dumps, pickle._dumps], ids=["c", "python"])
def test_every_binary_protocol_is_read(protocol, dumps):
    assert parse_encoding(dumps(ENCODING, protocol), "f") == DATA


def test_a_pickle_without_unused_memo_entries_is_read():
    import pickletools

    assert parse_encoding(pickletools.optimize(pickle.dumps(ENCODING, 4)), "f") == DATA


@pytest.mark.parametrize("protocol", [0, 1])
def test_text_protocols_are_refused(protocol):
    with pytest.raises(CheckpointError, match="protocol 2 to 5"):
        parse_encoding(pickle.dumps(ENCODING, protocol), "some.pkl")


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_registered_encoding_holds_only_its_name(protocol, monkeypatch):
    import tiktoken.registry

    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "mine", ENCODING)
    with pytest.raises(CheckpointError, match=r"some\.pkl holds only the name 'mine'"):
        parse_encoding(pickle.dumps(ENCODING, protocol), "some.pkl")


# --- hostile files ---------------------------------------------------------------------------------------------------


class Evil:
    """Runs a shell command when unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def hostile(command: str) -> dict[str, bytes]:
    """Every way known to run something, with pickle's own spelling."""
    arg, line, evil = text(command), b"S'" + command.encode() + b"'\n", Evil(command)
    body = pickle.dumps(evil, 2)[2:-1]
    stack_global = text("os") + text("system") + b"\x93"
    return {
        **{f"reduce, protocol {p}": pickle.dumps(evil, p) for p in range(6)},
        "global": b"\x80\x02cos\nsystem\n" + arg + b"\x85R.",
        "stack global": b"\x80\x04" + stack_global + arg + b"\x85R.",
        "inst": b"\x80\x02(" + line + b"ios\nsystem\n.",
        "obj": b"\x80\x02(cos\nsystem\n" + line + b"o.",
        "newobj": b"\x80\x02cos\nsystem\n" + arg + b"\x85\x81.",
        "newobj_ex": b"\x80\x04" + stack_global + arg + b"\x85}\x92.",
        "builtins eval": b"\x80\x02cbuiltins\neval\n" + text(f"__import__('os').system({command!r})") + b"\x85R.",
        "attribute of an allowed module": b"\x80\x04"
        + text("tiktoken.core")
        + text("Encoding.__init__.__globals__")
        + b"\x93.",
        "setstate of another class": b"\x80\x02ccollections\nOrderedDict\n)R}" + text("x") + body + b"sb.",
        "copyreg": b"\x80\x02ccopyreg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR.",
        "ext1": b"\x80\x02\x82\x01.",
        "ext4": b"\x80\x02\x84\x01\x00\x00\x00.",
        "persistent id": b"\x80\x02Pos.system\n.",
        "binary persistent id": b"\x80\x02" + arg + b"Q.",
        "other codec": b"\x80\x02c_codecs\nencode\n" + text("abc") + text("rot13") + b"\x86R.",
        "encode called on nothing": b"\x80\x02c_codecs\nencode\n)R.",
        "Encoding called": b"\x80\x02ctiktoken.core\nEncoding\n" + arg + b"\x85R.",
        "Encoding given arguments": b"\x80\x02ctiktoken.core\nEncoding\n" + arg + b"\x85\x81.",
        "inside the name": state_pickle(name=body),
        "inside the pattern": state_pickle(pattern=body),
        "inside the ranks": state_pickle(ranks=b"}" + body + b"K\x00s"),
        "as a rank": state_pickle(ranks=b"}C\x01a" + body + b"s"),
        "after the end": state_pickle(ranks=b"}C\x01aK\x00s") + body + b".",
        "before a good object": b"\x80\x02" + body + b"0" + state_pickle(ranks=b"}C\x01aK\x00s")[2:],
        "buffers": b"\x80\x05\x97\x98.",
    }


@pytest.mark.parametrize("kind", hostile(""))
def test_hostile_pickles_are_refused_and_run_nothing(kind, tmp_path):
    sentinel, path = tmp_path / "ran", tmp_path / "tokenizer.pkl"
    path.write_bytes(hostile(f"touch {sentinel}")[kind])
    with pytest.raises(CheckpointError, match=r"tokenizer\.pkl"):
        read_encoding(path)
    assert not sentinel.exists()


@pytest.mark.parametrize("kind", ["reduce, protocol 4", "global", "stack global", "inst", "obj", "inside the name"])
def test_the_hostile_pickles_are_real(kind, tmp_path):
    sentinel = tmp_path / "ran"
    try:
        pickle.loads(hostile(f"touch {sentinel}")[kind])
    except Exception:
        assert kind == "inside the name"  # it ran, and then tiktoken complained
    assert sentinel.exists()


def test_a_refused_global_is_named_with_what_is_allowed():
    with pytest.raises(CheckpointError) as caught:
        parse_encoding(b"\x80\x02cposix\nsystem\n.", "some.pkl")
    message = str(caught.value)
    assert (
        "some.pkl" in message
        and "names posix.system" in message
        and "only _codecs.encode, tiktoken.core.Encoding" in message
    )


@pytest.mark.parametrize(
    "code", [b"\x80\x02cantigravity\nx\n.", b"\x80\x04" + text("antigravity") + text("x") + b"\x93."]
)
def test_no_module_is_imported(code):
    assert "antigravity" not in sys.modules
    with pytest.raises(CheckpointError):
        parse_encoding(code, "f")
    assert "antigravity" not in sys.modules


# --- bombs -----------------------------------------------------------------------------------------------------------


def nested_tuples(levels: int) -> bytes:
    """2**levels leaves through the memo, in 6 bytes a level; hashing or printing it would never end."""
    return b"}" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels))


@pytest.mark.parametrize(
    "code",
    [
        state_pickle(ranks=nested_tuples(100)),
        state_pickle(name=nested_tuples(100)),
        state_pickle(ranks=b"}" + nested_tuples(100) + b"K\x00s"),
        state_pickle(ranks=b"}C\x01a" + nested_tuples(100) + b"s"),
        b"\x80\x02" + nested_tuples(100) + b".",
        state_pickle(ranks=b"}q\x00C\x01ah\x00s"),  # a dict that holds itself
        state_pickle(name=b"\x8a\xff" + b"\x7f" * 255, ranks=b"}C\x01a\x8a\xff" + b"\x7f" * 255 + b"s"),
    ],
    ids=["ranks", "name", "key", "value", "alone", "self", "huge numbers"],
)
def test_small_files_cannot_grow_into_endless_work(code):
    start = time.monotonic()
    with pytest.raises(CheckpointError):
        parse_encoding(code, "f")
    assert time.monotonic() - start < 1


def test_the_same_text_cannot_be_encoded_without_end():
    once = b"h\x01h\x00h\x02\x86R0"
    code = b"\x80\x02" + text("a" * 1000) + b"q\x000" + b"c_codecs\nencode\nq\x010" + text("latin1") + b"q\x020"
    with pytest.raises(CheckpointError):
        parse_encoding(code + once * 1000 + b"N.", "f")
    keys = b"".join(b"h\x01h\x00h\x02\x86RK\x00s" for _ in range(100))
    start = b"\x80\x02" + text("a" * 10000) + b"q\x00\x85c_codecs\nencode\nq\x01\x85" + text("latin1") + b"q\x02\x85}"
    with pytest.raises(CheckpointError, match="again and again"):
        parse_encoding(start + keys + b".", "f")


def test_files_of_absurd_size_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(SMALL_PICKLE)
    monkeypatch.setattr(pickles, "MAX_FILE_BYTES", len(SMALL_PICKLE))
    assert read_encoding(path).name == "s"
    monkeypatch.setattr(pickles, "MAX_FILE_BYTES", len(SMALL_PICKLE) - 1)
    with pytest.raises(CheckpointError, match="at most"):
        read_encoding(path)


def test_files_of_absurdly_many_instructions_are_refused(monkeypatch):
    monkeypatch.setattr(pickles._Encoding, "most_instructions", 10)
    with pytest.raises(CheckpointError, match="more than 10 instructions"):
        parse_encoding(SMALL_PICKLE, "f")


@pytest.mark.parametrize("length", [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"])
def test_lengths_beyond_the_file_are_refused(length):
    for code in (
        b"X" + length,
        b"B" + length,
        b"\x8e" + length * 2,
        b"\x8d" + length * 2,
        b"\x8b" + length,
        b"r" + length,
    ):
        with pytest.raises(CheckpointError):
            parse_encoding(b"\x80\x04" + code + b".", "f")


# --- damage ----------------------------------------------------------------------------------------------------------


def test_truncated_anywhere_is_refused():
    for length in range(len(SMALL_PICKLE)):
        with pytest.raises(CheckpointError, match=r"some\.pkl"):
            parse_encoding(SMALL_PICKLE[:length], "some.pkl")


@pytest.mark.parametrize("tail", [b"\x00", b".", b"\n", SMALL_PICKLE])
def test_anything_after_the_end_is_refused(tail):
    with pytest.raises(CheckpointError, match="after its end"):
        parse_encoding(SMALL_PICKLE + tail, "f")


def test_every_single_byte_damage_gives_data_or_a_refusal():
    for position in range(len(SMALL_PICKLE)):
        for value in range(256):
            check_outcome(SMALL_PICKLE[:position] + bytes([value]) + SMALL_PICKLE[position + 1 :])


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # pickletools decodes arguments before they are refused
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8), st.integers(2, 5))
def test_random_damage_gives_data_or_a_refusal(changes, protocol):
    code = bytearray(pickle.dumps(ENCODING, protocol))
    for position, value in changes:
        code[position % len(code)] = value
    check_outcome(bytes(code))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_give_a_refusal(code):
    for protocol in range(2, 6):
        check_outcome(b"\x80" + bytes([protocol]) + code)


def test_damaged_hostile_files_run_nothing(tmp_path):
    sentinel = tmp_path / "ran"
    code = hostile(f"touch {sentinel}")["inside the name"]
    for position in range(len(code)):
        for value in (0, 0x2E, 0x30, 0x52, 0x63, 0x81, 0x93, 0xFF):
            check_outcome(code[:position] + bytes([value]) + code[position + 1 :])
    assert not sentinel.exists()


def check_outcome(code: bytes) -> None:
    try:
        data = parse_encoding(code, "f")
    except CheckpointError as error:
        assert len(str(error)) < 1000
        return
    assert type(data.name) is str and type(data.pat_str) is str
    assert all(type(token) is bytes and type(rank) is int for token, rank in data.mergeable_ranks.items())
    assert all(type(token) is str and type(rank) is int for token, rank in data.special_tokens.items())


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (state_pickle(ranks=b"N"), "mergeable_ranks is a NoneType"),
        (state_pickle(ranks=b"}X\x01\x00\x00\x00aK\x00s"), "expected bytes"),
        (state_pickle(ranks=b"}C\x01aC\x01bs"), "of type bytes"),
        (state_pickle(ranks=b"}C\x01a\x88s"), "of type bool"),
        (state_pickle(ranks=b"}C\x01aG\x00\x00\x00\x00\x00\x00\x00\x00s"), "of type float"),
        (state_pickle(ranks=b"}C\x01aJ\xff\xff\xff\xffs"), "is -1"),
        (state_pickle(ranks=b"}K\x01K\x01s"), "dict key of type int"),
        (state_pickle(special=b"}C\x01aK\x01s"), "expected str"),
        (state_pickle(name=b"C\x01a"), "name is a bytes"),
        (state_pickle(pattern=b"X\x03\x00\x00\x00\xed\xa0\x80"), "valid Unicode"),
        (b"\x80\x03N.", "only the type NoneType"),
        (b"\x80\x03}.", "only the type dict"),
        (b"\x80\x03ctiktoken.core\nEncoding\n.", "only the type"),
        (b"\x80\x03ctiktoken.core\nEncoding\n)\x81.", "only the type Object"),
        (b"\x80\x03ctiktoken.core\nEncoding\n)\x81}b.", "other keys"),
        (b"\x80\x03ctiktoken.core\nEncoding\n)\x81}b}b.", "twice"),
        (b"\x80\x03NN.", "unused items"),
        (b"\x80\x03(.", "a mark"),
        (b"\x80\x03.", "than there are"),
        (b"\x80\x03}(NuN.", "without a value"),
        (b"\x80\x03].", "EMPTY_LIST"),
        (b"\x80\x03h\x05.", "never stored"),
        (b"\x80\x03cos\n", "not a readable pickle"),
        (b"", "protocol 2 to 5"),
        (b"PK\x03\x04", "protocol 2 to 5"),
    ],
)
def test_what_is_wrong_is_said(code, message):
    with pytest.raises(CheckpointError, match=message):
        parse_encoding(code, "f")


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_encoding(tmp_path / "absent.pkl")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_encoding(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="named pipe"):
        read_encoding(tmp_path / "pipe")
