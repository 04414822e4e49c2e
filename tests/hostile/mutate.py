"""Generic mutations: of bytes, of JSON values, and of JSON text. Each says what it did."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

INTEGERS = (
    *(-1, 0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 127, 255, 256, 257, 1000, 4096, 65535, 2**20, 2**24),
    *(2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -(2**31), -(2**63), -(2**70)),
)
FLOATS = (0.0, -0.0, 0.5, 1.0, 1.5, 16.0, -3.25, 1e-20, 1e20, 1e308)
TEXTS = (
    *("", "0", "1", "16", "-1", "true", "null", "L", "SL", "fp32", "float32", "input_ids", "weights.bin", "../x"),
    *("/etc/passwd", "a/../../b", ".", "..", "\0", "\n", "é", "\ud800", "\u202e", "x" * 300, "%s%n", "{0}", "nan"),
    *("shared", "layerwise", "int8", "bfloat16", "\x1b[31m", "0" * 64, "F32", "BF16", "I64"),
)


def scalar(rng: random.Random) -> Any:
    """A value that is often of the wrong type or size."""
    kind = rng.randrange(9)
    if kind < 3:
        return rng.choice(INTEGERS)
    if kind < 4:
        return rng.choice(FLOATS)
    if kind < 6:
        return rng.choice(TEXTS)
    return rng.choice((None, True, False, [], {}, [1], [[]], {"a": 1}, [None], ["a", 1], {"": {}}, [0] * 50, [[[[1]]]]))


def near(rng: random.Random, value: Any) -> Any:
    """A value of the same type, nearby; or the same of another type."""
    if isinstance(value, bool):
        return rng.choice((not value, int(value), str(value), None))
    if isinstance(value, int):
        steps = (value + 1, value - 1, value * 2, value // 2, -value, value + 64, value ^ (1 << rng.randrange(12)))
        return rng.choice((*steps, float(value), str(value), value * 2**32, [value], 0, 1))
    if isinstance(value, float):
        return rng.choice((value + 1, -value, value * 1e10, int(value), str(value)))
    if isinstance(value, str):
        index = rng.randrange(len(value) + 1)
        changed = (value[:index] + value[index + 1 :], value[:index] + rng.choice("aZ0/._\0é") + value[index:])
        return rng.choice(
            (*changed, value.upper(), value.lower(), value * 2, value[::-1], "", value.encode().hex(), [value])
        )
    if isinstance(value, list):
        changed = list(value)
        rng.shuffle(changed)
        return rng.choice(
            (
                changed,
                value[:-1],
                value[1:],
                value + value[-1:],
                value * 3,
                [],
                dict(enumerate(value)),
                value[0] if value else 0,
            )
        )
    if isinstance(value, dict):
        return rng.choice(([*value], [*value.items()][:20], {}, dict.fromkeys(value), None))
    return scalar(rng)


def paths(value: Any, limit: int = 4000) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON document."""
    found: list[tuple[Any, ...]] = []
    pending: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while pending and len(found) < limit:
        path, item = pending.pop()
        keys = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        for key, child in keys:
            found.append((*path, key))
            pending.append(((*path, key), child))
    return found


def place_of(value: Any, path: tuple[Any, ...]) -> tuple[Any, Any]:
    """The container that holds the value at a path, and its key there."""
    for key in path[:-1]:
        value = value[key]
    return value, path[-1]


def pick_path(rng: random.Random, value: Any, under: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    """A path, shallow ones as often as deep ones."""
    for key in under:
        value = value[key]
    found = paths(value)
    depth = rng.choice(sorted({len(path) for path in found}))
    return (*under, *rng.choice([path for path in found if len(path) == depth]))


def change(rng: random.Random, value: Any, under: tuple[Any, ...] = ()) -> str:
    """Change one place of a JSON document in place; says where and how."""
    path = pick_path(rng, value, under)
    holder, key = place_of(value, path)
    kind = rng.randrange(10)
    label = "/".join(map(str, path))[:80]
    if kind < 2:
        holder[key] = scalar(rng)
        return f"{label} = {str(holder[key])[:60]!a}"
    if kind < 6:
        holder[key] = near(rng, holder[key])
        return f"{label} ~ {str(holder[key])[:60]!a}"
    if kind == 6:
        del holder[key]
        return f"without {label}"
    if kind == 7 and isinstance(holder, dict):
        name = rng.choice(
            ("zz", "", "n_heads", key.upper() if isinstance(key, str) else "K", "\ud800", "x" * 500, "rope_base")
        )
        holder[name] = rng.choice((scalar(rng), holder[key]))
        return f"{label}: also {name[:40]!a} = {str(holder[name])[:40]!a}"
    if kind == 8 and isinstance(holder, dict):
        name = near(rng, key)
        holder[name if isinstance(name, str) else str(name)] = holder.pop(key)
        return f"{label} renamed {str(name)[:40]!a}"
    other = pick_path(rng, value, under)
    try:
        second, name = place_of(value, other)
        second[name] = copy.deepcopy(holder[key])
    except (KeyError, IndexError, TypeError):
        holder[key] = None
    return f"{label} copied to {'/'.join(map(str, other))[:80]}"


def changed_json(rng: random.Random, original: Any, under: tuple[Any, ...] = (), most: int = 3) -> tuple[Any, str]:
    """A copy with one to a few changes."""
    value, said = copy.deepcopy(original), []
    for _ in range(rng.choice((1, 1, 1, 2, most))):
        try:
            said.append(change(rng, value, under))
        except (KeyError, IndexError, TypeError, AttributeError):
            break  # an earlier change has removed the place
    return value, "; ".join(said) or "nothing"


def text_of(value: Any, indent: int | None = 2) -> str:
    """As JSON; what JSON cannot say becomes a string."""
    return json.dumps(value, indent=indent, default=str)


def changed_text(rng: random.Random, text: str) -> tuple[bytes, str]:
    """JSON text with a change below the level of values."""
    data = text.encode("utf-8", "surrogatepass")
    kind = rng.randrange(12)
    if kind == 0:
        depth = rng.choice((50, 900, 1100, 50_000, 300_000))
        return b'{"model_config":' * depth + b"1" + b"}" * depth, f"objects nested {depth} deep"
    if kind == 1:
        depth = rng.choice((500, 5_000, 500_000))
        return data.rstrip()[:-1] + b', "zz": ' + b"[" * depth + b"]" * depth + b"}", f"a list nested {depth} deep"
    if kind == 2:
        digits = rng.choice((30, 4000, 4301, 100_000))
        return _number_replaced(rng, data, b"9" * digits), f"a number of {digits} digits"
    if kind == 3:
        word = rng.choice((b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"1.0", b"1E3", b"0x10", b"01"))
        return _number_replaced(rng, data, word), f"{word.decode()} for a number"
    if kind == 4:
        return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b" \n\t")) + data, "begins with other bytes"
    if kind == 5:
        return data + rng.choice((b"{}", b"\0", b"x", b"\n\n", data)), "something after the end"
    if kind == 6:
        return data.replace(b'": ', b'": ' + rng.choice((b"/**/", b"\t", b"\xa0", b"")), 3), "odd white space"
    if kind == 7:
        return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig"))), "another encoding"
    if kind == 8:
        return rng.choice(
            (
                b"",
                b"null",
                b"[]",
                b"{}",
                b"3",
                b'"x"',
                b"true",
                b"[{}]",
                b"{",
                b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
            )
        ), "another document"
    if kind == 9:
        at = data.find(b'"')
        return data[: at + 1] + b"\xed\xa0\x80\\ud800" + data[at + 1 :], "surrogates in a key"
    return damage(rng, data)


def _number_replaced(rng: random.Random, data: bytes, new: bytes) -> bytes:
    import re

    found = [match.span() for match in re.finditer(rb"(?<=[:\[ ,])-?\d+(?=[,\]}\n])", data)]
    if not found:
        return data + new
    start, stop = rng.choice(found)
    return data[:start] + new + data[stop:]


def damage(rng: random.Random, data: bytes, start: int = 0, stop: int | None = None) -> tuple[bytes, str]:
    """Bytes as a bad disk or a crude hand changes them, between two offsets."""
    stop = len(data) if stop is None else stop
    at = rng.randrange(start, max(stop, start + 1))
    length = min(stop - at, rng.choice((1, 2, 4, 16, 256, 4096)))
    kind = rng.randrange(9)
    if kind < 2:
        changed = bytearray(data)
        if changed:
            changed[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        return bytes(changed), f"a bit of byte {at}"
    if kind == 2:
        return data[:at] + rng.randbytes(length) + data[at + length :], f"{length} random bytes at {at}"
    if kind == 3:
        return data[:at] + b"\0" * length + data[at + length :], f"{length} zeros at {at}"
    if kind == 4:
        return data[:at], f"cut at {at}"
    if kind == 5:
        return data[:at] + data[at + length :], f"{length} bytes missing at {at}"
    if kind == 6:
        return data[:at] + rng.randbytes(rng.choice((1, 3, 100))) + data[at:], f"bytes put in at {at}"
    if kind == 7:
        return data + rng.choice((b"\0", b"\n", rng.randbytes(40), data[:100])), "bytes after the end"
    other = rng.randrange(start, max(stop, start + 1))
    return data[:at] + data[other : other + length] + data[at + length :], f"{length} bytes at {at} from {other}"


def is_json(data: bytes | str) -> bool:
    """Whether Python's parser takes it."""
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def odd_file(rng: random.Random, path) -> str:
    """Put something that is no regular file with content at a path."""
    import os

    path.unlink(missing_ok=True)
    kind = rng.choice(("fifo", "zero", "folder", "loop", "dangling", "empty", "missing", "pointer", "unreadable name"))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere/else")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n")
    elif kind == "unreadable name":
        path.symlink_to("x" * 250)
    return kind
