"""Checkpoints are read exactly, and whatever is wrong with one is said by file and key; nothing in a file ever runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from random_models import random_model, write_native

from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import CheckpointError, ConfigError
from lrt_deploy.model.checkpoint import open_checkpoint
from lrt_deploy.model.model import LRT

GOLDEN = "padded_vocab"
CONFIG = {
    "sequence_len": 16,
    "vocab_size": 100,
    "n_layer": 3,
    "n_head": 2,
    "n_kv_head": 1,
    "n_embd": 16,
    "window_pattern": "SL",
    "use_multi_refine": True,
}


def state_dict(seed=0, **changes):
    """The authors' tensors of a small random model."""
    fields = {k: v for k, v in CONFIG.items() if k != "use_multi_refine"}
    model = random_model(LRTConfig(**fields | changes), seed=seed)
    return tensors_of(model)


def tensors_of(model):
    from lrt_deploy.bundle.weights import weight_sources

    found = {}
    for name, source in weight_sources(model.config).items():
        sizes = [shape[0 if source.transposed else -1] for shape in source.shapes]
        for key, part in zip(source.names, model.get_parameter(name).detach().split(sizes, dim=-1), strict=True):
            found[key] = (part.T if source.transposed else part).clone()
    return found


@pytest.fixture
def write(tmp_path):
    """Write a checkpoint in the authors' layout; returns its folder."""

    def write(tensors, config=CONFIG, step=0, **options):
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        torch.save(tensors, folder / f"model_{step:06d}.pt", **options)
        (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": config}))
        return folder

    return write


def parameters(folder, step=None):
    return dict(open_checkpoint(folder, step).model().named_parameters())


def equal(first, second):
    """Bit-equal, dtypes included."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def without(tensors, *parts):
    return {key: tensor for key, tensor in tensors.items() if not any(part in key for part in parts)}


# What is read


def test_the_authors_layout_is_read_exactly(write):
    tensors = state_dict()
    found = parameters(write(tensors))
    assert equal(found, dict(random_model(open_checkpoint(write(tensors)).config).named_parameters()))
    tensors["transformer.h.1.attn.c_k.weight"][0, 0] += 1e-3
    assert not equal(found, parameters(write(tensors)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"memory_projections": "shared", "memory_source_layer": 1},
        {"memory_kv": False},
        {"memory_residual": False, "use_value_embeds": False},
        {"memory": False, "ve_gate_channels": 8, "use_x0_residual": False},
    ],
    ids=str,
)
def test_a_native_checkpoint_returns_every_bit(tmp_path, fields, dtype):
    config = LRTConfig(**{k: v for k, v in CONFIG.items() if k != "use_multi_refine"} | fields)
    model = random_model(config, table_dtype=dtype)
    write_native(model, tmp_path)
    opened = open_checkpoint(tmp_path)
    assert opened.config == config
    assert equal(parameters(tmp_path), dict(model.named_parameters()))
    assert opened.model().wte.dtype == dtype


def test_an_authors_checkpoint_written_natively_is_the_same_model(golden, tmp_path):
    first = open_checkpoint(golden.folder)
    write_native(first.model(), tmp_path)
    second = open_checkpoint(tmp_path)
    assert second.config == first.config
    assert equal(parameters(golden.folder), parameters(tmp_path))
    assert second.sha256 != first.sha256


def test_the_prefix_of_a_compiled_model_is_dropped(write):
    tensors = state_dict()
    plain = parameters(write(tensors))
    assert equal(parameters(write({f"_orig_mod.{key}": tensor for key, tensor in tensors.items()})), plain)


def test_lambdas_missing_in_old_files_are_ones_and_zeros(write):
    found = parameters(write(without(state_dict(), "resid_lambdas", "x0_lambdas")))
    assert torch.equal(found["resid_lambdas"], torch.ones(3))
    assert torch.equal(found["x0_lambdas"], torch.zeros(3))


def test_lambdas_that_are_switched_off_are_not_asked_for(write):
    off = {"use_resid_lambdas": False, "use_x0_residual": False}
    found = parameters(write(state_dict(**off), CONFIG | off))
    assert "resid_lambdas" not in found
    assert "x0_lambdas" not in found


def test_a_missing_window_pattern_means_long_windows(write):
    config = {k: v for k, v in CONFIG.items() if k != "window_pattern"}
    assert open_checkpoint(write(state_dict(), config)).config.windows == (16, 16, 16)
    assert open_checkpoint(write(state_dict())).config.windows == (8, 16, 16)


def test_a_window_pattern_may_be_lower_case(write):
    assert open_checkpoint(write(state_dict(), CONFIG | {"window_pattern": "sL"})).config.window_pattern == "SL"


@pytest.mark.parametrize("channels", [8, 0])
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("stated", [None, 0, 4, 8])
def test_gate_channels_are_read_from_the_gate_whatever_the_config_says(write, channels, memory, stated):
    config = CONFIG | {"use_multi_refine": memory} | ({} if stated is None else {"ve_gate_channels": stated})
    opened = open_checkpoint(write(state_dict(ve_gate_channels=channels, memory=memory), config))
    assert opened.config.ve_gate_channels == channels
    opened.model()


@pytest.mark.parametrize("flag", ["use_interleaved", "use_multi_refine"])
def test_either_flag_means_memory_and_none_means_a_plain_model(write, flag):
    config = {k: v for k, v in CONFIG.items() if k != "use_multi_refine"}
    assert open_checkpoint(write(state_dict(), config | {flag: True})).config.memory
    plain = open_checkpoint(write(state_dict(memory=False), config | {flag: False}))
    assert not plain.config.memory
    plain.model()


def test_the_last_step_is_read_unless_another_is_asked_for(write):
    for step in (5, 20, 100):
        folder = write(state_dict(seed=step), step=step)
    assert open_checkpoint(folder).step == 100
    assert open_checkpoint(folder, 5).model_file.name == "model_000005.pt"
    assert equal(parameters(folder, 20), dict(random_model(open_checkpoint(folder).config, 20).named_parameters()))
    assert not equal(parameters(folder, 20), parameters(folder, 5))
    assert open_checkpoint(folder / "model_000020.pt").step == 20
    with pytest.raises(CheckpointError, match=r"no step 7; it has step 5, 20, 100"):
        open_checkpoint(folder, 7)


def test_bfloat16_tables_stay_and_other_dtypes_become_float32(write):
    tensors = state_dict()
    tables = {key for key in tensors if "wte" in key or "value_embeds" in key}
    changed = {key: t.bfloat16() if key in tables else t.double() for key, t in tensors.items()}
    found = parameters(write(changed))
    assert {name for name, p in found.items() if p.dtype == torch.bfloat16} == {"wte", "value_embeds"}
    assert {p.dtype for name, p in found.items() if name not in ("wte", "value_embeds")} == {torch.float32}


# What is refused, and by which words


def refused(folder, *words, error=CheckpointError, step=None):
    """Opening and loading fails with one message that holds all these words."""
    with pytest.raises(error) as caught:
        open_checkpoint(folder, step).model()
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    assert "Traceback" not in message
    return message


KEY = "transformer.h.1.attn.c_k.weight"


def changed(**entries):
    tensors = state_dict()
    return tensors | {key.replace("__", "."): value for key, value in entries.items()}


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(8, 15), ["(8, 15)", "(8, 16)"]),
        (torch.zeros(16, 8), ["(16, 8)", "(8, 16)"]),
        (torch.zeros(128), ["(128,)", "(8, 16)"]),
        (torch.zeros(()), ["()", "(8, 16)"]),
        (torch.zeros(0, 16), ["(0, 16)", "(8, 16)"]),
        (torch.zeros(8, 16, dtype=torch.int64), ["int64"]),
        (torch.zeros(8, 16, dtype=torch.int8), ["int8"]),
        (torch.zeros(8, 16, dtype=torch.bool), ["bool"]),
        (torch.zeros(8, 16, dtype=torch.complex64), ["complex64"]),
        (torch.zeros(8, 16).to_sparse(), ["sparse"]),
        (torch.full((8, 16), float("nan")), ["128", "not finite"]),
        (torch.zeros(8, 16).index_fill(0, torch.tensor([3]), float("inf")), ["16", "not finite"]),
        (torch.full((8, 16), 1e300, dtype=torch.float64), ["128", "not finite in float32"]),
        (torch.empty(8, 16, device="meta"), []),
        (torch.zeros(8, 16).to(torch.float8_e4m3fn), []),
    ],
    ids=lambda value: f"{value.dtype}-{tuple(value.shape)}-{value.device}" if hasattr(value, "dtype") else "",
)
def test_a_tensor_that_does_not_fit_is_named(write, tensor, words):
    folder = write(state_dict() | {KEY: tensor})
    refused(folder, "model_000000.pt", KEY, *words)


@pytest.mark.parametrize("key", [key for key in state_dict() if key not in ("resid_lambdas", "x0_lambdas")])
def test_a_missing_tensor_is_named(write, key):
    missing = without(state_dict(), key)
    if "triple_gate" in key or "interleaved_init_value_embeds" in key:
        refused(write(missing), "model_000000.pt", key)
    else:
        refused(write(missing), "model_000000.pt", "no tensor", repr(key))


def test_unknown_tensors_are_named(write):
    message = refused(write(state_dict() | {"transformer.h.3.mlp.c_fc.weight": torch.zeros(1)}), "model_000000.pt")
    assert "'transformer.h.3.mlp.c_fc.weight'" in message


def test_memory_weights_in_a_plain_model_are_not_dropped_silently(write):
    refused(write(state_dict(), CONFIG | {"use_multi_refine": False}), "model_000000.pt")


def test_no_checkpoint_is_said_so(tmp_path):
    refused(tmp_path / "absent", "absent", "does not exist")
    refused(tmp_path, "model_NNNNNN.pt", "model.safetensors", str(tmp_path))


@pytest.mark.parametrize("content", [{"a": 1}, [torch.zeros(2)], torch.zeros(2), {1: torch.zeros(2)}, {"w": {"x": 1}}])
def test_a_file_that_is_no_state_dict_is_refused(write, content):
    refused(write(content), "model_000000.pt", "state dict")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(write, kept):
    folder = write(state_dict())
    file = folder / "model_000000.pt"
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    refused(folder, "model_000000.pt")


@pytest.mark.parametrize(
    "content",
    [b"\0" * 4096, b"not a checkpoint\n", b"PK\x03\x04" + b"\xff" * 500, bytes(range(256)) * 20, b"\x80\x04."],
)
def test_garbage_is_refused(write, content):
    folder = write(state_dict())
    (folder / "model_000000.pt").write_bytes(content)
    refused(folder, "model_000000.pt")


def test_a_folder_in_place_of_the_file_is_refused(write):
    folder = write(state_dict())
    (folder / "model_000000.pt").unlink()
    (folder / "model_000000.pt").mkdir()
    refused(folder, "model_000000.pt")


def rewrite_pickle(file, change):
    """Replace the pickle inside a zip checkpoint."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_pickle_never_surfaces_as_another_error(write, seed):
    folder = write({"w": torch.zeros(2), "v": torch.ones(3, 2)})
    file = folder / "model_000000.pt"
    original, chance = file.read_bytes(), np.random.default_rng(seed)

    def damage(content):
        content = bytearray(content)
        for _ in range(chance.choice([1, 1, 2, 5])):
            content[chance.integers(len(content))] = chance.integers(256)
        return bytes(content)

    for _ in range(30):
        file.write_bytes(original)
        rewrite_pickle(file, damage)
        refused(folder, "model_000000.pt")


class Runs:
    """Unpickled by Python's own pickle, this runs a command."""

    def __init__(self, sentinel, via=None):
        self.sentinel, self.via = sentinel, via

    def __reduce__(self):
        call = (os.system, (f"touch {self.sentinel}",))
        if self.via == "tensor subclass":  # torch rebuilds those by calling what the file says
            return torch._tensor._rebuild_from_type_v2, (os.system, torch.Tensor, call[1], {})
        if self.via == "parameter":
            return torch._utils._rebuild_parameter_with_state, (torch.zeros(1), False, {}, Hides(call))
        return call


class Hides:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


class Subclass(torch.Tensor):
    sentinel = None

    def __reduce_ex__(self, protocol):
        return os.system, (f"touch {self.sentinel}",)


def hostile(kind, sentinel):
    if kind == "a subclass of Tensor":
        tensor = torch.zeros(8, 16).as_subclass(Subclass)
        tensor.sentinel = sentinel
        return tensor
    return Runs(sentinel, None if kind == "an object" else kind)


HOSTILE = {  # and the first global in it that no state dict of plain tensors needs
    "an object": "posix.system",
    "tensor subclass": "torch._tensor._rebuild_from_type_v2",
    "parameter": "torch._utils._rebuild_parameter_with_state",
    "a subclass of Tensor": "posix.system",
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_hostile_checkpoint_is_refused_and_nothing_runs(write, tmp_path, kind, zipped):
    sentinel = tmp_path / "ran"
    folder = write(state_dict() | {KEY: hostile(kind, sentinel)}, _use_new_zipfile_serialization=zipped)
    message = refused(folder, "model_000000.pt")
    assert not sentinel.exists()
    if zipped:
        assert "nothing in it was run" in message
        assert f"names {HOSTILE[kind]} near '{KEY}'" in message


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_these_files_are_hostile(write, tmp_path, kind, zipped):
    sentinel = tmp_path / "ran"
    folder = write(state_dict() | {KEY: hostile(kind, sentinel)}, _use_new_zipfile_serialization=zipped)
    with contextlib.suppress(Exception):  # what comes of it is no tensor; the harm is done
        torch.load(folder / "model_000000.pt", weights_only=False)
    assert sentinel.exists()


def test_a_bare_pickle_is_refused_and_nothing_runs(write, tmp_path):
    sentinel = tmp_path / "ran"
    folder, content = write(state_dict()), pickle.dumps(Runs(sentinel))
    (folder / "model_000000.pt").write_bytes(content)
    refused(folder, "model_000000.pt")
    assert not sentinel.exists()
    pickle.loads(content)
    assert sentinel.exists()


def test_a_harmless_object_is_refused_by_its_name(write):
    refused(write({"args": argparse.Namespace(lr=1)}), "model_000000.pt", "argparse.Namespace")


# meta_NNNNNN.json and config.json


def test_a_missing_meta_file_is_named(write):
    folder = write(state_dict())
    (folder / "meta_000000.json").unlink()
    refused(folder, "meta_000000.json", "missing")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[1]",
        b"{}",
        b'{"model_config": []}',
        b'{"model_config": null}',
        b"[" * 100_000,
    ],
    ids=range(9),
)
def test_a_meta_file_that_is_none_is_named(write, content):
    folder = write(state_dict())
    (folder / "meta_000000.json").write_bytes(content)
    refused(folder, "meta_000000.json")


WRONG = [
    ("n_layer", 0),
    ("n_layer", -1),
    ("n_layer", 3.0),
    ("n_layer", "3"),
    ("n_layer", True),
    ("n_layer", None),
    ("n_layer", [3]),
    ("n_head", 3),
    ("n_kv_head", 3),
    ("sequence_len", 0),
    ("vocab_size", float("nan")),
    ("window_pattern", ""),
    ("window_pattern", "SM"),
    ("window_pattern", 1),
    ("use_value_embeds", 1),
    ("use_x0_residual", "true"),
    ("ve_gate_channels", 17),
    ("ve_gate_channels", -1),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda value: repr(value))
def test_a_contradictory_config_is_named(write, field, value):
    refused(write(state_dict(), CONFIG | {field: value}), "meta_000000.json", field, repr(value), error=ConfigError)


@pytest.mark.parametrize("field", ["sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"])
def test_a_missing_size_is_named(write, field):
    config = {k: v for k, v in CONFIG.items() if k != field}
    refused(write(state_dict(), config), "meta_000000.json", field, error=ConfigError)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_embd": 32},
        {"n_layer": 4},
        {"n_layer": 2},
        {"n_kv_head": 2},
        {"vocab_size": 200},
        {"vocab_size": 10**15},
        {"n_embd": 2**40},
        {"sequence_len": 10**15},
    ],
    ids=str,
)
def test_a_config_of_another_model_is_a_named_error(write, changes):
    folder = write(state_dict(), CONFIG | changes)
    with pytest.raises((CheckpointError, ConfigError), match=r"model_000000\.pt|meta_000000\.json"):
        open_checkpoint(folder).model()


@pytest.fixture
def native(tmp_path):
    folder = tmp_path / "native"
    write_native(random_model(LRTConfig(**{k: v for k, v in CONFIG.items() if k != "use_multi_refine"})), folder)
    return folder


def test_a_native_checkpoint_without_its_config_is_named(native):
    (native / "config.json").unlink()
    refused(native, "config.json", "missing")


@pytest.mark.parametrize("changes", [{"memory_source_layer": 3}, {"memory_projections": "both"}, {"colour": 1}])
def test_a_contradictory_native_config_is_named(native, changes):
    fields = json.loads((native / "config.json").read_text())
    (native / "config.json").write_text(json.dumps(fields | changes))
    refused(native, "config.json", *changes, error=ConfigError)


def test_a_native_config_of_another_model_is_named(native):
    fields = json.loads((native / "config.json").read_text())
    (native / "config.json").write_text(json.dumps(fields | {"n_kv_head": 2}))
    refused(native, "model.safetensors", "(8, 16)", "(16, 16)")


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, 0.999])
def test_truncated_safetensors_are_refused(native, kept):
    file = native / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    refused(native, "model.safetensors")


@pytest.mark.parametrize("header", [b"\xff" * 8, b"\x10" + b"\0" * 7, (2**60).to_bytes(8, "little")])
def test_a_garbage_safetensors_header_is_refused(native, header):
    file = native / "model.safetensors"
    file.write_bytes(header + file.read_bytes()[8:])
    refused(native, "model.safetensors")


def test_a_safetensors_file_of_something_else_is_refused(native):
    import safetensors.torch

    safetensors.torch.save_file({"w": torch.zeros(2)}, native / "model.safetensors")
    refused(native, "model.safetensors", "'w'")


def test_a_loaded_model_depends_on_no_file(write):
    folder = write(state_dict())
    model = open_checkpoint(folder).model()
    before = model.lm_head.clone()
    (folder / "model_000000.pt").write_bytes(b"\0" * (folder / "model_000000.pt").stat().st_size)
    assert isinstance(model, LRT)
    assert torch.equal(model.lm_head, before)
