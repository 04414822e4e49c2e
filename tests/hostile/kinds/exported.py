"""Checkpoints that are accepted, exported in full, and held against the reference."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np

from hostile.originals import PROMPT, STEPS, Originals
from hostile.trial import OTHER, WRONG, Trial

from .checkpoints import META, MODEL, rebuilt, tensors_changed
from .zip_archives import is_zip


def exports(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """A changed checkpoint through `export_bundle` in one precision, then decoded."""
    name = rng.choice(("lrt", "plain"))
    folder = place / "checkpoint"
    shutil.copytree(originals.folder / name, folder)
    for _ in range(12):  # until one is accepted
        change = rng.choice((tensors_changed, tensors_changed, rebuilt))
        what, _ = change(rng, folder / MODEL, name, originals)
        if is_accepted(folder):
            break
    precision = rng.choice(("fp32", "int8", "int8-weight-only", "int4-weight-only"))
    hosted = rng.random() < 0.3
    return Trial(
        f"{precision}: {what}",
        is_zip(folder / MODEL),
        lambda: whole(folder, place / "out", precision, hosted),
        (MODEL, META, "checkpoint", precision, "int4", "int8"),
        ("out",),
    )


def is_accepted(folder: Path) -> bool:
    """Whether the checkpoint can be loaded."""
    from lrt_deploy.errors import LRTDeployError
    from lrt_deploy.model.checkpoint import open_checkpoint

    try:
        open_checkpoint(folder).model()
    except LRTDeployError:
        return False
    return True


def whole(folder: Path, target: Path, precision: str, hosted: bool):
    """Export and open it: float32 equals the reference; a failed export leaves nothing."""
    import lrt_deploy
    from lrt_deploy.model.checkpoint import open_checkpoint
    from lrt_deploy.model.reference import ReferenceDecoder

    try:
        lrt_deploy.export_bundle(folder, target, precision=precision, max_seq_len=16, host_embeddings=hosted)
    except BaseException:
        if target.exists():
            return WRONG, "a failed export left a folder"
        raise
    reference = ReferenceDecoder(open_checkpoint(folder).model())
    with lrt_deploy.open_decoder(target, threads=1) as decoder:
        state, truth = decoder.prefill([PROMPT], policy="stepwise"), reference.prefill([PROMPT])
        for _ in range(STEPS):
            if precision == "fp32" and np.abs(state.logits - truth.logits).max() > 2e-3:
                return WRONG, f"logits differ by {np.abs(state.logits - truth.logits).max():.1e} from the reference"
            token = [int(state.logits[0].argmax())]
            decoder.step(state, token)
            reference.step(truth, token)
    return OTHER, "exported"
