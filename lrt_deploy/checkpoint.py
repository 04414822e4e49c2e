"""Read LRT checkpoints from disk, safely: the authors' layout and the native one.

Authors': a folder with `model_NNNNNN.pt` (state dict) and `meta_NNNNNN.json` (its `model_config`). Native:
`config.json` (the fields of LRTConfig) and `model.safetensors` under the same tensor names; it can also say what the
authors' format cannot (shared projections, another source layer). Files come from strangers: `.pt` files are read
with `weights_only=True`, and everything is checked against the config before it is used. Tokenizers are read by
`tokenizer`; which tensor goes where is said by `weights`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .config import LRTConfig
from .errors import CheckpointError, ConfigError
from .model import LRT
from .weights import Source, weight_sources

_COMPILED_PREFIX = "_orig_mod."  # torch.compile leaves it in state dicts
_TABLES = ("wte", "value_embeds")  # kept in bfloat16 when stored so: gathered, then cast
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STEP_FILE = re.compile(r"model_(\d+)\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors are mapped, not yet read; `model()` reads and checks them."""

    folder: Path
    model_file: Path
    step: int | None
    config: LRTConfig
    tensors: Mapping[str, Tensor]

    @cached_property
    def sha256(self) -> str:
        """Digest of the weights file, hex."""
        with self.model_file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def model(self, max_positions: int | None = None) -> LRT:
        """The reference model with these weights, in evaluation mode, matrices in float32.

        `max_positions` is the length of its rotary tables (default: the authors' limit). Raises CheckpointError when a
        tensor is missing, unknown, of another shape, not floating point, or not finite.
        """
        sources = weight_sources(self.config)
        self._refuse_unknown({name for source in sources.values() for name in source.names})
        for source in sources.values():  # before anything of the config's size is allocated
            for key, shape in zip(source.names, source.shapes, strict=True):
                self._check(key, shape, source.default is not None)
        model = LRT(self.config, max_positions)
        with torch.no_grad():
            for name, source in sources.items():
                self._fill(model, name, source)
        return model.eval().requires_grad_(False)

    def _fill(self, model: LRT, name: str, source: Source) -> None:
        tensors = [self._read(key, shape, source) for key, shape in zip(source.names, source.shapes, strict=True)]
        if name in _TABLES and all(tensor.dtype == torch.bfloat16 for tensor in tensors):
            setattr(model, name, nn.Parameter(torch.empty_like(model.get_parameter(name), dtype=torch.bfloat16)))
        parameter = model.get_parameter(name)
        oriented = [tensor.T if source.transposed else tensor for tensor in tensors]
        for target, tensor in zip(parameter.split([t.shape[-1] for t in oriented], dim=-1), oriented, strict=True):
            target.copy_(tensor)

    def _check(self, key: str, shape: tuple[int, ...], optional: bool) -> None:
        """Hold a tensor's kind against the config without reading it."""
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
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = f"{tensor.dtype} ({tensor.layout}, {tensor.device.type})"
            raise CheckpointError(f"{self.model_file}: {key!r} holds {kind}, expected dense floats of 16 to 64 bits")

    def _read(self, key: str, shape: tuple[int, ...], source: Source) -> Tensor:
        if key not in self.tensors:
            assert source.default is not None
            return torch.full(shape, source.default)
        tensor = self.tensors[key]
        if count := int((~torch.isfinite(tensor)).sum()):
            raise CheckpointError(
                f"{self.model_file}: {key!r} holds {count} numbers that are not finite; it cannot be run"
            )
        return tensor

    def _refuse_unknown(self, known: set[str]) -> None:
        if unknown := sorted(set(self.tensors) - known):
            raise CheckpointError(
                f"{self.model_file} holds {len(unknown)} tensor(s) that this model has no place for, "
                f"such as {unknown[0]!r}; leaving them out would silently run another model"
            )


def open_checkpoint(path: str | Path, step: int | None = None) -> Checkpoint:
    """Open a checkpoint folder of either layout (or its weights file); `step` picks one of several, default the last.

    Raises CheckpointError naming the file, or ConfigError for a contradictory config.
    """
    path = Path(path)
    if path.is_file():
        match = _STEP_FILE.fullmatch(path.name)
        path, step = path.parent, int(match[1]) if match else step
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint folder")
    if (path / "model.safetensors").is_file() and step is None:
        return _open_native(path)
    return _open_authors(path, step)


def write_native(model: LRT, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, which `open_checkpoint` reads back."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, source in weight_sources(model.config).items():
        sizes = [shape[0 if source.transposed else -1] for shape in source.shapes]
        parts = model.get_parameter(name).detach().split(sizes, dim=-1)
        tensors |= {
            key: (part.T if source.transposed else part).contiguous()
            for key, part in zip(source.names, parts, strict=True)
        }
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")


def _open_native(folder: Path) -> Checkpoint:
    file = folder / "model.safetensors"
    fields = _read_json(folder / "config.json")
    try:
        config = LRTConfig.from_dict(fields)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error
    try:
        tensors = safetensors.torch.load_file(file)  # mapped, read page by page
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; it is damaged or not a safetensors file") from error
    return Checkpoint(folder, file, None, config, tensors)


def _open_authors(folder: Path, step: int | None) -> Checkpoint:
    steps = {int(match[1]): file for file in folder.glob("model_*.pt") if (match := _STEP_FILE.fullmatch(file.name))}
    if not steps:
        raise CheckpointError(
            f"{folder} holds no checkpoint; expected model_NNNNNN.pt with meta_NNNNNN.json (the authors' layout) "
            "or model.safetensors with config.json"
        )
    step = max(steps) if step is None else step
    if step not in steps:
        raise CheckpointError(f"{folder} has no step {step}; it has step {', '.join(map(str, sorted(steps)))}")
    file = steps[step]
    meta_file = file.with_name(file.name.replace("model_", "meta_")).with_suffix(".json")
    model_config = _read_json(meta_file).get("model_config")
    if not isinstance(model_config, dict):
        raise CheckpointError(f"{meta_file} has no 'model_config' object; the authors' training code always writes one")
    tensors = _load_state_dict(file)
    try:
        config = _settle(LRTConfig.from_authors(model_config), tensors)
    except ConfigError as error:
        raise ConfigError(f"{meta_file}: {error}") from error
    return Checkpoint(folder, file, step, config, tensors)


def _settle(config: LRTConfig, tensors: Mapping[str, Tensor]) -> LRTConfig:
    """Take from the tensors what the authors' config does not say reliably.

    The default of `ve_gate_channels` changed between releases, so the gate's width decides; `use_value_embeds` speaks
    of the plain model, so in an LRT the presence of the tables decides.
    """
    kind = "triple_gate" if config.memory else "ve_gate"
    gate = next((t for key, t in tensors.items() if key.endswith(f".attn.{kind}.weight") and t.ndim == 2), None)
    if gate is not None:
        channels = int(gate.shape[1])
        config = dataclasses.replace(config, ve_gate_channels=0 if channels == config.n_embd else channels)
    if config.memory:
        embedded = any(key.startswith("interleaved_init_value_embeds.") for key in tensors)
        config = dataclasses.replace(config, use_value_embeds=embedded)
    return config


def _load_state_dict(file: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks to run {found[1]}" if found else "is not made of tensors alone"
        raise CheckpointError(
            f"{file} was refused: it {what}, and a state dict needs no code; nothing in it was run"
        ) from error
    except Exception as error:  # the reader raises many types on damaged files; all mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{file} cannot be read: {reason}; it is damaged, truncated or not a checkpoint"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in loaded.items()):
        raise CheckpointError(f"{file} does not hold a state dict (tensors by name), but {type(loaded).__name__}")
    return {key.removeprefix(_COMPILED_PREFIX): tensor for key, tensor in loaded.items()}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; it says what model the weights beside it are") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {type(content).__name__}, expected a JSON object")
    return content
