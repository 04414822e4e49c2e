"""Export and decode a random LRT of 1.3B parameters (20 layers, width 1280): time, peak memory, ms per token.

Each phase runs in a process of its own, so that its peak resident memory is its own. Needs about 20 GB of disk and
16 GB of memory. Weights are random: this measures size and speed, not text. The phases that end in `_host` do the same
with the embedding tables on the host; `memory_private` with tables copied into memory, as a provider does that cannot
map them; `build` and `build_host` make TensorRT-RTX engines, which hold what a GPU would hold.

    .venv/bin/python benchmarks/large_model.py [--layers 20 --width 1280 --heads 10 --vocab 32768] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROMPT_TOKENS, DECODE_TOKENS, MANY_TOKENS = 64, 32, 1024


def make_checkpoint(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Write random weights in the native form, tables in bfloat16 as training leaves them."""
    import torch
    from random_models import random_model, write_native

    from lrt_deploy.config import LRTConfig

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


def export(folder: Path, args: argparse.Namespace, name: str = "bundle", precision: str = "fp32") -> dict[str, Any]:
    """Export it."""
    import lrt_deploy

    options: Any = {"precision": precision, "max_seq_len": 2048, "host_embeddings": name.endswith("host")}
    manifest = lrt_deploy.export_bundle(folder / "checkpoint", folder / name, **options)
    return {"bundle_bytes": sum(record.bytes for record in manifest.files.values())}


def build(folder: Path, args: argparse.Namespace, name: str = "bf16") -> dict[str, Any]:
    """Build an engine in bfloat16, which needs no calibration, from a bundle of its own that is removed again."""
    import lrt_deploy

    export(folder, args, name, "bf16")
    start = time.perf_counter()
    sidecar = lrt_deploy.build_engine(folder / name, backend="tensorrt-rtx")
    built = round(time.perf_counter() - start, 1)
    shutil.rmtree(folder / name)
    return {
        "build_s": built,
        "plan_bytes": sidecar.plan_bytes,
        "weights_bytes": sidecar.build["memory"].get("weights_bytes"),
    }


def memory(folder: Path, args: argparse.Namespace, name: str = "bundle", private: bool = False) -> dict[str, Any]:
    """Resident memory before and after opening, and after prompts that touch many rows of the tables."""
    import numpy as np

    import lrt_deploy
    from lrt_deploy.runtime.backends import ort_cpu

    if private:
        ort_cpu.ort.SessionOptions = with_private_tables(folder / name)
    found = {"before": resident()}
    opening = time.perf_counter()
    with lrt_deploy.open_decoder(folder / name, threads=args.threads) as decoder:
        found |= {"opened": resident()}
        opened = round(time.perf_counter() - opening, 2)
        rng = np.random.default_rng(0)
        state = decoder.prefill([rng.integers(0, args.vocab, MANY_TOKENS).tolist()], policy="zero")
        found |= {"prompt_read": resident()}
        steps = []
        for token in rng.integers(0, args.vocab, DECODE_TOKENS):
            start = time.perf_counter()
            decoder.step(state, [int(token)])
            steps.append((time.perf_counter() - start) * 1e3)
        logits = hashlib.sha256(state.logits.tobytes()).hexdigest()[:16]
    times = {"min": round(min(steps), 1), "median": round(float(np.median(steps)), 1)}
    return {"resident_bytes": found, "open_s": opened, "step_ms": times, "logits_sha256": logits}


def resident() -> dict[str, int]:
    """Resident bytes of this process: private, and mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kinds = {"RssAnon:": "anonymous", "RssFile:": "file"}
    return {kinds[line.split()[0]]: int(line.split()[1]) * 1024 for line in lines if line.split()[0] in kinds}


def with_private_tables(bundle: Path) -> Any:  # noqa: ANN401
    """Session options of ONNX Runtime that hand in the tables as arrays of this process instead of mapping them."""
    import numpy as np
    import onnx
    import onnxruntime as ort

    graph = bundle / "graphs" / "fp32" / "prefill.windowed.onnx"
    names, values = ["wte", "value_embeds"], []
    found = {tensor.name: tensor for tensor in onnx.load(graph, load_external_data=False).graph.initializer}
    for name in names:
        where = {entry.key: entry.value for entry in found[name].external_data}
        shape, offset = list(found[name].dims), int(where["offset"])
        array = np.fromfile(graph.parent / where["location"], np.uint16, shape[0] * shape[1], offset=offset)
        kind = found[name].data_type  # bfloat16
        values.append(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.reshape(shape), kind))

    def options() -> Any:  # noqa: ANN401
        made = original()
        made.add_external_initializers(names, values)
        return made

    original = ort.SessionOptions
    return options


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
    "memory": memory,
    "memory_private": partial(memory, private=True),
    "export_host": partial(export, name="bundle-host"),
    "memory_host": partial(memory, name="bundle-host"),
    "build": build,
    "build_host": partial(build, name="bf16-host"),
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
