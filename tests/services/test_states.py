"""States of earlier requests: what later ones reuse, in memory and in a folder, and what is lost with them: time."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import time

import numpy as np
import pytest

import lrt_deploy
from lrt_deploy.runtime.prefill import PrefillRequest
from lrt_deploy.runtime.prompt_cache import FEWEST_TOKENS
from lrt_deploy.runtime.serving.prefix_states import PrefixStates

QUESTIONS = ["Write a function that parses a file.", "And now one that writes it again.", "Which of them is slower?"]
STEPWISE = PrefillRequest("stepwise")


def alone(decoder, messages, tokens):
    ids = decoder.tokenizer.render_chat(messages)
    return "".join(event.text for event in decoder.generate(ids, tokens))


class Conversation:
    """A client that sends the whole conversation with each turn, to any server."""

    def __init__(self, decoder, tokens=40):
        self.decoder, self.tokens, self.messages, self.usages = decoder, tokens, [], []

    def ask(self, server, question, **fields):
        self.messages.append({"role": "user", "content": question})
        answer = server.chat(self.messages, temperature=0, max_tokens=self.tokens, **fields)
        text = answer["choices"][0]["message"]["content"]
        assert text == alone(self.decoder, self.messages, self.tokens)
        self.messages.append({"role": "assistant", "content": text})
        self.usages.append(answer["usage"])
        return answer["usage"]

    def shared(self):
        """Tokens of the last prompt that the one before it and its answer have begun with."""
        render = self.decoder.tokenizer.render_chat
        before = render(self.messages[:-3])
        held = before + [event.token for event in self.decoder.generate(before, self.tokens)]
        prompt = render(self.messages[:-1])
        return next(i for i, (a, b) in enumerate(zip(prompt, [*held[:-1], -1], strict=False)) if a != b)


# In a server


def test_the_second_turn_of_a_chat_reads_its_own_tokens_only(server, decoder):
    chat = Conversation(decoder)
    assert chat.ask(server, QUESTIONS[0])["prompt_tokens_details"]["cached_tokens"] < FEWEST_TOKENS
    for question in QUESTIONS[1:]:
        usage = chat.ask(server, question)
        reused = usage["lrt"]["reused_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == reused == chat.shared()
        computed = usage["lrt"]["passes"] * usage["prompt_tokens"]
        assert computed == pytest.approx(usage["prompt_tokens"] - reused, abs=0.01)


def test_a_message_that_is_edited_goes_on_from_what_stays(server, decoder):
    chat = Conversation(decoder)
    chat.ask(server, "Explain the module.")
    chat.ask(server, "Give an example of its use.")
    fork = Conversation(decoder)
    fork.messages = chat.messages[:2]
    assert fork.ask(server, "Give two examples of its use.")["lrt"]["reused_tokens"] > FEWEST_TOKENS
    retry = Conversation(decoder)
    retry.messages = chat.messages[:2]
    usage = retry.ask(server, "Give an example of its use.")
    assert usage["lrt"]["reused_tokens"] == usage["prompt_tokens"] - 1


def test_the_choices_of_one_prompt_read_it_once(server):
    before = server.gauge("lrt_prompt_tokens_total")
    server.complete([3] * 100, n=4, max_tokens=3)
    assert server.gauge("lrt_prompt_tokens_total") - before == 100


def test_without_memory_for_states_nothing_is_kept(launch, decoder):
    server = launch("--state-bytes", 0)
    chat = Conversation(decoder)
    for question in QUESTIONS[:2]:
        assert chat.ask(server, question)["lrt"]["reused_tokens"] == 0
    assert server.gauge("lrt_kept_states") == server.gauge("lrt_kept_state_bytes") == 0


def test_the_memory_for_states_is_bounded(launch, decoder):
    limit = 3_000_000
    server = launch("--state-bytes", limit)
    for at in range(12):
        server.complete([5 + at] * 100, max_tokens=20, ignore_eos=True)
        assert server.gauge("lrt_kept_state_bytes") <= limit
    assert 1 <= server.gauge("lrt_kept_states") < 12


@pytest.mark.parametrize("before", ["zero", "stepwise"])
def test_with_zero_memory_the_answer_is_the_same_whatever_was_asked_before(launch, decoder, tmp_path, before):
    folder = tmp_path / "states"
    server = launch("--state-dir", folder)
    prompt = "The quick brown fox jumps over the lazy dog, and the dog sleeps"
    expected = "".join(event.text for event in decoder.generate(prompt, 16, policy="zero"))
    server.complete(prompt, max_tokens=16, temperature=0, prefill=before)
    for again in (server, launch("--state-dir", folder)):  # in memory, and in the folder alone
        for _ in range(2):
            answer = again.complete(prompt, max_tokens=16, temperature=0, prefill="zero")
            assert answer["choices"][0]["text"] == expected
            assert answer["usage"]["lrt"]["reused_tokens"] == 0
    if before == "zero":
        assert server.gauge("lrt_kept_states") == 0 and not list(folder.glob("*/*.state"))


# In a folder


def stored(folder, count):
    """Wait until the folder has so many states."""
    until = time.monotonic() + 60
    while len(found := list(folder.glob("*/*.state"))) < count:
        assert time.monotonic() < until
        time.sleep(0.01)
    return found


def test_a_server_that_was_killed_goes_on_as_if_nothing_had_happened(launch, decoder, tmp_path):
    folder = tmp_path / "states"
    chat = Conversation(decoder)
    for at, question in enumerate(QUESTIONS):
        server = launch("--state-dir", folder)
        usage = chat.ask(server, question)
        assert (usage["lrt"]["reused_tokens"] > FEWEST_TOKENS) == (at > 0)
        stored(folder, at + 1)
        server.kill()


def test_two_servers_share_a_folder_and_disturb_neither_entries_nor_answers(launch, decoder, tmp_path):
    folder = tmp_path / "states"
    servers = [launch("--state-dir", folder) for _ in range(2)]
    chats = [Conversation(decoder), Conversation(decoder)]
    for at, question in enumerate(QUESTIONS):
        for which, chat in enumerate(chats):
            usage = chat.ask(servers[(at + which) % 2], f"{which}: {question}")
            assert (usage["lrt"]["reused_tokens"] > FEWEST_TOKENS) == (at > 0)
        stored(folder, 2 * at + 2)
    for path in folder.glob("*/*.state"):
        decoder.load_state(path)


def test_a_folder_that_is_damaged_or_gone_costs_time_only(launch, decoder, tmp_path):
    folder = tmp_path / "states"
    chat = Conversation(decoder)
    first = launch("--state-dir", folder)
    chat.ask(first, QUESTIONS[0])
    (entry,) = stored(folder, 1)
    data = entry.read_bytes()
    entry.write_bytes(data[: len(data) // 2])
    second = launch("--state-dir", folder)
    assert chat.ask(second, QUESTIONS[1])["lrt"]["reused_tokens"] == 0
    assert second.gauge("lrt_state_folder_problems") == 1
    assert "state folder: " in second.log.read_text()
    shutil.rmtree(folder)
    folder.write_text("a file")
    assert chat.ask(second, QUESTIONS[2])["lrt"]["reused_tokens"] > 0  # from memory
    assert second.get("/ready").status == 200


def without_rights_of_root():
    """Keep a process from writing where permissions forbid it, also where it runs as root."""
    drop_from_bounding_set, override = 24, 1  # PR_CAPBSET_DROP and CAP_DAC_OVERRIDE of Linux
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(drop_from_bounding_set, override, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_a_folder_that_cannot_be_written_costs_time_only(launch, decoder, tmp_path):
    folder = tmp_path / "states"
    writer = launch("--state-dir", folder)
    chat = Conversation(decoder)
    chat.ask(writer, QUESTIONS[0])
    stored(folder, 1)
    found = [folder, *folder.rglob("*")]
    for path in found:
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        reader = launch("--state-dir", folder, prepare=without_rights_of_root)
        before = contents(folder)
        chat.ask(reader, QUESTIONS[1])
        while reader.gauge("lrt_state_folder_problems") < 1:
            time.sleep(0.02)
        assert contents(folder) == before
        assert "state folder: " in reader.log.read_text()
        chat.ask(reader, QUESTIONS[2])
    finally:
        for path in found:
            path.chmod(0o700)


def test_a_folder_on_a_full_disk_costs_time_only(launch, decoder, tmp_path):
    folder = tmp_path / "states"
    server = launch("--state-dir", folder)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    chat = Conversation(decoder)
    for question in QUESTIONS:
        chat.ask(server, question)
    until = time.monotonic() + 60
    while server.gauge("lrt_state_folder_problems") < 3:
        assert time.monotonic() < until
    assert not list(folder.glob("*/*.state"))


# In this process


@pytest.fixture
def small(decoder_of):
    return decoder_of("padded_vocab")


def state_of(decoder, tokens, policy="stepwise"):
    return decoder.prefill([tokens], policy=policy)


def test_the_longest_common_beginning_is_found(small):
    states, tokens = PrefixStates(), list(range(1, 61))
    forks = [[*tokens[:30], *[7] * 20], [*tokens[:45], *[8] * 3], [9] * 40]
    for fork in forks:
        assert states.keep(state_of(small, fork))
    for prompt, expected, count in ((tokens, 1, 45), ([*tokens[:30], 7, 7, 1], 0, 32), ([9] * 50, 2, 40)):
        state, shared = states.find(prompt, STEPWISE)
        assert (state.tokens[0], shared) == (forks[expected], count)
    assert states.find([5] * 60, STEPWISE) == states.find(tokens[: FEWEST_TOKENS - 1], STEPWISE) == (None, 0)
    assert not states.keep(state_of(small, tokens[: FEWEST_TOKENS - 1]))


def test_a_state_that_continues_another_takes_its_place(small):
    states, tokens = PrefixStates(), list(range(1, 61))
    assert states.keep(state_of(small, tokens[:30])) and len(states) == 1
    assert states.keep(state_of(small, tokens[:50])) and len(states) == 1
    assert not states.keep(state_of(small, tokens[:40])) and len(states) == 1
    assert states.find(tokens, STEPWISE)[1] == 50
    assert states.num_bytes == states.find(tokens, STEPWISE)[0].num_bytes


def test_the_least_recently_used_leave_first(small):
    prompts = [[token] * 30 for token in range(1, 5)]
    size = state_of(small, prompts[0]).num_bytes
    states = PrefixStates(3 * size)
    for prompt in prompts[:3]:
        states.keep(state_of(small, prompt))
    states.find(prompts[0], STEPWISE)
    states.keep(state_of(small, prompts[3]))
    assert [states.find(prompt, STEPWISE)[1] for prompt in prompts] == [30, 0, 30, 30]
    assert states.num_bytes == 3 * size and len(states) == 3
    assert not states.keep(state_of(small, [6] * 100)) and len(states) == 3


def test_a_state_that_was_read_less_exactly_serves_no_request_for_more(small):
    states, tokens = PrefixStates(), np.random.default_rng(1).integers(1, 200, 60).tolist()
    assert not states.keep(state_of(small, tokens, "zero"))  # of use to no request
    loose = small.prefill([tokens], policy="fixed-point", tolerance=0.1)
    assert states.keep(loose)
    for request in (STEPWISE, PrefillRequest("fixed-point", 1e-4)):
        assert states.find(tokens, request) == (None, 0)
    assert states.find(tokens, PrefillRequest("fixed-point", 0.1)) == (loose, 60)
    exact = state_of(small, tokens)
    assert states.keep(exact) and len(states) == 1
    assert states.find(tokens, STEPWISE) == (exact, 60)
    assert states.find(tokens, PrefillRequest("zero")) == (None, 0)


def test_a_request_that_continues_a_state_is_as_if_read_from_the_beginning(small):
    tokens = np.random.default_rng(2).integers(1, 200, 60).tolist()
    held = state_of(small, tokens)
    batch = lrt_deploy.BatchDecoder(small, 2)
    batch.submit(tokens[:40] + tokens[:10], 20, state=held, stop_ids=[])
    found = [event.event.token for event in batch.run()]
    expected = small.generate(tokens[:40] + tokens[:10], 20, stop_ids=[], policy="stepwise")
    assert found == [event.token for event in expected]
