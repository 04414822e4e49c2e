"""A test of your own: the bundle that you deploy is the model that you trained.

Copy it into your tests, and run it with pytest after each export:

    LRT_CHECKPOINT=CHECKPOINT LRT_BUNDLE=BUNDLE pytest test_my_model.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import lrt_deploy
from lrt_deploy.bundle.manifest import read_manifest

CHECKPOINT, BUNDLE = os.environ.get("LRT_CHECKPOINT", ""), os.environ.get("LRT_BUNDLE", "")


def test_the_bundle_is_the_model_of_the_checkpoint() -> None:
    """Every precision of it: stored weights, arithmetic, and what it is worth as a model."""
    if not (CHECKPOINT and BUNDLE):
        pytest.skip("LRT_CHECKPOINT and LRT_BUNDLE say what to compare")
    for precision in read_manifest(Path(BUNDLE)).precisions:
        report = lrt_deploy.parity(BUNDLE, CHECKPOINT, precision=precision, steps=32)
        assert report.passed, report.verdict
