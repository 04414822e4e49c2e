"""Bisecting names a planted fault: the position at which it begins, and the layer and tensor, or the state that is off.

Faults of arithmetic are planted in a copy of an exported graph, faults of the state in a decoder that mishandles it.
"""

from __future__ import annotations

import dataclasses
import math
import shutil

import numpy as np
import onnx_ir as ir
import pytest

from lrt_deploy import activations, open_decoder
from lrt_deploy.activations import StepInput
from lrt_deploy.bundle.manifest import MANIFEST, graph_path, read_manifest, write_manifest
from lrt_deploy.errors import ParityError
from lrt_deploy.evaluation.bisect import bisect, compare_activations, first_bad
from lrt_deploy.evaluation.verdict import compare
from lrt_deploy.exporters.graph.debug_outputs import with_debug_outputs
from lrt_deploy.model.reference import ReferenceDecoder
from lrt_deploy.runtime.backends.ort_session import OrtDebugger
from lrt_deploy.tolerances import ACTIVATION_ERROR

pytestmark = pytest.mark.slow  # for the export

GOLDEN = "mr_gqa_SSSL"  # 4 layers, windows of 16, 16, 16 and 32
GRAPH = graph_path("fp32", "prefill", "windowed")
WINDOW = 16


@pytest.fixture(scope="module")
def reference(golden_of):
    return ReferenceDecoder(golden_of(GOLDEN).model(), 128)


@pytest.fixture
def plant(export_once, tmp_path):
    """edit(model) -> the bundle, with that done to the graph that the CPU runs."""

    def planted(edit):
        bundle = shutil.copytree(export_once(GOLDEN), tmp_path / "bundle")
        model = ir.load(bundle / GRAPH)
        edit(model)
        ir.save(model, bundle / GRAPH)
        write_manifest(bundle, read_manifest(bundle))
        return bundle

    return planted


def probe_of(bundle):
    config = read_manifest(bundle).model
    graph = with_debug_outputs(bundle / GRAPH, activations.in_order(config))
    return OrtDebugger(graph.model, graph.folder, config), graph.derivations


def found(reference, decoder, bundle, steps=24):
    """The report, and what bisecting makes of it."""
    report = compare(reference, decoder, [5, 80, 131, 7], steps, precision="fp32", checkpoint_matches=None, backend="x")
    probe, origins = probe_of(bundle)
    return report, bisect(reference, decoder, probe, report, origins)


def named(reference, bundle, steps=24):
    with open_decoder(bundle) as decoder:
        report, result = found(reference, decoder, bundle, steps)
    assert not report.passed
    assert result.kind == "stage"
    assert result.line.startswith(f"begins at position {result.position} in {result.tensor} (")
    return result.position, result.tensor, result.layer


# Faults in the graph.


def scaled(name, factor, columns=slice(None)):
    def edit(model):
        value = model.graph.initializers[name]
        array = value.const_value.numpy().copy()
        array[..., columns] *= factor
        value.const_value = ir.tensor(array, name=name)

    return edit


def value_of(model, name):
    return next(value for node in model.graph for value in node.outputs if value.name == name)


def producer(model, name, op):
    """The nearest node of this kind that the value comes from."""
    node = value_of(model, name).producer()
    while node.op_type != op:
        node = next(value.producer() for value in node.inputs if value.producer() is not None)
    return node


def swapped_gates(model):
    """local and memory change places in layer 1, after the gates are computed."""
    split = next(
        node
        for node in model.graph
        if node.op_type == "Split" and len(node.outputs) == 3 and comes_from(node, "blocks.1.gates")
    )
    local, memory = split.outputs[:2]
    uses = list(local.uses()), list(memory.uses())
    for old, new, users in ((local, memory, uses[0]), (memory, local, uses[1])):
        for node, index in users:
            assert node.inputs[index] is old
            node.replace_input_with(index, new)


def comes_from(node, name):
    return any(
        value is not None and (value.name == name or (value.producer() and comes_from(value.producer(), name)))
        for value in node.inputs[:1]
    )


def wide_window(model):
    """One key too many on the left, in the mask and in the slice."""
    size = model.graph.initializers[f"window_{WINDOW}"]
    size.const_value = ir.tensor(np.array(WINDOW + 1, np.int64), name=size.name)
    start = next(value for value in model.graph.inputs if value.name == f"window_start_{WINDOW}")
    users = list(start.uses())
    one = ir.Value(name="one", const_value=ir.tensor(np.array([1], np.int64), name="one"))
    zero = ir.Value(name="zero", const_value=ir.tensor(np.array([0], np.int64), name="zero"))
    model.graph.register_initializer(one)
    model.graph.register_initializer(zero)
    earlier = ir.node("Sub", [start, one])
    clipped = ir.node("Max", [earlier.outputs[0], zero])
    model.graph.insert_before(model.graph[0], [earlier, clipped])
    for node, index in users:
        node.replace_input_with(index, clipped.outputs[0])


def without_softcap(model):
    """The head's product goes out as it is."""
    tanh = next(node for node in model.graph if node.op_type == "Tanh")
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    raw = tanh.inputs[0].producer().inputs[0]  # before the division by the cap
    identity = ir.node("Identity", [raw])
    identity.outputs[0].name = "logits"
    identity.outputs[0].type, identity.outputs[0].shape = logits.type, logits.shape
    model.graph.append(identity)
    logits.name = "logits_before"
    model.graph.outputs[model.graph.outputs.index(logits)] = identity.outputs[0]


def other_eps(model):
    """1e-3 where float32's epsilon belongs, in all norms of the MLPs."""
    for node in model.graph:
        if node.op_type == "RMSNormalization" and node.outputs[0].name.endswith(".mlp_normed"):
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)


KV = 32  # G * D, columns of one projection in memory_kv


@pytest.mark.parametrize(
    ("edit", "position", "tensor"),
    [
        pytest.param(scaled("blocks.2.attention_out", 1.01), 0, "blocks.2.attended", id="c_proj by 1%"),
        pytest.param(scaled("blocks.1.qkv", 1.01, slice(-1, None)), 0, "blocks.1.heads", id="a column of c_v by 1%"),
        pytest.param(scaled("blocks.3.mlp_in", 1.01), 0, "blocks.3.mlp_hidden", id="c_fc by 1%"),
        pytest.param(scaled("blocks.0.mlp_out", 1.01), 0, "blocks.0.mlp", id="mlp.c_proj by 1%"),
        pytest.param(scaled("blocks.1.gate", 1.01), 0, "blocks.1.gates", id="triple_gate by 1%"),
        pytest.param(
            scaled("memory_kv", 1.01, slice(5 * KV, 6 * KV)),
            1,
            "blocks.2.memory_values",
            id="V memory of layer 2 by 1%",
        ),
        pytest.param(scaled("lm_head", 1.01), 0, "logits", id="lm_head by 1%"),
        pytest.param(scaled("sin", -1.0), 1, "blocks.0.queries", id="RoPE sign flipped"),
        pytest.param(wide_window, WINDOW + 1, "blocks.0.attention", id="window one too wide"),
        pytest.param(swapped_gates, 0, "blocks.1.gated_keys", id="gate order swapped"),
        pytest.param(without_softcap, 0, "logits", id="softcap missing"),
        pytest.param(other_eps, 0, "blocks.0.mlp_normed", id="eps wrong"),
        pytest.param(
            scaled("memory_kv", 0.0, slice(2 * KV, 3 * KV)), 1, "blocks.1.memory_keys", id="K memory of layer 1 skipped"
        ),
    ],
)
def test_a_fault_in_the_graph_is_named_by_position_layer_and_tensor(edit, position, tensor, plant, reference):
    assert named(reference, plant(edit)) == (position, tensor, activations.layer_of(tensor))


def test_the_op_and_what_it_reads_are_named(plant, reference):
    bundle = plant(scaled("blocks.2.attention_out", 1.01))
    with open_decoder(bundle) as decoder:
        _, result = found(reference, decoder, bundle)
    assert result.op.startswith("MatMul (after Transpose, Reshape) of blocks.2.attention, ")
    assert result.op.endswith("blocks.2.attention_out")
    assert result.op in result.line
    assert next(stage.name for stage in result.stages if stage.error > ACTIVATION_ERROR) == "blocks.2.attended"


# Faults of the state.


class Faulty:
    """A decoder whose state is mishandled around each step."""

    def __init__(self, decoder):
        self._decoder = decoder
        self.config, self.max_seq_len = decoder.config, decoder.max_seq_len

    def prefill(self, prompts, **options):
        state = self._decoder.prefill(prompts, **options)
        self.begin(state)
        return state

    def step(self, state, tokens):
        return self._decoder.step(state, tokens)

    def begin(self, state):
        pass


class MemoryShifted(Faulty):
    def begin(self, state):
        self.older = np.zeros_like(state.latent)

    def step(self, state, tokens):
        now = state.latent
        state.buffers.set_latent(np.arange(1), self.older)
        self.older = now
        return super().step(state, tokens)


class NoMemory(Faulty):
    def step(self, state, tokens):
        state.buffers.set_latent(np.arange(1), np.zeros_like(state.latent))
        return super().step(state, tokens)


class MemoryForgotten(Faulty):
    """Where one can see it: the state itself loses the latent at the sixth token."""

    def step(self, state, tokens):
        logits = super().step(state, tokens)
        if state.lengths[0] == 6:
            state.buffers.set_latent(np.arange(1), np.zeros_like(state.latent))
        return logits


class StartsFromSomething(Faulty):
    def prefill(self, prompts, **options):
        state = self._decoder.prefill([prompts[0][:1]], policy="stepwise")
        state.rewind(0)
        state.buffers.set_latent(np.arange(1), np.full_like(state.latent, 0.1))
        return self._decoder.prefill(prompts, state=state, **options)


class StaleLayer(Faulty):
    """Layer 2 sees its newest entry only one step later, though it is there when one looks."""

    def step(self, state, tokens):
        slot = int(state.lengths[0]) - 1
        caches = [state.buffers._caches[name] for name in ("past_key_2", "past_value_2")]
        held = [cache[:, :, slot].copy() for cache in caches]
        for cache in caches:
            cache[:, :, slot] = 0.0
        logits = super().step(state, tokens)
        for cache, entry in zip(caches, held, strict=True):
            cache[:, :, slot] = entry
        return logits


class LateLayer(Faulty):
    """Layer 2's entries are written one step late."""

    def begin(self, state):
        self._held = self._take(state)

    def step(self, state, tokens):
        logits = super().step(state, tokens)
        slot = int(state.lengths[0]) - 2
        for cache, entry in zip(self._caches(state), self._held, strict=True):
            cache[:, :, slot] = entry
        self._held = self._take(state)
        return logits

    def _take(self, state):
        slot = int(state.lengths[0]) - 1
        entries = [cache[:, :, slot].copy() for cache in self._caches(state)]
        for cache in self._caches(state):
            cache[:, :, slot] = 0.0
        return entries

    def _caches(self, state):
        return [state.buffers._caches[name] for name in ("past_key_2", "past_value_2")]


@pytest.mark.parametrize(
    ("fault", "position", "tensor", "layer", "says"),
    [
        (MemoryShifted, 1, "past_latent", None, "the latent that it reads is not the one that is held"),
        (NoMemory, 1, "past_latent", None, "the latent that it reads is not the one that is held"),
        (MemoryForgotten, 5, "past_latent", None, "the latent that is held after it is not the one that it computed"),
        (StartsFromSomething, 0, "past_latent", None, "starts from is not the zeros it must be"),
        (StaleLayer, 1, "past_key_2", 2, "goes wrong where layer 2 attends over its cache"),
        (LateLayer, 1, "past_key_2", 2, "past_key_2 is off in slot 0"),
    ],
)
def test_a_fault_of_the_state_is_named_though_no_layer_is_at_fault(
    fault, position, tensor, layer, says, reference, decoder_of, export_once
):
    report, result = found(reference, fault(decoder_of(GOLDEN)), export_once(GOLDEN))
    assert not report.passed
    assert (result.kind, result.position) == ("state", position)
    assert (result.tensor, result.layer) == (tensor, layer)
    assert f"begins at position {position}; " in result.line
    assert says in result.line
    assert all(stage.error <= ACTIVATION_ERROR for stage in result.stages)


def test_a_call_with_a_wrong_mask_is_neither_a_layer_nor_the_state(reference, decoder_of, export_once, monkeypatch):
    decoder = decoder_of(GOLDEN)
    buffers = type(decoder.prefill([[1]]).buffers)
    right = buffers._look_back

    def without_the_first_slot(self, oldest, end, ordered=None):
        right(self, oldest, end, ordered)
        if end > 3:
            self._bound.seen_positions[0] = 10**9

    monkeypatch.setattr(buffers, "_look_back", without_the_first_slot)
    report, result = found(reference, decoder, export_once(GOLDEN))
    assert not report.passed
    assert (result.kind, result.position) == ("call", 3)
    assert "look at what else it is called with" in result.line


# Nothing at fault.


def test_there_is_nothing_to_bisect_in_a_right_model(reference, decoder_of, export_once):
    report, result = found(reference, decoder_of(GOLDEN), export_once(GOLDEN))
    assert report.passed
    assert (result.kind, result.position) == ("clean", None)


def test_every_stage_of_a_right_graph_agrees_along_a_rollout(reference, golden, golden_of, export_once):
    reference = ReferenceDecoder(golden.model(), 128)
    probe, origins = probe_of(export_once(golden.name))
    ids = golden.ids[0, :24].tolist()
    state = reference.prefill([ids[:1]])
    steps = [StepInput.first(ids[0], reference.config)]
    for token in ids[1:]:
        steps.append(StepInput.after(state, token, reference.config))
        reference.step(state, [token])
    for step in steps:
        compared = compare_activations(reference, probe, step)
        assert max(stage.error for stage in compared) < ACTIVATION_ERROR / 4
    names = [stage.name for stage in compared]
    assert names[0] == "embedded" and "logits" in names
    assert len(names) == len(origins) > 10 * reference.config.n_layer


def test_stages_that_are_not_finite_are_off(reference):
    class Broken:
        def observe(self, step):
            return reference.observe(step) | {"blocks.1.mlp": np.full((1, 1, 64), math.nan, np.float32)}

    compared = compare_activations(reference, Broken(), StepInput.first(3, reference.config))
    assert [stage.name for stage in compared if stage.error > ACTIVATION_ERROR] == ["blocks.1.mlp"]


def test_where_errors_are_not_bounded_the_worst_position_is_looked_at(reference, decoder_of):
    report = compare(reference, decoder_of(GOLDEN), [5, 80], 8, precision="fp32", checkpoint_matches=None, backend="x")
    assert first_bad(report) is None
    quality = dataclasses.replace(report.limits, top1_agreement=0.9)
    worst = max(report.points, key=lambda point: point.kl).position
    assert first_bad(dataclasses.replace(report, limits=quality)) == worst


def test_a_graph_whose_values_have_no_names_is_refused(plant):
    def rename(model):
        for node in model.graph:
            for value in node.outputs:
                if "." in value.name:
                    value.name = value.name.replace(".", "_")

    with pytest.raises(ParityError, match=r"names \d+ of the \d+ activations .* export the bundle again"):
        probe_of(plant(rename))


def test_the_manifest_of_a_changed_copy_is_whole(plant):
    assert (plant(lambda model: None) / MANIFEST).is_file()
