"""Chats: the form of the tokens, one state through all turns, the commands, and what a full context says."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import lrt_deploy
from lrt_deploy.cli.app import app
from lrt_deploy.cli.conversation import Conversation
from lrt_deploy.runtime.backends.ort_cpu import OrtCpuBuffers

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
    # The last token of the answer is in the state, and not fed yet.
    assert f"{len(steps) + 1} of 128 tokens in the state" in result.stderr
    assert len(steps) > 30


def test_answers_go_to_stdout_and_everything_else_to_stderr(bundle):
    spoken = turns(bundle, "hi\nyou\n", "--max-new-tokens", 5)
    result = chat(bundle, "hi\n\n/help\n/nonsense\nyou\n/quit\nnever read\n", "--max-new-tokens", 5)
    assert result.stdout == "".join(turn["assistant"] + "\n" for turn in spoken)
    assert "there is no command /nonsense; /help lists the commands" in result.stderr
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
    """A stop token is the close itself, or is replaced by it; any other last token is kept and closed."""
    opened, end = tokenizer.render_chat(user("hi")), tokenizer.special_tokens[ASSISTANT_END]
    spoken = [65, 66 if last is None else tokenizer.special_tokens[last]]
    state = SimpleNamespace(lengths=[len(opened) + 2])
    talk = Conversation(SimpleNamespace(max_seq_len=128), tokenizer, None, None, "auto", [*opened, *spoken], state)
    closed = [65, 66, end] if last is None else [65, end]
    history = talk.with_message("you")
    assert history == [*opened, *closed, *tokenizer.render_chat(user("you"))[1:]]


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
    from lrt_deploy.text.tokenizer import Tokenizer

    opened = Tokenizer.open.__func__

    def without_roles(cls, *arguments):
        tokenizer = opened(cls, *arguments)
        del tokenizer.special_tokens["<|user_start|>"]
        return tokenizer

    monkeypatch.setattr(Tokenizer, "open", classmethod(without_roles))
    result = CliRunner().invoke(app, ["chat", str(bundle), "--json"], input="hi\n")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "InputError"
    assert "no <|user_start|>" in result.stderr


def test_input_that_is_not_text_is_refused(bundle):
    result = CliRunner().invoke(app, ["chat", str(bundle)], input=b"\xff\xfe\n")
    assert result.exit_code == 1
    assert "error: the input is not text" in result.stderr


# Operations on the chat's state

SHORT_ANSWERS = ("--max-new-tokens", 6, "--ignore-stop-tokens")


def test_a_rewound_chat_goes_on_as_if_the_turn_had_not_been(bundle):
    plain = turns(bundle, "hi\nyou\n", *SHORT_ANSWERS)
    rewound = turns(bundle, "hi\nand they\n/rewind\nyou\n", *SHORT_ANSWERS)
    assert [rewound[0], rewound[2]["tokens"]] == [plain[0], plain[1]["tokens"]]
    assert rewound[1]["tokens"] != rewound[2]["tokens"]
    twice = turns(bundle, "hi\nand they\nand we\n/rewind 2\nyou\n", *SHORT_ANSWERS)
    assert twice[3]["tokens"] == plain[1]["tokens"]
    anew = turns(bundle, "no\nno\n/rewind 2\nhi\nyou\n", *SHORT_ANSWERS)
    assert [turn["tokens"] for turn in anew[2:]] == [turn["tokens"] for turn in plain]


def test_a_rewind_after_a_stop_token_does_too(bundle):
    """Whatever token ended the answer: what is rewound to is the moment after it was chosen."""
    options = ("--temperature", 5, "--seed", 3, "--max-new-tokens", 40)
    plain, rewound = (turns(bundle, text, *options) for text in ("hi\n/rewind\nhi\n", "hi\nyou\n/rewind 2\nhi\n"))
    assert plain[0]["tokens"] == rewound[0]["tokens"]
    first = turns(bundle, "hi\nyou\n/rewind\nyou\n", "--max-new-tokens", 40)
    assert first[1]["tokens"] == first[2]["tokens"]


def test_a_saved_chat_is_loaded_and_rewound_by_another_one(bundle, tmp_path):
    path = tmp_path / "chat.state"
    plain = turns(bundle, "hi\nyou\nwe\n", *SHORT_ANSWERS)
    turns(bundle, f"hi\nyou\n/save {path}\n", *SHORT_ANSWERS)
    (resumed,) = turns(bundle, f"/load {path}\nwe\n", *SHORT_ANSWERS)
    assert resumed["tokens"] == plain[2]["tokens"]
    assert resumed["prefill"]["reused_tokens"] > 20
    (rewound,) = turns(bundle, f"/load {path}\n/rewind\nyou\n", *SHORT_ANSWERS)
    assert rewound["tokens"] == plain[1]["tokens"]
    (beside,) = turns(bundle, f"/load {tmp_path / 'nowhere'}\nhi\n", *SHORT_ANSWERS)
    assert beside["tokens"] == plain[0]["tokens"]


def test_a_fork_and_its_origin_go_their_own_ways(bundle):
    plain, other = turns(bundle, "hi\nyou\n", *SHORT_ANSWERS), turns(bundle, "hi\nthey\nus\n", *SHORT_ANSWERS)
    forked = turns(bundle, "hi\n/fork b\nthey\n/switch main\nyou\n/switch b\nus\n", *SHORT_ANSWERS)
    assert [turn["tokens"] for turn in forked] == [turn["tokens"] for turn in (plain[0], other[1], plain[1], other[2])]


def test_a_turn_costs_its_new_tokens_only(bundle):
    text = "hi\n/stats\nyou\n/stats\nwe\n/stats\n/rewind\n/stats\n"
    result = chat(bundle, text, *SHORT_ANSWERS, "--prefill", "stepwise")
    stats = [line for line in result.stderr.splitlines() if "token positions computed" in line]
    held, computed = zip(
        *(map(int, re.findall(r"(\d+) (?:of 128 tokens|token positions)", line)) for line in stats), strict=True
    )
    assert [n - 1 for n in held[:3]] == [*computed[:3]]  # the answer's last token is read with the next turn
    assert len(stats) == 4 and held[3] < held[2] and computed[3] == computed[2]  # a rewind computes nothing


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("/rewind", "0 turn(s) to take back, 1 were asked for"),
        ("/rewind many", "/rewind: expected a number of turns, not 'many'"),
        ("/save x", "no chat to save yet"),
        ("/save", "a file name is missing"),
        ("/load", "a file name is missing"),
        ("/fork", "a name is missing"),
        ("/fork main", "there is a chat main already"),
        ("/switch b", "there is no chat 'b'; there are main"),
    ],
)
def test_a_command_that_cannot_be_obeyed_says_why_and_the_chat_goes_on(bundle, command, words):
    result = chat(bundle, f"{command}\nhi\n", *SHORT_ANSWERS)
    assert words in result.stderr
    assert result.stdout.rstrip("\n") == turns(bundle, "hi\n", *SHORT_ANSWERS)[0]["assistant"].rstrip("\n")


def test_a_state_that_is_no_chat_is_not_loaded(bundle, tmp_path):
    with lrt_deploy.open_decoder(bundle) as decoder:
        decoder.prefill([[1, 2, 3]]).save(tmp_path / "x.state")
    assert "holds a state, but no chat" in chat(bundle, f"/load {tmp_path / 'x.state'}\n").stderr


def test_a_prompt_cache_serves_chats_and_generations(bundle, tmp_path):
    text = f"{'a long beginning ' * 3}\nyou\n"
    options = (*SHORT_ANSWERS, "--prefill", "stepwise")
    plain = turns(bundle, text, *options)
    for reused in (False, True):
        cached = turns(bundle, text, *options, "--prompt-cache", tmp_path)
        assert [turn["tokens"] for turn in cached] == [turn["tokens"] for turn in plain]
        assert (cached[0]["prefill"]["reused_tokens"] > 0) is reused
    command = ["generate", str(bundle), "--tokens", ",".join(["7"] * 30), "--json", "--prompt-cache", str(tmp_path)]
    first, again = (json.loads(CliRunner().invoke(app, command).stdout) for _ in range(2))
    assert first["tokens"] == again["tokens"]
    assert (first["prefill"]["reused_tokens"], again["prefill"]["reused_tokens"]) == (0, 30)
