"""`export --add` puts a precision into an existing bundle, whole or not at all; nothing that was there changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import lrt_deploy
from lrt_deploy.bundle.manifest import read_manifest, verify_files
from lrt_deploy.cli.app import app
from lrt_deploy.errors import BundleError, ExportError
from lrt_deploy.exporters import existing
from lrt_deploy.exporters.graph import trace

GOLDEN = "mr_gqa_SSSL"
PROMPT, STEPS = [1, 2, 3], 8


@pytest.fixture(scope="module", autouse=True)
def trace_once():
    """Trace this golden once for all tests here: it takes most of an export's time."""
    original, traced = trace.trace, {}

    def once(model):
        if (key := (model.config, model.cos.shape)) not in traced:
            traced[key] = original(model)
        return traced[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "trace", once)
        yield


@pytest.fixture
def bundle(export_once, tmp_path):
    return shutil.copytree(export_once(GOLDEN), tmp_path / "bundle")


@pytest.fixture
def checkpoint(golden_of):
    return golden_of(GOLDEN).folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def greedy(folder, precision):
    with lrt_deploy.open_decoder(folder, precision=precision) as decoder:
        return [event.token for event in decoder.generate(PROMPT, STEPS)]


def test_an_added_precision_is_the_one_that_an_export_of_both_makes(bundle, checkpoint, in_every_precision):
    before, old = read_manifest(bundle), contents(bundle)
    inode = (bundle / "graphs/fp32/weights.bin").stat().st_ino
    report = json.loads(
        CliRunner()
        .invoke(app, ["export", str(checkpoint), str(bundle), "--add", "--precision", "int8", "--json"])
        .stdout
    )
    manifest, both = read_manifest(bundle), read_manifest(in_every_precision(GOLDEN))
    assert report["precisions"] == list(manifest.precisions) == ["fp32", "int8"]
    assert {name: record for name, record in manifest.files.items() if name in before.files} == before.files
    assert manifest.files == {name: both.files[name] for name in manifest.files}  # bit for bit
    assert manifest.precision_details["int8"] == both.precision_details["int8"]
    assert manifest.precision_details["calibration"] == both.precision_details["calibration"]
    assert manifest.provenance["added"] == {"int8": manifest.provenance["versions"]}
    new = contents(bundle)
    assert all(new[name] == old[name] for name in old if not name.startswith("manifest."))
    assert (bundle / "graphs/fp32/weights.bin").stat().st_ino == inode  # a link, not a second copy on the disk
    verify_files(bundle, manifest, force=True)
    assert os.listdir(bundle.parent) == ["bundle"]  # noqa: PTH208
    assert greedy(bundle, "int8") == greedy(in_every_precision(GOLDEN), "int8")


def test_a_process_that_has_the_bundle_open_goes_on(bundle, checkpoint):
    """Its decoder, a second one that it opens afterwards, and a state that it saved before."""
    code = (
        "import sys, lrt_deploy\n"
        "def said(tokens): print(*tokens, flush=True)\n"
        "bundle, state = sys.argv[1:]\n"
        "with lrt_deploy.open_decoder(bundle) as decoder:\n"
        "    decoder.prefill([[1, 2, 3]]).save(state)\n"
        "    said(e.token for e in decoder.generate([1, 2, 3], 8))\n"
        "    sys.stdin.readline()\n"
        "    said(e.token for e in decoder.generate([1, 2, 3], 8))\n"
        "    with lrt_deploy.open_decoder(bundle) as second:\n"
        "        said(e.token for e in second.generate(None, 8, state=second.load_state(state)))\n"
    )
    command = [sys.executable, "-c", code, str(bundle), str(bundle.parent / "a.state")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        lrt_deploy.export_bundle(checkpoint, bundle, precision="bf16", add=True)
        rest, _ = process.communicate("go on\n", timeout=120)
    assert process.returncode == 0
    assert [first, first] == rest.splitlines(keepends=True) and len(first.split()) == STEPS


def test_what_is_not_in_the_manifest_is_taken_over_at_the_last_moment(bundle, checkpoint, monkeypatch):
    """Engines, reports, links and a file of somebody else; those written while the export ran too."""
    (bundle / "engines/tensorrt-fp32").mkdir(parents=True)
    (bundle / "engines/tensorrt-fp32/lrt.plan").write_bytes(b"first")
    (bundle / "notes.txt").write_text("mine")
    (bundle / "elsewhere").symlink_to("graphs")
    (bundle / "engines").chmod(0o700)

    def progress(what, done, total):
        if what == "hashing":
            (bundle / "engines/tensorrt-fp32/lrt.plan").unlink()
            (bundle / "engines/tensorrt-fp32/lrt.plan").write_bytes(b"second")
            (bundle / "reports").mkdir()
            (bundle / "reports/page.html").write_text("a page")

    lrt_deploy.export_bundle(checkpoint, bundle, precision="bf16", add=True, progress=progress)
    assert (bundle / "engines/tensorrt-fp32/lrt.plan").read_bytes() == b"second"
    assert (bundle / "reports/page.html").read_text() == "a page"
    assert (bundle / "notes.txt").read_text() == "mine"
    assert (bundle / "elsewhere").is_symlink() and (bundle / "elsewhere/bf16").is_dir()
    assert (bundle / "engines").stat().st_mode & 0o777 == 0o700


def test_without_hard_links_the_files_are_copied(bundle, checkpoint, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(1, "Operation not permitted")

    before, inode = read_manifest(bundle), (bundle / "graphs/fp32/weights.bin").stat().st_ino
    monkeypatch.setattr(existing.os, "link", refuse)
    manifest = lrt_deploy.export_bundle(checkpoint, bundle, precision="bf16", add=True)
    verify_files(bundle, manifest, force=True)
    assert manifest.files.items() > before.files.items()
    assert (bundle / "graphs/fp32/weights.bin").stat().st_ino != inode


def test_a_link_to_a_bundle_stays_a_link(bundle, checkpoint):
    link = bundle.with_name("link")
    link.symlink_to("bundle")
    lrt_deploy.export_bundle(checkpoint, link, precision="bf16", add=True)
    assert link.is_symlink() and read_manifest(bundle).precisions == ("fp32", "bf16")


def test_tables_on_the_host_stay_there_in_the_added_precision(host_embeddings_once, checkpoint, tmp_path):
    bundle = shutil.copytree(host_embeddings_once(GOLDEN), tmp_path / "bundle")
    manifest = lrt_deploy.export_bundle(checkpoint, bundle, precision="bf16", add=True)
    assert set(manifest.tables) == {"fp32", "bf16"} and read_manifest(bundle) == manifest


def test_a_precision_that_was_measured_on_another_text_says_so(bundle, checkpoint, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("A text of one's own. " * 40)
    lrt_deploy.export_bundle(checkpoint, bundle, precision="fp16", add=True)
    details = lrt_deploy.export_bundle(
        checkpoint, bundle, precision="int8-weight-only", add=True, calibration=text
    ).precision_details
    assert details["calibration"]["text"] != "own.txt" == details["int8-weight-only"]["calibration"]["text"]
    assert "calibration" not in details["fp16"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp32"}, ["has fp32 already", "it holds fp32"]),
        ({"max_seq_len": 33}, ["max_seq_len is 33", "exported with"]),
        ({"max_batch_size": 3}, ["max_batch_size is 3", "exported with 8"]),
        ({"host_embeddings": True}, ["host_embeddings is True", "exported with False"]),
        ({"force": True}, ["leave --force"]),
        ({"tokenizer": "none"}, ["leave --tokenizer"]),
    ],
)
def test_options_that_contradict_the_bundle_are_refused_before_the_checkpoint_is_read(bundle, options, words):
    old = contents(bundle)
    with pytest.raises(ExportError) as caught:
        lrt_deploy.export_bundle("no such checkpoint", bundle, add=True, **{"precision": "bf16"} | options)
    assert all(word in str(caught.value) for word in words)
    assert contents(bundle) == old


def test_another_checkpoint_or_configuration_is_refused_with_both_values(bundle, checkpoint, golden_of, tmp_path):
    old, origin = contents(bundle), read_manifest(bundle).provenance["checkpoint"]["sha256"]
    with pytest.raises(ExportError, match=f"has the SHA-256 [0-9a-f]{{64}}.*{origin}"):
        lrt_deploy.export_bundle(golden_of("padded_vocab").folder, bundle, precision="bf16", add=True)
    changed = shutil.copytree(checkpoint, tmp_path / "changed")
    (meta,) = changed.glob("meta_*.json")
    fields = json.loads(meta.read_text())
    length = fields["model_config"]["sequence_len"]
    fields["model_config"]["sequence_len"] = 2 * length
    meta.write_text(json.dumps(fields))
    with pytest.raises(ExportError, match=f"says sequence_len {2 * length}, and .* was exported with {length}"):
        lrt_deploy.export_bundle(changed, bundle, precision="bf16", add=True)
    assert contents(bundle) == old


def test_a_damaged_bundle_and_a_missing_one_are_refused(bundle, checkpoint, tmp_path):
    with pytest.raises(ExportError, match="does not exist"):
        lrt_deploy.export_bundle(checkpoint, tmp_path / "missing", precision="bf16", add=True)
    weights = bundle / "graphs/fp32/weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(BundleError, match="altered"):
        lrt_deploy.export_bundle(checkpoint, bundle, precision="bf16", add=True)


def test_a_bundle_that_was_replaced_meanwhile_stays_as_it_is(bundle, checkpoint, in_every_precision):
    def progress(what, done, total):
        if what == "hashing":
            shutil.rmtree(bundle)
            shutil.copytree(in_every_precision(GOLDEN), bundle)

    with pytest.raises(ExportError, match="was replaced while a precision was added"):
        lrt_deploy.export_bundle(checkpoint, bundle, precision="bf16", add=True, progress=progress)
    assert contents(bundle) == contents(in_every_precision(GOLDEN))


def test_an_error_while_it_is_added_leaves_the_old_bundle_and_nothing_else(bundle, checkpoint):
    def progress(what, done, total):
        if what == "hashing":
            raise KeyboardInterrupt

    old = contents(bundle)
    with pytest.raises(KeyboardInterrupt):
        lrt_deploy.export_bundle(checkpoint, bundle, precision="bf16", add=True, progress=progress)
    assert contents(bundle) == old and os.listdir(bundle.parent) == ["bundle"]  # noqa: PTH208
