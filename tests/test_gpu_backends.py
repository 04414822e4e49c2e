"""The backends on a GPU, without one: TensorRT on a fake engine that enforces its rules, ONNX Runtime on the host.

What can be tested is our side: that everything is bound before it is run, a cache at one address for in and out, shapes
inside the chosen profile, copies waited for, graphs captured only after a first run, and every step run exactly once.
`fake_tensorrt` refuses what TensorRT refuses, and `fake_cuda` does a random part of its queue at each call, so a
missing synchronization shows as wrong numbers. What they compute is the bundle's own graph, by ONNX Runtime: its tokens
must be ort-cpu's. Threads, interrupts, forks and errors: `test_gpu_hazards`.
"""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from fake_cuda import CUresult, FakeDriver
from fake_tensorrt import GPU, FakeContext, FakeEngine, fake_library, put_engine

import lrt_deploy
from lrt_deploy.bundle.manifest import graph_path, read_manifest
from lrt_deploy.cli.app import app
from lrt_deploy.cli.bench import BenchOptions, measure
from lrt_deploy.cli.build import smoke_test
from lrt_deploy.errors import BackendError, EngineError, ParityError
from lrt_deploy.fields import LARGEST_COUNT
from lrt_deploy.machine import Gpu, find_gpu
from lrt_deploy.runtime import bench as measuring
from lrt_deploy.runtime import opening
from lrt_deploy.runtime import state as state_module
from lrt_deploy.runtime.backends import ort_cuda, tensorrt
from lrt_deploy.runtime.backends.base import check_finite
from lrt_deploy.runtime.backends.cuda import CudaDevice
from lrt_deploy.runtime.backends.host_tables import HostTables
from lrt_deploy.runtime.backends.ort_cuda import OrtCudaBackend, misplaced, open_session
from lrt_deploy.runtime.backends.tensorrt import TensorRTBackend, open_engine
from lrt_deploy.runtime.bench import _iterations, random_tokens
from lrt_deploy.runtime.decoder import Decoder
from lrt_deploy.runtime.prefill import PrefillOptions

ROOT = Path(__file__).parents[1]
GOLDEN = "mr_gqa_SSSL"
PROMPT = [5, 9, 2, 77, 31, 200, 4, 18, 6, 42, 42, 7]


@pytest.fixture(scope="module")
def bundle(export_once, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake") / "bundle"
    shutil.copytree(export_once(GOLDEN), folder)
    put_engine(folder)
    return folder


@pytest.fixture
def driver(monkeypatch, request):
    """CUDA, anew for each test."""
    driver = FakeDriver(seed=request.node.name)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    yield driver
    assert driver.violations == []


@pytest.fixture
def device(driver):
    return CudaDevice()


@pytest.fixture
def on_host(monkeypatch):
    """A device for ONNX Runtime, which computes at once: so does everything else."""

    def make():
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", FakeDriver(eager=True))
        return CudaDevice()

    return make


@pytest.fixture
def open_fake(bundle, driver, monkeypatch):
    """(cuda_graph, prefill options) -> decoder on the fake engine, and the engine."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_library(bundle, driver))

    def open_(cuda_graph=True, options=None):
        device = CudaDevice()
        manifest = read_manifest(bundle)
        engine = open_engine(bundle, manifest, "tensorrt-rtx", "fp32", GPU)
        decoder = Decoder(manifest, TensorRTBackend(engine, device, manifest, cuda_graph), None, options)
        return decoder, engine.engine

    return open_


def tokens_of(decoder, prompts, steps, policy="stepwise"):
    """Greedy tokens, and the logits of every step."""
    state, tokens, logits = decoder.prefill(prompts, policy=policy), [], []
    for _ in range(steps):
        logits.append(state.logits)
        tokens.append(state.logits.argmax(-1).tolist())
        decoder.step(state, tokens[-1])
    return tokens, np.stack(logits), state


# What it computes


@pytest.mark.parametrize("policy", ["stepwise", "fixed-point", "zero"])
def test_tokens_are_those_of_ort_cpu(open_fake, decoder_of, tolerances, policy):
    decoder, engine = open_fake()
    plain = PrefillOptions().clamp(decoder._backend.blocks)
    expected = Decoder(decoder.manifest, decoder_of(GOLDEN)._backend, None, plain)
    prompts = [PROMPT, PROMPT[3:8]]
    found, reference = (tokens_of(d, prompts, 20, policy) for d in (decoder, expected))
    assert found[0] == reference[0]
    assert np.abs(found[1] - reference[1]).max() <= 2 * tolerances.logits
    assert np.abs(found[2].latent - reference[2].latent).max() <= 2 * tolerances.latent
    length = int(found[2].lengths.min())
    for layer in range(decoder.config.n_layer):
        for one, other in zip(found[2].cache(layer), reference[2].cache(layer), strict=True):
            assert np.abs(one[:, :, :length] - other[:, :, :length]).max() <= 2 * tolerances.cache
    assert {shape for shape in engine.runs if shape[1] == 1 and shape[0] == 2}


def test_a_wrong_weight_would_show(open_fake, decoder_of, monkeypatch, tolerances):
    """The twin: the same comparison with one latent disturbed."""
    decoder, _ = open_fake()
    expected = tokens_of(decoder_of(GOLDEN), [PROMPT], 5)[1]
    state = decoder.prefill([PROMPT], policy="stepwise")
    state.buffers.set_latent(np.array([0]), state.latent * 1.01)
    decoder.step(state, [int(state.logits.argmax())])
    assert np.abs(state.logits - expected[1]).max() > 2 * tolerances.logits


def test_with_and_without_a_cuda_graph_every_bit_is_equal(open_fake, driver):
    with_graph, without = (tokens_of(open_fake(graph)[0], [PROMPT, PROMPT[:4]], 16) for graph in (True, False))
    assert driver.launches > 20
    assert with_graph[0] == without[0] and np.array_equal(with_graph[1], without[1])
    assert np.array_equal(with_graph[2].latent, without[2].latent)
    for layer in range(4):
        for one, other in zip(with_graph[2].cache(layer), without[2].cache(layer), strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_every_step_runs_exactly_once_also_while_capturing(open_fake, driver, cuda_graph):
    decoder, engine = open_fake(cuda_graph)
    state = decoder.prefill([PROMPT], policy="stepwise")
    for step in range(5):
        before = len(engine.runs)
        decoder.step(state, [step])
        assert len(engine.runs) == before + 1
    assert len(engine.runs) == len(PROMPT) + 5
    # The very first step warms up and is not captured; then one graph for each turn of the latent.
    assert driver.launches == (len(PROMPT) + 5 - 1 if cuda_graph else 0)
    assert len(driver.graphs) == (2 if cuda_graph else 0) and driver.templates == []


def test_rows_that_leave_take_their_own_context(open_fake, decoder_of):
    decoder, engine = open_fake()
    state = decoder.prefill([PROMPT, PROMPT[:5]], policy="stepwise")
    logits = state.buffers.decode(np.array([3]), state.lengths[:1], head=True)
    assert logits.shape == (1, decoder.config.vocab_size)
    assert engine.runs[-1] == (1, 1) and len(engine.contexts) == 2  # for two rows and for one
    expected = decoder_of(GOLDEN).prefill([PROMPT], policy="stepwise")
    decoder_of(GOLDEN).step(expected, [3])
    assert np.abs(logits - expected.logits).max() < 1e-4


def test_a_long_prompt_is_read_in_blocks_the_profile_allows_and_in_order(open_fake, decoder_of, tolerances):
    decoder, engine = open_fake()
    prompt = [(7 * i) % 300 for i in range(100)]
    state = decoder.prefill([prompt], policy="fixed-point", tolerance=1e-3)
    blocks = [shape[1] for shape in engine.runs]
    assert max(blocks) <= 32 and 18 in blocks  # chunks of 32, 32, 18 and 18 tokens
    assert state.prefill.note is None or "stride 1" in state.prefill.note or "finished" in state.prefill.note
    expected = decoder_of(GOLDEN).prefill([prompt], policy="stepwise")
    assert np.abs(state.latent - expected.latent).max() <= 1e-3


def test_the_report_says_that_the_iteration_was_plain(open_fake):
    decoder, _ = open_fake()
    state = decoder.prefill([PROMPT * 2], policy="fixed-point", tolerance=0.5)
    assert state.prefill.policy == "fixed-point"
    assert "stride 1" in state.prefill.note


def test_the_options_of_the_decoder_are_those_that_the_backend_can_follow(open_fake):
    decoder, _ = open_fake(options=PrefillOptions(stepwise_below=20))
    options = decoder.prefill_options
    assert (options.sweeps.stride, options.sweeps.chunk_tokens, options.stepwise_below) == (1, 32, 20)
    assert [sweeps.stride for sweeps in _iterations(decoder)] == [1]


def test_auto_reads_stepwise_here_whatever_the_length_unless_told_otherwise(open_fake):
    """An iterated pass would copy the chunk's cache to the host twice."""
    decoder, engine = open_fake()
    state = decoder.prefill([[(7 * i) % 300 for i in range(100)]])
    assert (state.prefill.policy, state.prefill.stepwise_below) == ("stepwise", LARGEST_COUNT)
    assert {shape[1] for shape in engine.runs} == {1}
    decoder.prefill_options = PrefillOptions(stepwise_below=20)
    assert decoder.prefill([PROMPT * 2]).prefill.stepwise_below == 20
    assert max(shape[1] for shape in engine.runs) == 24


def test_a_second_row_is_read_into_its_own_caches(open_fake, decoder_of):
    decoder, _ = open_fake()
    state = decoder.prefill([PROMPT, PROMPT[::-1]], policy="zero")
    expected = decoder_of(GOLDEN).prefill([PROMPT, PROMPT[::-1]], policy="zero")
    for layer in range(4):
        for one, other in zip(state.cache(layer), expected.cache(layer), strict=True):
            assert np.abs(one - other).max() < 1e-4
    assert np.abs(state.cache(0)[0][0] - state.cache(0)[0][1]).max() > 0.1


def test_entries_can_be_taken_out_and_put_back(open_fake):
    decoder, _ = open_fake()
    state = decoder.prefill([PROMPT, PROMPT[::-1]], policy="zero")
    buffers = state.buffers
    entries = buffers.read_slots(1, 2, 9)
    assert entries["past_key_0"].shape == (2, 7, 16)
    assert np.array_equal(entries["past_value_3"], state.cache(3)[1][1, :, 2:9])
    buffers.write_slots(0, 2, entries)
    assert np.array_equal(state.cache(3)[1][0, :, 2:9], entries["past_value_3"])
    twin = state.fork()
    assert np.array_equal(twin.cache(1)[0], state.cache(1)[0]) and np.array_equal(twin.latent, state.latent)


def test_out_of_order_slots_are_refused(open_fake):
    decoder, _ = open_fake()
    buffers = decoder._backend.allocate(1)
    buffers.reorder(0, 0, np.arange(4), move=True)
    with pytest.raises(BackendError, match="order of positions"):
        buffers.reorder(0, 0, np.array([0, 2, 1, 3]), move=False)


def test_a_model_without_memory_runs_too(export_once, decoder_of, driver, device, monkeypatch, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(export_once("baseline_ve"), folder)
    put_engine(folder)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_library(folder, driver))
    manifest = read_manifest(folder)
    engine = open_engine(folder, manifest, "tensorrt-rtx", "fp32", GPU)
    decoder = Decoder(manifest, TensorRTBackend(engine, device, manifest), None)
    for policy in ("stepwise", "fixed-point"):
        assert tokens_of(decoder, [PROMPT], 8, policy)[0] == tokens_of(decoder_of("baseline_ve"), [PROMPT], 8)[0]
    note = decoder.new_state(1).buffers.copies_note
    assert "one address" in note and "latent" not in note


def test_memory_is_given_back_with_the_state_and_the_decoder(open_fake, driver):
    """One state's is kept for the next one."""
    decoder, _ = open_fake()
    states = [decoder.prefill([PROMPT], policy="stepwise") for _ in range(3)]
    before = len(driver.memory)
    del states[0]
    assert len(driver.memory) == before
    del states[0]
    assert len(driver.memory) == before - 10  # eight caches, two latents
    states.clear()
    decoder.close()
    del decoder
    gc.collect()
    assert driver.memory == driver.pinned == {} and driver.graphs == []


# The fake enforces what TensorRT does: each rule has a caller that breaks it


def context_of(open_fake):
    return open_fake()[0]._backend.setup.runner.context("decode", 7)


def test_the_fake_refuses_what_tensorrt_refuses(open_fake):
    context = context_of(open_fake)
    with pytest.raises(BackendError, match=r"setting input_ids to the shape \(9, 1\).*is not within"):
        context.shape("input_ids", (9, 1))
    with pytest.raises(BackendError, match="setting input_ids"):
        context.shape("input_ids", (1, 2))  # decoding is one token
    with pytest.raises(BackendError, match=r"binding logits.*cannot lie at 12"):
        context.bind("logits", 12)
    with pytest.raises(BackendError, match="inferring shapes: input_ids"):
        context.ready()
    with pytest.raises(BackendError, match=r"running the engine.*not specified"):
        context.enqueue(7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda step: step._context.bind("present_key_1", step._context.context.addresses["past_key_2"]),
            "do not share",
        ),
        (lambda step: step._context.context.shapes.pop("write_index"), "not specified"),
        (lambda step: step._context.context.addresses.pop("present_value_0"), "not specified"),
    ],
)
def test_a_binding_that_goes_wrong_is_an_error_and_leaves_the_state(open_fake, monkeypatch, change, message):
    decoder, _ = open_fake(cuda_graph=False)
    state = decoder.prefill([PROMPT], policy="stepwise")
    lengths, latent = state.lengths, state.latent
    step = decoder._backend.steps.decode(1)
    monkeypatch.setattr(step, "_bind", lambda *_: change(step))
    with pytest.raises(BackendError, match=message):
        decoder.step(state, [1])
    assert np.array_equal(state.lengths, lengths) and np.array_equal(state.latent, latent)


def test_a_capture_without_a_run_before_it_fails(open_fake):
    decoder, _ = open_fake()
    state = decoder.prefill([PROMPT[:1]], policy="stepwise")
    decoder._backend.steps.decode(1)._context.context.ran_with = None
    with pytest.raises(BackendError, match=r"a capture needs a run.*cuda_graph=False"):
        decoder.step(state, [1])


# What must not be used


def refused(bundle, monkeypatch, gpu=GPU, library=None, **changes):
    plan = put_engine(bundle, **changes)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library or fake_library(bundle, FakeDriver()))
    try:
        with pytest.raises(EngineError) as caught:
            open_engine(bundle, read_manifest(bundle), "tensorrt-rtx", "fp32", gpu)
    finally:
        put_engine(bundle)
    message = str(caught.value)
    assert str(plan) in message
    assert f"lrt-deploy build {bundle} --backend tensorrt-rtx --precision fp32 --force" in message
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensorrt_version": "1.6.0"}, "made for tensorrt-rtx version 1.6.0, and here it is 1.7.1.116"),
        ({"onnx_sha256": "0" * 64}, "made for SHA-256 of graphs/fp32/prefill.onnx 0000"),
        ({"weights_sha256": "0" * 64}, "made for SHA-256 of graphs/fp32/weights.bin 0000"),
        ({"backend": "tensorrt"}, "backend and precision"),
        ({"precision": "fp16"}, "backend and precision"),
        ({"compute_capabilities": ("8.6", "12.0")}, "compute capability 8.6, 12.0, and Fake 8000 has 8.9"),
        ({"compute_capabilities": ("9.0",)}, "compute capability 9.0, and Fake 8000 has 8.9"),
        ({"compute_capabilities": ("9.0+",)}, "compute capability 9.0+, and Fake 8000 has 8.9"),
        ({"max_seq_len": 64}, "it holds 64 tokens and 8 sequences, the bundle 128 and 8"),
        ({"max_batch_size": 2}, "it holds 128 tokens and 2 sequences"),
        ({"plan_bytes": 10}, "has 9 bytes, its sidecar says 10: truncated or altered"),
        ({"plan_sha256": "0" * 64}, "does not match its sidecar's SHA-256"),
        ({"inputs": ()}, "its sidecar lists input_ids among its inputs as None, the model has ('int64', ['batch', "),
        ({"outputs": ({"name": "logits", "dtype": "float32", "shape": ["batch", 1, 7]},)}, "its sidecar lists logits"),
        ({"state": ()}, "its sidecar describes another state than the model has"),
        ({"capacity": 256}, "among its inputs as ('float32', ['batch', "),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_the_command(bundle, monkeypatch, changes, message):
    assert message in refused(bundle, monkeypatch, **changes)


def test_an_older_gpu_is_refused(bundle, monkeypatch):
    assert "Old has 7.5" in refused(bundle, monkeypatch, gpu=Gpu("Old", (7, 5)))


def test_what_the_library_cannot_read_is_refused_with_its_words(bundle, monkeypatch):
    library = fake_library(bundle, FakeDriver())
    monkeypatch.setattr(library.Runtime, "deserialize_cuda_engine", lambda self, data: None)
    assert "cannot read it: it gave no reason" in refused(bundle, monkeypatch, library=library)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda engine: engine.names.remove("logits"), "its inputs and outputs are"),
        (lambda engine: setattr(engine, "num_optimization_profiles", 1), "it has 1 profiles"),
        (lambda engine: engine.types.update(past_key_1="float16"), "its past_key_1 is float16 (-1,"),
        (lambda engine: engine.types.update(logits="float16"), "its logits is float16 "),
        (lambda engine: engine.shapes.update(past_latent=(-1, -1, 7)), "its past_latent is float32 (-1, -1, 7)"),
        (lambda engine: engine.shapes.update(present_latent=(-1, -1)), "its present_latent is float32 (-1, -1), its"),
        (lambda engine: engine.aliased.pop("present_key_1"), "would copy past_key_1 to present_key_1"),
        (lambda engine: setattr(engine, "limits", lambda name, index: ((1, 1), (4, 1))), "its profile decode takes"),
    ],
)
def test_an_engine_that_contradicts_its_sidecar_is_refused(bundle, monkeypatch, spoil, message):
    library = fake_library(bundle, FakeDriver())
    original = library.Runtime.deserialize_cuda_engine

    def spoiled(self, data):
        engine = original(self, data)
        spoil(engine)
        engine.num_io_tensors = len(engine.names)
        return engine

    monkeypatch.setattr(library.Runtime, "deserialize_cuda_engine", spoiled)
    assert message in refused(bundle, monkeypatch, library=library)


def test_the_engine_that_fits_is_not_refused(open_fake):
    assert open_fake()[1].num_optimization_profiles == 2


def test_a_bundle_without_the_engine_names_the_command(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4"))
    with pytest.raises(EngineError, match=r"has no engine for tensorrt in fp32; build it with `lrt-deploy build"):
        open_engine(bundle, read_manifest(bundle), "tensorrt", "fp32", GPU)


def test_without_a_gpu_the_backend_says_so(bundle, monkeypatch):
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: (None, "no GPU: none counted"))
    with pytest.raises(BackendError, match=r"tensorrt-rtx needs an NVIDIA GPU: no GPU: none counted; take .* ort-cpu"):
        lrt_deploy.open_decoder(bundle, backend="tensorrt-rtx")


# Which backend is taken


def test_auto_takes_the_best_that_is_present_and_says_why(bundle, monkeypatch):
    manifest = read_manifest(bundle)
    monkeypatch.setattr(opening, "find_gpu", lambda: (None, "no GPU: none counted"))
    found = opening.choose(bundle, manifest, "auto", None)
    assert found[:2] == ("ort-cpu", "fp32")
    assert "not tensorrt-rtx: " in found.reason and "not ort-cuda: no GPU: none counted" in found.reason
    monkeypatch.setattr(opening, "find_gpu", lambda: (GPU, "Fake 8000"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "tensorrt" or None)
    found = opening.choose(bundle, manifest, "auto", None)
    assert found[:2] == ("tensorrt-rtx", "fp32") and "not tensorrt: tensorrt is not installed" in found.reason
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert "not tensorrt: no engine is built for it" in opening.choose(bundle, manifest, "auto", None).reason
    with lrt_deploy.open_decoder(bundle, backend="ort-cpu") as decoder:
        assert decoder.backend_reason == "as asked for"


def test_an_unknown_backend_is_refused_with_the_known_ones(bundle):
    with pytest.raises(BackendError, match="this version has tensorrt, tensorrt-rtx, ort-cuda, ort-cpu and auto"):
        lrt_deploy.open_decoder(bundle, backend="tpu")


# The smoke test after a build


@pytest.fixture
def with_gpu(monkeypatch, bundle, driver):
    """As if there were a GPU: the fake library, and a device in host memory."""
    for place in ("lrt_deploy.machine", "lrt_deploy.runtime.opening", "lrt_deploy.runtime.backends.tensorrt"):
        monkeypatch.setattr(f"{place}.find_gpu", lambda: (GPU, "Fake 8000"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_library(bundle, driver))


def test_with_a_gpu_the_smoke_test_runs_and_passes(bundle, with_gpu):
    found = smoke_test(bundle, "tensorrt-rtx", "fp32", lambda what, done, total: None)
    assert found["ran"] and found["passed"], found
    assert found["gpu"] == "Fake 8000" and found["beside"] == "ort-cpu in fp32"
    assert found["max_abs_logit_error"] < 1e-4


@pytest.mark.parametrize("ort_cuda_opens", [True, False])
def test_the_smoke_test_takes_a_reference_that_can_run(bundle, with_gpu, driver, on_host, monkeypatch, ort_cuda_opens):
    """As of a bundle that holds bf16 alone: ONNX Runtime has no bfloat16 on a CPU, and may not run here at all."""
    plain = opening.missing
    no_bf16 = "ONNX Runtime has no bfloat16 on a CPU"
    monkeypatch.setattr(opening, "missing", lambda f, b, p: no_bf16 if b == "ort-cpu" else plain(f, b, p))
    manifest = read_manifest(bundle)
    assert opening.find_reference(bundle, manifest)[:2] == ("ort-cuda", "fp32")
    if ort_cuda_opens:
        reference = OrtCudaBackend(bundle, manifest, "fp32", on_host(), kind="cpu")
        monkeypatch.setattr(OrtCudaBackend, "open", lambda *_: reference)
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    found = smoke_test(bundle, "tensorrt-rtx", "fp32", lambda what, done, total: None)
    if ort_cuda_opens:
        assert found["passed"] and found["beside"] == "ort-cuda in fp32"
    else:  # a reference that does not open says nothing about the engine
        assert found["ran"] is False and "ort-cuda" in found["reason"]
    monkeypatch.setattr(opening, "missing", lambda *_: no_bf16)
    found = smoke_test(bundle, "tensorrt-rtx", "fp32", lambda what, done, total: None)
    assert found == {"ran": False, "reason": found["reason"]}
    assert "no reference to compare with" in found["reason"] and no_bf16 in found["reason"]


def test_a_faulty_engine_fails_the_smoke_test(bundle, with_gpu, monkeypatch):
    original = FakeEngine.compute

    def compute(self, shapes, addresses):
        original(self, shapes, addresses)
        self.driver.at(addresses["present_latent"], 64)[3] ^= 1  # an exponent bit of one number

    monkeypatch.setattr(FakeEngine, "compute", compute)
    found = smoke_test(bundle, "tensorrt-rtx", "fp32", lambda what, done, total: None)
    assert found["ran"] and not found["passed"] and found["verdict"]


@pytest.fixture
def quantized_engine(monkeypatch, in_every_precision, driver, tmp_path):
    """precision -> bundle with a fake engine of it, as if there were a GPU."""

    def make(precision):
        folder = shutil.copytree(in_every_precision(GOLDEN), tmp_path / precision)
        put_engine(folder, precision)
        for place in (
            "lrt_deploy.machine",
            "lrt_deploy.runtime.opening",
            "lrt_deploy.runtime.backends.tensorrt",
        ):
            monkeypatch.setattr(f"{place}.find_gpu", lambda: (GPU, "Fake 8000"))
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_library(folder, driver, precision))
        return folder

    return make


def engine_parity(folder, golden, precision):
    return lrt_deploy.parity(
        folder,
        golden.folder,
        backend="tensorrt-rtx",
        precision=precision,
        prompt=PROMPT,
        steps=8,
        prefill="stepwise",
        **({} if precision == "fp32" else {"max_kl": 1.0, "min_agreement": 0.0}),  # this golden is not trained
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-weight-only", "int4-weight-only"])
def test_parity_holds_an_engine_to_the_same_parts(precision, quantized_engine, golden_of):
    report = engine_parity(quantized_engine(precision), golden_of(GOLDEN), precision)
    assert report.passed, report.verdict
    assert (report.backend, report.precision) == ("tensorrt-rtx", precision)
    assert report.weights.passed
    if precision != "fp32":
        assert report.arithmetic.graph.max_abs_logit_error < 1e-4
        assert report.arithmetic.kernels.passed and report.quality.passed


def test_a_faulty_quantized_engine_fails_in_arithmetic(quantized_engine, golden_of, monkeypatch):
    original = FakeEngine.compute

    def compute(self, shapes, addresses):
        original(self, shapes, addresses)
        latent = self.driver.at(addresses["present_latent"], 64).view(np.float16)
        latent[3] += np.float16(1.0)

    monkeypatch.setattr(FakeEngine, "compute", compute)
    report = engine_parity(quantized_engine("int8-weight-only"), golden_of(GOLDEN), "int8-weight-only")
    assert report.weights.passed and report.arithmetic.graph.passed
    assert not report.arithmetic.kernels.passed and not report.passed


def test_a_comparison_without_limits_is_no_failure(bundle, with_gpu, monkeypatch):
    def none(precision):
        raise ParityError(f"there are no limits for {precision}")

    monkeypatch.setattr("lrt_deploy.evaluation.verdict.limits", none)
    found = smoke_test(bundle, "tensorrt-rtx", "fp32", lambda what, done, total: None)
    assert found == {"ran": False, "reason": "there are no limits for fp32"}


def test_an_engine_that_fails_to_run_fails_the_smoke_test(bundle, with_gpu, monkeypatch):
    monkeypatch.setattr(FakeContext, "execute_async_v3", lambda self, stream: self.refuse("an illegal address"))
    found = smoke_test(bundle, "tensorrt-rtx", "fp32", lambda what, done, total: None)
    assert found["ran"] and not found["passed"] and "an illegal address" in found["verdict"]


def test_the_command_line_opens_the_engine_by_name_or_by_auto(bundle, with_gpu):
    for backend in ("tensorrt-rtx", "auto"):
        arguments = ["generate", str(bundle), "--tokens", "5,9,2", "--max-new-tokens", "4", "--backend", backend]
        result = CliRunner().invoke(app, [*arguments, "--ignore-stop-tokens", "--json"])
        assert result.exit_code == 0, result.stderr
        fields = json.loads(result.stdout)
        assert (fields["backend"], fields["precision"], len(fields["tokens"])) == ("tensorrt-rtx", "fp32", 4)
    assert "backend tensorrt-rtx in fp32: the best that is present; not tensorrt: " in result.stderr


# Measuring it: what cannot be counted is left open, and bytes are held against the device's own memory


@pytest.fixture
def little_memory(monkeypatch):
    """Copies in no time; the bandwidth means nothing then."""
    monkeypatch.setattr(measuring, "_SMALLEST_COPY_BYTES", 2**15)


BENCH = ("--prompt-tokens", "8", "--new-tokens", "6", "--repeats", "2", "--prefill-lengths", "16,64")


def bench(bundle, *arguments):
    result = CliRunner().invoke(app, ["bench", str(bundle), "--backend", "tensorrt-rtx", *BENCH, *arguments])
    assert result.exit_code == 0, result.stderr
    return result


def test_bench_measures_decoding(bundle, with_gpu, driver, little_memory, tmp_path):
    fields = json.loads(bench(bundle, "--json", "--plot", str(tmp_path / "a.png")).stdout)
    assert (fields["backend"], fields["plot"]) == ("tensorrt-rtx", str(tmp_path / "a.png"))
    assert fields["state_bytes_copied_per_step"] is None
    for part in ("cannot be seen", "every cache is bound in place", "latent is fetched to the host"):
        assert part in fields["state_bytes_copied_note"]
    assert fields["state_bytes_written_per_step"] == 4 * (4 * 2 * 32 + 64)  # a key and a value per layer, the latent
    assert fields["latent_record_bytes_per_step"] == 4 * 64
    assert fields["logits_bytes_written_per_step"] == 4 * 4 * 320
    assert 0 < fields["outside_backend_fraction"] < 1
    assert (fields["bandwidth_of"], fields["read_bandwidth_gb_s"]) == ("device-to-device copy", None)
    assert driver.copied_within == measuring._ROUNDS * measuring._COPIES * 4 * driver.cache
    read, seconds = (
        fields["weight_bytes_per_step"] + fields["state_bytes_read_per_step"],
        fields["tpot_ms"]["p50"] / 1e3,
    )
    assert fields["roofline_fraction"] == pytest.approx(read / seconds / fields["bandwidth_gb_s"] / 1e9)
    assert fields["weights_fit_cache"] is False  # whatever the processor's cache would hold
    assert fields["environment"]["threads"] is None


def test_bench_reads_prompts_plainly_and_in_blocks_that_fit(bundle, with_gpu, little_memory, tmp_path):
    fields = json.loads(bench(bundle, "--json", "--plot", str(tmp_path / "a.png")).stdout)
    algorithms = ["stepwise", "plain", "one pass with zero memory"]
    assert [(row["tokens"], row["algorithm"]) for row in fields["prefill"]] == [
        (length, algorithm) for length in (16, 64) for algorithm in algorithms
    ]
    for row in fields["prefill"]:
        assert row["policy"] != "fixed-point" or row["max_abs_latent_error"] <= row["residual"]
        assert row["policy"] != "zero" or row["max_abs_latent_error"] > 0.1
    points = fields["convergence"]
    assert {(point["tokens"], point["algorithm"]) for point in points} == {(32, "plain")}  # 64 are no block of it
    assert [point["passes"] for point in points] == list(range(1, len(points) + 1))
    assert points[-1]["max_abs_latent_error"] < 1e-2 * points[0]["max_abs_latent_error"]


def test_bench_shows_people_what_was_measured_and_what_not(bundle, with_gpu, driver, little_memory, tmp_path):
    driver.cache = 2**20  # more than the weights
    result = bench(bundle, "--plot", str(tmp_path / "a.png"))
    assert "(the weights fit the GPU's cache); a prompt of 64 tokens is read " in result.stdout
    for part in ("copies not counted; ", "GB/s (device-to-device copy)", "on the host", "64 stride 1 "):
        assert part in result.stderr
    assert "reading alone" not in result.stderr


def test_the_caches_of_a_gpu_do_not_show_what_a_step_copies(bundle, with_gpu):
    with lrt_deploy.open_decoder(bundle, backend="tensorrt-rtx") as decoder:
        state = decoder.prefill([PROMPT], policy="stepwise")
        assert state.buffers.copies_note
        # What the note is about: the caches are shown as copies, so that nothing can be seen of how a step writes them.
        one, other = (state.buffers.read_slots(0, 0, 1) for _ in range(2))
        assert all(one[name].ctypes.data != other[name].ctypes.data for name in one)


def test_a_failing_step_still_fails_the_bench(bundle, with_gpu, monkeypatch):
    """The twin: nothing but counting is forgiven."""
    monkeypatch.setattr(FakeContext, "execute_async_v3", lambda self, stream: self.refuse("an illegal address"))
    arguments = ["bench", str(bundle), "--backend", "tensorrt-rtx", *BENCH, "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "an illegal address" in result.stderr


def test_a_contender_of_the_comparison_leaves_its_copies_open(bundle, with_gpu, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    contender = importlib.import_module("contenders.our_runtime").OurRuntime(bundle, 1, backend="tensorrt-rtx")
    assert contender.facts["state_bytes_copied_per_step"] is None
    contender.start([[5, 9, 2]], exact=True)
    assert contender.step([7]).shape == (1, 320)


# ONNX Runtime on a GPU: the same code, with memory and kernels on the host


@pytest.fixture
def ort_on_host(bundle, on_host):
    manifest, device = read_manifest(bundle), on_host()
    return Decoder(manifest, OrtCudaBackend(bundle, manifest, "fp32", device, kind="cpu"), None)


@pytest.mark.parametrize("policy", ["stepwise", "fixed-point", "zero"])
def test_ort_by_address_gives_the_tokens_of_ort_cpu(ort_on_host, decoder_of, tolerances, policy):
    plain = PrefillOptions().clamp(ort_on_host._backend.blocks)
    expected = Decoder(ort_on_host.manifest, decoder_of(GOLDEN)._backend, None, plain)
    found, reference = (tokens_of(d, [PROMPT, PROMPT[3:8]], 20, policy) for d in (ort_on_host, expected))
    assert found[0] == reference[0]
    assert np.abs(found[1] - reference[1]).max() <= 2 * tolerances.logits
    assert np.abs(found[2].latent - reference[2].latent).max() <= 2 * tolerances.latent


def test_bench_measures_ort_by_address_too(ort_on_host, little_memory):
    asked = BenchOptions(prompt_tokens=8, new_tokens=6, repeats=1, prefill_lengths="16")
    fields = measure(ort_on_host, random_tokens(64, 320, seed=0), asked, lambda what, done, total: None)
    assert fields["backend"] == "ort-cuda" and fields["state_bytes_copied_per_step"] is None
    assert fields["state_bytes_copied_note"] and fields["state_bytes_written_per_step"] == 4 * (4 * 2 * 32 + 64)
    assert (fields["bandwidth_of"], fields["read_bandwidth_gb_s"]) == ("device-to-device copy", None)
    assert [row["algorithm"] for row in fields["prefill"]] == ["stepwise", "plain", "one pass with zero memory"]
    assert {point["tokens"] for point in fields["convergence"]} == {16}


@pytest.mark.parametrize("failing", ["the run", "the logits"])
def test_a_step_that_fails_leaves_the_latent_where_it_was(open_fake, driver, monkeypatch, failing):
    """A step reads one place and writes the other, so nothing is copied aside: the old latent only becomes current."""
    decoder, _ = open_fake()
    state, healthy = (decoder.prefill([PROMPT, PROMPT[:4]], policy="stepwise") for _ in range(2))
    latent = state.latent
    with monkeypatch.context() as patch:
        if failing == "the run":
            driver.fail("cuGraphLaunch", CUresult.CUDA_ERROR_INVALID_VALUE)
        else:
            patch.setattr(state_module, "check_finite", lambda logits, *rest: check_finite(logits * np.nan, *rest))
        with pytest.raises(BackendError, match=r"launching a CUDA graph: invalid value|not finite"):
            decoder.step(state, [1, 2])
    assert np.array_equal(state.latent, latent) and state.lengths.tolist() == [len(PROMPT), 4]
    assert np.array_equal(decoder.step(state, [1, 2]), decoder.step(healthy, [1, 2]))
    assert np.array_equal(state.latent, healthy.latent) and not np.array_equal(state.latent, latent)


# Embedding tables on the host, handed in as rows


def on_fake_tensorrt(bundle, monkeypatch, cuda_graph):
    driver = FakeDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_library(bundle, driver))
    manifest, device = read_manifest(bundle), CudaDevice()
    engine, tables = (
        open_engine(bundle, manifest, "tensorrt-rtx", "fp32", GPU),
        HostTables.open(bundle, manifest, "fp32"),
    )
    return Decoder(manifest, TensorRTBackend(engine, device, manifest, cuda_graph, tables), None), driver


@pytest.fixture(scope="module")
def host_bundle(host_embeddings_once, tmp_path_factory):
    folder = shutil.copytree(host_embeddings_once(GOLDEN), tmp_path_factory.mktemp("host") / "bundle")
    put_engine(folder)
    return folder


@pytest.mark.parametrize("policy", ["stepwise", "fixed-point"])
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_with_tables_on_the_host_an_engine_gives_the_same_bits(bundle, host_bundle, monkeypatch, policy, cuda_graph):
    found = []
    for folder in (bundle, host_bundle):
        decoder, driver = on_fake_tensorrt(folder, monkeypatch, cuda_graph)
        found.append(tokens_of(decoder, [PROMPT, PROMPT[3:8]], 12, policy))
        assert (driver.launches > 10) == cuda_graph
    assert found[0][0] == found[1][0] and np.array_equal(found[0][1], found[1][1])
    assert np.array_equal(found[0][2].latent, found[1][2].latent)


def test_rows_that_do_not_arrive_would_show(bundle, host_bundle, monkeypatch):
    """The twin: the tables of another order of tokens."""
    expected = tokens_of(on_fake_tensorrt(bundle, monkeypatch, True)[0], [PROMPT], 3)
    take = HostTables.take
    monkeypatch.setattr(HostTables, "take", lambda self, ids, rows: take(self, ids[::-1] ^ 1, rows))
    found = tokens_of(on_fake_tensorrt(host_bundle, monkeypatch, True)[0], [PROMPT], 3)
    assert not np.array_equal(found[1], expected[1])


def test_ort_by_address_takes_rows(bundle, host_bundle, on_host):
    found = []
    for folder in (bundle, host_bundle):
        manifest = read_manifest(folder)
        decoder = Decoder(manifest, OrtCudaBackend(folder, manifest, "fp32", on_host(), kind="cpu"), None)
        found.append(tokens_of(decoder, [PROMPT, PROMPT[3:8]], 12, "fixed-point"))
    assert found[0][0] == found[1][0] and np.array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("elsewhere", [False, True])
def test_ort_updates_its_caches_in_place(bundle, on_host, capfd, monkeypatch, elsewhere):
    """ONNX Runtime warns when TensorScatter has to copy a cache, as it does in the twin."""
    monkeypatch.setattr(ort_cuda, "_LOG_LEVEL", 2)
    manifest, device = read_manifest(bundle), on_host()
    backend = OrtCudaBackend(bundle, manifest, "fp32", device, kind="cpu")
    buffers = backend.allocate(1)
    buffers.decode(np.array([1]), np.array([0]), head=True)
    if elsewhere:
        step, address = backend.steps.decode(1), device.allocate(backend.setup.cache_row_bytes)
        monkeypatch.setattr(step, "_bind", lambda *_: step._context.bind("present_key_1", address))
    buffers.decode(np.array([1]), np.array([1]), head=True)
    assert ("in-place optimization not activated" in capfd.readouterr().err) == elsewhere


def test_ort_runs_half_precision_states(in_every_precision, on_host):
    halves = in_every_precision(GOLDEN)
    manifest, device = read_manifest(halves), on_host()
    decoder = Decoder(manifest, OrtCudaBackend(halves, manifest, "fp16", device, kind="cpu"), None)
    with lrt_deploy.open_decoder(halves, precision="fp16") as expected:
        found, reference = (tokens_of(d, [PROMPT], 12) for d in (decoder, expected))
    assert found[2].buffers.read_slots(0, 0, 2)["past_key_0"].dtype == np.float16
    assert np.abs(found[1] - reference[1]).max() < 0.1
    assert found[0] == reference[0]


def test_a_silent_fallback_to_the_cpu_is_refused(bundle):
    """Here the provider is built in and cannot be loaded: ONNX Runtime would go on without it."""
    graph = bundle / graph_path("fp32", "prefill", "full")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime was built without CUDA")
    if find_gpu()[0] is not None:
        pytest.skip("there is a GPU here")
    with pytest.raises(BackendError, match="could not load CUDAExecutionProvider and would run on CPUExecution"):
        open_session(graph, "cuda", 0)


def test_heavy_operators_on_another_provider_are_named(bundle):
    session = open_session(bundle / graph_path("fp32", "prefill", "full"), "cpu", 0)
    assert misplaced(session, "CPUExecutionProvider") == {}
    found = misplaced(session, "CUDAExecutionProvider")
    assert found["Attention", "CPUExecutionProvider"] == 4 and found["TensorScatter", "CPUExecutionProvider"] == 8


def test_ort_cuda_refuses_what_it_would_not_run_as_asked(bundle, monkeypatch):
    manifest = read_manifest(bundle)
    monkeypatch.setattr(ort_cuda, "find_gpu", lambda: (None, "no GPU: none counted"))
    with pytest.raises(BackendError, match="ort-cuda needs an NVIDIA GPU"):
        lrt_deploy.open_decoder(bundle, backend="ort-cuda")
    with pytest.raises(BackendError, match=r"ort-cuda does not run int8.*take fp32"):
        OrtCudaBackend.open(bundle, manifest, "int8")


def test_a_context_of_ort_wants_everything_bound(ort_on_host):
    context = ort_on_host._backend.setup.runner.context("decode", 0)
    with pytest.raises(BackendError, match="input_ids has no shape or no address"):
        context.enqueue(0)
