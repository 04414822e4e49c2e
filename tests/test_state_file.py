"""Saved states: the same numbers in another process, and every file that is not one refused by name and reason."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import lrt_deploy
from lrt_deploy.errors import StateError
from lrt_deploy.runtime import state_file
from lrt_deploy.runtime.state_file import read_file

NAME = "padded_vocab"
RNG = np.random.default_rng(6)
LONG, SHORT = (RNG.integers(0, 250, n).tolist() for n in (40, 7))
STEPS = [[3, 4], [5, 6], [7, 8]]


@pytest.fixture
def decoder(decoder_of):
    return decoder_of(NAME)


@pytest.fixture
def saved(decoder, tmp_path):
    """A state and its file."""
    state = decoder.prefill([LONG, SHORT], policy="fixed-point", tolerance=1e-4)
    decoder.step(state, [1, 2])
    state.extra = {"turns": [1, 2], "name": "ü"}
    state.save(tmp_path / "one.state")
    return state, tmp_path / "one.state"


CONTINUE = """
import sys, numpy as np, lrt_deploy
bundle, path, out = sys.argv[1:]
with lrt_deploy.open_decoder(bundle) as decoder:
    state = decoder.load_state(path)
    found = [state.logits] + [decoder.step(state, tokens) for tokens in ([3, 4], [5, 6], [7, 8])]
    state.rewind([len(state.tokens[0]) - 4, len(state.tokens[1]) - 4])  # back into what was saved
    np.savez(out, logits=np.stack(found + [state.logits]), latent=state.latent if state.latent is not None else 0)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("name", [NAME, "mr_gqa_SSSL", "baseline_ve", "demo"])
def test_another_process_continues_to_the_bit(name, decoder_of, export_once, tmp_path):
    decoder = decoder_of(name)
    state = decoder.prefill([LONG, SHORT], policy="fixed-point", tolerance=1e-4)
    at_prompt = state.logits
    first = decoder.step(state, [1, 2])
    state.save(tmp_path / "one.state")
    expected = [first] + [decoder.step(state, tokens) for tokens in STEPS] + [at_prompt]
    out = tmp_path / "found.npz"
    run = subprocess.run(
        [sys.executable, "-c", CONTINUE, export_once(name), tmp_path / "one.state", out], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found = np.load(out)
    assert np.array_equal(found["logits"], np.stack(expected))
    assert not np.array_equal(found["logits"], np.stack(expected[::-1]))
    state.rewind([len(LONG), len(SHORT)])
    assert state.latent is None or np.array_equal(found["latent"], state.latent)


def test_a_loaded_state_is_the_saved_one(decoder, saved):
    state, path = saved
    loaded = decoder.load_state(str(path))
    for name in ("tokens", "extra", "prefill", "read_within", "computed_tokens", "num_bytes"):
        assert getattr(loaded, name) == getattr(state, name), name
    assert loaded.extra is not state.extra
    for layer in range(decoder.config.n_layer):
        for ours, theirs in zip(loaded.cache(layer), state.cache(layer), strict=True):
            for row, length in enumerate(state.lengths):
                assert np.array_equal(ours[row, :, :length], theirs[row, :, :length])


def test_a_rewound_state_is_saved_without_its_logits_and_finds_them_again(decoder, tmp_path):
    state = decoder.prefill([LONG])
    expected = decoder.step(state, [1])
    decoder.step(state, [2])
    state.rewind(len(LONG) + 1)
    state.save(tmp_path / "one.state")
    assert "logits" not in read_file(tmp_path / "one.state").rows[0]
    assert np.array_equal(decoder.load_state(tmp_path / "one.state").logits, expected)


def test_size_follows_the_tokens_and_not_the_capacity(decoder, tmp_path):
    sizes = {}
    for count in (10, 20, 40, 80):
        decoder.prefill([(LONG + LONG)[:count]], policy="stepwise").save(tmp_path / "one.state")
        sizes[count] = (tmp_path / "one.state").stat().st_size
    states = [decoder.prefill([LONG[:count]], policy="stepwise") for count in (1, 2)]
    per_token = states[1].num_bytes - states[0].num_bytes
    for few, many in ((10, 20), (20, 40), (40, 80)):
        assert abs(sizes[many] - sizes[few] - (many - few) * per_token) < 100  # the header names numbers by digits


def test_a_state_for_a_larger_capacity_fits_where_its_tokens_do(decoder, export_once, tmp_path):
    decoder.prefill([LONG]).save(tmp_path / "long.state")
    decoder.prefill([[1]] * 3).save(tmp_path / "rows.state")
    with lrt_deploy.open_decoder(export_once(NAME), max_seq_len=len(LONG)) as small:
        assert small.load_state(tmp_path / "long.state").lengths.tolist() == [len(LONG)]
    with lrt_deploy.open_decoder(export_once(NAME), max_seq_len=len(LONG) - 1) as small:
        refused(small, tmp_path / "long.state", r"1 sequence\(s\) of up to 40 tokens; this decoder takes 8 of 39")


# Files that are not what they should be


def refused(decoder, path, words):
    with pytest.raises(StateError, match=words) as caught:
        decoder.load_state(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\x00" * 100, b"not a state", b"\xff" * 8, b"\x10" + b"\x00" * 7 + b"{" * 16]
)
def test_what_is_no_safetensors_file_is_refused(decoder, tmp_path, content):
    (path := tmp_path / "x.state").write_bytes(content)
    refused(decoder, path, "is not a whole state file")


def test_a_file_that_is_not_there_or_a_folder_is_refused(decoder, tmp_path):
    refused(decoder, tmp_path / "nowhere.state", "the state cannot be opened: No such file")
    refused(decoder, tmp_path, "is a folder; expected a regular file")


def test_a_file_cut_anywhere_is_refused(decoder, saved, tmp_path):
    whole = saved[1].read_bytes()
    path = tmp_path / "cut.state"
    for length in np.linspace(0, len(whole) - 1, 40).astype(int):
        path.write_bytes(whole[:length])
        refused(decoder, path, "is not a whole state file")
    path.write_bytes(whole + b"\x00")
    refused(decoder, path, "is not a whole state file")


def test_a_changed_byte_anywhere_is_refused(decoder, saved, tmp_path):
    whole = bytearray(saved[1].read_bytes())
    path = tmp_path / "changed.state"
    for where in [*RNG.integers(8, len(whole), 60).tolist(), 9, 40, len(whole) - 1]:
        altered = bytearray(whole)
        altered[where] ^= 0x04
        path.write_bytes(altered)
        refused(decoder, path, "state")
    path.write_bytes(whole)
    decoder.load_state(path)


def rewrite(path, change, arrays=None):
    """The file with other metadata or arrays and a checksum that is right for them."""
    with safe_open(path, framework="np") as file:
        metadata, found = dict(file.metadata()), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    change(metadata, found)
    metadata.pop("sha256", None)
    metadata["sha256"] = state_file._digest(metadata, found)
    save_file(found, path, metadata)


def book(**fields):
    return lambda metadata, arrays: metadata.update(book=json.dumps(json.loads(metadata["book"]) | fields))


MISFITS = [
    (lambda m, a: m.update(format="another"), "is a safetensors file, but not a lrt-deploy decode state"),
    (lambda m, a: m.clear(), "is a safetensors file, but not"),
    (lambda m, a: m.update(format_version="2"), "has the state format 2, this lrt-deploy reads 1"),
    (lambda m, a: m.pop("format_version"), "has the state format None"),
    (lambda m, a: m.update(model_sha256="0" * 64), "is of another model .*000000000000"),
    (lambda m, a: m.update(precision="fp16"), "is of fp16 with float32 caches, expected fp32 with float32"),
    (lambda m, a: m.update(state_dtype="float16"), "is of fp32 with float16 caches, expected fp32 with float32"),
    (lambda m, a: m.pop("precision"), "is not of the state format 1"),
    (lambda m, a: m.update(book="[]"), "is not of the state format 1"),
    (lambda m, a: m.update(book="{"), "is not of the state format 1"),
    (book(lengths=[]), "is not of the state format 1"),
    (book(lengths=[-1, 8]), "is not of the state format 1"),
    (book(lengths=[41, 9]), r"1.latents is .*expected"),
    (book(lengths=[41]), "arrays of a row '1', expected 1 row"),
    (book(lengths=[1] * 9), "9 sequence"),
    (book(prefill={"speed": 1}), "is not of the state format 1"),
    (book(prefill={"policy": "stepwise", "passes": 1.0, "speed": 1}), "prefill.speed is not a known field"),
    (book(read_within="much"), "is not of the state format 1"),
    (lambda m, a: a.pop("0.past_key_0"), "0.past_key_0 is missing"),
    (lambda m, a: a.update({"0.past_key_0": a["0.past_key_0"][:, :-1].copy()}), "0.past_key_0 is"),
    (lambda m, a: a.update({"0.latents": a["0.latents"].astype(np.float64)}), "0.latents is .*float64"),
    (lambda m, a: a.update({"0.secret": np.zeros(1)}), "0.secret is .*expected no such array"),
    (lambda m, a: a.update({"0.kept.99": np.zeros(300, np.float32)}), "0.kept.99 is"),
    (lambda m, a: a.update({"7.tokens": np.zeros(1)}), "a row '7', expected 2 row"),
    (
        lambda m, a: a["1.past_value_1"].__setitem__((0, 0, 0), np.nan),
        "1.past_value_1 holds numbers that are not finite",
    ),
    (lambda m, a: a["0.latents"].__setitem__((3, 2), np.inf), "0.latents holds numbers that are not finite"),
    (lambda m, a: a["0.logits"].__setitem__(5, np.nan), "0.logits holds numbers that are not finite"),
    (lambda m, a: a["0.tokens"].__setitem__(0, 300), "0.tokens holds ids outside 0 to 299"),
    (lambda m, a: a["0.tokens"].__setitem__(0, -1), "0.tokens holds ids outside"),
]


@pytest.mark.parametrize(("change", "words"), MISFITS, ids=[words[:40] for _, words in MISFITS])
def test_a_whole_file_that_does_not_fit_is_refused(decoder, saved, change, words):
    rewrite(saved[1], change)
    refused(decoder, saved[1], words)


def test_the_same_rewriting_without_a_change_is_accepted(decoder, saved):
    rewrite(saved[1], lambda metadata, arrays: None)
    assert decoder.load_state(saved[1]).tokens == saved[0].tokens


def test_a_state_of_another_model_says_so(decoder_of, saved):
    refused(decoder_of("gate32"), saved[1], "another model")


@pytest.mark.slow  # for the export
@pytest.mark.parametrize(
    ("name", "precision"),
    [("mr_gqa_SSSL", "fp16"), ("mr_gqa_SSSL", "int8"), ("mr_gqa_SSSL", "int4-weight-only"), ("demo", "fp32")],
)
def test_every_precision_is_saved_in_its_own_type_and_continues_to_the_bit(
    name, precision, in_every_precision, tmp_path
):
    bundle, path = in_every_precision(name), tmp_path / "one.state"
    with lrt_deploy.open_decoder(bundle, precision=precision) as decoder:
        state = decoder.prefill([LONG, SHORT])
        decoder.step(state, [1, 2])
        state.save(path)
        assert str(read_file(path).rows[0]["past_key_0"].dtype) == decoder.fingerprint.state_dtype
        loaded, twin, expected = decoder.load_state(path), state.fork(), state.logits
        for tokens in STEPS:
            expected = decoder.step(state, tokens)
            assert np.array_equal(decoder.step(loaded, tokens), expected)
            assert np.array_equal(decoder.step(twin, tokens), expected)
        twin.rewind([len(LONG) + 2, len(SHORT) + 2])
        decoder.step(twin, STEPS[1])
        assert np.array_equal(decoder.step(twin, STEPS[2]), expected)
        assert not np.array_equal(decoder.step(twin, STEPS[2]), expected)
    with lrt_deploy.open_decoder(bundle, precision="int8-weight-only") as other:
        refused(other, path, "of another model|expected int8-weight-only")


def test_bfloat16_caches_come_back_as_they_were():
    """No backend here runs bfloat16; the file must hold it all the same."""
    import ml_dtypes

    array = RNG.normal(size=(2, 3, 4)).astype(ml_dtypes.bfloat16)
    stored = state_file._storable(array)
    assert stored.dtype == np.uint16
    assert np.array_equal(stored.view(np.dtype("bfloat16")), array)


# Saving


@pytest.mark.parametrize("extra", [{"a": {1, 2}}, {"a": np.zeros(2)}], ids=["set", "array"])
def test_what_is_not_json_is_not_saved_and_leaves_the_old_file(decoder, saved, extra):
    state, path = saved
    before = path.read_bytes()
    state.extra = extra
    with pytest.raises(StateError, match="`extra` is not JSON"):
        state.save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(decoder, tmp_path):
    with pytest.raises(StateError, match=r"could not be saved to .*nowhere"):
        decoder.prefill([SHORT]).save(tmp_path / "nowhere" / "x.state")


@pytest.mark.parametrize("size", [0, 1000])
def test_an_error_while_saving_leaves_the_old_file(decoder, saved, file_size_limit, size):
    _, path = saved
    before = path.read_bytes()
    with pytest.raises(StateError, match=r"could not be saved to .*File too large"), file_size_limit(size):
        decoder.prefill([SHORT]).save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_saved_state_is_its_owners_alone_also_after_saving_again(decoder, saved):
    state, path = saved
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    state.save(path)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"years of work", b"\x89PNG\r\n\x1a\n", b'{"format": "safetensors"}'])
def test_a_file_that_is_no_state_is_not_replaced_by_one(decoder, tmp_path, content):
    path = tmp_path / "thesis.tex"
    path.write_bytes(content)
    with pytest.raises(StateError, match=r"thesis\.tex exists and is a file of another kind"):
        decoder.prefill([SHORT]).save(path)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
    path.write_bytes(b"")  # as `mktemp` makes it
    decoder.prefill([SHORT]).save(path)
    assert decoder.load_state(path).tokens == [SHORT]


def test_a_device_is_not_replaced_by_a_state(decoder, tmp_path):
    (tmp_path / "device").symlink_to("/dev/null")
    with pytest.raises(StateError, match="character device"):
        decoder.prefill([SHORT]).save(tmp_path / "device")
    assert (tmp_path / "device").is_symlink()


def test_a_temporary_file_of_a_killed_save_goes_with_the_next_save_and_others_stay(decoder, tmp_path):
    left, other, link = (tmp_path / f".x.state.partial-{end}" for end in ("0" * 16, "notes", "1" * 16))
    left.write_bytes(b"half")
    other.write_bytes(b"not ours")
    link.symlink_to(other)
    decoder.prefill([SHORT]).save(tmp_path / "x.state")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "x.state", other, link])


def test_the_file_is_what_the_safetensors_library_writes(decoder, saved):
    """Its own reader finds the arrays, and writing them with its own writer gives a state that loads to the bit."""
    state, path = saved
    with safe_open(path, framework="np") as file:
        arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    path.unlink()
    save_file(arrays, path, metadata)
    loaded = decoder.load_state(path)
    assert loaded.tokens == state.tokens and np.array_equal(loaded.logits, state.logits)


SAVE_FOREVER = """
import sys, lrt_deploy
bundle, path = sys.argv[1:]
with lrt_deploy.open_decoder(bundle) as decoder:
    states = [decoder.prefill([[token] * 100]) for token in (1, 2)]
    while True:
        for state in states:
            state.save(path)
            print("saved", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_a_process_killed_while_saving_leaves_a_whole_file(decoder, export_once, tmp_path):
    path = tmp_path / "one.state"
    command = [sys.executable, "-c", SAVE_FOREVER, export_once(NAME), path]
    for delay in (0.0, 0.003, 0.011):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "saved\n"
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        assert decoder.load_state(path).tokens[0] in ([1] * 100, [2] * 100)


# What is said of a state that is not of this precision or model


def test_a_state_of_another_precision_is_called_that(in_every_precision, tmp_path):
    bundle, path = in_every_precision(NAME), tmp_path / "one.state"
    with (
        lrt_deploy.open_decoder(bundle, precision="fp32") as full,
        lrt_deploy.open_decoder(bundle, precision="int8") as quantized,
    ):
        state = full.prefill([SHORT])
        state.save(path)
        for refused_by in (lambda: quantized.load_state(path), lambda: quantized.adopt(state)):
            with pytest.raises(StateError, match="it is of fp32 with float32 caches, expected int8") as caught:
                refused_by()
            assert "another model" not in str(caught.value)


def test_a_precision_in_a_bundle_of_its_own_is_told_by_the_checkpoint(decoder, in_every_precision):
    with lrt_deploy.open_decoder(in_every_precision(NAME), precision="int8") as quantized:
        assert quantized.fingerprint.bundle_sha256 != decoder.fingerprint.bundle_sha256
        with pytest.raises(StateError, match="it is of fp32 with float32 caches, expected int8"):
            quantized.adopt(decoder.prefill([SHORT]))


def test_another_model_in_another_precision_is_called_both(decoder_of, in_every_precision):
    words, other = "another model.*and of fp32 with float32 caches instead of int8", decoder_of("gate32")
    with (
        lrt_deploy.open_decoder(in_every_precision(NAME), precision="int8") as quantized,
        pytest.raises(StateError, match=words),
    ):
        quantized.adopt(other.prefill([SHORT]))


def test_a_file_of_version_0_1_0_still_loads(decoder, saved, tmp_path):
    """It does not name the checkpoint."""
    state, path = saved
    with safe_open(path, framework="np") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del metadata["checkpoint_sha256"], metadata["sha256"]
    save_file(arrays, tmp_path / "old.state", metadata | {"sha256": state_file._digest(metadata, arrays)})
    assert decoder.load_state(tmp_path / "old.state").tokens == state.tokens
