"""Many generations and openings leave no more memory and no more descriptors than few: a short run of the soak."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Noise of allocators and of Python's caches; a state of these tests is 100 kB, an opened bundle 2 MB.
ALLOWED_BYTES = 6 * 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_and_descriptors_stay_level(root, export_once):
    command = [sys.executable, root / "benchmarks" / "soak.py", export_once("mr_gqa_SSSL")]
    command += ["--generations", "300", "--openings", "50"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    for part, runs in (("generations", 300), ("openings", 50)):
        assert found[part]["runs"] == runs and len(found[part]["resident_bytes"]) == 10
        assert found[part]["added_bytes_in_second_half"] <= ALLOWED_BYTES
        assert found[part]["added_descriptors_in_second_half"] <= 0
