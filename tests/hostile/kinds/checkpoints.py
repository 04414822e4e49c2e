"""Weights of checkpoints: zip records, their checksums, opcodes of `data.pkl`, tensors; as torch writes them."""

from __future__ import annotations

import random
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np

from hostile.mutate import damage, odd_file
from hostile.originals import Originals, parameters
from hostile.trial import EQUAL, OTHER, WRONG, Trial, command

from .pickle_opcodes import one_opcode
from .zip_archives import Record, gzipped, is_zip, read_records, write_records

MODEL, META = "model_000010.pt", "meta_000010.json"


def weights(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """A changed `model_NNNNNN.pt` beside its own meta."""
    name = rng.choice(("lrt", "lrt", "plain"))
    folder = place / "checkpoint"
    folder.mkdir()
    shutil.copy(originals.folder / name / META, folder / META)
    kind = rng.choices((raw, rebuilt, opcodes, tensors_changed, no_file), (20, 25, 28, 25, 2))[0]
    what, intact = kind(rng, folder / MODEL, name, originals)
    return Trial(
        what=f"{kind.__name__}: {what}",
        parses=is_zip(folder / MODEL),
        act=lambda: opened(folder, name, originals, intact, use_cli=rng.random() < 0.08),
        names=(MODEL, META, "checkpoint"),
    )


def raw(rng, path, name, originals):
    """Damage to the file as it lies on a disk; half of it inside the records' data, so that the zip still parses."""
    data = originals.bytes_of(f"{name}/{MODEL}")
    if rng.random() < 0.6:
        records = [r for r in read_records(data) if len(r.data) > 64]
        record = rng.choice(records)
        changed, what = damage(rng, data, record.start, record.start + len(record.data))
        if len(changed) != len(data):  # keep the offsets
            changed, what = bytearray(data), f"zeros in {record.name}"
            at = record.start + rng.randrange(len(record.data))
            stop = min(at + 512, record.start + len(record.data))
            changed[at:stop] = bytes(stop - at)
    else:
        changed, what = damage(rng, data)
    path.write_bytes(bytes(changed))
    return what, False


def rebuilt(rng, path, name, originals):
    """Records changed, left out, doubled or packed, with checksums that fit (or one that does not)."""
    records = read_records(originals.bytes_of(f"{name}/{MODEL}"))
    storages = [r for r in records if "/data/" in r.name]
    chosen, comment, intact = rng.choice(records), b"", True
    kind = rng.choice(
        [
            "values",
            "zeros",
            "tiny",
            "nan",
            "random",
            "crc",
            "longer",
            "shorter",
            "missing",
            "double",
            "rename",
            "deflate",
            "deflate_all",
            "encrypted",
            "size",
            "extra",
            "comment",
            "order",
            "prefix",
            "slash",
            "byteorder",
            "version",
            "bomb",
            "zip_bomb",
            "unpadded",
            "strays",
            "upper",
        ]
    )
    if kind in ("values", "zeros", "tiny", "nan", "random"):
        chosen = rng.choice(storages)
        numbers = np.frombuffer(chosen.data, np.float32).copy()
        some = slice(rng.randrange(len(numbers)), None)
        numbers[some] = {"values": numbers[some] * 1.25, "zeros": 0, "tiny": numbers[some] * 1e-20}.get(kind, 1)
        if kind == "nan":
            numbers[rng.randrange(len(numbers))] = rng.choice((np.nan, np.inf, -np.inf))
        chosen.data = rng.randbytes(len(chosen.data)) if kind == "random" else numbers.tobytes()
    elif kind == "crc":
        chosen.crc, intact = zlib.crc32(chosen.data) ^ (1 << rng.randrange(32)), False
    elif kind == "longer":
        chosen.data += rng.randbytes(rng.choice((1, 4, 64, 4096)))
    elif kind == "shorter":
        chosen.data = chosen.data[: -rng.choice((1, 4, 64))]
    elif kind == "missing":
        records.remove(chosen)
    elif kind == "double":
        copy = Record(chosen.name, damage(rng, chosen.data)[0])
        records.insert(rng.randrange(len(records) + 1), copy)
        intact = None  # two records of one name: which of them counts differs between readers
    elif kind == "rename":
        chosen.name = rng.choice(
            (
                chosen.name + "x",
                chosen.name.replace("/", "//"),
                "../" + chosen.name,
                "/etc/x",
                chosen.name.upper(),
                "",
                "\0",
                chosen.name.split("/", 1)[-1],
            )
        )
    elif kind == "deflate":
        chosen.method = 8
    elif kind == "deflate_all":
        for record in records:
            record.method = 8
    elif kind == "encrypted":
        chosen.flags = rng.choice((1, 8, 0x40, 0x800, 0xFFFF))
    elif kind == "size":
        chosen.size, intact = rng.choice((0, 1, len(chosen.data) * 2, 2**31, 2**32 - 1)), False
    elif kind == "extra":
        chosen.extra = rng.randbytes(rng.choice((3, 4, 20, 60_000)))
    elif kind == "comment":
        comment = rng.choice((b"hello", b"PK\5\6" + bytes(18), rng.randbytes(60_000)))
    elif kind == "order":
        rng.shuffle(records)
    elif kind == "prefix":
        for record in records:
            record.name = record.name.replace(record.name.split("/")[0], rng.choice(("archive", "x y", "é")), 1)
    elif kind == "slash":
        records.append(Record(records[0].name.split("/")[0] + "/", b""))
    elif kind in ("byteorder", "version"):
        for record in records:
            if record.name.endswith(kind):
                record.data = rng.choice((b"big", b"", b"little\n", b"9999999999\n", b"-1", b"x" * 1000))
    elif kind == "bomb":
        packed = next(r for r in records if r.name.endswith("data.pkl"))
        packed.data, packed.method = (
            b"\x80\x02" + b"N0" * rng.choice((1000, 4_000_000)) + packed.data[2:],
            rng.choice((0, 8)),
        )
    elif kind == "zip_bomb":
        chosen.bomb(b"", rng.choice((10**6, 3 * 10**8)))
    elif kind == "strays":
        stray = rng.choice(("code/x.py", "constants.pkl", "data/99999", ".format_version"))
        records.append(Record(f"{records[0].name.split('/')[0]}/{stray}", rng.randbytes(40)))
    elif kind == "upper":
        path.write_bytes(gzipped(originals.bytes_of(f"{name}/{MODEL}"), rng))
        return "gzip, tar or another container", True
    path.write_bytes(write_records(records, comment, padded=kind != "unpadded"))
    return f"{kind} of {chosen.name}", intact


def opcodes(rng, path, name, originals):
    """`data.pkl` changed instruction by instruction; checksums fit."""
    records = read_records(originals.bytes_of(f"{name}/{MODEL}"))
    packed = next(r for r in records if r.name.endswith("data.pkl"))
    said = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        try:
            packed.data, what = one_opcode(rng, packed.data)
        except (ValueError, IndexError, struct.error, OverflowError) as error:
            what = f"no longer opcodes ({type(error).__name__})"
        said.append(what)
    path.write_bytes(write_records(records))
    return "; ".join(said), True


def tensors_changed(rng, path, name, originals):
    """A state dict that torch itself writes, of other tensors, names or types."""
    import torch

    tensors, _ = originals.tensors(name)
    tensors = {key: value.clone() for key, value in tensors.items()}
    key = rng.choice(list(tensors))
    value = tensors[key]
    kind = rng.choice(
        [
            "noise",
            "drop",
            "rename",
            "prefix",
            "prefix_all",
            "both",
            "module",
            "reshape",
            "transpose",
            "dtype",
            "dtype_all",
            "strided",
            "shared",
            "extra",
            "nan",
            "tiny",
            "zero_all",
            "scale",
            "empty",
            "scalar",
            "sparse",
            "nested",
            "parameter",
            "list",
            "legacy",
            "swap",
            "quantized",
            "negative",
            "conj",
            "wrapped",
        ]
    )
    dtypes = (
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int32,
        torch.bool,
        torch.complex64,
        torch.uint8,
        torch.int64,
        torch.float8_e4m3fn,
    )
    content = tensors
    if kind == "noise":
        tensors[key] = value + torch.randn(value.shape, generator=torch.Generator().manual_seed(rng.randrange(10**6)))
    elif kind == "drop":
        del tensors[key]
    elif kind == "rename":
        tensors[
            rng.choice((key + "x", key.replace(".0.", ".7."), key.replace("transformer.", ""), "", "é", "x" * 5000))
        ] = tensors.pop(key)
    elif kind == "prefix":
        tensors["_orig_mod." + key] = tensors.pop(key)
    elif kind in ("prefix_all", "module"):
        prefix = (
            "_orig_mod."
            if kind == "prefix_all"
            else rng.choice(("module.", "model.", "module._orig_mod.", "_orig_mod._orig_mod."))
        )
        content = {prefix + k: v for k, v in tensors.items()}
    elif kind == "both":
        tensors["_orig_mod." + key] = value + 1
    elif kind == "reshape":
        tensors[key] = rng.choice(
            (
                value.reshape(-1),
                value[None],
                value[..., None],
                value.reshape(-1, 1),
                value[:1],
                torch.cat([value, value]),
            )
        )
    elif kind == "transpose":
        tensors[key] = value.T.contiguous() if value.ndim == 2 else value.flip(0)
    elif kind == "dtype":
        tensors[key] = value.to(rng.choice(dtypes))
    elif kind == "dtype_all":
        dtype = rng.choice(dtypes[:3])
        content = {k: v.to(dtype) for k, v in tensors.items()}
    elif kind == "strided":
        tensors[key] = rng.choice(
            (
                value.T.contiguous().T if value.ndim == 2 else value[:1].expand_as(value),
                value[:1].expand_as(value),
                torch.cat([value, value])[: len(value)],
            )
        )
    elif kind == "shared":
        other = rng.choice([k for k in tensors if tensors[k].shape == value.shape])
        tensors[other] = tensors[key]
    elif kind == "extra":
        tensors[
            rng.choice(
                (
                    "rope.cos",
                    "optimizer.step",
                    "transformer.h.9.attn.c_q.weight",
                    "value_embeds.5.weight",
                    "interleaved_lambdas2",
                )
            )
        ] = value
    elif kind == "nan":
        value.view(-1)[rng.randrange(value.numel())] = rng.choice((float("nan"), float("inf"), -float("inf")))
    elif kind == "tiny":
        content = {k: v * 10.0 ** -rng.choice((10, 20, 30, 44)) for k, v in tensors.items()}
    elif kind == "zero_all":
        content = {k: v * 0 for k, v in tensors.items()}
    elif kind == "scale":
        content = {k: v * 10.0 ** rng.choice((3, 8, 18, 30)) for k, v in tensors.items()}
    elif kind == "empty":
        tensors[key] = torch.empty(rng.choice(((0,), (0, 32), (32, 0))))
    elif kind == "scalar":
        tensors[key] = torch.tensor(1.0)
    elif kind == "sparse":
        tensors[key] = value.to_sparse()
    elif kind == "nested":
        content = rng.choice(
            (
                {"model": tensors},
                {"state_dict": tensors, "step": 3},
                {**tensors, "deep": {"a": value}},
                {**tensors, "step": 10},
            )
        )
    elif kind == "parameter":
        tensors[key] = torch.nn.Parameter(value)
    elif kind == "list":
        content = rng.choice(
            ([*tensors.values()], tuple(tensors), None, 3, "text", value, {}, {1: value}, {b"x": value})
        )
    elif kind == "swap":
        other = rng.choice([k for k in tensors if tensors[k].shape == value.shape])
        tensors[key], tensors[other] = tensors[other], tensors[key]
    elif kind == "quantized":
        tensors[key] = torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)
    elif kind == "negative":
        tensors[key] = torch.complex(value, value).imag if value.numel() else value
    elif kind == "conj":
        tensors[key] = value.to(torch.complex64).conj()
    elif kind == "wrapped":
        import collections

        content = rng.choice((collections.OrderedDict(tensors), collections.OrderedDict(reversed(tensors.items()))))
    torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    return f"{kind} of {key}", True


def no_file(rng, path, name, originals):
    """Nothing that could be read as a checkpoint."""
    path.write_bytes(b"x")
    return odd_file(rng, path), False


def opened(folder: Path, name: str, originals: Originals, intact: bool | None, use_cli: bool = False):
    """Open it as export does, and hold what is accepted against an independent reading."""
    from lrt_deploy.model.checkpoint import open_checkpoint

    if use_cli:
        command("inspect", str(folder), "--json")
        return OTHER, "inspected"
    found = open_checkpoint(folder)
    got = parameters(found.model())
    if same(got, originals.tensors(name)[1]):
        return EQUAL, ""
    if intact is not True:
        return (
            WRONG,
            "a damaged file gives other weights" if intact is False else "which of two records counts is unclear",
        )
    if found.config.memory != (name == "lrt"):
        return WRONG, f"another model: {found.config}"
    return agrees_with_torch(folder / MODEL, found)


def agrees_with_torch(path: Path, found) -> tuple[str, str]:
    """torch's own reading of the file, tensor by tensor."""
    import torch

    expected = torch.load(path, weights_only=True, map_location="cpu")
    expected = {re.sub(r"^(_orig_mod\.|module\.)+", "", key): value for key, value in expected.items()}
    if expected.keys() != found.tensors.keys():
        return WRONG, "other tensors than torch reads"
    for key, value in expected.items():
        if not torch.equal(value.float(), found.tensors[key].load().float()):
            return WRONG, f"{key} differs from what torch reads"
    return OTHER, "other weights"


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Equal names, shapes and bits."""
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)
