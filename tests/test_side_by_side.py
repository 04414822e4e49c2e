"""What the benchmarks compare computes the same numbers; a comparison with something else would be worthless."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from contenders import field, models, plain_route, serving  # noqa: E402
from contenders.measured import Measured, Ratio  # noqa: E402
from contenders.worker import make  # noqa: E402

pytestmark = pytest.mark.slow  # for the exports

SIZE = models.SIZES["tiny"]
ROWS = [[5, 17, 200, 3, 9], [44, 2, 2, 310, 1]]
STEPS = [[7, 8], [300, 12], [5, 5], [91, 0]]
CONTENDERS = {"ours": True, "pytorch": True, "plain-route": True, "no-memory": False}
# Between correct float32 implementations 2e-5 at most; a forgotten memory moves logits by more than 1e-1.
LOGIT_ERROR = 1e-4


@pytest.fixture(scope="module")
def folder(make_once):
    """Models of the tiny size; the exports of all contenders."""

    def fill(target):
        for memory in (True, False):
            models.bundle(target, SIZE, "fp32", memory)
        source = models.checkpoint(target, SIZE)
        models.made_once(target / "plain-route", lambda out: plain_route.export(source, out))

    return make_once("side-by-side", fill)


@pytest.fixture(scope="module")
def contender(folder):
    """name -> it, in this process."""
    setting = field.Setting(folder, SIZE, "fp32", threads=1, genai_python=None)
    return lambda name: make(name, field.prepare(name, setting), threads=1)


def expected(folder, memory):
    """(steps, B, V) of the reference."""
    from lrt_deploy.model.checkpoint import open_checkpoint
    from lrt_deploy.model.reference import ReferenceDecoder

    decoder = ReferenceDecoder(open_checkpoint(models.checkpoint(folder, SIZE, memory)).model(), SIZE.sequence_len)
    state = decoder.prefill(ROWS)
    return np.array([decoder.step(state, step) for step in STEPS])


@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_give_the_logits_of_the_reference(name, contender, folder):
    found = np.array(serving.Served(contender(name)).logits(ROWS, STEPS)["logits"])
    assert np.abs(found - expected(folder, CONTENDERS[name])).max() < LOGIT_ERROR


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # PyTorch's compiler, of itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_gives_them_too_and_is_compiled_once(contender, folder, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters.clear()
    found = np.array(serving.Served(contender("pytorch-compiled")).logits(ROWS, STEPS)["logits"])
    assert np.abs(found - expected(folder, True)).max() < LOGIT_ERROR
    assert counters["stats"]["unique_graphs"] == 1  # of 9 positions
    assert not counters["graph_break"]


def test_a_model_without_memory_is_another_one(contender, folder):
    """The twin: the comparison sees what it is there for."""
    found = np.array(serving.Served(contender("no-memory")).logits(ROWS, STEPS)["logits"])
    assert np.abs(found - expected(folder, True)).max() > 1e3 * LOGIT_ERROR


def test_the_fast_reading_is_one_pass_with_zero_memory(contender):
    """All of them read alike before they are timed, so all decode on caches of the same content."""
    logits = []
    for name in ("ours", "pytorch", "plain-route"):
        found = contender(name)
        found.start(ROWS, exact=False)
        logits.append(found.step([7, 8]))
    assert np.abs(logits[1] - logits[0]).max() < LOGIT_ERROR
    assert np.abs(logits[2] - logits[0]).max() < LOGIT_ERROR


def test_what_a_step_allocates_is_counted(contender):
    """The growing cache gives out logits, latent and a longer cache each step; ours gives out nothing new."""
    plain, kv = contender("plain-route"), 2 * SIZE.layers * SIZE.width * 4
    served, steps = serving.Served(plain), serving.WARM_UP_STEPS + serving.COLD_STEPS + 2
    served.start([[1, 2, 3]])
    served.decode(2)
    assert plain.facts["bytes_allocated_per_step"] == 4 * (SIZE.vocab + SIZE.width) + kv * (3 + steps)
    assert contender("ours").facts["state_bytes_copied_per_step"] == 0


def test_a_plain_llama_of_equal_bytes(folder):
    """Matrices of a Llama layer and of an LRT layer, gates left out: equal but for the rounding to blocks of 32."""
    for size in models.SIZES.values():
        width, inner = size.width, field.equal_inner(size.width)
        assert inner % 32 == 0
        assert 0 <= 4 * width**2 + 3 * width * inner - 14 * width**2 < 3 * width * 32


def test_ratios_compare_processes_of_one_set():
    """A set whose memory is ten times slower changes no ratio; the error is that of their logarithms' mean."""
    ours = Measured([[1.0, 1.0, 2.0], [10.0, 10.0, 20.0]])
    theirs = Measured([[2.0, 4.0, 9.0], [20.0, 40.0, 90.0]])
    assert theirs.ratio(ours, min) == Ratio(pytest.approx(2), pytest.approx(1))
    assert theirs.ratio(ours, np.median) == Ratio(pytest.approx(4), pytest.approx(1))
    assert Ratio.of([1.0, 4.0]) == Ratio(pytest.approx(2), pytest.approx(2))
    assert (str(Ratio.of([1.0, 1.21])), str(Ratio.of([3.0]))) == ("1.10 ± 0.11", "3.00")
    with pytest.raises(ValueError, match="shorter"):
        theirs.ratio(Measured([[1.0]]), min)
    assert theirs.summary(batch=2) == {"min_ms": 2, "median_ms": 14.5, "tokens_per_s": 2e3 / 14.5, "steps": 6}


def test_one_command_measures_and_writes(folder, tmp_path):
    """Through the processes, as a user runs it; without genai, whose environment is not the project's."""
    command = [sys.executable, str(ROOT / "benchmarks" / "side_by_side.py"), "--sizes", "tiny", "--contexts", "8"]
    command += ["--rounds", "1", "--steps", "6", "--threads", "1", "--contenders", "ours,plain-route"]
    (tmp_path / "tiny").symlink_to(folder)
    command += ["--processes", "2", "--folder", str(tmp_path), "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["results"][0]["rows"]
    assert [(row["contender"], row["steps"]) for row in rows] == [("ours", 12), ("plain-route", 12)]
    assert all(0 < row["min_ms"] <= row["median_ms"] for row in rows)
    assert rows[0]["min_over_first"] == {"mean": 1, "error": 1}
    assert rows[1]["median_over_first"]["mean"] > 0 and rows[1]["median_over_first"]["error"] >= 1
    assert done.stdout.count("\n") == 4  # head, rule, two rows
