"""Find a checkpoint's files from the path that a user names, by their names, in every layout that training leaves.

A path may be:

- a weights file: `model_NNNNNN.pt` or `model.safetensors`;
- a folder with such files (of several steps the last one, or the one of `step`);
- a folder of one stage of training, `base_checkpoints` and so on, with such a folder for each model tag (`d20`);
- the authors' base folder, with `base_checkpoints`, `mid_checkpoints`, `chatsft_checkpoints`, `chatrl_checkpoints`.

Among stages the last one of training is taken, among tags the largest depth, as in the authors' own loader.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lrt_deploy.errors import CheckpointError

# In the order of training; the last one that is there is taken.
STAGES = ("base_checkpoints", "mid_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints")
NATIVE_WEIGHTS = "model.safetensors"
_STEP_FILE = re.compile(r"model_(\d{1,18})\.pt", re.ASCII)
_DEPTH_TAG = re.compile(r"d(\d{1,9})", re.ASCII)
_EXPECTED = (
    "model_NNNNNN.pt with meta_NNNNNN.json (the authors' layout), model.safetensors with config.json, or the authors' "
    f"base folder with {STAGES[0]} or a later stage"
)


@dataclass(frozen=True)
class CheckpointFiles:
    """The weights file, the file with its configuration, and how they were chosen (None: there was no choice)."""

    weights: Path
    config: Path
    step: int | None
    chosen: str | None = None

    @property
    def native(self) -> bool:
        """Whether it is the native layout."""
        return self.weights.suffix == ".safetensors"


def is_checkpoint(path: Path) -> bool:
    """Return whether there is a checkpoint at `path`, by names alone."""
    if not path.is_dir():
        return path.suffix in (".pt", ".safetensors")
    return _has_weights(path) or bool(_stages(path)) or bool(_tags(path))


def find_checkpoint(path: Path, step: int | None = None) -> CheckpointFiles:
    """Find the weights and the configuration at `path`; `step` picks one of several, default the last.

    Raises CheckpointError if there is no checkpoint, or no reason to choose one of several.
    """
    try:
        if path.is_dir():
            next(path.iterdir(), None)  # a folder that may not be read is said to be one
            return _in_folder(path, step)
        present = path.exists() or path.is_symlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not present:
        raise CheckpointError(f"{path} does not exist; expected a checkpoint: {_EXPECTED}")
    return _file(path, step)


def _file(path: Path, step: int | None) -> CheckpointFiles:
    if path.name == NATIVE_WEIGHTS:
        return CheckpointFiles(path, path.with_name("config.json"), None)
    match = _STEP_FILE.fullmatch(path.name)
    if not match:
        raise CheckpointError(
            f"{path} is no weights file: expected model_NNNNNN.pt, whose number says which meta_NNNNNN.json belongs to "
            f"it, or {NATIVE_WEIGHTS}"
        )
    if step not in (None, int(match[1])):
        raise CheckpointError(f"{path} is not of step {step}; name its folder to choose a step")
    return CheckpointFiles(path, _meta_of(path), int(match[1]))


def _meta_of(weights: Path) -> Path:
    return weights.with_name(weights.name.replace("model_", "meta_", 1)).with_suffix(".json")


def _in_folder(path: Path, step: int | None) -> CheckpointFiles:
    folder, choices = path, []
    if not _has_weights(folder) and (stages := _stages(folder)):
        folder = stages[-1]
        choices += _choice(folder, stages, "the last stage")
    if not _has_weights(folder) and (tags := _tags(folder)):
        folder = _largest(folder, tags)
        choices += _choice(folder, tags, "the largest depth")
    steps = _steps(folder)
    if (folder / NATIVE_WEIGHTS).exists() and step is None:
        if steps:
            choices.append(f"{NATIVE_WEIGHTS} (also there: {', '.join(file.name for file in steps.values())})")
        said = _said(path, folder, None, choices)
        return CheckpointFiles(folder / NATIVE_WEIGHTS, folder / "config.json", None, said)
    if not steps:
        raise CheckpointError(f"{path} holds no checkpoint; expected {_EXPECTED}")
    *others, last = sorted(steps)
    if step is None and others:
        choices.append(f"step {last} (the last; also there: {', '.join(map(str, others))})")
    taken = last if step is None else step
    if taken not in steps:
        raise CheckpointError(f"{folder} has no step {step}; it has step {', '.join(map(str, sorted(steps)))}")
    return CheckpointFiles(steps[taken], _meta_of(steps[taken]), taken, _said(path, folder, taken, choices))


def _choice(taken: Path, found: list[Path], why: str) -> list[str]:
    others = ", ".join(folder.name for folder in found if folder != taken)
    return [f"{taken.name} ({why}; also there: {others})"] if others else []


def _said(path: Path, folder: Path, step: int | None, choices: list[str]) -> str | None:
    if folder == path and not choices:
        return None
    taken = [] if folder == path else [folder.relative_to(path).as_posix()]
    taken += [] if step is None else [f"step {step}"]
    if not choices:
        return f"took {', '.join(taken)}"
    how = "name another by its folder, a step by --step"
    return f"took {': '.join(filter(None, (', '.join(taken), ', '.join(choices))))}; {how}"


def _has_weights(folder: Path) -> bool:
    return (folder / NATIVE_WEIGHTS).exists() or any(_STEP_FILE.fullmatch(entry.name) for entry in _entries(folder))


def _steps(folder: Path) -> dict[int, Path]:
    steps: dict[int, Path] = {}
    for entry in _entries(folder):
        if match := _STEP_FILE.fullmatch(entry.name):
            step = int(match[1])
            if step in steps:
                raise CheckpointError(f"{folder} has {steps[step].name} and {entry.name}, both of step {step}")
            steps[step] = entry
    return steps


def _stages(folder: Path) -> list[Path]:
    """Return the folders of stages that hold a model, in the order of training."""
    return [folder / stage for stage in STAGES if (folder / stage).is_dir() and _tags(folder / stage)]


def _tags(folder: Path) -> list[Path]:
    """Return the folders of models in the folder of a stage; optimizer states and reports alone are none."""
    return [entry for entry in _entries(folder) if entry.is_dir() and _has_weights(entry)]


def _largest(folder: Path, tags: list[Path]) -> Path:
    depths = {int(match[1]): tag for tag in tags if (match := _DEPTH_TAG.fullmatch(tag.name))}
    if depths:
        return depths[max(depths)]
    if len(tags) > 1:
        names = ", ".join(tag.name for tag in tags)
        raise CheckpointError(
            f"{folder} has the models {names}, and none is named by its depth (d20); name one by path"
        )
    return tags[0]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # a folder within the one that was named, which may not be read: nothing is taken from it
        return []
