"""A decode step copies and allocates nothing: ONNX Runtime updates the caches where they are."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lrt_deploy
from lrt_deploy.bundle import contract
from lrt_deploy.bundle.manifest import read_manifest
from lrt_deploy.runtime.backends.ort_cpu import OrtCpuBackend, room_for, room_for_prompt

pytestmark = pytest.mark.slow  # for the exports

STEPS = 500
COPY_WARNING = "in-place optimization not activated"

OPEN = """
import sys
from pathlib import Path
import numpy as np
from lrt_deploy.bundle import contract
from lrt_deploy.bundle.manifest import read_manifest
from lrt_deploy.runtime.backends.ort_cpu import OrtCpuBackend
folder = Path(sys.argv[1])
manifest = read_manifest(folder)
config = manifest.model
backend = OrtCpuBackend(folder, manifest, "fp32", log_level=2)
"""

ROLL_OUT = f"""
buffers = backend.allocate(2)
rng = np.random.default_rng(0)
for t in range({STEPS}):
    logits = buffers.decode(rng.integers(0, config.vocab_size, 2), np.array([t, t]), head=t % 2 == 0)
    assert logits is None or np.isfinite(logits).all()
print("steps", {STEPS})
"""

RUN_UNBOUND = """
sizes = {"batch": 1, "tokens": 1, "rows": 1, "capacity": manifest.max_seq_len}
feeds = {}
for spec in contract.graph_inputs(config, "windowed"):
    feeds[spec.name] = np.zeros([sizes.get(dim, dim) for dim in spec.shape], spec.dtype)
feeds[contract.WINDOW_END][:] = 1
feeds[contract.SLOT_POSITIONS] = np.arange(manifest.max_seq_len)
backend.session.run(None, feeds)
print("steps 1")
"""


def run_script(script, bundle):
    result = subprocess.run(
        [sys.executable, "-c", script, str(bundle)], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("name", ["no_x0", "demo"])
def test_a_long_rollout_draws_no_copy_warning(name, export_once):
    result = run_script(OPEN + ROLL_OUT, export_once(name))
    assert result.stdout == f"steps {STEPS}\n"
    assert COPY_WARNING not in result.stderr
    assert "TensorScatter" not in result.stderr


def test_the_same_graph_without_binding_draws_it(export_once):
    result = run_script(OPEN + RUN_UNBOUND, export_once("no_x0"))
    assert result.stdout == "steps 1\n"
    assert COPY_WARNING in result.stderr


@pytest.fixture
def buffers(export_once):
    folder = export_once("no_x0")
    return OrtCpuBackend(folder, read_manifest(folder), "fp32").allocate(2)


def caches(buffers):
    """All cache arrays, as the buffers hold them: views, not copies."""
    return [array for layer in range(buffers.layers) for array in buffers.cache(layer, buffers.capacity)]


def addresses(buffers):
    return [array.ctypes.data for array in caches(buffers)]


def test_caches_stay_where_they_are_and_are_written_there(buffers):
    before, arrays = addresses(buffers), caches(buffers)
    for t in range(20):
        buffers.decode(np.array([1, 2]), np.array([t, t]), head=True)
        assert all(np.abs(array[:, :, t]).max() > 0 for array in arrays)
        assert all(not array[:, :, t + 1 :].any() for array in arrays)
    assert addresses(buffers) == before


def test_what_is_bound_is_the_memory_of_the_arrays(buffers):
    for array in caches(buffers):
        assert array.flags.c_contiguous
        assert ort.OrtValue.ortvalue_from_numpy(array).data_ptr() == array.ctypes.data


def test_the_latent_swaps_between_two_places(buffers):
    places = []
    for t in range(6):
        buffers.decode(np.array([1, 2]), np.array([t, t]), head=False)
        places.append(buffers.latent.ctypes.data)
    assert places[0::2] == places[:1] * 3
    assert places[1::2] == places[1:2] * 3
    assert places[0] != places[1]


def test_a_step_allocates_an_array_only_where_the_caches_grow(buffers):
    start = 200
    tokens, positions = np.array([1, 2]), np.array([start, start])
    buffers.decode(tokens, positions, head=True)
    room = room_for(start + 1)

    def peak(action, steps=50):
        action()
        tracemalloc.start()
        for _ in range(steps):
            positions[:] += 1
            action()
        _, top = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return top

    before = caches(buffers)
    assert before[0].shape[2] == room >= start + 55 and before[0].nbytes >= 2**15
    assert peak(lambda: buffers.decode(tokens, positions, head=True)) < 2**14  # a few small Python objects
    positions[:] = room - 10
    assert peak(lambda: buffers.decode(tokens, positions, head=True), steps=20) > sum(a.nbytes for a in before)
    grown = caches(buffers)
    assert grown[0].shape[2] == room_for(room + 1) > room
    kept = slice(0, room - 10)
    assert all(np.array_equal(new[:, :, kept], old[:, :, kept]) for new, old in zip(grown, before, strict=True))


@pytest.mark.parametrize("length", [300, 470])
@pytest.mark.parametrize("policy", ["zero", "fixed-point"])
def test_a_prompt_leaves_caches_no_longer_than_steps_would(export_once, policy, length):
    """Every later step attends to all of their slots."""
    with lrt_deploy.open_decoder(export_once("no_x0")) as decoder:
        prompt = np.random.default_rng(0).integers(0, decoder.config.vocab_size, length).tolist()
        state = decoder.prefill([prompt, prompt[:40]], policy=policy, tolerance=1e-2)
        assert caches(state.buffers)[0].shape[2] == room_for(length + 1)
        state = decoder.prefill([prompt[:100], [1]], state=state, policy=policy, tolerance=1e-2)
        assert caches(state.buffers)[0].shape[2] == room_for(length + 101)


@given(end=st.integers(1, 5000), more=st.integers(0, 5000))
def test_caches_grow_by_a_quarter_while_a_prompt_is_read_and_end_as_steps_would_have_them(end, more):
    room = room_for_prompt(end, end + more)
    assert end <= room <= max(room_for(end), room_for(end + more + 1))
    assert room >= min(5 * end // 4, room_for(end + more + 1))


def test_state_pairs_that_are_in_place_are_the_caches(export_once):
    config = read_manifest(export_once("no_x0")).model
    pairs = contract.state_pairs(config)
    assert [pair.past for pair in pairs if not pair.in_place] == ["past_latent"]
    assert sum(pair.in_place for pair in pairs) == 2 * config.n_layer
