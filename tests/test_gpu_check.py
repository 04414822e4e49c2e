"""The check for machines with a GPU: says so where there is none, and its findings find what they should."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

import lrt_deploy
from lrt_deploy.errors import EngineError
from lrt_deploy.machine import Gpu, find_gpu

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check  # noqa: E402

GOLDEN = "mr_gqa_SSSL"


@pytest.fixture
def bundle(export_once):
    return export_once(GOLDEN)


def test_without_a_gpu_it_says_so_and_checks_nothing():
    if find_gpu()[0] is not None:
        pytest.skip("there is a GPU here")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("nothing was checked: no GPU")


def test_its_findings_are_right_where_they_can_be_held_against_something(bundle):
    """The same functions on a decoder that runs here."""
    with lrt_deploy.open_decoder(bundle) as decoder:
        parity = gpu_check.parity(bundle, decoder)
        assert parity["passed"] and parity["beside"] == "fp32" and parity["max_abs_logit_error"] == 0
        found = gpu_check.speed(decoder, 20, bandwidth=1e9)
        assert found["steps"] == 20 and found["bytes_per_step"] > 4 * 218_624
        expected = found["bytes_per_step"] / (found["tpot_ms"]["p50"] / 1e3) / 1e9
        assert found["copy_bandwidth_share"] == pytest.approx(expected)
    found = gpu_check.graph_changes_nothing(lambda cuda_graph: lrt_deploy.open_decoder(bundle))
    assert found["passed"] and all(found["equal"].values())


def test_a_graph_that_changes_something_is_found(bundle, monkeypatch):
    original, count = gpu_check.greedy, []

    def greedy(decoder, steps):
        found = original(decoder, steps)
        count.append(1)
        if len(count) == 2:
            found["latent"][0, 0] += 1
        return found

    monkeypatch.setattr(gpu_check, "greedy", greedy)
    found = gpu_check.graph_changes_nothing(lambda cuda_graph: lrt_deploy.open_decoder(bundle))
    assert not found["passed"] and found["equal"] == {"tokens": True, "logits": True, "latent": False}


def test_what_fails_is_written_down_and_fails_nothing_else(bundle, monkeypatch):
    def refuse(*_, **__):
        raise EngineError("this GPU is not supported")

    monkeypatch.setattr(gpu_check, "build", refuse)
    args = argparse.Namespace(steps=4)
    found = gpu_check.check(bundle, "tensorrt-rtx", "fp32", args, bandwidth=1e9)
    assert found["build"] == {"failed": "this GPU is not supported"}
    assert {"parity", "cuda_graph", "speed"} < set(found)
    report = {"gpu": "X", "compute_capability": "9.0", "copy_bandwidth_gb_s": 1.0, "findings": [found]}
    assert not gpu_check.good(report)
    assert "build: FAILED, this GPU is not supported" in list(gpu_check.lines(report))[1]


def test_speed_is_held_against_the_copies_of_the_runtime(bundle, monkeypatch):
    monkeypatch.setattr("lrt_deploy.runtime.backends.cuda.CudaDevice", lambda: "the device")
    monkeypatch.setattr("lrt_deploy.runtime.bench.roofline.device_copy_gb_s", {"the device": 1234.0}.__getitem__)
    monkeypatch.setattr(gpu_check, "candidates", lambda *_: [("tensorrt", "fp32")])
    monkeypatch.setattr(gpu_check, "check", lambda *found: {"bandwidth": found[-1]})
    report = gpu_check.run(bundle, argparse.Namespace(precision=None), Gpu("X", (9, 0)))
    assert report["copy_bandwidth_gb_s"] == 1234.0
    assert report["findings"] == [{"bandwidth": 1234e9}]  # bytes a second


def test_a_report_in_which_all_is_well_is_good():
    speed = {"tokens_per_s": 100.0, "copy_bandwidth_share": 0.5}
    found = {"backend": "tensorrt", "precision": "fp16", "parity": {"passed": True, "verdict": "same"}, "speed": speed}
    report = {"gpu": "X", "compute_capability": "9.0", "copy_bandwidth_gb_s": 1.0, "findings": [found]}
    assert gpu_check.good(report)
    assert list(gpu_check.lines(report))[1] == (
        "tensorrt fp16: parity: passed, same; speed: 100 tokens/s, 50% of the copy bandwidth"
    )
