"""The four graphs of a bundle are what the contract says: their form, their weights, and their numbers run by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from random_models import random_model

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.manifest import MANIFEST, WEIGHTS, graph_path, read_manifest
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ExportError
from lrt_deploy.exporters.graph import passes

pytestmark = pytest.mark.slow  # for the exports

# With memory and without: windows of two sizes and grouped heads; value embeddings on alternate layers.
NAMES = ("mr_gqa_SSSL", "baseline_ve")
GRAPHS = [(phase, flavour) for phase in ("prefill", "decode_step") for flavour in contract.FLAVOURS]
CAPACITY = 64


@dataclasses.dataclass(frozen=True)
class Graph:
    """One graph file of a golden's bundle."""

    golden: object
    bundle: Path
    phase: str
    flavour: str

    @property
    def path(self):
        return self.bundle / graph_path("fp32", self.phase, self.flavour)

    @property
    def config(self):
        return read_manifest(self.bundle).model

    def load(self):
        return onnx.load(self.path, load_external_data=False)


@pytest.fixture(params=NAMES)
def bundled(request, golden_of, export_once):
    return golden_of(request.param), export_once(request.param)


@pytest.fixture(params=GRAPHS, ids=lambda pair: "-".join(pair))
def graph(request, bundled):
    return Graph(*bundled, *request.param)


def dims(value):
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def external(model):
    """Initializer name -> (file, offset, length) of those that lie outside the graph."""
    found = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            fields = {entry.key: entry.value for entry in tensor.external_data}
            found[tensor.name] = (fields["location"], int(fields["offset"]), int(fields["length"]))
    return found


def test_a_graph_passes_the_full_check(graph):
    onnx.checker.check_model(str(graph.path), full_check=True)


def test_a_graph_has_the_opset_and_standard_ops_only(graph):
    model = graph.load()
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", contract.OPSET)] == [("", 24)]
    assert not model.functions
    assert {node.op_type for node in model.graph.node} <= passes.ALLOWED_OPS
    assert not any(node.domain for node in model.graph.node)


def test_a_graph_attends_once_a_layer_and_writes_two_caches_a_layer(graph):
    layers = graph.config.n_layer
    ops = Counter(node.op_type for node in graph.load().graph.node)
    assert ops["Attention"] == layers
    assert ops["TensorScatter"] == 2 * layers
    assert ops["RotaryEmbedding"] == 2 * layers
    # Keys and values are sliced where a window is less than a quarter of the capacity, in a windowed graph alone.
    capacity = read_manifest(graph.bundle).max_seq_len
    small = sum(4 * (window + 1) < capacity for window in graph.config.windows)
    if graph.flavour == "windowed":
        assert 2 * small <= ops["Slice"] < 2 * small + layers
    else:
        assert ops["Slice"] < layers


def test_inputs_and_outputs_are_those_of_the_contract_in_its_order(graph):
    model = graph.load()

    def described(specs):
        fixed = {"tokens": 1} if graph.phase == "decode_step" else {}
        return [(spec.name, spec.dtype, tuple(fixed.get(dim, dim) for dim in spec.shape)) for spec in specs]

    def found(values):
        types = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}
        return [(value.name, types[value.type.tensor_type.elem_type], dims(value)) for value in values]

    assert found(model.graph.input) == described(contract.graph_inputs(graph.config, graph.flavour))
    assert found(model.graph.output) == described(contract.graph_outputs(graph.config))


def test_only_the_dims_of_the_contract_are_free_and_all_caches_share_one(graph):
    model = graph.load()
    values = [*model.graph.input, *model.graph.output]
    names = {dim for value in values for dim in dims(value) if isinstance(dim, str)}
    assert names == {"batch", "capacity", "rows"} | ({"tokens"} if graph.phase == "prefill" else set())
    caches = [value for value in values if "key" in value.name or "value" in value.name]
    assert len(caches) == 4 * graph.config.n_layer
    assert {dims(value)[2] for value in caches} == {"capacity"}


def test_a_graph_found_alone_explains_itself(graph):
    properties = {entry.key: entry.value for entry in graph.load().metadata_props}
    assert LRTConfig.from_dict(json.loads(properties["lrt_deploy.model"])) == graph.config
    described = json.loads(properties["lrt_deploy.contract"])
    assert described == contract.describe(graph.config, graph.flavour)
    assert described == read_manifest(graph.bundle).contracts["fp32"][graph.flavour]
    assert properties["lrt_deploy.precision"] == "fp32"


def test_no_exported_text_knows_the_exporting_machine(bundled, root):
    _, bundle = bundled
    forbidden = [str(root), str(Path.home()) + "/", str(bundle.parent), "site-packages", ".py", "pytest"]
    texts = [*bundle.rglob("*.onnx"), bundle / MANIFEST]
    assert len(texts) == 5
    for path in texts:
        content = path.read_bytes()
        assert not [word for word in forbidden if word.encode() in content], path
    assert b"lrt_deploy.contract" in (bundle / graph_path("fp32", "prefill", "full")).read_bytes()


def test_all_graphs_point_to_the_same_weights(bundled):
    _, bundle = bundled
    found = [external(Graph(None, bundle, phase, flavour).load()) for phase, flavour in GRAPHS]
    assert all(weights == found[0] for weights in found)
    assert {file for file, _, _ in found[0].values()} == {WEIGHTS}
    assert {"wte", "lm_head", "blocks.0.qkv"} <= set(found[0])
    spans = sorted((offset, offset + length) for _, offset, length in found[0].values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= (bundle / "graphs" / "fp32" / WEIGHTS).stat().st_size


def test_the_weights_file_holds_every_parameter_once_and_little_else(bundled):
    golden, bundle = bundled
    parameters = list(golden.model().parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    stored = (bundle / "graphs" / "fp32" / WEIGHTS).stat().st_size
    pages = 4096 * (len(parameters) + 2)  # each begins on a page; the rotary tables are stored beside them
    assert 0.98 * size <= stored <= size + pages + 2 * 128 * 4 * 32


def test_graphs_are_small_beside_their_weights(export_once):
    folder = export_once("demo") / "graphs" / "fp32"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert len(sizes) == 5
    assert sum(sizes.values()) < 1.1 * sizes[WEIGHTS]


def test_bfloat16_tables_stay_bfloat16_on_disk(export_model, bundled):
    config = LRTConfig(sequence_len=16, vocab_size=100, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    narrow = export_model("bfloat16", lambda: random_model(config, table_dtype=torch.bfloat16))

    def types(bundle):
        model = Graph(None, bundle, "prefill", "windowed").load()
        return {t.name: t.data_type for t in model.graph.initializer if t.name in external(model)}

    tables = {"wte", "value_embeds"}
    found = types(narrow)
    assert {found[name] for name in tables} == {onnx.TensorProto.BFLOAT16}
    assert {kind for name, kind in found.items() if name not in tables} == {onnx.TensorProto.FLOAT}
    length = external(Graph(None, narrow, "prefill", "full").load())["wte"][2]
    assert length == config.padded_vocab_size * config.n_embd * 2
    wide = types(bundled[1])
    assert {wide[name] for name in tables} == {onnx.TensorProto.FLOAT}


class ByHand:
    """Runs a graph with plain feeds: no binding, no runtime of ours."""

    def __init__(self, graph):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
        self.config, self.flavour = graph.config, graph.flavour
        self.names = [spec.name for spec in contract.graph_outputs(self.config)]

    def start(self, batch):
        shapes = {"batch": batch, "capacity": CAPACITY, "tokens": 1}
        pairs = contract.state_pairs(self.config)
        return {p.past: np.zeros([shapes.get(dim, dim) for dim in p.shape], np.float32) for p in pairs}

    def run(self, ids, first, state, last_index):
        """Tokens (B, T) at positions `first` on; returns logits and the next state."""
        batch, count = ids.shape
        positions = np.tile(np.arange(first, first + count), (batch, 1))
        feeds = {
            "input_ids": ids,
            "position_ids": positions,
            "write_index": np.full(batch, first),
            "last_index": last_index,
            contract.WINDOW_END: np.array([first + count]),
            contract.SLOT_POSITIONS: np.arange(CAPACITY),
        } | {contract.window_start(w): np.array([max(0, first - w)]) for w in set(self.config.windows)}
        wanted = {spec.name for spec in contract.graph_inputs(self.config, self.flavour)}
        feeds = {name: value for name, value in (feeds | state).items() if name in wanted}
        outputs = dict(zip(self.names, self.session.run(self.names, feeds), strict=True))
        pairs = contract.state_pairs(self.config)
        return outputs["logits"], {pair.past: outputs[pair.present] for pair in pairs}, outputs


def test_a_graph_run_by_hand_gives_the_authors_numbers(graph, tolerances):
    runner, golden = ByHand(graph), graph.golden
    state, logits = runner.start(len(golden.ids)), []
    for t in range(golden.ids.shape[1]):
        found, state, _ = runner.run(golden.ids[:, t : t + 1], t, state, np.zeros((len(golden.ids), 1), np.int64))
        logits.append(found[:, 0])
        if graph.config.memory:
            error = np.abs(state["past_latent"][:, 0] - golden.arrays["seq_h_final"][:, t]).max()
            assert error <= tolerances.latent, t
    assert np.abs(np.stack(logits, 1) - golden.last_logits).max() <= tolerances.logits
    for layer in range(graph.config.n_layer):
        for name, stored in (("key", "k_cache"), ("value", "v_cache")):
            cache = state[f"past_{name}_{layer}"][:, :, : golden.ids.shape[1]].swapaxes(1, 2)
            assert np.abs(cache - golden.arrays[stored][layer]).max() <= tolerances.cache
    if graph.config.memory:
        assert np.abs(np.stack(logits, 1)[:, -8:] - golden.arrays["zero_mem_logits_last8"]).max() > 0.1


@pytest.mark.parametrize("flavour", contract.FLAVOURS)
def test_the_head_runs_for_the_positions_that_are_asked_for(bundled, flavour, tolerances):
    golden, bundle = bundled
    runner = ByHand(Graph(golden, bundle, "prefill", flavour))
    ids = golden.ids
    batch, count = ids.shape

    def logits_at(rows):
        state = runner.start(batch)
        if "past_latent" in state:
            state["past_latent"] = np.zeros((batch, count, runner.config.n_embd), np.float32)
        logits, _, outputs = runner.run(ids, 0, state, rows)
        if "present_latent" in outputs:
            error = np.abs(outputs["present_latent"] - golden.arrays["zero_mem_h_final"]).max()
            assert error <= tolerances.latent
        return logits

    everywhere = logits_at(np.tile(np.arange(count), (batch, 1)))
    assert everywhere.shape == (batch, count, runner.config.vocab_size)
    assert np.abs(everywhere[:, -8:] - golden.arrays["zero_mem_logits_last8"]).max() <= tolerances.logits
    assert logits_at(np.zeros((batch, 0), np.int64)).shape == (batch, 0, runner.config.vocab_size)
    ragged = np.array([[3], [count - 1]])[:batch]
    expected = np.stack([everywhere[row, index] for row, index in enumerate(ragged)])
    assert np.abs(logits_at(ragged) - expected).max() <= tolerances.logits


@pytest.mark.parametrize(("op", "domain"), [("Softmax", ""), ("GroupQueryAttention", "com.microsoft"), ("Loop", "")])
def test_an_unexpected_op_is_refused_by_name(bundled, op, domain):
    _, bundle = bundled
    model = ir.load(bundle / graph_path("fp32", "prefill", "full"))
    passes.check_ops(model.graph)
    model.graph.append(ir.node(op, [model.graph.outputs[0]], domain=domain))
    with pytest.raises(ExportError, match=f"{domain}::{op}.*constraints"):
        passes.check_ops(model.graph)
