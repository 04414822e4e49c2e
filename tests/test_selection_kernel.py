"""The kernel that chooses tokens on a GPU, compiled by g++, chooses what `Sampler` chooses.

On a GPU it has not been run. What g++ compiles is the same file, on coroutines that run between two barriers in an
order drawn at random; that the PTX that is shipped was made from it is tested too.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_cuda import FakeDriver
from host_kernels import HostKernels, compile_kernels

from lrt_deploy.errors import BackendError
from lrt_deploy.runtime.backends.cuda import CudaDevice
from lrt_deploy.runtime.device_loop import make_ptx
from lrt_deploy.runtime.device_loop.kernels import PTX, Kernels
from lrt_deploy.runtime.device_loop.selection import (
    CHOICE,
    CHOSEN,
    NOT_FINITE,
    NOTHING_ALLOWED,
    RULES,
    RowRules,
    Selection,
)
from lrt_deploy.runtime.sampling import MAX_TEMPERATURE, Sampler, SamplingOptions, log_normalizers

ROWS, BATCH = 10_000, 40  # rows that have an option
GREEDY = SamplingOptions()


@pytest.fixture(scope="module")
def kernels(kernels_once):
    return HostKernels(kernels_once)


@pytest.fixture
def choose(kernels, monkeypatch):
    """(logits (B, V), rules, allowed, threads) -> choices (B), by `Selection` on a strict fake of CUDA's driver."""

    def run(logits, rules, allowed=None, threads=4, again=1):
        rows, vocab = logits.shape
        driver = FakeDriver(seed=threads)
        driver.kernels = kernels
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
        device = CudaDevice()
        with device.lock:
            device.begin()
            selection = Selection(device, Kernels(device, threads), rows, vocab)
            address = device.allocate(logits.nbytes)
            device.copy_in(address, np.ascontiguousarray(logits, np.float32))
            for row, one in enumerate(rules):
                selection.set_row(row, one)
                if allowed is not None and allowed[row] is not None:
                    selection.set_allowed(row, allowed[row])
            found = [device.pinned((rows,), CHOICE) for _ in range(again)]
            for one in found:
                selection.enqueue(address, rows)
                device.copy_out(one, selection.choices_address)
            device.synchronize()
        assert driver.violations == []
        return found[0] if again == 1 else found

    return run


def random_logits(dice, vocab):
    """Logits as a model gives them, or with many that are equal."""
    kind, scale = dice.integers(5), dice.choice([0.3, 1, 4, 12])
    logits = 15 * np.tanh(dice.normal(size=vocab) * scale / 15)
    if kind == 0:
        logits = np.round(logits * 2) / 2  # many are equal
    elif kind == 1:
        logits = np.full(vocab, dice.choice([0.0, -0.0, 3.5]))
        logits[dice.integers(vocab, size=3)] += dice.choice([0.0, 1.0, -1.0])
    elif kind == 2:  # near ties
        logits = np.float32(logits.max()) - dice.integers(4, size=vocab) * np.float32(2**-20)
    return logits.astype(np.float32)


def random_options(dice, vocab):
    def some(off, *values):
        return off if dice.random() < 0.5 else float(dice.choice(values))

    bias = {}
    if dice.random() < 0.5:
        ids = dice.permutation(vocab)[: dice.integers(1, 6)]
        bias = {int(token): float(dice.choice([-1e4, -2.5, 0.1, 3, 1e4])) for token in ids}
    return SamplingOptions(
        temperature=float(dice.choice([0, 1e-300, 1e-3, 0.3, 0.8, 1, 1.5, MAX_TEMPERATURE])),
        top_k=int(some(0, 1, 2, 7, 40, vocab - 1, vocab, 10**12)),
        top_p=some(1.0, 1e-12, 0.05, 0.5, 0.9, 0.95, 1 - 2**-53),
        min_p=some(0.0, 1e-300, 0.02, 0.3, 1.0),
        repetition_penalty=some(1.0, 1e-6, 0.5, 1.2, 1e6),
        frequency_penalty=some(0.0, -1.5, 0.4, 1e4),
        presence_penalty=some(0.0, -2.0, 0.7),
        logit_bias=bias,
        seed=int(dice.integers(2**62)),
    )


def random_row(dice, vocab):
    """Rules of a row, and the ids that are allowed."""
    history = dice.integers(vocab, size=dice.integers(0, 30)).tolist()
    index = int(dice.choice([0, len(history) // 2, len(history)]))
    choices = vocab if dice.random() < 0.7 else int(dice.integers(1, vocab + 1))
    allowed = None
    if dice.random() < 0.5:
        allowed = np.flatnonzero(dice.random(choices) < dice.choice([0.02, 0.5, 0.98]))
        allowed = allowed if allowed.size else None
    return RowRules(Sampler(random_options(dice, vocab)), choices, index, history), allowed


def expected(logits, rules, allowed):
    return rules.sampler.choose(logits[: rules.choices], rules.history, rules.index, allowed)


def test_the_tokens_are_those_of_the_sampler(choose):
    """Every option, alone and together, with equal logits, near ties and extreme values."""
    dice, wrong, counts = np.random.default_rng(5), [], Counter()
    for vocab in (1, 2, 31, 32, 33, 100, 300) * 95:
        logits = np.stack([random_logits(dice, vocab) for _ in range(BATCH)])
        rows = [random_row(dice, vocab) for _ in range(BATCH)]
        found = choose(logits, [rules for rules, _ in rows], [allowed for _, allowed in rows], threads=2)
        for one, row, choice in zip(logits, rows, found, strict=True):
            counts.update(
                name for name, value in vars(row[0].sampler.options).items() if value != getattr(GREEDY, name)
            )
            counts["allowed"] += row[1] is not None
            if choice["status"] != CHOSEN or choice["token"] != expected(one, *row):
                wrong.append((vocab, row[0].sampler.options, int(choice["token"]), expected(one, *row)))
    assert len(counts) == len(vars(GREEDY)) + 1
    assert min(counts.values()) >= ROWS, counts
    assert not wrong, (len(wrong), wrong[:3])


def test_so_they_are_of_a_large_vocabulary(choose):
    dice = np.random.default_rng(6)
    logits = np.stack([random_logits(dice, 32768) for _ in range(BATCH)])
    rows = [random_row(dice, 32768) for _ in range(BATCH)]
    found = choose(logits, [rules for rules, _ in rows], [allowed for _, allowed in rows], threads=1)
    assert found["token"].tolist() == [expected(one, *row) for one, row in zip(logits, rows, strict=True)]
    normalizers = log_normalizers(logits)
    logprobs = [one[token] - n for one, token, n in zip(logits, found["token"], normalizers, strict=True)]
    np.testing.assert_allclose(found["logprob"], logprobs, atol=2e-5)


def test_no_number_of_threads_and_no_order_of_them_changes_a_choice(choose):
    dice = np.random.default_rng(7)
    for vocab in (5, 64, 700):
        logits = np.stack([random_logits(dice, vocab) for _ in range(BATCH)])
        rows = [random_row(dice, vocab) for _ in range(BATCH)]
        rules, allowed = zip(*rows, strict=True)
        found = [choose(logits, rules, allowed, threads).tobytes() for threads in (1, 2, 32, 256)]
        assert found[1:] == found[:1] * 3


FAULTS = {
    "a barrier is missing": ("  parts[threadIdx.x] = mine;\n  __syncthreads();\n", "  parts[threadIdx.x] = mine;\n"),
    "of equal logits the last one is taken": (
        "    if (key > mine.high) {\n      mine.high = key;\n      best",
        "    if (key >= mine.high) {\n      mine.high = key;\n      best",
    ),
    "top-k keeps one tie too many": ("rules.top_k - cut.above - 1", "rules.top_k - cut.above"),
    "top-p counts above the share": ("want - cut.above - 1", "want - cut.above"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_changes_choices(choose, kernels, tmp_path, monkeypatch, fault):
    """The twin. Of a missing barrier too: coroutines in a random order do see a race."""
    source, (right, wrong) = PTX.with_name("kernels.cu").read_text(), FAULTS[fault]
    assert source.count(right) == 1
    faulty = HostKernels(compile_kernels(tmp_path, source.replace(right, wrong)))
    dice = np.random.default_rng(7)
    logits = np.stack([random_logits(dice, 64) for _ in range(5 * BATCH)])
    logits[0] = 1
    rules = [RowRules(Sampler(GREEDY), 64), *(random_row(dice, 64)[0] for _ in logits[1:])]
    found = choose(logits, rules, threads=16)["token"].tolist()
    monkeypatch.setattr(kernels, "library", faulty.library)
    assert choose(logits, rules, threads=16)["token"].tolist() != found


def test_a_row_goes_on_counting_by_itself(choose):
    """Choices after the first one take the next random numbers, and penalties count them."""
    dice = np.random.default_rng(8)
    logits = np.stack([random_logits(dice, 50) for _ in range(BATCH)])
    rules = [random_row(dice, 50)[0] for _ in range(BATCH)]
    found = choose(logits, rules, again=6)
    for row, one in enumerate(rules):
        history = list(one.history)
        for step, choices in enumerate(found):
            token = one.sampler.choose(logits[row, : one.choices], history, one.index + step)
            assert choices[row]["token"] == token
            history.append(token)


def test_the_random_numbers_are_those_of_the_sampler(choose):
    """Of 2^12 equal logits, the token says the first 12 bits of the number."""
    logits = np.zeros((BATCH, 4096), np.float32)
    for start in (0, 31, 32, 1000, 2**30):
        samplers = [Sampler(SamplingOptions(temperature=1, seed=seed)) for seed in range(BATCH)]
        found = choose(logits, [RowRules(one, 4096, start) for one in samplers], threads=1)
        assert found["token"].tolist() == [math.floor(one._number(start) * 4096) for one in samplers]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(temperature=1, top_k=3, presence_penalty=1)])
def test_from_logits_that_are_not_finite_nothing_is_chosen(choose, value, options):
    """As `check_finite` refuses them: wherever they are in the row, beyond the ids that may be chosen too."""
    logits = np.ones((3, 40), np.float32)
    logits[1, 39] = value
    found = choose(logits, [RowRules(Sampler(options), 20)] * 3, threads=8)
    assert found["status"].tolist() == [CHOSEN, NOT_FINITE, CHOSEN]
    assert found["token"][1] == -1


def test_where_nothing_is_allowed_nothing_is_chosen(choose):
    logits = np.ones((2, 40), np.float32)
    nothing = np.zeros(0, np.int64)
    found = choose(logits, [RowRules(Sampler(GREEDY), 20)] * 2, [nothing, None])
    assert found["status"].tolist() == [NOTHING_ALLOWED, CHOSEN]


def test_the_largest_logits_are_chosen_without_overflow(choose):
    logits = np.array([[3.4e38, -3.4e38, 3.4e38]], np.float32)
    rules = RowRules(Sampler(SamplingOptions(temperature=1e-300, repetition_penalty=1e6, seed=1)), 3, 0, [0])
    assert choose(logits, [rules])["token"].tolist() == [expected(logits[0], rules, None)]


# The PTX


def test_the_ptx_was_made_from_this_source():
    """If this fails: make ptx."""
    assert PTX.read_text().splitlines()[0] == make_ptx.source_line()


def test_compiling_again_gives_the_same_ptx():
    nvcc = make_ptx.find_nvcc()
    if nvcc is None:
        pytest.skip(f"there is no nvcc {make_ptx.RELEASE}; `make ptx` installs it")
    assert make_ptx.compile_ptx(nvcc) == PTX.read_text()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
def test_a_kernel_takes_64_registers_at_most_and_spills_none(tmp_path, architecture):
    """So that a block of 1,024 threads fits a multiprocessor, whose 65,536 registers it shares."""
    nvcc = make_ptx.find_nvcc()
    ptxas = nvcc.with_name("ptxas") if nvcc and nvcc.with_name("ptxas").exists() else shutil.which("ptxas")
    if ptxas is None:
        pytest.skip(f"there is no ptxas of {make_ptx.RELEASE}; `make ptx` installs it")
    command = [ptxas, "-v", f"-arch={architecture}", "-o", tmp_path / "out", PTX]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == len(re.findall(r"\.entry", PTX.read_text()))
    assert max(registers) <= 64
    assert set(re.findall(r"(\d+) bytes spill", said)) == {"0"}


def test_other_code_than_the_shipped_is_refused(kernels, monkeypatch, tmp_path):
    driver = FakeDriver()
    driver.kernels = kernels
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    other = tmp_path / "kernels.ptx"
    other.write_text("nothing")
    monkeypatch.setattr("lrt_deploy.runtime.device_loop.kernels.PTX", other)
    with pytest.raises(BackendError, match="loading kernels: invalid ptx"):
        Kernels(CudaDevice())


def test_the_layout_of_rows_is_that_of_the_kernel(kernels):
    size = kernels.library.size_of_rules, kernels.library.size_of_choice
    assert [function() for function in size] == [RULES.itemsize, CHOICE.itemsize]
