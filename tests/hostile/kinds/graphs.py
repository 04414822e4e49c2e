"""ONNX graphs of a bundle, changed as protocol buffers and in meaning, with hashes made to fit; and graphs alone."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np

from hostile.mutate import INTEGERS, damage
from hostile.originals import Originals, decoded
from hostile.reference import windowed_graph_numbers
from hostile.trial import EQUAL, OTHER, WRONG, Trial, command

from .bundles import NAMES, linked, put, seal

PATHS = (
    "prefill.windowed.onnx",
    "prefill.windowed.onnx",
    "prefill.windowed.onnx",
    "prefill.windowed.onnx",
    "prefill.onnx",
    "decode_step.onnx",
    "decode_step.windowed.onnx",
)


def graphs(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """A changed graph in a bundle whose hashes fit."""
    name = rng.choice(("bundle", "bundle", "hosted", "narrow"))
    precision = rng.choice(("int8", "int4-weight-only")) if name == "narrow" else "fp32"
    bundle = linked(originals.folder / name, place / "bundle")
    file = f"graphs/{precision}/{rng.choice(PATHS)}"
    kind = rng.choices(("nodes", "io", "initializers", "model", "bombs", "bytes", "swap"), (24, 18, 22, 12, 10, 11, 3))[
        0
    ]
    data, what = changed_graph(rng, kind, originals, name, file)
    put(bundle / file, data)
    seal(bundle, originals.bytes_of(f"{name}/manifest.json").decode())
    alone = rng.random() < 0.12
    return Trial(
        what=f"{name} {file} {kind}: {what}",
        parses=is_graph(data),
        act=lambda: inspected(bundle / file) if alone else opened(bundle, name, precision, file, originals),
        names=NAMES,
    )


def changed_graph(rng: random.Random, kind: str, originals: Originals, name: str, file: str) -> tuple[bytes, str]:
    """The bytes of a graph that was changed in one of many ways."""
    data = originals.bytes_of(f"{name}/{file}")
    if kind == "bytes":
        return damage(rng, data)
    if kind == "swap":
        others = [f"bundle/graphs/fp32/{p}" for p in set(PATHS)] + [f"narrow/graphs/int8/{p}" for p in set(PATHS)]
        other = rng.choice(sorted(others) + [f"hosted/graphs/fp32/{p}" for p in sorted(set(PATHS))])
        return originals.bytes_of(other), f"the graph {other}"
    import onnx

    model = onnx.ModelProto.FromString(data)
    change = {
        "nodes": changed_nodes,
        "io": changed_io,
        "initializers": changed_initializers,
        "model": changed_model,
        "bombs": bombs,
    }[kind]
    said = [change(rng, model, onnx) for _ in range(rng.choice((1, 1, 2)))]
    return model.SerializeToString(), "; ".join(said)


def changed_nodes(rng, model, onnx) -> str:
    """Operators, their inputs, outputs, attributes and order."""
    nodes = model.graph.node
    if not nodes:
        return "no nodes"
    index = rng.randrange(len(nodes))
    node = nodes[index]
    kind = rng.choice(
        ["op", "domain", "drop", "double", "order", "input", "output", "attribute", "drop_attribute", "type", "extra"]
    )
    if kind == "op":
        node.op_type = rng.choice(
            (
                "Identity",
                "Add",
                "Mul",
                "Sub",
                "Div",
                "Relu",
                "Neg",
                "MatMul",
                "Loop",
                "If",
                "Scan",
                "NoSuchOp",
                "",
                "Cast",
                "Transpose",
                "Exp",
                "Abs",
            )
        )
    elif kind == "domain":
        node.domain = rng.choice(("", "com.microsoft", "ai.onnx.ml", "x", "com.microsoft.nchwc"))
    elif kind == "drop":
        del nodes[index]
    elif kind == "double":
        nodes.add().CopyFrom(node)
    elif kind == "order":
        kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
        rng.shuffle(kept)
        del nodes[:]
        nodes.extend(kept)
    elif kind == "input" and node.input:
        names = (
            [n for other in nodes for n in other.output] + [i.name for i in model.graph.initializer] + ["", "nothing"]
        )
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif kind == "output" and node.output:
        node.output[0] = rng.choice(("", "nothing", nodes[rng.randrange(len(nodes))].output[0]))
    elif kind in ("attribute", "type") and node.attribute:
        attribute = rng.choice(node.attribute)
        if kind == "type":
            attribute.type = rng.randrange(14)
        elif attribute.type == 2:
            attribute.i = rng.choice([n for n in INTEGERS if -(2**63) <= n < 2**63])
        elif attribute.type == 1:
            attribute.f = rng.choice((0.0, -1.0, 1e30, float("nan"), 0.5))
        else:
            attribute.s = rng.choice((b"", b"x", b"linear"))
            attribute.ints.extend([1, 2**62])
    elif kind == "drop_attribute" and node.attribute:
        node.attribute.pop()
    elif kind == "extra":
        extra = nodes.add(op_type=rng.choice(("Identity", "Shape", "RandomNormalLike")), name="extra")
        extra.input.append(node.output[0])
        extra.output.append("extra_out")
    return f"{kind} of {node.op_type} {index}"


def changed_io(rng, model, onnx) -> str:
    """Names, types and shapes of inputs and outputs."""
    values = rng.choice((model.graph.input, model.graph.output))
    if not values:
        return "no values"
    index = rng.randrange(len(values))
    value = values[index]
    tensor = value.type.tensor_type
    kind = rng.choice(["name", "type", "dim", "param", "drop", "rank", "double", "order", "optional"])
    if kind == "name":
        value.name = rng.choice((value.name + "_", "", "logits", "input_ids", "past_key_0"))
    elif kind == "type":
        tensor.elem_type = rng.choice((0, 1, 2, 7, 10, 11, 16, 8, 99))
    elif kind == "dim" and tensor.shape.dim:
        rng.choice(tensor.shape.dim).dim_value = rng.choice((0, 1, 2, 3, 16, 31, 64, 2**40, -1))
    elif kind == "param" and tensor.shape.dim:
        rng.choice(tensor.shape.dim).dim_param = rng.choice(("batch", "tokens", "capacity", "zz", ""))
    elif kind == "drop":
        del values[index]
    elif kind == "rank":
        tensor.shape.dim.add().dim_value = rng.choice((1, 5))
    elif kind == "double":
        values.add().CopyFrom(value)
    elif kind == "order":
        kept = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in values]
        rng.shuffle(kept)
        del values[:]
        values.extend(kept)
    elif kind == "optional":
        value.type.optional_type.elem_type.tensor_type.elem_type = 1
    return f"{kind} of {value.name}"


def changed_initializers(rng, model, onnx) -> str:
    """Shapes, types, content and places of constants."""
    initializers = model.graph.initializer
    if not initializers:
        return "no initializers"
    external = [t for t in initializers if t.external_data]
    tensor = rng.choice(external) if external and rng.random() < 0.7 else rng.choice(initializers)
    kind = rng.choice(
        ["location", "offset", "length", "key", "dims", "dims", "type", "raw", "name", "drop", "double", "values"]
    )
    entries = {entry.key: entry for entry in tensor.external_data}
    if kind in ("location", "offset", "length") and kind in entries:
        number = entries[kind].value
        entries[kind].value = {
            "location": rng.choice(
                (
                    "../weights.bin",
                    "/etc/passwd",
                    "../../../manifest.json",
                    "tables.bin",
                    "prefill.onnx",
                    "",
                    "weights.bin/",
                    "/dev/zero",
                    "./weights.bin",
                    "x\0y",
                    "*/_ORT_MEM_ADDR_/*",
                )
            ),
            "offset": rng.choice(
                (
                    str(int(number or 0) + rng.choice((1, 4, 64, 4096)) if number.isdigit() else 0),
                    "-1",
                    "x",
                    "0",
                    str(2**63),
                    str(10**30),
                    "1e3",
                    "",
                )
            ),
            "length": rng.choice(
                (
                    str(int(number or 0) + rng.choice((-4, 4, 4096)) if number.isdigit() else 0),
                    "0",
                    "-1",
                    "x",
                    str(2**62),
                    "",
                )
            ),
        }[kind]
    elif kind == "key" and tensor.external_data:
        rng.choice(tensor.external_data).key = rng.choice(("location", "offset", "x", ""))
    elif kind == "dims":
        if tensor.dims:
            at = rng.randrange(len(tensor.dims))
            tensor.dims[at] = rng.choice(
                (tensor.dims[at] + 1, tensor.dims[at] * 2, tensor.dims[at] // 2, 0, -1, 2**40, 2**62)
            )
        else:
            tensor.dims.append(rng.choice((0, 1, 2, 2**40)))
    elif kind == "type":
        tensor.data_type = rng.choice((0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 16, 21, 22, 99))
    elif kind == "raw":
        tensor.raw_data = rng.choice(
            (b"", rng.randbytes(7), tensor.raw_data * 2, tensor.raw_data[:-1], bytes(len(tensor.raw_data)))
        )
    elif kind == "name":
        tensor.name = rng.choice((tensor.name + "_", "", rng.choice(initializers).name, "input_ids"))
    elif kind == "drop":
        initializers.remove(tensor)
    elif kind == "double":
        initializers.add().CopyFrom(tensor)
    elif kind == "values" and tensor.raw_data:
        tensor.raw_data = damage(rng, tensor.raw_data)[0]
    return f"{kind} of {tensor.name}"


def changed_model(rng, model, onnx) -> str:
    """Versions, metadata, functions, names."""
    kind = rng.choice(["opset", "ir", "domain", "metadata", "contract", "function", "doc", "name", "sparse", "quant"])
    if kind == "opset" and model.opset_import:
        rng.choice(model.opset_import).version = rng.choice((0, 1, 13, 23, 25, 99, -1, 2**31 - 1))
    elif kind == "ir":
        model.ir_version = rng.choice((0, 3, 9, 14, 99, -1, 2**40))
    elif kind == "domain":
        model.opset_import.add(domain=rng.choice(("", "x", "com.microsoft")), version=rng.choice((1, 99)))
    elif kind in ("metadata", "contract") and model.metadata_props:
        entry = rng.choice(model.metadata_props)
        entry.value = rng.choice(("", "{", "[" * 100_000, "9" * 5000, entry.value * 2, "null", "3"))
    elif kind == "function":
        function = model.functions.add(name=rng.choice(("Add", "MatMul", "f")), domain=rng.choice(("", "x")))
        function.input.append("a")
        function.output.append("a")
        if rng.random() < 0.5:
            function.node.add(op_type=function.name, domain=function.domain, input=["a"], output=["a"])
    elif kind == "doc":
        model.doc_string = "x" * rng.choice((10, 1_000_000))
    elif kind == "name":
        model.graph.name = rng.choice(("", "\0", "x" * 100_000))
    elif kind == "sparse":
        sparse = model.graph.sparse_initializer.add()
        sparse.values.name, sparse.values.data_type = "s", 1
        sparse.dims.extend([2**31, 2**31])
    else:
        model.graph.quantization_annotation.add(tensor_name="x")
    return kind


def bombs(rng, model, onnx) -> str:
    """Nodes that cost far more than they weigh: constants that grow, loops that do not end, deep graphs."""
    graph, helper = model.graph, onnx.helper
    kind = rng.choice(["expand", "shape_of", "tile", "loop", "deep", "chain", "range", "pow", "repeat"])
    size = rng.choice((2**20, 2**33, 2**45))
    target = next(
        node for node in graph.node if node.op_type in ("Add", "Mul", "MatMul", "Tanh", "Softmax", "Gather", "Reshape")
    )
    if kind in ("expand", "shape_of", "tile", "range", "pow"):
        graph.initializer.append(helper.make_tensor("bomb_size", 7, [1], [size]))
        graph.initializer.append(helper.make_tensor("bomb_value", 1, [1], [1.0]))
        nodes = {
            "expand": [helper.make_node("Expand", ["bomb_value", "bomb_size"], ["bomb"])],
            "shape_of": [helper.make_node("ConstantOfShape", ["bomb_size"], ["bomb"])],
            "tile": [helper.make_node("Tile", ["bomb_value", "bomb_size"], ["bomb"])],
            "range": [
                helper.make_node("Squeeze", ["bomb_size"], ["bomb_end"]),
                helper.make_node("Constant", [], ["bomb_zero"], value_int=0),
                helper.make_node("Constant", [], ["bomb_one"], value_int=1),
                helper.make_node("Range", ["bomb_zero", "bomb_end", "bomb_one"], ["bomb_ints"]),
                helper.make_node("Cast", ["bomb_ints"], ["bomb"], to=1),
            ],
            "pow": [
                helper.make_node("ConstantOfShape", ["bomb_size"], ["bomb_a"]),
                helper.make_node("Pow", ["bomb_a", "bomb_a"], ["bomb"]),
            ],
        }[kind]
        nodes += [
            helper.make_node("ReduceMax", ["bomb"], ["bomb_max"], keepdims=0),
            helper.make_node("Add", [target.input[0], "bomb_max"], ["bomb_out"]),
        ]
        target.input[0] = "bomb_out"
        nodes = [*nodes, *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
    elif kind == "loop":
        body = helper.make_graph(
            [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Add", ["v", "v"], ["v2"])],
            "body",
            [
                helper.make_tensor_value_info("i", 7, []),
                helper.make_tensor_value_info("c", 9, []),
                helper.make_tensor_value_info("v", 1, None),
            ],
            [helper.make_tensor_value_info("c2", 9, []), helper.make_tensor_value_info("v2", 1, None)],
        )
        graph.initializer.append(helper.make_tensor("trip", 7, [], [2**62]))
        graph.initializer.append(helper.make_tensor("go", 9, [], [True]))
        loop = helper.make_node("Loop", ["trip", "go", target.input[0]], ["looped"], body=body)
        target.input[0] = "looped"
        nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in graph.node]
        at = next(i for i, n in enumerate(nodes) if "looped" in n.input)
        nodes.insert(at, loop)
        del graph.node[:]
        graph.node.extend(nodes)
    elif kind == "deep":
        inner = helper.make_graph([], "g", [], [])
        for _ in range(rng.choice((8, 24))):
            inner = helper.make_graph(
                [
                    helper.make_node(
                        "If",
                        ["go"],
                        ["y"],
                        then_branch=inner,
                        else_branch=inner if rng.random() < 0.05 else helper.make_graph([], "e", [], []),
                    )
                ],
                "g",
                [],
                [],
            )
        graph.node.append(
            helper.make_node(
                "If", ["go"], ["deep_out"], then_branch=inner, else_branch=helper.make_graph([], "e", [], [])
            )
        )
    elif kind == "chain":
        name = target.input[0]
        names = [name, *(f"chain{i}" for i in range(rng.choice((100, 20_000))))]
        extra = [helper.make_node("Identity", [a], [b]) for a, b in pairwise(names)]
        graph.node.extend(extra)
    else:
        graph.initializer.append(helper.make_tensor("repeats", 7, [1], [size]))
        graph.node.append(helper.make_node("Tile", [graph.node[0].output[0], "repeats"], ["repeated"]))
    return f"{kind} {size}"


def is_graph(data: bytes) -> bool:
    """Whether it parses as a model."""
    import onnx

    try:
        return bool(onnx.ModelProto.FromString(data).graph.node)
    except Exception:
        return False


def inspected(path: Path):
    """`inspect` on the graph alone."""
    command("inspect", str(path), "--json")
    return OTHER, "inspected"


def opened(bundle: Path, name: str, precision: str, file: str, originals: Originals):
    """Open and decode; other numbers must be those that the changed graph itself gives."""
    import lrt_deploy

    with lrt_deploy.open_decoder(bundle, precision=precision, threads=1) as decoder:
        found = decoded(decoder)
        config, capacity = decoder.config, decoder.max_seq_len
    expected = numbers_of(originals, name, precision)
    if np.array_equal(found, expected):
        return EQUAL, ""
    if "prefill.windowed" not in file:
        return WRONG, "a graph that is not run changes the numbers"
    if precision != "fp32":
        return OTHER, "another graph"
    reference = windowed_graph_numbers(bundle, config, capacity, precision)
    if not np.allclose(reference, found, atol=2e-3, rtol=1e-3):
        return WRONG, f"the graph by itself gives other numbers by {np.abs(reference - found).max():.1e}"
    return OTHER, "another graph"


_NUMBERS: dict[tuple[str, str], np.ndarray] = {}


def numbers_of(originals: Originals, name: str, precision: str) -> np.ndarray:
    """What the undamaged bundle decodes in a precision."""
    import lrt_deploy

    if (name, precision) not in _NUMBERS:
        with lrt_deploy.open_decoder(originals.folder / name, precision=precision, threads=1) as decoder:
            _NUMBERS[name, precision] = decoded(decoder)
    return _NUMBERS[name, precision]
