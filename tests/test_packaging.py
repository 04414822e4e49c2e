"""The wheel holds what the tree holds: a sub-package or data file that pyproject.toml forgets would be missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"lrt_deploy": "lrt_deploy", "exporters": "lrt_deploy/exporters", "runtime": "lrt_deploy/runtime"}
LOOSE = ("pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.slow


def copy_tree(folder):
    """What a build reads; not build/, from which a wheel would take files that are deleted since."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in LOOSE:
        shutil.copy(ROOT / name, folder / name)
    return folder


def tree_files(root):
    """Every file of the three folders under the name that it has when installed."""
    return {
        f"{installed}/{path.relative_to(root / name).as_posix()}"
        for name, installed in FOLDERS.items()
        for path in (root / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def wheel_files(root, folder):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", ".", "--wheel-dir", str(folder)]
    command += ["--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "tree").mkdir()
    return copy_tree(tmp_path / "tree")


def test_the_wheel_holds_every_file_of_the_tree(tree, tmp_path):
    expected = tree_files(tree)
    found = wheel_files(tree, tmp_path / "wheel")
    assert found == expected
    assert {"lrt_deploy/py.typed", "lrt_deploy/errors.py", "lrt_deploy/runtime/__init__.py"} <= found


def test_an_unlisted_sub_package_is_noticed(tree, tmp_path):
    (tree / "runtime" / "unlisted").mkdir()
    (tree / "runtime" / "unlisted" / "__init__.py").touch()
    missing = tree_files(tree) - wheel_files(tree, tmp_path / "wheel")
    assert "lrt_deploy/runtime/unlisted/__init__.py" in missing
