"""What a caller hands to an opened decoder: tokens, options, texts, conversations."""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path

import numpy as np

from hostile.originals import BATCH, CAPACITY, LONG_PROMPT, PROMPT, SIZES, Originals, encoding_state
from hostile.trial import EQUAL, OTHER, WRONG, Trial

VOCAB = SIZES["vocab_size"]
NAN, INF = float("nan"), float("inf")
ODD = (
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        5,
        270,
        300,
        319,
        320,
        2**31,
        2**63,
        2**64,
        10**400,
        -(2**63),
        1.0,
        1.5,
        NAN,
        INF,
    ),
    *(
        "",
        "a",
        "5",
        b"5",
        [],
        [5],
        {},
        (),
        object,
        {5},
        3j,
        np.float32(5),
        np.int64(5),
        np.uint64(2**63),
        np.bool_(True),
    ),
    *(np.array(5), np.array([5]), np.array([[5]]), np.array([5.0]), np.array(["5"]), np.zeros(0), range(3), iter([1])),
)


class Length:
    """A sequence that lies about its length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return 5


def odd_row(rng: random.Random) -> tuple[object, str]:
    """A row of token ids that is often none."""
    kind = rng.choices(range(13), (3, 0, 0, 2, 2, 1, 2, 1, 1, 1, 1, 1, 6))[0]
    valid = [rng.randrange(VOCAB) for _ in range(rng.choice((1, 2, 6, 20)))]
    if kind == 12:
        valid[rng.randrange(len(valid))] = token = rng.choice(
            (-1, -2, VOCAB, VOCAB + 1, 319, 320, 2**31, 2**40, -(2**63), True)
        )
        return valid, f"the id {token}"
    if kind < 3:
        valid[rng.randrange(len(valid))] = odd = rng.choice(ODD)
        return valid, f"{str(odd)[:30]} among ids"
    if kind == 3:
        return valid, "valid ids"
    if kind == 4:
        dtype = rng.choice(
            ("int8", "int16", "int32", "uint8", "uint64", "float32", "bool", "object", ">i8", "S4", "complex64")
        )
        return np.array(valid).astype(dtype), f"ids as {dtype}"
    if kind == 5:
        return rng.choice(
            (tuple(valid), range(5), np.array(valid)[::-1], np.array([valid]), np.array(valid)[:, None])
        ), "another sequence"
    if kind == 6:
        return valid * rng.choice((4, 100, 5000)), "many ids"
    if kind == 7:
        odd = rng.choice(ODD)
        return odd, f"{type(odd).__name__} {str(odd)[:30]}"
    if kind == 8:
        return [valid, valid[:1]], "ragged"
    if kind == 9:
        return rng.choice(
            (Length(3), Length(0), Length(10**9), "abc", b"abc", bytearray(b"abc"), memoryview(b"abc"))
        ), "a sequence of another kind"
    if kind == 10:
        return [str(token) for token in valid], "ids as text"
    return [[token] for token in valid], "ids in lists"


def tokens(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """Token ids given to prefill, step, score or generate."""
    kind = rng.choices(("prefill", "step", "generate", "continue", "rows"), (40, 25, 15, 12, 8))[0]
    row, what = odd_row(rng)
    others = [odd_row(rng)[0] for _ in range(rng.choice((0, 0, 0, 0, 1, 4)))]
    rows: object = [row, *others]
    if rng.random() < 0.1:
        rows, what = rng.choice(ODD), "no list of rows"
    names = ("prompt", "token", "sequence", "slots", "rows", "step", "state", "row")
    act = {
        "prefill": lambda: read(originals, rows),
        "step": lambda: stepped(originals, row),
        "generate": lambda: generated(originals, row),
        "continue": lambda: continued(originals, rows),
        "rows": lambda: picked(originals, row),
    }[kind]
    parses = is_rows(rows if kind in ("prefill", "continue") else [row])
    return Trial(f"{kind}: {what}", parses, act, names)


def is_rows(rows: object) -> bool:
    """Whether numpy makes at least one array of whole numbers of it: the first thing that looks at it."""
    try:
        if any(isinstance(row, Length) for row in rows):  # type: ignore[attr-defined]
            return True
        return all(np.asarray(row).dtype.kind in "iub" for row in rows)  # type: ignore[attr-defined]
    except Exception:
        return False


def meant(row: object) -> list[int] | None:
    """The ids that a row of whole numbers means; None where it is not a flat row of whole numbers in range."""
    try:
        items = row.tolist() if isinstance(row, np.ndarray) else list(row)  # type: ignore[call-overload]
    except Exception:
        return None
    items = [item[()] if isinstance(item, np.ndarray) and item.ndim == 0 else item for item in items]
    whole = [isinstance(item, int | np.integer) and not isinstance(item, bool) for item in items]
    if not items or not all(whole) or not all(0 <= item < VOCAB for item in items):
        return None
    return [int(item) for item in items]


def expected_logits(originals: Originals, ids: list[int]) -> np.ndarray:
    """(V) after these ids, read in the plainest way."""
    return originals.decoder.prefill([ids], policy="stepwise").logits[0]


def read(originals: Originals, rows: object):
    """What is read must be what was meant."""
    state = originals.decoder.prefill(rows, policy="stepwise")
    wanted = [meant(row) for row in rows]  # type: ignore[attr-defined]
    if None in wanted:
        return WRONG, "something that is no row of ids was read"
    if state.tokens != wanted:
        return WRONG, "other tokens were read"
    if sum(map(len, wanted)) < 60:
        for index, ids in enumerate(wanted):
            if np.abs(state.logits[index] - expected_logits(originals, ids)).max() > 1e-4:
                return WRONG, f"row {index} has other logits than alone"
    return EQUAL, ""


def stepped(originals: Originals, row: object):
    """A step with odd ids leaves the state as it was, or appends what was meant."""
    state = originals.decoder.prefill([PROMPT], policy="stepwise")
    before = state.logits
    try:
        originals.decoder.step(state, row)
    except Exception:
        if state.tokens != [PROMPT] or not np.array_equal(state.logits, before):
            return WRONG, "the state has changed in a refused step"
        raise
    if meant(row) is None or state.tokens != [PROMPT + meant(row)]:
        return WRONG, "something else was appended"
    return EQUAL, ""


def generated(originals: Originals, row: object):
    """Generation from an odd prompt."""
    events = list(originals.decoder.generate(row, max_new_tokens=3, stop_ids=[]))
    if isinstance(row, str):
        return OTHER, "a text prompt"
    if meant(row) is None:
        return WRONG, "something that is no row of ids was read"
    expected = expected_logits(originals, meant(row))
    return (
        (EQUAL, "") if events[0].token == int(expected.argmax()) else (WRONG, "another token than the largest logit's")
    )


def continued(originals: Originals, rows: object):
    """A refused prompt leaves a state as it was."""
    state = originals.decoder.prefill([PROMPT], policy="stepwise")
    before, latent = state.logits, state.latent
    try:
        originals.decoder.prefill(rows, state=state, policy="stepwise")
    except Exception:
        if (
            state.tokens != [PROMPT]
            or not np.array_equal(state.logits, before)
            or not np.array_equal(state.latent, latent)
        ):
            return WRONG, "the state has changed in a refused prefill"
        raise
    wanted = [meant(row) for row in rows]  # type: ignore[attr-defined]
    if None in wanted or state.tokens != [PROMPT + wanted[0]]:
        return WRONG, "something else was appended"
    return EQUAL, ""


def picked(originals: Originals, row: object):
    """Rows of a state by odd indices."""
    state = originals.decoder.prefill([PROMPT, LONG_PROMPT], policy="stepwise")
    found = state.rows(row)
    indices = row.tolist() if isinstance(row, np.ndarray) else list(row)  # type: ignore[call-overload]
    if any(isinstance(i, bool) or not isinstance(i, int | np.integer) or not 0 <= i < 2 for i in indices):
        return WRONG, "rows by something else than their numbers"
    if found.tokens != [state.tokens[i] for i in indices]:
        return WRONG, "other rows"
    return EQUAL, ""


def options(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """Options of opening, prefill, generation, states and export, of odd values."""
    kind = rng.choices(("generate", "prefill", "open", "state", "cli", "methods"), (38, 16, 14, 14, 10, 8))[0]
    values: dict[str, object] = {}
    if kind == "generate":
        keys = (
            "max_new_tokens",
            "stop_ids",
            "stop_strings",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "seed",
            "policy",
            "tolerance",
        )
        near = {
            "temperature": (0.0, 0.7, 1e-300, 1e4, 1e5, -0.0),
            "stop_ids": ([5], [270], (), {5}, [-1]),
            "stop_strings": (["a"], [""], "a", ["a"] * 1000, ["x" * 10_000], [5]),
            "top_p": (1e-9, 1, 0.5),
            "seed": (2**70, 0),
            "max_new_tokens": (1, 3, 10**9),
        }
        for key in rng.sample(keys, rng.choice((1, 1, 2))):
            values[key] = rng.choice((*near.get(key, ()), rng.choice(ODD)))
    elif kind == "prefill":
        for key in rng.sample(("policy", "tolerance", "reuse", "state"), rng.choice((1, 2))):
            values[key] = rng.choice(
                (
                    rng.choice(ODD),
                    *{
                        "policy": ("auto", "fixed-point", "zero", "STEPWISE"),
                        "tolerance": (1e-3, 1e-9, 1e-300, 1.0, -1.0),
                    }.get(key, ()),
                )
            )
    elif kind == "open":
        for key in rng.sample(("backend", "precision", "threads", "max_seq_len", "verify"), rng.choice((1, 1, 2))):
            values[key] = rng.choice(
                (
                    rng.choice(ODD),
                    *{"backend": ("auto", "ort-cuda", "tensorrt"), "threads": (1, 2), "max_seq_len": (1, 64, 65)}.get(
                        key, ()
                    ),
                )
            )
    else:
        values["value"] = rng.choice(ODD)
        values["method"] = rng.choice(
            {
                "state": ("save", "load_state", "extra", "rewind", "add", "drop"),
                "cli": ("tokens", "prompt"),
                "methods": ("new_state", "adopt", "decode", "token_bytes_of", "decode_many"),
            }[kind]
        )
    what = ", ".join(f"{key}={str(value)[:40]!a}" for key, value in values.items())
    return Trial(f"{kind}: {what}", True, lambda: used(originals, kind, values, place), (), ("out.state", "5", "a"))


def used(originals: Originals, kind: str, values: dict[str, object], place: Path):
    """Call with the options; what is accepted must work and leave the decoder as it was."""
    import lrt_deploy

    decoder = originals.decoder
    if kind == "generate":
        given = {"max_new_tokens": 2} | values
        events = []
        for event in decoder.generate(PROMPT, **given):
            events.append(event)
            if len(events) > CAPACITY:
                return WRONG, "more tokens than the state can hold"
        if isinstance(given["max_new_tokens"], bool | float) or len(events) > max(1, int(given["max_new_tokens"])):
            return WRONG, "another number of tokens than was asked for"
        if (
            given.get("temperature", 0) == 0
            and events[0].token != int(originals.numbers["bundle"][0].argmax())
            and "repetition_penalty" not in given
        ):
            return WRONG, "greedy, and another token than the largest logit's"
        return EQUAL, ""
    if kind == "prefill":
        state = decoder.prefill([LONG_PROMPT], **values)
        if values.get("policy") != "zero" and np.abs(state.logits[0] - fresh(originals)).max() > 1e-2:
            tolerance = values.get("tolerance")
            if not isinstance(tolerance, int | float | np.number) or tolerance < 1e-2:
                return WRONG, "other logits"
        return EQUAL, ""
    if kind == "open":
        with lrt_deploy.open_decoder(originals.folder / "bundle", **({"threads": 1} | values)) as opened:
            found = opened.prefill([PROMPT[:1]], policy="stepwise").logits
        return (
            (EQUAL, "")
            if np.allclose(found, expected_logits(originals, PROMPT[:1]), atol=1e-5)
            else (WRONG, "other logits")
        )
    return called(originals, kind, str(values["method"]), values["value"], place)


def fresh(originals: Originals) -> np.ndarray:
    """After the long prompt."""
    return expected_logits(originals, LONG_PROMPT)


def called(originals: Originals, kind: str, method: str, value: object, place: Path):
    """Methods of states, tokenizers and decoders with an odd argument."""
    import os

    from lrt_deploy.cli import options as cli_options

    decoder = originals.decoder
    if kind == "cli":
        import typer

        try:
            if method == "tokens":
                cli_options.parse_tokens(str(value))
            else:
                cli_options.one_prompt(str(value), None)
        except typer.BadParameter:
            return OTHER, "a usage error"
        return EQUAL, ""
    if kind == "methods":
        if method == "new_state":
            decoder.new_state(value)
        elif method == "adopt":
            decoder.adopt(value)
        elif method == "token_bytes_of":
            decoder.tokenizer.token_bytes_of(value)
        elif method == "decode_many":
            decoder.tokenizer.decode([value, 5])
        else:
            decoder.tokenizer.decode(value)
        return EQUAL, ""
    state = decoder.prefill([PROMPT], policy="stepwise")
    before = Path.cwd()
    os.chdir(place)
    try:
        if method == "save":
            state.save(value)
        elif method == "load_state":
            decoder.load_state(value)
        elif method == "extra":
            state.extra = value
            state.save(place / "out.state")
        elif method == "rewind":
            state.rewind(value)
        elif method == "add":
            state.rows([0]).add(value)
        else:
            state.drop(value)
    finally:
        os.chdir(before)
    return EQUAL, ""


PIECES = (
    *(
        "the king",
        " ",
        "\n",
        "\t",
        "12345",
        "é",
        "漢",
        "🙂",
        "\u0301",
        "\u200d",
        "\ufeff",
        "\0",
        "<|bos|>",
        "<|assistant_end|>",
    ),
    *(
        "\u202e",
        "ſ",
        "K",
        "'LL",
        "'ſ",
        "\r\n",
        "\u2028",
        "\x1c",
        "\x85",
        "\xa0",
        "a" * 50,
        "!?",
        "\ud83d",
        "\ude00",
        "\uffff",
        "\U0010ffff",
    ),
)


def odd_text(rng: random.Random, most: int = 400) -> tuple[str, str]:
    """A text of pieces that tokenizers stumble over; rarely a very long run."""
    kind = rng.randrange(20)
    if kind < 14:
        return "".join(rng.choices(PIECES, k=rng.randrange(1, 40)))[:most], "pieces"
    if kind < 17:
        count = rng.choice((0, 1, 7, most))
        return "".join(
            chr(rng.choice((rng.randrange(128), rng.randrange(0x300), rng.randrange(0x11_0000)))) for _ in range(count)
        ), "any code points"
    piece = rng.choice((" ", "\t", "\n", "a", "1", "!", "é", "\u0301", "🙂", " a", "\r"))
    count = rng.choice((100, 3000, most, 30_000))
    return piece * count, f"{count} times {piece!a}"


def texts(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """Texts, conversations and streams through the tokenizer of an opened bundle."""
    kind = rng.choices(("encode", "prompt", "chat", "stream"), (50, 12, 26, 12))[0]
    text: object
    text, what = odd_text(rng)
    if rng.random() < 0.15:
        text = rng.choice(ODD)
        what = f"{type(text).__name__} {str(text)[:30]}"
    messages = conversation(rng, text) if kind == "chat" else None
    if kind == "stream":
        ids = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))]
        stops = rng.choice(((), ["\n"], ["the", "he"], [str(text)[:5] or "a"], ["é", "🙂"]))
        return Trial(
            f"stream of {ids[:6]} with {str(stops)[:40]!a}", True, lambda: streamed(originals, ids, stops), ("stop",)
        )
    parses = isinstance(text, str) if kind != "chat" else isinstance(messages, list)
    names = ("text", "message", "role", "prompt", "messages", "conversation")
    return Trial(f"{kind}: {what}", parses, lambda: encoded(originals, kind, text, messages), names)


def conversation(rng: random.Random, text: object) -> object:
    """Messages in an order and of a form that may be wrong, as a JSON file may hold them."""
    roles = [rng.choice(("user", "assistant", "system", "tool", "", None, 3)) for _ in range(rng.randrange(5))]
    if rng.random() < 0.6:
        roles = ["user", "assistant"] * rng.randrange(3) + ["user"]
    messages: list[object] = [{"role": role, "content": rng.choice((text, "hello"))} for role in roles]
    if messages and rng.random() < 0.3:
        index = rng.randrange(len(messages))
        messages[index] = rng.choice(
            (
                None,
                3,
                "user",
                [],
                {"role": "user"},
                {"content": "x"},
                {"role": ["user"], "content": "x"},
                {"role": "user", "content": ["x"]},
                ("user", "x"),
            )
        )
    if rng.random() < 0.07:
        return rng.choice((None, 3, "user", {}, {"role": "user", "content": "x"}, ()))
    return messages


@functools.lru_cache
def tiktoken_encoding():
    """The Encoding that the tokenizer was made from."""
    import tiktoken

    return tiktoken.Encoding(**encoding_state())


def encoded(originals: Originals, kind: str, text: object, messages: object):
    """Ids must be tiktoken's; only the chat form puts special tokens in."""
    tokenizer, truth = originals.decoder.tokenizer, tiktoken_encoding()
    special = encoding_state()["special_tokens"]
    if kind == "encode":
        found, expected = tokenizer.encode(text), truth.encode_ordinary(text)
        tokenizer.decode(found)
    elif kind == "prompt":
        found, expected = tokenizer.encode_prompt(text), [special["<|bos|>"], *truth.encode_ordinary(text)]
    else:
        found, expected = tokenizer.render_chat(messages), [special["<|bos|>"]]
        turns = [(m["role"], m["content"]) for m in messages]
        if turns[0][0] == "system":
            turns = [("user", f"{turns[0][1]}\n\n{turns[1][1]}"), *turns[2:]]
        for role, content in turns:
            expected += [special[f"<|{role}_start|>"], *truth.encode_ordinary(content), special[f"<|{role}_end|>"]]
        expected += [special["<|assistant_start|>"]]
    return (EQUAL, "") if found == expected else (WRONG, "other ids than tiktoken gives")


def streamed(originals: Originals, ids: list[int], stops: object):
    """A stream gives the text of its tokens up to the first stop string, nothing of it, nothing twice."""
    from lrt_deploy.text.text_stream import TextStream

    tokenizer = originals.decoder.tokenizer
    stream = TextStream(tokenizer.token_bytes_of, stops)
    text = ""
    for token in ids:
        text += stream.push(token)
        if stream.stopped is not None:
            break
    else:
        text += stream.finish()
    whole = tokenizer.decode(ids)
    found = [whole.find(stop) for stop in stops if stop in whole]
    if stream.stopped is None and text != whole:
        return WRONG, "another text than the tokens have"
    if stream.stopped is not None and (not whole.startswith(text) or (found and len(text) > min(found))):
        return WRONG, "more than the text before the stop string"
    assert math.isfinite(len(text)) and BATCH
    return EQUAL, ""
