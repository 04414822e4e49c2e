"""Tell bundles, checkpoints, graphs and engines apart by the names of their files, for messages."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lrt_deploy.model.checkpoint_folder import is_checkpoint

from .engine_sidecar import PLAN, sidecar_path

Kind = Literal["bundle", "checkpoint", "engine", "plan", "graph"]

_BUNDLE_FILES = ("manifest.json", "manifest.sha256")  # `manifest` has these names; it imports this module
_SUFFIXES: dict[str, Kind] = {".onnx": "graph", ".plan": "plan"}


def kind_of(path: Path) -> Kind | None:
    """Return the kind of the thing at a path; `engine` is the folder of a plan. None for anything else, or nothing."""
    if path.is_dir():
        if any((path / name).exists() for name in _BUNDLE_FILES):
            return "bundle"
        if (path / PLAN).exists() or sidecar_path(path / PLAN).exists():
            return "engine"
    elif path.suffix in _SUFFIXES and path.exists():
        return _SUFFIXES[path.suffix]
    return "checkpoint" if path.exists() and is_checkpoint(path) else None


def instead_of_bundle(path: Path) -> str | None:
    """Return the message for another thing at a path where a bundle was expected; None for an unknown kind."""
    engine = f"{path} is an engine, not a bundle; name the bundle that it was built in"
    messages: dict[Kind | None, str] = {
        "checkpoint": f"{path} is a checkpoint, not a bundle; export it: lrt-deploy export {path} BUNDLE",
        "engine": engine,
        "plan": engine,
        "graph": f"{path} is a graph, not a bundle; name the folder that `lrt-deploy export` made",
    }
    return messages.get(kind_of(path))


def instead_of_checkpoint(path: Path) -> str | None:
    """Return the message for another thing at a path where a checkpoint was expected; None for an unknown kind."""
    messages: dict[Kind | None, str] = {
        "bundle": f"{path} is a bundle, not a checkpoint; name the checkpoint that it was exported from",
        "engine": f"{path} is an engine, not a checkpoint",
        "plan": f"{path} is an engine, not a checkpoint",
        "graph": f"{path} is a graph, not a checkpoint",
    }
    return messages.get(kind_of(path))
