"""The prompt cache: what it finds, that a hit gives the same numbers, what damage and too little room do to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import lrt_deploy
from lrt_deploy.errors import InputError, StateError
from lrt_deploy.runtime.prompt_cache import PromptCache

NAME = "padded_vocab"
RNG = np.random.default_rng(10)
PROMPT, OTHER = RNG.integers(0, 250, 60).tolist(), RNG.integers(0, 250, 30).tolist()


@pytest.fixture
def decoder(decoder_of):
    return decoder_of(NAME)


@pytest.fixture
def cache(tmp_path):
    return PromptCache(tmp_path / "cache")


def entries(cache):
    return sorted(cache.folder.glob("*/*.state"))


def read(cache, decoder, prompt, policy="stepwise", **options):
    return cache.prefill(decoder, prompt, policy, **options)


@pytest.mark.parametrize("policy", ["stepwise", "fixed-point", "auto", "zero"])
def test_a_prompt_that_was_read_before_is_found_to_the_bit(cache, decoder, export_once, policy):
    first = read(cache, decoder, PROMPT, policy)
    assert first.prefill.reused_tokens == 0 and len(entries(cache)) == 1
    with lrt_deploy.open_decoder(export_once(NAME)) as other:  # as another process would
        again = PromptCache(cache.folder).prefill(other, PROMPT, policy)
        assert (again.prefill.reused_tokens, again.prefill.passes) == (len(PROMPT), 0.0)
        assert np.array_equal(again.logits, first.logits) and np.array_equal(again.latent, first.latent)
        assert np.array_equal(other.step(again, [1]), decoder.step(first, [1]))
    assert len(entries(cache)) == 1


def test_a_shared_beginning_is_reused_and_only_the_rest_is_read(cache, decoder):
    read(cache, decoder, PROMPT)
    longer = read(cache, decoder, PROMPT + OTHER)
    assert (longer.prefill.reused_tokens, longer.computed_tokens) == (60, 90)
    edited = read(cache, decoder, PROMPT[:40] + OTHER)
    assert edited.prefill.reused_tokens == 40
    for state in (longer, edited):
        whole = decoder.prefill(state.tokens, policy="stepwise")
        assert np.array_equal(state.logits, whole.logits) and np.array_equal(state.latent, whole.latent)
    assert len(entries(cache)) == 3
    shorter = read(cache, decoder, PROMPT[:50])  # computed again to the bit, and not worth an entry
    assert np.array_equal(shorter.logits, decoder.prefill([PROMPT[:50]], policy="stepwise").logits)
    assert len(entries(cache)) == 3


def test_what_was_read_otherwise_is_not_taken(cache, decoder, decoder_of, export_once):
    for options in ({}, {"policy": "zero"}, {"policy": "fixed-point"}, {"policy": "fixed-point", "tolerance": 1e-4}):
        assert read(cache, decoder, PROMPT, **options).prefill.reused_tokens == 0
    assert read(cache, decoder_of("gate32"), PROMPT).prefill.reused_tokens == 0
    with lrt_deploy.open_decoder(export_once(NAME), max_seq_len=100) as smaller:
        assert read(cache, smaller, PROMPT).prefill.reused_tokens == 0
    assert len({path.parent for path in entries(cache)}) == 6
    assert read(cache, decoder, PROMPT).prefill.reused_tokens == len(PROMPT)


def test_a_short_prompt_is_not_worth_an_entry(cache, decoder):
    read(cache, decoder, PROMPT[:15])
    assert entries(cache) == []
    read(cache, decoder, PROMPT[:16])
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "foreign", "swapped"])
def test_a_damaged_entry_is_removed_with_a_message_and_read_again(cache, decoder, damage):
    expected = read(cache, decoder, PROMPT).logits
    (path,) = entries(cache)
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[-5] ^= 1
    elif damage == "swapped":
        decoder.prefill([OTHER], policy="stepwise").save(path)
        content = bytearray(path.read_bytes())
    content = {"cut": content[: len(content) // 2], "empty": b"", "foreign": b"not a state"}.get(damage, content)
    path.write_bytes(content)
    again = PromptCache(cache.folder).prefill(decoder, PROMPT, "stepwise")
    assert np.array_equal(again.logits, expected)
    assert again.prefill.reused_tokens == 0
    if damage != "swapped":  # a whole state of other tokens is no damage: it is just not what was looked for
        assert f"a damaged entry was removed and its prompt read again ({path}" in again.prefill.note
        assert read(cache, decoder, PROMPT).prefill.reused_tokens == len(PROMPT)


def test_the_folder_stays_within_its_bytes_and_the_least_recently_used_go(decoder, tmp_path):
    size = decoder.prefill([PROMPT], policy="stepwise").num_bytes + 3000
    cache = PromptCache(tmp_path, max_bytes=3 * size)
    prompts = [[first, *PROMPT[1:]] for first in range(5)]
    for clock, prompt in enumerate(prompts[:3]):
        read(cache, decoder, prompt)
        for path in set(entries(cache)) - {p for p in entries(cache) if p.stat().st_mtime < 1e6}:
            os.utime(path, (clock, clock))
    read(cache, decoder, prompts[0])  # used again: now the newest
    read(cache, decoder, prompts[3])
    assert sum(path.stat().st_size for path in entries(cache)) <= cache.max_bytes and len(entries(cache)) == 3
    assert read(cache, decoder, prompts[0]).prefill.reused_tokens == len(PROMPT)
    assert read(cache, decoder, prompts[1]).prefill.reused_tokens == 0


def test_a_state_larger_than_the_cache_is_not_kept(decoder, tmp_path):
    cache = PromptCache(tmp_path, max_bytes=1000)
    assert read(cache, decoder, PROMPT).lengths[0] == len(PROMPT)
    assert entries(cache) == []


def test_what_a_crashed_process_left_is_swept_away_in_time(decoder, tmp_path):
    cache = PromptCache(tmp_path, max_bytes=decoder.prefill([PROMPT]).num_bytes + 3000)
    read(cache, decoder, PROMPT)
    old, young = (entries(cache)[0].with_name(f".x.state.partial-{name}") for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    read(cache, decoder, OTHER)
    assert not old.exists() and young.exists()


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(cache, decoder, monkeypatch):
    from lrt_deploy.runtime import state_file

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_file, "save_file", full)
    state = read(cache, decoder, PROMPT)
    assert "No space left on device" in state.prefill.note
    assert np.array_equal(state.logits, decoder.prefill([PROMPT], policy="stepwise").logits)


def test_a_folder_that_cannot_be_made_and_bad_prompts_are_refused(cache, decoder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be made"):
        PromptCache(tmp_path / "file" / "cache")
    for bad in ([], [300]):
        with pytest.raises(InputError):
            read(cache, decoder, bad)
    with pytest.raises(StateError, match="capacity"):
        read(cache, decoder, [1] * 129)


def test_two_processes_share_a_cache_that_is_too_small_for_them(export_once, root):
    """A few seconds of what `benchmarks/prompt_cache_soak.py` does for a minute."""
    script = root / "benchmarks" / "prompt_cache_soak.py"
    run = subprocess.run(
        [sys.executable, script, export_once(NAME), "--seconds", "4"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert report["hits"] > 0 and (report["wrong"], report["troubles"]) == (0, 0)
