"""Precisions: what their graphs hold, and how well they decode."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import lrt_deploy
from lrt_deploy import contract
from lrt_deploy.errors import BackendError, ExportError
from lrt_deploy.exporters.lower import lower, narrow
from lrt_deploy.manifest import graph_path, read_manifest
from lrt_deploy.precisions import PRECISIONS, base_dtype

pytestmark = pytest.mark.slow  # for the export

HALVES = ("fp16", "bf16")
TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


@pytest.fixture(scope="session")
def bundle(make_once, root):
    """The demo checkpoint in every precision, traced once."""
    source = root / "demo" / "checkpoint"

    def make(folder):
        lrt_deploy.export_bundle(source, folder, precision=("fp32", *HALVES), max_seq_len=256)

    return make_once("precisions", make)


@pytest.fixture
def load(bundle):
    def graph(precision, flavour="full", phase="prefill"):
        return ir.load(bundle / graph_path(precision, phase, flavour))

    return graph


@pytest.mark.parametrize("flavour", contract.FLAVOURS)
@pytest.mark.parametrize("precision", HALVES)
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


@pytest.mark.parametrize("precision", HALVES)
def test_caches_are_written_and_attended_as_they_are(load, precision):
    """A Cast between a cache and its use would move the whole capacity every step."""
    for node in load(precision).graph:
        if node.op_type == "Cast":
            assert not node.inputs[0].name.startswith(("past_key", "past_value", "present_key", "present_v"))


@pytest.mark.parametrize("precision", HALVES)
def test_half_precision_graphs_pass_the_full_check(bundle, precision):
    for phase in ("prefill", "decode_step"):
        for flavour in contract.FLAVOURS:
            onnx.checker.check_model(str(bundle / graph_path(precision, phase, flavour)), full_check=True)


def test_a_plain_model_is_lowered_too(export_once):
    model = ir.load(export_once("baseline_ve") / graph_path("fp32", "prefill", "full"))
    narrow(model, "float16")
    types = [node.outputs[0].dtype for node in lower(model, "float16").graph if node.op_type == "MatMul"]
    assert set(types) == {ir.DataType.FLOAT16}
    assert {node.outputs[0].dtype for node in model.graph if node.op_type == "MatMul"} == {ir.DataType.FLOAT}


def test_a_matrix_that_is_kept_is_multiplied_in_float32(export_once):
    model = ir.load(export_once("baseline_ve") / graph_path("fp32", "prefill", "full"))
    narrow(model, "float16", keep={"lm_head"})
    lowered = lower(model, "float16", keep={"lm_head"})
    kept = [node for node in lowered.graph if node.op_type == "MatMul" and node.outputs[0].dtype == ir.DataType.FLOAT]
    assert [node.inputs[1].name for node in kept] == ["lm_head"]


def test_a_weight_beyond_float16_is_refused_and_bfloat16_takes_it(export_once):
    model = ir.load(export_once("baseline_ve") / graph_path("fp32", "prefill", "full"))
    large = np.full(model.graph.initializers["lm_head"].shape.numpy(), 1e5, np.float32)
    model.graph.initializers["lm_head"].const_value = ir.tensor(large)
    wide, narrowed = model.clone(), model
    narrow(wide, "bfloat16")
    assert np.isfinite(wide.graph.initializers["lm_head"].const_value.numpy().astype(np.float32)).all()
    narrow(narrowed, "float16")
    with pytest.raises(ExportError, match=r"1e\+05.*float16"):
        narrowed.graph.initializers["lm_head"].const_value.numpy()


def test_the_most_precise_is_taken_where_none_is_asked_for(bundle):
    with lrt_deploy.open_decoder(bundle) as decoder:
        assert decoder.precision == "fp32"
    assert PRECISIONS.index("fp32") < PRECISIONS.index("fp16") < PRECISIONS.index("bf16")


def test_bf16_is_refused_on_a_cpu_with_what_can_run(bundle):
    with pytest.raises(BackendError, match=r"bfloat16.*fp32 or fp16"):
        lrt_deploy.open_decoder(bundle, precision="bf16")


def test_fp16_decodes_with_a_float32_face(bundle):
    with lrt_deploy.open_decoder(bundle, precision="fp16") as decoder:
        state = decoder.prefill([[1, 2, 3], [4, 5]])
        decoder.step(state, [6, 7])
        assert state.latent.dtype == state.logits.dtype == state.cache(0)[0].dtype == np.float32
        assert state.buffers._latents[0].dtype == np.float16
