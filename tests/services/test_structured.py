"""Answers under a JSON schema or a regular expression, from the server: both endpoints, streams, crowds, refusals."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

from lrt_deploy.text.grammar import Grammar

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
MESSAGES = [{"role": "user", "content": "A person, please."}]
REGEX = r"[a-z]{2,5}( \d{1,3}){0,2};"


def texts(body):
    return [(c["text"] if "text" in c else c["message"]["content"], c["finish_reason"]) for c in body["choices"]]


def check(text, reason, schema=PERSON):
    if reason == "stop":
        jsonschema.validate(json.loads(text), schema)
    else:
        assert reason == "length"
    return reason == "stop"


@pytest.mark.parametrize("temperature", [0, 1])
def test_both_endpoints_answer_in_the_form_of_the_schema_or_say_length(server, temperature):
    fields = {"response_format": FORMAT, "n": 3, "temperature": temperature, "seed": 1}
    found = texts(server.complete("A person: ", max_tokens=200, **fields))
    found += texts(server.chat(MESSAGES, max_tokens=200, **fields))
    assert len(found) == 6 and all(check(*choice) for choice in found)
    cut = texts(server.complete("A person: ", max_tokens=3, **fields))
    assert {reason for _, reason in cut} == {"length"}


def test_openai_s_client_streams_an_answer_in_the_form_of_the_schema(server, client):
    stream = client.chat.completions.create(
        model=server.model, messages=MESSAGES, response_format=FORMAT, max_tokens=200, n=2, seed=2, stream=True
    )
    text, reasons = ["", ""], [None, None]
    for chunk in stream:
        for choice in chunk.choices:
            text[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    whole = server.chat(MESSAGES, response_format=FORMAT, max_tokens=200, n=2, seed=2)
    assert texts(whole) == list(zip(text, reasons, strict=True))
    assert all(check(*choice) for choice in texts(whole))


def test_an_answer_at_temperature_0_is_the_one_of_the_library(server, decoder):
    found = list(decoder.generate("A person: ", 200, grammar=Grammar.json_schema(PERSON)))
    answer = texts(server.complete("A person: ", max_tokens=200, temperature=0, response_format=FORMAT))
    assert answer == [("".join(event.text for event in found), "stop")]


def test_json_objects_and_regular_expressions(server):
    for seed in range(4):
        for text, reason in texts(
            server.chat(MESSAGES, response_format={"type": "json_object"}, max_tokens=60, seed=seed)
        ):
            check(text, reason, {"type": "object"})
        (found,) = texts(server.complete("x", guided_regex=REGEX, max_tokens=60, seed=seed))
        assert found[1] == "stop" and re.fullmatch(REGEX, found[0])
    assert texts(server.complete("x", response_format={"type": "text"}, max_tokens=2, seed=1)) == texts(
        server.complete("x", max_tokens=2, seed=1)
    )


def test_in_a_crowd_of_all_kinds_each_answer_is_the_one_that_it_is_alone(server):
    bodies = [
        {"prompt": f"Request {i}: ", "seed": i, "max_tokens": 40, "prefill": "stepwise"}
        | ({}, {"response_format": FORMAT}, {"guided_regex": REGEX}, {"temperature": 0})[i % 4]
        for i in range(24)
    ]
    alone = [texts(server.post("/v1/completions", body).json) for body in bodies]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda body: texts(server.post("/v1/completions", body).json), bodies))
    assert together == alone


WRONG = {
    "response_format": [{"response_format": 3}],
    "response_format.type": [{"response_format": {"type": "xml"}}, {"response_format": {}}],
    "response_format.json_schema": [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
    ],
    "response_format.json_schema.schema": [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
        for schema in (
            {"type": "strin"},
            {"type": "integer", "multipleOf": 999_983},
            {"enum": ["x" * 20 + str(i) for i in range(40_000)]},
            {"$ref": "http://127.0.0.1/"},
        )
    ],
    "guided_regex": [{"guided_regex": value} for value in ("([", 3, "a" * 5000)]
    + [{"guided_regex": "a", "response_format": FORMAT}],
    "stop": [{"response_format": FORMAT, "stop": "}"}],
    "ignore_eos": [{"guided_regex": "a", "ignore_eos": True}],
}


@pytest.mark.parametrize("param", WRONG)
def test_what_cannot_be_used_is_a_400_that_names_the_field_and_the_server_goes_on(server, param):
    for fields in WRONG[param]:
        for path, prompt in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": MESSAGES})):
            reply = server.post(path, prompt | fields)
            assert reply.status == 400 and reply.error["param"] == param, reply.body
    assert texts(server.complete("x", guided_regex="ok", max_tokens=20)) == [("ok", "stop")]


def test_the_server_answers_others_while_a_costly_schema_is_compiled(server):
    schema = {"allOf": [{"type": "string", "pattern": f".*{i}.{{9}}a"} for i in range(300)]}
    body = {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    with ThreadPoolExecutor(1) as pool:
        costly = pool.submit(server.post, "/v1/completions", body)
        answered = 0
        while not costly.done():
            assert server.complete("x", max_tokens=1)["usage"]["completion_tokens"] == 1
            answered += 1
        assert costly.result().status == 400 and answered > 5


def test_a_grammar_that_becomes_too_costly_ends_its_stream_with_an_error(server):
    stream = server.open_stream(
        "/v1/completions",
        {"prompt": "x", "guided_regex": r"(\w+\s*){1000}", "max_tokens": 400, "temperature": 3, "seed": 0},
    )
    *_, last = stream.events()
    stream.close()
    assert "cannot be followed" in last["error"]["message"]
    server.complete("x", max_tokens=1)


def test_without_llguidance_a_400_says_what_to_install(launch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['llguidance'] = None\n")
    bare = launch(environment={"PYTHONPATH": str(tmp_path)})
    reply = bare.post("/v1/completions", {"prompt": "x", "guided_regex": "a"})
    assert reply.status == 400 and reply.error["param"] == "guided_regex" and "[grammar]" in reply.error["message"]
    bare.complete("x", max_tokens=2)
