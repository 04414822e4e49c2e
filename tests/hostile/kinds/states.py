"""Decode states as files, and the entries of a prompt cache, with and without a checksum that fits."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
from pathlib import Path

import numpy as np

from hostile.mutate import changed_json, changed_text, damage, odd_file, scalar, text_of
from hostile.originals import LONG_PROMPT, Originals
from hostile.trial import EQUAL, OTHER, WRONG, Trial

from .native import header_parses, joined, tensor_entry

TYPES = {"F32": np.float32, "I64": np.int64, "U16": np.uint16, "F64": np.float64, "I32": np.int32, "F16": np.float16}


def take_apart(data: bytes) -> tuple[dict, dict[str, str], bytes]:
    """Tensor entries, metadata and body of a state file."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    return header, metadata, data[8 + length :]


def sealed(header: dict, metadata: dict[str, str], body: bytes) -> bytes:
    """The file again, with the checksum that its content has."""
    metadata = {k: v for k, v in metadata.items() if k != "sha256"}
    try:
        digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
        for name in sorted(header):
            entry = header[name]
            array = np.frombuffer(body[slice(*entry["data_offsets"])], TYPES[entry["dtype"]]).reshape(entry["shape"])
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
        metadata["sha256"] = digest.hexdigest()
    except (KeyError, ValueError, TypeError, UnicodeEncodeError):
        metadata["sha256"] = "0" * 64
    text = text_of({"__metadata__": metadata, **header}, None)
    return joined(text.encode("utf-8", "surrogatepass"), body)


def changed_state(rng: random.Random, data: bytes) -> tuple[bytes, str, bool]:
    """A changed state file, what was changed, and whether its checksum was made to fit."""
    header, metadata, body = take_apart(data)
    kind = rng.choices(
        ("raw", "body", "book", "metadata", "entry", "array", "arrays", "header"), (8, 8, 24, 14, 8, 22, 8, 8)
    )[0]
    if kind == "raw":
        return *damage(rng, data), False
    if kind == "body":
        return *damage(rng, data, len(data) - len(body)), False
    if kind == "header":
        text, what = changed_text(rng, json.dumps({"__metadata__": metadata, **header}))
        return joined(text, body), what, False
    if kind == "entry":
        what = tensor_entry(rng, header, len(body))
    elif kind == "book":
        metadata["book"], what = changed_book(rng, metadata["book"])
    elif kind == "metadata":
        key = rng.choice([*metadata, "zz"])
        metadata[key] = rng.choice(
            (
                "",
                "0",
                "2",
                "float16",
                "bfloat16",
                "int8",
                "F" * 64,
                "x" * 1000,
                "object",
                "\ud800",
                metadata.get(key, "") + "0",
            )
        )
        if rng.random() < 0.2:
            del metadata[key]
        what = f"metadata {key}"
    else:
        header, body, what = changed_arrays(rng, header, body, kind == "array")
    fits = rng.random() < 0.8
    if fits:
        return sealed(header, metadata, body), f"{kind}: {what}", True
    return (
        joined(text_of({"__metadata__": metadata, **header}, None).encode("utf-8", "surrogatepass"), body),
        f"{kind}: {what}",
        False,
    )


def changed_book(rng: random.Random, text: str) -> tuple[str, str]:
    """Lengths, reports, extra: other values, types, depth."""
    if rng.random() < 0.25:
        data, what = changed_text(rng, text)
        return data.decode("utf-8", "replace"), what
    book = json.loads(text)
    if rng.random() < 0.4:
        key = rng.choice(list(book))
        book[key] = rng.choice((scalar(rng), [scalar(rng)], {"policy": scalar(rng), "passes": scalar(rng)}))
        return text_of(book, None), f"{key} = {str(book[key])[:60]!a}"
    book, what = changed_json(rng, book)
    return text_of(book, None), what


def changed_arrays(rng: random.Random, header: dict, body: bytes, one: bool) -> tuple[dict, bytes, str]:
    """Numbers, shapes, types or names of arrays, all consistent with the header."""
    arrays = {
        k: np.frombuffer(body[slice(*e["data_offsets"])], TYPES[e["dtype"]]).reshape(e["shape"])
        for k, e in header.items()
    }
    name = rng.choice(list(arrays))
    array = arrays[name].copy()
    kind = rng.choice(
        ["scale", "noise", "nan", "shape", "type", "rename", "drop", "extra", "ids", "short", "long", "zero"]
    )
    if one and kind in ("rename", "drop", "extra"):
        kind = rng.choice(("scale", "ids", "nan"))
    if kind == "scale":
        array = (
            (array * np.float32(rng.choice((0.5, 2, 1e20)))).astype(array.dtype) if array.dtype.kind == "f" else array
        )
    elif kind == "noise" and array.dtype.kind == "f":
        array = array + np.random.default_rng(rng.randrange(2**32)).normal(size=array.shape).astype(array.dtype)
    elif kind == "nan" and array.dtype.kind == "f" and array.size:
        array.reshape(-1)[rng.randrange(array.size)] = rng.choice((np.nan, np.inf, -np.inf))
    elif kind == "ids":
        name = rng.choice([n for n in arrays if n.endswith("tokens")])
        array = arrays[name].copy()
        array[rng.randrange(array.size)] = rng.choice((-1, 270, 300, 319, 2**40, -(2**63), 5))
    elif kind == "shape":
        array = rng.choice((array.reshape(-1), array[None], array[..., None], array.T))
    elif kind == "type":
        array = array.astype(rng.choice((np.float32, np.int64, np.float64, np.int32, np.float16)))
    elif kind in ("short", "long"):
        axis = array.ndim - 2 if array.ndim > 1 else 0
        array = (
            np.take(array, range(array.shape[axis] - 1), axis)
            if kind == "short"
            else np.concatenate([array, array], axis)
        )
    elif kind == "zero":
        array = array[:0]
    arrays[name] = np.ascontiguousarray(array)
    if kind == "drop":
        del arrays[name]
    elif kind == "rename":
        arrays[
            rng.choice(
                (
                    "9." + name,
                    name[2:],
                    "0.kept.3",
                    "0.kept.99",
                    "1.logits",
                    "0.kept.x",
                    "-1.tokens",
                    "0.past_key_7",
                    "00.tokens",
                )
            )
        ] = arrays.pop(name)
    elif kind == "extra":
        arrays[rng.choice(("2.tokens", "0.kept.2", "0.past_key_9", "x", "0.logits"))] = array
    entries, parts, offset = {}, [], 0
    for key, value in arrays.items():
        data = value.tobytes()
        code = {v: k for k, v in TYPES.items()}[value.dtype.type]
        entries[key] = {"dtype": code, "shape": list(value.shape), "data_offsets": [offset, offset + len(data)]}
        parts.append(data)
        offset += len(data)
    return entries, b"".join(parts), f"{kind} {name}"


def states(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """A changed state file, loaded, and continued by a token if it is taken."""
    name = rng.choice(("one.state", "two.state"))
    original = originals.bytes_of(name)
    data, what, sealed_again = changed_state(rng, original)
    path = place / "chat.state"
    path.write_bytes(data)
    is_file = True
    if rng.random() < 0.015:
        what, is_file = odd_file(rng, path), False
    return Trial(
        what=f"{'sealed ' if sealed_again else ''}{what}",
        parses=is_file and header_parses(data),
        act=lambda: loaded(path, name, data, sealed_again, originals),
        names=("chat.state",),
    )


def loaded(path: Path, name: str, data: bytes, sealed_again: bool, originals: Originals):
    """Load it: the state must be what the file says, and go on from there."""
    decoder = originals.decoder
    state = decoder.load_state(path)
    reference = decoder.load_state(originals.folder / name)
    equal = same_state(state, reference)
    if not equal and not sealed_again:
        return WRONG, "another state although the checksum cannot fit"
    header, metadata, body = take_apart(data)
    for row in range(state.batch):
        entry = header[f"{row}.tokens"]
        tokens = np.frombuffer(body[slice(*entry["data_offsets"])], np.int64)
        if state.tokens[row] != tokens.tolist():
            return WRONG, f"row {row} holds other tokens than the file"
        if f"{row}.logits" in header:
            entry = header[f"{row}.logits"]
            if not np.array_equal(state.logits[row], np.frombuffer(body[slice(*entry["data_offsets"])], np.float32)):
                return WRONG, f"row {row} holds other logits than the file"
    book = json.loads(metadata["book"])
    if state.lengths.tolist() != book["lengths"]:
        return WRONG, f"lengths {state.lengths.tolist()}, the file says {str(book['lengths'])[:60]}"
    logits = decoder.step(state, [5] * state.batch)
    if equal and not np.array_equal(logits, decoder.step(reference, [5] * reference.batch)):
        return WRONG, "goes on otherwise"
    state.fork().prefill.to_dict()
    return (EQUAL if equal else OTHER), ""


def same_state(first, second) -> bool:
    """Equal tokens, latents, caches and logits."""
    if first.tokens != second.tokens:
        return False
    rows = [(first.export_row(i), second.export_row(i)) for i in range(first.batch)]
    return all(a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in rows)


def cache_entries(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """A prompt cache with a changed entry: the numbers must be those of a fresh reading, unless a state was planted."""
    folder = place / "cache"
    shutil.copytree(originals.folder / "cache", folder)
    (inner,) = [entry for entry in folder.iterdir() if entry.is_dir()]
    entries = sorted(inner.glob("*.state"))
    chosen = rng.choice(entries)
    original = chosen.read_bytes()
    kind = rng.choices(("state", "odd", "names", "swap", "place"), (84, 4, 5, 5, 2))[0]
    planted, data, is_file = False, original, True
    if kind == "state":
        data, what, planted = changed_state(rng, original)
        chosen.write_bytes(data)
    elif kind == "odd":
        what, is_file = odd_file(rng, chosen), False
    elif kind == "names":
        name = rng.choice((".x.partial-0.state", "é.state", "x" * 200 + ".state", ".state", "zz.txt", "deep/er.state"))
        (inner / name).parent.mkdir(exist_ok=True)
        (inner / name).write_bytes(original if rng.random() < 0.5 else rng.randbytes(300))
        what = f"another file {name[:30]}"
    elif kind == "swap":
        other = rng.choice(entries)
        chosen.write_bytes(other.read_bytes())
        what = "the content of another entry"
    else:
        shutil.rmtree(inner)
        what, is_file = rng.choice(("fifo", "file", "loop")), False
        {
            "fifo": lambda: os.mkfifo(inner),
            "file": lambda: inner.write_bytes(b"x"),
            "loop": lambda: inner.symlink_to(inner.name),
        }[what]()
    count = rng.choice((17, 18, 21, 24))
    return Trial(
        what=f"{kind}: {'sealed ' if planted else ''}{what}",
        parses=is_file and header_parses(data),
        act=lambda: from_cache(folder, count, planted, originals),
        names=("cache",),
        writes=("cache",),
    )


def from_cache(folder: Path, count: int, planted: bool, originals: Originals):
    """Read a prompt through the cache twice."""
    from lrt_deploy.runtime.prompt_cache import PromptCache

    decoder = originals.decoder
    expected = fresh(originals, count)
    verdict = EQUAL
    for _ in range(2):
        state = PromptCache(folder).prefill(decoder, LONG_PROMPT[:count], policy="stepwise")
        if state.tokens != [LONG_PROMPT[:count]]:
            return WRONG, "other tokens than were asked for"
        if np.abs(state.logits[0] - expected).max() > 1e-4:
            if not planted:
                return WRONG, f"logits differ by {np.abs(state.logits[0] - expected).max():.1e}"
            verdict = OTHER
    left = [path.name for path in folder.rglob("*") if ".partial-" in path.name and path.name != ".x.partial-0.state"]
    if left:
        return WRONG, f"left {left}"
    return verdict, ""


_FRESH: dict[int, np.ndarray] = {}


def fresh(originals: Originals, count: int) -> np.ndarray:
    """The logits after the prompt, read without a cache."""
    if count not in _FRESH:
        _FRESH[count] = originals.decoder.prefill([LONG_PROMPT[:count]], policy="stepwise").logits[0]
    return _FRESH[count]
