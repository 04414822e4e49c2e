"""Bits per byte: equal to the authors' evaluator, and by hand on a fake; rows from text and from .npz files."""

from __future__ import annotations

import io
import math
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import BackendError, InputError
from lrt_deploy.evaluation.bits_per_byte import evaluate, rows_from_npz, rows_from_text

slow = pytest.mark.slow

CONFIG = LRTConfig(sequence_len=8, vocab_size=4, n_layer=1, n_head=1, n_kv_head=1, n_embd=2)
BYTES = [0, 1, 2, 3]  # token 0 is special


class Fake:
    """Logits depend on all tokens of a row so far, so a row that is not read from its own start shows."""

    config, max_seq_len = CONFIG, 16

    def __init__(self):
        self.batches = []

    def prefill(self, prompts, *, policy="auto", tolerance=None):
        assert policy == "stepwise"
        assert {len(row) for row in prompts} == {1}
        self.batches.append(len(prompts))
        state = SimpleNamespace(sums=np.zeros(len(prompts)), logits=None)
        self.step(state, [row[0] for row in prompts])
        return state

    def step(self, state, tokens):
        state.sums = 0.5 * state.sums + np.asarray(tokens)
        state.logits = np.sin(state.sums[:, None] * np.arange(1, 5)).astype(np.float32)
        return state.logits


def by_hand(rows, targets):
    """The definition, one target at a time: nats, counted targets, bytes."""
    nats, tokens, size = 0.0, 0, 0
    for row, row_targets in zip(rows, targets, strict=True):
        total = 0.0
        for token, target in zip(row, row_targets, strict=True):
            total = 0.5 * total + token
            logits = [float(np.float32(math.sin(total * k))) for k in range(1, 5)]
            if target != -1 and BYTES[target]:
                nats += math.log(sum(math.exp(z) for z in logits)) - logits[target]
                tokens, size = tokens + 1, size + BYTES[target]
    return nats, tokens, size


@st.composite
def batches_of_rows(draw):
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    x = [draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) for n in lengths]
    y = [draw(st.lists(st.integers(-1, 3), min_size=n, max_size=n)) for n in lengths]
    y[0][0] = 1  # something to count
    return x, y


@settings(deadline=None)
@given(batches_of_rows(), st.integers(1, 4))
def test_bits_per_byte_are_what_the_definition_says_for_rows_of_any_length(rows, batch_size):
    decoder = Fake()
    nats, tokens, size = by_hand(*rows)
    found = evaluate(decoder, *rows, BYTES, batch_size)
    assert found.bits_per_byte == pytest.approx(nats / (math.log(2) * size), rel=1e-9)
    assert (found.tokens, found.bytes) == (tokens, size)
    assert max(decoder.batches) <= batch_size
    assert sum(decoder.batches) == len(rows[0])


def test_ignored_and_special_targets_are_read_but_not_counted():
    one = evaluate(Fake(), [[1, 2, 3]], [[-1, 0, 2]], BYTES, 1)
    nats, _, _ = by_hand([[1, 2, 3]], [[-1, -1, 2]])
    assert one.bits_per_byte == pytest.approx(nats / (math.log(2) * 2))
    assert (one.tokens, one.bytes) == (1, 2)


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 3))
def test_buckets_share_out_every_target_by_its_position(length, count):
    rng = np.random.default_rng(length)
    rows = [rng.integers(0, 4, length - i).tolist() for i in range(min(count, length))]
    targets = [rng.integers(1, 4, len(row)).tolist() for row in rows]

    class Long(Fake):
        max_seq_len = 70

    found = evaluate(Long(), rows, targets, BYTES, 2)
    edges = [(0, 15), (16, 31), (32, 63), (64, 127)]
    assert [(bucket.first, bucket.last) for bucket in found.buckets] == [
        (first, min(last, length - 1)) for first, last in edges if first < length
    ]
    assert (sum(b.tokens for b in found.buckets), sum(b.bytes for b in found.buckets)) == (found.tokens, found.bytes)
    for bucket in found.buckets:
        ignored = [
            [target if bucket.first <= t <= bucket.last else -1 for t, target in enumerate(row)] for row in targets
        ]
        nats, tokens, size = by_hand(rows, ignored)
        assert bucket.bits_per_byte == pytest.approx(nats / (math.log(2) * size), rel=1e-9)
        assert (bucket.tokens, bucket.bytes) == (tokens, size)


def test_progress_counts_every_token():
    seen = []
    evaluate(Fake(), [[1, 2], [3], [1, 1]], [[1, 1], [1], [1, 1]], BYTES, 2, lambda *progress: seen.append(progress))
    assert seen == [("evaluating", done, 5) for done in (1, 3, 5)]


@pytest.mark.parametrize(
    ("x", "y", "named"),
    [
        ([], [], "x has 0 rows"),
        ([[1]], [[1], [1]], "x has 1 rows and y has 2"),
        ([[1, 2]], [[1]], "x row 0 has 2 tokens and y row 0 has 1"),
        ([[1], []], [[1], []], "x row 1 has 0 tokens and y row 1 has 0; expected as many, at least one"),
        ([[1.5]], [[1]], r"x row 0 has 1 dimension\(s\) of float64"),
        ([[[1]]], [[1]], r"x row 0 has 2 dimension\(s\) of int64"),
        ([[4]], [[1]], "x row 0 holds the token id 4 at index 0; expected token ids 0 to 3"),
        ([[1, -1]], [[1, 1]], "x row 0 holds the token id -1 at index 1"),
        ([[1]], [[4]], "y row 0 holds the token id 4 at index 0; expected token ids -1 to 3"),
        ([[1]], [[-2]], "y row 0 holds the token id -2"),
        ([[1] * 17], [[1] * 17], "17 tokens, and the decoder holds 16"),
        ([[1, 1]], [[0, -1]], "no target has bytes"),
    ],
)
def test_rows_that_cannot_be_evaluated_are_refused_before_any_work(x, y, named):
    decoder = Fake()
    with pytest.raises(InputError, match=named):
        evaluate(decoder, x, y, BYTES, 1)
    assert decoder.batches == []


def test_a_target_without_an_entry_in_token_bytes_is_refused():
    with pytest.raises(InputError, match="y row 0 holds the token id 3 at index 0; expected token ids -1 to 2"):
        evaluate(Fake(), [[3]], [[3]], BYTES[:3], 1)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(InputError, match="batch size is 0"):
        evaluate(Fake(), [[1]], [[1]], BYTES, 0)


def test_logits_that_are_not_finite_are_an_error():
    class Broken(Fake):
        def step(self, state, tokens):
            super().step(state, tokens)[0, 3] = math.nan
            return state.logits

    with pytest.raises(BackendError, match="position 0 are not finite"):
        evaluate(Broken(), [[1]], [[1]], BYTES, 1)


# Rows from text.

CHARACTERS = SimpleNamespace(bos_id=0, encode=lambda text: [ord(character) for character in text])


@given(st.text(min_size=1, max_size=60), st.integers(1, 20))
def test_text_rows_cover_every_token_once_and_begin_with_bos(text, max_seq_len):
    x, y = rows_from_text(text, CHARACTERS, max_seq_len)
    assert [token for row in y for token in row] == CHARACTERS.encode(text)
    assert all(row == [CHARACTERS.bos_id, *targets[:-1]] for row, targets in zip(x, y, strict=True))
    assert [len(row) for row in x[:-1]] == [max_seq_len] * (len(x) - 1)
    assert 1 <= len(x[-1]) <= max_seq_len


@pytest.mark.parametrize(("text", "max_seq_len"), [("", 8), ("a", 0)])
def test_no_text_and_no_room_are_refused(text, max_seq_len):
    with pytest.raises(InputError):
        rows_from_text(text, CHARACTERS, max_seq_len)


# Rows from files.

X = np.array([[1, 2], [3, 0]])


def test_npz_rows_are_taken_as_they_are(tmp_path):
    np.savez(tmp_path / "rows.npz", x=X.astype(np.uint16), y=X - 1, other=np.zeros(3))
    x, y = rows_from_npz(tmp_path / "rows.npz")
    assert (x.tolist(), y.tolist()) == (X.tolist(), (X - 1).tolist())
    assert x.dtype == y.dtype == np.int64


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"some text", "cannot be read"),
        (b"", "cannot be read"),
        (npz(x=X, y=X)[:-30], "cannot be read"),
        (npy(X), "holds one array"),
        (npz(), "lacks x and y; it holds nothing"),
        (npz(x=X, z=X), "lacks y; it holds x, z"),
        (npz(x=X, y=X.astype(object)), "cannot be read"),
        (npz(x=X.astype(float), y=X), "x is float64 of shape"),
        (npz(x=X > 1, y=X), "x is bool"),
        (npz(x=X, y=X[0]), r"y is int64 of shape \(2,\)"),
        (npz(x=X[:0], y=X[:0]), r"x is int64 of shape \(0, 2\)"),
        (npz(x=X, y=X[:, :1]), r"x has the shape \(2, 2\) and y \(2, 1\)"),
    ],
)
def test_other_files_are_refused_by_name(content, named, tmp_path):
    path = tmp_path / "rows.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=named) as caught:
        rows_from_npz(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be opened"):
        rows_from_npz(tmp_path / "none.npz")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_rows_are_read_from_regular_files_only(tmp_path, kind):
    path = tmp_path / "rows.npz"
    {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": Path.mkdir}[kind](path)
    with pytest.raises(InputError, match="expected a regular file"):
        rows_from_npz(path)


def test_a_small_archive_of_large_arrays_is_refused_unread(tmp_path):
    zeros = np.zeros((1, 20_000_000), np.int64)  # 320 MB in two arrays, from 0.3 MB
    np.savez_compressed(tmp_path / "rows.npz", x=zeros, y=zeros)
    with pytest.raises(InputError, match="would become 320"):
        rows_from_npz(tmp_path / "rows.npz")


# The authors' numbers. Every golden on the runtime: test_goldens.


@pytest.mark.parametrize("name", ["mr_gqa_SSSL", "baseline_ve"])
def test_the_reference_counts_what_the_authors_count(name, golden_of, tolerances):
    from lrt_deploy.model.reference import ReferenceDecoder

    golden = golden_of(name)
    arrays = golden.arrays
    decoder = ReferenceDecoder(golden.model(), arrays["bpb_x"].shape[1])
    found = evaluate(decoder, arrays["bpb_x"], arrays["bpb_y"], arrays["token_bytes"], batch_size=4)
    assert found.bits_per_byte == pytest.approx(float(arrays["bpb_sequential_recurrent"]), abs=tolerances.bits_per_byte)


@slow
def test_the_runtime_counts_what_the_authors_count_in_any_batches(golden_of, decoder_of, tolerances):
    arrays, decoder = golden_of("mr_gqa_SSSL").arrays, decoder_of("mr_gqa_SSSL")
    expected = float(arrays["bpb_sequential_recurrent"])
    for batch_size in (1, 3):
        found = evaluate(decoder, arrays["bpb_x"], arrays["bpb_y"], arrays["token_bytes"], batch_size)
        assert found.bits_per_byte == pytest.approx(expected, abs=tolerances.bits_per_byte)
        assert found.tokens == int((arrays["token_bytes"][arrays["bpb_y"]] > 0).sum())


@slow
def test_a_text_longer_than_the_capacity_is_evaluated_whole(decoder_of):
    decoder = decoder_of("mr_gqa_SSSL")
    text = "Rows of a text begin with <|bos|>, a special token that no text contains. " * 3
    x, y = rows_from_text(text, decoder.tokenizer, decoder.max_seq_len)
    found = evaluate(decoder, x, y, decoder.tokenizer.byte_lengths, batch_size=2)
    assert len(x) > 1
    assert {row[0] for row in x} == {decoder.tokenizer.bos_id}
    assert found.tokens == len(decoder.tokenizer.encode(text))
    assert found.bytes == len(text.encode())


@pytest.mark.parametrize("content", [b"", b"nonsense that is longer than a magic number", pickle.dumps([1, 2])])
def test_a_file_that_is_no_archive_is_refused_without_advice_to_unpickle_it(tmp_path, content):
    path = tmp_path / "rows.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as an \.npz archive") as raised:
        rows_from_npz(path)
    assert "pickle" not in str(raised.value)
