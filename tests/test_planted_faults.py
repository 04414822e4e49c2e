"""Every planted fault is found and what is right passes: stored weights, graphs, and the verdict over both.

A sample of `benchmarks/planted_faults.py`, which plants all of them in all precisions; the table is in
docs/debugging-parity.md.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest

import lrt_deploy
from lrt_deploy.bundle.manifest import read_manifest, write_manifest
from lrt_deploy.evaluation import parity
from lrt_deploy.model.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow  # for the export

GOLDEN = "mr_gqa_SSSL"
PRECISIONS = ("fp32", "fp16", "int8", "int8-weight-only", "int4-weight-only")


@pytest.fixture(scope="module")
def planting(root):
    spec = importlib.util.spec_from_file_location("planted_faults", root / "benchmarks" / "planted_faults.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def bundle(in_every_precision):
    return in_every_precision(GOLDEN)


@pytest.fixture(scope="module")
def checkpoint(golden_of):
    return open_checkpoint(golden_of(GOLDEN).folder)


def test_every_fault_is_found_in_every_precision_that_can_have_it(planting, bundle, checkpoint):
    table = planting.rows_of(bundle, checkpoint)
    missed = [(name, precision) for name, row in table.items() for precision in row if row[precision] == "MISSED"]
    assert not missed
    found = {precision: sum(row.get(precision) == "found" for row in table.values()) for precision in PRECISIONS}
    assert min(found.values()) >= 40, found


def test_a_right_bundle_passes_in_every_precision(planting, bundle, golden_of, tmp_path):
    assert planting.right(bundle, read_manifest(bundle), golden_of(GOLDEN).folder, tmp_path) == []


def test_a_compensated_bundle_passes_and_its_faults_are_found(planting, int4_in_blocks):
    bundle = int4_in_blocks(64)
    checkpoint = open_checkpoint(bundle.with_name(f"{bundle.name}.checkpoint"))
    weights = planting.Weights(bundle, checkpoint, "int4-weight-only")
    assert weights.compensated
    found = {fault.name: weights.found(fault) for fault in planting.faults(weights) if fault.change is not None}
    assert len(found) > 20
    assert all(found.values()), [name for name, was in found.items() if was is False]


# The whole verdict, on bytes changed in a bundle whose hashes were made again


def patched(bundle, folder, precision, matrix, change):
    """A copy of the bundle with the stored numbers of a matrix (K, N), 8-bit integers or floats, changed."""
    import onnx_ir as ir

    copy = shutil.copytree(bundle, folder / "patched")
    graph = ir.load(copy / f"graphs/{precision}/prefill.windowed.onnx").graph
    tensor = graph.initializers[matrix].const_value
    path = copy / f"graphs/{precision}/weights.bin"
    stored = np.memmap(path, tensor.dtype.numpy(), "r+", tensor.offset, tuple(tensor.shape.numpy()))
    stored[...] = change(np.array(stored))
    stored.flush()
    write_manifest(copy, read_manifest(copy))
    return copy


@pytest.mark.parametrize(("precision", "matrix"), [("fp32", "wte"), ("fp16", "lm_head"), ("int8", "blocks.2.mlp_out")])
def test_changed_bytes_fail_in_weights_before_anything_runs(
    precision, matrix, bundle, golden_of, tmp_path, monkeypatch
):
    monkeypatch.setattr("lrt_deploy.evaluation.parity.compare_rollouts", lambda *args: pytest.fail("a rollout began"))
    copy = patched(bundle, tmp_path, precision, matrix, lambda stored: np.roll(stored, 1, axis=0))
    report = lrt_deploy.parity(copy, golden_of(GOLDEN).folder, precision=precision, steps=4)
    assert not report.passed and report.checkpoint_matches
    assert report.weights.worst.matrix == matrix and report.weights.failed == (matrix,)
    assert report.verdict.startswith(f"FAIL: weights: {matrix} is not the checkpoint's: ")


def test_another_checkpoint_of_the_same_shape_fails_and_the_same_weights_saved_again_pass(bundle, golden_of, tmp_path):
    from random_models import random_model, write_native

    model = golden_of(GOLDEN).model()
    write_native(model, tmp_path / "again")
    write_native(random_model(model.config, seed=5), tmp_path / "other")
    for precision in ("fp32", "int4-weight-only"):
        options = {"precision": precision, "steps": 6, "prompt": list(range(20)), "min_agreement": None}
        if precision != "fp32":
            options |= {"max_kl": 5.0, "min_agreement": 0.0}  # this golden is not trained
        again = lrt_deploy.parity(bundle, tmp_path / "again", **options)
        assert again.passed, again.verdict
        assert again.checkpoint_matches is False and "checkpoint_matches: no" in again.verdict
        other = lrt_deploy.parity(bundle, tmp_path / "other", **options)
        assert not other.passed and other.points == () and len(other.weights.failed) > 20


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-weight-only", "int4-weight-only"])
def test_the_parts_of_a_right_bundle_pass_and_say_what_they_measured(precision, bundle, golden_of):
    report = lrt_deploy.parity(
        bundle, golden_of(GOLDEN).folder, precision=precision, steps=12, max_kl=5.0, min_agreement=0.0
    )
    assert report.passed, report.verdict
    fields = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert fields["weights"]["passed"] and fields["weights"]["checked"] == 24
    assert fields["arithmetic"]["passed"] and fields["arithmetic"]["max_abs_logit_error"] < 1e-4
    assert 0 < fields["arithmetic"]["kernels"]["max_abs_logit_error"] < 1
    assert fields["quality"]["passed"] and fields["quality"]["mean_kl"] == fields["mean_kl"]
    for part in ("weights: ", "arithmetic: ", "quality: "):
        assert part in report.verdict
    provenance = fields["provenance"]
    assert provenance["checkpoint"]["sha256"] == provenance["bundle"]["checkpoint_sha256"]
    assert provenance["prompt"]["tokens"] == fields["tokens"]
    assert {"python", "torch", "onnxruntime", "lrt-deploy"} <= provenance["versions"].keys()
    assert provenance["machine"]["cores"] and provenance["date"].startswith("20")


def test_bf16_is_judged_by_its_weights_alone_and_says_so(bundle, golden_of):
    report = lrt_deploy.parity(bundle, golden_of(GOLDEN).folder, precision="bf16")
    assert report.passed and report.weights.passed
    assert report.arithmetic is None and report.quality is None and report.points == ()
    assert "nothing was run, because bf16 runs on GPUs only" in report.verdict


def test_limits_of_quality_can_be_set_and_fp32_has_none(bundle, golden_of):
    source = golden_of(GOLDEN).folder
    strict = lrt_deploy.parity(bundle, source, precision="int4-weight-only", steps=6, max_kl=1e-9, min_agreement=0.0)
    assert not strict.passed and strict.arithmetic.passed and not strict.quality.passed
    assert strict.verdict.startswith("FAIL: quality: mean KL is ")
    with pytest.raises(lrt_deploy.InputError, match="fp32 is not judged by quality"):
        lrt_deploy.parity(bundle, source, precision="fp32", max_kl=1.0)
    with pytest.raises(lrt_deploy.InputError, match=r"min_agreement is 1\.5"):
        lrt_deploy.parity(bundle, source, precision="fp16", min_agreement=1.5)


def test_bisect_names_the_part_and_the_op_of_a_quantized_graph(planting, bundle, golden_of, tmp_path):
    import onnx_ir as ir

    copy = shutil.copytree(bundle, tmp_path / "bundle")
    path = copy / "graphs/int4-weight-only/prefill.windowed.onnx"
    model = ir.load(path)
    assert planting._wiring(model)
    ir.save(model, path)
    write_manifest(copy, read_manifest(copy))
    report = lrt_deploy.parity(copy, golden_of(GOLDEN).folder, precision="int4-weight-only", steps=4, bisect=True)
    assert report.weights.passed and not report.arithmetic.passed and not report.passed
    assert report.verdict.startswith("FAIL: arithmetic: the graph is off from PyTorch on the stored weights")
    assert (report.bisect.kind, report.bisect.tensor) == ("stage", "blocks.0.mlp_hidden")


class WithoutMemory:
    """A decoder that reads every token with a latent of zeros."""

    def __init__(self, decoder):
        self._decoder = decoder

    def __getattr__(self, name):
        return getattr(self._decoder, name)

    def step(self, state, tokens):
        state.buffers.set_latent(np.arange(1), np.zeros_like(state.latent))
        return self._decoder.step(state, tokens)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-weight-only", "int4-weight-only"])
def test_a_decoder_that_mishandles_its_state_fails_in_arithmetic_though_its_graph_is_right(
    precision, bundle, golden_of
):
    options = parity.ParityOptions(steps=8, max_kl=15.0, min_agreement=0.0)
    with lrt_deploy.open_decoder(bundle, precision=precision) as decoder:
        report = parity.parity_of(bundle, WithoutMemory(decoder), golden_of(GOLDEN).folder, options)
    assert report.weights.passed and report.arithmetic.graph.passed
    assert not report.arithmetic.kernels.passed and not report.passed
    assert "the decoder is off from PyTorch on the stored weights" in report.verdict
