"""`lrt-deploy build`: a bundle gets an engine for a GPU. Shows what is built and how far; the work is `build_engine`'s.

Where a GPU is present the plan is run at once and held against ONNX Runtime on the CPU; where none is, that is said.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options, output
from .export import product_words
from .smoke import smoke_test

if TYPE_CHECKING:
    from lrt_deploy.engine_sidecar import EngineSidecar


def build(
    bundle: options.BundlePath,
    backend: Annotated[
        options.EngineName,
        typer.Option(
            metavar="NAME",
            help=f"Which TensorRT: {options.listed(options.EngineName)}; auto: tensorrt where it is installed.",
        ),
    ] = "auto",
    precision: Annotated[
        options.PrecisionName | None,
        typer.Option(
            metavar="NAME",
            help=f"Precision to build: {options.listed(options.PrecisionName)}; default: the only one in it.",
        ),
    ] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Most prompt tokens that the engine takes at once; default: 512.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing engine.")] = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Build a TensorRT engine from a bundle, after proving that its network is what the precision promises."""
    from lrt_deploy import build_engine
    from lrt_deploy.engine_sidecar import PLAN, engine_folder, write_sidecar
    from lrt_deploy.tensorrt_flavours import choose_flavour

    flavour, reason = choose_flavour(backend)
    output.say(f"building for {flavour.backend}, {reason}")
    with output.progress(quiet=json) as progress:
        sidecar = build_engine(
            bundle,
            backend=flavour.backend,
            precision=precision,
            chunk_tokens=chunk_tokens,
            force=force,
            progress=progress,
        )
        plan = engine_folder(bundle, sidecar.backend, sidecar.precision) / PLAN
        smoke = smoke_test(bundle, sidecar.backend, sidecar.precision, progress)
        sidecar = dataclasses.replace(sidecar, smoke=smoke)
        write_sidecar(plan, sidecar)
    show(plan, sidecar, json)
    if smoke["ran"] and not smoke["passed"]:
        raise typer.Exit(1)


def show(plan: Path, sidecar: EngineSidecar, json: bool) -> None:
    """The answer, and the table for people."""
    if json:
        output.document({"plan": str(plan)} | sidecar.to_dict())
        return
    size = output.bytes_text(sidecar.plan_bytes)
    output.answer(f"built {plan} ({size}) in {sidecar.build['seconds']:.1f} s; {smoke_text(sidecar.smoke)}")
    output.table(engine_rows(sidecar))


def smoke_text(smoke: dict[str, Any]) -> str:
    """What came of running the plan, in a clause."""
    if not smoke.get("ran"):
        return f"it was not run here: {smoke.get('reason')}"
    return f"{'it passed' if smoke.get('passed') else 'IT FAILED'} the smoke test: {smoke.get('verdict')}"


def engine_rows(sidecar: EngineSidecar) -> dict[str, str]:
    """What an engine is and what its network was proven to consist of, for people."""
    layers, memory = sidecar.layers, sidecar.build.get("memory", {})
    kernels = "decomposed where there is no fused kernel" if layers.get("attention_decomposable") else "fused"
    return {
        "engine": f"{sidecar.precision} for {sidecar.backend} {sidecar.tensorrt_version}",
        "GPUs": f"compute capability {', '.join(sidecar.compute_capabilities)}",
        "made from": f"{sidecar.onnx}, sha256 {sidecar.onnx_sha256[:16]}…",
        "capacity": f"{sidecar.max_seq_len} tokens in {sidecar.capacity} slots, {sidecar.max_batch_size} sequences",
        "profiles": "; ".join(f"{p.name}: batch {p.batch}, tokens {p.tokens}" for p in sidecar.profiles),
        "flags": ", ".join(sidecar.flags),
        "cache updates in place": str(layers.get("kv_cache_update")),
        "attentions": f"{layers.get('attention')} under {layers.get('attention_masks')} mask(s), {kernels}",
        "products": "; ".join(
            f"{count} {product_words(product)}" for product, count in layers.get("matmul", {}).items()
        ),
        "norms": ", ".join(f"{count} in {dtype}" for dtype, count in layers.get("norms", {}).items()),
        "memory": ", ".join(f"{name} {max(sizes, default=0)}" for name, sizes in memory.items()),
        "peak host memory": output.bytes_text(sidecar.build.get("peak_host_bytes") or 0),
        "smoke test": smoke_text(sidecar.smoke),
    }
