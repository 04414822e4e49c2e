"""Fitting a KL budget: the list that is found meets it, none of it is idle, and an export with it is better.

And compensated rounding, on which the fit counts for int4.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import lrt_deploy
from lrt_deploy.checkpoint import write_native
from lrt_deploy.cli.app import app
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import ParityError
from lrt_deploy.exporters.budget import _Simulation, fit_budget
from lrt_deploy.exporters.compensate import compensated
from lrt_deploy.exporters.quantize import FORMATS, dequantized, quantized, rounded, weight_scales
from lrt_deploy.manifest import read_manifest
from lrt_deploy.random_weights import random_model
from lrt_deploy.reference import ReferenceDecoder
from lrt_deploy.rollout import Reading, roll_out
from lrt_deploy.weights import matrix_shapes

INT4 = FORMATS["int4-weight-only"]
CONFIG = LRTConfig(sequence_len=32, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)


def matrix(rows=64, columns=24, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def moment(rows=64, seed=1):
    """Of strongly correlated inputs."""
    x = np.random.default_rng(seed).normal(size=(500, 12)) @ np.random.default_rng(seed + 1).normal(size=(12, rows))
    x += 0.1 * np.random.default_rng(seed + 2).normal(size=x.shape)
    return x.T @ x


def cost(weight, approximation, moment):
    error = (approximation - weight).astype(np.float64)
    return float(np.einsum("kn,kl,ln->", error, moment, error))


def test_compensated_rounding_costs_the_product_less_than_rounding_to_nearest():
    weight, seen = matrix(), moment()
    ours = dequantized(*compensated(weight, seen, INT4), INT4)
    assert cost(weight, ours, seen) < 0.5 * cost(weight, rounded(weight, INT4), seen)
    assert np.abs(ours - weight).sum() > np.abs(rounded(weight, INT4) - weight).sum()  # and the matrix itself more


def test_inputs_that_are_not_correlated_leave_nothing_to_make_up_for():
    weight = matrix()
    scales, integers = compensated(weight, np.eye(64), INT4)
    expected = weight_scales(weight, INT4)
    assert (scales == expected).all()
    assert (integers.astype(int) == quantized(weight, expected, INT4).astype(int)).all()
    assert np.abs(integers.astype(int)).max() <= INT4.largest


def test_inputs_that_were_never_seen_are_rounded_to_nearest():
    weight = matrix()
    assert (dequantized(*compensated(weight, np.zeros((64, 64)), INT4), INT4) == rounded(weight, INT4)).all()


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return random_model(CONFIG, seed=3)


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (6, 24)).tolist()


def fit(model, rows, budget, precision="int4-weight-only", **options):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = fit_budget(model, precision, budget, rows, **options)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert found.met == (found.mean_kl <= budget)
    json.dumps(found.to_dict(), allow_nan=False)
    return found


def test_a_wide_budget_keeps_nothing_and_a_narrow_one_everything(model, rows):
    wide = fit(model, rows, 10.0)
    assert (wide.keep_high, wide.quantized_share) == ((), 1.0)
    assert wide.mean_kl == wide.mean_kl_all_quantized > 0
    assert wide.line.startswith("PASS: int4-weight-only with 100.0% of the weights quantized")
    narrow = fit(model, rows, 1e-12)
    assert (narrow.mean_kl, narrow.quantized_share) == (0.0, 0.0)


def test_the_list_meets_the_budget_and_every_matrix_in_it_is_needed(model, rows):
    everything = fit(model, rows, 10.0)
    found = fit(model, rows, everything.mean_kl / 2)
    assert found.met
    assert 0 < len(found.keep_high) < len(found.sensitivities)
    assert 0 < found.quantized_share < 1
    names = [item.matrix for item in found.sensitivities]
    simulation = _Simulation(model, FORMATS["int8-weight-only"], rows[::2], {})
    assert simulation.mean_kl(names) < 1e-2 * everything.mean_kl  # 8 bits need no list
    simulation.restore()
    ranks = [item.mean_kl / item.share for item in found.sensitivities]
    assert ranks == sorted(ranks, reverse=True)


def test_compensation_is_judged_on_rows_it_was_not_fitted_to_and_still_helps(model, rows):
    rng = np.random.default_rng(5)
    # Tokens from a few, so that inputs are correlated as those of text are.
    text = rng.choice(rng.integers(0, CONFIG.vocab_size, 6), (40, 24)).tolist()
    found = fit(model, text, 10.0)
    assert found.compensated
    assert found.mean_kl_all_quantized < found.mean_kl_round_to_nearest


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"precision": "int8"}, "for int8-weight-only, int4-weight-only, not for int8"),
        ({"precision": "fp16"}, "not for fp16"),
        ({"budget": 0.0}, "budget is 0.0"),
        ({"budget": math.nan}, "budget is nan"),
        ({"rows": [[1, 2, 3]]}, "1 row"),
    ],
)
def test_what_cannot_be_fitted_is_refused(options, named, model, rows):
    with pytest.raises(ParityError, match=named):
        fit(**({"model": model, "rows": rows, "budget": 1.0} | options))


def test_a_fit_rounds_in_the_blocks_that_an_export_would(model, rows):
    found = fit(model, rows, 10.0, int4_block=64)
    assert (found.block, fit(model, rows, 10.0).block) == (64, 32)
    assert {item.matrix for item in found.sensitivities} == set(matrix_shapes(model.config))  # of 32 rows and 128
    assert fit(model, rows, 10.0, "int8-weight-only").block is None


@pytest.mark.slow
def test_the_block_of_a_bundle_is_fitted_and_named_by_the_command(int4_in_blocks):
    bundle = int4_in_blocks(64)
    checkpoint = bundle.with_name(f"{bundle.name}.checkpoint")
    arguments = ["parity", str(bundle), "--checkpoint", str(checkpoint), "--fit-budget", "10"]
    fields = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert fields["fit"]["block"] == 64
    assert fields["export_options"].startswith("--precision int4-weight-only --int4-block 64 --keep-high none")
    shown = CliRunner().invoke(app, ["inspect", str(bundle)])
    assert "one for 64 rows of a column" in shown.stderr


@pytest.mark.slow
def test_an_export_with_the_list_is_better_and_the_command_says_how_to_make_it(model, export_model, tmp_path):
    plain = export_model("int4", lambda: model, precision="int4-weight-only", keep_high=(), max_seq_len=64)
    checkpoint = tmp_path / "checkpoint"
    write_native(model, checkpoint)
    arguments = ["parity", str(plain), "--checkpoint", str(checkpoint), "--json", "--fit-budget"]
    everything = json.loads(CliRunner().invoke(app, [*arguments, "10"]).stdout)["fit"]["mean_kl"]
    result = CliRunner().invoke(app, [*arguments, str(everything / 3)])
    assert result.exit_code == 0, result.stderr
    fields = json.loads(result.stdout)
    kept = fields["fit"]["keep_high"]
    assert fields["passed"] and kept
    assert fields["export_options"].startswith(f"--precision int4-weight-only --keep-high {kept[0]}")
    assert fields["export_options"].endswith(" --compensate")
    better = tmp_path / "better"
    lrt_deploy.export_bundle(
        checkpoint, better, precision="int4-weight-only", keep_high=kept, compensate=True, max_seq_len=64
    )
    assert read_manifest(better).precision_details["int4-weight-only"]["compensated"]
    reference = ReferenceDecoder(model, 64)

    def mean_kl(bundle):
        with lrt_deploy.open_decoder(bundle) as decoder:
            points = roll_out(reference, decoder, [1, 2, 3, 4], 56, Reading(), lambda *progress: None).points
        return sum(point.kl for point in points) / len(points)

    assert mean_kl(better) < 0.6 * mean_kl(plain)
    shown = CliRunner().invoke(app, [*arguments[:-2], "--fit-budget", "1e-30"])
    assert shown.exit_code == 0 if "FAIL" not in shown.stdout else 1
    assert CliRunner().invoke(app, ["parity", str(plain), "--fit-budget", "1"]).exit_code == 2
