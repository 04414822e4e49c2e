"""What only a machine with a GPU can tell, in one command of at most six minutes: the questions that builds leave open.

    .venv/bin/python benchmarks/gpu_check.py [--seconds 360] [--out gpu_check.json] [--backend tensorrt-rtx]

Questions, in this order; the report is written after each, so that a run that is cut off is still worth something:
 1. `environment`   which GPU and versions, and how fast it copies
 2. `plan_loads`    whether a plan that was built without regard to this GPU is read and run by it, documented or not
 3. `capture`       whether decoding as a CUDA graph gives the bits of decoding without
 4. `steps`         a decode step of a d20-shaped model by context and batch, as a share of the copy bandwidth, and its
                    kernels' times
 5. `prompts`       how fast prompts are read by each policy, in how many passes
 6. `threads`       whether threads with states of their own get the numbers that they get alone
 7. `out_of_memory` whether states that do not fit are refused, and what is there goes on
 8. `parity`        the demo beside ONNX Runtime on the CPU

Each runs in a process of its own, because an error of CUDA ends all later calls of a process. Needs torch for the
bundles, which are made here: the demo, and random weights of 20 layers and width 1280. Exits with 1 where there is no
GPU or an answer is not as it should be. The model is smaller with --layers, --width and --vocabulary.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
REPORT_FORMAT = 2
PRECISION, PROMPT_TOKENS, GRAPH_STEPS, PARITY_STEPS, WARM_UP = "fp16", 16, 32, 64, 8


@dataclass(frozen=True)
class Settings:
    """What a step is told. `work` holds the bundles, which the first step that needs one makes."""

    work: Path
    backend: str
    layers: int = 20
    width: int = 1280
    vocabulary: int = 32768
    contexts: tuple[int, ...] = (16, 1000, 2000)
    batches: tuple[int, ...] = (1, 8)
    prompts: tuple[int, ...] = (64, 512)
    steps: int = 64


# Bundles and engines


def bundle_of(settings: Settings, name: str) -> Path:
    """The bundle `demo` or `d20` with an engine of the backend, made on first use."""
    import lrt_deploy
    from lrt_deploy.bundle.engine_sidecar import PLAN, engine_folder
    from lrt_deploy.bundle.precisions import PLAN_BACKENDS

    folder = settings.work / name
    if not folder.exists():
        if name == "demo":
            lrt_deploy.export_bundle(
                ROOT / "demo" / "checkpoint", folder, precision=("fp32", PRECISION), max_seq_len=1024
            )
        else:
            export_random(settings, folder)
    if settings.backend in PLAN_BACKENDS:
        plan = engine_folder(folder, settings.backend, PRECISION) / PLAN
        if not plan.exists():
            lrt_deploy.build_engine(folder, backend=settings.backend, precision=PRECISION)
        admit_this_gpu(plan)
    return folder


def export_random(settings: Settings, folder: Path) -> None:
    """Export random weights of the shape asked for, with tables in bfloat16 as released checkpoints have them."""
    import torch
    from random_models import random_model, write_native

    import lrt_deploy
    from lrt_deploy.config import LRTConfig

    longest = max(settings.contexts) + settings.steps + WARM_UP
    config = LRTConfig(
        sequence_len=max(longest, 512),
        vocab_size=settings.vocabulary,
        n_layer=settings.layers,
        n_head=max(1, settings.width // 128),
        n_kv_head=max(1, settings.width // 128),
        n_embd=settings.width,
        window_pattern="SSSL",
    )
    checkpoint = folder.with_name(f"{folder.name}.checkpoint")
    write_native(random_model(config, table_dtype=torch.bfloat16), checkpoint)
    lrt_deploy.export_bundle(checkpoint, folder, precision=PRECISION, max_batch_size=max(settings.batches))


def admit_this_gpu(plan: Path) -> None:
    """Add this GPU to those of a sidecar: whether the plan runs on it is a question here."""
    import msgspec

    from lrt_deploy.bundle.engine_sidecar import read_sidecar, write_sidecar
    from lrt_deploy.machine import find_gpu

    gpu, sidecar = find_gpu()[0], read_sidecar(plan)
    if gpu is not None and gpu.capability_text not in sidecar.compute_capabilities:
        known = (*sidecar.compute_capabilities, gpu.capability_text)
        write_sidecar(plan, msgspec.structs.replace(sidecar, compute_capabilities=known))


@contextmanager
def opened(settings: Settings, name: str, *, cuda_graph: bool = True) -> Iterator[Any]:
    """An open decoder of a bundle."""
    import lrt_deploy

    folder = bundle_of(settings, name)
    with lrt_deploy.open_decoder(folder, settings.backend, PRECISION, cuda_graph=cuda_graph) as decoder:
        yield decoder


def tokens_for(decoder: Any, count: int, first: int = 13) -> list[int]:  # noqa: ANN401
    """Token ids that the model has."""
    return [(7919 * i + first) % decoder.config.vocab_size for i in range(count)]


# The questions: each returns what was found; `passed` where there is a right answer


def environment(settings: Settings) -> dict[str, Any]:
    """Machine, versions and the bandwidth of copies."""
    from lrt_deploy.cli import doctor
    from lrt_deploy.machine import find_gpu
    from lrt_deploy.runtime.backends.cuda import CudaDevice
    from lrt_deploy.runtime.bench import device_copy_gb_s

    gpu, reason = find_gpu()
    if gpu is None:
        return {"failed": reason}
    found = {"gpu": gpu.name, "compute_capability": gpu.capability_text, **doctor.environment()}
    return found | {"copy_bandwidth_gb_s": device_copy_gb_s(CudaDevice())}


def plan_loads(settings: Settings) -> dict[str, Any]:
    """What the build said of the demo's plan, and one step of it."""
    from lrt_deploy.bundle.engine_sidecar import PLAN, engine_folder, read_sidecar

    folder = bundle_of(settings, "demo")
    plan = engine_folder(folder, settings.backend, PRECISION) / PLAN
    found: dict[str, Any] = {}
    if plan.exists():
        sidecar = read_sidecar(plan)
        found = {"tensorrt_version": sidecar.tensorrt_version, "kernels": sidecar.layers.get("kernels")}
    with opened(settings, "demo") as decoder:
        state = decoder.prefill([tokens_for(decoder, PROMPT_TOKENS)], policy="stepwise")
        return found | {"passed": bool(np.isfinite(state.logits).all()), "detail": decoder.backend_detail}


def capture(settings: Settings) -> dict[str, Any]:
    """Greedy tokens, logits and latent as a CUDA graph and without: equal to the bit."""
    found = []
    for cuda_graph in (True, False):
        with opened(settings, "demo", cuda_graph=cuda_graph) as decoder:
            found.append(greedy(decoder, GRAPH_STEPS))
    equal = {name: bool(np.array_equal(found[0][name], found[1][name])) for name in found[0]}
    return {"passed": all(equal.values()), "steps": GRAPH_STEPS, "equal": equal}


def greedy(decoder: Any, steps: int, first: int = 13) -> dict[str, Any]:  # noqa: ANN401
    """Tokens and logits of a greedy rollout, and the latent at its end."""
    state = decoder.prefill([tokens_for(decoder, PROMPT_TOKENS, first)], policy="stepwise")
    tokens, logits = [], []
    for _ in range(steps):
        logits.append(state.logits)
        tokens.append(int(state.logits.argmax()))
        decoder.step(state, tokens[-1:])
    return {"tokens": np.array(tokens), "logits": np.stack(logits), "latent": state.latent}


def steps(settings: Settings) -> dict[str, Any]:
    """Times of decode steps by context and batch, and of the kernels of one of them."""
    from lrt_deploy.bundle.precisions import ITEM_BYTES, base_dtype
    from lrt_deploy.runtime import bench
    from lrt_deploy.runtime.backends.cuda import CudaDevice

    bandwidth, rows = 1e9 * bench.device_copy_gb_s(CudaDevice()), []
    with opened(settings, "d20") as decoder:
        weights = bench.weight_bytes_per_step(decoder.manifest, PRECISION, "full")
        for batch in settings.batches:
            for context in settings.contexts:
                # What the entries hold costs no time, so most of a context is read in one pass.
                prompts = [tokens_for(decoder, context, row) for row in range(batch)]
                times = timed_steps(decoder, decoder.prefill(prompts, policy="zero"), settings.steps)
                seconds = float(np.median(times))
                item = ITEM_BYTES[base_dtype(PRECISION, "full")]
                state = bench.state_bytes_per_step(decoder.config, context, item)["state_bytes_read_per_step"]
                read = weights + batch * state
                rows.append(
                    {
                        "batch": batch,
                        "context": context,
                        "tpot_ms": {"p50": 1e3 * seconds, "p99": 1e3 * float(np.percentile(times, 99))},
                        "tokens_per_s": batch / seconds,
                        "bytes_per_step": read,
                        "copy_bandwidth_share": read / seconds / bandwidth,
                    }
                )
    return {"copy_bandwidth_gb_s": bandwidth / 1e9, "rows": rows, "kernels": kernel_times(settings)}


def timed_steps(decoder: Any, state: Any, count: int) -> list[float]:  # noqa: ANN401
    """Seconds of each of `count` steps; the first steps, which warm up and capture, are not among them."""
    ids, times = [1] * state.batch, []
    for _ in range(WARM_UP + count):
        start = time.perf_counter()
        decoder.step(state, ids)
        times.append(time.perf_counter() - start)
    return times[WARM_UP:]


def kernel_times(settings: Settings) -> dict[str, Any]:
    """Milliseconds of each kernel of one step at batch 1, by TensorRT's profiler, without a CUDA graph."""
    from lrt_deploy.bundle.precisions import PLAN_BACKENDS

    if settings.backend not in PLAN_BACKENDS:
        return {"failed": "only TensorRT has a profiler of kernels"}
    with opened(settings, "d20", cuda_graph=False) as decoder:
        state = decoder.prefill([tokens_for(decoder, PROMPT_TOKENS)], policy="stepwise")
        context, times = decoder._backend.steps.decode(1)._context, {}
        trt = context.runner.engine.trt

        class Profiler(trt.IProfiler):
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times[layer_name] = float(ms)

        context.context.profiler = Profiler()
        decoder.step(state, [1])
    slowest = dict(sorted(times.items(), key=lambda item: -item[1])[:40])
    return {"count": len(times), "total_ms": sum(times.values()), "slowest_ms": slowest}


def prompts(settings: Settings) -> dict[str, Any]:
    """Seconds and passes of each way to read a prompt, and how far its latent is from the exact one."""
    rows = []
    with opened(settings, "d20") as decoder:
        for count in settings.prompts:
            prompt, exact = tokens_for(decoder, count), None
            for policy in ("stepwise", "fixed-point", "zero"):
                decoder.prefill([prompt], policy=policy)  # kernels are compiled
                start = time.perf_counter()
                state = decoder.prefill([prompt], policy=policy)
                seconds = time.perf_counter() - start
                exact = state.latent if exact is None else exact
                error = float(np.abs(state.latent - exact).max())
                report = {"asked": policy, "policy": state.prefill.policy, "passes": state.prefill.passes}
                rows.append({"tokens": count, **report, "seconds": seconds, "max_abs_latent_error": error})
    return {"rows": rows}


def threads(settings: Settings) -> dict[str, Any]:
    """Three threads with states of their own, three times."""
    with opened(settings, "demo") as decoder:
        alone = [greedy(decoder, GRAPH_STEPS, first) for first in (1, 2, 3)]
        wrong, errors = [], []

        def work(index: int) -> None:
            try:
                found = greedy(decoder, GRAPH_STEPS, index + 1)
                if any(not np.array_equal(found[name], alone[index][name]) for name in found):
                    wrong.append(index)
            except Exception as error:
                errors.append(repr(error))

        for _ in range(3):
            running = [threading.Thread(target=work, args=(index,)) for index in range(3)]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
    return {"passed": not wrong and not errors, "rollouts": 9, "wrong": len(wrong), "errors": errors}


def out_of_memory(settings: Settings) -> dict[str, Any]:
    """Fill the GPU's memory with states; the refusal must leave those that are there as they are."""
    from lrt_deploy.errors import BackendError

    with opened(settings, "d20") as decoder:
        state, twin = (decoder.prefill([tokens_for(decoder, PROMPT_TOKENS)], policy="stepwise") for _ in range(2))
        expected, held, refusal = decoder.step(twin, [1]).copy(), [], None
        size = max(settings.batches)
        while refusal is None and len(held) < 20_000:
            try:
                held.append(decoder.new_state(size))
            except BackendError as error:
                refusal = str(error)
        found = decoder.step(state, [1])
        count = len(held)
        held.clear()
        again = decoder.new_state(size).slots == size
    passed = refusal is not None and "out of memory" in refusal and np.array_equal(found, expected) and again
    return {"passed": bool(passed), "states": count, "rows_each": size, "refusal": refusal}


def parity(settings: Settings) -> dict[str, Any]:
    """A rollout of the demo beside ONNX Runtime on the CPU in float32."""
    import lrt_deploy
    from lrt_deploy.evaluation import verdict

    with (
        opened(settings, "demo") as decoder,
        lrt_deploy.open_decoder(settings.work / "demo", "ort-cpu", "fp32") as reference,
    ):
        report = verdict.compare(
            reference,
            decoder,
            tokens_for(decoder, PROMPT_TOKENS),
            PARITY_STEPS,
            precision=decoder.precision,
            checkpoint_matches=None,
            backend=decoder.backend,
        )
        names = ("passed", "verdict", "max_abs_logit_error", "max_abs_latent_error", "mean_kl", "top1_agreement")
        return {name: getattr(report, name) for name in names} | {"beside": reference.precision}


QUESTIONS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    question.__name__: question
    for question in (environment, plan_loads, capture, steps, prompts, threads, out_of_memory, parity)
}


# Running them


def answer(name: str, settings: Settings) -> dict[str, Any]:
    """What a question finds, or why it found nothing; no error ends the run."""
    try:
        return QUESTIONS[name](settings)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def isolated(name: str, settings: Settings, arguments: list[str], seconds: float) -> dict[str, Any]:
    """The same in a process of its own, which is ended after `seconds`."""
    out = settings.work / f"{name}.json"
    command = [
        sys.executable,
        __file__,
        *arguments,
        "--question",
        name,
        "--work",
        str(settings.work),
        "--out",
        str(out),
    ]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(0.01, seconds))
    except subprocess.TimeoutExpired:
        return {"failed": f"cut off after {seconds:.0f} s"}
    if out.exists():
        found: dict[str, Any] = json.loads(out.read_text())
        return found
    return {"failed": f"its process ended with {ended.returncode}: {ended.stderr[-500:]}"}


def ask(
    settings: Settings, limit: float, out: Path | None, run: Callable[[str, Settings, float], dict[str, Any]]
) -> dict[str, Any]:
    """Ask all questions within `limit` seconds; `run` is called with a question, settings and the seconds left.

    Where a plan is not read or does not run, ONNX Runtime on the GPU is asked the questions that follow.
    """
    started = time.monotonic()
    report: dict[str, Any] = {"format": REPORT_FORMAT, "answers": {}}
    for name in QUESTIONS:
        left = limit - (time.monotonic() - started)
        say(f"{name} …")
        begun = time.monotonic()
        found = run(name, settings, left) if left > 0 else {"failed": "no time was left"}
        report["answers"][name] = {
            "backend": settings.backend,
            "seconds": round(time.monotonic() - begun, 3),
            **found,
        }
        say(line(name, report["answers"][name]))
        if out is not None:
            partial = out.with_suffix(".partial")
            partial.write_text(json.dumps(report, indent=2, default=str) + "\n")
            partial.replace(out)
        if name == "environment" and "failed" in found:
            break
        if name == "plan_loads" and not found.get("passed"):
            settings = replace(settings, backend="ort-cuda")
    return report


def line(name: str, found: dict[str, Any]) -> str:
    """An answer in a few words."""
    if "failed" in found:
        return f"{name}: FAILED, {found['failed']}"
    if "rows" in found:
        return f"{name}: {json.dumps(found['rows'])}"
    words = "" if "passed" not in found else "passed" if found["passed"] else "NOT AS IT SHOULD BE"
    rest = {key: value for key, value in found.items() if key in ("gpu", "copy_bandwidth_gb_s", "verdict", "equal")}
    return f"{name}: {words} {json.dumps(rest)}"


def good(report: dict[str, Any]) -> bool:
    """Whether every question has an answer, and the right one where there is one."""
    answers = report["answers"]
    return len(answers) == len(QUESTIONS) and all(
        "failed" not in found and found.get("passed", True) for found in answers.values()
    )


def say(text: str) -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="tensorrt-rtx", help="tensorrt-rtx, tensorrt or ort-cuda")
    parser.add_argument("--seconds", type=float, default=360, help="after which no question is asked any more")
    parser.add_argument("--out", type=Path, help="where to write the report as JSON, after each answer")
    parser.add_argument("--work", type=Path, help="keep bundles and engines there; default: a temporary folder")
    parser.add_argument("--question", choices=QUESTIONS, help="ask one question, in this process")
    for name in ("layers", "width", "vocabulary", "steps"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name), help="of the d20-shaped model")
    for name in ("contexts", "batches", "prompts"):
        parser.add_argument(f"--{name}", type=numbers, default=getattr(Settings, name), help="as 16,1000")
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace, work: Path) -> Settings:
    """The settings that the command line asks for."""
    names = ("backend", "layers", "width", "vocabulary", "steps", "contexts", "batches", "prompts")
    return Settings(work=work, **{name: getattr(args, name) for name in names})


def main(arguments: list[str]) -> int:
    """Ask, report, and say by the exit code whether all is well."""
    args = parse(arguments)
    if args.question:
        settings = settings_of(args, args.work)
        args.out.write_text(json.dumps(answer(args.question, settings), indent=2, default=str) + "\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        settings = settings_of(args, work)
        report = ask(settings, args.seconds, args.out, lambda name, now, left: isolated(name, now, arguments, left))
    say("all is well" if good(report) else "not all is well")
    return 0 if good(report) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
