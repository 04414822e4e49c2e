"""Checkpoints as files: found in every layout that training leaves, verified to the last bit, and never a program.

Whatever is wrong with a file is refused by name before anything of the size that it claims is made.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from random_models import random_model, write_native
from typer.testing import CliRunner

from lrt_deploy.cli.app import app
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import CheckpointError
from lrt_deploy.model.checkpoint import as_torch, open_checkpoint
from lrt_deploy.model.checkpoint_folder import STAGES, find_checkpoint
from lrt_deploy.model.pt_file import read_state_dict

GOLDEN = Path(__file__).parent / "data" / "golden" / "padded_vocab"
WEIGHTS, META = "model_000000.pt", "meta_000000.json"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in the authors' layout that a test may damage."""
    target = tmp_path / "checkpoint"
    target.mkdir()
    for name in (WEIGHTS, META):
        shutil.copyfile(GOLDEN / name, target / name)
    return target


@pytest.fixture
def native(tmp_path):
    sizes = {"sequence_len": 16, "vocab_size": 100, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 16}
    write_native(random_model(LRTConfig(**sizes)), tmp_path / "native")
    return tmp_path / "native"


def refused(path, *words, error=CheckpointError):
    with pytest.raises(error) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    assert len(message) < 1500
    return message


# Layouts


def tree(base, *names):
    """Copies of the checkpoint at these places, the step being the number in the name."""
    for name in names:
        place, _, step = name.partition(":")
        (base / place).mkdir(parents=True, exist_ok=True)
        for file in (WEIGHTS, META):
            shutil.copyfile(GOLDEN / file, base / place / file.replace("000000", f"{int(step):06d}"))
    return base


@pytest.mark.parametrize(
    ("places", "named", "found", "said"),
    [
        (["a:5"], "a", "a:5", None),
        (["a:5", "a:20", "a:100"], "a", "a:100", "took step 100: step 100 (the last; also there: 5, 20)"),
        (["base_checkpoints/d4:7"], ".", "base_checkpoints/d4:7", "took base_checkpoints/d4, step 7"),
        (["base_checkpoints/d4:7"], "base_checkpoints", "base_checkpoints/d4:7", "took d4, step 7"),
        (
            ["base_checkpoints/d4:7", "base_checkpoints/d20:3", "base_checkpoints/d9:9"],
            "base_checkpoints",
            "base_checkpoints/d20:3",
            "d20 (the largest depth; also there: d4, d9)",
        ),
        (
            ["base_checkpoints/d20:7", "mid_checkpoints/d20:8", "chatsft_checkpoints/d20:9"],
            ".",
            "chatsft_checkpoints/d20:9",
            "chatsft_checkpoints (the last stage; also there: base_checkpoints, mid_checkpoints)",
        ),
        (
            ["base_checkpoints/d20:7", "chatrl_checkpoints/d4:1", "chatrl_checkpoints/d4:2"],
            ".",
            "chatrl_checkpoints/d4:2",
            "step 2 (the last; also there: 1)",
        ),
        (["base_checkpoints/mine:7"], ".", "base_checkpoints/mine:7", "took base_checkpoints/mine, step 7"),
    ],
)
def test_the_last_stage_the_largest_depth_and_the_last_step_are_taken_and_said(tmp_path, places, named, found, said):
    opened = find_checkpoint(tree(tmp_path, *places) / named)
    place, _, step = found.partition(":")
    assert opened.weights == tmp_path / place / f"model_{int(step):06d}.pt"
    assert opened.config == tmp_path / place / f"meta_{int(step):06d}.json"
    assert opened.step == int(step)
    assert opened.chosen == said if said is None else said in opened.chosen


def test_a_choice_says_how_to_name_another(tmp_path):
    base = tree(tmp_path, "base_checkpoints/d4:1", "base_checkpoints/d4:2", "mid_checkpoints/d4:1")
    assert find_checkpoint(base).chosen.endswith("; name another by its folder, a step by --step")
    assert find_checkpoint(base / "base_checkpoints" / "d4").step == 2
    assert find_checkpoint(base / "base_checkpoints", 1).step == 1
    weights = base / "base_checkpoints" / "d4" / "model_000001.pt"
    assert find_checkpoint(weights).step == find_checkpoint(weights, 1).step == 1
    with pytest.raises(CheckpointError, match="is not of step 2"):
        find_checkpoint(weights, 2)
    with pytest.raises(CheckpointError, match="has no step 9; it has step 1, 2"):
        find_checkpoint(base / "base_checkpoints", 9)


def test_stages_without_models_are_passed_over(tmp_path):
    base = tree(tmp_path, f"{STAGES[0]}/d4:1")
    (base / STAGES[2] / "d4").mkdir(parents=True)
    (base / STAGES[2] / "d4" / "optim_000001_rank0.pt").touch()
    assert find_checkpoint(base).weights.parent == base / STAGES[0] / "d4"


def test_models_that_no_depth_orders_are_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="models large, small"):
        find_checkpoint(tree(tmp_path, "mid_checkpoints/small:1", "mid_checkpoints/large:1"))


def test_two_files_of_one_step_are_refused(folder):
    shutil.copy(folder / WEIGHTS, folder / "model_0.pt")
    refused(folder, "model_0.pt", WEIGHTS, "both of step 0")


@pytest.mark.parametrize("name", ["optim_000000_rank0.pt", "weights.pt", "other.safetensors", f"model_{'9' * 200}.pt"])
def test_another_file_beside_the_model_is_not_taken_for_it(folder, name):
    shutil.copy(folder / WEIGHTS, folder / name)
    refused(folder / name, name, "model_NNNNNN.pt")


def test_inspect_says_what_was_taken_and_what_it_is(tmp_path):
    base = tree(tmp_path, "base_checkpoints/d4:1", "chatsft_checkpoints/d4:2")
    result = CliRunner().invoke(app, ["inspect", str(base), "--json"])
    assert result.exit_code == 0, result.stderr
    fields = json.loads(result.stdout)
    assert fields["chosen"].startswith("took chatsft_checkpoints/d4, step 2: chatsft_checkpoints (the last stage")
    assert fields["known_as"] == "LRT, as its meta says"
    words = CliRunner().invoke(app, ["inspect", str(base)]).stderr.split()  # wrapped at 80 columns
    assert "the last stage" in " ".join(words)


# Names of tensors


def rewritten(folder, rename):
    tensors = torch.load(folder / WEIGHTS, weights_only=True)
    torch.save({new: tensor for name, tensor in tensors.items() for new in rename(name)}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_the_prefixes_of_wrapped_models_are_dropped(folder, prefix):
    expected = open_checkpoint(GOLDEN).model()
    found = open_checkpoint(rewritten(folder, lambda name: [prefix + name])).model()
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_a_tensor_with_and_without_a_prefix_is_refused(folder, prefix):
    name = "lm_head.weight"
    rewritten(folder, lambda key: [key, prefix + key] if key == name else [key])
    refused(folder, repr(name), repr(prefix + name))


# Files that are not what they should be


def place(path, kind):
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to a fifo":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "folder":
        path.mkdir()


@pytest.mark.parametrize("kind", ["fifo", "device", "link to a fifo", "loop", "dangling", "folder"])
@pytest.mark.parametrize("file", [WEIGHTS, META, "model.safetensors", "config.json"])
def test_only_regular_files_are_opened(folder, native, file, kind):
    target = native if (native / file).exists() else folder
    place(target / file, kind)
    refused(target, file)
    result = CliRunner().invoke(app, ["inspect", str(target)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("file", [WEIGHTS, META, "model.safetensors", "config.json"])
def test_empty_files_and_git_lfs_pointers_are_named_for_what_they_are(folder, native, file):
    target = native if (native / file).exists() else folder
    (target / file).write_bytes(b"")
    refused(target, file, "is empty")
    (target / file).write_text(LFS)
    refused(target, file, "git-LFS pointer", "git lfs pull")


@pytest.mark.parametrize("file", [META, "config.json"])
@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"step": ' + "9" * 5000 + "}", "digits"),
        ('{"a": "' + "x" * 5_000_000 + '"}', "5000009 bytes"),
        ('{"a": 1} x', "not valid JSON"),
        ("[1]", "expected a JSON object"),
    ],
    ids=["deep", "digits", "large", "trailing", "list"],
)
def test_hostile_json_is_refused(folder, native, file, content, word):
    target = native if (native / file).exists() else folder
    (target / file).write_text(content)
    refused(target, file, word)


def test_infinity_in_a_meta_file_is_read_as_python_writes_it(folder):
    meta = json.loads((folder / META).read_text()) | {"loop_state": {"min_val_bpb": float("inf")}}
    (folder / META).write_text(json.dumps(meta))
    assert "Infinity" in (folder / META).read_text()
    open_checkpoint(folder)


# Damage


@cache
def records():
    with zipfile.ZipFile(GOLDEN / WEIGHTS) as archive, (GOLDEN / WEIGHTS).open("rb") as file:
        found = {}
        for entry in archive.infolist():
            file.seek(entry.header_offset + 26)
            name, extra = struct.unpack("<2H", file.read(4))
            found[entry.filename] = (entry.header_offset + 30 + name + extra, entry.file_size)
        return found


@pytest.mark.parametrize("name", [name for name in records() if records()[name][1]])
def test_one_flipped_bit_in_any_record_is_refused_by_the_records_name(folder, name):
    start, size = records()[name]
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[start + size // 2] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, WEIGHTS, "is damaged", repr(name), "CRC-32")


def test_a_zeroed_page_anywhere_is_refused(folder):
    content = (folder / WEIGHTS).read_bytes()
    pages = range(0, len(content), 4096)
    for page in [*pages][:: len(pages) // 20]:
        (folder / WEIGHTS).write_bytes(content[:page] + bytes(4096) + content[page + 4096 :])
        refused(folder, WEIGHTS)


def test_weights_that_change_after_the_check_are_not_used(folder):
    opened = open_checkpoint(folder)
    start, _ = records()["model_000000/data/0"]
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[start] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match="CRC-32"):
        opened.model()


def repacked(folder, **options):
    """The same records in an archive that Python writes."""
    with zipfile.ZipFile(folder / WEIGHTS) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(folder / WEIGHTS, "w", **options) as archive:
        yield archive, entries


def write_entries(folder, change=lambda entries: entries, **options):
    for archive, entries in repacked(folder, **options):
        for name, content in change(entries):
            archive.writestr(name, content)
    return folder


def test_an_archive_that_python_packed_is_read(folder):
    write_entries(folder)
    assert open_checkpoint(folder).config == open_checkpoint(GOLDEN).config


def test_compressed_records_are_refused(folder):
    refused(write_entries(folder, compression=zipfile.ZIP_DEFLATED), "compressed record", "data.pkl")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_records_of_one_name_are_refused(folder):
    refused(write_entries(folder, lambda entries: [*entries, entries[5]]), "two records named")


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        (("model_000000/code/forward.py", b"x"), "code/forward.py"),
        (("other/data/0", b"x"), "other/data/0"),
    ],
)
def test_records_that_no_state_dict_has_are_refused(folder, entry, word):
    refused(write_entries(folder, lambda entries: [*entries, entry]), word, "TorchScript")


def test_a_missing_or_short_record_is_refused(folder):
    refused(write_entries(folder, lambda entries: [e for e in entries if not e[0].endswith("/data/3")]), "data/3")


def test_a_record_of_another_size_is_refused(folder):
    def cut(entries):
        return [(name, data[:-4] if name.endswith("/data/3") else data) for name, data in entries]

    refused(write_entries(folder, cut), "data/3", "bytes")


def test_numbers_in_another_byte_order_are_refused(folder):
    def turn(entries):
        others = [entry for entry in entries if not entry[0].endswith("byteorder")]
        return [*others, ("model_000000/byteorder", b"big")]

    refused(write_entries(folder, turn), "byte order", "big")


@pytest.mark.parametrize("kind", ["before", "after", "comment", "gap", "overlap"])
def test_bytes_that_belong_to_no_record_or_to_two_are_refused(folder, kind):
    content = (folder / WEIGHTS).read_bytes()
    directory = struct.unpack("<L", content[-6:-2])[0]
    if kind == "before":
        content = b"PK\3\4" + content
    elif kind == "after":
        content += b"x"
    elif kind == "comment":
        content = content[:-2] + b"\1\0x"
    elif kind == "gap":  # between the last record and the directory
        content = content[:directory] + bytes(8) + content[directory:-6] + struct.pack("<LH", directory + 8, 0)
    else:  # the second record claims the bytes of the first one
        second = content.index(b"PK\1\2", directory + 4)
        content = content[: second + 42] + bytes(4) + content[second + 46 :]
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, WEIGHTS)


def test_an_archive_with_64_bit_sizes_is_read(folder):
    for archive, entries in repacked(folder):
        for name, data in entries:
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(data)
    content = (folder / WEIGHTS).read_bytes()
    *_, count, size, start, _ = struct.unpack("<4s4H2LH", content[-22:])
    end = len(content) - 22
    wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    narrow = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (folder / WEIGHTS).write_bytes(content[:end] + wide + locator + narrow)
    assert open_checkpoint(folder).config == open_checkpoint(GOLDEN).config
    (folder / WEIGHTS).write_bytes(content[:end] + wide[:-1] + b"\1" + locator + narrow)
    refused(folder, WEIGHTS)


def test_an_archive_without_checksums_is_refused_with_the_way_out(folder):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.zeros(2)}, folder / WEIGHTS)
    finally:
        torch.serialization.set_crc32_options(True)
    refused(folder, "no CRC-32", "set_crc32_options(False)")


def test_the_format_before_zip_archives_is_refused_with_the_way_out(folder):
    torch.save({"w": torch.zeros(2)}, folder / WEIGHTS, _use_new_zipfile_serialization=False)
    refused(folder, "before version 1.6", "torch.save")


# The description of the tensors


def archive_of(data, tmp_path, storage=bytes(4096 * 4)):
    """A .pt file with this pickle and one storage of 4,096 floats."""
    path = tmp_path / "model_000000.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", data)
        archive.writestr("m/data/0", storage)
    return path


def described(shape, strides, offset=0, kind="FloatStorage", elements=4096, more=b""):
    """The pickle of a state dict with one tensor of this description."""

    def number(value):
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    def text(value):
        return b"X" + struct.pack("<L", len(value)) + value.encode()

    storage = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text("0") + text("cpu")
    storage += number(elements) + b"tQ"
    body = storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)R" + more
    return b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + body + b"tRs."


def test_a_description_written_by_hand_is_read(tmp_path):
    found = read_state_dict(archive_of(described((64, 64), (64, 1)), tmp_path)).tensors["w"]
    assert (found.description.shape, found.description.storage.dtype) == ((64, 64), "float32")
    assert found.read_bytes().size == 4096 * 4


@pytest.mark.parametrize(
    "description",
    [
        ((64, 65), (65, 1)),
        ((64, 64), (64, 1), 1),
        ((4096, 4096), (0, 0)),
        ((4096, 2), (1, 0)),
        ((64, 32), (64, 1)),
        ((64, 64), (1, 1)),
        ((64, 64), (64,)),
        ((-1, 64), (64, 1)),
        ((64, 64), (64, -1)),
        ((64, 64), (64, 1), -1),
        ((2**62, 2**62), (2**62, 1)),
        ((1,) * 1000, (1,) * 1000),
        ((64, 64), (64, 1), 0, "FloatStorage", 2**60),
        ((64, 64), (64, 1), 0, "FloatStorage", 4095),
        ((64, 64), (64, 1), 0, "DoubleStorage"),
        ((64, 64), (64, 1), 0, "UntypedStorage"),
        ((64, 64), (64, 1), 0, "FloatTensor"),
        ((64, 64), (64, 1), 0, "FloatStorage", 4096, b"}"),
        ((64, 64), (64, 1), 0, "FloatStorage", 4096, b"NN"),
    ],
    ids=str,
)
def test_tensors_that_are_no_dense_part_of_their_storage_are_refused(tmp_path, description):
    path = archive_of(described(*description), tmp_path)
    with pytest.raises(CheckpointError, match=r"model_000000\.pt") as caught:
        read_state_dict(path)
    assert len(str(caught.value)) < 7000


HOSTILE = {
    "uninitialized memory as weights": b"ctorch\nFloatTensor\nK@K@\x86R",
    "eight GiB of zeros": b"c__builtin__\nbytearray\nJ\0\0\0\x40\x85R0" * 8 + b"N",
    "a global of 120 kB": b"c" + b"a" * 120_000 + b"\nb\n",
    "a name of 1.5 MB": b"X" + struct.pack("<L", 1_500_000) + b"a" * 1_500_000,
    "a text longer than the file": b"X\xff\xff\xff\x7fabc",
    "a number of 1 MB": b"\x8b\x40\x42\x0f\0" + b"\x01" * 1_000_000,
    "a number in digits": b"I" + b"9" * 100_000 + b"\n",
    "a list": b"]",
    "an instance": b"(ios\nsystem\n",
    "a call of nothing": b"R",
    "a mark as a value": b"(",
    "a memo that is not there": b"h\xff",
    "a persistent reference to text": b"X\1\0\0\0aQ",
    "an extension": b"\x82\1",
    "a string of protocol 0": b"S'a'\n",
    "attributes of a state dict": b"ccollections\nOrderedDict\n)R}X\1\0\0\0aNsb",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_descriptions_are_refused(tmp_path, kind):
    pickled = b"\x80\x02}X\1\0\0\0w" + HOSTILE[kind] + b"s."
    with pytest.raises(CheckpointError, match=r"model_000000\.pt") as caught:
        read_state_dict(archive_of(pickled, tmp_path))
    assert len(str(caught.value)) < 1500


def test_a_description_beyond_its_size_is_refused_unread(tmp_path):
    with pytest.raises(CheckpointError, match="at most 2097152"):
        read_state_dict(archive_of(b"\x80\x02" + b"N0" * 2_000_000 + b"}.", tmp_path))


def test_a_name_that_is_there_twice_is_refused(folder):
    one = described((64, 64), (64, 1))
    item = one[3:-2]
    with pytest.raises(CheckpointError, match="two values for the name 'w'"):
        read_state_dict(archive_of(b"\x80\x02}(" + item + item + b"u.", folder))


def test_many_tensors_in_one_storage_do_not_grow_beyond_twice_the_file(tmp_path):
    def many(count):
        tensor = torch.zeros(64, 64)
        torch.save({f"w{i}": tensor for i in range(count)}, tmp_path / WEIGHTS)
        return read_state_dict(tmp_path / WEIGHTS).tensors

    assert len(many(2)) == 2
    with pytest.raises(CheckpointError, match="2 times the stored bytes"):
        many(3)


# What is read is what torch reads


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_tensor_is_bit_equal_to_torchs(folder, dtype, protocol):
    values = torch.randn(6, 8).to(dtype)
    values[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40]).to(dtype)
    tensors = OrderedDict(
        plain=values,
        transposed=values.clone().T,
        permuted=torch.randn(2, 3, 4).to(dtype).permute(2, 0, 1),
        part=torch.randn(10, 4).to(dtype)[3:7],
        scalar=torch.tensor(3.5).to(dtype),
        empty=torch.zeros(0, 4).to(dtype),
        single=torch.randn(5, 1, 7).to(dtype)[:, :, :],
        parameter=torch.nn.Parameter(torch.randn(3).to(dtype)),
        shared=values,
    )
    file = folder / WEIGHTS
    torch.save(tensors, file, pickle_protocol=protocol)
    expected = torch.load(file, weights_only=True) if protocol == 2 else torch.load(file, weights_only=False)
    found = read_state_dict(file).tensors
    assert found.keys() == expected.keys()
    assert {name: bits(as_torch(tensor)) for name, tensor in found.items()} == {
        name: bits(tensor.detach()) for name, tensor in expected.items()
    }


def test_the_state_dict_of_a_module_is_read_with_its_versions_of_modules(folder):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), folder / WEIGHTS)
    found = read_state_dict(folder / WEIGHTS).tensors
    assert found.keys() == module.state_dict().keys()
    assert found["1.num_batches_tracked"].description.storage.dtype == "int64"


# safetensors


@pytest.mark.parametrize(
    "header",
    [
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,16]}}',
        b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[4,20]}}',
        b'{"w":{"dtype":"F33","shape":[4],"data_offsets":[0,16]}}',
        b'{"w":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}',
        b'{"w":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}',
        b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"v":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        b"[" * 100_000,
        b"{}",
    ],
    ids=range(8),
)
def test_hostile_safetensors_headers_are_refused(native, header):
    (native / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    refused(native, "model.safetensors")


def test_a_header_beyond_its_size_is_refused_unread(native):
    with (native / "model.safetensors").open("r+b") as file:
        file.write((2**26).to_bytes(8, "little"))
        file.truncate(2**27)
    refused(native, "model.safetensors", str(2**26))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool, torch.int64])
def test_safetensors_of_other_types_are_refused_by_name(native, dtype):
    tensors = safetensors.torch.load_file(native / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros_like(tensors["lm_head.weight"]).to(dtype)
    safetensors.torch.save_file(tensors, native / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' holds"):
        open_checkpoint(native).model()


def test_these_archives_would_have_been_loaded_by_torch(tmp_path):
    """The helper writes what torch takes for a state dict, so that refusals are not of a broken archive."""
    path = archive_of(described((64, 64), (64, 1)), tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/version", b"3\n")
    assert torch.load(path, weights_only=True)["w"].shape == (64, 64)
