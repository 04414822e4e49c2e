"""Engines are really built here, which TensorRT-RTX does without a GPU: what they consist of, and what is refused.

A plan cannot be run or even read without a GPU, so the parsed network and the sidecar are compared with what is
expected. The twins that must fail are graphs with one thing changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys

import onnx
import pytest
from typer.testing import CliRunner

import lrt_deploy
from lrt_deploy.bundle import contract
from lrt_deploy.bundle.engine_sidecar import PLAN, cache_capacity, engine_folder, read_sidecar, sidecar_path
from lrt_deploy.bundle.manifest import graph_path, read_manifest, write_manifest
from lrt_deploy.bundle.tensorrt_libraries import LIBRARIES, choose_library
from lrt_deploy.cli.app import app
from lrt_deploy.cli.build import engine_rows
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import EngineError
from lrt_deploy.exporters.engine import build as build_module
from lrt_deploy.exporters.engine.build import build_engine as build
from lrt_deploy.exporters.engine.build import profiles
from lrt_deploy.exporters.engine.tensorrt import BuildLog, parse, tensorrt_copy
from lrt_deploy.exporters.engine.verify import Product, expected_network, verify
from lrt_deploy.machine import find_gpu

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheels for this platform")

RTX = LIBRARIES["tensorrt-rtx"]
GOLDEN = "mr_gqa_SSSL"  # grouped heads, two windows


@pytest.fixture(scope="module")
def bundle(export_once, tmp_path_factory):
    """A copy of an exported golden that engines may be built into."""
    folder = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(export_once(GOLDEN), folder)
    return folder


@pytest.fixture(scope="module")
def built(bundle):
    """The fp32 engine, built once, in a process where torch cannot be imported."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['onnxscript'] = None\n"
        "import lrt_deploy\n"
        "seen = []\n"
        "lrt_deploy.build_engine(sys.argv[1], backend='tensorrt-rtx', progress=lambda *step: seen.append(step[0]))\n"
        "assert 'verifying' in seen and any(what.startswith('TensorRT: ') for what in seen), seen\n"
        "print('onnxruntime' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "False\n"  # and nothing of TensorRT or Polygraphy
    return engine_folder(bundle, "tensorrt-rtx", "fp32") / PLAN


@pytest.fixture(scope="module")
def manifest(bundle):
    return read_manifest(bundle)


def network_of(bundle, edit=lambda model: None, precision="fp32"):
    """The parsed network of a bundle's graph after an edit; the second result keeps it alive."""
    graph = bundle / graph_path(precision, "prefill", "full")
    model = onnx.ModelProto.FromString(tensorrt_copy(graph, 128))
    edit(model)
    parsed = parse(RTX, model.SerializeToString(), graph)
    return parsed.network, parsed


def nodes(model, op):
    return [node for node in model.graph.node if node.op_type == op]


# What is built


def test_the_engine_is_built_without_torch_and_its_sidecar_is_complete(bundle, built, manifest):
    sidecar = read_sidecar(built)
    config, graph = manifest.model, graph_path("fp32", "prefill", "full")
    assert sidecar.plan_sha256 == hashlib.sha256(built.read_bytes()).hexdigest()
    assert sidecar.plan_bytes == built.stat().st_size > 10**5
    assert sidecar.onnx == graph and sidecar.onnx_sha256 == manifest.files[graph].sha256
    assert sidecar.weights_sha256 == manifest.files["graphs/fp32/weights.bin"].sha256
    assert (sidecar.backend, sidecar.precision) == ("tensorrt-rtx", "fp32")
    assert sidecar.tensorrt_version == RTX.load().__version__
    assert sidecar.compute_capabilities == ("8.6", "8.9", "12.0")  # 9.0 is not documented
    assert sidecar.flags == ("REQUIRE_USER_ALLOCATION", "STRONGLY_TYPED")  # the former for capturing
    assert [profile.name for profile in sidecar.profiles] == ["decode", "prefill"]
    assert sidecar.profile("decode")[1].batch == (1, 1, manifest.max_batch_size)
    assert sidecar.profile("prefill")[1].tokens == (1, 64, 128)
    assert [spec["name"] for spec in sidecar.inputs] == [s.name for s in contract.graph_inputs(config, "full")]
    assert [spec["name"] for spec in sidecar.outputs] == [s.name for s in contract.graph_outputs(config)]
    assert sidecar.outputs[0] == {"name": "logits", "dtype": "float32", "shape": ["batch", 1, config.vocab_size]}
    assert len(sidecar.state) == 2 * config.n_layer + 1
    assert sidecar.build["seconds"] > 0 and sidecar.build["peak_host_bytes"] > 10**7
    assert sidecar.build["memory"]["weights_bytes"][0] > 10**5
    assert len(sidecar.build["memory"]["activation_bytes"]) == 2  # one a profile
    assert not sidecar.smoke["ran"]
    assert json.loads(sidecar_path(built).read_text())["format_version"] == 1


def test_an_engine_does_not_hold_tables_that_are_on_the_host(built, host_embeddings_once, tmp_path):
    bundle = shutil.copytree(host_embeddings_once(GOLDEN), tmp_path / "bundle")
    sidecar = lrt_deploy.build_engine(bundle, backend="tensorrt-rtx")
    manifest, whole = read_manifest(bundle), read_sidecar(built)
    specs = contract.graph_inputs(manifest.model, "full", host_embeddings=True)
    assert [spec["name"] for spec in sidecar.inputs] == [spec.name for spec in specs]
    assert sidecar.layers["matmul"] == whole.layers["matmul"]
    tables = manifest.files["graphs/fp32/tables.bin"].bytes
    assert whole.plan_bytes - sidecar.plan_bytes == pytest.approx(tables, rel=0.1)


def test_the_network_is_what_is_expected(built, manifest):
    layers, count = read_sidecar(built).layers, manifest.model.n_layer
    assert (layers["kv_cache_update"], layers["attention"]) == (2 * count, count)
    assert layers["attention_masks"] == 2
    assert layers["matmul"] == {"float32": 22} and layers["quantized_matmul"] == 0
    assert set(layers["norms"]) == {"float32"}


def test_an_existing_engine_is_kept_unless_forced_and_nothing_is_left_behind(bundle, built):
    before = built.read_bytes()
    with pytest.raises(EngineError, match=r"exists; pass --force"):
        lrt_deploy.build_engine(bundle, backend="tensorrt-rtx")
    assert built.read_bytes() == before
    assert {path.name for path in built.parent.iterdir()} == {PLAN, f"{PLAN}.json"}
    assert not list(built.parent.parent.glob(".*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorrt-rtx", "precision": "fp64"}, "there is no precision .fp64.; this bundle holds fp32"),
        ({"backend": "cuda"}, "'cuda' is none of them"),
        ({"backend": "tensorrt-rtx", "max_batch_size": 0}, "max_batch_size is 0"),
        ({"backend": "tensorrt-rtx", "chunk_tokens": 10**6}, "chunk_tokens is 1000000"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(bundle, options, message):
    with pytest.raises(EngineError, match=message):
        build(bundle, **options)


def test_a_library_that_is_missing_is_named_with_what_installs_it(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match="install the extra 'tensorrt'"):
        build(bundle, backend="tensorrt")


AS_FULL_TENSORRT = """
import sys, types
from importlib.machinery import ModuleSpec
import tensorrt_rtx
alias = types.ModuleType("tensorrt")
alias.__dict__.update({name: thing for name, thing in vars(tensorrt_rtx).items() if not name.startswith("__")})
alias.__version__, alias.__spec__ = "11.4.0", ModuleSpec("tensorrt", None)
sys.modules["tensorrt"] = alias
import lrt_deploy
from lrt_deploy.exporters.engine import build
from lrt_deploy.machine import Gpu
if sys.argv[2] == "gpu":
    build.find_gpu = lambda: (Gpu("Fake H100", (9, 0)), "Fake H100")
lrt_deploy.build_engine(sys.argv[1], backend="auto")
"""


@pytest.mark.slow
def test_full_tensorrt_takes_its_own_way_through_the_builder(bundle):
    """TensorRT-RTX under the other name: a plan for the GPU at hand, kernel times kept, none of it without a GPU."""
    engines = bundle / "engines"
    for gpu, expected in (("none", 1), ("gpu", 0)):
        command = [sys.executable, "-c", AS_FULL_TENSORRT, str(bundle), gpu]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert result.returncode == expected, result.stderr
        if gpu == "none":
            assert "tensorrt builds for the GPU that it runs on, and there is none here" in result.stderr
            assert not (engines / "tensorrt-fp32").exists()
    sidecar = read_sidecar(engines / "tensorrt-fp32" / PLAN)
    assert (sidecar.backend, sidecar.tensorrt_version) == ("tensorrt", "11.4.0")
    assert sidecar.compute_capabilities == ("9.0",) and sidecar.layers["kv_cache_update"] == 8
    assert (engines / "tensorrt.timing").is_file()


def test_auto_takes_full_tensorrt_where_it_is_installed(monkeypatch):
    have = {"tensorrt", "tensorrt_rtx"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in have else None)
    assert choose_library("auto")[0].backend == "tensorrt"
    have.remove("tensorrt")
    flavour, why = choose_library("auto")
    assert flavour.backend == "tensorrt-rtx" and "tensorrt is not installed" in why
    have.clear()
    with pytest.raises(EngineError, match="neither tensorrt nor tensorrt_rtx is installed"):
        choose_library("auto")


def test_profiles_follow_the_bundle():
    decode, prefill = profiles(2048, 4, 512)
    assert (decode.batch, decode.tokens) == ((1, 1, 4), (1, 1, 1))
    assert (prefill.batch, prefill.tokens) == ((1, 1, 1), (1, 256, 512))
    assert profiles(1, 1, 512)[1].tokens == (1, 1, 1)
    assert [cache_capacity(count) for count in (1, 128, 129)] == [128, 128, 256]


@pytest.mark.slow
def test_attention_without_a_fused_kernel_is_decomposed_and_said_so(export_model, tmp_path, monkeypatch):
    """TensorRT-RTX 1.7.1 has none in float16 for two heads of 64."""
    from random_models import random_model

    config = LRTConfig(sequence_len=64, vocab_size=128, n_layer=2, n_head=2, n_kv_head=2, n_embd=128)
    source = export_model("two-heads", lambda: random_model(config, seed=1), precision="fp16")
    folder, said = shutil.copytree(source, tmp_path / "bundle"), []
    sidecar = build(folder, backend="tensorrt-rtx", progress=lambda what, done, total: said.append(what))
    assert "building again, with attention decomposed" in said
    assert sidecar.layers["attention"] == 2 and sidecar.layers["attention_decomposable"] is True
    assert engine_rows(sidecar)["attentions"].endswith("decomposed where there is no fused kernel")
    monkeypatch.setattr(build_module, "NoFusedAttentionError", ZeroDivisionError)
    with pytest.raises(EngineError, match="dedicated kernel"):
        build(folder, backend="tensorrt-rtx", force=True)


@pytest.mark.slow
@pytest.mark.parametrize(("block", "width"), [(64, 128), (128, 128), (64, 80), (128, 16)])
def test_int4_is_built_in_wider_blocks(int4_in_blocks, tmp_path, block, width):
    """Whole blocks, also where the matrices' rows are none."""
    precision, folder = "int4-weight-only", shutil.copytree(int4_in_blocks(block, width), tmp_path / "bundle")
    layers = lrt_deploy.build_engine(folder, backend="tensorrt-rtx").layers
    assert layers["matmul"] == {"float16 with int4 weights": 10, "float16": 2}
    # TensorRT-RTX 1.7.1 dequantizes a matrix into memory where its columns are one block each.
    inside = {(128, 128): 2, (128, 16): 0}.get((block, width), 10)
    assert layers["kernels"]["decode"]["weights_in_products"] == inside
    network, _keep = network_of(folder, precision=precision)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    sizes = [
        [layer.get_input(i).shape[0] for i in (0, 1)]
        for layer in layers
        if layer.type.name == "DEQUANTIZE" and layer.get_input(0).dtype == RTX.load().int4
    ]
    assert len(sizes) == 10 and {rows // scales for rows, scales in sizes} == {block}


# The proof


def test_a_float32_graph_asked_for_as_fp16_fails_with_the_layers_named(bundle, manifest):
    network, _keep = network_of(bundle)
    expected = expected_network(manifest, "fp32")
    assert verify(RTX.load(), network, expected)["kv_cache_update"] == 8
    half = dataclasses.replace(
        expected, precision="fp16", base="float16", products={name: Product("float16") for name in expected.products}
    )
    with pytest.raises(EngineError, match=r"not what fp16 expects, so nothing was built") as caught:
        verify(RTX.load(), network, half)
    assert "keeps past_key_0 in float32, expected is float16" in str(caught.value)
    assert "and 22 more" in str(caught.value)  # 8 caches, 4 attentions and 22 products, 12 of them named


@pytest.mark.slow
def test_a_bundle_whose_fp16_graph_is_float32_builds_nothing(in_every_precision, tmp_path):
    """End to end: a graph exported in float32 that lies where the fp16 one should, with all hashes right."""
    folder = tmp_path / "bundle"
    shutil.copytree(in_every_precision(GOLDEN), folder)
    for file in (graph_path("fp16", "prefill", "full"), "graphs/fp16/weights.bin"):
        shutil.copy(folder / file.replace("fp16", "fp32"), folder / file)
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(EngineError, match=r"not what fp16 expects.*past_key_0 in float32, expected is float16"):
        lrt_deploy.build_engine(folder, backend="tensorrt-rtx", precision="fp16")
    assert not engine_folder(folder, "tensorrt-rtx", "fp16").exists()


def test_an_expectation_of_other_numbers_fails(in_every_precision):
    """The twin: quantized products compared with what another precision expects."""
    folder = in_every_precision(GOLDEN)
    network, _keep = network_of(folder, precision="int8")
    for other in ("int8-weight-only", "fp16"):
        with pytest.raises(EngineError, match=r"\(blocks\.0\.qkv\) computes in float16 with int8 weights and int8 act"):
            verify(RTX.load(), network, expected_network(read_manifest(folder), other))


def test_a_bundle_whose_graph_multiplies_twice_by_one_weight_builds_nothing(bundle, tmp_path):
    """End to end: hashes are right, the graph is not."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("engines"))
    graph = folder / graph_path("fp32", "prefill", "full")
    model = onnx.load(graph, load_external_data=False)
    nodes(model, "MatMul")[-1].input[1] = "blocks.0.qkv"
    onnx.save(model, graph)
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(EngineError, match=r"blocks\.0\.qkv is multiplied 2 times.*lm_head is multiplied 0 times|parse"):
        build(folder, backend="tensorrt-rtx")
    assert not (folder / "engines").exists() or not list((folder / "engines").iterdir())


def drop_a_mask(model):
    nodes(model, "Attention")[1].input[3] = ""


def swap_masks(model):
    short, long = nodes(model, "Attention")[0], nodes(model, "Attention")[-1]
    short.input[3], long.input[3] = long.input[3], short.input[3]


def see_everything_past(model):
    """A causal mask without a window."""
    nodes(model, "Attention")[2].input[3] = nodes(model, "LessOrEqual")[0].output[0]


def one_mask_for_all(model):
    first, *others = nodes(model, "Attention")
    for node in others:
        node.input[3] = first.input[3]


def hide_a_cache(model):
    outputs = model.graph.output
    outputs.remove(next(value for value in outputs if value.name == "present_value_2"))


def half_a_product(model):
    """One product computed in float16 between casts."""
    node = nodes(model, "MatMul")[3]
    for position, name in enumerate(list(node.input)):
        cast = onnx.helper.make_node("Cast", [name], [f"half_{position}"], to=onnx.TensorProto.FLOAT16)
        model.graph.node.insert(0 if position else list(model.graph.node).index(node), cast)
        node.input[position] = f"half_{position}"
    result = node.output[0]
    node.output[0] = "half_result"
    back = onnx.helper.make_node("Cast", ["half_result"], [result], to=onnx.TensorProto.FLOAT)
    model.graph.node.insert(list(model.graph.node).index(node) + 1, back)
    names = {"half_result"}
    kept = [value for value in model.graph.value_info if value.name not in names]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)


def read_a_cache_beside_its_update(model):
    """As a residual of the cache inside the graph would: it may see the new entries and be zero falsely."""
    model.graph.node.append(onnx.helper.make_node("ReduceMax", ["past_key_1"], ["largest"], keepdims=0))
    model.graph.output.append(onnx.helper.make_tensor_value_info("largest", onnx.TensorProto.FLOAT, []))


def give_lengths(model):
    """Lengths of the caches beside the mask."""
    lengths = onnx.helper.make_node("Add", ["write_index", "write_index"], ["lengths"])
    model.graph.node.insert(0, lengths)
    nodes(model, "Attention")[0].input.extend(["", "", "lengths"])


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (give_lengths, "the input lengths"),
        (
            lambda model: nodes(model, "Attention")[0].attribute.append(onnx.helper.make_attribute("is_causal", 1)),
            "the attribute is_causal",
        ),
        (
            lambda model: nodes(model, "Attention")[0].attribute.append(
                onnx.helper.make_attribute("left_window_size", 8)
            ),
            "the attribute left_window_size",
        ),
    ],
)
def test_what_the_parser_would_drop_without_a_message_is_refused(bundle, tmp_path, edit, found):
    graph, changed = bundle / graph_path("fp32", "prefill", "full"), tmp_path / "prefill.onnx"
    model = onnx.load(graph, load_external_data=False)
    for node in nodes(model, "Attention"):
        kept = [attribute for attribute in node.attribute if attribute.name != "is_causal"]
        del node.attribute[:]
        node.attribute.extend(kept)
    onnx.save(model, changed)
    tensorrt_copy(changed, 128)
    edit(model)
    onnx.save(model, changed)
    with pytest.raises(EngineError, match=rf"blocks\.0\.attention has {found}, which TensorRT's parser drops"):
        tensorrt_copy(changed, 128)


def test_lengths_are_dropped_by_the_parser(bundle, manifest):
    """Why they are refused: the network has nothing of them, and would be built."""
    network, _keep = network_of(bundle, give_lengths)
    assert verify(RTX.load(), network, expected_network(manifest, "fp32"))["attention"] == manifest.model.n_layer
    attentions = [network.get_layer(i) for i in range(network.num_layers)]
    assert {layer.num_inputs for layer in attentions if layer.type.name == "ATTENTION_INPUT"} == {4}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (read_a_cache_beside_its_update, "reads past_key_1 beside its update, and may see the new entries"),
        (drop_a_mask, "has no mask: its window of 16 would be dropped"),
        (swap_masks, "looks back 32 positions, expected is its window of 16"),
        (one_mask_for_all, "looks back 16 positions, expected is its window of 32"),
        (see_everything_past, "looks back any number of positions, expected is its window of 16"),
        (hide_a_cache, "past_value_2, not the network output present_value_2"),
        (half_a_product, r"\(blocks\.0\.attention_out\) computes in float16, expected is float32"),
    ],
)
def test_one_thing_changed_fails_the_proof(bundle, manifest, edit, message):
    network, _keep = network_of(bundle, edit)
    with pytest.raises(EngineError, match=message):
        verify(RTX.load(), network, expected_network(manifest, "fp32"))


def test_a_graph_that_the_parser_refuses_is_refused_with_its_node(bundle):
    def spoil(model):
        nodes(model, "TensorScatter")[0].op_type = "NonsenseOp"

    with pytest.raises(EngineError, match=r"tensorrt-rtx .* cannot parse .*NonsenseOp"):
        network_of(bundle, spoil)


def test_the_log_keeps_each_message_once_and_the_memory_figures():
    log = BuildLog()
    for _ in range(2):
        log.take("WARNING", "careful\n now")
        log.take("ERROR", "no device")
        log.take("INFO", "Total Activation Memory: 123 bytes")
    log.take("WARNING", "Make sure input input_ids has Int64 binding.")
    assert (log.warnings, log.errors) == (["careful now"], ["no device"])
    assert log.memory == {"activation_bytes": [123, 123]}
    assert log.error_text() == "no device" and BuildLog().error_text()


def test_every_build_of_a_process_hears_its_own_messages(bundle):
    """TensorRT keeps the first logger of a process for good."""
    heard = []
    for _ in range(2):
        _network, parsed = network_of(bundle)
        parsed.builder.logger.log(RTX.load().ILogger.ERROR, "listen")
        heard.append(parsed.log.errors)
    assert heard == [["listen"], ["listen"]]


# The sidecar


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("plan_sha256"), "plan_sha256 is missing"),
        (lambda f: f.update(surprise=1), "surprise is not a known field"),
        (lambda f: f.update(capacity="128"), "capacity is .128., expected a whole number"),
        (lambda f: f.update(capacity=True), "capacity is True"),
        (lambda f: f.update(profiles=[{"name": "decode", "batch": [2, 1, 1], "tokens": [1, 1, 1]}]), "spans 2, 1, 1"),
        (lambda f: f.update(profiles=[{}]), "damaged"),
        (lambda f: f.update(format_version=2), "not a sidecar of format 1"),
    ],
)
def test_a_damaged_sidecar_is_refused(built, tmp_path, change, message):
    plan = tmp_path / PLAN
    fields = json.loads(sidecar_path(built).read_text())
    change(fields)
    sidecar_path(plan).write_text(json.dumps(fields))
    with pytest.raises(EngineError, match=message):
        read_sidecar(plan)


def test_a_plan_without_a_sidecar_is_refused(tmp_path):
    (tmp_path / PLAN).write_bytes(b"plan")
    with pytest.raises(EngineError, match="has no sidecar"):
        read_sidecar(tmp_path / PLAN)
    sidecar_path(tmp_path / PLAN).write_text("{")
    with pytest.raises(EngineError, match="is not valid JSON"):
        read_sidecar(tmp_path / PLAN)


# The command


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_build_and_inspect_answer_in_json_and_in_words(bundle, built):
    result = run("build", bundle, "--backend", "tensorrt-rtx", "--precision", "fp32", "--force", "--json")
    assert result.exit_code == 0, result.stderr
    fields = json.loads(result.stdout)
    assert fields["plan"] == str(built) and fields["precision"] == "fp32"
    assert fields["smoke"]["ran"] is False and fields["smoke"]["reason"] == find_gpu()[1]
    shown = run("inspect", built, "--verify", "--json")
    assert json.loads(shown.stdout) == {
        name: value for name, value in fields.items() if name not in ("plan", "commands")
    }
    assert "fp32 for tensorrt-rtx" in run("inspect", bundle).stderr
    words = run("inspect", built)
    assert "is a TensorRT engine, fp32 for tensorrt-rtx" in words.stdout
    assert "4 under 2 mask(s)" in words.stderr and "not run here" in words.stderr


def test_inspect_notices_an_altered_plan(built, tmp_path):
    folder = tmp_path / "engine"
    shutil.copytree(built.parent, folder)
    data = bytearray((folder / PLAN).read_bytes())
    data[100] ^= 1
    (folder / PLAN).write_bytes(data)
    assert run("inspect", folder / PLAN).exit_code == 0
    assert "does not match its sidecar's SHA-256" in run("inspect", folder / PLAN, "--verify").stderr
    (folder / PLAN).write_bytes(data[:-1])
    assert "truncated or altered" in run("inspect", folder / PLAN).stderr
