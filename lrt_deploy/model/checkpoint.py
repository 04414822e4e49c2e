"""Read LRT checkpoints from disk, safely: the authors' layout and the native one.

Authors': a folder with `model_NNNNNN.pt` (state dict) and `meta_NNNNNN.json` (its `model_config`). Native:
`config.json` (the fields of LRTConfig) and `model.safetensors` under the same tensor names. Files come from strangers:
no unpickler runs, and everything is checked against the config before anything of its size is made.

`model_config` is incomplete: a chat checkpoint of an LRT has seven fields and none of the memory path, and plain
nanochat changed its arithmetic several times without a new field. Names and shapes of tensors complete it. Refused are
contradictions between the two, and arithmetic that is not known or cannot be told from another one. Plain nanochat by
date (its repository's `gpt.py` and `dev/LOG.md`), beside what the LRT authors' fork writes:

- October 2025 to 2026-01-10: no lambdas, no value embeddings. Known.
- 2026-01-11 to 01-16: `resid_lambdas`, `x0_lambdas`, `window_pattern`. Known.
- 2026-01-17 to 03-01: value embeddings on every other layer, gates of 32 channels. Known, but see the next line.
  (On 01-27 and 01-28 also bigram embeddings: not known.)
- 2026-03-02 to 03-08: softcap 20 instead of 15. Not known; files are the same as before, so the meta has to state
  `logit_softcap`.
- From 2026-03-09: gates of 12 channels with 3 x sigmoid, rotary base 100,000, scaled q and k, short windows of a third;
  later also smear and backout. Not known.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from lrt_deploy.bundle.manifest import instead_of
from lrt_deploy.bundle.weights import EMBEDDING_TABLES, Source, weight_sources
from lrt_deploy.config import LOGIT_SOFTCAP, LRTConfig
from lrt_deploy.errors import CheckpointError, ConfigError
from lrt_deploy.fields import shown
from lrt_deploy.files import open_regular, read_json, refuse_placeholder

from . import hub
from .checkpoint_folder import CheckpointFiles, find_checkpoint
from .model import LRT
from .pt_file import StoredTensor, read_state_dict

_PREFIXES = re.compile(r"^(_orig_mod\.|module\.){1,8}")  # of torch.compile and DistributedDataParallel, in any order
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_META_BYTES, _CONFIG_BYTES = 4 * 1024 * 1024, 1024 * 1024
_HEADER_BYTES = 16 * 1024 * 1024
_TENSOR_BYTES = 4096  # of a tensor in a .pt file beside its numbers: names, alignment


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint that is read when `load` is called; `dtype` is its name in torch."""

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors are described, not yet read; `model()` reads and checks them.

    `known_as` names the code that wrote it, `chosen` how its files were chosen among several, `origin` the repository
    that it was fetched from.
    """

    folder: Path
    model_file: Path
    step: int | None
    config: LRTConfig
    tensors: Mapping[str, LazyTensor]
    known_as: str = "native"
    chosen: str | None = None
    verified_sha256: str | None = None
    origin: hub.Origin | None = None

    @cached_property
    def sha256(self) -> str:
        """Digest of the weights file, hex."""
        if self.verified_sha256 is not None:
            return self.verified_sha256
        with open_regular(self.model_file, "the weights file", CheckpointError) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def model(self, max_positions: int | None = None) -> LRT:
        """Build the reference model with these weights, in evaluation mode, matrices in float32.

        `max_positions` is the length of its rotary tables (default: the authors' limit). Raises CheckpointError when a
        tensor is missing, unknown, of another shape, not floating point, or not finite.
        """
        self.check_tensors()  # before anything of the config's size is allocated
        model = LRT(self.config, max_positions).requires_grad_(False)
        for name, source in weight_sources(self.config).items():
            stored = {self.tensors[key].dtype for key in source.names if key in self.tensors}
            if name in EMBEDDING_TABLES and stored == {"bfloat16"}:  # kept so: gathered, then cast
                table = torch.empty_like(model.get_parameter(name), dtype=torch.bfloat16)
                setattr(model, name, nn.Parameter(table, requires_grad=False))
            for part, key, shape in zip(parts_of(model, name, source), source.names, source.shapes, strict=True):
                part.copy_(self._read(key, shape, source.default))
        return model.eval()

    def check_tensors(self) -> None:
        """Check names, shapes and types of all tensors against the config; read none. Raises CheckpointError."""
        sources = weight_sources(self.config).values()
        if unknown := sorted(set(self.tensors) - {name for source in sources for name in source.names}):
            raise CheckpointError(
                f"{self.model_file} holds {len(unknown)} tensor(s) that this model has no place for, "
                f"such as {unknown[0]!r}; leaving them out would silently run another model"
            )
        for source in sources:
            for key, shape in zip(source.names, source.shapes, strict=True):
                self._check(key, shape, source.default is not None)

    def _check(self, key: str, shape: tuple[int, ...], optional: bool) -> None:
        tensor = self.tensors.get(key)
        if tensor is None:
            if optional:
                return
            raise CheckpointError(
                f"{self.model_file} has no tensor {key!r}, which its config asks for in shape {shape}"
            )
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.model_file}: {key!r} has the shape {tuple(tensor.shape)}, its config says {shape}; "
                "the weights and the config are not of one model"
            )
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{self.model_file}: {key!r} holds {tensor.dtype}, expected floats of 16 to 64 bits")

    def _read(self, key: str, shape: tuple[int, ...], default: float | None) -> Tensor:
        if key not in self.tensors:
            assert default is not None
            return torch.full(shape, default)
        tensor = self.tensors[key].load()
        if tensor.dtype == torch.float64:  # what float32 cannot hold becomes infinite here and is refused
            tensor = tensor.float()
        if count := int((~torch.isfinite(tensor)).sum()):
            raise CheckpointError(
                f"{self.model_file}: {key!r} holds {count} numbers that are not finite in float32; it cannot be run"
            )
        return tensor


def open_checkpoint(path: str | Path, step: int | None = None, progress: hub.Progress = lambda *_: None) -> Checkpoint:
    """Open a checkpoint of either layout; see `checkpoint_folder` for the forms of `path`, and `hub` for `hf://` names.

    `step` picks one of several, default the last. A `.pt` file is read once from end to end, and its checksums are
    verified. `progress` is called while files are fetched. Raises CheckpointError naming the file, or ConfigError for a
    contradictory config.
    """
    source = hub.check_source(path, "the checkpoint")
    if isinstance(source, str):
        found, origin = hub.fetch(hub.HubName.parse(source), step, _most_bytes, progress)
        return dataclasses.replace(_open(found), origin=origin)
    if mistaken := instead_of("checkpoint", source):
        raise CheckpointError(mistaken)
    return _open(find_checkpoint(source, step))


def _open(found: CheckpointFiles) -> Checkpoint:
    return _open_native(found) if found.native else _open_authors(found)


def _most_bytes(found: CheckpointFiles) -> int:
    """Return the most bytes that the weights of a checkpoint can have, by its configuration: all in float64."""
    if found.native:
        configs = [_native_config(found)]
    else:  # tensors complete the meta file, so all that it leaves open counts
        fields = _authors_fields(found)
        sizes = {name: fields[name] for name in _SIZES if name in fields}
        try:
            configs = [
                LRTConfig.from_dict(sizes | {"memory": memory, "ve_every_layer": True}) for memory in (True, False)
            ]
        except ConfigError as error:
            raise ConfigError(f"{found.config}: {error}") from error
    sources = [list(weight_sources(config).values()) for config in configs]
    elements = max(sum(math.prod(shape) for source in model for shape in source.shapes) for model in sources)
    tensors = max(sum(len(source.shapes) for source in model) for model in sources)
    return 8 * elements + _TENSOR_BYTES * tensors + _HEADER_BYTES


def parts_of(model: LRT, name: str, source: Source) -> list[Tensor]:
    """Return views of the parts of a parameter, each in the shape of the authors' tensor."""
    sizes = [shape[0 if source.transposed else -1] for shape in source.shapes]
    parts = model.get_parameter(name).split(sizes, dim=-1)
    return [part.T if source.transposed else part for part in parts]


def _open_native(found: CheckpointFiles) -> Checkpoint:
    config, tensors = _native_config(found), _safetensors(found.weights)
    return Checkpoint(found.weights.parent, found.weights, None, config, tensors, chosen=found.chosen)


def _native_config(found: CheckpointFiles) -> LRTConfig:
    fields = _read_object(found.config, "the checkpoint's configuration", _CONFIG_BYTES)
    try:
        return LRTConfig.from_dict(fields)
    except ConfigError as error:
        raise ConfigError(f"{found.config}: {error}") from error


def _safetensors(file: Path) -> dict[str, LazyTensor]:
    """Describe the tensors of a safetensors file; its library checks offsets and shapes against the file's size."""
    with open_regular(file, "the weights file", CheckpointError) as opened:
        head = opened.read(64)
        refuse_placeholder(head, f"the weights file ({file})", CheckpointError)
        if (header := int.from_bytes(head[:8], "little")) > _HEADER_BYTES:
            raise CheckpointError(f"{file} is damaged: its header claims {header} bytes; at most {_HEADER_BYTES} do it")
    try:
        reader: Any = safetensors.safe_open(file, framework="pt")
        found = {}
        for key in reader.keys():  # noqa: SIM118 - it is no dict
            view = reader.get_slice(key)
            dtype = _SAFETENSORS_DTYPES.get(view.get_dtype(), view.get_dtype())
            found[key] = LazyTensor(dtype, tuple(view.get_shape()), partial(reader.get_tensor, key))
        return found
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; it is damaged or not a safetensors file") from error


def _authors_fields(found: CheckpointFiles) -> dict[str, Any]:
    fields = _read_object(found.config, "the checkpoint's meta file", _META_BYTES).get("model_config")
    if not isinstance(fields, dict):
        raise CheckpointError(
            f"{found.config} has no 'model_config' object; the authors' training code always writes one"
        )
    return fields


def _open_authors(found: CheckpointFiles) -> Checkpoint:
    fields = _authors_fields(found)
    state = read_state_dict(found.weights)
    stored = _without_prefixes(state.tensors, found.weights)
    shapes = {name: tensor.description.shape for name, tensor in stored.items()}
    try:
        config, known_as = describe(fields, shapes, str(found.config), str(found.weights))
    except ConfigError as error:
        raise ConfigError(f"{found.config}: {error}") from error
    tensors = {
        name: LazyTensor(each.description.storage.dtype, each.description.shape, partial(as_torch, each))
        for name, each in stored.items()
    }
    folder, weights = found.weights.parent, found.weights
    return Checkpoint(folder, weights, found.step, config, tensors, known_as, found.chosen, state.sha256)


def as_torch(stored: StoredTensor) -> Tensor:
    """Read a tensor into memory of its own, in its shape and strides."""
    described = stored.description
    dtype = getattr(torch, described.storage.dtype)
    assert isinstance(dtype, torch.dtype)
    data = stored.read_bytes()
    flat = torch.from_numpy(data).view(dtype) if data.size else torch.empty(0, dtype=dtype)
    return flat.as_strided(described.shape, described.strides)


def _without_prefixes(tensors: Mapping[str, StoredTensor], file: Path) -> dict[str, StoredTensor]:
    """Drop the prefixes that wrappers of a model add; raises CheckpointError for two tensors that get one name."""
    names: dict[str, str] = {}
    for name in tensors:
        first = names.setdefault(_PREFIXES.sub("", name), name)
        if first != name:
            raise CheckpointError(
                f"{file} holds {first!r} and {name!r}, which are one tensor's name with and without the prefix that "
                "torch.compile or DistributedDataParallel adds; which of them was trained is not known"
            )
    return {plain: tensors[name] for plain, name in names.items()}


def _read_object(file: Path, what: str, limit: int) -> dict[str, object]:
    if not file.exists() and not file.is_symlink():
        raise CheckpointError(f"{file} is missing; it says what model the weights beside it are")
    content = read_json(file, what, CheckpointError, limit, constants=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {type(content).__name__}, expected a JSON object")
    return content


# Fields of the authors' GPTConfig that say how the model was trained; decoding does not depend on them.
TRAINING_FIELDS = {"interleaved_num_passes", "interleaved_kv_refresh"}
TRAINING_FIELDS |= {"multi_refine_num_passes", "multi_refine_detach", "multi_refine_loss_weights"}
_MEMORY_FLAGS = ("use_interleaved", "use_multi_refine")
_SWITCHES = (*_MEMORY_FLAGS, "use_value_embeds", "ve_every_layer", "use_x0_residual", "use_resid_lambdas")
# Fields that only the authors' fork writes; it has had softcap 15 and rotary base 10,000 throughout.
_FORK_FIELDS = TRAINING_FIELDS | {*_SWITCHES, "ve_gate_channels"}
_SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
# Not the authors' field: a user adds it to the meta file of a checkpoint that does not tell its date.
_SOFTCAP = "logit_softcap"
KNOWN_FIELDS = frozenset({*_SIZES, "window_pattern", *_FORK_FIELDS, _SOFTCAP})

# Tensors that only a later or another arithmetic has, and what they belong to.
_OTHER_ARITHMETIC = {
    "smear_": "nanochat from March 2026 on (smear)",
    "backout_": "nanochat from March 2026 on (backout)",
    "bigram_": "nanochat of 2026-01-27 and 01-28 (bigram embeddings)",
}
_MARCH_GATE_CHANNELS, _JANUARY_GATE_CHANNELS = 12, 32

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Evidence:
    """The fields and the tensors' shapes of a checkpoint, and their files' names for messages."""

    fields: Mapping[str, Any]
    shapes: Shapes
    meta: str
    weights: str

    def stated(self, name: str) -> bool | None:
        """Return the value of a switch, None where the meta does not have it."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"model_config: {name} is {shown(value)}, expected true or false")
        return value

    def first(self, pattern: str) -> str | None:
        """Return the name of a tensor that the pattern matches from its start, or None."""
        return next((name for name in self.shapes if re.match(pattern, name)), None)

    def contradict(self, says: str, tensor: str | None, kind: str) -> None:
        """Raise CheckpointError for a field that contradicts a tensor, or the lack of this kind of tensors."""
        found = f"holds {tensor!r}" if tensor else f"holds no {kind}"
        raise CheckpointError(
            f"{self.meta} says {says}, and {self.weights} {found}; the two are not of one model. Take the files that "
            "training wrote together"
        )


def describe(fields: Mapping[str, Any], shapes: Shapes, meta: str, weights: str) -> tuple[LRTConfig, str]:
    """Read the authors' `model_config`, completed and checked by the tensors' names and shapes.

    Returns the configuration, and a text that names the code that writes such checkpoints. `meta` and `weights` name
    the files in errors. Raises ConfigError for fields that are unknown, missing or out of bounds, and CheckpointError
    where fields and tensors contradict each other or the arithmetic is not known.
    """
    if unknown := ", ".join(sorted(set(fields) - KNOWN_FIELDS)):
        raise ConfigError(
            f"model_config has the field(s) {unknown[:200]}, which this version does not know; they may change the "
            f"arithmetic. Known are {', '.join(sorted(KNOWN_FIELDS))}. Remove a field only if it is of training alone"
        )
    evidence = _Evidence(fields, shapes, meta, weights)
    for name in _SWITCHES:
        evidence.stated(name)
    _refuse_other_arithmetic(evidence)
    pattern = fields.get("window_pattern", "L")
    config = LRTConfig.from_dict(
        {name: fields[name] for name in _SIZES if name in fields}
        | {
            "window_pattern": pattern.upper() if isinstance(pattern, str) else pattern,
            "memory": _has_memory(evidence),
            "use_x0_residual": _switch(evidence, "use_x0_residual", "x0_lambdas"),
            "use_resid_lambdas": _switch(evidence, "use_resid_lambdas", "resid_lambdas"),
        }
    )
    tables, every_layer = _value_embeddings(evidence, config)
    config = dataclasses.replace(config, use_value_embeds=tables, ve_every_layer=every_layer)
    config = dataclasses.replace(config, ve_gate_channels=_gate_channels(evidence, config))
    return config, _known_as(evidence, config)


def _refuse_other_arithmetic(evidence: _Evidence) -> None:
    for prefix, code in _OTHER_ARITHMETIC.items():
        if name := evidence.first(prefix):
            raise CheckpointError(
                f"{evidence.weights} holds {name!r}: it is of {code}, whose arithmetic this version does not know"
            )
    softcap = evidence.fields.get(_SOFTCAP, LOGIT_SOFTCAP)
    if isinstance(softcap, bool) or softcap != LOGIT_SOFTCAP:
        raise ConfigError(
            f"model_config: {_SOFTCAP} is {shown(softcap)}; this version runs models with {LOGIT_SOFTCAP:g}, "
            "which is the LRT's and that of nanochat until 2026-03-01"
        )


def _has_memory(evidence: _Evidence) -> bool:
    """Return whether the tensors are those of an LRT; the flags must not contradict them."""
    tensor = evidence.first(r"interleaved_|transformer\.h\.\d+\.attn\.triple_gate\.")
    stated = {flag: evidence.stated(flag) for flag in _MEMORY_FLAGS if flag in evidence.fields}
    if stated and any(stated.values()) != (tensor is not None):
        evidence.contradict(", ".join(f"{flag} is {value}" for flag, value in stated.items()), tensor, "memory tensors")
    return tensor is not None


def _switch(evidence: _Evidence, field: str, tensor: str) -> bool:
    """Return whether a term is on, as it is unless the meta says otherwise; older files lack its tensor."""
    stated = evidence.stated(field)
    if stated is False and tensor in evidence.shapes:
        evidence.contradict(f"{field} is False", tensor, tensor)
    return stated is not False


def _value_embeddings(evidence: _Evidence, config: LRTConfig) -> tuple[bool, bool]:
    """Return whether layers have value embeddings, and whether all have, by the tables.

    `use_value_embeds` concerns the plain model only.
    """
    table = evidence.first(r"interleaved_init_value_embeds\." if config.memory else r"value_embeds\.")
    every_layer = evidence.stated("ve_every_layer")
    if config.memory:
        return table is not None, bool(every_layer)
    stated = evidence.stated("use_value_embeds")
    if stated is not None and stated != (table is not None):
        evidence.contradict(f"use_value_embeds is {stated}", table, "value embeddings")
    if every_layer is None:
        every_layer = all(f"value_embeds.{i}.weight" in evidence.shapes for i in range(config.n_layer))
    return table is not None, every_layer


def _gate_channels(evidence: _Evidence, config: LRTConfig) -> int:
    """Return the number of channels that the gates read, from a gate's shape: the field's default has changed."""
    stated = evidence.fields.get("ve_gate_channels", 0)
    kind = "triple_gate" if config.memory else "ve_gate"
    gate = evidence.first(rf"transformer\.h\.\d+\.attn\.{kind}\.weight$")
    if gate is None or len(evidence.shapes[gate]) != 2:
        return stated  # type: ignore[no-any-return]  # LRTConfig checks its type
    dataclasses.replace(config, ve_gate_channels=stated)  # refuses a value that no model could have
    channels = evidence.shapes[gate][1]
    return 0 if channels == config.n_embd else channels


def _known_as(evidence: _Evidence, config: LRTConfig) -> str:
    """Name the code that wrote it; raises CheckpointError if the arithmetic depends on it and it is not known."""
    flags = [flag for flag in _MEMORY_FLAGS if flag in evidence.fields]
    if config.memory:
        return "LRT, as its meta says" if flags else "LRT, by its tensors: its meta does not name the memory path"
    if _FORK_FIELDS & set(evidence.fields):
        return "plain model of the LRT authors' code, as its meta says"
    if not config.use_value_embeds:
        date = "2026-01-11 to 01-16" if "resid_lambdas" in evidence.shapes else "October 2025 to 2026-01-10"
        return f"plain nanochat of {date}"
    channels, every = config.gate_channels, config.n_embd
    if channels == _MARCH_GATE_CHANNELS:
        raise CheckpointError(
            f"{evidence.weights} has value gates of {channels} channels: it is of plain nanochat from 2026-03-09 on "
            "(rotary base 100,000, gates of 3 x sigmoid, scaled q and k, short windows of a third, softcap 20), whose "
            f"arithmetic this version does not know. Known is plain nanochat until 2026-03-01"
        )
    if channels == every and channels != _JANUARY_GATE_CHANNELS:
        return "plain model of the LRT authors' code, by its gates of all channels"
    if channels != _JANUARY_GATE_CHANNELS:
        raise CheckpointError(
            f"{evidence.weights} has value gates of {channels} channels, and {evidence.meta} does not say by which "
            f"code it was trained; plain nanochat has {_JANUARY_GATE_CHANNELS}, the LRT authors' code all {every}"
        )
    if _SOFTCAP not in evidence.fields:
        raise CheckpointError(
            f"{evidence.weights} is of plain nanochat between 2026-01-17 and 2026-03-08, and its files do not tell "
            f"whether its logits are capped at {LOGIT_SOFTCAP:g} (until 2026-03-01 and in the LRT authors' code) or at "
            f"20 (from 2026-03-02, commit aba30cb; this version does not run it). If it was trained with "
            f'{LOGIT_SOFTCAP:g}, say so: add "{_SOFTCAP}": {LOGIT_SOFTCAP:g} to model_config in {evidence.meta}'
        )
    return f"plain nanochat of 2026-01-17 to 03-01, with the softcap of {LOGIT_SOFTCAP:g} that its meta states"
