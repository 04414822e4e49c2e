"""The state on a device, to the bit: held against plain arrays that the same graph reads and writes on the CPU.

Three executions of one class: the strict fake of TensorRT and ONNX Runtime by address run `DeviceBuffers`, with
copies, captures and shared contexts; `PlainBuffers` is nothing but arrays and `session.run`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_cuda import FakeDriver
from fake_tensorrt import GPU, fake_library, put_engine, session_of

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.engine_sidecar import cache_capacity
from lrt_deploy.bundle.manifest import graph_path, read_manifest
from lrt_deploy.bundle.precisions import base_dtype
from lrt_deploy.runtime.backends.base import BlockLimits, StateBuffers
from lrt_deploy.runtime.backends.cuda import CudaDevice
from lrt_deploy.runtime.backends.ort_cuda import OrtCudaBackend
from lrt_deploy.runtime.backends.tensorrt import TensorRTBackend, open_engine
from lrt_deploy.runtime.decoder import Decoder

PROMPT = [5, 9, 2, 77, 31, 200, 4, 18, 6, 42, 42, 7]
CHUNK = 32


class PlainBackend:
    """Arrays on the host and the bundle's `full` graph, run by ONNX Runtime without bindings."""

    name, detail, device, blocks = "plain", "", None, BlockLimits(CHUNK, in_order=True, auto_iterates=False)

    def __init__(self, folder, manifest, precision):
        self.precision, self.capacity, self.config = precision, manifest.max_seq_len, manifest.model
        self.state_dtype = base_dtype(precision, "full")
        self.session = session_of(folder / graph_path(precision, "prefill", "full"))

    def allocate(self, batch):
        return PlainBuffers(self, batch)


class PlainBuffers(StateBuffers):
    copies_note = None

    def __init__(self, backend, batch):
        config, slots = backend.config, cache_capacity(backend.capacity)
        self.backend, self.batch, self.capacity, self.layers = backend, batch, backend.capacity, config.n_layer
        shape, dtype = (batch, config.n_kv_head, slots, config.head_dim), np.dtype(backend.state_dtype)
        self.pairs = [p for p in contract.state_pairs(config, backend.state_dtype) if p.in_place]
        self.caches = {pair.past: np.zeros(shape, dtype) for pair in self.pairs}
        self.held = np.zeros((batch, config.n_embd if config.memory else 0), dtype)

    @property
    def latent(self):
        return self.held.astype(np.float32)

    def set_latent(self, rows, latent):
        self.held[rows] = latent

    def run(self, rows, ids, positions, latents):
        """Run tokens (n, t) of some rows; logits (n, V) after the last ones and the latents (n, t, C)."""
        wanted = {value.name for value in self.backend.session.get_inputs()}
        feed = {
            "input_ids": ids,
            "position_ids": positions,
            "write_index": positions[:, 0],
            "last_index": np.full((len(ids), 1), ids.shape[1] - 1),
            "past_latent": latents,
        } | {name: cache[rows] for name, cache in self.caches.items()}
        names = [value.name for value in self.backend.session.get_outputs()]
        found = self.backend.session.run(names, {name: value for name, value in feed.items() if name in wanted})
        outputs = dict(zip(names, found, strict=True))
        for pair in self.pairs:
            self.caches[pair.past][rows] = outputs[pair.present]
        return outputs["logits"][:, 0], outputs.get("present_latent", latents)

    def decode(self, tokens, positions, head):
        rows = slice(0, len(tokens))
        logits, latents = self.run(rows, tokens[:, None], positions[:, None], self.held[rows, None])
        self.held[rows] = latents[:, 0]
        return logits

    def read(self, block, latents):
        given = latents[None].astype(self.held.dtype)
        logits, found = self.run(slice(block.row, block.row + 1), block.tokens[None], block.positions[None], given)
        return found[0].astype(np.float32), logits[0] if block.head else logits[0, :0]

    def expect(self, total):
        pass

    def fit(self, lengths, soon):
        pass

    def reorder(self, row, start, order, move):
        assert np.array_equal(order, np.arange(len(order)))

    def reset_order(self):
        pass

    def cache(self, layer, length):
        names = contract.past_cache(layer)
        return tuple(self.caches[name][:, :, :length].astype(np.float32) for name in names)

    def read_slots(self, row, start, stop):
        return {name: cache[row, :, start:stop].copy() for name, cache in self.caches.items()}

    def write_slots(self, row, start, entries):
        for name, cache in self.caches.items():
            cache[row, :, start : start + entries[name].shape[1]] = entries[name]


def on_tensorrt(folder, manifest, precision, patch, cuda_graph=True):
    driver = FakeDriver(seed=3)
    patch.setitem(sys.modules, "cuda.bindings.driver", driver)
    patch.setitem(sys.modules, "tensorrt_rtx", fake_library(folder, driver, precision))
    device = CudaDevice()
    engine = open_engine(folder, manifest, "tensorrt-rtx", precision, GPU)
    return TensorRTBackend(engine, device, manifest, cuda_graph)


def by_address(folder, manifest, precision, patch):
    patch.setitem(sys.modules, "cuda.bindings.driver", FakeDriver(eager=True))
    patch.setattr("lrt_deploy.runtime.backends.ort_cuda.CHUNK_TOKENS", CHUNK)
    return OrtCudaBackend(folder, manifest, precision, CudaDevice(), kind="cpu")


EXECUTIONS = {
    "tensorrt": on_tensorrt,
    "tensorrt without graphs": lambda *arguments: on_tensorrt(*arguments, cuda_graph=False),
    "ort by address": by_address,
}


def life(decoder, policy):
    """All that a state of several rows shows in a life with steps, forks, moves, rewinds and more prompts."""
    seen = []

    def look(state):
        seen.append([state.tokens, state.logits.tobytes(), b"" if state.latent is None else state.latent.tobytes()])
        length = int(state.lengths.min())
        caches = [state.cache(layer) for layer in range(decoder.config.n_layer)]
        seen.append([part[:, :, :length].tobytes() for pair in caches for part in pair])

    state = decoder.prefill([PROMPT * 4, PROMPT[3:8], PROMPT[:1]], policy=policy, tolerance=1e-2)
    look(state)
    for token in range(4):
        decoder.step(state, [token, token + 7, token + 9])
    twin = state.fork()
    state.drop(0)
    decoder.step(state, [1, 2])
    look(state)
    look(twin)
    twin.rewind([11, 6, 2])
    look(twin)
    decoder.prefill([PROMPT[:5], PROMPT[5:], PROMPT], policy=policy, tolerance=1e-2, state=twin)
    look(twin)
    state.add(twin, 1)
    decoder.step(state, [3, 3, 3])
    look(state)
    return seen


@pytest.mark.parametrize(
    ("golden", "policy"),
    [
        ("mr_gqa_SSSL", "stepwise"),
        ("mr_gqa_SSSL", "fixed-point"),
        ("mr_gqa_SSSL", "zero"),
        ("baseline_ve", "fixed-point"),
    ],
)
@pytest.mark.parametrize("name", EXECUTIONS)
def test_a_state_on_a_device_is_that_on_plain_arrays(export_once, tmp_path, monkeypatch, golden, name, policy):
    folder = shutil.copytree(export_once(golden), tmp_path / "bundle")
    put_engine(folder)
    manifest = read_manifest(folder)
    backend = EXECUTIONS[name](folder, manifest, "fp32", monkeypatch)
    plain = Decoder(manifest, PlainBackend(folder, manifest, "fp32"), None)
    assert life(Decoder(manifest, backend, None), policy) == life(plain, policy)


@pytest.mark.slow
def test_so_is_one_in_half_precision(in_every_precision, tmp_path, monkeypatch):
    folder = shutil.copytree(in_every_precision("mr_gqa_SSSL"), tmp_path / "bundle")
    put_engine(folder, "fp16")
    manifest = read_manifest(folder)
    plain = life(Decoder(manifest, PlainBackend(folder, manifest, "fp16"), None), "stepwise")
    for name in ("tensorrt", "ort by address"):
        backend = EXECUTIONS[name](folder, manifest, "fp16", monkeypatch)
        assert life(Decoder(manifest, backend, None), "stepwise") == plain


def test_a_latent_that_is_one_bit_off_is_seen(export_once, tmp_path, monkeypatch):
    """The twin."""
    folder = shutil.copytree(export_once("mr_gqa_SSSL"), tmp_path / "bundle")
    put_engine(folder)
    manifest = read_manifest(folder)
    backend = on_tensorrt(folder, manifest, "fp32", monkeypatch)
    plain = PlainBackend(folder, manifest, "fp32")
    run = PlainBuffers.decode

    def decode(self, tokens, positions, head):
        logits = run(self, tokens, positions, head)
        self.held.view(np.int32)[0, 0] ^= 1
        return logits

    monkeypatch.setattr(PlainBuffers, "decode", decode)
    assert life(Decoder(manifest, backend, None), "stepwise") != life(Decoder(manifest, plain, None), "stepwise")
