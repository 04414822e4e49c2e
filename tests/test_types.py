"""mypy --strict over everything that is installed as lrt_deploy.

lrt_deploy/exporters and lrt_deploy/runtime are links, so mypy sees the installed shape at the root. Where a checkout
has no links it would silently check a part only; so the count of files is compared.
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


def mypy(root, cache):
    command = [sys.executable, "-m", "mypy", "--strict", "-p", "lrt_deploy", "--cache-dir", str(cache)]
    command += ["--config-file", str(ROOT / "pyproject.toml")]
    environment = {**os.environ, "MYPYPATH": str(root)}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def test_all_sources_pass_strict_type_checking():
    expected = sum(1 for folder in FOLDERS for _ in (ROOT / folder).rglob("*.py"))
    output = mypy(ROOT, cache=ROOT / ".mypy_cache" / "installed")
    success = re.search(r"Success: no issues found in (\d+) source files?", output)
    assert success, f"\n{output}"
    assert int(success[1]) == expected


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_error_in_each_folder_is_seen(tmp_path, folder):
    root = tmp_path / "root"
    for name in FOLDERS:
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").touch()
    for name in FOLDERS[1:]:
        (root / "lrt_deploy" / name).symlink_to(f"../{name}")
    (root / folder / "wrong.py").write_text("number: int = ''\n")
    output = mypy(root, cache=tmp_path / "cache")
    assert "wrong.py:1: error: Incompatible types in assignment" in output
    assert "checked 4 source files" in output
