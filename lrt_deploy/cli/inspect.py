"""`lrt-deploy inspect`: describe a bundle, a checkpoint, a graph found alone, or an engine.

Of a graph found alone: its inputs and outputs, operators and types, and its metadata; its weights stay on disk.
"""

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

    from lrt_deploy.bundle.kinds import Kind
    from lrt_deploy.bundle.manifest import Manifest
    from lrt_deploy.model.checkpoint import Checkpoint

_LARGEST_MESSAGE_BYTES = 2**31 - 1  # protobuf's own limit


def graph_fields(path: Path) -> dict[str, Any]:
    """Return the JSON fields of a graph; InputError for a file that is none."""
    import onnx_ir as ir

    proto = read_graph(path)
    try:
        return model_fields(path, ir.serde.deserialize_model(proto))
    except (LRTDeployError, MemoryError):
        raise
    except Exception as error:  # of many types, each for another contradiction in a graph
        reason = _first_line(error.__cause__ or error)
        raise InputError(f"{path} is no valid ONNX graph: {reason}; it is damaged, or contradicts itself") from error


def read_graph(path: Path) -> onnx.ModelProto:
    """Read a graph without its weights."""
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


def model_fields(path: Path, model: ir.Model) -> dict[str, Any]:
    """Return the JSON fields of a parsed graph."""
    from lrt_deploy.exporters.graph.verify import count

    graph, initializers = model.graph, list(model.graph.initializers.values())
    return {
        "opset": {domain or "ai.onnx": version for domain, version in model.opset_imports.items()},
        "producer": f"{model.producer_name or ''} {model.producer_version or ''}".strip(),
        "inputs": [value_fields(value) for value in graph.inputs],
        "outputs": [value_fields(value) for value in graph.outputs],
        "nodes": len(graph),
        "operators": dict(Counter(node.op_type for node in graph).most_common()),
        "computes": count(graph),
        "initializers": len(initializers),
        "initializer_bytes": sum(value.const_value.nbytes for value in initializers if value.const_value is not None),
        "external_files": sorted({place for value in initializers if (place := location(value.const_value))}),
        "contract": parse_metadata(path, model.metadata_props, "lrt_deploy.contract"),
        "model": parse_metadata(path, model.metadata_props, "lrt_deploy.model"),
    }


def value_fields(value: ir.Value) -> dict[str, Any]:
    """Return name, dtype and dimensions of an input or output; a name stands for a free dimension."""
    from lrt_deploy.exporters.graph.cast import dtype_name

    sizes = [dim if isinstance(dim, int) else dim.value or "?" for dim in value.shape or ()]
    return {"name": value.name, "dtype": dtype_name(value.dtype), "dims": sizes}


def location(tensor: ir.TensorProtocol | None) -> str | None:
    """Return the name of the file that an initializer lies in; None inside the graph."""
    place = getattr(tensor, "location", None)
    return None if place is None else str(place)


def parse_metadata(path: Path, metadata: Mapping[str, str], name: str) -> dict[str, Any] | None:
    """Return the JSON object in one metadata entry, None if there is none."""
    if name not in metadata:
        return None
    found = parse_json(metadata[name], f"the metadata {name} of {path}", InputError)
    if not isinstance(found, dict):
        raise InputError(f"the metadata {name} of {path} is {str(found)[:60]}, expected an object")
    return found


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__} {text.splitlines()[0][:200]}" if text else type(error).__name__


_KNOWN = "a bundle folder, a checkpoint (folder or weights file), a graph (.onnx), or an engine (its folder or .plan)"


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help=f"{_KNOWN[0].upper()}{_KNOWN[1:]}.")],
    verify: Annotated[bool, options.option(options.VERIFY)] = False,
    json: options.Json = False,
) -> None:
    """Tell what a bundle, checkpoint, graph or engine holds."""
    look: dict[Kind, Callable[[Path, bool], Findings]] = {
        "bundle": inspect_bundle,
        "checkpoint": inspect_checkpoint,
        "graph": inspect_graph,
        "plan": inspect_plan,
        "engine": inspect_engine,
    }
    fields, line, rows = look[kind_of(path)](path, verify)
    if json:
        output.document(fields)
    else:
        output.answer(line)
        output.table(rows)


Findings = tuple[dict[str, Any], str, Mapping[str, object]]  # JSON fields, the line for stdout, the table for people


def kind_of(path: Path) -> Kind:
    """Return the kind of thing at a path; InputError for one that cannot be inspected."""
    from lrt_deploy.bundle import kinds

    if not path.exists():
        found = "is a link that leads to nothing" if path.is_symlink() else "does not exist"
        raise InputError(f"{path} {found}; expected {_KNOWN}")
    kind = kinds.kind_of(path)
    if kind is None:
        raise InputError(f"{path} is none of the things that can be inspected; expected {_KNOWN}")
    return kind


def inspect_bundle(path: Path, verify: bool) -> Findings:
    """Read the manifest and check it against its digest; with `verify` every file as well."""
    from lrt_deploy.bundle.manifest import MANIFEST, read_manifest, verify_files

    manifest = read_manifest(path)
    if verify:
        with output.progress(quiet=True) as progress:
            verify_files(path, manifest, force=True, progress=lambda done, total: progress("hashing", done, total))
    rows = (
        summary.bundle_rows(manifest)
        | {"engines": engines_text(path), "files": files_text(manifest)}
        | provenance_rows(manifest)
    )
    fields = json_module.loads((path / MANIFEST).read_bytes())
    return fields, f"{path} is a bundle{', all files intact' if verify else ''}", rows


def engines_text(bundle: Path) -> str:
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


def files_text(manifest: Manifest) -> str:
    """Say how many files of which size the manifest lists."""
    size = sum(record.bytes for record in manifest.files.values())
    return f"{len(manifest.files)}, {output.bytes_text(size)}"


def provenance_rows(manifest: Manifest) -> dict[str, str]:
    """Return rows on the checkpoint and the versions that the bundle was made from."""
    origin = dict(manifest.provenance.get("checkpoint") or {})
    versions = dict(manifest.provenance.get("versions") or {})
    step = "" if origin.get("step") is None else f", step {origin['step']}"
    return {
        "checkpoint": f"{origin.get('file')}{step}, sha256 {str(origin.get('sha256'))[:16]}…",
        "made with": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }


def inspect_checkpoint(path: Path, verify: bool) -> Findings:
    """Read config, tensors and tokenizer of a checkpoint of either layout."""
    from lrt_deploy.model.checkpoint import open_checkpoint

    opened = open_checkpoint(path)
    tokenizer = tokenizer_fields(opened)
    dtypes = Counter(tensor.dtype for tensor in opened.tensors.values())
    fields = {
        "config": opened.config.to_dict(),
        "known_as": opened.known_as,
        "chosen": opened.chosen,
        "step": opened.step,
        "file": str(opened.model_file),
        "sha256": opened.sha256,
        "parameters": checkpoint_parameters(opened),
        "tensors": len(opened.tensors),
        "dtypes": dict(dtypes),
        "tokenizer": tokenizer,
    }
    names = ("known_as", "step", "file", "sha256", "parameters", "tensors", "dtypes", "tokenizer")
    rows = ({"chosen": opened.chosen} if opened.chosen else {}) | {
        name.replace("_", " "): fields[name] for name in names
    }
    if tokenizer["tokens"]:
        rows["tokenizer"] = summary.tokenizer_line(tokenizer["tokens"], opened.config.vocab_size)
    line = summary.model_line(opened.config)
    return fields, f"{path} is a checkpoint", {"model": line} | rows | {"config": fields["config"]}


def checkpoint_parameters(opened: Checkpoint) -> dict[str, int]:
    """Count parameters by kind, as the file holds them; a tensor that the config does not name counts as other."""
    kinds, counts = summary.kinds_of_tensors(opened.config), {"matrices": 0, "tables": 0, "other": 0}
    for name, tensor in opened.tensors.items():
        counts[kinds.get(name, "other")] += tensor.numel()
    return counts


def tokenizer_fields(opened: Checkpoint) -> dict[str, Any]:
    """Return whether export would find a tokenizer, its number of tokens, and the error if it cannot be used."""
    from lrt_deploy.exporters.bundle import find_tokenizer

    try:
        found = find_tokenizer(opened, None)
    except LRTDeployError as error:
        return {"found": True, "tokens": None, "error": str(error)}
    return {"found": found is not None, "tokens": len(found.byte_lengths) if found else None, "error": None}


def inspect_graph(path: Path, verify: bool) -> Findings:
    """Read inputs, outputs and operators of a graph, and the contract in its metadata; `verify` has no meaning here."""
    fields = graph_fields(path)
    names = ("opset", "producer", "nodes", "operators", "initializers", "external_files")
    rows: dict[str, Any] = {name: fields[name] for name in names}
    rows["initializers"] = f"{fields['initializers']}, {output.bytes_text(fields['initializer_bytes'])}"
    rows |= {f"{operation} in": counts for operation, counts in fields["computes"].items() if counts}
    for way in ("input", "output"):
        rows |= {f"{way} {value['name']}": f"{value['dtype']} {value['dims']}" for value in fields[f"{way}s"]}
    contract = fields["contract"]
    made = f", the {contract.get('flavour')} flavour" if contract else ", not made by lrt-deploy export"
    return fields, f"{path} is an ONNX graph{made}", rows


def inspect_engine(path: Path, verify: bool) -> Findings:
    """Read the engine in a folder; see `inspect_plan`."""
    from lrt_deploy.bundle.engine_sidecar import PLAN

    return inspect_plan(path / PLAN, verify)


def inspect_plan(path: Path, verify: bool) -> Findings:
    """Read the sidecar of an engine and compare it with the plan by size, with `verify` by hash; the plan is opaque."""
    from lrt_deploy.bundle.engine_sidecar import check_plan, read_plan, read_sidecar

    from .build import engine_rows

    sidecar = read_sidecar(path)
    (read_plan if verify else check_plan)(path, sidecar)
    line = f"{path} is a TensorRT engine, {sidecar.precision} for {sidecar.backend}{', intact' if verify else ''}"
    return sidecar.to_dict(), line, engine_rows(sidecar)
