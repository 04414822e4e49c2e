"""`--dry-run` says what an export or a build will write, close to what it then writes, and writes nothing."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from typer.testing import CliRunner

import lrt_deploy
from lrt_deploy.bundle.engine_sidecar import engine_folder
from lrt_deploy.bundle.manifest import read_manifest
from lrt_deploy.cli.app import app
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import EngineError, ExportError
from lrt_deploy.exporters.bundle import estimate_bundle
from lrt_deploy.exporters.engine.build import estimate_engine
from lrt_deploy.exporters.estimate import GRAPH_ERROR, estimate_export
from lrt_deploy.exporters.export_options import ExportRequest

GOLDEN, CAPACITY = "mr_gqa_SSSL", 64
OPTIONS = ExportRequest(("fp32",), None, None, None, None, False, False, None, None, False, None, False)


def compare(estimate, folder):
    """Every file of the bundle is in the estimate and the reverse; exact sizes are exact, others within the bound."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert set(estimate) == set(sizes)
    exact = {name: file["bytes"] for name, file in estimate.items() if file["exact"]}
    assert exact == {name: sizes[name] for name in exact}
    assert {name for name in sizes if name.endswith((".bin", "tokenizer.json", ".sha256"))} <= set(exact)
    graphs = [name for name in sizes if name.endswith(".onnx")]
    assert [name for name in graphs if abs(estimate[name]["bytes"] / sizes[name] - 1) > GRAPH_ERROR] == []
    assert abs(sum(file["bytes"] for file in estimate.values()) / sum(sizes.values()) - 1) < 0.05


def test_the_estimate_of_the_demo_in_all_precisions_is_what_an_export_writes(root, in_every_precision, golden_of):
    from lrt_deploy.bundle.precisions import PRECISIONS

    bundle = in_every_precision("demo")
    command = ["export", str(golden_of("demo").folder), "nowhere", "--dry-run", "--json"]
    command += ["--max-seq-len", str(read_manifest(bundle).max_seq_len)]
    for precision in PRECISIONS:
        command += ["--precision", precision]
    before = set(os.listdir())  # noqa: PTH208
    report = json.loads(CliRunner().invoke(app, command).stdout)
    assert set(os.listdir()) == before  # noqa: PTH208
    compare(report["files"], bundle)
    assert report["dry_run"] and report["bytes"] == sum(file["bytes"] for file in report["files"].values())
    assert report["peak_memory_bytes"] > report["files"]["graphs/fp32/weights.bin"]["bytes"] and report["seconds"] > 0


@pytest.mark.parametrize("block", [None, 64])
def test_blocks_of_int4_that_are_not_full_count_whole(int4_in_blocks, block):
    bundle = int4_in_blocks(block)
    manifest = read_manifest(bundle)
    options = {"precision": "int4-weight-only", "int4_block": block}
    estimate = estimate_bundle(bundle.with_name(f"{bundle.name}.checkpoint"), bundle.with_name("nowhere"), **options)
    name = "graphs/int4-weight-only/weights.bin"
    assert estimate.files[name].bytes == manifest.files[name].bytes


def test_tables_on_the_host_and_narrow_ones_are_counted(host_embeddings_once, golden_of, tmp_path):
    bundle = host_embeddings_once(GOLDEN)
    estimate = estimate_bundle(
        golden_of(GOLDEN).folder, tmp_path / "nowhere", max_seq_len=CAPACITY, host_embeddings=True
    )
    manifest = read_manifest(bundle)
    for name in ("graphs/fp32/tables.bin", "graphs/fp32/weights.bin"):
        if manifest.max_seq_len == CAPACITY or "tables" in name:
            assert estimate.files[name].bytes == manifest.files[name].bytes
    assert list(tmp_path.iterdir()) == []


def test_calibration_and_size_cost_memory_and_time(tmp_path):
    from dataclasses import replace

    def of(precision, width=256):
        config = LRTConfig(sequence_len=256, vocab_size=512, n_layer=4, n_head=4, n_kv_head=4, n_embd=width)
        return estimate_export(config, replace(OPTIONS, precisions=(precision,)), 256, (), {}, tmp_path)

    assert of("int8").seconds > of("fp32").seconds and of("fp32", 512).seconds > of("fp32").seconds
    assert of("int8").peak_memory_bytes > of("fp32").peak_memory_bytes
    assert of("int4-weight-only").bytes < of("int8").bytes < of("fp16").bytes < of("fp32").bytes


def test_a_dry_run_refuses_what_an_export_would(export_once, golden_of, tmp_path):
    checkpoint, bundle = golden_of(GOLDEN).folder, export_once(GOLDEN)
    with pytest.raises(ExportError, match="exists; choose another folder"):
        estimate_bundle(checkpoint, bundle)
    with pytest.raises(ExportError, match="has fp32 already"):
        estimate_bundle(checkpoint, bundle, add=True)
    with pytest.raises(ExportError, match="max_seq_len is 0"):
        estimate_bundle(checkpoint, tmp_path / "new", max_seq_len=0)
    added = estimate_bundle(checkpoint, bundle, add=True, precision="bf16")
    assert "graphs/bf16/weights.bin" in added.files and "graphs/fp32/weights.bin" not in added.files


def test_a_dry_run_for_people_names_each_file(golden_of, tmp_path):
    result = CliRunner().invoke(app, ["export", str(golden_of(GOLDEN).folder), str(tmp_path / "new"), "--dry-run"])
    assert result.stdout.startswith(f"would export {tmp_path / 'new'}: ") and "on one core" in result.stdout
    assert "graphs/fp32/weights.bin" in result.stderr and "prefill.onnx" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_of_a_build_writes_nothing_and_says_what_it_takes(export_once):
    bundle = export_once(GOLDEN)
    before = sorted(bundle.rglob("*"))
    command = ["build", str(bundle), "--backend", "tensorrt-rtx", "--dry-run", "--json"]
    report = json.loads(CliRunner().invoke(app, command).stdout)
    weights = read_manifest(bundle).files["graphs/fp32/weights.bin"].bytes
    assert list(report["files"]) == ["engines/tensorrt-rtx-fp32/lrt.plan"]
    assert report["bytes"] > weights and report["peak_memory_bytes"] > weights and report["seconds"] > 0
    assert sorted(bundle.rglob("*")) == before


def test_the_dry_run_of_a_build_refuses_what_a_build_would(export_once, tmp_path):
    bundle = shutil.copytree(export_once(GOLDEN), tmp_path / "bundle")
    place = engine_folder(bundle, "tensorrt-rtx", "fp32")
    place.mkdir(parents=True)
    with pytest.raises(EngineError, match="exists; pass --force"):
        estimate_engine(bundle, "tensorrt-rtx")
    with pytest.raises(EngineError, match="int8"):
        estimate_engine(bundle, "tensorrt-rtx", "int8")


def test_the_plan_of_a_built_engine_is_near_its_estimate(in_every_precision, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheels for this platform")
    bundle = shutil.copytree(in_every_precision("demo"), tmp_path / "bundle")
    estimate = estimate_engine(bundle, "tensorrt-rtx", "fp32")
    sidecar = lrt_deploy.build_engine(bundle, backend="tensorrt-rtx", precision="fp32")
    assert abs(estimate.bytes / sidecar.plan_bytes - 1) < 0.25, (estimate, sidecar.plan_bytes)
