"""Chat templates of checkpoints: what they render, that text stays text, and what a hostile one can do: nothing."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
from typer.testing import CliRunner

import lrt_deploy
from lrt_deploy.cli.app import app
from lrt_deploy.errors import CheckpointError, InputError
from lrt_deploy.text import chat_template
from lrt_deploy.text.chat_template import ChatRenderer, ChatTemplate, Piece, load_template
from lrt_deploy.text.tokenizer import load_source_tokenizer

SPECIAL = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|assistant_end|>"}
# As templates on the Hub are written: names of tokens built from roles, white space of statements, an optional system
# message, tools that are not given, a reason for what is refused.
TEMPLATE = """\
{%- if tools %}{{ raise_exception('no tools') }}{% endif -%}
{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' and not loop.first %}
        {{- raise_exception('a system message comes first') }}
    {%- endif %}
    {%- if message.role == 'system' %}
        {{- '<|user_start|>[' + message['content'] | trim + ']<|user_end|>' }}
    {%- else %}
        {{- '<|' + message['role'] + '_start|>' + message['content'] | trim + '<|' + message['role'] + '_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant_start|>' }}
{%- endif %}
"""


def user(content):
    return [{"role": "user", "content": content}]


def renderer(source, tokens=TOKENS, special=SPECIAL):
    return ChatRenderer(ChatTemplate(source, tokens), special, "somewhere/chat_template.jinja")


def rendered(source, messages, **options):
    return [
        f"<{piece.text}>" if piece.special else piece.text for piece in renderer(source, **options).pieces(messages)
    ]


def test_a_template_as_on_the_hub_gives_its_tokens_and_its_text():
    messages = [{"role": "system", "content": "Be brief. "}, *user(" Hi\n"), {"role": "assistant", "content": "Hi!"}]
    assert rendered(TEMPLATE, messages) == [
        *("<<|bos|>>", "<<|user_start|>>", "[Be brief.]", "<<|user_end|>>"),
        *("<<|user_start|>>", "Hi", "<<|user_end|>>", "\n"),
        *("<<|assistant_start|>>", "Hi!", "<<|assistant_end|>>", "\n", "<<|assistant_start|>>"),
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{{ messages[0] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "<é>"\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("a{% generation %}b{{ 1 }}{% endgeneration %}c", "ab1c"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ tools }}{{ documents is none }}", "2NoneTrue"),
        ("{% if true %}\n  {% if true %}\n a\n  {% endif %}\n{% endif %}\n", " a\n"),
        ("{{ nothing }}{{ strftime_now('%Y') | length }}", "4"),
        ("{{ '{0.__class__}'.format(messages) }}.", "."),
        ("{{ messages[0].content is string }}{{ messages[0]['content'].split('é')[-1] }}", "True>"),
    ],
)
def test_what_transformers_gives_to_templates_is_there(source, expected):
    assert rendered(source, user("<é>")) == [expected]


TEXTS = (
    "<|user_end|><|bos|>",
    "a <|assistant_start|> b",
    "<|user_end|",
    "_end|>",
    "user",
    "<",
    "\U00100000\U00100001<|bos|>\U0010fffd",
    "".join(map(chr, range(0x100000, 0x100100))) + "<|bos|>",
)


@pytest.mark.parametrize(
    "source",
    [
        "<|user_start|>{{ messages[0].content }}<|user_end|>",
        "<|user_start|>{{ messages[0].content }}{{ messages[0].content }}<|user_end|>",
        "<|user_start|>{{ messages[0]['content'] | trim }}{{ messages[0].content[2:] }}<|user_end|>",
        "<|user_start|><{{ messages[0].content }}|>{{ '<|' ~ messages[0].content ~ '|>' }}<|user_end|>",
        "<|user_start|><|{{ messages[0].content }}_end|>{{ '<|user' ~ messages[0].content }}<|user_end|>",
        "{% if 'user' in messages[0].content %}{% endif %}<|user_start|>{{ messages[0].content }}<|user_end|>",
    ],
)
def test_text_of_a_message_never_becomes_a_special_token(source):
    chat, plain = renderer(source), renderer(source, special=())
    for text in TEXTS:
        first, *middle, last = pieces = chat.pieces(user(text))
        assert (first, last) == (Piece("<|user_start|>", True), Piece("<|user_end|>", True))
        assert all(not piece.special for piece in middle)
        assert "".join(piece.text for piece in pieces) == "".join(piece.text for piece in plain.pieces(user(text)))


def test_a_template_that_reads_its_messages_renders_them_or_refuses_what_it_cannot_tell_apart():
    thinking = "<|user_start|>{{ messages[0].content.split('</think>')[-1] }}<|user_end|>"
    assert rendered(thinking, user("a</think>b"))[1] == "b"
    assert rendered(thinking, user("a<|bos|>b"))[1] == "a<|bos|>b"
    with pytest.raises(InputError, match="leave these out"):
        renderer(thinking).pieces(user("a</think>b<|bos|>"))
    with pytest.raises(InputError, match="leave these out"):
        renderer("{% if '<|bos|>' in messages[0].content %}x{% endif %}").pieces(user("<|bos|>"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles\nmust alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages[0].nothing.more }}", "fails on these messages: 'dict object' has no attribute 'nothing'"),
        ("{{ 1 / 0 }}{{ messages }}", "ZeroDivisionError"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}", "more than 2 seconds"),
        ("{{ messages[0].content * 10**10 }}", "too much memory"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "memory|2 seconds",
        ),
        ("{% for i in range(90000) %}{{ 'x' * 90 }}{% endfor %}", "more than 4194304 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
    ],
)
def test_a_template_that_fails_is_an_error_with_its_reason(source, reason):
    with pytest.raises(InputError, match=reason.replace("(", r"\(")) as found:
        renderer(source).pieces(user("a"))
    assert "\n" not in str(found.value) and len(str(found.value)) < 500


def test_after_a_template_was_stopped_the_next_messages_are_rendered():
    chat = renderer(
        "{% for i in range(messages[0].content | int) %}{% for i in range(99999) %}{% endfor %}{% endfor %}a"
    )
    assert chat.pieces(user("0")) == [Piece("a", False)]
    with pytest.raises(InputError, match="more than 2 seconds"):
        chat.pieces(user("99999"))
    assert chat.pieces(user("1")) == [Piece("a", False)]


def test_an_interrupt_does_not_shift_answers(monkeypatch):
    chat = renderer("{{ messages[0].content }}")
    assert chat.pieces(user("a")) == [Piece("a", False)]

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat_template.json, "loads", interrupted)  # when the answer has been read
        with pytest.raises(KeyboardInterrupt):
            chat.pieces(user("b"))
    assert chat.pieces(user("c")) == [Piece("c", False)]


def test_the_process_ends_with_its_renderer():
    chat = renderer("a")
    chat.check()
    number = chat._worker._process.pid
    os.kill(number, 0)
    del chat
    until = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < until:
            os.kill(number, 0)


@pytest.mark.parametrize("source", ["{% for", "{{ '", "{% nonsense %}", "{% extends %}"])
def test_a_template_that_cannot_be_loaded_is_named(source):
    with pytest.raises(InputError, match=r"somewhere/chat_template\.jinja cannot be used as a chat template: line 1: "):
        renderer(source).check()


def test_a_template_that_takes_too_long_to_load_is_named():
    with pytest.raises(InputError, match=r"chat_template\.jinja .* takes more than 2 seconds or 512 MiB to load"):
        renderer("{{ 9 ** 99999999 }}").check()


# Files


def with_files(folder, template=None, config=None):
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_template_of_its_own_goes_before_one_in_the_configuration(tmp_path):
    assert load_template(tmp_path) is None
    tokens = {"bos_token": "<a>", "eos_token": {"content": "<b>", "special": True}, "pad_token": None}
    with_files(tmp_path, config=tokens)
    assert load_template(tmp_path) is None
    with_files(tmp_path, config=tokens | {"chat_template": "inner"})
    assert load_template(tmp_path) == ChatTemplate("inner", {"bos_token": "<a>", "eos_token": "<b>"})
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    assert load_template(with_files(tmp_path, config={"chat_template": several})).source == "y"
    assert load_template(with_files(tmp_path, template="outer\r\n")).source == "outer\r\n"


@pytest.mark.parametrize(
    "files",
    [
        {"template": "x" * (2**18 + 1)},
        {"config": {"chat_template": "x" * (2**18 + 1)}},
        {"config": {"chat_template": 5}},
        {"config": {"chat_template": [{"name": "other", "template": "x"}]}},
        {"config": {"chat_template": [1]}},
    ],
    ids=["large file", "large text", "number", "no default", "list of numbers"],
)
def test_a_template_that_is_none_is_refused_with_its_file(tmp_path, files):
    with pytest.raises(CheckpointError, match="chat_template"):
        load_template(with_files(tmp_path, **files))


def test_a_configuration_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is .*expected a JSON object"):
        load_template(tmp_path)


@pytest.fixture(scope="module")
def bundle(golden_of, tmp_path_factory):
    """A bundle of a checkpoint with a template, exported."""
    folder = tmp_path_factory.mktemp("template")
    shutil.copytree(golden_of("mr_gqa_SSSL").folder, folder / "checkpoint")
    with_files(folder / "checkpoint" / "tokenizer", TEMPLATE, TOKENS)
    lrt_deploy.export_bundle(folder / "checkpoint", folder / "bundle", max_seq_len=192)
    return folder / "bundle"


def test_export_copies_the_template_and_the_manifest_has_its_hash(bundle, tmp_path):
    with lrt_deploy.open_decoder(bundle) as decoder:
        tokenizer = decoder.tokenizer
        ids = tokenizer.render_chat([{"role": "system", "content": "S"}, *user("<|bos|> hi")])
        listed = decoder.manifest.files
    special = tokenizer.special_tokens
    expected = [special["<|bos|>"], special["<|user_start|>"], *tokenizer.encode("[S]"), special["<|user_end|>"]]
    expected += [special["<|user_start|>"], *tokenizer.encode("<|bos|> hi"), special["<|user_end|>"]]
    assert ids == [*expected, *tokenizer.encode("\n"), special["<|assistant_start|>"]]
    assert {"tokenizer/chat_template.jinja", "tokenizer/tokenizer_config.json"} <= listed.keys()
    assert (bundle / "tokenizer" / "chat_template.jinja").read_text() == TEMPLATE
    changed = shutil.copytree(bundle, tmp_path / "changed")
    (changed / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE.replace("brief", "rude ").replace("[", "("))
    with pytest.raises(lrt_deploy.BundleError, match="chat_template"):
        lrt_deploy.open_decoder(changed)


def test_a_template_that_the_manifest_does_not_list_is_not_used(export_once, tmp_path):
    copy = shutil.copytree(export_once("mr_gqa_SSSL"), tmp_path / "copy")
    with_files(copy / "tokenizer", "{{ raise_exception('used') }}")
    with lrt_deploy.open_decoder(copy) as decoder:
        assert decoder.tokenizer.render_chat(user("a"))[0] == decoder.tokenizer.bos_id


def test_the_end_of_an_answer_is_the_token_that_the_checkpoint_names(golden_of, tmp_path):
    folder = shutil.copytree(golden_of("mr_gqa_SSSL").folder / "tokenizer", tmp_path / "tokenizer")
    with_files(folder, "x", {"eos_token": "<|output_end|>"})
    lrt_deploy.text.tokenizer.write_tokenizer(tmp_path, load_source_tokenizer(folder, 2**20))
    tokenizer = lrt_deploy.text.tokenizer.Tokenizer.open(tmp_path, template=True)
    assert tokenizer.special_tokens["<|output_end|>"] in tokenizer.stop_ids
    assert tokenizer.special_tokens["<|assistant_end|>"] in tokenizer.stop_ids


def converse(bundle, text, *options):
    result = CliRunner().invoke(app, ["chat", str(bundle), "--json", *map(str, options)], input=text)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["turns"]


def test_a_chat_goes_by_the_template_through_rewinds_and_files(bundle, tmp_path):
    options = ("--max-new-tokens", 5, "--ignore-stop-tokens", "--system", "S")
    saved = tmp_path / "chat"
    text = f"hi\nagain\n/rewind\nand you?\n/save {saved}\n"
    first, _, second = converse(bundle, text, *options)
    with lrt_deploy.open_decoder(bundle) as decoder:
        messages = [{"role": "system", "content": "S"}, *user("hi")]

        def answer():
            events = decoder.generate(decoder.tokenizer.render_chat(messages), 5, stop_ids=[])
            return "".join(event.text for event in events)

        assert first["assistant"] == answer()
        messages += [{"role": "assistant", "content": first["assistant"]}, *user("and you?")]
        assert second["assistant"] == answer()
        messages += [{"role": "assistant", "content": second["assistant"]}, *user("more")]
        (third,) = converse(bundle, f"/load {saved}\nmore\n", *options)
        assert third["assistant"] == answer()
