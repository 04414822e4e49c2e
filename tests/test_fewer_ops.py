"""The CPU's graphs spell the same with fewer ops; that the numbers stay is what the goldens are compared with."""

from __future__ import annotations

from collections import Counter

import onnx
import onnx_ir as ir
import pytest

from lrt_deploy.bundle.manifest import graph_path
from lrt_deploy.exporters.graph.passes import fewer_ops

pytestmark = pytest.mark.slow  # for the exports


@pytest.fixture
def graphs(export_once):
    """name -> (full, windowed) graph of the fp32 prefill."""

    def get(name):
        paths = [export_once(name) / graph_path("fp32", "prefill", flavour) for flavour in ("full", "windowed")]
        return [onnx.load(path, load_external_data=False).graph for path in paths]

    return get


def ops(graph):
    return Counter(node.op_type for node in graph.node)


def test_all_layers_are_mixed_at_once_and_gates_divide(graphs):
    full, windowed = graphs("mr_gqa_SSSL")
    layers = ops(full)["Attention"]
    split = next(node for node in windowed.node if node.name == "mix_split")
    assert len(split.output) == layers
    assert ops(full)["Reciprocal"] == layers and ops(windowed)["Reciprocal"] == 0
    # Two products and a sum less in each layer, and a product less in each gate; two products and a sum in their place,
    # and a product for the queries of each layer.
    assert ops(full)["Mul"] - ops(windowed)["Mul"] == 2 * layers - 2
    assert ops(full)["Add"] - ops(windowed)["Add"] == layers - 1


def test_queries_are_scaled_before_attention(graphs):
    full, windowed = graphs("mr_gqa_SSSL")
    scales = [
        [a.f for n in g.node if n.op_type == "Attention" for a in n.attribute if a.name == "scale"]
        for g in (full, windowed)
    ]
    assert set(scales[0]) <= {0.25} and scales[1] == [1.0] * ops(full)["Attention"]  # heads of 16
    factors = [onnx.numpy_helper.to_array(i) for i in windowed.initializer if i.name.startswith("query_scale")]
    assert [factor.item() for factor in factors] == [0.25]


@pytest.mark.parametrize("name", ["no_x0", "no_resid_lambdas", "baseline_ve"])
def test_a_model_that_mixes_less_is_left_as_it_is(name, graphs):
    full, windowed = graphs(name)
    assert "mix_split" not in {node.name for node in windowed.node}
    assert ops(full)["Add"] == ops(windowed)["Add"]


def test_a_second_run_finds_nothing(export_once):
    model = ir.load(export_once("mr_gqa_SSSL") / graph_path("fp32", "prefill", "windowed"))
    before = [node.name for node in model.graph]
    fewer_ops(model)
    assert [node.name for node in model.graph] == before
