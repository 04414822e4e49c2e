"""Engine sidecars, recorded arrays, and text files: prompts, evaluation text, calibration."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np

from hostile.mutate import INTEGERS, changed_json, changed_text, damage, is_json, odd_file, scalar, text_of
from hostile.originals import CAPACITY, SIZES, Originals
from hostile.trial import EQUAL, OTHER, WRONG, Trial, command

from .inputs import odd_text
from .zip_archives import Record, is_zip, write_records


def sidecars(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """A changed sidecar of an engine, or a changed plan beside it."""
    folder = place / "engine"
    shutil.copytree(originals.folder / "engine", folder)
    plan, path = folder / "lrt.plan", folder / "lrt.plan.json"
    original = json.loads(path.read_bytes())
    data = path.read_bytes()
    kind = rng.choices(("field", "json", "text", "plan", "odd"), (40, 34, 14, 9, 3))[0]
    if kind == "field":
        fields = json.loads(json.dumps(original))
        key = rng.choice(list(fields))
        fields[key] = rng.choice((scalar(rng), rng.choice(INTEGERS), [scalar(rng)], {"a": scalar(rng)}))
        what, data = f"{key} = {str(fields[key])[:60]!a}", text_of(fields).encode("utf-8", "surrogatepass")
    elif kind == "json":
        fields, what = changed_json(
            rng, original, rng.choice(((), ("profiles",), ("inputs",), ("compute_capabilities",)))
        )
        data = text_of(fields).encode("utf-8", "surrogatepass")
    elif kind == "text":
        data, what = changed_text(rng, data.decode())
    elif kind == "plan":
        changed, what = damage(rng, plan.read_bytes())
        plan.write_bytes(changed)
        if rng.random() < 0.4:
            fields = original | {"plan_bytes": len(changed), "plan_sha256": hashlib.sha256(changed).hexdigest()}
            data, what = text_of(fields).encode(), f"sealed {what}"
    path.write_bytes(data)
    if kind == "odd":
        what = odd_file(rng, rng.choice((path, plan)))
    use_cli = rng.random() < 0.25
    return Trial(
        f"{kind}: {what}",
        kind != "odd" and is_json(data),
        lambda: engine(plan, data, original, use_cli),
        ("lrt.plan", "engine"),
    )


def engine(plan: Path, data: bytes, original: dict, use_cli: bool):
    """Read sidecar and plan as a runtime does: they must be what the files say."""
    from lrt_deploy.bundle.engine_sidecar import read_plan, read_sidecar, runs_on

    if use_cli:
        command("inspect", str(plan), "--json", "--verify")
        return OTHER, "inspected"
    sidecar = read_sidecar(plan)
    found = read_plan(plan, sidecar)
    if hashlib.sha256(found).hexdigest() != sidecar.plan_sha256:
        return WRONG, "another plan than the sidecar says"
    runs_on(sidecar.compute_capabilities, (8, 9))
    sidecar.profile("decode")
    fields = json.loads(data)
    if json.loads(json.dumps(sidecar.to_dict())) != {"smoke": {}} | fields:  # the one field that may be missing
        return WRONG, "read otherwise than the file says"
    return (EQUAL if fields == original else OTHER), ""


def recordings(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """A changed npz of recorded arrays, or of token rows."""
    name = rng.choice(("golden.npz", "golden.npz", "rows.npz"))
    path = place / name
    with np.load(originals.folder / name) as file:
        arrays = dict(file)
    kind = rng.choices(("arrays", "members", "header", "raw", "odd"), (42, 22, 18, 16, 2))[0]
    data = originals.bytes_of(name)
    if kind == "raw":
        data, what = damage(rng, data)
    elif kind == "arrays":
        what = changed_arrays(rng, arrays)
        file = io.BytesIO()
        try:
            np.savez(file, **arrays)
            data = file.getvalue()
        except (ValueError, TypeError):
            what = "unchanged"
    else:
        data, what = changed_members(rng, data, kind)
    path.write_bytes(data)
    if kind == "odd":
        what = odd_file(rng, path)
    return Trial(
        f"{kind}: {what}", kind != "odd" and is_zip(path), lambda: recorded(path, originals), (name, "token id", "row")
    )


def changed_arrays(rng: random.Random, arrays: dict[str, np.ndarray]) -> str:
    """Other numbers, types, shapes or names."""
    name = rng.choice(list(arrays))
    array = arrays[name]
    kind = rng.choice(
        ["value", "type", "shape", "short", "drop", "rename", "extra", "empty", "scalar", "text", "nan", "id", "big"]
    )
    if kind == "value":
        arrays[name] = array + 1
    elif kind == "type":
        arrays[name] = array.astype(
            rng.choice(
                (
                    "float64",
                    "float16",
                    "int32",
                    "int8",
                    "uint64",
                    "bool",
                    "complex64",
                    "S5",
                    ">f4",
                    ">i8",
                    "datetime64[s]",
                )
            )
        )
    elif kind == "shape":
        arrays[name] = rng.choice((array.reshape(-1), array[None], array.swapaxes(0, 1), array[..., None]))
    elif kind == "short":
        arrays[name] = rng.choice((array[:1], array[:, :-1], array[:, :0], array[:0]))
    elif kind == "drop":
        del arrays[name]
    elif kind == "rename":
        arrays[rng.choice(("seq_logits_last4", "seq_logits9", "x", "ids2", "../x"))] = arrays.pop(name)
    elif kind == "extra":
        arrays[rng.choice(("seq_logits_last2", "zz", "config_json"))] = array[:, :2]
    elif kind == "empty":
        arrays[name] = np.zeros(0)
    elif kind == "scalar":
        arrays[name] = np.array(rng.choice((1, 1.5, "text")))
    elif kind == "text":
        arrays[name] = np.array([["a", "b"]])
    elif kind == "nan" and array.dtype.kind == "f":
        arrays[name] = np.full_like(array, rng.choice((np.nan, np.inf)))
    elif kind == "id" and array.dtype.kind == "i":
        arrays[name] = array.copy()
        arrays[name].reshape(-1)[rng.randrange(array.size)] = rng.choice((-1, -2, 270, 2**40, -(2**63)))
    elif kind == "big" and array.dtype.kind == "i":
        arrays[name] = array.astype(np.uint64) + np.uint64(2**63)
    return f"{kind} of {name}"


def changed_members(rng: random.Random, data: bytes, kind: str) -> tuple[bytes, str]:
    """The archive's members: headers of arrays, doubled, packed, of sizes that do not fit, pickled."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [Record(info.filename, archive.read(info)) for info in archive.infolist()]
    record = rng.choice(records)
    if kind == "header":
        old = record.data[10 : 10 + record.data[8] + 256 * record.data[9]]
        new = rng.choice(
            (
                *(
                    old.replace(b"(2, 12", b"(200000, 120000"),
                    old.replace(b"(2, 1", b"(-2, 1"),
                    old.replace(b"<i8", b"|O"),
                    old.replace(b"<f4", b"|O"),
                ),
                *(
                    old.replace(b"False", b"True"),
                    old.replace(b"<f4", b"<f8"),
                    old.replace(b"<i8", b"<i4"),
                    b"{" * 50,
                    b"__import__('os')" + old,
                ),
                *(
                    old.replace(b"(2,", b"(" + b"9" * 5000 + b","),
                    old.replace(b"shape", b"shap"),
                    b"(" * 3000 + old,
                    old.replace(b"(2, 12", b"(1000000, 1000"),
                ),
            )
        )
        start = rng.choice((b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00", b"\x93NUMPY\x09\x00", b"\x93NUMPX\x01\x00"))
        length = (
            len(new).to_bytes(4 if start[6] == 2 else 2, "little", signed=False)
            if len(new) < 65_536
            else b"\xff\xff\xff\xff"
        )
        record.data = start + length + new + record.data[10 + len(old) :]
        return write_records(records, padded=False), f"header {new[:60]!a}"
    what = rng.choice(["double", "deflate", "bomb", "crc", "size", "rename", "drop", "raw", "empty", "pickle"])
    if what == "double":
        records.append(Record(record.name, damage(rng, record.data)[0]))
    elif what == "deflate":
        record.method = 8
    elif what == "bomb":
        old = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 12, 1000000), }"
        count = rng.choice((10**6, 3 * 10**8))
        header = old.replace(b"1000000", str(count // 24 // 4).encode()).ljust(117) + b"\n"
        record.bomb(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header, count)
    elif what == "crc":
        record.crc = rng.randrange(2**32)
    elif what == "size":
        record.size = rng.choice((0, 5, 2**32 - 1))
    elif what == "rename":
        record.name = rng.choice(("ids", "x.npz", "../ids.npy", "", "seq_logits.npy/x"))
    elif what == "drop":
        records.remove(record)
    elif what == "raw":
        record.data = rng.randbytes(300)
    elif what == "empty":
        record.data = b""
    else:
        record.data = (
            b"\x93NUMPY\x01\x00v\x00"
            + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117)
            + b"\n"
            + b"cos\nsystem\n(S'true'\ntR."
        )
    return write_records(records, padded=False), f"{what} of {record.name}"


def recorded(path: Path, originals: Originals):
    """Read it as parity or evaluation does: the arrays are those that numpy reads."""
    from lrt_deploy.evaluation.bits_per_byte import rows_from_npz
    from lrt_deploy.evaluation.checks import compare_with_recording, read_recording
    from lrt_deploy.tolerances import limits

    with np.load(originals.folder / path.name) as file:
        original = dict(file)
    if path.name == "rows.npz":
        x, y = rows_from_npz(path)
        with np.load(path) as file:
            if not (np.array_equal(x, file["x"]) and np.array_equal(y, file["y"])):
                return WRONG, "other rows than numpy reads"
        equal = np.array_equal(x, original["x"]) and np.array_equal(y, original["y"])
        if equal or x.size < 200:
            from lrt_deploy.evaluation.bits_per_byte import evaluate

            evaluate(originals.decoder, x, y, originals.decoder.tokenizer.byte_lengths, 2)
        return (EQUAL if equal else OTHER), ""
    found = read_recording(path, originals.decoder.config)
    with np.load(path) as file:
        if not np.array_equal(found.ids, file["ids"]):
            return WRONG, "other ids than numpy reads"
    equal = np.array_equal(found.ids, original["ids"]) and np.array_equal(found.logits, original["seq_logits"])
    equal = equal and np.array_equal(found.latents, original["seq_h_final"])
    check = compare_with_recording(originals.decoder, found, limits("fp32"))
    if check.passed != equal and found.ids.shape == original["ids"].shape and not _nearly(found, original):
        return WRONG, f"passed is {check.passed}: {check.line}"
    return (EQUAL if equal else OTHER), ""


def _nearly(found, original) -> bool:
    return bool(np.allclose(found.logits[:, -2:], original["seq_logits"][:, -2:], atol=1e-2, rtol=0))


def text_files(rng: random.Random, place: Path, originals: Originals) -> Trial:
    """Prompt files, evaluation text and calibration text of any content."""
    path = place / "text.txt"
    text, what = odd_text(rng, 3000)
    data = text.encode("utf-8", "replace")
    kind = rng.choices(("utf-8", "surrogates", "damaged", "binary", "utf-16", "odd"), (62, 6, 16, 6, 6, 4))[0]
    if kind == "damaged":
        data, more = damage(rng, data)
        what += f", {more}"
    elif kind == "surrogates":
        data = text.encode("utf-8", "surrogatepass")
    elif kind == "binary":
        data = rng.randbytes(rng.choice((1, 50, 4000)))
    elif kind == "utf-16":
        data = text.encode("utf-16", "surrogatepass")
    path.write_bytes(data)
    if kind == "odd":
        what = odd_file(rng, path)
        data = path.read_bytes() if what == "pointer" else b""
    use = rng.choice(("prompt", "prompt", "prompt", "calibration", "calibration", "eval"))
    return Trial(
        f"{use} {kind}: {what}",
        kind != "odd" and is_text(data),
        lambda: read(path, use, data, originals),
        ("text", "prompt", "token", "tokens"),
    )


def is_text(data: bytes) -> bool:
    """Whether it is UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def read(path: Path, use: str, data: bytes, originals: Originals):
    """Use the file; the tokens must be those of its text."""
    from lrt_deploy.cli import options
    from lrt_deploy.exporters.quantize.calibrate import calibration_rows

    tokenizer = originals.decoder.tokenizer
    if use == "prompt":
        found = options.one_prompt(None, None, str(path))
        expected = data.decode("utf-8").removesuffix("\n").removesuffix("\r")
        if found != expected:
            return WRONG, "another text than the file holds"
        tokenizer.encode_prompt(found)
        return EQUAL, ""
    if use == "calibration":
        rows = calibration_rows(path, tokenizer, SIZES["vocab_size"], CAPACITY)
        if any(not 0 <= token < SIZES["vocab_size"] for row in rows.tokens for token in row):
            return WRONG, "ids beyond the vocabulary"
        return EQUAL, ""
    from lrt_deploy.evaluation.bits_per_byte import rows_from_text

    _x, y = rows_from_text(options.read_text(str(path)), tokenizer, CAPACITY)
    if [token for row in y for token in row] != tokenizer.encode(data.decode("utf-8")):
        return WRONG, "other tokens than the text has"
    return EQUAL, ""
