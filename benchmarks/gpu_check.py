"""What only a machine with a GPU can tell, in one command: parity, CUDA graphs and speed of each backend there.

    .venv/bin/python benchmarks/gpu_check.py [BUNDLE] [--precision fp16 ...] [--steps 256] [--out FILE.json]

Without BUNDLE the demo checkpoint is exported. For each TensorRT that is installed an engine is built per precision,
unless the bundle has one; then each backend decodes beside ONNX Runtime on the CPU (parity), with and without its CUDA
graph (every bit must be equal), and alone (tokens/s, and the bytes a step must read as a share of the copy bandwidth
that is measured on the same GPU). What fails is written down with its message and fails nothing else: that a plan does
not run on some GPU is an answer too. Exits with 1 where there is no GPU or something was not as it should be.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
PROMPT_TOKENS, PARITY_STEPS, GRAPH_STEPS = 16, 64, 32


def candidates(bundle: Path, precisions: list[str]) -> Iterator[tuple[str, str]]:
    """Backend and precision of all that could run here."""
    from lrt_deploy.bundle.precisions import QUANTIZED
    from lrt_deploy.bundle.tensorrt_libraries import LIBRARIES

    for name, flavour in LIBRARIES.items():
        if flavour.installed:
            yield from ((name, precision) for precision in precisions)
    yield from (("ort-cuda", precision) for precision in precisions if precision not in QUANTIZED)


def check(bundle: Path, backend: str, precision: str, args: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """All findings about one backend in one precision; each that fails leaves its message instead."""
    from lrt_deploy import open_decoder

    def opened(cuda_graph: bool = True) -> Any:  # noqa: ANN401
        return open_decoder(bundle, backend, precision, cuda_graph=cuda_graph)

    found: dict[str, Any] = {"backend": backend, "precision": precision}
    if backend != "ort-cuda":
        found["build"] = attempt(lambda: build(bundle, backend, precision))
    found["parity"] = attempt(lambda: with_open(opened, lambda decoder: parity(bundle, decoder)))
    if backend != "ort-cuda":
        found["cuda_graph"] = attempt(lambda: graph_changes_nothing(opened))
    found["speed"] = attempt(lambda: with_open(opened, lambda decoder: speed(decoder, args.steps, bandwidth)))
    return found


def attempt(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `act` returns, or why it did not; only errors raised on purpose are findings."""
    from lrt_deploy.errors import LRTDeployError

    try:
        return act()
    except LRTDeployError as error:
        return {"failed": str(error)}


def with_open(opened: Callable[[], Any], act: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Open, act, close."""
    with opened() as decoder:
        return act(decoder)


def build(bundle: Path, backend: str, precision: str) -> dict[str, Any]:
    """Build the engine, unless there is one."""
    from lrt_deploy import build_engine
    from lrt_deploy.bundle.engine_sidecar import PLAN, engine_folder, read_sidecar

    plan = engine_folder(bundle, backend, precision) / PLAN
    sidecar = read_sidecar(plan) if plan.exists() else build_engine(bundle, backend=backend, precision=precision)
    return {"tensorrt_version": sidecar.tensorrt_version, "layers": sidecar.layers, "build": sidecar.build}


def prompt_for(decoder: Any) -> list[int]:  # noqa: ANN401
    """Token ids that any model has."""
    return [(7919 * i + 13) % decoder.config.vocab_size for i in range(PROMPT_TOKENS)]


def parity(bundle: Path, decoder: Any) -> dict[str, Any]:  # noqa: ANN401
    """A rollout beside ONNX Runtime on the CPU, in the most precise precision that the bundle has for it."""
    from lrt_deploy import open_decoder
    from lrt_deploy.evaluation import verdict as library

    with open_decoder(bundle, "ort-cpu") as reference:
        report = library.compare(
            reference,
            decoder,
            prompt_for(decoder),
            PARITY_STEPS,
            precision=decoder.precision,
            checkpoint_matches=None,
            backend=decoder.backend,
        )
        names = ("passed", "verdict", "max_abs_logit_error", "max_abs_latent_error", "mean_kl", "top1_agreement")
        return {name: getattr(report, name) for name in names} | {"beside": reference.precision}


def graph_changes_nothing(opened: Callable[[bool], Any]) -> dict[str, Any]:
    """Greedy tokens, logits and latent with the CUDA graph and without it: equal to the bit."""
    with opened(True) as one, opened(False) as other:
        with_graph, without = (greedy(decoder, GRAPH_STEPS) for decoder in (one, other))
    equal = {name: bool(np.array_equal(with_graph[name], without[name])) for name in with_graph}
    return {"passed": all(equal.values()), "steps": GRAPH_STEPS, "equal": equal}


def greedy(decoder: Any, steps: int) -> dict[str, Any]:  # noqa: ANN401
    """Tokens and logits of a greedy rollout, and the latent at its end."""
    state = decoder.prefill([prompt_for(decoder)], policy="stepwise")
    tokens, logits = [], []
    for _ in range(steps):
        logits.append(state.logits)
        tokens.append(int(state.logits.argmax()))
        decoder.step(state, tokens[-1:])
    return {"tokens": np.array(tokens), "logits": np.stack(logits), "latent": state.latent}


def speed(decoder: Any, steps: int, bandwidth: float) -> dict[str, Any]:  # noqa: ANN401
    """Median time of a decode step at batch 1, and the share of the copy bandwidth that its bytes stand for."""
    from lrt_deploy.bundle.precisions import ITEM_BYTES, base_dtype
    from lrt_deploy.runtime.bench import roofline

    steps = min(steps, decoder.max_seq_len - PROMPT_TOKENS - 8)
    state = decoder.prefill([prompt_for(decoder)], policy="stepwise")
    for _ in range(8):  # the first steps warm up and capture
        decoder.step(state, [1])
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        decoder.step(state, [1])
        times.append(time.perf_counter() - start)
    step = float(np.median(times))
    read = roofline.weight_bytes_per_step(decoder.manifest, decoder.precision)
    item = ITEM_BYTES[base_dtype(decoder.precision, "full")]
    read += roofline.state_bytes_per_step(decoder.config, int(state.lengths[0]) - steps // 2, item)
    return {
        "steps": steps,
        "tpot_ms": {"p50": 1e3 * step, "p99": 1e3 * float(np.percentile(times, 99))},
        "tokens_per_s": 1 / step,
        "bytes_per_step": read,
        "copy_bandwidth_share": read / step / bandwidth,
        "detail": decoder.backend_detail,
    }


def run(bundle: Path, args: argparse.Namespace, gpu: Any) -> dict[str, Any]:  # noqa: ANN401
    """All findings."""
    from lrt_deploy.bundle.manifest import read_manifest
    from lrt_deploy.cli.doctor import environment
    from lrt_deploy.runtime.backends.cuda import CudaDevice
    from lrt_deploy.runtime.bench.roofline import device_copy_gb_s

    held = read_manifest(bundle).precisions
    precisions = [precision for precision in args.precision or held if precision in held]
    bandwidth = 1e9 * device_copy_gb_s(CudaDevice())
    findings = []
    for backend, precision in candidates(bundle, precisions):
        say(f"{backend} in {precision}")
        findings.append(check(bundle, backend, precision, args, bandwidth))
    return {
        "gpu": gpu.name,
        "compute_capability": gpu.capability_text,
        "copy_bandwidth_gb_s": bandwidth / 1e9,
        "findings": findings,
        "environment": environment(),
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for people: one line for each finding."""
    yield f"{report['gpu']} ({report['compute_capability']}), copies {report['copy_bandwidth_gb_s']:.0f} GB/s"
    for found in report["findings"]:
        parts = [f"{name}: {outcome(name, found[name])}" for name in found if isinstance(found[name], dict)]
        yield f"{found['backend']} {found['precision']}: {'; '.join(parts)}"


def outcome(name: str, found: dict[str, Any]) -> str:
    """One finding in a few words."""
    if "failed" in found:
        return f"FAILED, {found['failed']}"
    if name == "speed":
        return f"{found['tokens_per_s']:.0f} tokens/s, {found['copy_bandwidth_share']:.0%} of the copy bandwidth"
    if name == "build":
        return f"built with {found['tensorrt_version']}"
    return f"{'passed' if found['passed'] else 'FAILED'}, {found.get('verdict') or found.get('equal')}"


def good(report: dict[str, Any]) -> bool:
    """Whether everything ran and nothing differed that must not."""
    parts = [part for found in report["findings"] for part in found.values() if isinstance(part, dict)]
    return all("failed" not in part and part.get("passed", True) for part in parts)


def say(line: str) -> None:
    """A line for people."""
    print(line, file=sys.stderr, flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?", type=Path, help="default: the demo checkpoint, exported")
    parser.add_argument("--precision", action="append", help="of those in the bundle; repeatable; default: all")
    parser.add_argument("--steps", type=int, default=256, help="decode steps that are timed")
    parser.add_argument("--out", type=Path, help="where to write the report as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Check, report, and say by the exit code whether all is well."""
    import lrt_deploy
    from lrt_deploy.machine import find_gpu

    args = parse(arguments)
    gpu, reason = find_gpu()
    if gpu is None:
        say(f"nothing was checked: {reason}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        bundle = args.bundle
        if bundle is None:
            bundle = Path(folder) / "bundle"
            say("exporting the demo checkpoint")
            precisions = args.precision or ["fp32", "fp16", "bf16"]
            lrt_deploy.export_bundle(ROOT / "demo" / "checkpoint", bundle, precision=precisions, max_seq_len=1024)
        report = run(bundle, args, gpu)
    for line in lines(report):
        print(line)
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2, default=str) + "\n")
    return 0 if good(report) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
