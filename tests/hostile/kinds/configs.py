"""`meta_NNNNNN.json` and `config.json` with other fields, types, sizes and text."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from hostile.mutate import INTEGERS, changed_json, changed_text, is_json, odd_file, scalar, text_of
from hostile.originals import Originals, parameters
from hostile.trial import EQUAL, OTHER, WRONG, Trial, command

from .checkpoints import META, MODEL, same

FIELDS = (
    *("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern", "use_value_embeds"),
    *("use_x0_residual", "use_resid_lambdas", "ve_gate_channels"),
)
OWN = ("ve_every_layer", "memory", "memory_projections", "memory_source_layer", "memory_kv", "memory_residual")
# Fields that no release has: a checkpoint that says one of them means an arithmetic that nobody here knows.
UNKNOWN = ("rope_base", "softcap", "n_experts", "zz", "attention_bias", "norm_eps", "use_gate2", "logit_scale")


def configs(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """A changed config beside its own weights."""
    name = rng.choice(("lrt", "lrt", "plain", "native", "native"))
    folder = place / "checkpoint"
    folder.mkdir()
    file, weights = (META, MODEL) if name != "native" else ("config.json", "model.safetensors")
    os.link(originals.folder / name / weights, folder / weights)
    original = json.loads(originals.bytes_of(f"{name}/{file}"))
    under = ("model_config",) if name != "native" else ()
    kind = rng.choices(("field", "unknown", "json", "text", "no file"), (45, 8, 30, 15, 2))[0]
    if kind == "field":
        value = json.loads(text_of(original))
        fields = value["model_config"] if under else value
        key = rng.choice((*fields, *OWN) if not under else tuple(fields))
        fields[key] = rng.choice((rng.choice(INTEGERS), scalar(rng), scalar(rng)))
        what, data = f"{key} = {str(fields[key])[:60]!a}", text_of(value).encode("utf-8", "surrogatepass")
    elif kind == "unknown":
        value = json.loads(text_of(original))
        key = rng.choice(UNKNOWN)
        (value["model_config"] if under else value)[key] = scalar(rng)
        what, data = f"unknown field {key}", text_of(value).encode("utf-8", "surrogatepass")
    elif kind == "json":
        value, what = changed_json(rng, original, under if rng.random() < 0.75 else ())
        data = text_of(value).encode("utf-8", "surrogatepass")
    else:
        data, what = changed_text(rng, text_of(original))
    (folder / file).write_bytes(data)
    if kind == "no file":
        what = odd_file(rng, folder / file)
    return Trial(
        what=f"{name} {kind}: {what}",
        parses=kind != "no file" and is_json(data),
        act=lambda: opened(folder, name, data, originals, rng.random() < 0.08),
        names=(file, weights, "checkpoint"),
    )


def opened(folder: Path, name: str, data: bytes, originals: Originals, use_cli: bool):
    """Open it as export does; what is accepted must be what the JSON says, and nothing in it ignored."""
    from lrt_deploy.model.checkpoint import open_checkpoint

    if use_cli:
        command("inspect", str(folder), "--json")
        return OTHER, "inspected"
    found = open_checkpoint(folder)
    got = parameters(found.model())
    fields = json.loads(data)
    fields = fields["model_config"] if name != "native" else fields
    config = found.config.to_dict()
    settled = {"ve_gate_channels", "use_value_embeds"} if name != "native" else set()  # the tensors decide
    for key, value in fields.items():
        if key in UNKNOWN or (key not in FIELDS and name == "native" and key not in OWN):
            return WRONG, f"the unknown field {key} was ignored"
        if key in FIELDS and key not in settled and not (value is None and key.startswith("use_") and settled):
            expected = value.upper() if key == "window_pattern" and isinstance(value, str) else value
            if config[key] != expected or type(config[key]) is not type(expected):
                return WRONG, f"{key} is {config[key]!r}, the file says {value!r}"
    equal = found.config == _original_config(originals, name)
    if not same(got, originals.tensors("lrt" if name == "native" else name)[1]) and equal:
        return WRONG, "other weights for the same config"
    return (EQUAL, "") if equal else (OTHER, "another config that the weights fit")


def _original_config(originals: Originals, name: str):
    from lrt_deploy.model.checkpoint import open_checkpoint

    return open_checkpoint(originals.folder / name).config
