"""Options of `lrt-deploy build`, on real builds by TensorRT-RTX: what goes into the sidecar, and what is refused."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lrt_deploy.bundle.engine_sidecar import PLAN, read_sidecar
from lrt_deploy.bundle.manifest import graph_path, read_manifest
from lrt_deploy.bundle.tensorrt_libraries import LIBRARIES
from lrt_deploy.cli import build
from lrt_deploy.cli.app import app
from lrt_deploy.errors import EngineError
from lrt_deploy.exporters.engine.tensorrt import build as build_plan
from lrt_deploy.exporters.engine.tensorrt import parse, tensorrt_copy
from lrt_deploy.runtime.opening import Choice, limit_batch

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheels for this platform")

NAME = "mr_gqa_SSSL"
OPTIONS = ("--max-batch-size", 2, "--chunk-tokens", 16, "--workspace", "64MiB", "--verbose")


def run(*args):
    return CliRunner().invoke(app, ["build", *map(str, args)])


@pytest.fixture(scope="module")
def bundle(export_once, tmp_path_factory):
    folder = tmp_path_factory.mktemp("build") / "bundle"
    shutil.copytree(export_once(NAME), folder)
    return folder


@pytest.fixture(scope="module")
def built(bundle):
    result = run(bundle, "--backend", "tensorrt-rtx", *OPTIONS, "--json")
    assert result.exit_code == 0, result.stderr
    return result


def test_the_profiles_are_what_was_asked_for(built, bundle):
    fields = json.loads(built.stdout)
    sidecar = read_sidecar(Path(fields["plan"]))
    decode, prefill = sidecar.profiles
    assert (decode.batch[2], prefill.tokens[2], sidecar.max_batch_size) == (2, 16, 2)
    assert read_manifest(bundle).max_batch_size > 2


def test_verbose_prints_what_tensorrt_says(built):
    assert "TensorRT verbose: " in built.stderr and "TensorRT info: " in built.stderr


def test_a_decoder_is_limited_to_the_batch_of_its_engine(built, bundle):
    manifest = read_manifest(bundle)
    assert limit_batch(bundle, manifest, Choice("tensorrt-rtx", "fp32", "")).max_batch_size == 2
    assert limit_batch(bundle, manifest, Choice("ort-cpu", "fp32", "")) is manifest
    assert limit_batch(bundle, manifest, Choice("tensorrt", "fp32", "")) is manifest  # there is no engine for it


def test_the_commands_name_every_input_with_its_shape_and_options_that_exist(built):
    fields = json.loads(built.stdout)
    setting, first, *words = shlex.split(fields["commands"]["polygraphy"])
    assert (setting, first) == ("POLYGRAPHY_USE_TENSORRT_RTX=1", "polygraphy")
    for value in fields["inputs"]:
        assert any(word.startswith(f"{value['name']}:[") for word in words)
        assert f"{value['name']}:" in fields["commands"]["trtexec"]
    assert fields["commands"]["trtexec"].startswith(f"tensorrt_rtx --loadEngine={fields['plan']} ")
    command = [sys.executable, str(Path(sys.executable).with_name("polygraphy")), words[0], "--help"]
    known = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert [word for word in words if word.startswith("--") and word not in known] == []


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--chunk-tokens", 999), 1, "chunk_tokens is 999; this bundle was exported with max_seq_len 128"),
        (("--chunk-tokens", 0), 1, "chunk_tokens is 0, expected a whole number, 1 or more"),
        (("--max-batch-size", 10**6), 1, "max_batch_size is 1000000; this bundle was exported with max_batch_size"),
        (("--workspace", "4TiB"), 2, "expected bytes, or a size as 512MiB or 4GiB"),
        (("--workspace", "0"), 2, "expected bytes, or a size as 512MiB or 4GiB"),
        (("--timing-cache", "cache"), 1, "has no timing cache"),
        (("--device", -1), 1, "--device is -1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_parsed(bundle, options, code, message):
    result = run(bundle, "--backend", "tensorrt-rtx", "--force", *options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in " ".join(result.stderr.split()) and "parsing" not in result.stderr


def test_a_device_is_chosen_among_those_that_are_visible(monkeypatch):
    from lrt_deploy import machine

    monkeypatch.setattr(machine, "find_gpu", lambda: (machine.Gpu("H100", (9, 0)), "H100"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    build.use_device(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    with pytest.raises(EngineError, match="CUDA_VISIBLE_DEVICES shows 5"):
        build.use_device(1)


@pytest.mark.parametrize(("text", "size"), [("1048576", 2**20), ("512MiB", 2**29), ("4 gib", 2**32), ("1KiB", 1024)])
def test_sizes_are_read(text, size):
    assert build.parse_bytes(text) == size


def test_workspace_and_timing_cache_reach_the_builder(built, bundle, tmp_path, monkeypatch):
    """TensorRT-RTX has no use for a timing cache, but its builder makes one, as full TensorRT's does."""
    graph = bundle / graph_path("fp32", "prefill", "full")
    parsed = parse(LIBRARIES["tensorrt-rtx"], tensorrt_copy(graph, 128, True), graph)
    sidecar = read_sidecar(bundle / "engines" / "tensorrt-rtx-fp32" / PLAN)
    limits = {}
    from polygraphy.backend import trt as polygraphy

    original = polygraphy.CreateConfig

    def recorded(**options):
        limits.update(options["memory_pool_limits"])
        return original(**options)

    monkeypatch.setattr(polygraphy, "CreateConfig", recorded)
    cache = tmp_path / "kernels.timing"
    cache.write_bytes(b"")
    build_plan(LIBRARIES["tensorrt-rtx"], parsed, sidecar.profiles, lambda *step: None, 2**26, cache)
    assert list(limits.values()) == [2**26]
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.timing"]
