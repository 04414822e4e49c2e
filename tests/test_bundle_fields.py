"""A bundle with recomputed hashes: what its manifest, sidecars and graphs may say, and what is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from typing import Any, Literal

import msgspec
import onnx
import pytest

import lrt_deploy
from lrt_deploy.bundle.engine_sidecar import (
    PLAN,
    EngineSidecar,
    Profile,
    engine_folder,
    read_plan,
    read_sidecar,
    sidecar_path,
)
from lrt_deploy.bundle.graph_file import check_graph_file
from lrt_deploy.bundle.manifest import DIGEST, MANIFEST, FileRecord, read_manifest
from lrt_deploy.errors import BackendError, BundleError, EngineError
from lrt_deploy.fields import Whole, convert, shown

NAME = "gate32"
FILE = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
DETAILS = "precision_details"


@pytest.fixture
def bundle(export_once, tmp_path):
    """A copy that the test may damage."""
    return shutil.copytree(export_once(NAME), tmp_path / "bundle")


def rewrite(folder, **changes):
    """Change the manifest and give it a digest that fits; `...` removes a field."""
    fields = json.loads((folder / MANIFEST).read_text()) | changes
    text = json.dumps({key: value for key, value in fields.items() if value is not ...}).encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / DIGEST).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n")


# Values


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    count: Whole
    share: float = 0.5


class Outer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    inner: Inner
    sizes: tuple[int, int]
    more: tuple[Inner, ...] = ()
    kind: Literal["a", "b"] = "a"
    maybe: int | None = None
    named: dict[str, Inner] = {}
    anything: Any = None


def test_json_values_become_what_the_class_declares():
    value = {"name": "n", "inner": {"count": 2, "share": 1}, "sizes": [3, 4], "more": [{"count": 5}], "kind": "b"}
    value |= {"named": {"x": {"count": 6}}, "anything": [None, {}]}
    expected = Outer("n", Inner(2, 1.0), (3, 4), (Inner(5),), "b", None, {"x": Inner(6)}, [None, {}])
    assert convert(Outer, value) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "name is 1, expected text"),
        ({"name": ...}, "name is missing"),
        ({"inner": []}, r"inner is \[\], expected an object"),
        ({"inner": {"count": True}}, "inner.count is True, expected a whole number"),
        ({"inner": {"count": 2.0}}, "inner.count is 2.0, expected a whole number"),
        (
            {"inner": {"count": 2**63}},
            "inner.count is a number of 64 bits, expected a whole number <= 9223372036854775807",
        ),
        ({"inner": {"count": 1, "share": "x"}}, "inner.share is 'x', expected a number"),
        ({"sizes": [1]}, r"sizes is \[1\], expected an array of length 2"),
        ({"sizes": "12"}, "sizes is '12', expected an array"),
        ({"more": [{"count": 1}, {}]}, r"more\[1\].count is missing"),
        ({"more": [[]] * 1000}, r"more\[0\] is \[\], expected an object"),
        ({"kind": "c"}, "kind is 'c', expected one of 'a', 'b'"),
        ({"kind": ["a"]}, r"kind is \['a'\], expected text"),
        ({"maybe": "x"}, "maybe is 'x', expected a whole number"),
        ({"named": {"x": 1}}, "named.x is 1, expected an object"),
        ({"colour": 1}, "colour is not a known field"),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_named(change, message):
    value = {"name": "n", "inner": {"count": 1}, "sizes": [1, 2]} | change
    with pytest.raises(ValueError, match=f"^{message}"):
        convert(Outer, {key: item for key, item in value.items() if item is not ...})


def test_values_are_shown_short_whatever_they_are():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    values = [10**5000, [0] * 10**6, "x" * 10**6, {"a": "b" * 10**6}, [10**5000], Broken(), None, b"x" * 100]
    assert all(0 < len(shown(value)) < 80 for value in values)
    with pytest.raises(ValueError, match=r"^x is a str of length 1000000, expected a whole number"):
        convert(int, "x" * 10**6, "x")


# The manifest


@pytest.mark.parametrize(
    "changes",
    [
        {"precisions": ["fp32", "fp32"]},
        {"precisions": "fp32"},
        {"precisions": [["fp32"]]},
        {"precisions": {"fp32": 1}},
        {"prefill_policies": 3},
        {"prefill_policies": [None]},
        {"contracts": []},
        {"contracts": {"fp32": []}},
        {"contracts": None},
        {DETAILS: {"fp32": [1]}},
        {DETAILS: {"fp32": {"keep_high": "gate"}}},
        {DETAILS: {"fp32": {"keep_high": [1]}}},
        {DETAILS: {"fp32": {"bits": "8"}}},
        {DETAILS: {"fp32": {"block": 0}}},
        {"provenance": []},
        {"provenance": {"versions": 5}},
        {"provenance": {"checkpoint": "x"}},
        {"tables": []},
        {"tables": {"fp32": []}},
        {"tables": {"int8": {}}},
        {"max_seq_len": True},
        {"max_seq_len": 64.0},
        {"max_seq_len": 10**30},
        {"max_seq_len": 0},
        {"max_batch_size": -1},
        {"model": {"n_layer": [1]}},
        {"model": None},
        {"tokenizer_tokens": False},
        {"format_version": [2]},
        {"files": {"graphs/fp32/weights.bin": {"bytes": 1}}},
    ],
    ids=str,
)
def test_a_manifest_with_a_field_of_another_type_is_refused_by_that_field(bundle, changes):
    rewrite(bundle, **changes)
    with pytest.raises(BundleError) as caught:
        lrt_deploy.open_decoder(bundle)
    message = str(caught.value)
    assert "export" in message and len(message) < 600
    (field,) = changes
    assert field.removeprefix("model").replace("format_version", "bundle format") in message


@pytest.mark.parametrize(
    "record",
    [
        {"bytes": 1},
        FILE | {"bytes": "1"},
        FILE | {"bytes": -1},
        FILE | {"bytes": True},
        FILE | {"bytes": 2**64},
        FILE | {"sha256": ["0" * 64]},
        FILE | {"sha256": "0" * 63},
        FILE | {"mode": 7},
        [1, "0" * 64],
        None,
    ],
    ids=str,
)
def test_a_file_record_that_is_none_is_refused_by_its_name(bundle, record):
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    rewrite(bundle, files=files | {"graphs/fp32/weights.bin": record})
    with pytest.raises(BundleError, match=r"files\..*weights\.bin"):
        lrt_deploy.open_decoder(bundle)


@pytest.mark.parametrize(
    "name",
    [
        "a/../../secret",
        "..",
        "",
        "/",
        "a//b",
        "./a",
        "a/.",
        "a\\b",
        "..\\secret",
        "C:secret",
        "C:\\x",
        "a\0b",
        "/etc/x",
    ],
)
def test_a_name_that_is_no_plain_relative_path_is_refused(bundle, name):
    (bundle.parent / "secret").write_bytes(b"x")
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    rewrite(bundle, files=files | {name: FILE})
    with pytest.raises(BundleError, match="outside the bundle"):
        lrt_deploy.open_decoder(bundle)


@pytest.mark.parametrize("name", [MANIFEST, DIGEST, "graphs/fp32/weights.bin", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("kind", ["fifo", "endless", "loop", "folder", "link to a fifo"])
def test_what_is_no_regular_file_is_refused_at_once_by_name(bundle, name, kind):
    path, other = bundle / name, bundle / "other"
    path.unlink()
    put_special(path, other, kind)
    with pytest.raises(BundleError) as caught:
        lrt_deploy.open_decoder(bundle)
    assert path.name in str(caught.value)


def put_special(path, other, kind):
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to a fifo":
        os.mkfifo(other)
        path.symlink_to(other)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "endless" else path)


@pytest.mark.parametrize("name", [MANIFEST, DIGEST])
def test_a_manifest_that_is_far_too_large_is_not_read(bundle, name):
    with (bundle / name).open("ab") as file:
        file.truncate(2**33)
    with pytest.raises(BundleError, match=r"has 8589934592 bytes; at most \d+ are accepted"):
        lrt_deploy.open_decoder(bundle)


@pytest.mark.parametrize("text", ['{"a":' * 10**5, '{"format_version": ' + "9" * 5000 + "}", '{"max_seq_len": NaN}'])
def test_json_that_python_cannot_read_is_refused(bundle, text):
    (bundle / MANIFEST).write_text(text)
    (bundle / DIGEST).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  {MANIFEST}\n")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        lrt_deploy.open_decoder(bundle)


# Sidecars of engines


@pytest.fixture
def plan(tmp_path):
    """A plan, which is any file, and a sidecar that fits it."""
    path = engine_folder(tmp_path, "tensorrt-rtx", "fp32") / PLAN
    path.parent.mkdir(parents=True)
    path.write_bytes(b"a plan")
    tensor = {"name": "logits", "dtype": "float32", "shape": ["batch", 1, 64]}
    pair = {"past": "past_key_0", "present": "present_key_0", "in_place": True}
    sidecar = EngineSidecar(
        backend="tensorrt-rtx",
        precision="fp32",
        plan_sha256=hashlib.sha256(b"a plan").hexdigest(),
        plan_bytes=6,
        onnx="graphs/fp32/prefill.onnx",
        onnx_sha256="0" * 64,
        weights_sha256="0" * 64,
        tensorrt_version="1.7",
        compute_capabilities=("8.0+", "12.1"),
        profiles=(Profile("decode", (1, 1, 4), (1, 1, 1)), Profile("prefill", (1, 1, 1), (1, 8, 16))),
        flags=(),
        capacity=128,
        max_seq_len=100,
        max_batch_size=4,
        inputs=(tensor,),
        outputs=(tensor,),
        state=(pair,),
        layers={},
        build={},
    )
    lrt_deploy.bundle.engine_sidecar.write_sidecar(path, sidecar)
    assert read_sidecar(path) == sidecar and read_plan(path, sidecar) == b"a plan"
    return path


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"plan_bytes": "6"}, "plan_bytes is '6', expected a whole number"),
        ({"plan_bytes": True}, "plan_bytes"),
        ({"plan_bytes": -1}, "plan_bytes"),
        ({"profiles": {}}, "profiles"),
        ({"profiles": [1]}, r"profiles\[0\] is 1, expected an object"),
        ({"profiles": [{"name": "decode", "batch": [1, 1], "tokens": [1, 1, 1]}]}, r"profiles\[0\].batch"),
        ({"profiles": [{"name": "decode", "batch": [2, 1, 1], "tokens": [1, 1, 1]}]}, "spans 2, 1, 1"),
        ({"profiles": [{"name": "decode", "batch": [1, 1, 1.5], "tokens": [1, 1, 1]}]}, r"batch\[2\] is 1.5"),
        ({"compute_capabilities": "8.0"}, "compute_capabilities"),
        ({"compute_capabilities": ["new"]}, r"compute_capabilities\[0\] is 'new'"),
        ({"compute_capabilities": [8.0]}, r"compute_capabilities\[0\]"),
        ({"inputs": [1]}, r"inputs\[0\] is 1"),
        ({"inputs": [{"name": 1}]}, r"inputs\[0\].name is 1"),
        ({"outputs": [{"name": "logits", "dtype": "float32", "shape": "x"}]}, r"outputs\[0\].shape"),
        ({"state": [{"past": "a"}]}, r"state\[0\].present is missing"),
        ({"capacity": 99}, "capacity is 99, less than max_seq_len"),
        ({"layers": []}, "layers"),
        ({"flags": [1]}, r"flags\[0\]"),
        ({"max_batch_size": 2**70}, "max_batch_size"),
        ({"colour": 1}, "colour is not a known field"),
        ({"onnx": ...}, "onnx is missing"),
        ({"format_version": 2}, "not a sidecar of format 1"),
        ({"format_version": [1]}, "not a sidecar of format 1"),
    ],
    ids=str,
)
def test_a_sidecar_with_a_field_of_another_type_is_refused_by_that_field(plan, change, named):
    fields = json.loads(sidecar_path(plan).read_text()) | change
    sidecar_path(plan).write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))
    with pytest.raises(EngineError, match=rf"lrt\.plan\.json.*{named}.*build the engine again"):
        read_sidecar(plan)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 10**5, '{"plan_bytes": ' + "9" * 5000 + "}", "\udcff"])
def test_a_sidecar_that_is_no_json_object_is_refused(plan, text):
    sidecar_path(plan).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(EngineError, match=r"lrt\.plan\.json"):
        read_sidecar(plan)


@pytest.mark.parametrize("kind", ["fifo", "endless", "loop", "folder", "link to a fifo"])
def test_a_plan_or_sidecar_that_is_no_regular_file_is_refused_at_once(plan, kind):
    sidecar = read_sidecar(plan)
    plan.unlink()
    put_special(plan, plan.with_name("other"), kind)
    with pytest.raises(EngineError, match=r"lrt\.plan"):
        read_plan(plan, sidecar)
    sidecar_path(plan).unlink()
    put_special(sidecar_path(plan), plan.with_name("another"), kind)
    with pytest.raises(EngineError, match=r"lrt\.plan\.json"):
        read_sidecar(plan)


def test_a_plan_that_is_another_one_is_refused(plan):
    sidecar = read_sidecar(plan)
    plan.write_bytes(b"b plan")
    with pytest.raises(EngineError, match="does not match its sidecar's SHA-256"):
        read_plan(plan, sidecar)
    plan.write_bytes(b"a longer plan")
    with pytest.raises(EngineError, match="has 13 bytes, its sidecar says 6"):
        read_plan(plan, sidecar)


def test_the_manifest_of_an_export_is_read_as_it_was_written(export_once):
    manifest = read_manifest(export_once(NAME))
    assert json.loads((export_once(NAME) / MANIFEST).read_text()) == json.loads(manifest.to_json())


# Graphs


def put_graph(folder, name, data):
    """Write a graph, and let the manifest have its hash and size."""
    (folder / name).write_bytes(data)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(folder, files=files)


WINDOWED = "graphs/fp32/prefill.windowed.onnx"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("graphs/fp32/prefill.onnx", "it has no input window_start_"),
        (
            "graphs/fp32/decode_step.windowed.onnx",
            r"its input input_ids is int64 \(batch, 1\), expected int64",
        ),
        ("graphs/fp32/decode_step.onnx", "and"),
    ],
)
def test_another_graph_of_the_bundle_under_the_right_name_is_refused(bundle, other, message):
    put_graph(bundle, WINDOWED, (bundle / other).read_bytes())
    with pytest.raises(BundleError, match=rf"prefill\.windowed\.onnx is not the windowed graph in fp32 .*{message}"):
        lrt_deploy.open_decoder(bundle)


def test_the_graph_of_another_model_is_refused(bundle, export_once):
    for name in ("graphs/fp32/weights.bin", WINDOWED):
        put_graph(bundle, name, (export_once("padded_vocab") / name).read_bytes())
    with pytest.raises(BundleError, match=r"is not the windowed graph in fp32 of the model .*expected"):
        lrt_deploy.open_decoder(bundle)


def changed(bundle, change):
    """The windowed graph after `change`."""
    model = onnx.load(bundle / WINDOWED, load_external_data=False)
    change(model)
    return model.SerializeToString()


def set_place(model, **entries):
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    for entry in tensor.external_data:
        entry.value = entries.get(entry.key, entry.value)


def set_metadata(model, key, value):
    next(entry for entry in model.metadata_props if entry.key == key).value = value


def add_loop(model):
    body = onnx.helper.make_graph([], "body", [], [])
    model.graph.node.append(onnx.helper.make_node("Loop", ["n", "c"], ["x"], body=body))


def add_constant(model):
    tensor = onnx.helper.make_tensor("t", onnx.TensorProto.FLOAT, [1], [1.0])
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["x"], value=tensor))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: set_place(m, location="../../secret"), r"lies in '\.\./\.\./secret', expected weights\.bin"),
        (lambda m: set_place(m, location="/etc/passwd"), r"lies in '/etc/passwd', expected weights\.bin"),
        (lambda m: set_place(m, location="decode_step.onnx"), r"lies in 'decode_step\.onnx', expected weights\.bin"),
        (lambda m: set_place(m, location=""), "lies in '', expected"),
        (lambda m: set_place(m, offset="-4096"), "the offset of .* is '-4096', expected a number of bytes"),
        (lambda m: set_place(m, offset=str(2**40)), "lies at bytes 1099511627776 to .*, which has"),
        (lambda m: set_place(m, offset="9" * 5000), "the offset of .* is a str of length 5000"),
        (lambda m: set_place(m, length="8"), "has 8 bytes, which is not what its type and shape"),
        (lambda m: set_place(m, length="x"), "the length of .* is 'x', expected a number of bytes"),
        (lambda m: m.graph.initializer.add(name="w", data_type=1, dims=[2], data_location=1), "'w' lies in None"),
        (lambda m: m.graph.sparse_initializer.add(), "it holds sparse weights"),
        (lambda m: m.functions.add(name="f", domain="x"), "it holds functions"),
        (lambda m: m.graph.node.add(op_type="Add", domain="evil"), "a node is of the domain 'evil'"),
        (add_loop, "a node holds a graph"),
        (add_constant, "a node holds a tensor"),
        (lambda m: m.ClearField("graph"), "it holds 0 graphs"),
        (lambda m: set_metadata(m, "lrt_deploy.precision", "int8"), "its metadata say that the precision is 'int8'"),
        (lambda m: set_metadata(m, "lrt_deploy.model", "{}"), "do not say what model it is of"),
        (lambda m: set_metadata(m, "lrt_deploy.model", "[" * 10**5), "do not say what model it is of"),
        (lambda m: m.ClearField("metadata_props"), "say that the precision is None"),
        (lambda m: m.graph.input[1].CopyFrom(m.graph.input[0]), ""),
    ],
    ids=range(21),
)
def test_a_graph_that_is_no_graph_of_this_bundle_is_refused_with_the_reason(bundle, change, message):
    put_graph(bundle, WINDOWED, changed(bundle, change))
    with pytest.raises((BundleError, BackendError), match=rf"prefill\.windowed\.onnx.*{message}") as caught:
        lrt_deploy.open_decoder(bundle)
    assert isinstance(caught.value, BundleError) or not message


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"\x08" * 1000, b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 50])
def test_what_is_no_protobuf_message_is_refused(bundle, data):
    put_graph(bundle, WINDOWED, data)
    with pytest.raises(BundleError, match=r"windowed\.onnx is no graph of a bundle: it (is no protobuf|holds 0)"):
        lrt_deploy.open_decoder(bundle)


def test_all_graphs_of_an_export_pass(in_every_precision):
    folder = in_every_precision("demo")
    graphs = sorted(folder.rglob("*.onnx"))
    assert len(graphs) == 24
    for graph in graphs:
        check_graph_file(graph, graph.with_name("weights.bin"))


def test_text_that_is_no_unicode_is_refused_with_the_field():
    with pytest.raises(ValueError, match=r"provenance holds text that is no Unicode: '\\ud800'"):
        convert(FileRecord, {"\ud800": 1}, "provenance")
