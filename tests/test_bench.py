"""The bench: its JSON fields, its plot, and that bytes and errors are what they are said to be. No times are judged."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import util
from itertools import pairwise

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

import lrt_deploy
from lrt_deploy import figures
from lrt_deploy.bundle.contract import FLAVOURS
from lrt_deploy.bundle.manifest import FileRecord, graph_path, read_manifest
from lrt_deploy.bundle.precisions import PRECISIONS
from lrt_deploy.bundle.weights import matrix_elements
from lrt_deploy.cli.app import app
from lrt_deploy.runtime import bench
from lrt_deploy.runtime.fixed_point import SweepOptions

pytestmark = pytest.mark.slow  # for the exports

NAME, PLAIN = "mr_gqa_SSSL", "baseline_ve"
SMALL = ("--prompt-tokens", 8, "--new-tokens", 6, "--repeats", 2, "--prefill-lengths", "16,64,4096")
PNG = b"\x89PNG\r\n\x1a\n"


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def refusal(*args, code=1):
    result = run("bench", *args)
    assert result.exit_code == code, result.output
    assert "error" in json.loads(result.stdout) if "--json" in args else result.stdout == ""
    return result.stderr


@pytest.fixture(scope="module")
def small_memory():
    """A bandwidth in no time; its value means nothing then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_SMALLEST_TRIAD_BYTES", 2**20)
        patch.setattr(bench, "_LARGEST_TRIAD_BYTES", 2**20)
        yield


@pytest.fixture(scope="module")
def bundles(export_once, tmp_path_factory):
    """name -> a copy of a bundle that may be written to."""
    folder = tmp_path_factory.mktemp("bench")

    def get(name):
        if not (folder / name).exists():
            shutil.copytree(export_once(name), folder / name)
        return folder / name

    return get


@pytest.fixture(scope="module")
def document(bundles, small_memory):
    arguments = [str(argument) for argument in ("bench", bundles(NAME), *SMALL, "--json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lrt-deploy", *arguments])
        result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


# What is reported


def test_the_document_has_the_fields_that_scripts_rely_on(document):
    assert (document["backend"], document["precision"]) == ("ort-cpu", "fp32")
    for name in ("ttft_ms", "tpot_ms"):
        assert document[name]["p50"] > 0 and document[name]["p99"] is None
        assert 0 < document["samples"][name] < 100
    assert document["tokens_per_s"] == pytest.approx(1e3 / document["tpot_ms"]["p50"])
    assert document["bandwidth_gb_s"] > 0 and document["read_bandwidth_gb_s"] > 0
    assert document["open_ms"] > 0 and document["first_ttft_ms"] > 0
    assert 0 < document["outside_backend_fraction"] < 1
    assert document["peak_rss_bytes"] > 2**20
    assert (document["state_bytes_copied_per_step"], document["state_bytes_copied_note"]) == (0, None)
    assert document["bandwidth_of"] == "triad, 1 thread"
    assert document["state_bytes_written_per_step"] == 4 * (4 * 2 * 32 + 64)  # a key and a value per layer, the latent
    assert document["latent_record_bytes_per_step"] == 4 * 64
    assert document["logits_bytes_written_per_step"] == 3 * 4 * 320
    read = document["weight_bytes_per_step"] + document["state_bytes_read_per_step"]
    seconds = document["tpot_ms"]["p50"] / 1e3
    assert document["roofline_fraction"] == pytest.approx(read / seconds / document["bandwidth_gb_s"] / 1e9)


def test_the_environment_says_what_ran_where(document):
    environment = document["environment"]
    assert environment["cpu"] and environment["platform"] and environment["python"]
    assert environment["threads"] == 1  # small models run on one
    assert re.fullmatch(r"lrt-deploy bench \S+ --prompt-tokens 8 .* --json", environment["command"])
    assert {"lrt-deploy", "onnxruntime", "numpy"} <= {name for name, found in environment["versions"].items() if found}


def test_every_policy_is_compared_at_every_length_that_fits(document):
    rows = document["prefill"]
    assert document["prefill_lengths_left_out"] == [4096]
    expected = [
        ("stepwise", "stepwise"),
        ("fixed-point", f"interleaved, stride {SweepOptions().stride}"),
        ("fixed-point", "plain"),
    ]
    expected.append(("zero", "one pass with zero memory"))
    for length in (16, 64):
        found = [row for row in rows if row["tokens"] == length]
        assert [(row["policy"], row["algorithm"]) for row in found] == expected
        stepwise, *iterated, zero = found
        assert (stepwise["speedup"], stepwise["kl"], stepwise["max_abs_latent_error"]) == (1, 0, 0)
        assert all(row["max_abs_latent_error"] <= max(row["residual"], 1e-5) for row in iterated)
        assert (zero["passes"], zero["residual"]) == (1, None)
        assert zero["max_abs_latent_error"] > 0.1 and zero["kl"] > 1e-3  # what the others are not
        assert [row["auto"] for row in found] == [True, False, False, False]  # a small model in float32
        for row in found:
            assert 0 < row["min_seconds"] <= row["seconds"]
            assert row["speedup"] == pytest.approx(stepwise["seconds"] / row["seconds"])


def test_a_tolerance_reaches_the_iterations(bundles, small_memory):
    result = run("bench", bundles(NAME), *SMALL[:-1], "16", "--tolerance", "1e-5", "--json")
    rows = json.loads(result.stdout)["prefill"]
    assert all(row["residual"] <= 1e-5 for row in rows if row["policy"] == "fixed-point")


def test_errors_fall_sweep_by_sweep_and_faster_when_interleaved(document):
    points = document["convergence"]
    assert {point["tokens"] for point in points} == {64}
    curves = [[p for p in points if p["algorithm"].startswith(name)] for name in ("plain", "interleaved")]
    for curve in curves:
        assert [point["passes"] for point in curve] == list(range(1, len(curve) + 1))
        errors = [point["max_abs_latent_error"] for point in curve]
        assert errors[-1] < 1e-2 * errors[0]
        assert all(later < 1.05 * earlier for earlier, later in pairwise(errors) if earlier > 1e-4)
        assert all(a["seconds"] < b["seconds"] for a, b in pairwise(curve))
    plain, interleaved = curves
    assert len(interleaved) < len(plain)  # both end at the same error


def test_convergence_leaves_the_slots_in_order(decoder_of):
    """What is read afterwards on the same buffers is what it was before."""
    decoder = decoder_of(NAME)
    tokens = bench.random_tokens(40, decoder.config.vocab_size, seed=1)
    before = decoder.prefill([tokens], policy="stepwise").logits
    bench.measure_convergence(decoder, tokens, lambda what, done, total: None)
    assert np.array_equal(decoder.prefill([tokens], policy="stepwise").logits, before)


def test_the_comparison_puts_the_prefill_options_back(decoder_of):
    decoder = decoder_of(NAME)
    before = decoder.prefill_options
    bench.compare_prefill(decoder, [1, 2, 3] * 8, 1, None, lambda what, done, total: None)
    assert decoder.prefill_options == before


def test_a_model_without_memory_has_nothing_to_iterate(bundles, small_memory):
    result = run("bench", bundles(PLAIN), *SMALL, "--json")
    assert result.exit_code == 0, result.stderr
    fields = json.loads(result.stdout)
    assert [row["algorithm"] for row in fields["prefill"]] == ["stepwise", "one pass"] * 2
    assert fields["convergence"] == []
    assert fields["state_bytes_copied_per_step"] == fields["latent_record_bytes_per_step"] == 0


def test_people_get_one_line_and_a_table(bundles, small_memory):
    result = run("bench", bundles(NAME), *SMALL)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert " ms a token (" in result.stdout and "; a prompt of 64 tokens is read " in result.stdout
    for part in (
        "0 bytes copied",
        "16 stride 1 ",
        "64 stepwise",
        "4096 tokens do not fit",
        "GB/s (triad, 1 thread)",
    ):
        assert part in result.stderr


def test_prompts_can_come_from_a_text(bundles, small_memory, tmp_path):
    (tmp_path / "text").write_text("The river rose in the night. " * 5)
    result = run("bench", bundles(NAME), *SMALL, "--text", tmp_path / "text", "--json")
    assert result.exit_code == 0, result.stderr
    (tmp_path / "text").write_text("a")
    message = refusal(bundles(NAME), *SMALL, "--text", tmp_path / "text")
    assert "--prompt-tokens is 8; the text and the capacity give 2" in message


def test_what_cannot_be_measured_is_refused(bundles):
    bundle = bundles(NAME)
    assert "do not fit the capacity of 128" in refusal(bundle, "--prompt-tokens", 100, "--new-tokens", 64)
    assert "2 new tokens" in refusal(bundle, "--new-tokens", 1)
    assert "1 repeat" in refusal(bundle, "--repeats", 0)
    for lengths in ("32,x", "0", "-1", "1.5"):
        assert "Usage: " in refusal(bundle, f"--prefill-lengths={lengths}", code=2)


# Bytes


def test_weight_bytes_are_those_of_every_matrix_and_one_row_of_each_table(export_once):
    """4 layers, width 64, 4 heads of 16 of which 2 hold keys and values, gates from all channels, 320 tokens."""
    manifest = read_manifest(export_once(NAME))
    config = manifest.model
    facts = (config.n_layer, config.n_embd, config.kv_dim, config.n_kv_head, config.gate_channels)
    assert (*facts, config.padded_vocab_size) == (4, 64, 32, 2, 64, 320)
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 64 * 6 + 2 * 64 * 256  # q k v, output, gates, MLP
    memory, head = 64 * 4 * 2 * 32, 64 * 320
    assert matrix_elements(config) == 4 * layer + memory + head == 218_624
    rows = 64 + 4 * 32  # of wte and of four value-embedding tables
    assert bench.weight_bytes_per_step(manifest, "fp32") == 4 * 218_624 + 4 * rows
    weights = "graphs/fp32/weights.bin"
    halved = FileRecord(manifest.files[weights].bytes - 2 * 320 * rows, "")  # as if the tables were in bfloat16
    manifest = msgspec.structs.replace(manifest, files=manifest.files | {weights: halved})
    assert bench.weight_bytes_per_step(manifest, "fp32") == 4 * 218_624 + 2 * rows


def test_state_bytes_follow_the_live_windows(export_once):
    """Windows of 16, 16, 16 and 32 keys: 2 x 32 numbers a key, and 64 of the latent."""
    config = read_manifest(export_once(NAME)).model
    assert config.windows == (16, 16, 16, 32)
    read = [bench.state_bytes_per_step(config, context)["state_bytes_read_per_step"] for context in (10, 500)]
    assert read == [4 * (4 * 10 * 64 + 64), 4 * ((16 * 3 + 32) * 64 + 64)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_matrix_bytes_are_those_of_the_graph(in_every_precision, precision, flavour):
    """What every product reads of its matrix, in the type after the Casts that are folded when it is loaded."""
    bundle = in_every_precision(NAME)
    found = read_by_products(ir.load(bundle / graph_path(precision, "decode_step", flavour)).graph)
    assert bench.matrix_bytes(read_manifest(bundle), precision, flavour) == found


def test_scales_are_counted(in_every_precision):
    """The twin: without them a quantized matrix would seem smaller."""
    manifest = read_manifest(in_every_precision(NAME))
    elements = matrix_elements(manifest.model)
    assert bench.matrix_bytes(manifest, "int4-weight-only", "windowed") > 1.2 * elements / 2
    assert bench.matrix_bytes(manifest, "int8", "windowed") > elements


def read_by_products(graph):
    def read(value):
        """(elements, bits of each) of all initializers behind a value."""
        node = value.producer()
        if node is None:
            return [(value.const_value.size, value.dtype.bitwidth)]
        if node.op_type == "Cast":
            return [(size, node.outputs[0].dtype.bitwidth) for size, _ in read(node.inputs[0])]
        return [part for source in node.inputs if source is not None for part in read(source)]

    products = [node for node in graph if node.op_type == "MatMul"]
    return sum(size * bits // 8 for node in products for size, bits in read(node.inputs[1]))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_triad_computes_all_of_its_arrays(threads, monkeypatch):
    seen = []
    triad = bench._triad
    monkeypatch.setattr(bench, "_triad", lambda arrays: (triad(arrays), seen.append(arrays)))
    assert bench.triad_gb_s(threads, array_bytes=2**20) > 0
    assert {len(arrays[0]) for arrays in seen} == {2**17 // threads}
    assert all((arrays[0] == 4).all() for arrays in seen)  # 1 + 3 * 1


# The plot


def test_the_plot_lies_in_the_bundle_and_the_bundle_still_opens(document, bundles):
    path = bundles(NAME) / "reports" / "prefill.png"
    assert document["plot"] == str(path)
    assert path.read_bytes()[:8] == PNG
    lrt_deploy.open_decoder(bundles(NAME), verify=True).close()


def test_plot_puts_it_elsewhere(document, bundles, small_memory, tmp_path):
    path = tmp_path / "new" / "plot.png"
    assert run("bench", bundles(NAME), *SMALL[:-1], "16", "--plot", path).exit_code == 0
    assert path.read_bytes()[:8] == PNG


def test_a_file_of_another_kind_is_not_replaced_by_a_plot(bundles, tmp_path):
    """Said before anything is measured."""
    path = tmp_path / "thesis.tex"
    path.write_text("years of work")
    assert "thesis.tex exists and is a file of another kind; the plot" in refusal(bundles(NAME), "--plot", path)
    assert path.read_text() == "years of work"


def test_without_lengths_there_is_nothing_to_plot(bundles, small_memory):
    result = run("bench", bundles(NAME), *SMALL[:-1], "", "--json")
    fields = json.loads(result.stdout)
    assert (fields["prefill"], fields["convergence"], fields["plot"]) == ([], [], None)


def test_plots_are_drawn_without_convergence(document, tmp_path):
    figures.plot_prefill(tmp_path / "a.png", document["prefill"], [], "title")
    assert (tmp_path / "a.png").read_bytes()[:8] == PNG


def test_without_matplotlib_the_extra_is_named_at_once(bundles, monkeypatch, tmp_path, small_memory):
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest))
    message = refusal(bundles(NAME), "--plot", tmp_path / "a.png")
    assert message.startswith("error: ") and "install the extra 'bench'" in message
    result = run("bench", bundles(NAME), *SMALL[:-1], "16", "--json")
    assert json.loads(result.stdout)["plot"] is None


def test_measuring_imports_neither_torch_nor_matplotlib():
    code = "import sys; from lrt_deploy import figures; from lrt_deploy.runtime import bench; "
    code += "import lrt_deploy.cli.bench; "
    code += "print(sorted({'torch', 'matplotlib', 'onnxruntime'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
