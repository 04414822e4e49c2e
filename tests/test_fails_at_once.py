"""What cannot work is refused before anything that takes time: before weights are read or a bundle is opened.

"At once" is held by what must not have happened yet, never by a clock.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lrt_deploy
from lrt_deploy import files
from lrt_deploy.bundle import engine_sidecar, manifest
from lrt_deploy.cli import options
from lrt_deploy.cli.app import app
from lrt_deploy.errors import ExportError
from lrt_deploy.exporters import bundle as exporting
from lrt_deploy.exporters import export_options

CHECKPOINT = Path(__file__).parent / "data" / "golden" / "mr_gqa_SSSL"


def refusal(*args, **kwargs):
    result = CliRunner().invoke(app, [str(arg) for arg in args], **kwargs)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    return result.stderr


@pytest.fixture
def untraced(monkeypatch):
    """An export that ends by an error of its own where weights would be read."""

    def reached(*args):
        raise AssertionError("the weights were reached")

    monkeypatch.setattr(exporting, "_write_graphs", reached)


@pytest.fixture
def unopened(monkeypatch):
    """A bundle that ends by an error of its own where it would be opened."""

    def reached(*args):
        raise AssertionError("the bundle was opened")

    monkeypatch.setattr(options.DecoderOptions, "open", reached)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep-high", "nonsense"), "keep_high names 'nonsense', and no matrix of this model"),
        (("--max-batch-size", 10**7), "2^31 elements, the limit of TensorRT"),
        (("--max-batch-size", 10**7), "GB of memory"),
        (("--max-batch-size", 0), "expected at least 1"),
        (("--calibration", "/nowhere/text"), "the calibration text /nowhere/text does not exist"),
        (("--tokenizer", "/nowhere"), "/nowhere"),
        (("--precision", "fp32", "--int4-block", "32"), "has no int4 weights"),
    ],
)
def test_options_of_export_are_checked_before_the_weights_are_read(arguments, message, tmp_path, untraced):
    assert message in refusal("export", CHECKPOINT, tmp_path / "bundle", *arguments)
    assert not list(tmp_path.iterdir())


def test_options_that_need_no_model_are_checked_before_the_checkpoint_is_opened(tmp_path):
    with pytest.raises(ExportError, match="precision is fp23"):
        lrt_deploy.export_bundle(tmp_path / "no-checkpoint", tmp_path / "bundle", precision="fp23")


def test_a_target_below_a_file_is_refused_before_the_checkpoint_is_opened(tmp_path):
    (tmp_path / "file").touch()
    found = refusal("export", tmp_path / "no-checkpoint", tmp_path / "file" / "bundle")
    assert "cannot be made" in found and f"{tmp_path / 'file'} is not a folder" in found


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_target_without_rights_is_refused_before_the_checkpoint_is_opened(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "may not be written to" in refusal("export", tmp_path / "none", tmp_path / "locked" / "bundle")


def test_rights_are_asked_of_the_nearest_parent_that_exists(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((Path(path), mode)))
    with pytest.raises(ExportError, match="may not be written to"):
        files.check_writable(tmp_path / "a" / "b", ExportError)
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


def test_a_disk_without_room_is_named_with_what_is_needed(tmp_path, monkeypatch, untraced):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    found = refusal("export", CHECKPOINT, tmp_path / "bundle")
    assert "0.00 GB are free there" in found and "for the weights in fp32" in found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_room_that_is_asked_for_is_less_than_a_bundle_takes(precision, in_every_precision):
    folder = in_every_precision("mr_gqa_SSSL")
    found = manifest.read_manifest(folder)
    taken = sum(record.bytes for name, record in found.files.items() if name.startswith(f"graphs/{precision}/"))
    assert 0.3 * taken < export_options.weight_bytes(found.model, precision) <= taken


def test_build_says_nothing_before_it_has_checked_the_bundle(tmp_path):
    found = refusal("build", tmp_path / "none", "--backend", "tensorrt-rtx")
    assert found.startswith("error: ") and found.count("\n") == 1


# one thing in place of another


def test_a_checkpoint_is_not_taken_for_a_bundle():
    for verb in (["generate", "--prompt", "x"], ["chat"], ["bench"], ["build"], ["parity", "--check", "all"]):
        found = refusal(verb[0], CHECKPOINT, *verb[1:])
        assert f"{CHECKPOINT} is a checkpoint, not a bundle; export it: lrt-deploy export {CHECKPOINT} BUNDLE" in found
    assert "is a checkpoint" in refusal("eval", CHECKPOINT, __file__)


def test_a_bundle_is_not_taken_for_a_checkpoint(export_once, tmp_path):
    bundle = export_once("mr_gqa_SSSL")
    assert f"{bundle} is a bundle, not a checkpoint" in refusal("export", bundle, tmp_path / "other")
    assert "is a bundle, not a checkpoint" in refusal("parity", bundle, "--checkpoint", bundle)


def test_an_engine_and_a_graph_are_named_as_such(tmp_path):
    engine = tmp_path / "engines" / "tensorrt-fp16"
    engine.mkdir(parents=True)
    (engine / engine_sidecar.PLAN).touch()
    (tmp_path / "a.onnx").touch()
    assert f"{engine} is an engine, not a bundle" in refusal("generate", engine, "--prompt", "x")
    assert "a.onnx is a graph, not a bundle" in refusal("chat", tmp_path / "a.onnx")
    assert "is an engine, not a checkpoint" in refusal("export", engine, tmp_path / "b")
    assert "has no sidecar" in refusal("inspect", engine)  # and with one it is shown
    assert manifest.kind_of(tmp_path / "nowhere") is manifest.kind_of(tmp_path) is None


# the other verbs


@pytest.mark.parametrize("verb", [["generate", "b", "--prompt", "x"], ["chat", "b"]])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", -1, "temperature is -1.0"),
        ("--top-p", 2, "top_p is 2.0"),
        ("--top-k", -1, "top_k is -1"),
        ("--min-p", "nan", "min_p is nan"),
        ("--seed", -1, "seed is -1"),
        ("--repetition-penalty", 0, "repetition_penalty is 0.0"),
        ("--max-new-tokens", 0, "max_new_tokens is 0"),
        ("--tolerance", "nan", "tolerance is nan"),
    ],
)
def test_sampling_is_checked_before_the_bundle_is_opened(verb, option, value, message, unopened):
    assert message in refusal(*verb, option, value, input="hi\n")


def test_files_that_are_not_there_are_named_before_the_bundle_is_opened(unopened, tmp_path):
    gone = tmp_path / "gone"
    for command in (
        ["eval", "b", gone],
        ["bench", "b", "--text", gone],
        ["parity", "b", "--golden", gone],
        ["parity", "b", "--checkpoint", gone],
    ):
        assert f"{gone} does not exist" in refusal(*command)


def test_a_plot_that_cannot_be_written_is_refused_before_the_bundle_is_opened(unopened, tmp_path):
    (tmp_path / "file").touch()
    found = refusal("bench", "b", "--plot", tmp_path / "file" / "x.png")
    assert f"{tmp_path / 'file' / 'x.png'} cannot be made: {tmp_path / 'file'} is not a folder" in found


def test_eval_refuses_a_batch_beyond_the_bundle_s_before_it_reads_the_file(export_once, tmp_path):
    (tmp_path / "text").write_bytes(b"\xff")  # reading it would fail
    bundle = export_once("mr_gqa_SSSL")
    found = refusal("eval", bundle, tmp_path / "text", "--batch-size", 10**6)
    assert "--batch-size is 1000000; this bundle was exported for 1 to " in found


def test_a_chat_refuses_what_it_cannot_read_before_the_first_message(export_once):
    bundle = export_once("mr_gqa_SSSL")
    found = refusal("chat", bundle, "--system", "word " * 500, input="hi\n")
    assert "the system message leaves no room" in found
