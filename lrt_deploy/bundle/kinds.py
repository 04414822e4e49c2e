"""What lies at a path, by names alone: a bundle, a checkpoint, a graph, an engine.

Used where a command was given one of them in place of another, so that the message can say what it is and what to do.
Opens no files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lrt_deploy.model.checkpoint_folder import is_checkpoint

from .engine_sidecar import PLAN, sidecar_path

Kind = Literal["bundle", "checkpoint", "engine", "plan", "graph"]

_BUNDLE_FILES = ("manifest.json", "manifest.sha256")  # `manifest` has these names; it imports this module
_SUFFIXES: dict[str, Kind] = {".onnx": "graph", ".plan": "plan"}


def kind_of(path: Path) -> Kind | None:
    """`engine` is the folder of a plan; None for anything else, and for a path that is not there."""
    if path.is_dir():
        if any((path / name).exists() for name in _BUNDLE_FILES):
            return "bundle"
        if (path / PLAN).exists() or sidecar_path(path / PLAN).exists():
            return "engine"
    elif path.suffix in _SUFFIXES and path.exists():
        return _SUFFIXES[path.suffix]
    return "checkpoint" if path.exists() and is_checkpoint(path) else None


def instead_of_bundle(path: Path) -> str | None:
    """Say what lies at a path where a bundle was expected; None if it is none of the things that are known."""
    kind = kind_of(path)
    if kind == "checkpoint":
        return f"{path} is a checkpoint, not a bundle; export it: lrt-deploy export {path} BUNDLE"
    if kind in ("engine", "plan"):
        return f"{path} is an engine, not a bundle; name the bundle that it was built in"
    if kind == "graph":
        return f"{path} is a graph, not a bundle; name the folder that `lrt-deploy export` made"
    return None


def instead_of_checkpoint(path: Path) -> str | None:
    """Say what lies at a path where a checkpoint was expected; None if it is none of the things that are known."""
    kind = kind_of(path)
    if kind == "bundle":
        return f"{path} is a bundle, not a checkpoint; name the checkpoint that it was exported from"
    if kind in ("engine", "plan", "graph"):
        return f"{path} is {'a graph' if kind == 'graph' else 'an engine'}, not a checkpoint"
    return None
