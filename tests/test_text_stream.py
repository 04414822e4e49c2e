"""Streamed text equals the decoded text, cut at the first stop string, however it is cut into tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrt_deploy.errors import InputError
from lrt_deploy.text.text_stream import TextStream

ALPHABET = "ab é€😀\N{REPLACEMENT CHARACTER}"
TEXTS = st.text(ALPHABET, max_size=30)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3)


def stream(pieces: list[bytes], stops: list[str]) -> tuple[list[str], TextStream]:
    text = TextStream(pieces.__getitem__, stops)
    return [*(text.push(i) for i in range(len(pieces))), text.finish()], text


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The reference: read letter by letter and look for a stop string at every end."""
    for end in range(1, len(text) + 1):
        if hits := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(hits, key=len)
            return text[: end - len(stop)], stop
    return text, None


@st.composite
def pieces_of(draw, data):
    data = draw(data)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


BROKEN = st.one_of(
    st.binary(max_size=30), st.lists(st.sampled_from([b"a", b"\xf0", b"\x9f", b"\xe2", b"\x82", b"\xff"])).map(b"".join)
)


@given(pieces_of(TEXTS.map(str.encode)), STOPS)
def test_pieces_of_good_text(pieces, stops):
    parts, text = stream(pieces, stops)
    assert ("".join(parts), text.stopped) == cut(b"".join(pieces).decode(), stops)


@given(pieces_of(BROKEN), STOPS)
def test_pieces_of_broken_text(pieces, stops):
    parts, text = stream(pieces, stops)
    assert ("".join(parts), text.stopped) == cut(b"".join(pieces).decode("utf-8", "replace"), stops)


@given(
    st.lists(st.sampled_from("aab"), max_size=30).map("".join),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.data(),
)
def test_stop_strings_inside_each_other(text, stops, data):
    pieces = data.draw(pieces_of(st.just(text.encode())))
    parts, result = stream(pieces, stops)
    assert ("".join(parts), result.stopped) == cut(text, stops)


@given(pieces_of(TEXTS.map(str.encode)), STOPS)
def test_only_what_may_still_change_is_held_back(pieces, stops):
    """After each token all is out but an unfinished character and a possible beginning of a stop string."""
    text, shown, data = TextStream(pieces.__getitem__, stops), "", b""
    for i, piece in enumerate(pieces):
        shown, data = shown + text.push(i), data + piece
        if text.stopped:
            return
        held = data.decode("utf-8", "ignore")[len(shown) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_character_in_pieces_comes_out_once_it_is_whole():
    assert stream([b"a\xf0", b"\x9f", b"\x98\x80b"], [])[0] == ["a", "", "😀b", ""]


def test_an_unfinished_character_is_replaced_at_the_end():
    assert stream([b"a", b"\xf0\x9f"], [])[0] == ["a", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_possible_stop_string_is_held_until_it_is_decided():
    assert stream([b"x#", b"#", b"y"], ["###"])[0] == ["x", "", "##y", ""]
    assert stream([b"x#", b"#"], ["###"])[0] == ["x", "", "##"]


def test_nothing_follows_a_stop_string():
    parts, text = stream([b"x<", b"/s>y", b"z"], ["</s>"])
    assert parts == ["x", "", "", ""]
    assert text.stopped == "</s>"


def test_a_replacement_character_can_be_a_stop_string():
    parts, text = stream([b"a", b"\xf0"], ["\N{REPLACEMENT CHARACTER}"])
    assert parts == ["a", "", ""]
    assert text.stopped == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("stop", "piece"), [("a" * 10**6 + "b", "a"), ("ab" * 500_000 + "c", "abab"), ("a" * 999, "ab")]
)
def test_long_stop_strings_take_no_more_work_than_the_text_is_long(stop, piece):
    """With a search that starts anew at every token this would take hours."""
    text, count = TextStream(lambda _: piece.encode(), [stop]), 50_000
    parts = [*(text.push(0) for _ in range(count)), text.finish()]
    assert "".join(parts) == piece * count and text.stopped is None


def test_finishing_twice_says_nothing_more():
    text = TextStream(lambda _: b"\xe2", ())
    text.push(0)
    assert (text.finish(), text.finish()) == ("\N{REPLACEMENT CHARACTER}", "")


@pytest.mark.parametrize("stops", ["abc", [""], ["a", ""], [b"a"], [None]])
def test_stop_strings_are_checked(stops):
    with pytest.raises(InputError, match="stop strings"):
        TextStream(lambda _: b"", stops)
