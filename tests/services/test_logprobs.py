"""Log-probabilities as OpenAI's two APIs show them, held against the model's own in this process."""

from __future__ import annotations

import json

import numpy as np
import pytest

PROMPT = "import os\n\ndef "
CLOSE = 2e-4  # a row among others rounds otherwise


def scored(decoder, ids):
    return decoder.score([ids])[0].tolist()


def legacy(server, prompt, **fields):
    return server.complete(prompt, **fields)["choices"][0]


def test_echo_with_logprobs_has_the_prompt_the_first_null_and_what_was_generated(server, decoder):
    ids = decoder.prompt_ids(PROMPT)
    for prompt, shown in ((PROMPT, ids[1:]), (ids, ids)):
        choice = legacy(server, prompt, echo=True, logprobs=2, max_tokens=3, temperature=0, ignore_eos=True)
        found = choice["logprobs"]
        tokens = [event.token for event in decoder.generate(ids, 3, stop_ids=[])]
        expected = scored(decoder, ids + tokens)[-len(shown) - 2 :]
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert np.allclose(found["token_logprobs"][1:], expected, atol=CLOSE)
        assert "".join(found["tokens"]) == choice["text"]
        assert [choice["text"][at:].startswith(t) for at, t in zip(found["text_offset"], found["tokens"], strict=True)]
        assert found["text_offset"][0] == 0 and len(found["tokens"]) == len(shown) + 3


def test_a_prompt_is_scored_without_generating(server, decoder):
    ids = decoder.prompt_ids(PROMPT)
    answer = server.complete(ids, echo=True, logprobs=0, max_tokens=0)
    found = answer["choices"][0]["logprobs"]
    assert np.allclose(found["token_logprobs"][1:], scored(decoder, ids), atol=CLOSE)
    assert answer["usage"]["completion_tokens"] == 0 and answer["choices"][0]["finish_reason"] == "length"
    assert server.complete(ids, max_tokens=0)["choices"][0]["text"] == ""


def test_the_chosen_and_the_top_logprob_are_the_same_number(server, client):
    found = legacy(server, PROMPT, logprobs=5, max_tokens=20, temperature=0, echo=True)["logprobs"]
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        if top is not None:
            assert top[token] == logprob and 5 <= len(top) <= 6
    for token, logprob, top in list(
        zip(*(found[n] for n in ("tokens", "token_logprobs", "top_logprobs")), strict=True)
    )[-20:]:
        assert max(top.values()) == logprob and max(top, key=top.get) == token
    answer = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Hello"}],
        logprobs=True,
        top_logprobs=3,
        max_tokens=10,
        temperature=0,
    )
    for entry in answer.choices[0].logprobs.content:
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert len(entry.top_logprobs) == 3 and bytes(entry.bytes).decode("utf-8", "replace") == entry.token


def test_a_stream_has_the_same_logprobs_as_the_whole_answer(server):
    body = {"prompt": PROMPT, "max_tokens": 25, "seed": 1, "temperature": 3.0, "logprobs": 2, "echo": True}
    whole = legacy(server, **body)
    *chunks, _ = server.open_stream("/v1/completions", body).events()
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [item for part in parts for item in part["logprobs"][field]]
        if field in ("tokens", "text_offset"):
            assert joined == whole["logprobs"][field]
        assert len(joined) == len(whole["logprobs"][field])
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 8, "temperature": 0, "logprobs": True}
    *chunks, _ = server.open_stream("/v1/chat/completions", chat).events()
    tokens = [entry["token"] for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]]
    choice = server.chat(chat.pop("messages"), **chat)["choices"][0]
    assert tokens == [entry["token"] for entry in choice["logprobs"]["content"]]


def test_parts_of_characters_are_named_by_their_bytes(server, decoder):
    euro = "€".encode()
    ids = [next(i for i in range(256) if decoder.tokenizer.token_bytes_of(i) == bytes([byte])) for byte in euro]
    body = {"prompt": [1], "max_tokens": 1, "temperature": 0, "logprobs": 0, "logit_bias": {str(ids[0]): 1000}}
    choice = legacy(server, **body)
    assert choice["text"] == "\ufffd" and choice["logprobs"]["tokens"] == ["bytes:\\xe2"]
    assert json.dumps(choice["logprobs"])


def test_a_character_of_three_tokens_is_one_chunk(server, decoder):
    euro = "€".encode()
    ids = [next(i for i in range(256) if decoder.tokenizer.token_bytes_of(i) == bytes([byte])) for byte in euro]
    # Each of the three is chosen once: a presence penalty outweighs the bias of what was chosen.
    bias = {str(token): 1000 - 10 * at for at, token in enumerate(ids)}
    body = {"prompt": [1], "max_tokens": 3, "temperature": 0, "logit_bias": bias, "presence_penalty": 500}
    *chunks, _ = server.open_stream("/v1/completions", body).events()
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["€"]


@pytest.mark.parametrize(
    "options",
    [
        {"frequency_penalty": 1.5},
        {"presence_penalty": 0.7, "temperature": 1.0, "seed": 2},
        {"repetition_penalty": 1.3},
        {"top_k": 5, "temperature": 1.2, "seed": 3},
        {"top_p": 0.5, "temperature": 1.2, "seed": 4},
        {"min_p": 0.2, "temperature": 1.2, "seed": 5},
        {"logit_bias": {"300": 5.0, "301": -100}, "temperature": 1.0, "seed": 6},
    ],
)
def test_each_sampling_option_does_what_it_does_in_generate(server, decoder, options):
    known = {"temperature": 0.0, **options}
    if "logit_bias" in known:
        known["logit_bias"] = {int(token): bias for token, bias in known["logit_bias"].items()}
    expected = "".join(event.text for event in decoder.generate(PROMPT, 30, **known))
    assert legacy(server, PROMPT, max_tokens=30, **{"temperature": 0, **options})["text"] == expected


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"logprobs": 6}, "logprobs"),
        ("/v1/completions", {"logprobs": True}, "logprobs"),
        ("/v1/completions", {"logprobs": 1, "echo": True, "prefill": "fixed-point"}, "prefill"),
        ("/v1/completions", {"logit_bias": {"x": 1}}, "logit_bias"),
        ("/v1/completions", {"logit_bias": {"5000": 1}}, "logit_bias"),
        ("/v1/completions", {"logit_bias": {"1": 1e9}}, "logit_bias"),
        ("/v1/completions", {"frequency_penalty": 1e9}, "frequency_penalty"),
        ("/v1/chat/completions", {"logprobs": 1}, "logprobs"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_wrong_options_are_named(server, path, fields, param):
    given = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    reply = server.post(path, given | fields)
    assert reply.status == 400 and (reply.error["param"] or "").startswith(param), reply.body


def test_offsets_are_those_of_the_characters_that_tokens_begin_in_whatever_their_bytes(server, decoder):
    tokenizer = decoder.tokenizer
    one = {tokenizer.token_bytes_of(token): token for token in reversed(range(tokenizer.vocab_size))}
    data = "a\u00e9\u20ac\U0001f600".encode() + b"\xc3b\xe2\x82\xe2\x82\xac\xff\xf0\x9f\xc3\xa9\xa9\xf0"
    ids = [one[bytes([byte])] for byte in data]
    answer = server.complete(ids, echo=True, logprobs=0, max_tokens=8, temperature=2.0, seed=1)["choices"][0]
    text, offsets = answer["text"], answer["logprobs"]["text_offset"]
    assert text.startswith(data.decode(errors="replace"))
    # The last character of a text is the one that its last byte belongs to, also where that is not whole.
    expected = [len(data[: at + 1].decode(errors="replace")) - 1 for at in range(len(data))]
    assert offsets[: len(data)] == expected
    assert offsets[len(data)] == len(data.decode(errors="replace"))
