"""The prompt cache: what it finds, that a hit gives the same numbers, what damage and too little room do to it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import lrt_deploy
from lrt_deploy.errors import InputError, StateError
from lrt_deploy.files import PARTIAL
from lrt_deploy.runtime.prefill import PrefillRequest
from lrt_deploy.runtime.prompt_cache import MARKER, PromptCache
from lrt_deploy.runtime.state import DecodeState

NAME = "padded_vocab"
RNG = np.random.default_rng(10)
LEFTOVERS = ("0123456789abcdef", "fedcba9876543210", "notes")
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


@pytest.mark.parametrize("policy", ["stepwise", "fixed-point", "auto"])
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
    for options in ({}, {"policy": "fixed-point"}, {"policy": "fixed-point", "tolerance": 1e-4}):
        assert read(cache, decoder, PROMPT, **options).prefill.reused_tokens == 0
    assert read(cache, decoder_of("gate32"), PROMPT).prefill.reused_tokens == 0
    with lrt_deploy.open_decoder(export_once(NAME), max_seq_len=100) as smaller:
        assert read(cache, smaller, PROMPT).prefill.reused_tokens == 0
    assert len({path.parent for path in entries(cache)}) == 5
    assert read(cache, decoder, PROMPT).prefill.reused_tokens == len(PROMPT)


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT + OTHER, PROMPT[:40]])
def test_zero_memory_gives_the_same_numbers_whatever_the_cache_holds(cache, decoder, prompt):
    expected = decoder.prefill([prompt], policy="zero")
    for policy in ("zero", "stepwise", "fixed-point", "auto"):
        read(cache, decoder, PROMPT, policy)
    before = entries(cache)
    found = read(cache, decoder, prompt, "zero")
    assert np.array_equal(found.logits, expected.logits) and np.array_equal(found.latent, expected.latent)
    assert found.prefill == expected.prefill and entries(cache) == before
    request = PrefillRequest("zero")  # as the server uses the folder
    assert cache.store(decoder, found, request) == [] and entries(cache) == before
    assert cache.find(decoder, prompt, request, more_than=0) == (None, [])


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


def test_processes_that_end_right_after_an_entry_is_written_leave_no_more_than_fits(decoder, tmp_path, monkeypatch):
    size = decoder.prefill([PROMPT]).num_bytes + 3000
    cache, save = PromptCache(tmp_path, max_bytes=3 * size), DecodeState.save

    def save_and_end(state, path):
        save(state, path)
        raise KeyboardInterrupt  # a kill would leave the same files

    monkeypatch.setattr(DecodeState, "save", save_and_end)
    for first in range(6):
        with pytest.raises(KeyboardInterrupt):
            read(cache, decoder, [first, *PROMPT[1:]])
        assert sum(path.stat().st_size for path in entries(cache)) <= cache.max_bytes
    assert len(entries(cache)) == 3


def test_a_state_larger_than_the_cache_is_not_kept(decoder, tmp_path):
    cache = PromptCache(tmp_path, max_bytes=1000)
    assert read(cache, decoder, PROMPT).lengths[0] == len(PROMPT)
    assert entries(cache) == []


@pytest.mark.parametrize("when", ["opening", "storing"])
def test_what_a_killed_process_left_goes_and_what_a_live_one_writes_stays(cache, decoder, when):
    read(cache, decoder, PROMPT)
    left, live, foreign = (entries(cache)[0].with_name(f".{'a' * 40}.state.partial-{end}") for end in LEFTOVERS)
    for path in (left, live, foreign):
        path.write_bytes(b"half")
    with live.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        PromptCache(cache.folder) if when == "opening" else read(cache, decoder, OTHER)
        assert [path.exists() for path in (left, live, foreign)] == [False, True, True]


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(cache, decoder, file_size_limit):
    with file_size_limit(1000):
        state = read(cache, decoder, PROMPT)
    assert "File too large" in state.prefill.note and "saved no time" in state.prefill.note
    assert np.array_equal(state.logits, decoder.prefill([PROMPT], policy="stepwise").logits)
    assert not [path for path in cache.folder.rglob("*") if PARTIAL in path.name]


def test_a_folder_of_other_things_is_refused_and_left_as_it_was(decoder, tmp_path):
    film = tmp_path / "films" / "holiday.mp4"
    film.parent.mkdir()
    film.write_bytes(b"x" * 5000)
    with pytest.raises(InputError, match=r"is not a prompt cache: it holds films.*name another folder"):
        PromptCache(tmp_path, max_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["films"] and film.stat().st_size == 5000


def test_what_others_put_into_a_cache_is_never_counted_read_or_removed(decoder, tmp_path):
    cache = PromptCache(tmp_path / "cache", max_bytes=decoder.prefill([PROMPT]).num_bytes + 3000)
    read(cache, decoder, PROMPT)
    (place,) = {path.parent for path in entries(cache)}
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / f"{'b' * 40}.state").write_bytes(b"x" * 10**6)
    strangers = [cache.folder / "films" / "holiday.mp4", cache.folder / "notes.txt", place / "notes.txt"]
    strangers += [place / f"{'c' * 40}.state.bak", place / f"{'C' * 40}.state"]
    for path in strangers:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 10**6)
    (place / f"{'d' * 40}.state").symlink_to(outside / f"{'b' * 40}.state")
    (place / f"{'e' * 40}.state").mkdir()
    os.mkfifo(place / f"{'f' * 40}.state")
    (cache.folder / ("b" * 40)).symlink_to(outside)
    before = sorted(path for path in tmp_path.rglob("*") if path not in entries(cache))
    again = read(PromptCache(cache.folder), decoder, PROMPT)
    assert again.prefill.reused_tokens == len(PROMPT)  # their bytes left it room
    read(cache, decoder, OTHER)
    read(cache, decoder, [1, *PROMPT[1:]])
    assert len([path for path in entries(cache) if path.is_file() and not path.is_symlink()]) <= 2 + 1
    assert set(before) <= set(tmp_path.rglob("*"))


def test_a_cache_of_version_0_1_which_has_no_marker_is_taken_over(cache, decoder):
    read(cache, decoder, PROMPT)
    (cache.folder / MARKER).unlink()
    (cache.folder / ".lock").touch()
    entries(cache)[0].parent.chmod(0o755)
    assert read(PromptCache(cache.folder), decoder, PROMPT).prefill.reused_tokens == len(PROMPT)
    assert (cache.folder / MARKER).is_file() and entries(cache)[0].parent.stat().st_mode & 0o777 == 0o700
    (cache.folder / MARKER).unlink()
    (entries(cache)[0].parent / "notes.txt").touch()
    with pytest.raises(InputError, match=r"it holds [0-9a-f]{40}/notes\.txt"):
        PromptCache(cache.folder)


def test_the_lock_follows_no_link_and_truncates_nothing(decoder, tmp_path):
    size = decoder.prefill([PROMPT], policy="stepwise").num_bytes + 3000
    cache, precious = PromptCache(tmp_path / "cache", max_bytes=size), tmp_path / "precious"
    precious.write_text("years of work")
    (cache.folder / ".lock").symlink_to(precious)
    for prompt in (PROMPT, OTHER, [1, *PROMPT[1:]]):
        read(cache, decoder, prompt)
    assert precious.read_text() == "years of work" and (cache.folder / ".lock").is_symlink()
    assert sum(path.stat().st_size for path in entries(cache)) <= size


def test_an_evicted_entry_is_forgotten_in_memory_too(decoder, tmp_path):
    cache = PromptCache(tmp_path / "cache", max_bytes=2 * decoder.prefill([PROMPT]).num_bytes + 6000)
    for first in range(6):
        read(cache, decoder, [first, *PROMPT[1:]])
        read(cache, decoder, [first, *PROMPT[1:]])
    assert set(cache._known) <= set(entries(cache)) and len(entries(cache)) <= 2
    for path in entries(cache):
        path.unlink()  # as another process does
    read(cache, decoder, OTHER)
    assert not cache._known


def test_prompts_are_their_owners_alone(cache, decoder):
    read(cache, decoder, PROMPT)
    modes = {path: path.stat().st_mode & 0o777 for path in [cache.folder, *cache.folder.rglob("*")]}
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items()), modes


SECOND_USER = """
import os, sys
import lrt_deploy
from lrt_deploy.runtime.prompt_cache import PromptCache
with lrt_deploy.open_decoder(sys.argv[1]) as decoder:
    if os.geteuid() == 0:
        os.setresgid(54321, 54321, 54321)
        os.setresuid(54321, 54321, 54321)
    state = PromptCache(sys.argv[2]).prefill(decoder, list(range(60)), "stepwise")
    print(state.prefill.note)
"""


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_cache_of_another_user_says_that_and_costs_time_only(decoder, export_once, mode):
    """Also where the other may look into it, but not write."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        cache = PromptCache(Path(folder) / "cache")
        read(cache, decoder, PROMPT)
        before = sorted(cache.folder.rglob("*"))
        for path in cache.folder.rglob("*"):
            path.chmod(path.stat().st_mode & 0o444 | (0o111 if path.is_dir() else 0) if os.geteuid() else 0o600)
        cache.folder.chmod(mode if os.geteuid() == 0 else 0o500)
        command = [sys.executable, "-c", SECOND_USER, export_once(NAME), cache.folder]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert "no permission" in run.stdout and "saved no time" in run.stdout
        if os.geteuid() == 0:
            assert "it belongs to user 0, and a prompt cache is for one user" in run.stdout
        assert sorted(cache.folder.rglob("*")) == before
        cache.folder.chmod(0o700)


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
