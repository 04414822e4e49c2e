"""Inputs that once did harm, one test each: what was found by the fuzz suite and by attack, and mended.

Each ends in a refusal that names the thing, or in the very numbers of the undamaged original; what came of it before
is in the test's name or beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest

import lrt_deploy
from hostile import trial
from hostile.kinds import bundles, checkpoints, configs, inputs, small_files, states, tokenizer_files
from hostile.kinds import graphs as graph_kinds
from hostile.kinds.checkpoints import META, MODEL
from hostile.kinds.zip_archives import Record, read_records, write_records
from hostile.originals import Originals, encoding_state, pickled
from hostile.trial import EQUAL, REFUSED, Trial

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bounds memory by Linux's own means")


@pytest.fixture(scope="module")
def originals(originals_folder):
    return Originals(originals_folder)


def verdict_of(act, place: Path, *names: str, writes: tuple[str, ...] = ()) -> str:
    result = trial.run(Trial("", True, act, names, writes), place, ())
    assert result.verdict in trial.FINE, f"{result.verdict}: {result.detail}"
    return result.verdict


# --- checkpoints ---------------------------------------------------------------------------------------------------


def checkpoint(place: Path, originals: Originals, data: bytes) -> Path:
    (folder := place / "checkpoint").mkdir()
    (folder / META).write_bytes(originals.bytes_of(f"lrt/{META}"))
    (folder / MODEL).write_bytes(data)
    return folder


def refused_checkpoint(place: Path, originals: Originals, data: bytes) -> None:
    folder = checkpoint(place, originals, data)
    assert verdict_of(lambda: checkpoints.opened(folder, "lrt", originals, False), place, MODEL) == REFUSED


def test_a_zeroed_page_of_weights_no_longer_exports_another_model(originals, tmp_path):
    data = bytearray(originals.bytes_of(f"lrt/{MODEL}"))
    record = max(read_records(bytes(data)), key=lambda found: len(found.data))
    data[record.start : record.start + 4096] = bytes(4096)
    refused_checkpoint(tmp_path, originals, bytes(data))


GADGETS = {
    "a storage that is a byte short": None,
    "a gigabyte from bytearray": b"cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R0",
    "uninitialized memory from FloatTensor": b"ctorch\nFloatTensor\nK\x10K\x10\x86R0",
    "a global with a name of 120 kB": b"c" + b"A" * 120_000 + b"\nB\n0",
    "a command": b"cos\nsystem\nX\x04\x00\x00\x00true\x85R0",
}


@pytest.mark.parametrize("name", GADGETS)
def test_pickles_of_weights(name, originals, tmp_path):
    records = read_records(originals.bytes_of(f"lrt/{MODEL}"))
    if (gadget := GADGETS[name]) is None:
        record = next(found for found in records if "/data/" in found.name)
        record.data = record.data[:-1]
    else:
        record = next(found for found in records if found.name.endswith("data.pkl"))
        record.data = record.data[:2] + gadget + record.data[2:]
    refused_checkpoint(tmp_path, originals, write_records(records))


def test_two_records_of_one_name(originals, tmp_path):
    records = read_records(originals.bytes_of(f"lrt/{MODEL}"))
    double = Record(records[5].name, bytes(len(records[5].data)))
    refused_checkpoint(tmp_path, originals, write_records([*records, double]))


def test_a_deflated_record_that_grows_to_300_mb(originals, tmp_path):
    records = read_records(originals.bytes_of(f"lrt/{MODEL}"))
    next(found for found in records if found.name.endswith("data.pkl")).bomb(b"\x80\x02", 3 * 10**8)
    refused_checkpoint(tmp_path, originals, write_records(records))


@pytest.mark.parametrize(("key", "value"), [("rope_base", 100_000), ("n_layer", 4_000_000), ("n_embd", 2**22)])
def test_fields_of_configs_that_were_ignored_or_cost_gigabytes(key, value, originals, tmp_path):
    folder = checkpoint(tmp_path, originals, originals.bytes_of(f"lrt/{MODEL}"))
    meta = json.loads((folder / META).read_bytes())
    meta["model_config"][key] = value
    data = json.dumps(meta).encode()
    (folder / META).write_bytes(data)
    assert verdict_of(lambda: configs.opened(folder, "lrt", data, originals, False), tmp_path, key, MODEL) == REFUSED


# --- tokenizers ----------------------------------------------------------------------------------------------------


def chain(count: int) -> dict[bytes, int]:
    return {bytes([i]): i for i in range(256)} | {b"a" * (2 + i): 256 + i for i in range(count)}


@pytest.mark.parametrize(
    "ranks", [chain(1000), chain(3) | {b"b" * 400_000: 259}], ids=["1000 tokens of one letter", "a token of 400 kB"]
)
def test_vocabularies_that_cost_gigabytes(ranks, tmp_path):
    state = encoding_state() | {"mergeable_ranks": ranks, "special_tokens": {"<|bos|>": len(ranks)}}
    (folder := tmp_path / "tokenizer").mkdir()
    (folder / "tokenizer.pkl").write_bytes(data := pickled(state))
    verdict_of(lambda: tokenizer_files.as_pickle_reads_it(folder / "tokenizer.pkl", data), tmp_path, "token")


NORMALIZERS = {
    "a pattern that never ends": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
    "text that doubles": {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "$0$0" * 9}] * 12,
    },
}


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("in_bundle", [False, True])
def test_normalizers(name, in_bundle, originals, tmp_path):
    fields = json.loads(originals.bytes_of("bundle/tokenizer/tokenizer.json"))
    fields["normalizer"] = NORMALIZERS[name]
    assert tokenizer(fields, in_bundle, originals, tmp_path) == REFUSED


@pytest.mark.parametrize("pattern", [r"[a]*" * 10, r"\p{L}*\p{L}*1|\p{L}", r"(a+)+$"])
def test_patterns_that_hang_or_panic(pattern, originals, tmp_path):
    fields = json.loads(originals.bytes_of("bundle/tokenizer/tokenizer.json"))
    tokenizer_files.first_split(fields["pre_tokenizer"])["pattern"] = {"Regex": pattern}
    assert tokenizer(fields, True, originals, tmp_path) == REFUSED


def tokenizer(fields: dict, in_bundle: bool, originals: Originals, place: Path) -> str:
    (folder := place / "tokenizer").mkdir()
    (folder / "tokenizer.json").write_bytes(data := json.dumps(fields).encode())
    (folder / "token_bytes.json").write_bytes(originals.bytes_of("bundle/tokenizer/token_bytes.json"))
    return verdict_of(
        lambda: tokenizer_files.as_the_library_reads_it(folder, data, originals, in_bundle), place, "tokenizer"
    )


def test_a_byte_count_that_is_no_whole_number(originals, tmp_path):
    bundle = bundles.linked(originals.folder / "bundle", tmp_path / "bundle")
    text = (bundle / "tokenizer/token_bytes.json").read_text()
    bundles.put(bundle / "tokenizer/token_bytes.json", json.dumps([float(n) for n in json.loads(text)]).encode())
    bundles.seal(bundle, originals.bytes_of("bundle/manifest.json").decode())
    opened(bundle, "bundle", originals, tmp_path)
    with lrt_deploy.open_decoder(bundle) as decoder:
        assert {type(count) for count in decoder.tokenizer.byte_lengths} == {int}


# --- bundles -------------------------------------------------------------------------------------------------------


def opened(bundle: Path, name: str, originals: Originals, place: Path, use_cli: bool = False) -> str:
    return verdict_of(lambda: bundles.opened(bundle, name, originals, False, None, use_cli), place, *bundles.NAMES)


@pytest.mark.parametrize("kind", ["overlap", "misaligned", "gap", "behind"])
def test_tables_that_do_not_tile_their_file(kind, originals, tmp_path):
    bundle = bundles.linked(originals.folder / "hosted", tmp_path / "bundle")
    fields = json.loads(originals.bytes_of("hosted/manifest.json"))
    first, second = fields["tables"]["fp32"].values()
    if kind == "behind":
        first["offset"] = second["offset"] + 4096
    elif kind == "overlap":
        first["offset"] = second["offset"] = 0
    else:
        path = bundle / "graphs/fp32/tables.bin"
        bundles.put(path, path.read_bytes() + bytes(8192))
        second["offset"] += 4 if kind == "misaligned" else 4096
    bundles.seal(bundle, json.dumps(fields))
    assert opened(bundle, "hosted", originals, tmp_path) == REFUSED


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("precision_details", "calibration"), ["text"]),
        (("precision_details", "fp32", "operations", "windowed", "matmul"), [["float32", 12]]),
        (("precision_details", "fp32"), [1]),
        (("provenance", "checkpoint"), [1]),
        (("provenance", "versions"), "x"),
    ],
)
def test_inspect_of_details_of_another_form(path, value, originals, tmp_path):
    bundle = bundles.linked(originals.folder / "bundle", tmp_path / "bundle")
    fields = json.loads(originals.bytes_of("bundle/manifest.json"))
    holder = fields
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    bundles.seal(bundle, json.dumps(fields))
    opened(bundle, "bundle", originals, tmp_path, use_cli=True)
    opened(bundle, "bundle", originals, tmp_path)


@pytest.mark.parametrize("use_cli", [False, True])
def test_a_manifest_that_is_no_text_with_a_fitting_digest(use_cli, originals, tmp_path):
    bundle = bundles.linked(originals.folder / "bundle", tmp_path / "bundle")
    data = originals.bytes_of("bundle/manifest.json").replace(b"checkpoint", b"check\xe4oint")
    bundles.put(bundle / "manifest.json", data)
    bundles.put(bundle / "manifest.sha256", f"{hashlib.sha256(data).hexdigest()}  manifest.json\n".encode())
    assert opened(bundle, "bundle", originals, tmp_path, use_cli) == REFUSED


@pytest.mark.parametrize(
    "file", ["manifest.json", "manifest.sha256", "tokenizer/tokenizer.json", "graphs/fp32/weights.bin"]
)
@pytest.mark.parametrize("kind", ["fifo", "zero", "loop"])
def test_pipes_devices_and_loops_in_a_bundle(file, kind, originals, tmp_path):
    bundle = bundles.linked(originals.folder / "bundle", tmp_path / "bundle")
    (path := bundle / file).unlink()
    odd(path, kind)
    assert opened(bundle, "bundle", originals, tmp_path) == REFUSED


def odd(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "zero" else path.name)


SWAPPED = (
    "bundle/graphs/fp32/decode_step.windowed.onnx",
    "bundle/graphs/fp32/prefill.onnx",
    "hosted/graphs/fp32/prefill.windowed.onnx",
    "narrow/graphs/int8/decode_step.onnx",
)


@pytest.mark.parametrize("other", SWAPPED)
def test_another_graph_under_the_name_of_the_one_that_runs(other, originals, tmp_path):
    verdict = graph(originals.bytes_of(other), originals, tmp_path)
    assert verdict in (REFUSED, EQUAL)


@pytest.mark.parametrize("kind", ["expand", "shape_of", "tile", "loop", "range", "pow", "repeat", "chain", "deep"])
def test_graphs_that_cost_more_than_they_weigh(kind, originals, tmp_path):
    import onnx

    class First(Random):
        """Chooses the bomb of this kind, and the largest of everything else."""

        def choice(self, options):
            return kind if kind in options else options[-1]

    model = onnx.ModelProto.FromString(originals.bytes_of("bundle/graphs/fp32/prefill.windowed.onnx"))
    graph_kinds.bombs(First(1), model, onnx)
    graph(model.SerializeToString(), originals, tmp_path)
    file = tmp_path / "bundle/graphs/fp32/prefill.windowed.onnx"
    verdict_of(lambda: graph_kinds.inspected(file), tmp_path)


def graph(data: bytes, originals: Originals, place: Path) -> str:
    bundle = bundles.linked(originals.folder / "bundle", place / "bundle")
    file = "graphs/fp32/prefill.windowed.onnx"
    bundles.put(bundle / file, data)
    bundles.seal(bundle, originals.bytes_of("bundle/manifest.json").decode())
    return verdict_of(lambda: graph_kinds.opened(bundle, "bundle", "fp32", file, originals), place, *bundles.NAMES)


@pytest.mark.parametrize("content", ["fifo", "zero", b"3", b"[1]", b'{"a": null}', b"[" * 100_000, b"9" * 5000])
def test_the_memory_of_hashes_survives_any_content(content, originals, tmp_path, monkeypatch):
    memory = tmp_path / "cache-home" / "lrt-deploy" / "verified.json"
    memory.parent.mkdir(parents=True)
    if isinstance(content, str):
        odd(memory, content)
    else:
        memory.write_bytes(content)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))
    act = lambda: bundles.must_be_equal(originals.folder / "large", "large", originals, None)  # noqa: E731
    assert verdict_of(act, tmp_path, writes=("cache-home",)) == EQUAL


# --- states, caches, engines, recordings ---------------------------------------------------------------------------


def test_a_state_with_a_deep_book_and_a_fitting_checksum(originals, tmp_path):
    (path := tmp_path / "chat.state").write_bytes(data := deep_state(originals.bytes_of("one.state")))
    assert (
        verdict_of(lambda: states.loaded(path, "one.state", data, True, originals), tmp_path, "chat.state") == REFUSED
    )


def deep_state(data: bytes) -> bytes:
    header, metadata, body = states.take_apart(data)
    metadata["book"] = metadata["book"].rstrip()[:-1] + ', "zz": ' + "[" * 5000 + "]" * 5000 + "}"
    return states.sealed(header, metadata, body)


@pytest.mark.parametrize("kind", ["fifo", "zero", "loop", "deep"])
def test_odd_entries_of_a_prompt_cache_are_passed_over(kind, originals, tmp_path):
    import shutil

    shutil.copytree(originals.folder / "cache", folder := tmp_path / "cache")
    entry = next(folder.rglob("*.state"))
    data = entry.read_bytes()
    entry.unlink()
    if kind == "deep":
        entry.write_bytes(deep_state(data))
    else:
        odd(entry, kind)
    assert verdict_of(lambda: states.from_cache(folder, 24, False, originals), tmp_path, writes=("cache",)) == EQUAL


@pytest.mark.parametrize("value", [[True], ["fp32"], [1], [["8.6"]], "8.6", {"a": 1}, ["8.98.9"], ["9" * 5000]])
def test_compute_capabilities_of_another_form(value, originals, tmp_path):
    import shutil

    shutil.copytree(originals.folder / "engine", folder := tmp_path / "engine")
    original = json.loads((folder / "lrt.plan.json").read_bytes())
    data = json.dumps(original | {"compute_capabilities": value}).encode()
    (folder / "lrt.plan.json").write_bytes(data)
    for use_cli in (False, True):
        act = lambda: small_files.engine(folder / "lrt.plan", data, original, use_cli)  # noqa: B023, E731
        assert verdict_of(act, tmp_path, "lrt.plan") == REFUSED


HEADER = b"\x93NUMPY\x01\x00"
MEMBERS = {
    "empty": b"",
    "braces": HEADER + b"\x32\x00" + b"{" * 50,
    "5000 digits": HEADER
    + b"\xff\x1f"
    + (b"{'descr': '<i8', 'fortran_order': False, 'shape': (" + b"9" * 5000 + b",), }").ljust(8191),
    "a pickle": HEADER
    + b"v\x00"
    + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117)
    + b"\ncos\nsystem\n.",
}


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("name", ["golden.npz", "rows.npz"])
def test_members_of_archives(name, member, originals, tmp_path):
    records = [Record("ids.npy" if name == "golden.npz" else "x.npy", MEMBERS[member])]
    with np.load(originals.folder / name) as file:
        for key in file:
            if f"{key}.npy" != records[0].name:
                import io

                np.save(buffer := io.BytesIO(), file[key])
                records.append(Record(f"{key}.npy", buffer.getvalue()))
    (path := tmp_path / name).write_bytes(write_records(records, padded=False))
    assert verdict_of(lambda: small_files.recorded(path, originals), tmp_path, name) == REFUSED


def test_an_archive_of_3_mb_that_is_3_gb(originals, tmp_path):
    record = Record("x.npy", b"")
    text = b"{'descr': '<i8', 'fortran_order': False, 'shape': (2, 180000000), }".ljust(117) + b"\n"
    record.bomb(HEADER + len(text).to_bytes(2, "little") + text, 3 * 10**8)
    (path := tmp_path / "rows.npz").write_bytes(write_records([record, Record("y.npy", b"")], padded=False))
    assert verdict_of(lambda: small_files.recorded(path, originals), tmp_path, "rows.npz") == REFUSED


# --- what a caller hands in ----------------------------------------------------------------------------------------

ROWS = {
    "true": [True, 5],
    "true among ids": [5, True],
    "numpy true": np.array([True]),
    "a length that lies": inputs.Length(10**9),
    "beyond 64 bits": [2**64],
    "beyond int64": np.array([2**63], np.uint64),
    "a number": 5,
    "nothing": None,
    "a class": object,
    "bytes": b"abc",
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("use", ["prefill", "step", "generate", "continue", "rows"])
def test_rows_that_are_none(name, use, originals, tmp_path):
    row = ROWS[name]
    act = {
        "prefill": lambda: inputs.read(originals, [row]),
        "step": lambda: inputs.stepped(originals, row),
        "generate": lambda: inputs.generated(originals, row),
        "continue": lambda: inputs.continued(originals, row),
        "rows": lambda: inputs.picked(originals, row),
    }[use]
    assert verdict_of(act, tmp_path) == REFUSED


OPTIONS = [
    *[("generate", {"max_new_tokens": value}) for value in (None, float("nan"), True, "5", [5], 10**400)],
    *[("generate", {"stop_ids": value}) for value in (["a"], 5, [None], [1.5], [270], "a", [-1])],
    *[("generate", {"stop_strings": value}) for value in (3j, 5, [5], "a", [""])],
    *[("generate", {"seed": value}) for value in (1.5, "a", True, -1)],
    *[("prefill", {"state": value}) for value in (0, 1.0, 3j, b"5", [5], {5})],
    *[("prefill", {"policy": value}) for value in (None, 3, [], "fast")],
    *[("prefill", {"tolerance": value}) for value in ("a", float("nan"), [], -1.0, True)],
    *[("open", {"max_seq_len": value}) for value in (1.5, np.float32(5), [5.0], "5", True, 65)],
    *[("open", {"threads": value}) for value in (1.5, "1", 10**9, True, [])],
    *[("open", {"precision": value}) for value in (5, [], {5}, "fp64")],
    *[("open", {"backend": value}) for value in (None, 5, [], "cpu")],
]


@pytest.mark.parametrize(("kind", "values"), OPTIONS, ids=[f"{k} {v}"[:60] for k, v in OPTIONS])
def test_options_of_other_types_and_sizes(kind, values, originals, tmp_path):
    verdict = verdict_of(lambda: inputs.used(originals, kind, values, tmp_path), tmp_path)
    assert verdict == REFUSED


METHODS = [
    *[
        ("state", method, value)
        for method in ("load_state", "save")
        for value in (0, range(3), {5}, b"5", None, np.array([5]))
    ],
    *[("state", "rewind", value) for value in (1.5, True, "a", None, [1, 2], -1, 7)],
    *[("state", "add", value) for value in (5, "a", [])],
    *[("state", "drop", value) for value in (5, "a", True, None, -1)],
    *[("methods", "new_state", value) for value in (True, 1.5, "a", [], 0, 10**9)],
    *[("methods", "adopt", value) for value in (5, "a", None)],
    *[("methods", "decode", value) for value in (319, 1.5, None, object)],
    *[("methods", "decode_many", value) for value in (b"5", {}, 270, 1.5, True, np.array([5.0]))],
    *[("methods", "token_bytes_of", value) for value in ("5", np.bool_(True), None, -1)],
]


@pytest.mark.parametrize(("kind", "method", "value"), METHODS, ids=[f"{m} {v}"[:60] for _, m, v in METHODS])
def test_arguments_of_methods(kind, method, value, originals, tmp_path):
    act = lambda: inputs.called(originals, kind, method, value, tmp_path)  # noqa: E731
    assert verdict_of(act, tmp_path) == REFUSED


@pytest.mark.parametrize(
    "messages", [None, 3, "user", {}, [None], [{"role": "user"}], [{"role": ["user"], "content": "x"}]]
)
def test_conversations_that_are_none(messages, originals, tmp_path):
    assert verdict_of(lambda: inputs.encoded(originals, "chat", "", messages), tmp_path) == REFUSED


@pytest.mark.parametrize("piece", [" ", "\t", "\n", "a", "1", "!"])
def test_very_long_runs_of_one_character_are_encoded(piece, originals, tmp_path):
    def act():
        originals.decoder.tokenizer.encode(piece * 500_000)
        return EQUAL, ""

    verdict_of(act, tmp_path)


def test_a_prompt_that_once_failed_leaves_the_decoder_as_it_was(originals):
    from hostile.originals import decoded

    for row in ROWS.values():
        with pytest.raises(lrt_deploy.InputError):
            originals.decoder.prefill([row])
    assert np.array_equal(decoded(originals.decoder), originals.numbers["bundle"])


def test_metadata_of_a_graph_that_are_no_text(originals, tmp_path):
    data = originals.bytes_of("bundle/graphs/fp32/prefill.windowed.onnx")
    assert graph(data.replace(b'"vocab_size"', b'"vocab_\xff\xfee"'), originals, tmp_path) == REFUSED


def test_a_state_whose_array_is_of_an_unknown_type(originals, tmp_path):
    header, metadata, body = states.take_apart(originals.bytes_of("one.state"))
    header["0.tokens"]["dtype"] = "C64"
    (path := tmp_path / "chat.state").write_bytes(data := states.sealed(header, metadata, body))
    assert (
        verdict_of(lambda: states.loaded(path, "one.state", data, True, originals), tmp_path, "chat.state") == REFUSED
    )


def test_a_graph_that_is_refused_in_words_that_are_no_text(originals, tmp_path):
    data = originals.bytes_of("bundle/graphs/fp32/prefill.windowed.onnx")
    assert graph(data.replace(b"TensorScatter", b"Tensor\xdcca\xfeter"), originals, tmp_path) == REFUSED

    def act():  # ONNX Runtime's own retry printed to stdout, into the JSON
        trial.command("generate", str(tmp_path / "bundle"), "--tokens", "1,2", "--json")
        return EQUAL, ""

    assert verdict_of(act, tmp_path, "prefill.windowed.onnx") == REFUSED


@pytest.mark.parametrize("kind", ["fifo", "zero", "loop"])
def test_a_state_that_is_no_file(kind, originals, tmp_path):
    odd(path := tmp_path / "chat.state", kind)
    assert (
        verdict_of(lambda: states.loaded(path, "one.state", b"", False, originals), tmp_path, "chat.state") == REFUSED
    )


def test_an_unknown_field_in_a_profile_of_an_engine(originals, tmp_path):
    import shutil

    shutil.copytree(originals.folder / "engine", folder := tmp_path / "engine")
    original = json.loads((folder / "lrt.plan.json").read_bytes())
    fields = json.loads(json.dumps(original))
    fields["profiles"][0]["zz"] = 1
    (folder / "lrt.plan.json").write_bytes(data := json.dumps(fields).encode())
    act = lambda: small_files.engine(folder / "lrt.plan", data, original, False)  # noqa: E731
    assert verdict_of(act, tmp_path, "lrt.plan") == REFUSED


def test_inspect_of_a_graph_with_deep_metadata(originals, tmp_path):
    import onnx

    model = onnx.ModelProto.FromString(originals.bytes_of("bundle/graphs/fp32/prefill.windowed.onnx"))
    next(entry for entry in model.metadata_props if entry.key == "lrt_deploy.contract").value = "[" * 100_000
    (path := tmp_path / "prefill.onnx").write_bytes(model.SerializeToString())
    assert verdict_of(lambda: graph_kinds.inspected(path), tmp_path, "prefill.onnx") == REFUSED
