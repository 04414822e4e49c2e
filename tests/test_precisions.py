"""Precisions: what their graphs hold, and how well they decode."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import lrt_deploy
from lrt_deploy.bundle import contract
from lrt_deploy.bundle.manifest import PHASES, graph_path, read_manifest
from lrt_deploy.bundle.precisions import FORMATS, PRECISIONS, base_dtype
from lrt_deploy.bundle.weights import StoredMatrix, matrix_shapes
from lrt_deploy.errors import BackendError, ExportError, ParityError
from lrt_deploy.evaluation.parity import PROMPT
from lrt_deploy.evaluation.stored_weights import check_weights
from lrt_deploy.evaluation.verdict import compare
from lrt_deploy.exporters.graph import precision_graphs, verify
from lrt_deploy.exporters.graph.precision_graphs import cast_model, cast_weights
from lrt_deploy.exporters.graph.verify import verify_graphs
from lrt_deploy.exporters.quantize import calibrate as calibrate_module
from lrt_deploy.exporters.quantize.calibrate import SHIPPED, Calibration, Histogram, calibrate, calibration_rows
from lrt_deploy.exporters.quantize.gptq import round_by_gptq
from lrt_deploy.exporters.quantize.plan import make_plan
from lrt_deploy.exporters.quantize.qdq import quantized, weight_scales
from lrt_deploy.exporters.quantize.stored import StoredWeights
from lrt_deploy.model.checkpoint import open_checkpoint
from lrt_deploy.model.reference import ReferenceDecoder
from lrt_deploy.runtime.backends import ort_cpu
from lrt_deploy.text.tokenizer import Tokenizer
from lrt_deploy.tolerances import limits, prefill_limits

pytestmark = pytest.mark.slow  # for the export

HALVES = ("fp16", "bf16")
TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


def dequantized(scales, integers, kind):
    return StoredMatrix("matrix", "int", integers, scales, kind.block).dequantized()


def rounded(weight, kind):
    scales = weight_scales(weight, kind)
    return dequantized(scales, quantized(weight, scales, kind), kind)


@pytest.fixture(scope="session")
def bundle(in_every_precision):
    """The demo checkpoint in every precision, traced once."""
    return in_every_precision("demo")


@pytest.fixture
def load(bundle):
    def graph(precision, flavour="full", phase="prefill"):
        return ir.load(bundle / graph_path(precision, phase, flavour))

    return graph


@pytest.mark.parametrize("flavour", contract.FLAVOURS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_inputs_and_outputs_have_the_types_of_the_contract(bundle, load, precision, flavour):
    model, config = load(precision, flavour), read_manifest(bundle).model
    dtype = base_dtype(precision, flavour)
    types = TYPES | {"int64": ir.DataType.INT64}
    for values, specs in (
        (model.graph.inputs, contract.graph_inputs(config, flavour, dtype)),
        (model.graph.outputs, contract.graph_outputs(config, dtype)),
    ):
        assert [(v.name, v.dtype) for v in values] == [(s.name, types[s.dtype]) for s in specs]
    described = json.loads(model.metadata_props["lrt_deploy.contract"])
    assert described == contract.describe(config, flavour, dtype)
    assert described == read_manifest(bundle).contracts[precision][flavour]
    assert described["outputs"][0]["dtype"] == "float32"


@pytest.mark.parametrize("precision", HALVES)
def test_what_is_heavy_is_in_the_base_type_and_the_rest_in_float32(load, precision):
    low = TYPES[base_dtype(precision, "full")]
    for node in load(precision).graph:
        found = node.outputs[0].dtype
        if node.op_type in ("MatMul", "Attention", "TensorScatter"):
            assert found == low, node.name
        if node.op_type in ("RMSNormalization", "Exp", "Tanh", "RotaryEmbedding", "Add", "Reciprocal"):
            assert found in (ir.DataType.FLOAT, ir.DataType.INT64), node.name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_caches_are_written_and_attended_as_they_are(load, precision):
    """A Cast between a cache and its use would move the whole capacity every step."""
    for node in load(precision).graph:
        if node.op_type == "Cast":
            assert not node.inputs[0].name.startswith(("past_key", "past_value", "present_key", "present_v"))


@pytest.mark.parametrize("precision", ("bf16", "int8", "int4-weight-only"))
def test_graphs_pass_the_full_check(bundle, precision):
    for phase in ("prefill", "decode_step"):
        for flavour in contract.FLAVOURS:
            onnx.checker.check_model(str(bundle / graph_path(precision, phase, flavour)), full_check=True)


def test_a_plain_model_is_lowered_too(export_once):
    model = ir.load(export_once("baseline_ve") / graph_path("fp32", "prefill", "full"))
    cast_weights(model, "float16")
    types = [node.outputs[0].dtype for node in cast_model(model, "float16").graph if node.op_type == "MatMul"]
    assert set(types) == {ir.DataType.FLOAT16}
    assert {node.outputs[0].dtype for node in model.graph if node.op_type == "MatMul"} == {ir.DataType.FLOAT}


def test_a_matrix_that_is_kept_is_multiplied_in_float32(export_once):
    model = ir.load(export_once("baseline_ve") / graph_path("fp32", "prefill", "full"))
    cast_weights(model, "float16", keep={"lm_head"})
    lowered = cast_model(model, "float16", keep={"lm_head"})
    kept = [node for node in lowered.graph if node.op_type == "MatMul" and node.outputs[0].dtype == ir.DataType.FLOAT]
    assert [node.inputs[1].name for node in kept] == ["lm_head"]


def test_a_weight_beyond_float16_is_refused_and_bfloat16_takes_it(export_once):
    model = ir.load(export_once("baseline_ve") / graph_path("fp32", "prefill", "full"))
    large = np.full(model.graph.initializers["lm_head"].shape.numpy(), 1e5, np.float32)
    model.graph.initializers["lm_head"].const_value = ir.tensor(large)
    wide, narrowed = model.clone(), model
    cast_weights(wide, "bfloat16")
    assert np.isfinite(wide.graph.initializers["lm_head"].const_value.numpy().astype(np.float32)).all()
    cast_weights(narrowed, "float16")
    with pytest.raises(ExportError, match=r"1e\+05.*float16"):
        narrowed.graph.initializers["lm_head"].const_value.numpy()


def test_the_most_precise_is_taken_where_none_is_asked_for(bundle):
    with lrt_deploy.open_decoder(bundle) as decoder:
        assert decoder.precision == "fp32"
    assert PRECISIONS.index("fp32") < PRECISIONS.index("fp16") < PRECISIONS.index("bf16")


def test_bf16_is_refused_on_a_cpu_with_what_can_run(bundle):
    with pytest.raises(BackendError, match=r"bfloat16.*fp32 or fp16 or int8"):
        lrt_deploy.open_decoder(bundle, precision="bf16")


def test_fp16_decodes_with_a_float32_face(bundle):
    with lrt_deploy.open_decoder(bundle, precision="fp16") as decoder:
        state = decoder.prefill([[1, 2, 3], [4, 5]])
        decoder.step(state, [6, 7])
        assert state.latent.dtype == state.logits.dtype == state.cache(0)[0].dtype == np.float32
        assert state.buffers._latents[0].dtype == np.float16


# Quantized graphs.

QUANTIZED_KINDS = {
    "int8": "int8, {base}",
    "int8-weight-only": "int8 weights, {base}",
    "int4-weight-only": "int4 weights, {base}",
}


@pytest.mark.parametrize("flavour", contract.FLAVOURS)
@pytest.mark.parametrize("precision", QUANTIZED_KINDS)
def test_quantized_graphs_hold_what_the_manifest_says(bundle, load, precision, flavour):
    manifest = read_manifest(bundle)
    details, config, base = manifest.precision_details[precision], manifest.model, base_dtype(precision, flavour)
    kept = [f"blocks.{layer}.gate" for layer in range(config.n_layer)]
    assert details["keep_high"] == kept
    found = verify.count(load(precision, flavour).graph)
    assert found == details["operations"][flavour]
    quantized = len(matrix_shapes(config)) - len(kept)
    assert found["matmul"] == {base: len(kept), QUANTIZED_KINDS[precision].format(base=base): quantized}
    assert found["attention"] == {base: config.n_layer}


def test_a_graph_that_is_not_as_promised_is_refused(bundle, load):
    config = read_manifest(bundle).model
    expected = verify.expected_counts(config, None, "float16", 0, 0)
    verify.check(load("fp16").graph, expected, "this graph")
    with pytest.raises(ExportError, match="27 in float16 as matmul, and has 27 in float32"):
        verify.check(load("fp32").graph, expected, "this graph")
    one_kept = verify.expected_counts(config, FORMATS["int8"], "float16", 6, 0)
    with pytest.raises(ExportError, match="6 in float16, 21 in int8, float16"):
        verify.check(load("int8").graph, one_kept, "this graph")


@pytest.mark.parametrize("precision", QUANTIZED_KINDS)
def test_both_flavours_read_the_same_integers_and_scales(load, precision):
    full, windowed = (load(precision, flavour).graph.initializers for flavour in contract.FLAVOURS)
    shared = {name for name in full if name.endswith(".scale") or name in ("lm_head", "memory_kv", "wte")}
    assert {"lm_head.scale", "blocks.0.qkv.scale"} <= shared
    for name in shared:
        one, other = full[name].const_value, windowed[name].const_value
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()
        if isinstance(one, ir.ExternalTensor):
            assert (one.offset, one.length) == (other.offset, other.length)


def test_scales_are_float16_and_small_ones_clip_nothing():
    weight = np.array([[1e-6, 3.0, 0.0], [-2e-6, -5.0, 0.0]], np.float32)
    kind = FORMATS["int8"]
    scales = weight_scales(weight, kind)
    assert scales.dtype == np.float16 and (scales > 0).all()
    integers = quantized(weight, scales, kind)
    error = np.abs(integers * scales.astype(np.float32) - weight)
    assert (error <= 0.51 * scales.astype(np.float32)).all()
    assert np.abs(integers).max() <= 127


def test_int4_blocks_are_better_than_rounding_to_the_largest():
    weight = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    kind = FORMATS["int4-weight-only"]

    def error(scales):
        steps = np.repeat(scales.astype(np.float32), kind.block, axis=0)
        return np.square(quantized(weight, scales, kind).astype(np.float32) * steps - weight).mean()

    largest = (np.abs(weight.reshape(2, 32, 48)).max(axis=1) / 7).astype(np.float16)
    assert error(weight_scales(weight, kind)) < 0.95 * error(largest)


def test_a_histogram_finds_the_scale_that_costs_least():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(100_000).astype(np.float32)
    values[:3] = 40.0  # outliers
    seen = Histogram()
    for part in np.array_split(values, 7):
        seen.add(part)

    def error(step):
        return np.square(np.clip(np.rint(values / step), -127, 127) * step - values).mean()

    steps = seen.largest * np.geomspace(0.02, 1, 200) / 127
    assert error(seen.scale()) < 1.05 * min(error(step) for step in steps)
    assert seen.largest == 40.0
    assert error(seen.scale()) < 0.9 * error(40.0 / 127)
    assert 0 < seen.clipped(0.02) < 0.02
    with pytest.raises(ValueError, match="not finite"):
        seen.add(np.array([np.nan], np.float32))


@pytest.mark.parametrize("largest", [1e-45, 1e-40, 1e-31, 1.0, 1e30])
def test_a_histogram_counts_values_of_any_scale(largest):
    seen = Histogram()
    seen.add(np.array([0, largest], np.float32))
    assert (seen.counts[0], seen.counts[-1], seen.counts.sum()) == (1, 1, 2)
    assert 0 < seen.scale() <= seen.largest


# Calibration and what is decided from it.


@pytest.fixture(scope="session")
def plain(golden_of):
    """A tiny model and rows of tokens."""
    golden = golden_of("mr_gqa_SSSL")
    return golden.model(), golden.ids.tolist()


def test_calibration_sees_what_the_rollout_computes(plain):
    model, rows = plain
    seen = calibrate(model, rows)
    assert set(seen.inputs) == set(seen.outputs) == set(matrix_shapes(model.config))
    decoder = ReferenceDecoder(model, max_seq_len=len(rows[0]))
    state, latents = decoder.prefill([row[:1] for row in rows]), []
    for t in range(1, len(rows[0])):
        latents.append(np.abs(state.latent).max())
        decoder.step(state, [row[t] for row in rows])
    assert seen.inputs["memory_kv"].largest == pytest.approx(max(latents))
    assert seen.values == pytest.approx(max(float(v.abs().max()) for v in state.values))
    # One step from an empty state sees no latent at all.
    alone = calibrate(model, [[token] for row in rows for token in row])
    assert alone.inputs["memory_kv"].largest == 0.0


def test_moments_add_up_the_products_of_all_inputs(plain, monkeypatch):
    model, rows = plain
    seen = calibrate(model, rows, moments=True).moments
    monkeypatch.setattr(calibrate_module, "_MOMENT_ROWS", 1)
    one_by_one = calibrate(model, rows, moments=True).moments
    assert seen.keys() == one_by_one.keys() == matrix_shapes(model.config).keys()
    state = ReferenceDecoder(model, max_seq_len=len(rows[0])).prefill([row[:1] for row in rows])
    latents = [np.zeros_like(state.latent)]
    decoder = ReferenceDecoder(model, max_seq_len=len(rows[0]))
    for t in range(1, len(rows[0])):
        latents.append(state.latent.copy())
        decoder.step(state, [row[t] for row in rows])
    inputs = np.concatenate(latents).astype(np.float64)
    assert np.allclose(seen["memory_kv"], inputs.T @ inputs, rtol=1e-5, atol=1e-4)
    for name, moment in seen.items():
        assert np.allclose(moment, one_by_one[name], rtol=1e-4, atol=1e-4 * np.abs(moment).max())


def test_what_float16_cannot_hold_is_multiplied_in_float32_or_refused(plain):
    model, rows = plain
    seen, matrices = calibrate(model, rows), matrix_shapes(model.config)
    assert make_plan("fp16", matrices, None, seen).float32 == ()
    seen.inputs["blocks.1.mlp_out"].largest = 20_000.0
    plan = make_plan("fp16", matrices, None, seen)
    assert plan.float32 == ("blocks.1.mlp_out",)
    assert plan.details["multiplied_in_float32"] == ["blocks.1.mlp_out"]
    assert "blocks.1.mlp_out" in make_plan("int8", matrices, None, seen).keep
    assert make_plan("bf16", matrices, None, seen).float32 == ()
    seen.values = 20_000.0
    with pytest.raises(ExportError, match=r"fp16 needs value caches in float16.*2e\+04"):
        make_plan("fp16", matrices, None, seen)
    assert make_plan("bf16", matrices, None, seen).float32 == ()


def test_matrices_are_kept_by_name_and_an_unknown_name_is_refused(plain):
    matrices = matrix_shapes(plain[0].config)
    for pattern, count in (("gate", 4), ("blocks.3.mlp_in", 1), ("blocks.0", 5), ("*qkv", 4), ("lm_head", 1)):
        assert len(make_plan("int8-weight-only", matrices, [pattern], None).keep) == count
    assert make_plan("int8-weight-only", matrices, [], None).keep == ()
    with pytest.raises(ExportError, match=r"'head'.*lm_head"):
        make_plan("int8-weight-only", matrices, ["head"], None)


def test_a_matrix_that_does_not_divide_into_blocks_is_quantized_all_the_same(plain):
    matrices = {"lm_head": (48, 10), "blocks.0.qkv": (64, 10)}
    plan = make_plan("int4-weight-only", matrices, [], None)
    assert plan.keep == () and plan.kind == FORMATS["int4-weight-only"]
    wider = make_plan("int4-weight-only", matrices, [], None, int4_block=128)
    assert wider.kind == dataclasses.replace(plan.kind, block=128)
    assert (wider.details["block"], wider.details["keep_high"]) == (128, [])
    assert make_plan("int8-weight-only", matrices, [], None, int4_block=128).kind == FORMATS["int8-weight-only"]


@pytest.mark.parametrize(
    ("rows", "moments", "block"),
    [
        ((256, 1024), True, 128),
        ((192, 768), True, 64),
        ((160, 640), True, 32),
        ((80,), True, 32),
        ((64,), True, 32),
        ((256,), False, 32),
    ],
)
def test_int4_takes_the_longest_blocks_that_divide_all_rows_where_gptq_rounds(rows, moments, block):
    matrices = {f"blocks.{i}.mlp_out": (count, 8) for i, count in enumerate(rows)} | {"blocks.0.gate": (12, 8)}
    seen = Calibration(1, 1, {name: Histogram() for name in matrices}, dict.fromkeys(matrices, 1.0))
    if moments:
        seen.moments.update({name: np.eye(count, dtype=np.float32) for name, (count, _) in matrices.items()})
    plan = make_plan(INT4, matrices, None, seen)
    assert (plan.kind.block, plan.details["compensated"]) == (block, moments)
    assert make_plan(INT4, matrices, None, seen, int4_block=64).kind.block == 64


@pytest.mark.parametrize("precision", ["int8-weight-only", "int4-weight-only"])
def test_a_quantized_precision_that_would_quantize_nothing_is_refused(plain, precision):
    matrices = matrix_shapes(plain[0].config)
    with pytest.raises(ExportError, match=f"in {precision} no matrix would be quantized: keep_high names 22 of 22"):
        make_plan(precision, matrices, ["*"], None)
    assert len(make_plan(precision, matrices, ["blocks", "lm_head"], None).keep) == 21


@pytest.mark.parametrize("rows", [1, 14, 31, 32, 33, 80])
def test_rounding_in_blocks_is_that_of_the_matrix_filled_with_zeros(rows):
    kind = FORMATS["int4-weight-only"]
    weight = np.random.default_rng(rows).standard_normal((rows, 10)).astype(np.float32)
    filled = np.pad(weight, ((0, kind.missing_rows(rows)), (0, 0)))
    assert len(filled) % kind.block == 0
    assert np.array_equal(rounded(weight, kind), rounded(filled, kind)[:rows])
    assert not rounded(filled, kind)[rows:].any()
    scales, integers = round_by_gptq(weight, np.eye(rows), kind)
    assert np.array_equal(dequantized(scales, integers, kind), rounded(weight, kind))


def test_calibration_is_recorded_with_its_text(bundle):
    details = read_manifest(bundle).precision_details
    assert details["calibration"]["text"] == SHIPPED
    assert len(details["calibration"]["sha256"]) == 64
    assert set(details["int8"]["activation_scales"]) == set(matrix_shapes(read_manifest(bundle).model)) - set(
        details["int8"]["keep_high"]
    )
    assert 50 < details["fp16"]["ranges"]["squared_relu"] < 1000


def test_rows_without_a_tokenizer_are_made_up_and_say_so(tmp_path):
    rows = calibration_rows(None, None, 100, 32)
    assert len(rows.tokens) == 16 and {len(row) for row in rows.tokens} == {32}
    assert "made up" in rows.source and rows.sha256 is None
    with pytest.raises(ExportError, match="no tokenizer"):
        calibration_rows(tmp_path / "text", None, 100, 32)


def test_a_calibration_text_that_cannot_be_used_is_refused(bundle, tmp_path):
    tokenizer = Tokenizer.open(bundle / "tokenizer")
    with pytest.raises(ExportError, match="cannot be opened"):
        calibration_rows(tmp_path / "absent", tokenizer, 100, 32)
    (tmp_path / "empty").write_text("")
    with pytest.raises(ExportError, match="0 tokens"):
        calibration_rows(tmp_path / "empty", tokenizer, 100, 32)
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    with pytest.raises(ExportError, match="UTF-8"):
        calibration_rows(tmp_path / "latin", tokenizer, 100, 32)
    (tmp_path / "short").write_text("A short text.")
    rows = calibration_rows(tmp_path / "short", tokenizer, 100, 32)
    assert len(rows.tokens) >= 1 and rows.source == "short"


# How well they decode.

RUNNABLE = tuple(precision for precision in PRECISIONS if base_dtype(precision, "windowed") != "bfloat16")


@pytest.fixture(scope="session")
def demo(root):
    """The demo checkpoint's model and a text."""
    return open_checkpoint(root / "demo" / "checkpoint").model(256), PROMPT


def judged(bundle, model, prompt, precision):
    with lrt_deploy.open_decoder(bundle, precision=precision) as decoder:
        ids = decoder.tokenizer.encode_prompt(prompt)[:90]
        reference = ReferenceDecoder(model, max_seq_len=256)
        about = {"precision": precision, "checkpoint_matches": None, "backend": decoder.backend}
        return compare(reference, decoder, ids, 60, prefill="fixed-point", **about)


@pytest.mark.parametrize("precision", RUNNABLE)
def test_a_precision_decodes_within_its_limits_and_another_model_does_not(bundle, demo, precision):
    model, prompt = demo
    report = judged(bundle, model, prompt, precision)
    assert report.passed, report.verdict
    assert report.prefill.policy == "fixed-point", report.prefill.note
    wrong = copy.deepcopy(model)
    wrong.memory_kv.data = torch.zeros_like(wrong.memory_kv)  # the memory forgotten
    assert not judged(bundle, wrong, prompt, precision).passed


def test_precisions_are_ordered_by_their_limits():
    found = [limits(precision) for precision in PRECISIONS]
    assert found[0].mean_kl < found[1].mean_kl < found[2].mean_kl
    assert limits("int8-weight-only").mean_kl < limits("int8").mean_kl
    with pytest.raises(ParityError, match="fp64"):
        limits("fp64")
    for precision in PRECISIONS:
        bounds = prefill_limits(precision)
        assert 2 * bounds.noise <= bounds.smallest * 1.05 and bounds.smallest <= bounds.default


def test_a_tolerance_below_what_a_precision_can_estimate_is_read_stepwise(bundle):
    with lrt_deploy.open_decoder(bundle, precision="int8") as decoder:
        state = decoder.prefill([list(range(1, 90))], policy="fixed-point", tolerance=0.01)
        assert state.prefill.policy == "stepwise"
        assert "int8 estimates no error below 1e+00" in state.prefill.note


@pytest.mark.parametrize(
    ("precision", "kernel"),
    [("int8", "MatMulIntegerToFloat"), ("int8-weight-only", "MatMulNBits"), ("int4-weight-only", "MatMulNBits")],
)
def test_onnx_runtime_runs_the_fused_kernels(bundle, tmp_path, precision, kernel):
    """What is not fused multiplies in float32 behind a DequantizeLinear: right numbers, and slower than fp32."""
    assert fused(bundle, tmp_path, precision, kernel)


def fused(bundle, tmp_path, precision, kernel):
    """The nodes of that kernel, one for each quantized matrix; nothing is dequantized outside of them."""
    manifest, options = read_manifest(bundle), ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    path = bundle / graph_path(precision, "prefill", "windowed")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    kept = manifest.precision_details[precision]["keep_high"]
    found = [node for node in nodes if node.op_type == kernel]
    assert len(found) == len(matrix_shapes(manifest.model)) - len(kept)
    assert not any(node.op_type == "DequantizeLinear" for node in nodes)
    return found


# Int4 in blocks of other sizes.

INT4 = "int4-weight-only"
FLOAT_PRODUCTS = "session.qdq_matmulnbits_accuracy_level"  # at level 1
WIDER = pytest.mark.parametrize("block", [64, 128])
# (block, width of the model): the last block of some matrices or all is not full; the last is kept inside the graphs.
NOT_FULL = pytest.mark.parametrize(("block", "width"), [(64, 80), (128, 16)])


def stored_weights(graph, kind):
    """Parameter name -> what the graph multiplies by or gathers from, float32."""
    values = {name: value.const_value.numpy() for name, value in graph.initializers.items()}
    return {
        name: dequantized(values[f"{name}.scale"], value, kind)
        if f"{name}.scale" in values
        else value.astype(np.float32)
        for name, value in values.items()
    }


def test_by_default_gptq_rounds_where_there_is_a_tokenizer(golden_of, tmp_path):
    golden = golden_of("padded_vocab")
    for tokenizer, compensated in ((None, True), ("none", False)):
        bundle = tmp_path / str(compensated)
        lrt_deploy.export_bundle(golden.folder, bundle, precision=INT4, tokenizer=tokenizer, max_seq_len=32)
        details = read_manifest(bundle).precision_details[INT4]
        assert (details["compensated"], details["block"]) == (compensated, 32)
        stored, tensors = StoredWeights(bundle, read_manifest(bundle), INT4), open_checkpoint(golden.folder).tensors
        assert check_weights(stored, tensors, read_manifest(bundle).model, INT4, compensated).passed
        assert check_weights(stored, tensors, read_manifest(bundle).model, INT4, False).passed != compensated


@WIDER
def test_all_graphs_and_the_manifest_have_the_block_that_was_asked_for(int4_in_blocks, block):
    bundle = int4_in_blocks(block)
    manifest = read_manifest(bundle)
    details, shapes = manifest.precision_details[INT4], matrix_shapes(manifest.model)
    kept = [f"blocks.{layer}.gate" for layer in range(manifest.model.n_layer)]
    assert (details["block"], details["keep_high"], details["compensated"]) == (block, kept, block == 64)
    for flavour in contract.FLAVOURS:
        for phase in PHASES:
            graph = ir.load(bundle / graph_path(INT4, phase, flavour)).graph
            found = [node for node in graph if node.op_type == "DequantizeLinear"]
            assert {node.inputs[0].name for node in found} == shapes.keys() - set(kept)
            assert {node.attributes["block_size"].as_int() for node in found} == {block}
            for node in found:
                rows, columns = shapes[node.inputs[0].name]
                assert graph.initializers[f"{node.inputs[0].name}.scale"].shape == (rows // block, columns)


@WIDER
def test_blocks_of_other_sizes_are_fused_too(int4_in_blocks, tmp_path, block):
    nodes = fused(int4_in_blocks(block), tmp_path, INT4, "MatMulNBits")
    sizes = {attribute.i for node in nodes for attribute in node.attribute if attribute.name == "block_size"}
    assert sizes == {block}


@NOT_FULL
def test_matrices_of_any_size_are_stored_and_run_in_int4(int4_in_blocks, tmp_path, block, width):
    bundle = int4_in_blocks(block, width)
    manifest = read_manifest(bundle)
    kept = {f"blocks.{layer}.gate" for layer in range(manifest.model.n_layer)}
    assert set(manifest.precision_details[INT4]["keep_high"]) == kept
    for flavour in contract.FLAVOURS:
        graph = ir.load(bundle / graph_path(INT4, "prefill", flavour)).graph
        found = [node.inputs[0] for node in graph if node.op_type == "DequantizeLinear"]
        rows = {value.name: value.shape[0] for value in found}
        real = {name: rows for name, (rows, _) in matrix_shapes(manifest.model).items() if name not in kept}
        whole = {name: -(-rows // block) * block for name, rows in real.items()}
        assert rows == (real if flavour == "windowed" else whole) and real != whole
        assert any(node.op_type == "Pad" for node in graph) == (flavour == "full")
        assert all(not value.const_value.numpy()[real[value.name] :].any() for value in found)
    assert len(fused(bundle, tmp_path, INT4, "MatMulNBits")) == len(real)


@NOT_FULL
def test_both_flavours_compute_the_same_where_the_last_block_is_not_full(int4_in_blocks, block, width):
    bundle = int4_in_blocks(block, width)
    config = read_manifest(bundle).model
    found = []
    for flavour, dtype in (("windowed", np.float32), ("full", np.float16)):
        feed = {"input_ids": np.arange(8)[None], "position_ids": np.arange(8)[None], "write_index": np.zeros(1, int)}
        feed |= {"last_index": np.array([[7]]), "past_latent": np.zeros((1, 8, width), dtype)}
        feed |= {
            pair.past: np.zeros((1, config.n_kv_head, 64, config.head_dim), dtype)
            for pair in contract.state_pairs(config)
            if pair.in_place
        }
        if flavour == "windowed":
            feed |= {contract.window_start(w): np.zeros(1, int) for w in contract.distinct_windows(config)}
            feed |= {"window_end": np.array([8]), "slot_positions": np.arange(64)}
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(bundle / graph_path(INT4, "prefill", flavour), options)
        found.append(session.run(["logits"], feed)[0])
    assert np.abs(found[0]).max() > 1 and np.abs(found[0] - found[1]).max() < 2e-2  # float16 against float32


@pytest.mark.parametrize(("block", "width"), [(64, 128), (128, 128), (64, 80)])
def test_logits_are_those_of_the_weights_in_blocks(int4_in_blocks, monkeypatch, tolerances, block, width):
    """Against the reference with the integers times their scales, activations left in float32."""
    bundle = int4_in_blocks(block, width)
    model = open_checkpoint(bundle.with_name(f"{bundle.name}.checkpoint")).model(64)
    kind = dataclasses.replace(FORMATS[INT4], block=block)
    weights = stored_weights(ir.load(bundle / graph_path(INT4, "prefill", "windowed")).graph, kind)
    nearest = np.array_equal(
        weights["blocks.1.mlp_out"], rounded(model.get_parameter("blocks.1.mlp_out").numpy(), kind)
    )
    assert nearest == (block == 128)  # the other is compensated
    plain = ReferenceDecoder(copy.deepcopy(model), 64)
    assert weights.keys() >= {*matrix_shapes(model.config), "wte", "value_embeds"}
    for name, parameter in model.named_parameters():
        parameter.data = torch.from_numpy(weights.get(name, parameter.numpy()))
    monkeypatch.setattr(ort_cpu, "quantized_entries", lambda precision: {FLOAT_PRODUCTS: "1"})
    with lrt_deploy.open_decoder(bundle) as decoder:
        tokens = list(range(3, 120, 4))
        ours = decoder.prefill([tokens], policy="stepwise").logits
    expected = ReferenceDecoder(model, 64).prefill([tokens]).next_logits.numpy()
    assert np.abs(ours - expected).max() < tolerances.logits
    assert np.abs(ours - plain.prefill([tokens]).next_logits.numpy()).max() > 100 * tolerances.logits


def test_blocks_of_32_are_the_default_to_the_byte(int4_in_blocks):
    default, asked = (read_manifest(int4_in_blocks(block)) for block in (None, 32))
    assert default == asked and default.precision_details[INT4]["block"] == 32
    assert default.files != read_manifest(int4_in_blocks(128)).files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"int4_block": 48, "precision": INT4}, "int4_block is 48, expected one of 32, 64, 128"),
        ({"int4_block": 0, "precision": INT4}, "int4_block is 0"),
        ({"int4_block": 64}, "int4_block is 64, and fp32 has no int4 weights; add --precision int4-weight-only"),
        ({"int4_block": 32, "precision": ("fp16", "int8")}, "and fp16, int8 has no int4 weights"),
    ],
)
def test_a_block_that_cannot_be_is_refused_before_anything_is_written(root, tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        lrt_deploy.export_bundle(root / "demo" / "checkpoint", tmp_path / "bundle", **options)
    assert list(tmp_path.iterdir()) == []


# Layers that are equal, and graphs that cannot be opened.


@pytest.fixture(scope="session")
def equal_layers(export_model):
    """A bundle of a fresh model, whose gates and output projections are zeros in all layers; checkpoint beside it."""
    from random_models import random_model

    from lrt_deploy.config import LRTConfig

    def fresh():
        model = random_model(LRTConfig(sequence_len=32, vocab_size=64, n_layer=3, n_head=2, n_kv_head=1, n_embd=16), 1)
        for name, parameter in model.named_parameters():
            if name.endswith(("gate", "attention_out")):
                parameter.data.zero_()
        return model

    return export_model("equal-layers", fresh, precision=PRECISIONS)


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "bf16"])
def test_layers_with_equal_matrices_export_and_run_in_every_precision(equal_layers, precision):
    model = open_checkpoint(equal_layers.with_name(f"{equal_layers.name}.checkpoint")).model(32)
    expected = ReferenceDecoder(model, 32).prefill([[3, 1, 4, 1, 5]]).next_logits.numpy()
    with lrt_deploy.open_decoder(equal_layers, precision=precision) as decoder:
        logits = decoder.prefill([[3, 1, 4, 1, 5]], policy="stepwise").logits
    assert np.abs(logits - expected).max() < {"fp32": 1e-5, "fp16": 1e-2, "int4-weight-only": 1.0}.get(precision, 0.3)


def test_every_layer_keeps_a_matrix_of_its_own(equal_layers):
    matrices = matrix_shapes(read_manifest(equal_layers).model)
    for precision in PRECISIONS:
        graph = ir.load(equal_layers / graph_path(precision, "prefill", "full")).graph
        assert [name for name in matrices if name in graph.initializers] == list(matrices)


def test_a_graph_that_cannot_be_opened_fails_the_export(equal_layers, tmp_path, monkeypatch):
    def mixed(model, dtype, keep=()):
        """Types that do not agree: half of what `cast_model` does."""
        model = model.clone()
        for value in model.graph.inputs:
            if value.name.startswith("past_key"):
                value.type = ir.TensorType(ir.DataType.FLOAT16)
        return model

    monkeypatch.setattr(precision_graphs, "cast_model", mixed)
    checkpoint = equal_layers.with_name(f"{equal_layers.name}.checkpoint")
    with pytest.raises(ExportError, match="the full prefill graph in fp32 cannot be opened, so nothing was written: "):
        lrt_deploy.export_bundle(checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_graphs_in_bfloat16_are_checked_without_kernels_for_it(equal_layers, tmp_path):
    shutil.copytree(equal_layers / "graphs" / "bf16", tmp_path / "graphs" / "bf16")
    verify_graphs(tmp_path, "bf16")
    path = tmp_path / graph_path("bf16", "decode_step", "windowed")
    model = onnx.load(path, load_external_data=False)
    next(v for v in model.graph.input if v.name == "past_key_1").type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="the windowed decode_step graph in bf16 cannot be opened"):
        verify_graphs(tmp_path, "bf16")
