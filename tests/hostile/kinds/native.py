"""Native weights: the header and data of `model.safetensors`."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path

import numpy as np

from hostile.mutate import change, changed_text, damage, is_json, odd_file, text_of
from hostile.originals import Originals, parameters
from hostile.trial import EQUAL, OTHER, WRONG, Trial, command

from .checkpoints import same


def weights(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """A changed `model.safetensors` beside its own config."""
    folder = place / "checkpoint"
    folder.mkdir()
    shutil.copy(originals.folder / "native" / "config.json", folder)
    path = folder / "model.safetensors"
    data = originals.bytes_of("native/model.safetensors")
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = rng.choices(
        ("header", "tensor", "text", "length", "raw", "body", "consistent", "no file"), (25, 30, 10, 8, 8, 8, 9, 2)
    )[0]
    what = ""
    if kind == "header":
        what = change(rng, header)
        data = joined(text_of(header, None).encode("utf-8", "surrogatepass"), body)
    elif kind == "tensor":
        what = tensor_entry(rng, header, len(body))
        data = joined(text_of(header, None).encode("utf-8", "surrogatepass"), body)
    elif kind == "text":
        text, what = changed_text(rng, json.dumps(header))
        data = joined(text, body)
    elif kind == "length":
        wrong = rng.choice((0, 1, length - 1, length + 1, length + 8, len(data), 2**31, 2**63, 2**64 - 1, 100_000_001))
        data, what = struct.pack("<Q", wrong) + data[8:], f"header length {wrong}"
    elif kind == "raw":
        data, what = damage(rng, data)
    elif kind == "body":
        data, what = damage(rng, data, 8 + length)
    elif kind == "consistent":
        data, what = consistent(rng, header, body)
    path.write_bytes(data)
    if kind == "no file":
        what = odd_file(rng, path)
    return Trial(
        what=f"{kind}: {what}",
        parses=header_parses(data) and kind != "no file",
        act=lambda: opened_native(folder, data, originals, rng.random() < 0.08),
        names=("model.safetensors", "config.json", "checkpoint"),
    )


def tensor_entry(rng: random.Random, header: dict, size: int) -> str:
    """One field of one tensor's entry set to a value of the right type that does not fit, or fits by chance."""
    key = rng.choice([k for k in header if k != "__metadata__"])
    entry = header[key]
    field = rng.choice(("dtype", "shape", "data_offsets", "data_offsets", "name"))
    if field == "dtype":
        entry["dtype"] = rng.choice(
            ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "X"]
        )
    elif field == "shape":
        shape = list(entry["shape"])
        shape = rng.choice(
            (
                shape[::-1],
                [*shape, 1],
                [1, *shape],
                [int(np.prod(shape))],
                [2**32, 2**32],
                [0, *shape],
                [2**63],
                [*shape, 2**62],
                [],
            )
        )
        entry["shape"] = shape
    elif field == "data_offsets":
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            (
                [start + 4, stop + 4],
                [start, stop - 4],
                [start, stop + 4],
                [stop, start],
                [0, stop - start],
                [size, size + stop - start],
                [start + 1, stop + 1],
                [2**63, 2**63 + 4],
                [0, 0],
            )
        )
    else:
        header[rng.choice((key + "x", key[1:], "_orig_mod." + key, ""))] = header.pop(key)
    return f"{field} of {key}"


def consistent(rng: random.Random, header: dict, body: bytes) -> tuple[bytes, str]:
    """A valid file of other content: other numbers, another order or type."""
    kind = rng.choice(("values", "order", "metadata", "float64", "spaces", "float16"))
    arrays = {
        k: np.frombuffer(body[slice(*e["data_offsets"])], np.float32).reshape(e["shape"])
        for k, e in header.items()
        if k != "__metadata__"
    }
    names = list(arrays)
    if kind == "values":
        name = rng.choice(names)
        arrays[name] = arrays[name] * np.float32(rng.choice((0.5, -1, 1e-30)))
    elif kind == "order":
        rng.shuffle(names)
    elif kind in ("float64", "float16"):
        name = rng.choice(names)
        arrays[name] = arrays[name].astype(kind)
    entries, parts, offset = {}, [], 0
    for name in names:
        data = arrays[name].tobytes()
        entries[name] = {
            "dtype": {8: "F64", 4: "F32", 2: "F16"}[arrays[name].itemsize],
            "shape": list(arrays[name].shape),
            "data_offsets": [offset, offset + len(data)],
        }
        parts.append(data)
        offset += len(data)
    if kind == "metadata":
        entries = {"__metadata__": {"format": "pt", "note": "x" * 50}, **entries}
    text = json.dumps(entries).encode() + (b" " * 300 if kind == "spaces" else b"")
    return joined(text, b"".join(parts)), f"valid, other {kind}"


def joined(header: bytes, body: bytes) -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(header)) + header + body


def header_parses(data: bytes) -> bool:
    """Whether the header is JSON of the length that the file says."""
    if len(data) < 8:
        return False
    length = struct.unpack("<Q", data[:8])[0]
    return 8 + length <= len(data) and is_json(data[8 : 8 + length])


def opened_native(folder: Path, data: bytes, originals: Originals, use_cli: bool):
    """Open it, and hold what is accepted against an independent reading of the header."""
    from lrt_deploy.model.checkpoint import open_checkpoint

    if use_cli:
        command("inspect", str(folder), "--json")
        return OTHER, "inspected"
    found = open_checkpoint(folder)
    got = parameters(found.model())
    if same(got, originals.tensors("lrt")[1]):
        return EQUAL, ""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    types = {"F32": np.float32, "F64": np.float64, "F16": np.float16}
    for key, tensor in found.tensors.items():
        entry = header[key]
        if entry["dtype"] in types:
            expected = np.frombuffer(body[slice(*entry["data_offsets"])], types[entry["dtype"]]).reshape(entry["shape"])
            if not np.array_equal(expected, tensor.load().numpy()):
                return WRONG, f"{key} is not what the file holds"
    if set(found.tensors) != set(header) - {"__metadata__"}:
        return WRONG, "other tensors than the header names"
    return OTHER, "other weights"
