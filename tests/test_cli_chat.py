"""Chats: the form of the tokens, one state through all turns, the commands, and what a full context says."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import lrt_deploy
from lrt_deploy.cli.app import app
from lrt_deploy.cli.chat import Conversation
from lrt_deploy.runtime.ort_cpu import OrtCpuBuffers

ASSISTANT_END = "<|assistant_end|>"


@pytest.fixture(scope="module")
def bundle(export_once):
    return export_once("mr_gqa_SSSL")


@pytest.fixture
def tokenizer(bundle):
    with lrt_deploy.open_decoder(bundle) as decoder:
        yield decoder.tokenizer


def chat(bundle, text, *options):
    result = CliRunner().invoke(app, ["chat", str(bundle), *map(str, options)], input=text)
    assert result.exit_code == 0, result.stderr
    return result


def turns(bundle, text, *options):
    return json.loads(chat(bundle, text, "--json", *options).stdout)["turns"]


def user(content):
    return [{"role": "user", "content": content}]


def test_a_second_turn_continues_as_if_all_had_been_read_at_once(bundle):
    first, second = turns(bundle, "hi\nand you?\n", "--max-new-tokens", 6, "--ignore-stop-tokens")
    with lrt_deploy.open_decoder(bundle) as decoder:
        tokenizer = decoder.tokenizer
        history = tokenizer.render_chat(user("hi"))
        assert [e.token for e in decoder.generate(history, 6, stop_ids=[])] == first["tokens"]
        history += [
            *first["tokens"],
            tokenizer.special_tokens[ASSISTANT_END],
            *tokenizer.render_chat(user("and you?"))[1:],
        ]
        assert [e.token for e in decoder.generate(history, 6, stop_ids=[])] == second["tokens"]
        assert second["assistant"] == tokenizer.decode(second["tokens"])
    assert (first["user"], second["user"], second["finish_reason"]) == ("hi", "and you?", "length")
    assert second["prefill"].keys() >= {"policy", "passes", "residual"}


def test_no_token_is_read_twice(bundle, monkeypatch):
    steps = []
    decode = OrtCpuBuffers.decode
    monkeypatch.setattr(OrtCpuBuffers, "decode", lambda self, *args, **kw: steps.append(1) or decode(self, *args, **kw))
    result = chat(bundle, "hi\nand you?\nand they?\n/stats\n", "--max-new-tokens", 5, "--prefill", "stepwise")
    assert f"{len(steps)} of 128 tokens in the state" in result.stderr
    assert len(steps) > 30


def test_answers_go_to_stdout_and_everything_else_to_stderr(bundle):
    spoken = turns(bundle, "hi\nyou\n", "--max-new-tokens", 5)
    result = chat(bundle, "hi\n\n/help\n/nonsense\nyou\n/quit\nnever read\n", "--max-new-tokens", 5)
    assert result.stdout == "".join(turn["assistant"] + "\n" for turn in spoken)
    assert "there is no command /nonsense" in result.stderr and "/reset" in result.stderr
    assert "> " not in result.output


def test_reset_forgets_everything(bundle):
    first, again = turns(bundle, "hi\n/reset\nhi\n", "--max-new-tokens", 5)
    assert first == again
    assert "0 of 128 tokens" in chat(bundle, "hi\n/reset\n/stats\n").stderr


def test_a_system_message_opens_the_chat_and_every_reset_one(bundle):
    options = ("--max-new-tokens", 5)
    joined = Conversation(SimpleNamespace(max_seq_len=128), None, "Be brief.", None, "auto")
    joined.tokenizer = SimpleNamespace(render_chat=lambda messages: messages)
    assert [m["role"] for m in joined.with_message("hi")] == ["system", "user"]
    with_system = turns(bundle, "hi\n/reset\nhi\n", "--system", "Be brief.", *options)
    assert with_system[0]["tokens"] == with_system[1]["tokens"]
    with lrt_deploy.open_decoder(bundle) as decoder:
        prompt = decoder.tokenizer.render_chat(user("Be brief.\n\nhi"))
        assert [event.token for event in decoder.generate(prompt, 5)] == with_system[0]["tokens"]


@pytest.mark.parametrize("last", [ASSISTANT_END, "<|bos|>", None])
def test_an_answer_is_closed_exactly_once_however_it_ended(tokenizer, last):
    """A stop token that was chosen but not fed is the close itself; any other last token is kept and closed."""
    opened, end = tokenizer.render_chat(user("hi")), tokenizer.special_tokens[ASSISTANT_END]
    spoken = [65, 66 if last is None else tokenizer.special_tokens[last]]
    state = SimpleNamespace(lengths=[len(opened) + 1])
    talk = Conversation(SimpleNamespace(max_seq_len=128), tokenizer, None, None, "auto", [*opened, *spoken], state)
    closed = [65, 66, end] if last is None else [65, end]
    history = talk.with_message("you")
    assert history == [*opened, *closed, *tokenizer.render_chat(user("you"))[1:]]
    assert talk.unread(history)[0] == closed[1]


def test_sampling_is_repeatable_and_differs_from_turn_to_turn(bundle):
    options = ("--temperature", 5, "--seed", 3, "--max-new-tokens", 12, "--ignore-stop-tokens")
    text = "hi\n/reset\nhi\n"
    first, second = turns(bundle, text, *options)
    assert first["tokens"] != second["tokens"]
    assert turns(bundle, text, *options) == [first, second]


def test_a_full_context_says_so_and_how_to_go_on(bundle):
    result = chat(bundle, f"hi\n{'long ' * 20}\n/reset\nhi\n", "--max-seq-len", 40, "--max-new-tokens", 5)
    assert "no room for this message" in result.stderr and "/reset" in result.stderr
    assert result.stdout.count("\n") == 2
    kept = turns(bundle, f"hi\n{'long ' * 20}\n", "--max-seq-len", 40, "--max-new-tokens", 5)[1]
    assert (kept["finish_reason"], kept["assistant"], kept["tokens"], kept["prefill"]) == ("capacity", "", [], None)


def test_an_answer_that_fills_the_context_is_cut_and_says_so(bundle):
    options = ("--max-seq-len", 30, "--ignore-stop-tokens")
    assert turns(bundle, "hi\n", *options)[0]["finish_reason"] == "capacity"
    assert "the answer was cut" in chat(bundle, "hi\n", *options).stderr


def test_a_chat_needs_a_tokenizer_with_the_chat_tokens(bundle, monkeypatch):
    from lrt_deploy.tokenizer import Tokenizer

    opened = Tokenizer.open.__func__

    def without_roles(cls, folder):
        tokenizer = opened(cls, folder)
        del tokenizer.special_tokens["<|user_start|>"]
        return tokenizer

    monkeypatch.setattr(Tokenizer, "open", classmethod(without_roles))
    result = CliRunner().invoke(app, ["chat", str(bundle), "--json"], input="hi\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no <|user_start|>" in result.stderr


def test_input_that_is_not_text_is_refused(bundle):
    result = CliRunner().invoke(app, ["chat", str(bundle)], input=b"\xff\xfe\n")
    assert result.exit_code == 1
    assert "error: the input is not text" in result.stderr
