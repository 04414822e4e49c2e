"""The check for machines with a GPU: it runs from start to end on the fakes, and its answers find what they should."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_cuda import FakeDriver
from fake_tensorrt import FakeContext, FakeEngine, build_fake_engine, fake_library

import lrt_deploy
from lrt_deploy.bundle.engine_sidecar import PLAN, engine_folder, read_sidecar
from lrt_deploy.machine import Gpu, find_gpu
from lrt_deploy.runtime import bench

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check  # noqa: E402

GPU = Gpu("Fake H200", (9, 0))  # for which no plan of TensorRT-RTX is documented
SMALL = ["--layers", "2", "--width", "64", "--vocabulary", "128", "--steps", "4", "--contexts", "8,40"]
SMALL += ["--batches", "1,2", "--prompts", "24"]


@pytest.fixture(scope="module")
def bundles(in_every_precision, tmp_path_factory):
    """The folder of the check's bundles: the demo, exported before, and the other one as the check makes it."""
    work = tmp_path_factory.mktemp("check")
    shutil.copytree(in_every_precision("demo"), work / "demo")
    gpu_check.export_random(gpu_check.settings_of(gpu_check.parse(SMALL), work), work / "d20")
    return work


@pytest.fixture
def settings(bundles, tmp_path):
    work = shutil.copytree(bundles, tmp_path / "work")
    return gpu_check.settings_of(gpu_check.parse(SMALL), work)


@pytest.fixture
def driver(monkeypatch):
    """As if there were a GPU with 64 MiB, and engines for it."""
    driver = FakeDriver(seed=5, memory_bytes=2**26)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_library(None, driver))
    for place in ("lrt_deploy.machine", "lrt_deploy.runtime.opening", "lrt_deploy.runtime.backends.tensorrt"):
        monkeypatch.setattr(f"{place}.find_gpu", lambda: (GPU, "Fake H200"))
    monkeypatch.setattr(lrt_deploy, "build_engine", build_fake_engine, raising=False)
    monkeypatch.setattr(bench, "_SMALLEST_COPY_BYTES", 2**15)
    yield driver
    assert driver.violations == []


@pytest.mark.skipif(find_gpu()[0] is not None, reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_asks_nothing_else(tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"environment: FAILED, {find_gpu()[1]}" in result.stderr and "not all is well" in result.stderr
    answers = json.loads(out.read_text())["answers"]
    assert list(answers) == ["environment"] and answers["environment"]["failed"] == find_gpu()[1]


@pytest.mark.slow
def test_it_runs_from_start_to_end(settings, driver, tmp_path, capsys):
    out, seen = tmp_path / "report.json", []

    def run(name, now, left):
        assert 0 < left <= 360
        if name != "environment":  # what was answered before is on the disk
            seen.append(list(json.loads(out.read_text())["answers"])[-1])
        return gpu_check.answer(name, now)

    report = gpu_check.ask(settings, 360, out, run)
    assert gpu_check.good(report), report
    assert seen == list(gpu_check.QUESTIONS)[:-1] and json.loads(out.read_text())["answers"].keys() == {*seen, "parity"}
    answers = report["answers"]
    assert answers["environment"]["gpu"] == "Fake H200" and answers["environment"]["copy_bandwidth_gb_s"] > 0
    assert answers["plan_loads"]["detail"].endswith("Fake H200")
    sidecar = read_sidecar(engine_folder(settings.work / "demo", "tensorrt-rtx", "fp16") / PLAN)
    assert sidecar.compute_capabilities == ("8.6", "8.9", "12.0", "9.0")
    rows = answers["steps"]["rows"]
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 8), (1, 40), (2, 8), (2, 40)]
    assert all(row["tokens_per_s"] > 0 and row["bytes_per_step"] > 10**5 for row in rows)
    assert answers["steps"]["kernels"] == {"count": 1, "total_ms": 0.5, "slowest_ms": {"all of it": 0.5}}
    read = answers["prompts"]["rows"]
    assert [row["asked"] for row in read] == ["stepwise", "fixed-point", "zero"]
    assert read[0]["max_abs_latent_error"] == 0 < read[2]["max_abs_latent_error"]
    assert answers["out_of_memory"]["states"] > 3 and "out of memory" in answers["out_of_memory"]["refusal"]
    assert answers["parity"]["beside"] == "fp32" and answers["threads"]["wrong"] == 0
    assert "steps: [{" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["capture", "threads", "out_of_memory", "parity"])
def test_what_is_not_as_it_should_be_is_found(settings, driver, monkeypatch, name):
    """The twins: each with one thing that goes wrong."""
    compute, runs = FakeEngine.compute, []

    def disturbed(self, shapes, addresses):
        compute(self, shapes, addresses)
        runs.append(1)
        self.view("logits", shapes, addresses)[...] += np.float32(0.25 if name == "parity" else 1e-3 * len(runs))

    if name == "parity":
        monkeypatch.setattr(
            FakeEngine, "compute", lambda *a: (compute(*a), a[0].view("present_latent", *a[1:]).fill(0.5))
        )
    else:
        monkeypatch.setattr(FakeEngine, "compute", disturbed)
    found = gpu_check.answer(name, settings)
    assert found.get("passed") is False, found


@pytest.mark.slow
def test_a_plan_that_does_not_run_is_written_down_and_onnx_runtime_is_asked_instead(settings, driver, monkeypatch):
    monkeypatch.setattr(FakeContext, "execute_async_v3", lambda self, stream: self.refuse("no kernel image"))
    asked = []

    def run(name, now, left):
        asked.append((name, now.backend))
        return gpu_check.answer(name, now) if name == "plan_loads" else {"passed": True}

    report = gpu_check.ask(settings, 360, None, run)
    assert "no kernel image" in report["answers"]["plan_loads"]["failed"] and not gpu_check.good(report)
    assert [backend for _, backend in asked] == ["tensorrt-rtx"] * 2 + ["ort-cuda"] * 6


def test_no_question_begins_after_the_time(tmp_path):
    settings = gpu_check.Settings(tmp_path, "tensorrt-rtx")
    report = gpu_check.ask(settings, 0, None, lambda *_: pytest.fail("asked"))
    assert report["answers"]["environment"]["failed"] == "no time was left"


@pytest.mark.skipif(find_gpu()[0] is not None, reason="there is a GPU here")
def test_a_process_that_takes_too_long_or_dies_is_an_answer(tmp_path, monkeypatch):
    settings = gpu_check.Settings(tmp_path, "tensorrt-rtx")
    assert gpu_check.isolated("environment", settings, [], 0.0) == {"failed": "cut off after 0 s"}
    found = gpu_check.isolated("environment", settings, ["--no-such-option"], 100)
    assert found["failed"].startswith("its process ended with 2: ") and "--no-such-option" in found["failed"]
