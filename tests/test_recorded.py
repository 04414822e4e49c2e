"""Parity with recorded numbers: the authors' own are met, others are not, damaged files are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from lrt_deploy.cli.app import app
from lrt_deploy.errors import ParityError
from lrt_deploy.evaluation.checks import compare_with_recording, read_recording
from lrt_deploy.tolerances import limits

pytestmark = pytest.mark.slow  # for the export
NAME, PLAIN = "mr_gqa_SSSL", "baseline_ve"


def run(*args):
    return CliRunner().invoke(app, ["parity", *(str(arg) for arg in args)])


@pytest.fixture
def arrays(golden_of):
    """The first 24 tokens of one row."""
    found = golden_of(NAME).arrays
    return {name: found[name][:1, :24] for name in ("ids", "seq_logits", "seq_h_final")}


@pytest.fixture
def recorded(tmp_path):
    def write(**arrays):
        path = tmp_path / "recorded.npz"
        np.savez(path, **arrays)
        return path

    return write


@pytest.mark.parametrize("name", [NAME, PLAIN])
def test_the_authors_numbers_are_met(name, export_once, golden_of):
    result = run(export_once(name), "--golden", golden_of(name).folder / "golden.npz", "--json")
    assert result.exit_code == 0, result.output
    (check,) = json.loads(result.stdout)["checks"]
    ids = golden_of(name).ids
    assert (check["name"], check["passed"], check["positions"]) == ("golden", True, ids.size)
    assert check["max_abs_logit_error"] < 5e-5 and check["top1_agreement"] == 1.0
    assert (check["max_abs_latent_error"] is None) == (name == PLAIN)


@pytest.mark.parametrize("array", ["seq_logits", "seq_h_final"])
def test_one_number_that_is_off_fails_with_exit_code_1(array, export_once, arrays, recorded):
    arrays[array] = arrays[array].copy()
    arrays[array][0, 20, 5] += 2e-4
    result = run(export_once(NAME), "--golden", recorded(**arrays))
    assert result.exit_code == 1
    assert result.stdout.startswith("FAIL: golden, 24 recorded positions of 1 row(s)")


def test_a_recording_of_the_last_positions_is_enough(decoder_of, arrays, recorded):
    part = {
        "ids": arrays["ids"],
        "seq_logits_last8": arrays["seq_logits"][:, -8:],
        "seq_h_final": arrays["seq_h_final"],
    }
    decoder = decoder_of(NAME)
    check = compare_with_recording(decoder, read_recording(recorded(**part), decoder.config), limits("fp32"))
    assert (check.passed, check.positions) == (True, 8)


def test_a_precision_with_fewer_bits_is_judged_by_quality(decoder_of, arrays, recorded):
    """Of the same numbers: the first choice of a third of the positions is another one."""
    arrays["seq_logits"] = arrays["seq_logits"].copy()
    arrays["seq_logits"][0, ::3, 7] = 14.9
    decoder = decoder_of(NAME)
    check = compare_with_recording(decoder, read_recording(recorded(**arrays), decoder.config), limits("int8"))
    assert not check.passed and 0.5 < check.top1_agreement < 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("ids"), "lacks ids; it holds seq_logits, seq_h_final"),
        (lambda a: a.pop("seq_logits"), r"lacks seq_logits\*; it holds ids, seq_h_final"),
        (lambda a: a.pop("seq_h_final"), "lacks seq_h_final; it holds ids, seq_logits"),
        (lambda a: a.update(ids=a["ids"].astype(float)), "another model"),
        (lambda a: a.update(seq_logits=a["seq_logits"][..., 1:]), "another model"),
        (lambda a: a.update(seq_h_final=a["seq_h_final"][:, 1:]), "another model"),
    ],
)
def test_what_is_no_recording_of_this_model_is_refused(change, message, decoder_of, arrays, recorded):
    change(arrays)
    with pytest.raises(ParityError, match=message):
        read_recording(recorded(**arrays), decoder_of(NAME).config)


def test_a_file_that_is_no_archive_is_refused(decoder_of, tmp_path):
    for content in (b"", b"no archive", b"PK\x03\x04" + b"\0" * 40):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(ParityError, match="cannot be read"):
            read_recording(tmp_path / "x.npz", decoder_of(NAME).config)


def test_one_array_and_a_damaged_archive_are_refused(decoder_of, arrays, tmp_path):
    np.save(tmp_path / "one.npy", arrays["ids"])
    with pytest.raises(ParityError, match="one array"):
        read_recording(tmp_path / "one.npy", decoder_of(NAME).config)
    np.savez_compressed(tmp_path / "whole.npz", **arrays)
    whole = (tmp_path / "whole.npz").read_bytes()
    for at in range(64, len(whole) // 2, len(whole) // 40):  # within the compressed arrays
        (tmp_path / "cut.npz").write_bytes(whole[:at] + b"\xff" * 16 + whole[at + 16 :])
        with pytest.raises(ParityError, match="cannot be read"):
            read_recording(tmp_path / "cut.npz", decoder_of(NAME).config)


def test_rows_beyond_the_capacity_are_refused(decoder_of, arrays, recorded):
    decoder = decoder_of(NAME)
    long = {name: np.repeat(array, 8, axis=1) for name, array in arrays.items()}
    with pytest.raises(ParityError, match="192 tokens and the decoder holds 128"):
        compare_with_recording(decoder, read_recording(recorded(**long), decoder.config), limits("fp32"))
