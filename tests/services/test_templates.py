"""A checkpoint's own chat template behind the API: its form, its reasons, and what it may not do to the server."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

import lrt_deploy
from lrt_deploy.bundle.manifest import read_manifest, write_manifest

from .conftest import BIN

# It takes as long as a message says, so that the server's bounds can be seen.
TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ raise_exception('this model has no system messages') }}{% endif %}
    {%- if message.content == 'for ever' %}
        {%- for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
    {%- endif %}
    {{- '<|' ~ message.role ~ '_start|>' ~ message.content | trim ~ '<|' ~ message.role ~ '_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}
"""
TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|assistant_end|>"}


def user(content):
    return [{"role": "user", "content": content}]


def with_template(bundle, folder, source):
    """Copy a bundle and put a template into it, as an export does."""
    shutil.copytree(bundle, folder)
    (folder / "tokenizer" / "chat_template.jinja").write_text(source)
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(TOKENS))
    write_manifest(folder, read_manifest(bundle))
    return folder


@pytest.fixture(scope="module")
def templated(bundle, tmp_path_factory):
    return with_template(bundle, tmp_path_factory.mktemp("templated") / "demo", TEMPLATE)


@pytest.fixture(scope="module")
def own(launch, templated):
    return launch(where=templated)


def test_chats_are_in_the_form_of_the_template_whatever_the_order_of_roles(own, templated):
    messages = [*user(" Hi\n"), *user("<|bos|> Write a function.")]
    with lrt_deploy.open_decoder(templated) as decoder:
        ids = decoder.tokenizer.render_chat(messages)
        expected = "".join(event.text for event in decoder.generate(ids, 20))
        special = decoder.tokenizer.special_tokens
    assert own.post("/tokenize", {"messages": messages}).json["tokens"] == ids
    assert ids.count(special["<|bos|>"]) == 1 and ids.count(special["<|user_start|>"]) == 2
    answer = own.chat(messages, temperature=0, max_tokens=20)
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_the_reason_of_a_template_is_a_400_and_the_server_goes_on(own):
    reply = own.post("/v1/chat/completions", {"messages": [{"role": "system", "content": "a"}, *user("b")]})
    assert (reply.status, reply.error["param"]) == (400, "messages")
    assert "refuses these messages: this model has no system messages" in reply.error["message"]
    reply = own.post("/v1/chat/completions", {"messages": user("for ever")})
    assert (reply.status, reply.error["param"]) == (400, "messages")
    assert "takes more than 2 seconds" in reply.error["message"]
    assert own.chat(user("a"), max_tokens=1)["usage"]["completion_tokens"] == 1
    assert "Traceback" not in own.log.read_text()


def test_fields_that_change_the_template_are_refused_by_name(own):
    for name, value in (("chat_template", "x"), ("chat_template_kwargs", {"a": 1}), ("add_generation_prompt", False)):
        reply = own.post("/v1/chat/completions", {"messages": user("a"), name: value})
        assert (reply.status, reply.error["param"]) == (400, name)


def test_clients_can_ask_for_the_template(own):
    info = own.get("/tokenizer_info").json
    assert info["chat_template"] == TEMPLATE and info.items() >= TOKENS.items()
    assert own.get("/v1/models").json["data"][0]["lrt"]["chat"] is True


def test_batches_in_files_go_by_the_template(templated, own, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [
        {"messages": user("a"), "max_tokens": 9, "temperature": 0},
        {"messages": [{"role": "system", "content": "a"}]},
    ]
    lines = [{"custom_id": str(i), "url": "/v1/chat/completions", "body": body} for i, body in enumerate(bodies)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    subprocess.run([BIN / "lrt-deploy", "batch", templated, source, target], check=True, timeout=120)
    responses = {line["custom_id"]: line["response"] for line in map(json.loads, target.read_text().splitlines())}
    expected = own.chat(**bodies[0])["choices"][0]["message"]
    assert responses["0"]["body"]["choices"][0]["message"] == expected
    assert responses["1"]["status_code"] == 400 and "no system messages" in responses["1"]["body"]["error"]["message"]


def test_a_template_that_cannot_be_loaded_is_named_at_the_start(bundle, tmp_path):
    folder = with_template(bundle, tmp_path / "demo", "{% for")
    for verb in ("serve", "chat"):
        command = [BIN / "lrt-deploy", verb, folder]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, input="hi\n")
        assert result.returncode == 1
        assert "chat_template.jinja cannot be used as a chat template: line 1" in result.stderr
        assert result.stderr.count("\n") == 1
