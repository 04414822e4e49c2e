"""What a decode step copies and writes, measured by poisoning the state, is what `bench` computes from the contract."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import pytest

from lrt_deploy import open_decoder
from lrt_deploy.runtime import bench

pytestmark = pytest.mark.slow  # for the exports

NAME = "mr_gqa_SSSL"


@dataclass(frozen=True)
class Copies:
    """Bytes of state that one step copied. `backend`: between past and present; `kept`: aside, by Python code."""

    backend: int
    kept: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.backend + self.kept


@dataclass(frozen=True)
class Writes:
    """Bytes that one step wrote: the token's cache entries, the new latent, the record of it that a rewind needs."""

    cache: int
    latent: int
    record: int


def count_writes(state, step):
    """Run `step`, which appends one token to each row, and count the poisoned numbers that it overwrites."""
    buffers, rows, lengths = state.buffers, range(state.batch), state.lengths
    recorded = [len(state.export_row(row)["latents"]) for row in rows]
    for row, length in zip(rows, lengths, strict=True):
        entries = buffers.read_slots(row, length, length + 1)
        buffers.write_slots(row, length, {name: np.full_like(array, np.nan) for name, array in entries.items()})
    step()
    written = [array for row in rows for array in buffers.read_slots(row, lengths[row], lengths[row] + 1).values()]
    latent = buffers.latent[: state.batch].size * np.dtype(state.owner.backend.state_dtype).itemsize
    record = [state.export_row(row)["latents"][start:] for row, start in zip(rows, recorded, strict=True)]
    return Writes(finite_bytes(written), latent, finite_bytes(record))


def finite_bytes(arrays):
    return sum(int(np.isfinite(array.astype(np.float32)).sum()) * array.itemsize for array in arrays)


def count_copies(buffers, positions, step):
    """Run `step`, which appends one token at `positions` (B), and count the state that it copies.

    A cache tensor is not copied if it lies afterwards where it lay before and the new token was written there: its slot
    is poisoned beforehand. Otherwise all of it was copied. The latent cannot be written where it is read, so two places
    swap; if it lies afterwards where it lay before, it was copied back. `kept` counts calls of `ndarray.copy` on any of
    this memory. Fails where the buffers do not show their memory.
    """
    before, latent = caches(buffers, len(positions)), buffers.latent
    if [a.ctypes.data for a in before] != [a.ctypes.data for a in caches(buffers, len(positions))]:
        raise AssertionError("this backend shows copies of its caches, so that what a step copies cannot be counted")
    slots = np.repeat(positions, len(before) // len(positions))
    for cache, slot in zip(before, slots, strict=True):
        cache[:, slot] = np.nan
    kept = bytes_copied_in_python([*before, latent], step)
    copied = sum(
        new.nbytes
        for old, new, slot in zip(before, caches(buffers, len(positions)), slots, strict=True)
        if new.ctypes.data != old.ctypes.data or np.isnan(new[:, slot]).any()
    )
    if latent.size and buffers.latent.ctypes.data == latent.ctypes.data:
        copied += latent.nbytes
    return Copies(copied, kept)


def caches(buffers, rows):
    """Every cache of every row, (G, S, D) each, in its own type: `cache` would widen what is narrower than float32."""
    return [array for row in range(rows) for array in buffers.read_slots(row, 0, buffers.capacity).values()]


def bytes_copied_in_python(arrays, act):
    """Bytes of these arrays on which `ndarray.copy` is called while `act` runs."""
    ranges = [np.lib.array_utils.byte_bounds(array) for array in arrays if array.size]
    copied = 0

    def see(frame, event, called):
        nonlocal copied
        owner = getattr(called, "__self__", None) if event == "c_call" and called.__name__ == "copy" else None
        if isinstance(owner, np.ndarray) and any(low <= owner.ctypes.data < high for low, high in ranges):
            copied += owner.nbytes

    sys.setprofile(see)
    try:
        act()
    finally:
        sys.setprofile(None)
    return copied


class FakeBuffers:
    """Two layers and a latent that does what a backend should, or one of the things that it should not."""

    batch, capacity, layers = 2, 8, 2

    def __init__(self, fault=""):
        self.fault = fault
        self.caches = [np.zeros((2, 1, 8, 4), np.float32) for _ in range(4)]
        self.latents, self.turn = [np.zeros((2, 1, 4), np.float32) for _ in range(2)], 0

    @property
    def latent(self):
        return self.latents[self.turn][:, 0]

    def read_slots(self, row, start, stop):
        views = {f"cache {i}": cache[row, :, start:stop] for i, cache in enumerate(self.caches)}
        return {name: view.copy() for name, view in views.items()} if self.fault == "opaque" else views

    def step(self):
        if self.fault == "moves":
            self.caches[1] = self.caches[1].copy()
        for cache in self.caches[1:] if self.fault == "writes elsewhere" else self.caches:
            cache[[0, 1], :, [3, 5]] = 1
        if self.fault == "saves":
            self.latent.copy()
        self.latents[1 - self.turn][:] = 1
        if self.fault == "latent back":
            self.latents[self.turn][:] = self.latents[1 - self.turn]
        else:
            self.turn = 1 - self.turn


@pytest.mark.parametrize(
    ("fault", "backend", "kept"),
    [
        ("", 0, 0),
        ("moves", 2 * 8 * 4 * 4, 2 * 8 * 4 * 4),
        ("writes elsewhere", 2 * 8 * 4 * 4, 0),
        ("latent back", 2 * 4 * 4, 0),
        ("saves", 0, 2 * 4 * 4),
    ],
)
def test_copies_are_counted(fault, backend, kept):
    buffers = FakeBuffers(fault)
    assert count_copies(buffers, np.array([3, 5]), buffers.step) == Copies(backend, kept)


def test_buffers_that_do_not_show_their_memory_are_not_counted():
    buffers = FakeBuffers("opaque")
    with pytest.raises(AssertionError, match="cannot be counted"):
        count_copies(buffers, np.array([3, 5]), buffers.step)


def test_counting_is_a_true_step(decoder_of):
    decoder = decoder_of(NAME)
    counted, plain = (decoder.prefill([[1, 2, 3], [4]], policy="stepwise") for _ in range(2))
    copies = count_copies(counted.buffers, counted.lengths, lambda: decoder.step(counted, [7, 8]))
    assert copies == Copies(backend=0, kept=0)
    assert np.array_equal(counted.logits, decoder.step(plain, [7, 8]))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_precision_copies_what_the_contract_says(in_every_precision, precision):
    with open_decoder(in_every_precision(NAME), precision=precision) as decoder:
        state = decoder.prefill([[1, 2, 3], [4]], policy="stepwise")
        decoder.step(state, [7, 8])  # may still bind something
        copies = count_copies(state.buffers, state.lengths, lambda: decoder.step(state, [7, 8]))
        assert copies == Copies(backend=0, kept=0)
        assert copies.total == bench.state_bytes_per_step(decoder.config, 4)["state_bytes_copied_per_step"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_writes_are_counted_by_a_true_step(in_every_precision, precision):
    with open_decoder(in_every_precision(NAME), precision=precision) as decoder:
        counted, plain = (decoder.prefill([[1, 2, 3], [4]], policy="stepwise") for _ in range(2))
        writes = count_writes(counted, lambda: decoder.step(counted, [7, 8]))
        item = 4 if precision == "fp32" else 2
        assert writes == Writes(cache=2 * 4 * 64 * item, latent=2 * 64 * item, record=2 * 64 * 4)
        one_row = bench.state_bytes_per_step(decoder.config, 4, item)
        assert writes.cache + writes.latent == 2 * one_row["state_bytes_written_per_step"]
        assert writes.record == 2 * one_row["latent_record_bytes_per_step"]
        assert np.array_equal(counted.logits, decoder.step(plain, [7, 8]))
        assert count_writes(counted, lambda: None).record == 0  # the twin: nothing is written
