"""Export and decode a random LRT of 1.3B parameters (20 layers, width 1280): time, peak memory, ms per token.

Each phase runs in a process of its own, so that its peak resident memory is its own. Needs about 10 GB of disk and
16 GB of memory. Weights are random: this measures size and speed, not text.

    .venv/bin/python benchmarks/large_model.py [--layers 20 --width 1280 --heads 10 --vocab 32768] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROMPT_TOKENS, DECODE_TOKENS = 64, 32


def make_checkpoint(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Write random weights in the native form, tables in bfloat16 as training leaves them."""
    import torch

    from lrt_deploy.checkpoint import write_native
    from lrt_deploy.config import LRTConfig
    from lrt_deploy.random_weights import random_model

    config = LRTConfig(
        sequence_len=2048,
        vocab_size=args.vocab,
        n_layer=args.layers,
        n_head=args.heads,
        n_kv_head=args.heads,
        n_embd=args.width,
        window_pattern="SSSL",
    )
    model = random_model(config, memory_scale=0.3, table_dtype=torch.bfloat16)
    write_native(model, folder / "checkpoint")
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def export(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Export it."""
    import lrt_deploy

    manifest = lrt_deploy.export_bundle(folder / "checkpoint", folder / "bundle", max_seq_len=2048)
    return {"bundle_bytes": sum(record.bytes for record in manifest.files.values())}


def decode(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Open it, read a prompt by both policies, decode."""
    import numpy as np

    import lrt_deploy

    opening = time.perf_counter()
    with lrt_deploy.open_decoder(folder / "bundle", threads=args.threads) as decoder:
        opened = time.perf_counter() - opening
        prompt = np.random.default_rng(0).integers(0, args.vocab, PROMPT_TOKENS).tolist()
        read = {policy: timed_prefill(decoder, prompt, policy) for policy in ("stepwise", "fixed-point")}
        state = decoder.prefill([prompt])
        steps = []
        for _ in range(DECODE_TOKENS):
            start = time.perf_counter()
            decoder.step(state, [int(state.logits[0].argmax())])
            steps.append((time.perf_counter() - start) * 1e3)
        return {
            "open_s": round(opened, 2),
            "prefill_s": read,
            "step_ms": {"min": round(min(steps), 1), "median": round(float(np.median(steps)), 1)},
            "backend": decoder.backend_detail,
        }


def timed_prefill(decoder: Any, prompt: list[int], policy: Any) -> dict[str, Any]:  # noqa: ANN401
    """Seconds and passes of one policy."""
    start = time.perf_counter()
    state = decoder.prefill([prompt], policy=policy)
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "passes": state.prefill.passes,
        "ran": state.prefill.policy,
    }


PHASES: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "make": make_checkpoint,
    "export": export,
    "decode": decode,
}


def main() -> None:
    """Run the phases in subprocesses, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 20), ("width", 1280), ("heads", 10), ("vocab", 32768)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        start = time.perf_counter()
        result = PHASES[args.phase](args.folder, args)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result | {"seconds": round(time.perf_counter() - start, 1), "peak_rss_bytes": peak}))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = {phase: run_phase(phase, folder) for phase in PHASES}
    packages = ("lrt-deploy", "torch", "onnxruntime-gpu")
    results["environment"] = {"machine": platform.machine(), **{name: version(name) for name in packages}}
    print(json.dumps(results, indent=2))
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")


def run_phase(phase: str, folder: str) -> dict[str, Any]:
    """One phase in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--phase", phase, "--folder", folder]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    print(f"{phase}: {done.stdout.strip()}", file=sys.stderr)
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    main()
