"""Pickles changed instruction by instruction."""

from __future__ import annotations

import pickle
import pickletools
import random
import struct

from hostile.mutate import INTEGERS, TEXTS

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
