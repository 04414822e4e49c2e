"""Answers under a JSON schema or a regular expression: what they match, alone and in a batch, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import jsonschema
import numpy as np
import pytest

import lrt_deploy
from lrt_deploy.errors import InputError
from lrt_deploy.runtime.batch import BatchDecoder
from lrt_deploy.runtime.generation import Generation
from lrt_deploy.runtime.sampling import Sampler, SamplingOptions
from lrt_deploy.text.grammar import MAX_LITERAL, MAX_REGEX, MAX_SCHEMA_BYTES, Grammar, Matcher
from lrt_deploy.text.text_stream import TextStream

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "bé", "\N{CAT FACE}"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {"node": {"type": "object", "properties": {"v": {"type": "boolean"}, "next": {"$ref": "#/$defs/node"}}}},
    "$ref": "#/$defs/node",
}
NUMBER = {"type": "number", "minimum": -1, "exclusiveMaximum": 2.5}
SCHEMAS = [PERSON, TREE, {"type": "object"}, NUMBER, {"enum": ["yes", "no"]}, {"anyOf": [PERSON, {"type": "null"}]}]
ENDLESS = (TREE, {"type": "object"}, NUMBER)  # a small model may go on in these
REGEX = r"[a-z]{2,5}( \d{1,3}){0,2};"


@pytest.fixture(scope="module")
def decoder(decoder_of):
    return decoder_of("demo")


def answer(events):
    return "".join(event.text for event in events), events[-1].finish_reason


def check(schema, text):
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_an_answer_that_ends_is_whole_and_one_that_is_cut_says_so(decoder, schema, temperature):
    ended, grammar = 0, Grammar.json_schema(schema)
    for seed in range(8):
        options = {"temperature": temperature, "seed": seed, "grammar": grammar}
        text, reason = answer(list(decoder.generate("An answer: ", 100, **options)))
        if reason == "length":
            continue
        assert reason in ("grammar", "stop_token")
        check(schema, text)
        ended += 1
    assert ended or schema in ENDLESS


def test_a_regular_expression_is_matched_as_a_whole(decoder):
    for seed in range(8):
        text, reason = answer(
            list(decoder.generate("x", 200, grammar=Grammar.regex(REGEX), temperature=1.0, seed=seed))
        )
        assert reason == "grammar" and re.fullmatch(REGEX, text)


def test_the_end_of_a_grammar_that_could_go_on_is_a_stop_token(decoder):
    found = list(decoder.generate("x", 50, grammar=Grammar.regex("(ab)*"), logit_bias={decoder.tokenizer.bos_id: 1e3}))
    assert [event.finish_reason for event in found] == ["stop_token"] and answer(found)[0] == ""


def test_a_token_that_ends_the_grammar_and_the_budget_ends_the_grammar(decoder):
    whole = list(decoder.generate("x", grammar=Grammar.json_schema({"enum": [True]})))
    again = list(decoder.generate("x", len(whole), grammar=Grammar.json_schema({"enum": [True]})))
    cut = list(decoder.generate("x", len(whole) - 1, grammar=Grammar.json_schema({"enum": [True]})))
    assert answer(whole) == answer(again) == ("true", "grammar") and cut[-1].finish_reason == "length"


def test_ids_without_a_text_and_special_tokens_within_an_answer_are_never_allowed(decoder):
    tokenizer = decoder.tokenizer
    matcher, tokens = Matcher(Grammar.regex("(?s).*"), tokenizer), []
    for token in tokenizer.encode('<|bos|> "x\n'):
        allowed = set(matcher.allowed(tokens).tolist())
        assert allowed < set(range(tokenizer.vocab_size)) and token in allowed
        assert allowed & set(tokenizer.special_tokens.values()) == tokenizer.stop_ids
        tokens.append(token)


def test_penalties_biases_and_cuts_leave_only_what_the_grammar_allows(decoder):
    hard = {"repetition_penalty": 1e6, "frequency_penalty": 1e4, "logit_bias": {5: 1e4}, "top_k": 3, "top_p": 0.5}
    for extra in ({}, {"temperature": 1e-4, "min_p": 1.0}, {"temperature": 1e4, "seed": 3}):
        text, reason = answer(list(decoder.generate("x", 300, grammar=Grammar.json_schema(PERSON), **hard, **extra)))
        assert reason == "grammar"
        check(PERSON, text)


def test_a_draw_among_allowed_ids_is_the_draw_from_their_logits_alone():
    rng = np.random.default_rng(0)
    logits, allowed = rng.normal(size=500).astype(np.float32), np.flatnonzero(rng.random(500) < 0.1)
    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {"temperature": 2.0, "top_k": 4}):
        sampler = Sampler(SamplingOptions(**options, seed=7))
        for index in range(40):
            found = sampler.choose(logits, [], index, allowed)
            assert found == allowed[sampler.choose(logits[allowed], [], index)]


def test_a_matcher_depends_on_the_tokens_alone(decoder):
    grammar, tokenizer = Grammar.json_schema(PERSON), decoder.tokenizer
    tokens = tokenizer.encode('{"name": "ab", "age": 12, "tags": []}')
    moving = Matcher(grammar, tokenizer)
    for count in (0, 1, 5, 5, 2, len(tokens) - 1, 3, 4, 0):
        assert np.array_equal(moving.allowed(tokens[:count]), Matcher(grammar, tokenizer).allowed(tokens[:count]))
    other = tokenizer.encode('{"name": "c')
    assert np.array_equal(moving.allowed(other), Matcher(grammar, tokenizer).allowed(other))
    assert moving.ended(tokens) and not moving.ended(tokens[:-1])


# Batches


def crowd(decoder, batch):
    """Submit a request with each grammar and some without; return what each is alone, by number."""
    alone = {}
    for at, schema in enumerate([*SCHEMAS, None, REGEX, None]):
        grammar = Grammar.regex(schema) if isinstance(schema, str) else schema and Grammar.json_schema(schema)
        options = {"temperature": 1.0 * (at % 2), "seed": at, "policy": "stepwise", "grammar": grammar}
        prompt = f"Request {at}: "
        alone[batch.submit(prompt, 40, **options)] = list(decoder.generate(prompt, 40, **options))
    return alone


def run(batch):
    found = {}
    for event in batch.run():
        found.setdefault(event.request, []).append(event.event or event.error)
    return found


@pytest.mark.parametrize("lanes", [1, 2])
def test_in_a_crowd_each_answer_is_the_one_that_it_is_alone(decoder, lanes):
    with BatchDecoder(decoder, 4, lanes) as batch:
        alone = crowd(decoder, batch)
        assert run(batch) == alone


def test_choices_of_one_prompt_have_matchers_of_their_own(decoder):
    batch = BatchDecoder(decoder, 3)
    numbers = batch.submit("x", 300, n=5, temperature=1.0, seed=4, grammar=Grammar.json_schema(PERSON))
    found = run(batch)
    texts = [answer(found[number])[0] for number in numbers]
    assert len(set(texts)) == 5
    for text in texts:
        check(PERSON, text)


def test_a_suspended_request_goes_on_in_its_grammar(decoder):
    batch = BatchDecoder(decoder, 2)
    options = {"temperature": 1.0, "seed": 1, "grammar": Grammar.json_schema(PERSON), "policy": "stepwise"}
    number, found = batch.submit("x", 100, **options), []
    while batch.running or batch.waiting:
        found += [event.event for event in batch.step()]
        if len(found) == 4:
            batch.suspend(number)
            batch.resume(number)
    assert found == list(decoder.generate("x", 100, **options))


@pytest.mark.parametrize("place", ["push", "after the matcher"])
def test_a_step_that_is_done_again_after_an_interrupt_advances_no_matcher_twice(decoder, monkeypatch, place):
    batch = BatchDecoder(decoder, 4)
    alone, calls, following = crowd(decoder, batch), 0, 3
    kind, name = (TextStream, "push") if place == "push" else (Matcher, "ended")
    whole = getattr(kind, name)

    def interrupted(self, *arguments):
        nonlocal calls, following
        calls += 1
        found = whole(self, *arguments)
        if calls == following:  # ever more rarely, because texts are decoded again after an interrupt
            following += 1 + calls // 4
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(kind, name, interrupted)
    found, interrupts = {}, 0
    while True:
        try:
            for event in batch.run():
                found.setdefault(event.request, []).append(event.event or event.error)
            break
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts >= 5 and found == alone


def test_a_grammar_that_becomes_too_costly_ends_its_request_alone(decoder):
    batch = BatchDecoder(decoder, 2)
    costly = batch.submit("x", 400, temperature=3.0, seed=0, grammar=Grammar.regex(r"(\w+\s*){1000}"))
    other = batch.submit("y", 20, grammar=None, policy="stepwise", stop_ids=[])
    found = run(batch)
    assert isinstance(found[costly][-1], InputError) and "cannot be followed" in str(found[costly][-1])
    assert found[other] == list(decoder.generate("y", 20, policy="stepwise", stop_ids=[]))
    assert batch.running == 0


# What is refused


def bomb():
    """Every level refers to the next one twice, in a way that must be expanded."""

    def node(i):
        next_one = {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"minProperties": 1}]}
        return {"type": "object", "properties": {"a": next_one, "b": next_one}}

    levels = {f"d{i}": node(i) for i in range(30)} | {"d30": {"type": "object"}}
    return {"allOf": [{"$ref": "#/$defs/d0"}, {"$ref": "#/$defs/d0"}], "$defs": levels}


def nested(levels):
    schema = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


HOSTILE = {
    "size": (lambda: {"enum": [f"value {i}" for i in range(100_000)]}, f"at most {MAX_SCHEMA_BYTES}"),
    "text": (lambda: {"const": "x" * (MAX_LITERAL + 1)}, f"at most {MAX_LITERAL}"),
    "depth": (lambda: nested(5000), "levels deep"),
    "depth in text": (lambda: '{"items":' * 5000 + "{}" + "}" * 5000, "levels deep|nested too deeply"),
    "long text": (lambda: "[" * 2**20, f"at most {MAX_SCHEMA_BYTES}"),
    "no JSON": (lambda: "{", "not valid JSON"),
    "no object": (lambda: "[]", "expected a JSON object"),
    "intersections": (
        lambda: {"allOf": [{"type": "string", "pattern": f".*{i}.{{9}}a"} for i in range(300)]},
        "more than 2 seconds",
    ),
    "references": (bomb, "more than 2 seconds"),
    "a loop": (lambda: {"$ref": "#"}, "cannot be used"),
    "a file": (lambda: {"$ref": "file:///etc/passwd"}, "cannot be used"),
    "nothing matches": (lambda: {"type": "integer", "minimum": 3, "maximum": 2}, "cannot be used"),
    "an unknown keyword": (lambda: {"type": "array", "uniqueItems": True}, "uniqueItems"),
    "another form": (lambda: {"x-guidance": {"item_separator": ";"}}, "x-guidance"),
    "surrogate": (lambda: {"const": "\ud800"}, "cannot be used"),
    "not finite": (lambda: {"minimum": float("inf")}, "no JSON value"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_schema_that_is_hostile_or_not_understood_is_refused_and_the_next_one_works(decoder, name):
    make, message = HOSTILE[name]
    with pytest.raises(InputError, match=message):
        decoder.generate("x", grammar=Grammar.json_schema(make()))
    assert answer(list(decoder.generate("x", grammar=Grammar.json_schema({"enum": [1]})))) == ("1", "grammar")


@pytest.mark.parametrize(
    "pattern",
    ["([", "(?=a)b", r"(a)\1", "(" * 1000 + ")" * 1000, "a" * (MAX_REGEX + 1), "\ud800", r"[^\s\S]", 7],
)
def test_a_regular_expression_that_cannot_be_used_is_refused(decoder, pattern):
    with pytest.raises(InputError, match="regular expression"):
        decoder.generate("x", grammar=Grammar.regex(pattern))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+(b|bb)*c", r"(.*a.*b.*c.*){10}", ".*a.{20}"])
def test_expressions_that_are_catastrophic_elsewhere_cost_each_step_a_bounded_time(decoder, pattern):
    assert len(list(decoder.generate("x", 30, temperature=1.0, seed=0, grammar=Grammar.regex(pattern)))) <= 30


def test_grammars_do_not_go_with_other_rules_of_where_to_stop_nor_without_a_tokenizer(decoder):
    grammar = Grammar.json_schema({"type": "object"})
    for options in ({"stop_ids": [3]}, {"stop_ids": []}, {"stop_strings": ["}"]}):
        with pytest.raises(InputError, match="exclude each other"):
            decoder.generate("x", grammar=grammar, **options)
        with pytest.raises(InputError, match="exclude each other"):
            BatchDecoder(decoder, 1).submit("x", grammar=grammar, **options)
    with pytest.raises(InputError, match="needs a tokenizer"):
        Generation.of((None, 100), 1, (None, ()), None, {}, grammar)
    with pytest.raises(InputError, match="grammar"):
        decoder.generate("x", grammar={"type": "object"})


def test_without_llguidance_the_message_says_what_to_install(export_once, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with (
        lrt_deploy.open_decoder(export_once("demo")) as decoder,
        pytest.raises(InputError, match=r"llguidance.*\[grammar\]"),
    ):
        decoder.generate("x", grammar=Grammar.json_schema({}))


# The command line


def generate(bundle, *options):
    command = [sys.executable, "-m", "lrt_deploy", "generate", str(bundle), "--prompt", "x", "--json", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_generate_takes_a_schema_from_a_file(export_once, tmp_path):
    schema = tmp_path / "person.json"
    schema.write_text(json.dumps(PERSON))
    found = json.loads(generate(export_once("demo"), "--json-schema", str(schema), "--max-new-tokens", "200").stdout)
    assert found["finish_reason"] == "grammar"
    check(PERSON, found["text"])
    schema.write_text('{"type": "strin"}')
    result = generate(export_once("demo"), "--json-schema", str(schema))
    assert result.returncode == 1 and json.loads(result.stdout)["error"]["type"] == "InputError"
