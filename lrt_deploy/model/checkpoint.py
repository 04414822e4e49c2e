"""Read LRT checkpoints from disk, safely: the authors' layout and the native one.

Authors': a folder with `model_NNNNNN.pt` (state dict) and `meta_NNNNNN.json` (its `model_config`). Native:
`config.json` (the fields of LRTConfig) and `model.safetensors` under the same tensor names. Files come from strangers:
no unpickler runs, and everything is checked against the config before anything of its size is made.
"""

from __future__ import annotations

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

from lrt_deploy.bundle.kinds import instead_of_checkpoint
from lrt_deploy.bundle.weights import EMBEDDING_TABLES, Source, weight_sources
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import CheckpointError, ConfigError
from lrt_deploy.files import open_regular, read_json, refuse_placeholder

from . import authors_config
from .checkpoint_folder import CheckpointFiles, find_checkpoint
from .model import LRT
from .pt_file import StoredTensor, read_state_dict

_PREFIXES = re.compile(r"^(_orig_mod\.|module\.){1,8}")  # of torch.compile and DistributedDataParallel, in any order
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_META_BYTES, _CONFIG_BYTES = 4 * 1024 * 1024, 1024 * 1024
_HEADER_BYTES = 16 * 1024 * 1024


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

    `known_as` names the code that wrote it, `chosen` how its files were chosen among several.
    """

    folder: Path
    model_file: Path
    step: int | None
    config: LRTConfig
    tensors: Mapping[str, LazyTensor]
    known_as: str = "native"
    chosen: str | None = None
    verified_sha256: str | None = None

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


def open_checkpoint(path: str | Path, step: int | None = None) -> Checkpoint:
    """Open a checkpoint of either layout; see `checkpoint_folder` for the forms of `path`.

    `step` picks one of several, default the last. A `.pt` file is read once from end to end, and its checksums are
    verified. Raises CheckpointError naming the file, or ConfigError for a contradictory config.
    """
    if mistaken := instead_of_checkpoint(Path(path)):
        raise CheckpointError(mistaken)
    found = find_checkpoint(Path(path), step)
    return _open_native(found) if found.native else _open_authors(found)


def parts_of(model: LRT, name: str, source: Source) -> list[Tensor]:
    """Return views of the parts of a parameter, each in the shape of the authors' tensor."""
    sizes = [shape[0 if source.transposed else -1] for shape in source.shapes]
    parts = model.get_parameter(name).split(sizes, dim=-1)
    return [part.T if source.transposed else part for part in parts]


def _open_native(found: CheckpointFiles) -> Checkpoint:
    fields = _read_object(found.config, "the checkpoint's configuration", _CONFIG_BYTES)
    try:
        config = LRTConfig.from_dict(fields)
    except ConfigError as error:
        raise ConfigError(f"{found.config}: {error}") from error
    tensors = _safetensors(found.weights)
    return Checkpoint(found.weights.parent, found.weights, None, config, tensors, chosen=found.chosen)


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


def _open_authors(found: CheckpointFiles) -> Checkpoint:
    fields = _read_object(found.config, "the checkpoint's meta file", _META_BYTES).get("model_config")
    if not isinstance(fields, dict):
        raise CheckpointError(
            f"{found.config} has no 'model_config' object; the authors' training code always writes one"
        )
    state = read_state_dict(found.weights)
    stored = _without_prefixes(state.tensors, found.weights)
    shapes = {name: tensor.description.shape for name, tensor in stored.items()}
    try:
        config, known_as = authors_config.describe(fields, shapes, str(found.config), str(found.weights))
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
