"""mypy --strict over everything that is installed as lrt_deploy.

At the root, `mypy -p lrt_deploy` sees no exporters and no runtime, because they stand beside lrt_deploy and not in it,
and says nothing of that. So it runs on a folder of symlinks that has the installed shape, and the count is checked.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("lrt_deploy", "exporters", "runtime")

pytestmark = pytest.mark.slow


def link_installed_shape(root, folder):
    """Make folder/lrt_deploy: a link to each entry of lrt_deploy, and to exporters and runtime as sub-packages."""
    package = folder / "lrt_deploy"
    package.mkdir()
    for entry in (*(root / "lrt_deploy").iterdir(), root / "exporters", root / "runtime"):
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())


def mypy(folder, cache):
    command = [sys.executable, "-m", "mypy", "--strict", "-p", "lrt_deploy", "--cache-dir", str(cache)]
    command += ["--config-file", str(ROOT / "pyproject.toml")]
    environment = {**os.environ, "MYPYPATH": str(folder)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def test_all_sources_pass_strict_type_checking(tmp_path):
    expected = sum(1 for folder in FOLDERS for _ in (ROOT / folder).rglob("*.py"))
    link_installed_shape(ROOT, tmp_path)
    output = mypy(tmp_path, cache=ROOT / ".mypy_cache" / "installed")
    success = re.search(r"Success: no issues found in (\d+) source files?", output)
    assert success, f"\n{output}"
    assert int(success[1]) == expected


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_error_in_each_folder_is_seen(tmp_path, folder):
    root = tmp_path / "root"
    for name in FOLDERS:
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").touch()
    (root / folder / "wrong.py").write_text("number: int = ''\n")
    link_installed_shape(root, tmp_path)
    output = mypy(tmp_path, cache=tmp_path / "cache")
    assert "wrong.py:1: error: Incompatible types in assignment" in output
    assert "checked 4 source files" in output
