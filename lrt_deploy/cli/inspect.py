"""`lrt-deploy inspect`: what a path is and what it holds: a bundle, a checkpoint, a graph found alone, an engine.

Of a graph found alone: its inputs and outputs, what it computes with, and its metadata; its weights stay on disk.
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

from . import facts, options, output
from .export import summary

if TYPE_CHECKING:
    import onnx

    from lrt_deploy.bundle.kinds import Kind
    from lrt_deploy.bundle.manifest import Manifest
    from lrt_deploy.model.checkpoint import Checkpoint

_LARGEST_MESSAGE_BYTES = 2**31 - 1  # protobuf's own limit


def graph_fields(path: Path) -> dict[str, Any]:
    """The JSON fields of a graph; InputError for a file that is none."""
    model = load_graph(path)
    graph = model.graph
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return {
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": [value_fields(value) for value in graph.input],
        "outputs": [value_fields(value) for value in graph.output],
        "nodes": len(graph.node),
        "operators": dict(Counter(node.op_type for node in graph.node).most_common()),
        "computes": computes(path, model),
        "initializers": len(graph.initializer),
        "initializer_bytes": sum(tensor_bytes(tensor) for tensor in graph.initializer),
        "external_files": sorted(
            {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
        ),
        "contract": parse_metadata(path, metadata, "lrt_deploy.contract"),
        "model": parse_metadata(path, metadata, "lrt_deploy.model"),
    }


def computes(path: Path, model: onnx.ModelProto) -> dict[str, dict[str, int]]:
    """How many products, attentions and cache writes run in which type, counted as an export counts them."""
    import onnx_ir as ir

    from lrt_deploy.exporters.graph.verify import count

    try:
        return count(ir.serde.deserialize_model(model).graph)
    except Exception as error:  # of many types, each for another contradiction in a graph
        reason = _first_line(error.__cause__ or error)
        raise InputError(f"{path} is no valid ONNX graph: {reason}; it is damaged, or contradicts itself") from error


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph without its weights."""
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


def value_fields(value: onnx.ValueInfoProto) -> dict[str, Any]:
    """Name, dtype and dimensions of an input or output; a name stands for a free dimension."""
    tensor = value.type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim]
    return {"name": value.name, "dtype": dtype_of(tensor.elem_type)[0], "dims": dims}


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Size of an initializer, wherever it is stored."""
    count = 1
    for size in tensor.dims:
        count *= int(size)
    return count * dtype_of(tensor.data_type)[1] // 8


def dtype_of(data_type: int) -> tuple[str, int]:
    """Name and bits of one of ONNX's element types; a number that ONNX does not know has neither."""
    import onnx

    known = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    name = known.get(data_type, f"unknown type {data_type}")
    name = {"float": "float32", "double": "float64"}.get(name, name)
    bits = 8 if name == "bool" else next((n for n in (64, 32, 16, 8, 4, 2) if str(n) in name), 0)
    return name, bits if data_type in known else 0


def parse_metadata(path: Path, metadata: Mapping[str, str], name: str) -> dict[str, Any] | None:
    """The JSON object in one metadata entry, None if there is none."""
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
    verify: options.Verify = False,
    json: options.Json = False,
    debug: options.Debug = False,
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


Findings = tuple[dict[str, Any], str, dict[str, str]]  # JSON fields, the line for stdout, the table for people


def kind_of(path: Path) -> Kind:
    """What lies at a path; InputError for what cannot be inspected."""
    from lrt_deploy.bundle import kinds

    if not path.exists():
        found = "is a link that leads to nothing" if path.is_symlink() else "does not exist"
        raise InputError(f"{path} {found}; expected {_KNOWN}")
    kind = kinds.kind_of(path)
    if kind is None:
        raise InputError(f"{path} is none of the things that can be inspected; expected {_KNOWN}")
    return kind


def inspect_bundle(path: Path, verify: bool) -> Findings:
    """The manifest, checked against its digest; with `verify` every file as well."""
    from lrt_deploy.bundle.manifest import MANIFEST, read_manifest, verify_files

    manifest = read_manifest(path)
    if verify:
        with output.progress(quiet=True) as progress:
            verify_files(path, manifest, force=True, progress=lambda done, total: progress("hashing", done, total))
    rows = (
        summary(manifest) | {"engines": engines_text(path), "files": files_text(manifest)} | provenance_rows(manifest)
    )
    fields = json_module.loads((path / MANIFEST).read_bytes())
    return fields, f"{path} is a bundle{', all files intact' if verify else ''}", rows


def engines_text(bundle: Path) -> str:
    """The engines beside the graphs, by name; a damaged one is named as such."""
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
    """How many files of what size the manifest lists."""
    size = sum(record.bytes for record in manifest.files.values())
    return f"{len(manifest.files)}, {output.bytes_text(size)}"


def provenance_rows(manifest: Manifest) -> dict[str, str]:
    """Where the bundle comes from."""
    origin = dict(manifest.provenance.get("checkpoint") or {})
    versions = dict(manifest.provenance.get("versions") or {})
    step = "" if origin.get("step") is None else f", step {origin['step']}"
    return {
        "checkpoint": f"{origin.get('file')}{step}, sha256 {str(origin.get('sha256'))[:16]}…",
        "made with": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }


def inspect_checkpoint(path: Path, verify: bool) -> Findings:
    """Config, tensors and tokenizer of a checkpoint of either layout."""
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
        name.replace("_", " "): cell(fields[name]) for name in names
    }
    if tokenizer["tokens"]:
        rows["tokenizer"] = facts.tokenizer_line(tokenizer["tokens"], opened.config.vocab_size)
    line = facts.model_line(opened.config)
    return fields, f"{path} is a checkpoint", {"model": line} | rows | {"config": cell(fields["config"])}


def checkpoint_parameters(opened: Checkpoint) -> dict[str, int]:
    """Parameters by kind, as the file holds them; a tensor that the config has no place for counts as other."""
    kinds, counts = facts.kinds_of_tensors(opened.config), {"matrices": 0, "tables": 0, "other": 0}
    for name, tensor in opened.tensors.items():
        counts[kinds.get(name, "other")] += tensor.numel()
    return counts


def tokenizer_fields(opened: Checkpoint) -> dict[str, Any]:
    """Whether export would find a tokenizer, how many tokens it has, and what is wrong with it if it cannot be used."""
    from lrt_deploy.exporters.bundle import find_tokenizer

    try:
        found = find_tokenizer(opened, None)
    except LRTDeployError as error:
        return {"found": True, "tokens": None, "error": str(error)}
    return {"found": found is not None, "tokens": len(found.byte_lengths) if found else None, "error": None}


def inspect_graph(path: Path, verify: bool) -> Findings:
    """Inputs, outputs and operators of a graph, and the contract that ours carry; there is nothing to verify it by."""
    fields = graph_fields(path)
    names = ("opset", "producer", "nodes", "operators", "initializers", "external_files")
    rows = {name: cell(fields[name]) for name in names}
    rows["initializers"] += f", {output.bytes_text(fields['initializer_bytes'])}"
    rows |= {f"{operation} in": cell(counts) for operation, counts in fields["computes"].items() if counts}
    for way in ("input", "output"):
        rows |= {f"{way} {value['name']}": f"{value['dtype']} {value['dims']}" for value in fields[f"{way}s"]}
    contract = fields["contract"]
    made = f", the {cell(contract.get('flavour'))} flavour" if contract else ", not made by lrt-deploy export"
    return fields, f"{path} is an ONNX graph{made}", rows


def inspect_engine(path: Path, verify: bool) -> Findings:
    """The engine in a folder of its own; see `inspect_plan`."""
    from lrt_deploy.bundle.engine_sidecar import PLAN

    return inspect_plan(path / PLAN, verify)


def inspect_plan(path: Path, verify: bool) -> Findings:
    """The sidecar of an engine, held against the plan by size, and with `verify` by hash; the plan itself is opaque."""
    from lrt_deploy.bundle.engine_sidecar import check_plan, read_plan, read_sidecar

    from .build import engine_rows

    sidecar = read_sidecar(path)
    (read_plan if verify else check_plan)(path, sidecar)
    line = f"{path} is a TensorRT engine, {sidecar.precision} for {sidecar.backend}{', intact' if verify else ''}"
    return sidecar.to_dict(), line, engine_rows(sidecar)


def cell(value: object) -> str:
    """A JSON value in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
