"""The runtimes that docs/custom-runtime.md shows give the tokens of `lrt-deploy generate`, without this package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SNIPPETS = Path(__file__).parents[2] / "docs" / "snippets"
PROMPT, COUNT = "2039,1,2,3,50,77", 64


def run(command, **options):
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def tokens(bundle):
    """What `lrt-deploy generate` gives."""
    verb = Path(sys.executable).parent / "lrt-deploy"
    options = ["--tokens", PROMPT, "--max-new-tokens", str(COUNT), "--ignore-stop-tokens", "--json"]
    found = json.loads(run([verb, "generate", bundle, *options]))["tokens"]
    assert len(found) == COUNT
    assert len(set(found)) > 5
    return found


def test_onnx_runtime_and_numpy_alone_give_the_same_tokens(bundle, tokens, tmp_path):
    script = shutil.copy(SNIPPETS / "own_runtime.py", tmp_path)
    source = Path(script).read_text()
    assert "lrt_deploy" not in source
    command = [sys.executable, "-I", script, str(bundle), PROMPT, str(COUNT)]
    assert json.loads(run(command)) == tokens


def test_onnx_runtime_in_node_gives_the_same_tokens(bundle, tokens, tmp_path):
    npm, node = shutil.which("npm"), shutil.which("node")
    assert npm, "this test needs Node.js with npm: apt-get install nodejs npm"
    assert node
    for name in ("own_runtime.mjs", "package.json"):
        shutil.copy(SNIPPETS / name, tmp_path)
    run([npm, "install", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=tmp_path)
    found = run([node, "own_runtime.mjs", str(bundle), PROMPT, str(COUNT)], cwd=tmp_path)
    shutil.rmtree(tmp_path / "node_modules")  # 290 MB
    assert json.loads(found) == tokens
