"""`lrt-deploy inspect`: describe a bundle, a checkpoint, a graph found alone, or an engine."""

from __future__ import annotations

import json as json_module
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrt_deploy.errors import InputError, LRTDeployError
from lrt_deploy.files import parse_json, read_bytes

from . import options, output, summary

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


_LARGEST_MESSAGE_BYTES = 2**31 - 1  # protobuf's own limit
_KNOWN = (
    "a bundle folder, a checkpoint (folder, weights file, or hf://owner/name[@revision] on the Hugging Face Hub), "
    "a graph (.onnx), or an engine (its folder or .plan)"
)

Findings = tuple[dict[str, Any], str, Mapping[str, object]]  # JSON fields, the line for stdout, the table for people


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help=f"{_KNOWN[0].upper()}{_KNOWN[1:]}.")],
    verify: Annotated[bool, options.option(options.VERIFY)] = False,
    json: options.Json = False,
) -> None:
    """Tell what a bundle, checkpoint, graph or engine holds."""
    from lrt_deploy.bundle.manifest import Kind, kind_of
    from lrt_deploy.model.hub import check_source

    source = check_source(path, "PATH")
    if isinstance(source, str):
        output.result(json, *_checkpoint(source, json))
        return
    if not source.exists():
        found = "is a link that leads to nothing" if source.is_symlink() else "does not exist"
        raise InputError(f"{source} {found}; expected {_KNOWN}")
    kind = kind_of(source)
    if kind is None:
        raise InputError(f"{source} is none of the things that can be inspected; expected {_KNOWN}")
    look: dict[Kind, Callable[[Path, bool], Findings]] = {
        "bundle": _bundle,
        "checkpoint": lambda path, _: _checkpoint(path, json),
        "graph": _graph,
        "engine": _engine,
    }
    output.result(json, *look[kind](source, verify))


def _bundle(path: Path, verify: bool) -> Findings:
    """Read the manifest and check it against its digest; with `verify` every file as well."""
    from lrt_deploy.bundle.manifest import MANIFEST, read_manifest, verify_files

    manifest = read_manifest(path)
    if verify:
        with output.progress(quiet=True) as progress:
            verify_files(path, manifest, force=True, progress=lambda done, total: progress("hashing", done, total))
    origin = dict(manifest.provenance.get("checkpoint") or {})
    step = "" if origin.get("step") is None else f", step {origin['step']}"
    hub = dict(origin.get("hub") or {})
    fetched = f", {hub.get('repository')} at {hub.get('commit')}" if hub else ""
    versions = dict(manifest.provenance.get("versions") or {})
    size = output.bytes_text(sum(record.bytes for record in manifest.files.values()))
    rows = summary.bundle_rows(manifest) | {
        "engines": _engines_text(path),
        "files": f"{len(manifest.files)}, {size}",
        "checkpoint": f"{origin.get('file')}{step}, sha256 {str(origin.get('sha256'))[:16]}…{fetched}",
        "made with": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
    fields = json_module.loads((path / MANIFEST).read_bytes())
    return fields, f"{path} is a bundle{', all files intact' if verify else ''}", rows


def _engines_text(bundle: Path) -> str:
    """List the engines beside the graphs; a damaged one is named as such."""
    from lrt_deploy.bundle.engine_sidecar import ENGINES, PLAN, read_sidecar

    named = []
    for plan in sorted(bundle.glob(f"{ENGINES}/*/{PLAN}")):
        try:
            sidecar = read_sidecar(plan)
            named.append(f"{sidecar.precision} for {sidecar.backend} {sidecar.tensorrt_version}")
        except LRTDeployError:
            named.append(f"{plan.parent.name} (damaged)")
    return ", ".join(named) or "none"


def _checkpoint(path: str | Path, quiet: bool) -> Findings:
    from lrt_deploy.exporters.bundle import find_tokenizer
    from lrt_deploy.model.checkpoint import open_checkpoint

    with output.progress(quiet) as progress:
        opened = open_checkpoint(path, progress=progress)
    tokenizer: dict[str, Any] = {"found": True, "tokens": None, "error": None}
    try:
        found = find_tokenizer(opened, None)
        tokenizer |= {"found": found is not None, "tokens": len(found.byte_lengths) if found else None}
    except LRTDeployError as error:
        tokenizer["error"] = str(error)
    sizes = {name: tensor.numel() for name, tensor in opened.tensors.items()}
    fields = {
        "config": opened.config.to_dict(),
        "known_as": opened.known_as,
        "chosen": opened.chosen,
        "step": opened.step,
        "file": str(opened.model_file),
        "sha256": opened.sha256,
        "hub": None if opened.origin is None else opened.origin.to_dict(),
        "parameters": summary.parameter_counts(opened.config, sizes),
        "tensors": len(opened.tensors),
        "dtypes": dict(Counter(tensor.dtype for tensor in opened.tensors.values())),
        "tokenizer": tokenizer,
    }
    rows = {name.replace("_", " "): value for name, value in fields.items() if name not in ("chosen", "hub") or value}
    if tokenizer["tokens"]:
        rows["tokenizer"] = summary.tokenizer_line(tokenizer["tokens"], opened.config.vocab_size)
    config = {"config": rows.pop("config")}  # long, so last
    return fields, f"{path} is a checkpoint", {"model": summary.model_line(opened.config)} | rows | config


def _engine(path: Path, verify: bool) -> Findings:
    """Read the sidecar of an engine and compare it with the plan by size, with `verify` by hash; the plan is opaque."""
    from lrt_deploy.bundle.engine_sidecar import PLAN, check_plan, read_plan, read_sidecar

    from .build import engine_rows

    plan = path / PLAN if path.is_dir() else path
    sidecar = read_sidecar(plan)
    (read_plan if verify else check_plan)(plan, sidecar)
    line = f"{plan} is a TensorRT engine, {sidecar.precision} for {sidecar.backend}{', intact' if verify else ''}"
    return sidecar.to_dict(), line, engine_rows(sidecar)


def _graph(path: Path, verify: bool) -> Findings:
    """Read inputs, outputs and operators of a graph, and the contract in its metadata; `verify` has no meaning here."""
    import onnx_ir as ir

    proto = _read_graph(path)
    try:
        fields = _graph_fields(path, ir.serde.deserialize_model(proto))
    except (LRTDeployError, MemoryError):
        raise
    except Exception as error:  # of many types, each for another contradiction in a graph
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__} {(str(cause).strip().splitlines() or [''])[0][:200]}".rstrip()
        raise InputError(f"{path} is no valid ONNX graph: {reason}; it is damaged, or contradicts itself") from error
    names = ("opset", "producer", "nodes", "operators", "initializers", "external_files")
    rows: dict[str, Any] = {name: fields[name] for name in names}
    rows["initializers"] = f"{fields['initializers']}, {output.bytes_text(fields['initializer_bytes'])}"
    rows |= {f"{operation} in": counts for operation, counts in fields["computes"].items() if counts}
    for way in ("input", "output"):
        rows |= {f"{way} {value['name']}": f"{value['dtype']} {value['dims']}" for value in fields[f"{way}s"]}
    contract = fields["contract"]
    made = f", the {contract.get('flavour')} flavour" if contract else ", not made by lrt-deploy export"
    return fields, f"{path} is an ONNX graph{made}", rows


def _read_graph(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    data = read_bytes(path, "the graph", InputError, _LARGEST_MESSAGE_BYTES)
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise InputError(f"{path} is not an ONNX graph: {error}; it is damaged or something else") from error
    if not model.graph.node:
        raise InputError(f"{path} is not an ONNX graph: it holds no nodes; it is damaged or something else")
    return model


def _graph_fields(path: Path, model: ir.Model) -> dict[str, Any]:
    """Return the JSON fields of a graph; in `dims` a name stands for a free dimension."""
    from lrt_deploy.exporters.graph.rewrite import dtype_name
    from lrt_deploy.exporters.graph.verify import count

    def described(value: ir.Value) -> dict[str, Any]:
        dims = [dim if isinstance(dim, int) else dim.value or "?" for dim in value.shape or ()]
        return {"name": value.name, "dtype": dtype_name(value.dtype), "dims": dims}

    graph = model.graph
    tensors = [value.const_value for value in graph.initializers.values()]
    places = {getattr(tensor, "location", None) for tensor in tensors}  # None inside the graph
    return {
        "opset": {domain or "ai.onnx": version for domain, version in model.opset_imports.items()},
        "producer": f"{model.producer_name or ''} {model.producer_version or ''}".strip(),
        "inputs": [described(value) for value in graph.inputs],
        "outputs": [described(value) for value in graph.outputs],
        "nodes": len(graph),
        "operators": dict(Counter(node.op_type for node in graph).most_common()),
        "computes": count(graph),
        "initializers": len(tensors),
        "initializer_bytes": sum(tensor.nbytes for tensor in tensors if tensor is not None),
        "external_files": sorted(str(place) for place in places if place is not None),
        "contract": _metadata(path, model, "lrt_deploy.contract"),
        "model": _metadata(path, model, "lrt_deploy.model"),
    }


def _metadata(path: Path, model: ir.Model, name: str) -> dict[str, Any] | None:
    """Return the JSON object in one metadata entry, None if there is none."""
    if name not in model.metadata_props:
        return None
    found = parse_json(model.metadata_props[name], f"the metadata {name} of {path}", InputError)
    if not isinstance(found, dict):
        raise InputError(f"the metadata {name} of {path} is {str(found)[:60]}, expected an object")
    return found
