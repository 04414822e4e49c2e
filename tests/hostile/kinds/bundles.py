"""Bundles: manifests, tables, weights and tokenizers with hashes made to fit; damage without; the memory of hashes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np

from hostile.mutate import INTEGERS, changed_json, changed_text, damage, is_json, odd_file, scalar, text_of
from hostile.originals import Originals, decoded, rehash
from hostile.reference import full_graph_numbers
from hostile.trial import EQUAL, OTHER, WRONG, Trial, command

BUNDLES = ("bundle", "bundle", "hosted", "hosted", "narrow")
NAMES = (
    "manifest",
    "bundle",
    "graphs",
    "tokenizer",
    "weights.bin",
    "tables.bin",
    "model config",
    "ONNX",
    "onnx",
    "not finite",
    "capacity",
)


def linked(source: Path, target: Path) -> Path:
    """A copy of a folder whose files are hard links; a file must be removed before it is written."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


def put(path: Path, data: bytes) -> None:
    """Write a file of a linked copy."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def seal(bundle: Path, text: str) -> None:
    """`rehash` for a linked copy."""
    for name in ("manifest.json", "manifest.sha256"):
        (bundle / name).unlink(missing_ok=True)
    rehash(bundle, text)


def manifests(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """Something in a bundle changed by one who knows how to make all hashes fit."""
    name = rng.choice(BUNDLES)
    bundle = linked(originals.folder / name, place / "bundle")
    text = originals.bytes_of(f"{name}/manifest.json").decode()
    kind = rng.choices(
        ("fields", "model", "tables", "records", "contracts", "text", "weights", "extra", "tokenizer"),
        (22, 16, 18, 10, 10, 8, 8, 4, 4),
    )[0]
    # Whether other numbers are what was asked for: whoever writes a bundle chooses its weights.
    free = kind == "weights"
    fields, what, data = json.loads(text), "", None
    if kind == "fields":
        slim = {k: v for k, v in fields.items() if k not in ("contracts", "files")}
        changed, what = changed_json(rng, slim)
        fields = changed | {k: fields[k] for k in ("contracts", "files")} if isinstance(changed, dict) else changed
    elif kind == "model":
        key = rng.choice(list(fields["model"]))
        fields["model"][key] = rng.choice(
            (rng.choice(INTEGERS), scalar(rng), not fields["model"][key], "layerwise", "S", 0, 1, 2)
        )
        what = f"{key} = {str(fields['model'][key])[:60]!a}"
    elif kind == "tables":
        what, free = changed_tables(rng, bundle, fields)
    elif kind == "records":
        what = changed_records(rng, fields)
    elif kind == "contracts":
        changed, what = changed_json(rng, fields["contracts"])
        fields["contracts"] = changed
    elif kind == "text":
        data, what = changed_text(rng, text)
    elif kind == "weights":
        what = changed_weights(rng, bundle, fields)
    elif kind == "extra":
        what = rng.choice(
            (
                "graphs/fp32/other.bin",
                "engines/x/lrt.plan",
                "engines/tensorrt-rtx-fp32/lrt.plan.json",
                "reports/r.html",
                "é.txt",
                "tokenizer/tokenizer.pkl",
            )
        )
        put(bundle / what, rng.randbytes(50))
        if rng.random() < 0.5:
            fields["files"][what] = {"bytes": 0, "sha256": ""}
    else:
        target = bundle / "tokenizer" / rng.choice(("tokenizer.json", "token_bytes.json"))
        changed, what = changed_json(rng, json.loads(target.read_bytes()))
        put(target, text_of(changed, None).encode("utf-8", "surrogatepass"))
        free = True
    if data is None:
        data = text_of(fields).encode("utf-8", "surrogatepass")
    resized = kind in ("records",)
    sealed_text = data.decode("utf-8", "replace") if resized else None
    if resized:  # sizes and hashes as they are now said, right or wrong
        put(bundle / "manifest.json", sealed_text.encode())
        put(bundle / "manifest.sha256", f"{hashlib.sha256(sealed_text.encode()).hexdigest()}  manifest.json\n".encode())
    elif kind == "text":
        put(bundle / "manifest.json", data)
        put(bundle / "manifest.sha256", f"{hashlib.sha256(data).hexdigest()}  manifest.json\n".encode())
    else:
        seal(bundle, data.decode("utf-8", "surrogatepass"))
    precision = rng.choice(("int8", "int4-weight-only")) if name == "narrow" else None
    use_cli = rng.random() < 0.1
    return Trial(
        what=f"{name} {kind}: {what}",
        parses=is_json(data),
        act=lambda: opened(bundle, name, originals, free, precision, use_cli),
        names=NAMES,
    )


def changed_tables(rng: random.Random, bundle: Path, fields: dict) -> tuple[str, bool]:
    """Where the embedding tables on the host lie, what they are, or what is in them."""
    precision = next(iter(fields["precisions"]))
    if not fields.get("tables"):
        fields["tables"] = rng.choice(
            (
                {precision: {"token_embeds": {"dtype": "float32", "shape": [320, 32], "offset": 0}}},
                {"x": {}},
                {precision: {}},
                [],
                None,
                {precision: None},
            )
        )
        return "tables of a bundle without any", False
    tables = fields["tables"][precision]
    path = bundle / "graphs" / precision / "tables.bin"
    data = path.read_bytes()
    name = rng.choice(list(tables))
    record = tables[name]
    kind = rng.choice(
        [
            "offset",
            "offset",
            "dtype",
            "shape",
            "swap",
            "drop",
            "extra",
            "overlap",
            "values",
            "moved",
            "longer",
            "shorter",
        ]
    )
    if kind == "offset":
        record["offset"] = rng.choice(
            (
                record["offset"] + rng.choice((1, 2, 4, 64, 128, 4096, -4, -128)),
                0,
                rng.choice(INTEGERS),
                float(record["offset"]),
                None,
            )
        )
    elif kind == "dtype":
        record["dtype"] = rng.choice(
            ("float16", "bfloat16", "float64", "int8", "int32", "object", "", None, 3, "f4", "O", "<f4")
        )
    elif kind == "shape":
        rows, columns = record["shape"]
        record["shape"] = rng.choice(
            (
                [columns, rows],
                [rows // 2, columns * 2],
                [rows * 2, columns // 2],
                [rows - 1, columns],
                [rows, columns + 1],
                [rows],
                [2**40, 2**40],
                [rows, columns, 1],
                "ab",
                [True, columns],
                [0, columns],
                None,
            )
        )
    elif kind == "swap" and len(tables) > 1:
        first, second = list(tables)[:2]
        tables[first]["offset"], tables[second]["offset"] = tables[second]["offset"], tables[first]["offset"]
        return f"{kind} of {name}", True  # of one size: then they are these tables, by the word of the manifest
    elif kind == "drop":
        del tables[name]
    elif kind == "extra":
        tables["more"] = dict(record)
    elif kind == "overlap":
        for other in tables.values():
            other["offset"] = 0
    elif kind == "values":
        changed = bytearray(data)
        numbers = np.frombuffer(changed, np.float32, 64)
        numbers *= np.float32(1.5)
        put(path, bytes(changed))
        return "other numbers in the table", True
    elif kind == "moved":
        put(path, bytes(4096) + data)
        for other in tables.values():
            other["offset"] += 4096
    elif kind == "longer":
        put(path, data + bytes(rng.choice((1, 4, 4096))))
    elif kind == "shorter":
        put(path, data[: -rng.choice((1, 4, 128, 4096))])
    return f"{kind} of {name}", False


def changed_records(rng: random.Random, fields: dict) -> str:
    """Names, sizes and hashes of files."""
    files = fields["files"]
    name = rng.choice(list(files))
    kind = rng.choice(["bytes", "sha", "name", "drop", "type", "extra", "field"])
    if kind == "bytes":
        files[name]["bytes"] = rng.choice((files[name]["bytes"] + 1, 0, True, float(files[name]["bytes"]), scalar(rng)))
    elif kind == "sha":
        digest = files[name]["sha256"]
        files[name]["sha256"] = rng.choice((digest.upper(), digest[:-1], "0" * 64, scalar(rng)))
    elif kind == "name":
        files[
            rng.choice(
                (
                    "../x",
                    "/etc/passwd",
                    "graphs/../../x",
                    "graphs/./fp32",
                    "",
                    ".",
                    "a\0b",
                    "x" * 300,
                    "manifest.json",
                    "graphs",
                    "graphs//fp32/weights.bin",
                    "\ud800",
                )
            )
        ] = files.pop(name) if rng.random() < 0.5 else dict(files[name])
    elif kind == "drop":
        del files[name]
    elif kind == "type":
        files[name] = scalar(rng)
    elif kind == "extra":
        files["graphs/fp32/missing.bin"] = {"bytes": 3, "sha256": "0" * 64}
    else:
        files[name]["mode"] = 0o777
    return f"{kind} of {name}"


def changed_weights(rng: random.Random, bundle: Path, fields: dict) -> str:
    """Other numbers in a weights file, or another length."""
    precision = rng.choice(fields["precisions"])
    path = bundle / "graphs" / precision / "weights.bin"
    data = bytearray(path.read_bytes())
    kind = rng.choice(("scale", "nan", "cut", "longer", "random", "zero"))
    if kind == "scale" and precision == "fp32":
        numbers = np.frombuffer(data, np.float32)
        numbers *= np.float32(rng.choice((0.9, 1.1, -1, 1e-20, 1e20)))
    elif kind == "nan":
        data[64 : 64 + 256] = np.full(64, rng.choice((np.nan, np.inf)), np.float32).tobytes()
    elif kind == "cut":
        data = data[: rng.randrange(len(data))]
    elif kind == "longer":
        data += bytes(100)
    elif kind == "random":
        at = rng.randrange(len(data) - 64)
        data[at : at + 64] = rng.randbytes(64)
    else:
        data[:] = bytes(len(data))
    put(path, bytes(data))
    return f"{kind} in {precision}"


def opened(bundle: Path, name: str, originals: Originals, free: bool, precision: str | None, use_cli: bool):
    """Open it and decode; numbers other than the original's must be those of the bundle's own other graph."""
    import lrt_deploy

    if use_cli:
        command("inspect", str(bundle), "--json")
        return OTHER, "inspected"
    with lrt_deploy.open_decoder(bundle, precision=precision, threads=1) as decoder:
        found = decoded(decoder)
        config, capacity = decoder.config, decoder.max_seq_len
        if decoder.tokenizer is not None:
            decoder.tokenizer.encode("The king 12345\n")
    expected = originals.numbers[name] if precision in (None, "int8") else None
    if expected is not None and np.array_equal(found, expected):
        return EQUAL, ""
    if expected is not None and found.shape == expected.shape and np.abs(found - expected).max() < 1e-5:
        return EQUAL, "but for rounding"
    if precision is not None:  # quantized graphs of the other flavour round otherwise
        return (OTHER, "quantized") if free or precision != "int8" else (WRONG, "numbers of another model")
    if not free:
        return (
            WRONG,
            f"numbers differ by {np.abs(found - expected).max():.1e}"
            if found.shape == expected.shape
            else "another shape",
        )
    reference = full_graph_numbers(bundle, config, capacity, precision or "fp32")
    if not np.allclose(reference, found, atol=2e-3, rtol=1e-3, equal_nan=True):
        return WRONG, f"the bundle's full graph gives other numbers by {np.abs(reference - found).max():.1e}"
    return OTHER, "other weights"


def damaged(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """Damage to any file of a bundle, without touching a hash."""
    name = rng.choice(("bundle", "hosted", "narrow"))
    bundle = linked(originals.folder / name, place / "bundle")
    files = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    file = rng.choice(files)
    path, parses = bundle / file, True
    kind = rng.choices(("damage", "odd", "swap", "digest", "whole"), (72, 8, 10, 5, 5))[0]
    if kind == "damage":
        data, what = damage(rng, path.read_bytes())
        put(path, data)
        parses = file != "manifest.json" or is_json(data)
    elif kind == "odd":
        what = odd_file(rng, path)
        parses = file != "manifest.json"
    elif kind == "swap":
        other = rng.choice(files)
        put(path, originals.bytes_of(f"{name}/{other}"))
        what = f"the content of {other}"
        parses = file != "manifest.json"
    elif kind == "digest":
        file = "manifest.sha256"
        digest = (bundle / file).read_bytes()
        put(
            bundle / file,
            rng.choice(
                (digest.upper(), digest[:64], digest + b"\n", b"", digest.replace(b"  ", b" "), b"0" * 64 + digest[64:])
            ),
        )
        what = "its digest"
    else:
        what = rng.choice(("file", "empty folder", "tokenizer gone", "graphs gone"))
        if what in ("file", "empty folder"):
            shutil.rmtree(bundle)
            bundle.write_bytes(b"x") if what == "file" else bundle.mkdir()
        else:
            shutil.rmtree(bundle / what.split()[0])
    precision = "int8" if name == "narrow" else None
    return Trial(
        f"{name} {kind} {file}: {what}", parses, lambda: must_be_equal(bundle, name, originals, precision), NAMES
    )


def must_be_equal(bundle: Path, name: str, originals: Originals, precision: str | None):
    """Whatever opens must be what it was."""
    import lrt_deploy

    with lrt_deploy.open_decoder(bundle, precision=precision, threads=1) as decoder:
        found = decoded(decoder)
    return (EQUAL, "") if np.array_equal(found, originals.numbers[name]) else (WRONG, "other numbers")


def memory_of_hashes(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """Anything as `verified.json`: an intact bundle opens equally, a damaged one is refused."""
    intact = rng.random() < 0.6
    bundle = linked(originals.folder / "large", place / "bundle")
    weights = bundle / "graphs" / "fp32" / "weights.bin"
    if not intact:
        data = bytearray(weights.read_bytes())
        data[rng.randrange(80_000)] ^= 4
        put(weights, bytes(data))
    cache = place / "cache-home"
    memory = cache / "lrt-deploy" / "verified.json"
    memory.parent.mkdir(parents=True)
    stat = weights.stat()
    right = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    entries = {right: digest, **{f"{i}:{i}:9:1:{i}": "0" * 64 for i in range(4)}}
    kind = rng.choices(("json", "text", "other", "odd"), (55, 20, 15, 10))[0]
    data = b""
    if kind == "json":
        entries, what = changed_json(rng, entries)
        data = text_of(entries, None).encode("utf-8", "surrogatepass")
    elif kind == "text":
        data, what = changed_text(rng, text_of(entries, None))
    elif kind == "other":
        what = "another shape"
        data = json.dumps(
            rng.choice(
                (
                    [right],
                    {right: [digest]},
                    {right: None},
                    [[right, digest]],
                    {right: {"a": digest}},
                    "x",
                    3,
                    {"entries": entries},
                    {str(i): "0" * 64 for i in range(5000)},
                )
            )
        ).encode()
    memory.write_bytes(data)
    if kind == "odd":
        what = odd_file(rng, memory)

    def act():
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = str(cache)
        try:
            verdict, detail = must_be_equal(bundle, "large", originals, None)
        finally:
            os.environ["XDG_CACHE_HOME"] = before or ""
        return verdict, detail

    parses = kind != "odd" and is_json(data)
    return Trial(f"{'intact' if intact else 'damaged'} {kind}: {what}", parses, act, NAMES, ("cache-home",))
