"""Lets the tests of this folder import it as the package `hostile`, as worker processes do."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(scope="session")
def originals_folder(make_once):
    """The undamaged files, made once for all processes of the session (or found: HOSTILE_ORIGINALS)."""
    if found := os.environ.get("HOSTILE_ORIGINALS"):
        return Path(found)

    def make(folder: Path) -> None:
        from hostile import originals

        folder.mkdir()
        originals.make(folder)

    return make_once("hostile-originals", make)
