"""A decoder against itself: every check passes on a right one and fails on one that breaks what the check is about."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from lrt_deploy import open_decoder
from lrt_deploy.cli.app import app
from lrt_deploy.errors import InputError, ParityError
from lrt_deploy.evaluation.checks import CHECKS, Setting, select_checks
from lrt_deploy.evaluation.verdict import as_json
from lrt_deploy.tolerances import FP32

pytestmark = pytest.mark.slow  # for the export

GOLDEN = "mr_mha_L"
PROMPT = [(37 * i + 5) % 128 for i in range(40)]
ON_A_CPU = [name for name in CHECKS if name != "cuda-graph"]


@pytest.fixture(scope="module")
def bundle(export_once):
    return export_once(GOLDEN)


@pytest.fixture
def decoder(decoder_of):
    return decoder_of(GOLDEN)


def setting(decoder, **options):
    return Setting(
        **{"prompt": PROMPT, "steps": 6, "limits": FP32, "max_batch_size": decoder.manifest.max_batch_size} | options
    )


@pytest.mark.parametrize("name", ON_A_CPU)
def test_every_check_passes_on_a_right_decoder(name, decoder):
    check = CHECKS[name](decoder, setting(decoder, tolerance=1e-4))
    assert check.passed, check.line
    assert check.line.startswith(f"PASS: {name}: the two agree; ")
    assert "\n" not in check.line
    assert check.latent <= check.bound
    assert check.logits_after < 1e-2
    json.dumps(as_json(check), allow_nan=False)


def test_a_restored_state_is_equal_to_the_bit(decoder):
    check = CHECKS["restored-vs-straight"](decoder, setting(decoder))
    assert (check.bound, check.latent, check.logits, check.cache, check.logits_after) == (0, 0, 0, 0, 0)


class Wrong:
    """A decoder that does one thing wrong."""

    backend = "ort-cpu"

    def __init__(self, decoder):
        self._decoder, self.config = decoder, decoder.config

    def prefill(self, prompts, **options):
        return self._decoder.prefill(prompts, **options)

    def step(self, state, tokens):
        return self._decoder.step(state, tokens)

    def load_state(self, path):
        return self._decoder.load_state(path)


def shift_latent(state, by=1e-3):
    state.buffers.set_latent(np.arange(state.batch), state.latent + np.float32(by))
    return state


class IteratesBadly(Wrong):
    def prefill(self, prompts, **options):
        state = super().prefill(prompts, **options)
        return (
            shift_latent(state, 0.5) if options["policy"] == "fixed-point" and len(prompts[0]) == len(PROMPT) else state
        )


class ForgetsBetweenTurns(Wrong):
    def prefill(self, prompts, *, state=None, **options):
        return super().prefill(prompts, state=None if state is None else shift_latent(state, 0.5), **options)


class MixesRows(Wrong):
    def prefill(self, prompts, **options):
        state = super().prefill(prompts, **options)
        if len(prompts) > 1:
            state.buffers.set_latent(np.arange(state.batch), state.latent[::-1].copy())
        return state


class LoadsRounded(Wrong):
    def load_state(self, path):
        return shift_latent(super().load_state(path), 1e-6)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("fixed-point-vs-stepwise", IteratesBadly),
        ("chunked-vs-whole", ForgetsBetweenTurns),
        ("batch-vs-alone", MixesRows),
        ("restored-vs-straight", LoadsRounded),
    ],
)
def test_every_check_fails_on_what_it_is_about_and_on_nothing_else(name, wrong, decoder):
    for other in ON_A_CPU:
        check = CHECKS[other](wrong(decoder), setting(decoder, tolerance=1e-4))
        expected = other != name and not (wrong is IteratesBadly and other == "chunked-vs-whole")
        assert check.passed == expected, check.line
        assert check.line.startswith("PASS" if expected else f"FAIL: {name}: the two differ in ") or other != name


def test_a_cuda_graph_is_compared_with_its_partner_and_refused_where_there_is_none(decoder, bundle):
    with pytest.raises(ParityError, match="backend ort-cpu runs no CUDA graph"):
        CHECKS["cuda-graph"](decoder, setting(decoder))

    class Graphed(Wrong):
        """Stands for a backend with a graph, which nothing here has."""

        backend = "tensorrt"

    class Advances(Graphed):
        """The state moves on once more when a step is captured."""

        def step(self, state, tokens):
            logits = super().step(state, tokens)
            return logits if len(state.tokens[0]) != len(PROMPT) + 3 else shift_latent(state, 0.5).logits

    with contextlib.closing(open_decoder(bundle)) as partner:
        options = setting(decoder, partner=lambda: partner)
        assert CHECKS["cuda-graph"](Graphed(decoder), options).passed
        check = CHECKS["cuda-graph"](Advances(decoder), options)
    assert not check.passed
    assert "logits after by" in check.line


def test_all_means_what_the_backend_can_run():
    assert select_checks(["all"], "ort-cpu") == ON_A_CPU
    assert select_checks(["all"], "tensorrt-rtx") == list(CHECKS)
    assert select_checks(["batch-vs-alone", "batch-vs-alone"], "ort-cpu") == ["batch-vs-alone"]
    with pytest.raises(InputError, match="no check 'batch'; known are fixed-point-vs-stepwise, "):
        select_checks(["batch"], "ort-cpu")


def test_what_a_check_needs_is_said(decoder):
    with pytest.raises(InputError, match="1 token"):
        CHECKS["chunked-vs-whole"](decoder, dataclasses.replace(setting(decoder), prompt=[3]))
    with pytest.raises(ParityError, match="2 rows or more"):
        CHECKS["batch-vs-alone"](decoder, setting(decoder, max_batch_size=1))


def run(*args):
    return CliRunner().invoke(app, ["parity", *map(str, args)])


def test_the_command_runs_checks_without_a_checkpoint(bundle):
    result = run(bundle, "--check", "all", "--json")
    assert result.exit_code == 0
    fields = json.loads(result.stdout)
    assert [check["name"] for check in fields["checks"]] == ON_A_CPU
    assert (fields["passed"], fields["verdict"]) == (True, "PASS: 4 of 4 checks")
    lines = run(bundle, "--check", "restored-vs-straight", "--check", "batch-vs-alone").stdout.splitlines()
    assert [line.split(":")[:2] for line in lines] == [["PASS", " restored-vs-straight"], ["PASS", " batch-vs-alone"]]


def test_the_command_runs_checks_beside_the_comparison_and_a_failed_one_decides(bundle, golden_of, monkeypatch):
    arguments = (bundle, "--checkpoint", golden_of(GOLDEN).folder, "--steps", 8, "--check", "batch-vs-alone")
    assert json.loads(run(*arguments, "--json").stdout)["checks"][0]["passed"]
    right = CHECKS["batch-vs-alone"]
    monkeypatch.setitem(CHECKS, "batch-vs-alone", lambda d, s: dataclasses.replace(right(d, s), passed=False))
    result = run(*arguments, "--json")
    assert result.exit_code == 1
    assert run(bundle, "--check", "batch-vs-alone", "--json").exit_code == 1


def test_the_command_needs_something_to_compare_with(bundle):
    result = run(bundle)
    assert result.exit_code == 2
    assert "--checkpoint" in result.stderr and "--check" in result.stderr
    assert run(bundle, "--check", "cuda-graph").exit_code == 1
