"""`lrt-deploy build`: build an engine of a bundle, by `lrt_deploy.build_engine`.

Where there is a GPU, a smoke test follows: the engine decodes a short rollout beside ONNX Runtime on the CPU.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from lrt_deploy.errors import LRTDeployError, ParityError

from . import options, output
from .options import option
from .output import Progress
from .summary import product_words

if TYPE_CHECKING:
    from lrt_deploy.bundle.engine_sidecar import EngineSidecar


@dataclass(frozen=True)
class BuildOptions:
    """Options of `lrt_deploy.build_engine`, by the same names."""

    backend: Annotated[
        options.EngineName,
        option(f"Which TensorRT: {options.listed(options.EngineName)}; auto: tensorrt where it is installed.", "NAME"),
    ] = "auto"
    precision: Annotated[
        options.PrecisionName | None,
        option(f"Precision to build: {options.listed(options.PrecisionName)}; default: the only one in it.", "NAME"),
    ] = None
    chunk_tokens: Annotated[
        int | None, option("Most prompt tokens that the engine takes at once; default: 512, or the bundle's capacity.")
    ] = None
    max_batch_size: Annotated[
        int | None, option("Most sequences that the engine decodes together; default and limit: the bundle's.")
    ] = None
    timing_cache: Annotated[
        Path | None, option("Measured kernel times, read and replaced; default: beside the engines.", "FILE")
    ] = None
    force: Annotated[bool, option("Replace an existing engine.")] = False


@dataclass(frozen=True)
class BuilderOptions:
    """Options that become arguments of `lrt_deploy.build_engine` under other names, or settings of the process."""

    workspace: Annotated[
        str | None, option("Most scratch memory of a layer, in bytes or as 512MiB or 4GiB.", "SIZE")
    ] = None
    device: Annotated[int | None, option("GPU to build on, by CUDA's number; default: the first.")] = None
    verbose: Annotated[bool, option("Print all messages of TensorRT on stderr.")] = False


def build(
    bundle: options.BundlePath,
    *,
    chosen: BuildOptions,
    builder: BuilderOptions,
    dry_run: Annotated[bool, option("Say sizes, memory and time, and write nothing.")] = False,
    json: options.Json = False,
) -> None:
    """Build a TensorRT engine from a bundle, after verifying that its network is what the precision expects."""
    from lrt_deploy import build_engine
    from lrt_deploy.bundle.engine_sidecar import PLAN, engine_folder, write_sidecar

    arguments = dataclasses.asdict(chosen) | {"on_message": None}
    if builder.verbose:
        arguments["on_message"] = lambda severity, text: output.say(f"TensorRT {severity.lower()}: {text}")
    arguments["workspace_bytes"] = None if builder.workspace is None else parse_bytes(builder.workspace)
    if builder.device is not None:
        use_device(builder.device)
    if dry_run:
        from lrt_deploy.exporters.engine.build import estimate_engine

        found = estimate_engine(bundle, chosen.backend, chosen.precision, chosen.force)
        output.estimate(json, f"build an engine of {bundle}", found.to_dict())
        return
    with output.progress(quiet=json) as progress:
        sidecar = build_engine(bundle, **arguments, progress=progress)
        plan = engine_folder(bundle, sidecar.backend, sidecar.precision) / PLAN
        smoke = smoke_test(bundle, sidecar.backend, sidecar.precision, progress)
        sidecar = msgspec.structs.replace(sidecar, smoke=smoke)
        write_sidecar(plan, sidecar)
    show(plan, sidecar, chosen.backend == "auto", json)
    if smoke["ran"] and not smoke["passed"]:
        raise typer.Exit(1)


def parse_bytes(text: str) -> int:
    """Parse a size in bytes, as `1048576`, `512MiB` or `4GiB`."""
    match = re.fullmatch(r"([0-9]{1,15})\s*(KiB|MiB|GiB|)", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter(f"--workspace is {text[:40]!r}; expected bytes, or a size as 512MiB or 4GiB")
    return int(match[1]) << {"": 0, "kib": 10, "mib": 20, "gib": 30}[match[2].lower()]


def use_device(number: int) -> None:
    """Let this process see one GPU only; must come before CUDA is loaded."""
    from lrt_deploy.errors import EngineError
    from lrt_deploy.machine import find_gpu

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if number < 0 or (visible and number >= len(visible)):
        raise EngineError(f"--device is {number}; CUDA_VISIBLE_DEVICES shows {','.join(visible) or 'all'}")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[number] if visible else str(number)
    gpu, reason = find_gpu()
    if gpu is None:
        raise EngineError(f"--device is {number}, and there is no such GPU here: {reason}")
    output.say(f"device {number}: {reason}")


def plain_commands(plan: Path, sidecar: EngineSidecar) -> dict[str, str]:
    """Return commands that load the plan without lrt-deploy, at the smallest shapes of the decode profile."""
    shapes = {
        value["name"]: [size if isinstance(size, int) else 1 for size in value["shape"]] for value in sidecar.inputs
    }
    polygraphy = ["polygraphy", "run", str(plan), "--model-type", "engine", "--trt", "--optimization-profile", "0"]
    polygraphy += ["--input-shapes", *(f"{name}:{sizes}".replace(" ", "") for name, sizes in shapes.items())]
    sizes = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
    trtexec = ["trtexec", f"--loadEngine={plan}", "--useProfile=0", f"--shapes={sizes}"]
    if sidecar.backend == "tensorrt":
        return {"polygraphy": shlex.join(polygraphy), "trtexec": shlex.join(trtexec)}
    # TensorRT-RTX calls its trtexec by its own name.
    trtexec[0] = "tensorrt_rtx"
    return {"polygraphy": f"POLYGRAPHY_USE_TENSORRT_RTX=1 {shlex.join(polygraphy)}", "trtexec": shlex.join(trtexec)}


def show(plan: Path, sidecar: EngineSidecar, chosen: bool, json: bool) -> None:
    """Print the document, or the answer and a table; `chosen`: the backend was not named, so say why it was taken."""
    from lrt_deploy.bundle.tensorrt_libraries import choose_library

    commands = plain_commands(plan, sidecar)
    if json:
        output.document({"plan": str(plan)} | sidecar.to_dict() | {"commands": commands})
        return
    size = output.bytes_text(sidecar.plan_bytes)
    output.answer(f"built {plan} ({size}) in {sidecar.build['seconds']:.1f} s; {smoke_text(sidecar.smoke)}")
    output.table(engine_rows(sidecar) | ({"chosen": choose_library("auto")[1]} if chosen else {}))
    for command in commands.values():  # one line each, to be copied
        output.say(command)


def smoke_text(smoke: dict[str, Any]) -> str:
    """Describe the outcome of the smoke test in a clause."""
    if not smoke.get("ran"):
        return f"it was not run here: {smoke.get('reason')}"
    return f"{'it passed' if smoke.get('passed') else 'IT FAILED'} the smoke test: {smoke.get('verdict')}"


def engine_rows(sidecar: EngineSidecar) -> dict[str, str]:
    """Return the rows of a table on an engine and its verified network."""
    layers, memory = sidecar.layers, sidecar.build.get("memory", {})
    fused = "decomposed where there is no fused kernel" if layers.get("attention_decomposable") else "fused"
    kernels = []  # of each profile, and what of them costs time
    for profile, found in (layers.get("kernels") or {}).items():
        faults = found.get("faults", [])
        more = f" ({faults[0]}{f' and {len(faults) - 1} more' if len(faults) > 1 else ''})" if faults else ""
        kernels.append(f"{found['kernels']} for {profile}{more}")
    return {
        "engine": f"{sidecar.precision} for {sidecar.backend} {sidecar.tensorrt_version}",
        "GPUs": f"compute capability {', '.join(sidecar.compute_capabilities)}",
        "made from": f"{sidecar.onnx}, sha256 {sidecar.onnx_sha256[:16]}…",
        "capacity": f"{sidecar.max_seq_len} tokens in {sidecar.capacity} slots, {sidecar.max_batch_size} sequences",
        "profiles": "; ".join(f"{p.name}: batch {p.batch}, tokens {p.tokens}" for p in sidecar.profiles),
        "flags": ", ".join(sidecar.flags),
        "cache updates in place": str(layers.get("kv_cache_update")),
        "attentions": f"{layers.get('attention')} under {layers.get('attention_masks')} mask(s), {fused}",
        "products": "; ".join(
            f"{count} {product_words(product)}" for product, count in layers.get("matmul", {}).items()
        ),
        "norms": ", ".join(f"{count} in {dtype}" for dtype, count in layers.get("norms", {}).items()),
        "memory": ", ".join(f"{name} {max(sizes, default=0)}" for name, sizes in memory.items()),
        "kernels": "; ".join(kernels) or "not listed by this build",
        "peak host memory": output.bytes_text(sidecar.build.get("peak_host_bytes") or 0),
        "smoke test": smoke_text(sidecar.smoke),
    }


_PROMPT_TOKENS, _STEPS = 12, 32


def smoke_test(bundle: Path, backend: str, precision: str, progress: Progress) -> dict[str, Any]:
    """Decode beside ONNX Runtime; return `ran`, and `reason` or `passed`, `verdict` and its numbers."""
    from lrt_deploy import open_decoder
    from lrt_deploy.bundle.manifest import read_manifest
    from lrt_deploy.evaluation import verdict
    from lrt_deploy.machine import find_gpu
    from lrt_deploy.runtime.opening import find_reference

    gpu, reason = find_gpu()
    if gpu is None:
        return {"ran": False, "reason": reason}
    manifest = read_manifest(bundle)
    steps = min(_STEPS, manifest.max_seq_len - _PROMPT_TOKENS)
    if steps < 1:
        return {"ran": False, "reason": f"a capacity of {manifest.max_seq_len} tokens is too small for it"}
    prompt = [(7919 * i + 13) % manifest.model.vocab_size for i in range(_PROMPT_TOKENS)]
    try:
        chosen = find_reference(bundle, manifest)
        opened = open_decoder(bundle, chosen.backend, chosen.precision)
    except LRTDeployError as error:  # it says nothing about the engine
        return {"ran": False, "reason": str(error)}
    try:
        with opened as reference, open_decoder(bundle, backend, precision) as decoder:
            report = verdict.compare(
                reference,
                decoder,
                prompt,
                steps,
                precision=precision,
                checkpoint_matches=None,
                backend=backend,
                prefill="stepwise",
                progress=progress,
            )
            beside = f"{reference.backend} in {reference.precision}"
    except ParityError as error:  # a comparison that could not be made
        return {"ran": False, "reason": str(error)}
    except LRTDeployError as error:
        return {"ran": True, "passed": False, "gpu": gpu.name, "verdict": str(error)}
    numbers = ("max_abs_logit_error", "max_abs_latent_error", "mean_kl", "top1_agreement")
    fields = {name: getattr(report, name) for name in numbers}
    return {"ran": True, "passed": report.passed, "gpu": gpu.name, "beside": beside, "verdict": report.verdict} | fields
