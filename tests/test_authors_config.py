"""What a checkpoint in the authors' layout is: its meta completed by its tensors, or refused by name; never guessed."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from random_models import random_model

import lrt_deploy
from lrt_deploy.bundle.weights import weight_sources
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import CheckpointError, ConfigError
from lrt_deploy.model.checkpoint import TRAINING_FIELDS, open_checkpoint

# A plain nanochat checkpoint with random weights, made by the code of its commit d314e96 (December 2025): ids (1, 200),
# logits (1, 200, 128) of that code's forward.
DECEMBER = Path(__file__).parent / "data" / "nanochat_2025_12"
SIZES = {"sequence_len": 64, "vocab_size": 100, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
SEVEN_FIELDS = SIZES | {"window_pattern": "SSSL"}  # what chat training writes


def tensors(**changes):
    """The authors' tensors of a small random model."""
    return dict(_tensors(tuple(changes.items())))


@cache
def _tensors(changes):
    model = random_model(LRTConfig(**SEVEN_FIELDS | dict(changes)))
    found = {}
    for name, source in weight_sources(model.config).items():
        sizes = [shape[0 if source.transposed else -1] for shape in source.shapes]
        for key, part in zip(source.names, model.get_parameter(name).detach().split(sizes, dim=-1), strict=True):
            found[key] = (part.T if source.transposed else part).contiguous()
    return found


def nanochat(channels=32, **changes):
    return tensors(memory=False, ve_gate_channels=channels, **changes)


@pytest.fixture
def write(tmp_path):
    """Write a checkpoint in the authors' layout; returns its folder."""

    def write(weights, **model_config):
        torch.save(weights, tmp_path / "model_000000.pt")
        (tmp_path / "meta_000000.json").write_text(json.dumps({"step": 0, "model_config": model_config}))
        return tmp_path

    return write


def refused(folder, *words, error=CheckpointError):
    with pytest.raises(error) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert not [word for word in words if word not in message], message


# Plain nanochat


def test_nanochat_of_december_2025_is_exported_from_its_base_folder_with_that_codes_logits(tmp_path):
    base = tmp_path / "nanochat"
    shutil.copytree(DECEMBER, base / "base_checkpoints" / "d4")
    assert open_checkpoint(base).known_as == "plain nanochat of October 2025 to 2026-01-10"
    manifest = lrt_deploy.export_bundle(base, tmp_path / "bundle", max_batch_size=1)
    origin = manifest.provenance["checkpoint"]
    assert origin["chosen"] == "took base_checkpoints/d4, step 0"
    assert origin["known_as"] == "plain nanochat of October 2025 to 2026-01-10"
    with np.load(DECEMBER / "logits.npz") as recorded:
        ids, expected = recorded["ids"], recorded["logits"]
    with lrt_deploy.open_decoder(tmp_path / "bundle") as decoder:
        state = decoder.prefill(ids[:, :1].tolist(), policy="stepwise")
        found = [state.logits.copy(), *(decoder.step(state, ids[:, t]).copy() for t in range(1, ids.shape[1]))]
    assert np.abs(np.stack(found, axis=1) - expected).max() < 5e-5
    assert np.abs(expected).max() > 1


def test_nanochat_without_value_embeddings_is_known_by_its_lambdas(write):
    weights = tensors(memory=False, use_value_embeds=False)
    assert open_checkpoint(write(weights, **SEVEN_FIELDS)).known_as == "plain nanochat of 2026-01-11 to 01-16"


def test_files_of_nanochat_that_do_not_tell_the_softcap_are_refused_until_the_meta_states_it(write):
    refused(write(nanochat(), **SEVEN_FIELDS), "model_000000.pt", "2026-03-02", "logit_softcap", "meta_000000.json")
    for stated in (15, 15.0):
        opened = open_checkpoint(write(nanochat(), **SEVEN_FIELDS, logit_softcap=stated))
        assert "softcap of 15 that its meta states" in opened.known_as
        assert opened.config.value_embed_layers == (1, 3)
        assert opened.config.ve_gate_channels == 32
        opened.model()


@pytest.mark.parametrize("stated", [20, 20.0, True, "15", None, float("inf")])
def test_another_softcap_is_refused(write, stated):
    folder = write(nanochat(), **SEVEN_FIELDS, logit_softcap=stated)
    refused(folder, "logit_softcap", repr(stated), "15", error=ConfigError)


def test_nanochat_from_march_2026_on_is_refused_by_name(write):
    refused(write(nanochat(12), **SEVEN_FIELDS), "12 channels", "2026-03-09", "100,000", "softcap 20")
    refused(write(nanochat(12), **SEVEN_FIELDS, logit_softcap=15), "12 channels", "2026-03-09")


@pytest.mark.parametrize(
    ("name", "date"),
    [
        ("smear_gate.weight", "March 2026"),
        ("backout_lambda", "March 2026"),
        ("bigram_embed.weight", "2026-01-27"),
        ("bigram_lambdas", "2026-01-27"),
    ],
)
def test_tensors_of_another_arithmetic_are_refused_by_the_date_that_had_them(write, name, date):
    refused(write(nanochat() | {name: torch.zeros(1)}, **SEVEN_FIELDS, logit_softcap=15), name, date)


def test_gates_of_a_width_that_no_code_wrote_are_refused(write):
    refused(write(nanochat(20), **SEVEN_FIELDS), "20 channels", "64")


@pytest.mark.parametrize("channels", [12, 20, 32, 0])
def test_the_lrt_authors_plain_model_is_known_by_its_fields(write, channels):
    fields = SEVEN_FIELDS | {"use_interleaved": False, "use_multi_refine": False, "use_value_embeds": True}
    opened = open_checkpoint(write(nanochat(channels), **fields))
    assert opened.known_as == "plain model of the LRT authors' code, as its meta says"
    assert opened.config.ve_gate_channels == channels


def test_the_lrt_authors_plain_chat_model_is_known_by_gates_of_all_channels(write):
    for every_layer in (False, True):
        opened = open_checkpoint(write(nanochat(0, ve_every_layer=every_layer), **SEVEN_FIELDS))
        assert opened.known_as == "plain model of the LRT authors' code, by its gates of all channels"
        assert opened.config.ve_every_layer == every_layer
        opened.model()


# LRTs


@pytest.mark.parametrize("name", ["gate32", "mr_gqa_SSSL", "interleaved", "no_x0", "no_resid_lambdas"])
def test_a_chat_checkpoint_of_an_lrt_is_the_same_model_by_its_tensors_alone(golden_of, tmp_path, name):
    source = golden_of(name).folder
    shutil.copy(source / "model_000000.pt", tmp_path)
    meta = json.loads((source / "meta_000000.json").read_text())
    fields = {field: meta["model_config"][field] for field in SEVEN_FIELDS}
    (tmp_path / "meta_000000.json").write_text(json.dumps({"step": 0, "model_config": fields}))
    first, second = open_checkpoint(source), open_checkpoint(tmp_path)
    assert second.known_as == "LRT, by its tensors: its meta does not name the memory path"
    ids = torch.arange(16)[None]
    expected, found = (
        model.logits(model.parallel(ids, torch.ones(1, 16, first.config.n_embd))[0])
        for model in (first.model(), second.model())
    )
    assert torch.equal(found, expected)


def test_a_meta_that_denies_the_memory_is_contradicted(write):
    folder = write(tensors(), **SEVEN_FIELDS, use_interleaved=False, use_multi_refine=False)
    refused(folder, "meta_000000.json", "use_interleaved is False", "model_000000.pt", "interleaved_lambdas")


def test_a_meta_that_claims_memory_is_contradicted(write):
    folder = write(nanochat(0), **SEVEN_FIELDS, use_multi_refine=True)
    refused(folder, "meta_000000.json", "use_multi_refine is True", "model_000000.pt", "no memory tensors")


@pytest.mark.parametrize(
    ("says", "weights", "holds"),
    [
        ({"use_x0_residual": False}, {}, "x0_lambdas"),
        ({"use_resid_lambdas": False}, {}, "resid_lambdas"),
        ({"use_value_embeds": False}, {}, "value_embeds.1.weight"),
        ({"use_value_embeds": True}, {"use_value_embeds": False}, "no value embeddings"),
    ],
)
def test_other_contradictions_name_both_sides(write, says, weights, holds):
    (field, value), *_ = says.items()
    refused(write(nanochat(0, **weights), **SEVEN_FIELDS, **says), "meta_000000.json", f"{field} is {value}", holds)


# Fields


@pytest.mark.parametrize("field", ["rope_base", "softcap", "n_experts", "qk_scale", "x" * 5000])
def test_an_unknown_field_is_refused_by_name(write, field):
    refused(write(tensors(), **SEVEN_FIELDS, **{field: 1}), "meta_000000.json", field[:100], error=ConfigError)


def test_fields_of_training_are_known(write):
    opened = open_checkpoint(write(tensors(), **SEVEN_FIELDS, **{name: [1, None] for name in TRAINING_FIELDS}))
    assert opened.config.memory


@pytest.mark.parametrize("field", ["use_interleaved", "use_x0_residual", "ve_every_layer"])
@pytest.mark.parametrize("value", [1, "true", [True]])
def test_a_switch_is_true_or_false(write, field, value):
    refused(write(tensors(), **SEVEN_FIELDS, **{field: value}), field, repr(value), error=ConfigError)


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [0, 4_000_000_000, 10**4000, 2.0, True, None])
def test_sizes_out_of_bounds_are_refused_by_field(write, field, value):
    with pytest.raises(ConfigError, match=field) as caught:
        open_checkpoint(write(tensors(), **SEVEN_FIELDS | {field: value}))
    assert len(str(caught.value)) < 400


def test_a_product_of_sizes_out_of_bounds_is_refused_by_its_fields(write):
    folder = write(tensors(), **SEVEN_FIELDS | {"sequence_len": 2**18, "n_embd": 2**16})
    refused(folder, "sequence_len * n_embd / n_head", error=ConfigError)


def test_as_many_layers_as_are_allowed_are_refused_at_once(write):
    with pytest.raises(CheckpointError, match=r"its config says \(1024,\)"):
        open_checkpoint(write(tensors(), **SEVEN_FIELDS | {"n_layer": 1024})).model()
    refused(write(tensors(), **SEVEN_FIELDS | {"n_layer": 1025}), "n_layer", "1025", error=ConfigError)
    refused(write(tensors(), **SEVEN_FIELDS | {"window_pattern": "S" * 2000}), "window_pattern", error=ConfigError)
