"""What is deployed needs no torch: opening a bundle and generating neither imports nor misses it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

GENERATE = """
import lrt_deploy
with lrt_deploy.open_decoder(sys.argv[1]) as decoder:
    events = list(decoder.generate([1, 2, 3], 8, stop_ids=[], policy="stepwise"))
    events += list(decoder.generate("Hello", 4, temperature=1.0, seed=1, stop_ids=[]))
    state = decoder.prefill([[1, 2] * 40, [3] * 40], policy="fixed-point")
    decoder.step(state, [4, 5])
tokens = [event.token for event in events]
"""

REPORT = """
import json
heavy = {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tokenizers", "safetensors", "tiktoken", "typer"}
print(json.dumps({"tokens": tokens, "heavy": sorted(heavy & set(sys.modules))}))
"""

BLOCK = """
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "onnx_ir", "onnxscript", "tiktoken"}:
            raise ImportError(f"{name} is blocked")
        return None
sys.meta_path.insert(0, Blocker())
try:
    import torch
except ImportError:
    pass
else:
    raise SystemExit("torch is not blocked")
"""


def run(script, *arguments):
    command = [sys.executable, "-c", f"import sys\n{script}\n{REPORT}", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
def test_opening_and_generating_import_no_torch(export_once):
    result = run(GENERATE, export_once("mr_gqa_SSSL"))
    assert len(result["tokens"]) == 12
    assert result["heavy"] == ["onnxruntime", "safetensors", "tokenizers"]


@pytest.mark.slow
def test_where_torch_cannot_be_imported_the_same_is_generated(export_once):
    bundle = export_once("mr_gqa_SSSL")
    assert run(BLOCK + GENERATE, bundle) == run(GENERATE, bundle)


def test_where_torch_cannot_be_imported_an_export_fails(tmp_path, golden_of):
    """The twin of the above: the blocker does block."""
    with pytest.raises(AssertionError, match=r"ImportError: [a-z_]+ is blocked"):
        run(
            f"{BLOCK}\nimport lrt_deploy\nlrt_deploy.export_bundle(sys.argv[1], sys.argv[2])",
            golden_of("gate32").folder,
            tmp_path / "bundle",
        )


def test_importing_the_package_loads_nothing_heavy():
    assert run("import lrt_deploy\ntokens = []")["heavy"] == []


def test_a_heavy_import_would_be_seen():
    assert run("import onnxruntime\ntokens = []")["heavy"] == ["onnxruntime"]
