"""Plans of TensorRT-RTX are built here and read as the build lists them: kernels, attentions, copies and weights.

A plan that decodes slowly for no reason is refused. The graphs that TensorRT gets are held against the bundle's own on
ONNX Runtime, to the bit.
"""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import lrt_deploy
from lrt_deploy.bundle.engine_sidecar import PLAN, engine_folder, read_sidecar
from lrt_deploy.bundle.manifest import graph_path, read_manifest
from lrt_deploy.bundle.precisions import PRECISIONS, base_dtype
from lrt_deploy.cli.build import engine_rows
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import EngineError
from lrt_deploy.exporters.engine import build as build_module
from lrt_deploy.exporters.engine.tensorrt import tensorrt_copy
from lrt_deploy.exporters.engine.verify import ExpectedNetwork, Product, find_slow_decoding, parse_layers, summarize

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheels for this platform")

# A layer of a model with 20 of them and 1.3 billion parameters, two of them; all else is small.
D20 = LRTConfig(
    sequence_len=1024, vocab_size=4096, n_layer=2, n_head=10, n_kv_head=10, n_embd=1280, window_pattern="SL"
)


@pytest.fixture(scope="module")
def d20(export_model):
    def make():
        import torch
        from random_models import random_model

        return random_model(D20, table_dtype=torch.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrt_deploy.exporters.quantize.calibrate.ROW_TOKENS", 16)  # ranges matter to numbers only
        return export_model("d20-shaped", make, precision=("fp16", "int8"))


# The graph that TensorRT gets


def run(graph, model, feed):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def feed_for(model, config, capacity, dtype, tokens=3):
    """Random inputs for two rows of some tokens, in caches that hold five."""
    dice = np.random.default_rng(0)
    start, shape = np.array([5, 2]), (2, config.n_kv_head, capacity, config.head_dim)
    feed = {
        "input_ids": dice.integers(0, config.vocab_size, (2, tokens)),
        "position_ids": start[:, None] + np.arange(tokens),
        "write_index": start,
        "last_index": np.full((2, 1), tokens - 1),
        "past_latent": dice.normal(size=(2, tokens, config.n_embd)).astype(dtype),
    }
    caches = [value.name for value in model.graph.input if value.name.startswith(("past_key", "past_value"))]
    feed |= {name: dice.normal(size=shape).astype(dtype) for name in caches}
    return {value.name: feed[value.name] for value in model.graph.input}


def both_graphs(folder, precision, capacity=128):
    """The bundle's own graph and TensorRT's copy without what ONNX Runtime does not know."""
    graph = folder / graph_path(precision, "prefill", "full")
    copy = onnx.ModelProto.FromString(tensorrt_copy(graph, capacity))
    for node in copy.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "TRT_decomposable"]
        del node.attribute[:]
        node.attribute.extend(kept)
    return graph, onnx.load(graph, load_external_data=False), copy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "dtype"),
    [
        ("mr_gqa_SSSL", "fp32", np.float32),
        ("mr_gqa_SSSL", "fp16", np.float16),
        ("mr_gqa_SSSL", "int8", np.float16),
        ("baseline_ve", "fp32", np.float32),
    ],
)
def test_queries_and_keys_as_one_tensor_give_the_same_bits(in_every_precision, export_once, name, precision, dtype):
    folder = export_once(name) if precision == "fp32" else in_every_precision(name)
    config, (graph, own, copy) = read_manifest(folder).model, both_graphs(folder, precision)
    rotations = [sum(node.op_type == "RotaryEmbedding" for node in model.graph.node) for model in (own, copy)]
    assert rotations == [2 * config.n_layer, config.n_layer]
    feed = feed_for(own, config, 128, dtype)
    for one, other in zip(run(graph, own, feed), run(graph, copy, feed), strict=True):
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()


@pytest.mark.slow
def test_a_key_that_is_rotated_otherwise_is_left_alone(export_once, tmp_path):
    """The twin: joined, it would be rotated as the queries are."""
    folder = shutil.copytree(export_once("mr_gqa_SSSL"), tmp_path / "bundle")
    graph = folder / graph_path("fp32", "prefill", "full")
    model = onnx.load(graph, load_external_data=False)
    first = next(node for node in model.graph.node if node.op_type == "RotaryEmbedding")
    first.input[1], first.input[2] = first.input[2], first.input[1]
    onnx.save(model, graph)
    _, own, copy = both_graphs(folder, "fp32")
    config = read_manifest(folder).model
    assert sum(node.op_type == "RotaryEmbedding" for node in copy.graph.node) == config.n_layer + 1
    feed = feed_for(own, config, 128, np.float32)
    assert run(graph, own, feed)[0].tobytes() == run(graph, copy, feed)[0].tobytes()


# What the builds list


def check_plan(sidecar, config):
    """Expect the fused layers of a precision, as TensorRT-RTX 1.7.1 builds them."""
    count, kernels, precision = config.n_layer, sidecar.layers["kernels"], sidecar.precision
    decode, prefill = kernels["decode"], kernels["prefill"]
    # Three kernels of a layer in int8 only round activations; in the others products and sums are fused less.
    most = {"fp16": 9, "bf16": 9, "int8": 12, "int8-weight-only": 11, "int4-weight-only": 12}[precision]
    assert decode["kernels_per_layer"] <= most and decode["kernels"] <= most * count + 9
    assert (decode["attentions"], decode["attentions_on_caches"], decode["faults"]) == (count, count, [])
    quantized = 4 * count + 2 if precision.startswith("int") else 0  # qkv, output, two of the MLP; memory and head
    assert decode["weights_in_products"] == quantized
    # In a block of a prompt every cache is copied once, and qkv is multiplied together with the gate, in its type.
    assert prefill["attentions"] == count and prefill["kernels_per_layer"] <= (12 if most == 9 else 14)
    copies = [fault.rpartition(" ")[2] for fault in prefill["faults"] if " copies " in fault]
    assert sorted(copies) == sorted(f"present_{kind}_{i}" for kind in ("key", "value") for i in range(count))
    written = sum(" writes " in fault for fault in prefill["faults"])
    assert prefill["weights_in_products"] == quantized - written
    assert written == 0 or precision == "int8-weight-only"
    assert f"{decode['kernels']} for decode; {prefill['kernels']} for prefill (" in engine_rows(sidecar)["kernels"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", [precision for precision in PRECISIONS if precision != "fp32"])
@pytest.mark.parametrize("name", ["demo", "mr_gqa_SSSL"])
def test_every_precision_is_built_as_expected(in_every_precision, tmp_path, name, precision):
    """The demo checkpoint (windows, heads without groups) and a golden with grouped heads, without a GPU."""
    folder = tmp_path / "bundle"
    shutil.copytree(in_every_precision(name), folder)
    sidecar = lrt_deploy.build_engine(folder, backend="tensorrt-rtx", precision=precision)
    manifest, plan = read_manifest(folder), engine_folder(folder, "tensorrt-rtx", precision) / PLAN
    layers, count, base = sidecar.layers, manifest.model.n_layer, base_dtype(precision, "full")
    assert read_sidecar(plan) == sidecar and plan.stat().st_size == sidecar.plan_bytes
    assert (layers["kv_cache_update"], layers["attention"], layers["attention_masks"]) == (2 * count, count, 2)
    assert [profile.name for profile in sidecar.profiles] == ["decode", "prefill"]
    total = 6 + 5 * (count - 1) + 1  # qkv, gate, output and two of the MLP in each layer; memory and head once
    weights = {
        "int8": "float16 with int8 weights and int8 activations",
        "int8-weight-only": "float16 with int8 weights",
        "int4-weight-only": "float16 with int4 weights",
    }
    kept = count if precision in weights else 0  # the gates
    expected = {base: kept, weights[precision]: total - kept} if precision in weights else {base: total}
    assert layers["matmul"] == expected
    assert layers["quantized_matmul"] == (total - kept if precision in weights else 0)
    assert set(layers["norms"]) == {"float32"}
    assert {spec["dtype"] for spec in sidecar.inputs if spec["name"].startswith("past_")} == {base}
    assert sidecar.outputs[0]["dtype"] == "float32"
    assert layers["attention_decomposable"] is False
    assert len(sidecar.build["fused_layers"]) > sum(found["kernels"] for found in layers["kernels"].values())
    check_plan(sidecar, manifest.model)
    if precision == "int8-weight-only":
        faults = layers["kernels"]["prefill"]["faults"]
        written = [fault.partition(" writes ")[2] for fault in faults if " writes " in fault]
        assert {f"blocks.{i}.qkv into memory" for i in range(count)} <= set(written)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_plan_of_20_layers_shape_has_the_fused_layers_that_are_expected(d20, tmp_path, precision):
    folder = shutil.copytree(d20, tmp_path / "bundle")
    check_plan(lrt_deploy.build_engine(folder, backend="tensorrt-rtx", precision=precision), D20)


@pytest.mark.slow
def test_a_plan_that_copies_its_keys_to_decode_is_refused(in_every_precision, tmp_path, monkeypatch):
    """Of a network that is right otherwise: attention reads keys that were multiplied by a half."""

    def scaled(graph, capacity, decompose=False):
        model = onnx.ModelProto.FromString(tensorrt_copy(graph, capacity, decompose))
        half = onnx.numpy_helper.from_array(np.array(0.5, np.float16), "half")
        model.graph.initializer.append(half)
        attention = next(node for node in model.graph.node if node.op_type == "Attention")
        multiply = onnx.helper.make_node("Mul", [attention.input[1], "half"], ["scaled_keys"])
        attention.input[1] = "scaled_keys"
        model.graph.node.insert(list(model.graph.node).index(attention), multiply)
        return model.SerializeToString()

    folder = shutil.copytree(in_every_precision("mr_gqa_SSSL"), tmp_path / "bundle")
    monkeypatch.setattr(build_module, "tensorrt_copy", scaled)
    with pytest.raises(EngineError, match=r"would decode slowly, so it was not kept.*copies present_key_0.*build ano"):
        lrt_deploy.build_engine(folder, backend="tensorrt-rtx", precision="fp16")
    assert not engine_folder(folder, "tensorrt-rtx", "fp16").exists()


# The list by itself

LISTED = """Layers:
Name: __mye1_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, \
Metadata:
Name: _gemv_mha_v1_myl0_9, LayerType: kgen, Inputs: [ {KEYS}, {VALUES}, { Name: q, Dimensions: [-1,4,1,16], \
Datatype: Half, Format: x }, { Name: mask, Dimensions: [-1,1,1,128], Datatype: Bool, Format: x }], Constants: [], \
Outputs: [ { Name: OUT, Dimensions: [DIMS], Datatype: Half, Format: x }], TacticName: y, StreamId: 0, Metadata:
Name: blocks.0.heads [profile 1]+gate [profile 1]_myl0_10, LayerType: gemm, Inputs: [], Constants: [ { Name: w, \
Dimensions: [1,256,512], Datatype: HELD, Format: x }], Outputs: [ { Name: n, Dimensions: [-1,512], Datatype: Half, \
Format: x }], TacticName: y, StreamId: 0, Metadata: [ONNX Layer: blocks.0.heads] [ONNX Layer: blocks.0.qkv.dequantized]
Bindings:
"""
EXPECTED = ExpectedNetwork(
    "int8",
    LRTConfig(sequence_len=128, vocab_size=64, n_layer=1, n_head=4, n_kv_head=2, n_embd=256),
    "float16",
    {"blocks.0.qkv": Product("float16", "int8"), "blocks.0.mlp_in": Product("float16")},
)


def listed(keys="present_key_0", out="attended", dims="-1,1,16", held="Int8", more=""):
    """What a build says of a model of one layer, with one thing changed."""
    entry = "{ Name: %s, Dimensions: [-1,2,128,64], Strides: [1], Datatype: Half, Format: x }"
    text = LISTED.replace("{KEYS}", entry % keys).replace("{VALUES}", entry % "present_value_0" + more)
    return parse_layers(text.replace("OUT", out).replace("DIMS", dims).replace("HELD", held))


@pytest.mark.parametrize(
    ("change", "on_caches", "weights", "fault"),
    [
        ({}, 1, 1, None),
        ({"keys": "scaled"}, 0, 1, "0 of 1 attentions read their caches, queries and a mask, and nothing else"),
        ({"more": ", { Name: lengths, Dimensions: [-1], Datatype: Int32, Format: x }"}, 0, 1, "0 of 1 attentions"),
        ({"out": "k", "dims": "-1,2,64,128"}, 1, 1, "_gemv_mha_v1_myl0_9 copies present_key_0"),
        (
            {"out": "w", "dims": "1,256,1024"},
            1,
            1,
            "_gemv_mha_v1_myl0_9 writes a matrix like blocks.0.mlp_in into memor",
        ),
        ({"held": "Half"}, 1, 0, "0 kernels read blocks.0.qkv in int8, expected is one"),
    ],
)
def test_the_list_of_fused_layers_shows_what_costs_time(change, on_caches, weights, fault):
    layers = listed(**change)
    assert [len(layer.inputs) for layer in layers][:2] == [0, 5 if "more" in change else 4]
    found = summarize(layers, EXPECTED, 128, ["decode"])["decode"]
    assert (found["kernels"], found["attentions"]) == (2, 1)  # what runs on the host is no kernel
    assert (found["attentions_on_caches"], found["weights_in_products"]) == (on_caches, weights)
    assert [text.startswith(fault or "") for text in found["faults"]] == ([True] if fault else [])
    slow = find_slow_decoding(layers, EXPECTED, 128, ["decode"], decomposable=False)
    assert slow == found["faults"]
    # Attention that has no kernel of its own is no reason to have no plan; weights are.
    forgiven = find_slow_decoding(layers, EXPECTED, 128, ["decode"], decomposable=True)
    assert forgiven == [text for text in slow if " read blocks" in text or " writes " in text]


def test_small_matrices_that_are_dequantized_into_memory_are_named_and_not_refused():
    """TensorRT-RTX 1.7.1 does so where a column is one block, which has at most 128 rows."""
    small = dataclasses.replace(EXPECTED, config=dataclasses.replace(EXPECTED.config, n_embd=64))
    layers = listed(held="Half")
    assert summarize(layers, small, 128, ["decode"])["decode"]["faults"]
    assert find_slow_decoding(layers, small, 128, ["decode"], decomposable=True) == []


def test_a_build_that_lists_nothing_is_no_fault():
    assert parse_layers("Engine built") == [] and summarize([], EXPECTED, 128, ["decode"]) == {}
    assert find_slow_decoding([], EXPECTED, 128, ["decode"], decomposable=False) == []
