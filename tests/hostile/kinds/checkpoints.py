"""Weights of checkpoints: zip records, their checksums, opcodes of `data.pkl`, tensors; and native safetensors."""

from __future__ import annotations

import functools
import io
import json
import pickle
import pickletools
import random
import re
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from hostile.mutate import INTEGERS, TEXTS, change, changed_text, damage, is_json, odd_file, text_of
from hostile.originals import Originals, parameters
from hostile.trial import EQUAL, OTHER, WRONG, Trial, command

MODEL, META = "model_000010.pt", "meta_000010.json"


# --- the authors' .pt ---------------------------------------------------------------------------------------------


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


class Record:
    """A stored record of a zip file."""

    def __init__(self, name: str, data: bytes, start: int = 0) -> None:
        self.name, self.data, self.start = name, data, start
        self.method, self.crc, self.flags, self.size, self.extra = 0, None, 0, None, b""
        self.packed: bytes | None = None  # deflated, where that was done before

    def bomb(self, header: bytes, zeros: int) -> None:
        """Hold some bytes and very many zeros, deflated to a thousandth."""
        self.data, self.method = b"", 8
        self.packed, self.crc, self.size = deflated_zeros(header, zeros)


@functools.lru_cache(maxsize=16)
def deflated_zeros(header: bytes, zeros: int) -> tuple[bytes, int, int]:
    """Some bytes and then zeros as one deflate stream; their CRC-32, and how many they are."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    parts, crc, block = [packer.compress(header)], zlib.crc32(header), bytes(2**20)
    for start in range(0, zeros, len(block)):
        some = block[: zeros - start]
        parts.append(packer.compress(some))
        crc = zlib.crc32(some, crc)
    return b"".join([*parts, packer.flush()]), crc, len(header) + zeros


def read_records(data: bytes) -> list[Record]:
    """The records of an intact zip, with the offsets of their data."""
    found = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            name_length, extra_length = struct.unpack_from("<HH", data, info.header_offset + 26)
            start = info.header_offset + 30 + name_length + extra_length
            found.append(Record(info.filename, data[start : start + info.file_size], start))
    return found


def write_records(records: list[Record], comment: bytes = b"", padded: bool = True) -> bytes:
    """A zip of these records, data on boundaries of 64 bytes as torch writes it, every field as the record says."""
    out, central = bytearray(), bytearray()
    for record in records:
        name = record.name.encode("utf-8", "surrogatepass")
        crc = zlib.crc32(record.data) if record.crc is None else record.crc
        body = record.data
        if record.packed is not None:
            body = record.packed
        elif record.method == 8:
            packer = zlib.compressobj(6, zlib.DEFLATED, -15)
            body = packer.compress(record.data) + packer.flush()
        size = len(record.data) if record.size is None else record.size
        extra = record.extra
        if padded and not extra:
            missing = -(len(out) + 30 + len(name) + 4) % 64
            extra = struct.pack("<HH", 0x4246, missing) + b"Z" * missing
        fields = (20, record.flags, record.method, 0, 33, crc & 0xFFFFFFFF, len(body), size & 0xFFFFFFFF)
        offset = len(out)
        out += struct.pack("<4sHHHHHIIIHH", b"PK\3\4", *fields, len(name), len(extra)) + name + extra + body
        central += struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", 20, *fields, len(name), 0, 0, 0, 0, 0, offset) + name
    start = len(out)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, len(records), len(records), len(central), start, len(comment))
    return bytes(out + central + end + comment)


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


def gzipped(data: bytes, rng: random.Random) -> bytes:
    import gzip
    import tarfile

    if rng.random() < 0.5:
        return gzip.compress(data, 1)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"))
    return file.getvalue()


GLOBALS = (
    *("os system", "posix system", "builtins eval", "builtins bytearray", "builtins getattr", "__builtin__ list"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch._utils _rebuild_sparse_tensor"),
    *("torch FloatStorage", "torch HalfStorage", "torch BFloat16Storage", "torch DoubleStorage", "torch ByteStorage"),
    *(
        "torch LongStorage",
        "torch ComplexFloatStorage",
        "torch FloatTensor",
        "torch Tensor",
        "torch.storage UntypedStorage",
    ),
    *("torch.storage TypedStorage", "collections OrderedDict", "collections Counter", "torch Size", "torch float32"),
    *(
        "torch.nn.parameter Parameter",
        "torch._tensor _rebuild_from_type_v2",
        "_codecs encode",
        "torch device",
        "numpy ndarray",
    ),
    *(
        "torch._utils _rebuild_meta_tensor_no_storage",
        "torch._utils _rebuild_wrapper_subclass",
        "torch._utils _rebuild_qtensor",
    ),
)
GADGETS = (
    b"cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R0",
    b"ctorch\nFloatTensor\nK\x10K\x10\x86R0",
    b"cos\nsystem\nX\x04\x00\x00\x00true\x85R0",
    b"ccollections\nOrderedDict\n)R}b0",
    b"]" * 3000 + b"a" * 2999 + b"0",
    b"(" * 3000 + b"t" * 3000 + b"0",
    b"}K\x01K\x02s0",
    b"(lp0\n0",
    b"c" + b"A" * 120_000 + b"\nB\n0",
    b"\x8a\xff" + b"\x7f" * 255 + b"0",
    b"\x8c\x01a\x940" * 2000,
    b"I" + b"9" * 5000 + b"\n0",
    b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00(t(t\x89NtR0",
)


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


def one_opcode(rng: random.Random, code: bytes) -> tuple[bytes, str]:
    """A pickle with one instruction changed, left out, doubled, exchanged or put in."""
    found = list(pickletools.genops(code))
    ends = [position for _, _, position in found[1:]] + [len(code)]
    index = rng.randrange(1, len(found))
    kind = rng.randrange(12)
    if kind < 6:  # arguments
        wanted = [i for i, (op, arg, _) in enumerate(found) if arg is not None and op.name not in ("PROTO", "FRAME")]
        index = rng.choice(wanted)
        if kind < 3:
            index = rng.choice([i for i in wanted if "PUT" not in found[i][0].name and "GET" not in found[i][0].name])
    op, arg, start = found[index]
    stop = ends[index]
    if kind < 6:
        new = changed_argument(rng, op.name, arg, code[start:stop])
    elif kind == 6:
        new = b""
    elif kind == 7:
        new = code[start:stop] * 2
    elif kind == 8:
        other = rng.randrange(1, len(found) - 1)
        new = code[found[other][2] : ends[other]]
    elif kind == 9:
        new = rng.choice(GADGETS) + code[start:stop]
    elif kind == 10:
        new = bytes([rng.choice(b"0(.1NRtbaeus}])\x81\x85\x86\x87\x88\x89Q\x93\x94")]) + code[start:stop]
    else:
        new = bytes([rng.choice(b"0(.1NRtbaeus}])\x81\x85\x86\x87\x88\x89Q\x93\x94")])
    return code[:start] + new + code[stop:], f"{op.name} {str(arg)[:40]!a} at {start} -> {new[:40]!a}"


def changed_argument(rng: random.Random, name: str, arg, original: bytes) -> bytes:
    """An instruction with another argument, written so that it parses."""
    if isinstance(arg, bool) or arg is None:
        return rng.choice((b"\x88", b"\x89", b"N"))
    if isinstance(arg, int) and name.startswith(("BININT", "LONG")) and "PUT" not in name:
        value = rng.choice((arg + 1, arg - 1, arg * 2, 0, 1, -1, rng.choice(INTEGERS)))
        return number_code(value)
    if isinstance(arg, int):  # the memo
        value = max(0, rng.choice((arg + 1, arg - 1, 0, 1000, 2**31 - 1)))
        letter = b"h" if "GET" in name else b"q"
        return (
            letter + bytes([value])
            if value < 256
            else letter.translate(bytes.maketrans(b"hq", b"jr")) + struct.pack("<I", value)
        )
    if name == "GLOBAL":
        return b"c" + rng.choice(GLOBALS).replace(" ", "\n").encode() + b"\n"
    if isinstance(arg, str):
        texts = (
            arg + "x",
            arg[:-1],
            "_orig_mod." + arg,
            "module." + arg,
            arg.upper(),
            rng.choice(TEXTS),
            arg * 3,
            "cuda:0",
            "meta",
            "0",
            "1",
        )
        return text_code(rng.choice(texts))
    return original


def number_code(value: int) -> bytes:
    """A pickle instruction for a whole number."""
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def text_code(value: str) -> bytes:
    """A pickle instruction for a text."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


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


def is_zip(path: Path) -> bool:
    """Whether zipfile reads its directory."""
    try:
        if not path.is_file():
            return False
        with zipfile.ZipFile(path) as archive:
            return bool(archive.namelist())
    except Exception:
        return False


def opened(folder: Path, name: str, originals: Originals, intact: bool | None, use_cli: bool = False):
    """Open it as export does, and hold what is accepted against an independent reading."""
    from lrt_deploy.checkpoint import open_checkpoint

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


# --- native safetensors -------------------------------------------------------------------------------------------


def native(rng: random.Random, place: Path, originals: Originals) -> Trial:
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
    from lrt_deploy.checkpoint import open_checkpoint

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
