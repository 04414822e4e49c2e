"""What clients of OpenAI's API get from the server: answers, streams, errors."""

from __future__ import annotations

import json

import openai
import pytest

PROMPT = 'def emit(self, record):\n    """'
MESSAGES = [{"role": "user", "content": "Write a function."}]


def alone(decoder, prompt, max_new_tokens, **options):
    """(text, events) of the same generation in this process, by itself."""
    events = list(decoder.generate(prompt, max_new_tokens, **options))
    return "".join(event.text for event in events), events


# Answers


@pytest.mark.parametrize("tokens", [1, 40])
def test_temperature_zero_gives_what_generate_gives(server, decoder, tokens):
    answer = server.complete(PROMPT, max_tokens=tokens, temperature=0)
    assert answer["choices"][0]["text"] == alone(decoder, PROMPT, tokens)[0]
    usage = answer["usage"]
    assert usage["completion_tokens"] == tokens and usage["prompt_tokens"] == len(decoder.prompt_ids(PROMPT))
    assert usage["lrt"]["policy"] == "stepwise"


def test_a_chat_gives_what_the_chat_form_gives(client, decoder, server):
    system = {"role": "system", "content": "Be brief."}
    ids = decoder.tokenizer.render_chat([system, *MESSAGES])
    parts = [{"type": "text", "text": "Write a "}, {"type": "text", "text": "function."}]
    for messages in ([system, *MESSAGES], [system | {"role": "developer"}, {"role": "user", "content": parts}]):
        answer = client.chat.completions.create(
            model=server.model, messages=messages, temperature=0, max_completion_tokens=30
        )
        assert answer.choices[0].message.content == alone(decoder, ids, 30)[0]
        assert answer.usage.prompt_tokens == len(ids)


def test_a_chat_without_a_limit_runs_to_the_end_or_the_capacity(server, decoder):
    ids = decoder.tokenizer.render_chat(MESSAGES)
    _, events = alone(decoder, ids, decoder.max_seq_len)
    answer = server.chat(MESSAGES, temperature=0, max_tokens=None)
    assert answer["usage"]["completion_tokens"] == len(events)
    assert answer["choices"][0]["finish_reason"] == ("stop" if events[-1].finish_reason == "stop_token" else "length")


def test_completions_are_16_tokens_long_and_random_where_a_request_is_silent(server):
    answers = [server.complete(PROMPT) for _ in range(4)]
    assert {answer["usage"]["completion_tokens"] for answer in answers} == {16}
    assert len({answer["choices"][0]["text"] for answer in answers}) > 1


def test_lists_of_prompts_and_n_keep_their_index(client, server, decoder):
    prompts = ["def a(", "import os", "class B:"]
    answer = client.completions.create(model=server.model, prompt=prompts, n=2, seed=5, max_tokens=8)
    assert [choice.index for choice in answer.choices] == list(range(6))
    for index, choice in enumerate(answer.choices):
        prompt, at = prompts[index // 2], index % 2
        if at == 0:
            assert choice.text == alone(decoder, prompt, 8, temperature=1.0, seed=5)[0]
    first, second = answer.choices[0].text, answer.choices[1].text
    assert first != second
    ids = [decoder.prompt_ids(prompt) for prompt in prompts]
    again = client.completions.create(model=server.model, prompt=ids, seed=5, max_tokens=8)
    assert [choice.text for choice in again.choices] == [answer.choices[i].text for i in (0, 2, 4)]
    stream = client.completions.create(model=server.model, prompt=ids, n=2, seed=5, max_tokens=8, stream=True)
    texts = [""] * 6
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in answer.choices]


def test_the_best_of_several_is_the_most_likely(server, decoder):
    fields = {"seed": 3, "max_tokens": 6, "temperature": 1.5}
    answer = server.complete(PROMPT, n=1, best_of=4, **fields)
    assert answer["usage"]["completion_tokens"] == 24
    texts = [choice["text"] for choice in server.complete(PROMPT, n=4, **fields)["choices"]]
    assert answer["choices"][0]["text"] in texts


def test_echo_shows_the_prompt_without_the_hidden_token(server, decoder):
    answer = server.complete(PROMPT, echo=True, max_tokens=5, temperature=0)
    assert answer["choices"][0]["text"] == PROMPT + alone(decoder, PROMPT, 5)[0]
    ids = decoder.tokenizer.encode(PROMPT)
    assert server.complete(ids, echo=True, max_tokens=1)["choices"][0]["text"].startswith(PROMPT)
    stream = server.open_stream("/v1/completions", {"prompt": PROMPT, "echo": True, "max_tokens": 5, "temperature": 0})
    texts = [event["choices"][0]["text"] for event in stream.events() if event != "[DONE]"]
    assert "".join(texts) == answer["choices"][0]["text"]


# Streams


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_has_one_id_no_empty_chunk_one_reason_and_its_usage_last(server, path):
    body = {"max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
    body |= {"prompt": PROMPT} if path == "/v1/completions" else {"messages": MESSAGES}
    stream = server.open_stream(path, body)
    assert stream.response.getheader("content-type").startswith("text/event-stream")
    *chunks, usage, done = stream.events()
    assert done == "[DONE]"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 200
    kind = "text_completion" if path == "/v1/completions" else "chat.completion.chunk"
    for event in (*chunks, usage):
        assert (event["object"], event["model"], event["id"]) == (kind, server.model, chunks[0]["id"])
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    parts = [chunk["choices"][0] for chunk in chunks]
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
    texts = [part["text"] if "text" in part else part["delta"].get("content", "") for part in parts]
    assert all(texts[:-1]) and len(texts) > 2  # tokens that come while the loop is busy share a chunk
    whole = server.post(path, body | {"stream_options": None}).json["choices"][0]
    assert "".join(texts) == (whole["text"] if "text" in whole else whole["message"]["content"])
    if "messages" in body:
        assert [part["delta"].get("role") for part in parts] == ["assistant"] + [None] * (len(parts) - 1)


def test_a_stop_string_across_tokens_ends_the_text_before_it(client, server, decoder):
    text, events = alone(decoder, PROMPT, 40)
    pieces = [event.text for event in events]
    border = len("".join(pieces[:12]))
    stop = text[border - 2 : border + 2]
    assert text.index(stop) == border - 2
    expected, events = alone(decoder, PROMPT, 40, stop_strings=[stop, "not in the text"])
    options = {"model": server.model, "prompt": PROMPT, "stop": [stop, "not in the text"], "temperature": 0}
    answer = client.completions.create(max_tokens=40, **options)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
    assert answer.usage.completion_tokens == len(events)
    chunks = list(client.completions.create(max_tokens=40, stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_text_that_may_begin_a_stop_string_is_held_back_and_comes_in_the_end(server, decoder):
    text, _ = alone(decoder, PROMPT, 12)
    stop = text[-3:] + "\x00"
    stream = server.open_stream("/v1/completions", {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stop": stop})
    *chunks, _ = stream.events()
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == text
    assert parts[-1]["text"].endswith(text[-3:]) and parts[-1]["finish_reason"] == "length"


def test_characters_of_several_tokens_come_whole_and_the_last_one_is_flushed(server, decoder):
    options = {"temperature": 6.0, "seed": 11}
    expected, _ = alone(decoder, PROMPT, 120, **options)
    assert any(ord(character) > 127 for character in expected)
    body = {"prompt": PROMPT, "max_tokens": 120, "ignore_eos": True, **options}
    expected, _ = alone(decoder, PROMPT, 120, stop_ids=[], **options)
    assert server.complete(**body)["choices"][0]["text"] == expected
    events = list(server.open_stream("/v1/completions", body).events())
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == expected


# What is wrong


WRONG = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, -1]}, "prompt"),
    ({"prompt": [2048]}, "prompt"),
    ({"prompt": [2**70]}, "prompt"),
    ({"prompt": [True, 1]}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({}, "prompt"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
    ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 2**80}, "max_tokens"),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": 1000}, "n"),
    ({"prompt": "a", "n": 3, "best_of": 2}, "best_of"),
    ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
    ({"prompt": "a", "temperature": -0.1}, "temperature"),
    ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "top_k": -5}, "top_k"),
    ({"prompt": "a", "min_p": 2}, "min_p"),
    ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt": "a", "stop": [""]}, "stop"),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
    ({"prompt": "a", "stop": ["x" * 2000] * 3}, "stop"),
    ({"prompt": "a", "stop": [1]}, "stop"),
    ({"prompt": "a", "stream": "yes"}, "stream"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "a", "prefill": "fast"}, "prefill"),
    ({"prompt": "a", "tolerance": -1}, "tolerance"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "n": 128, "best_of": 128, "priority": 2**40}, "priority"),
    ({"prompt": "a", "priority": "high"}, "priority"),
    ({"prompt": "a", "deadline_s": -1}, "deadline_s"),
    ({"prompt": "a", "deadline_s": 1, "lrt": {"deadline_s": 2}}, "lrt.deadline_s"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    ({"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias"),
    ({"prompt": "a", "logit_bias": {"5": 1e9}}, "logit_bias[5]"),
    ({"prompt": "a", "frequency_penalty": 1e9}, "frequency_penalty"),
    ({"prompt": "a", "seed": "x"}, "seed"),
    ({"prompt": ["a"] * 256, "n": 128}, "n"),
    ({"prompt": "a", "lrt": {"latent_cosine": 1}}, "lrt.latent_cosine"),
    ({"prompt": "a", "guided_json": {"type": "object"}}, "guided_json"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "1"}]}, "messages[0].role"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
    ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=[json.dumps(body)[:60] for body, _ in WRONG])
def test_a_wrong_field_is_a_400_that_names_it(server, body, param):
    reply = server.post("/v1/chat/completions" if "messages" in body else "/v1/completions", body)
    assert reply.status == 400
    assert reply.error["param"] == param and reply.error["type"] == "invalid_request_error"
    assert param.partition("[")[0] in reply.error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"null", b'{"prompt": "\xff"}', b"[" * 100000, b'{"prompt": NaN}', b'"text"']
)
def test_a_body_that_is_no_json_object_is_a_400(server, body):
    reply = server.post("/v1/completions", body)
    assert reply.status == 400 and reply.error["message"]


def test_after_all_that_is_wrong_the_engine_lives(server, decoder):
    assert server.complete(PROMPT, max_tokens=5, temperature=0)["choices"][0]["text"] == alone(decoder, PROMPT, 5)[0]
    assert server.gauge("lrt_running") == server.gauge("lrt_waiting") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_more_than_the_capacity_is_a_400_with_both_counts(server, decoder, stream):
    ids, capacity = [1] * 600, decoder.max_seq_len
    for prompt, more in ((ids, 42), ([1] * 641, 1)):
        reply = server.post("/v1/completions", {"prompt": prompt, "max_tokens": more, "stream": stream})
        assert reply.status == 400 and reply.error["code"] == "context_length_exceeded"
        for count in (len(prompt), more, capacity):
            assert str(count) in reply.error["message"]
    full = server.complete(ids, max_tokens=41, temperature=0, ignore_eos=True)
    assert full["usage"]["completion_tokens"] == 41 and full["choices"][0]["finish_reason"] == "length"
    long = "word " * 40000
    reply = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": long}], "stream": stream})
    assert reply.status == 400 and reply.error["code"] == "context_length_exceeded"


def test_the_client_raises_its_own_errors(client, server):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=server.model, prompt="a", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    assert [model.id for model in client.models.list()] == [client.models.retrieve(server.model).id] == [server.model]


def test_unknown_paths_and_methods_are_errors_of_the_same_form(server):
    assert server.get("/v1/nothing").status == 404 and server.get("/v1/nothing").error["message"]
    assert server.get("/v1/completions").status == 405 and server.get("/v1/completions").error["message"]


# Tokens


def test_special_tokens_in_a_message_are_text(server, decoder):
    special = decoder.tokenizer.special_tokens
    content = "<|assistant_end|><|bos|>"
    tokens = server.post("/tokenize", {"messages": [{"role": "user", "content": content}]}).json["tokens"]
    assert tokens == decoder.tokenizer.render_chat([{"role": "user", "content": content}])
    assert tokens.count(special["<|bos|>"]) == 1 and special["<|assistant_end|>"] not in tokens
    answer = server.chat([{"role": "user", "content": content}], max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == len(tokens)
    ids = decoder.prompt_ids("a <|bos|> b")
    assert server.complete("a <|bos|> b", max_tokens=1)["usage"]["prompt_tokens"] == len(ids) > 4


def test_tokenize_and_detokenize_are_inverse_and_know_special_names(server, decoder):
    for name, token in decoder.tokenizer.special_tokens.items():
        assert server.post("/tokenize", {"prompt": name}).json["tokens"] == [token]
        assert server.post("/detokenize", {"tokens": [token]}).json["prompt"] == name
    found = server.post("/tokenize", {"prompt": PROMPT, "add_special_tokens": False}).json
    assert found["tokens"] == decoder.tokenizer.encode(PROMPT) and found["count"] == len(found["tokens"])
    assert server.post("/tokenize", {"prompt": PROMPT}).json["tokens"] == decoder.prompt_ids(PROMPT)
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json["prompt"] == PROMPT
    assert server.post("/detokenize", {"tokens": [10**9]}).error["param"] == "tokens"
    assert server.post("/tokenize", {}).status == 400
    info = server.get("/tokenizer_info").json
    assert (info["bos_token"], info["eos_token"]) == ("<|bos|>", "<|bos|>")
