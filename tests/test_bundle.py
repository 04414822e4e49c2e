"""A bundle is whole or absent, and opened only as it was exported."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

import lrt_deploy
from lrt_deploy.bundle.manifest import DIGEST, FORMAT_VERSION, MANIFEST, read_manifest, verify_files
from lrt_deploy.errors import BundleError, CheckpointError, ConfigError, ExportError

NAME, OTHER = "gate32", "padded_vocab"
FILES = (
    MANIFEST,
    DIGEST,
    "graphs/fp32/prefill.onnx",
    "graphs/fp32/prefill.windowed.onnx",
    "graphs/fp32/decode_step.onnx",
    "graphs/fp32/decode_step.windowed.onnx",
    "graphs/fp32/weights.bin",
    "tokenizer/tokenizer.json",
    "tokenizer/token_bytes.json",
)
# Whatever in a bundle is hashed at every opening; larger files are remembered.
ALWAYS_HASHED_BYTES = 4 * 2**20


@pytest.fixture
def exported(export_once):
    return export_once(NAME)


@pytest.fixture
def bundle(exported, tmp_path):
    """A copy that the test may damage."""
    return shutil.copytree(exported, tmp_path / "copied" / "bundle")


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def opens(folder, **options):
    with lrt_deploy.open_decoder(folder, **options) as decoder:
        return [event.token for event in decoder.generate([1, 2, 3], 3, stop_ids=[])]


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x01
    path.write_bytes(content)


def rewrite_manifest(folder, **changes):
    """Change the manifest and give it a digest that fits, as a stranger would."""
    fields = json.loads((folder / MANIFEST).read_text()) | changes
    text = json.dumps({key: value for key, value in fields.items() if value is not ...}).encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / DIGEST).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n")


# Opening


@pytest.mark.slow
def test_a_bundle_holds_these_files_and_its_manifest_lists_them(bundle):
    assert files_of(bundle) == set(FILES)
    assert set(read_manifest(bundle).files) == set(FILES) - {MANIFEST, DIGEST}


def test_a_bundle_opens_wherever_it_is_moved(bundle, exported, tmp_path):
    expected = opens(exported)
    moved = tmp_path / "elsewhere" / "another name"
    moved.parent.mkdir()
    bundle.rename(moved)
    assert opens(moved) == expected


@pytest.mark.parametrize("opened_before", [False, True], ids=["at first", "later"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_refused_by_name(bundle, name, place, opened_before):
    if opened_before:
        opens(bundle)
    size = (bundle / name).stat().st_size
    flip(bundle / name, {"first": 0, "middle": size // 2, "last": size - 1}[place])
    with pytest.raises(BundleError) as caught:
        lrt_deploy.open_decoder(bundle)
    assert (bundle / name).name in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_by_name(bundle, name):
    (bundle / name).unlink()
    with pytest.raises(BundleError) as caught:
        lrt_deploy.open_decoder(bundle)
    assert (bundle / name).name in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_truncated_file_is_refused_by_name(bundle, name, kept):
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(BundleError) as caught:
        lrt_deploy.open_decoder(bundle)
    assert (bundle / name).name in str(caught.value)


def test_a_folder_in_place_of_a_file_is_refused_by_name(bundle):
    (bundle / "tokenizer/tokenizer.json").unlink()
    (bundle / "tokenizer/tokenizer.json").mkdir()
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        lrt_deploy.open_decoder(bundle)


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match="does not exist"):
        lrt_deploy.open_decoder(tmp_path / "absent")
    with pytest.raises(BundleError, match=r"is not a bundle.*manifest\.json"):
        lrt_deploy.open_decoder(tmp_path)
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(BundleError, match=r"notes\.txt is a file; expected a bundle folder"):
        lrt_deploy.open_decoder(tmp_path / "notes.txt")


@pytest.fixture
def large(bundle):
    """A bundle with a file that is hashed once and then remembered."""
    path = bundle / "graphs" / "fp32" / "large.bin"
    path.write_bytes(bytes(range(256)) * (ALWAYS_HASHED_BYTES // 256 + 16))
    files = {name: msgspec.to_builtins(record) for name, record in read_manifest(bundle).files.items()}
    record = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    rewrite_manifest(bundle, files=files | {"graphs/fp32/large.bin": record})
    return path


def hashed_while_opening(bundle, monkeypatch, **options):
    """Names of the files that an opening reads in full."""
    from lrt_deploy.bundle import manifest

    names, hash_file = [], manifest.hash_file
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "hash_file", lambda path: names.append(path.name) or hash_file(path))
        verify_files(bundle, read_manifest(bundle), **options)
    return names


def test_a_large_file_is_hashed_once_and_small_ones_always(bundle, large, monkeypatch):
    first = hashed_while_opening(bundle, monkeypatch)
    assert sorted(first) == sorted(Path(name).name for name in read_manifest(bundle).files)
    second = hashed_while_opening(bundle, monkeypatch)
    assert set(first) - set(second) == {"large.bin"}
    assert set(hashed_while_opening(bundle, monkeypatch, force=True)) == set(first)


def test_a_large_file_that_was_altered_is_refused_even_with_its_old_time(bundle, large):
    opens(bundle)
    stat = large.stat()
    flip(large, 10**6)
    os.utime(large, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert large.stat().st_mtime_ns == stat.st_mtime_ns
    with pytest.raises(BundleError, match=r"large\.bin"):
        lrt_deploy.open_decoder(bundle)


def test_a_large_file_that_was_exchanged_is_refused_even_with_its_old_time(bundle, large):
    opens(bundle)
    stat, content = large.stat(), bytearray(large.read_bytes())
    content[0] ^= 1
    large.unlink()
    large.write_bytes(content)
    os.utime(large, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(BundleError, match=r"large\.bin"):
        lrt_deploy.open_decoder(bundle)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"a": {}}', b"\xff", b"null", b"5", b"[" * 10**5, b'{"a":' * 10**5, b"9" * 2**21]
)
def test_a_damaged_memory_of_hashes_is_an_empty_one(bundle, large, tmp_path, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = tmp_path / "cache" / "lrt-deploy" / "verified.json"
    memory.parent.mkdir(parents=True)
    memory.write_bytes(content)
    assert "large.bin" in hashed_while_opening(bundle, monkeypatch)
    assert "large.bin" not in hashed_while_opening(bundle, monkeypatch)
    assert json.loads(memory.read_text())


@pytest.mark.parametrize("kind", ["fifo", "folder", "endless"])
def test_a_memory_of_hashes_that_is_no_file_is_an_empty_one(bundle, large, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = tmp_path / "cache" / "lrt-deploy" / "verified.json"
    memory.parent.mkdir(parents=True)
    make = {"fifo": os.mkfifo, "folder": Path.mkdir, "endless": lambda path: path.symlink_to("/dev/zero")}
    make[kind](memory)
    assert "large.bin" in hashed_while_opening(bundle, monkeypatch)
    assert nothing_beside(memory.parent, "verified.json")


def test_a_full_disk_leaves_no_file_for_an_opening(bundle, large, tmp_path, root):
    """Files of this process may have no more than 16 bytes: the memory cannot be written."""
    script = (
        "import resource, sys, lrt_deploy\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))\n"
        "for _ in range(2): lrt_deploy.open_decoder(sys.argv[1]).close()"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, "-c", script, bundle], env=environment, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    assert nothing_beside(tmp_path / "cache" / "lrt-deploy")


def test_a_temporary_file_of_a_killed_process_goes_with_the_next_opening(bundle, large, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "lrt-deploy"
    folder.mkdir(parents=True)
    (folder / ".verified.json.partial-0123456789abcdef").write_text("half")
    (folder / ".verified.json.partial-notes").write_text("not ours")
    assert "large.bin" in hashed_while_opening(bundle, monkeypatch)
    assert nothing_beside(folder, "verified.json", ".verified.json.partial-notes")


def test_a_cache_folder_that_cannot_be_written_does_not_matter(bundle, large, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert opens(bundle) == opens(bundle)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", None, 1.5])
def test_another_format_version_is_refused(bundle, version):
    rewrite_manifest(bundle, format_version=version)
    with pytest.raises(BundleError, match=f"format {version!r}.*reads {FORMAT_VERSION}"):
        lrt_deploy.open_decoder(bundle)


@pytest.mark.parametrize("name", ["../secret", "graphs/../../secret", "{absolute}"])
def test_a_manifest_cannot_reach_outside_its_folder(bundle, name):
    secret = bundle.parent / "secret"
    secret.write_bytes(b"x")
    record = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    rewrite_manifest(bundle, files={name.format(absolute=secret): record})
    with pytest.raises(BundleError, match="outside the bundle"):
        lrt_deploy.open_decoder(bundle)


def test_a_bundle_of_links_to_blobs_opens_and_gives_the_same_numbers(bundle, tmp_path):
    """As the Hub's cache keeps it."""
    expected = opens(bundle)
    linked, blobs = tmp_path / "linked", tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in bundle.rglob("*") if path.is_file())):
        shutil.copy(file, blobs / str(number))
        link = linked / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(number))
    assert opens(linked) == expected
    (linked / "tokenizer" / "token_bytes.json").unlink()
    (linked / "tokenizer" / "token_bytes.json").symlink_to(linked / "tokenizer" / "tokenizer.json")
    with pytest.raises(BundleError, match=r"token_bytes\.json"):
        opens(linked)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ...},
        {"model": []},
        {"model": {}},
        {"files": ...},
        {"files": []},
        {"files": {"x": 1}},
        {"files": {"x": {"bytes": 1}}},
        {"colour": 1},
        {"precisions": ...},
        {"precisions": 1},
        {"max_seq_len": ...},
        {"max_seq_len": "many"},
        {"max_batch_size": None},
        {"tokenizer_tokens": "many"},
        {"tokenizer_tokens": 10**9},
        {"precisions": []},
        {"precisions": ["fp64"]},
        {"precisions": ["../../fp32"]},
        {"format_version": ...},
        {"files": {}},
    ],
    ids=str,
)
def test_a_manifest_that_makes_no_sense_is_refused(bundle, changes):
    rewrite_manifest(bundle, **changes)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        opens(bundle)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_refused(bundle, text):
    (bundle / MANIFEST).write_bytes(text)
    (bundle / DIGEST).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        lrt_deploy.open_decoder(bundle)


# Exporting. Graphs are what takes long, so most of these take them from a bundle that was exported before.


@pytest.fixture
def quick(export_once, monkeypatch):
    """Exports of the two goldens that copy their graphs; `quick.before(name)` runs when graphs are to be made."""
    from lrt_deploy.exporters import bundle as module

    bundles = {name: export_once(name) for name in (NAME, OTHER)}

    def write_graphs(job, folder, say):
        name = job.checkpoint.folder.name
        quick.before(name)
        shutil.copytree(bundles[name] / "graphs", folder / "graphs")
        quick.after(name)
        return read_manifest(bundles[name]).precision_details, {}

    class Quick:
        before = after = staticmethod(lambda name: None)

    quick = Quick()
    monkeypatch.setattr(module, "_write_graphs", write_graphs)
    return quick


def export(golden_of, name, target, **options):
    return lrt_deploy.export_bundle(golden_of(name).folder, target, max_seq_len=128, **options)


def is_whole(folder):
    verify_files(folder, read_manifest(folder), force=True)
    return opens(folder)


def nothing_beside(folder, *expected):
    return sorted(path.name for path in folder.iterdir()) == sorted(expected)


def test_an_existing_target_is_refused_without_force_and_replaced_with_it(quick, golden_of, tmp_path):
    target = tmp_path / "bundle"
    export(golden_of, NAME, target)
    before = is_whole(target)
    with pytest.raises(ExportError, match=r"bundle exists.*force"):
        export(golden_of, OTHER, target)
    assert is_whole(target) == before
    (target / "engines").mkdir()
    export(golden_of, OTHER, target, force=True)
    assert is_whole(target) != before
    assert files_of(target) == set(FILES)
    assert not (target / "engines").exists()
    assert nothing_beside(tmp_path, "bundle")


def test_force_does_not_replace_what_is_no_bundle(quick, golden_of, tmp_path):
    folder, file, link = tmp_path / "folder", tmp_path / "file", tmp_path / "link"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    file.write_text("work")
    link.symlink_to(tmp_path / "nowhere")
    for target, found in (folder, "holds thesis.tex and no manifest"), (file, "is a file"), (link, "link to nowhere"):
        with pytest.raises(ExportError, match=f"is not a bundle: it {'is a ' * (target is link)}{found}"):
            export(golden_of, NAME, target, force=True)
    assert (folder / "thesis.tex").read_text() == "years of work"
    assert file.read_text() == "work"
    assert nothing_beside(tmp_path, "folder", "file", "link")


WEB_APP = json.dumps({"name": "My app", "icons": [], "start_url": "/"})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"manifest.json": WEB_APP, "index.html": "<html>", "manifest.sha256": None},
            "lacks a part of one: its digest",
        ),
        ({"manifest.json": WEB_APP}, r"holds a manifest\.json of something else"),
        ({"manifest.json": "[" * 100_000}, "nested too deeply"),
        ({"manifest.json": "5"}, r"holds a manifest\.json of something else"),
        ({"manifest.sha256": None}, "lacks a part of one: its digest"),
        ({"manifest.sha256": "0" * 64}, r"holds a manifest\.sha256 that is no digest"),
        ({"notes.txt": "years of work"}, r"also holds notes\.txt, which is no part of it"),
        ({"graphs/fp32/notes.txt": "years of work"}, r"also holds graphs/fp32/notes\.txt"),
        ({"manifest.json": "fifo"}, r"named pipe"),
    ],
    ids=str,
)
def test_force_replaces_bundles_alone(quick, golden_of, bundle, changes, found):
    for name, text in changes.items():
        (bundle / name).unlink(missing_ok=True)
        if text == "fifo":
            os.mkfifo(bundle / name)
        elif text is not None:
            (bundle / name).write_text(text)
    before = sorted(bundle.rglob("*"))
    with pytest.raises(ExportError, match=found):
        export(golden_of, OTHER, bundle, force=True)
    assert sorted(bundle.rglob("*")) == before


def test_force_replaces_a_damaged_bundle_and_one_with_engines_and_reports(quick, golden_of, bundle):
    """Messages about damage say: export it again."""
    fields = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(fields | {"max_seq_len": 7}))
    (bundle / "graphs" / "fp32" / "weights.bin").unlink()
    for name in ("engines/tensorrt-fp32/lrt.plan", "reports/parity-ort-cpu-fp32.html"):
        (bundle / name).parent.mkdir(parents=True)
        (bundle / name).touch()
    export(golden_of, OTHER, bundle, force=True)
    assert is_whole(bundle) and files_of(bundle) == set(FILES)


def test_an_export_installs_no_signal_handlers(golden_of, tmp_path, quick):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before, seen = [signal.getsignal(number) for number in numbers], []

    def progress(what, done, total):
        seen.append([signal.getsignal(number) for number in numbers])

    lrt_deploy.export_bundle(golden_of(NAME).folder, tmp_path / "bundle", progress=progress)
    assert seen and all(handlers == before for handlers in seen)


def test_force_fills_an_empty_folder(quick, golden_of, tmp_path):
    (tmp_path / "bundle").mkdir()
    with pytest.raises(ExportError, match="exists"):
        export(golden_of, NAME, tmp_path / "bundle")
    export(golden_of, NAME, tmp_path / "bundle", force=True)
    assert is_whole(tmp_path / "bundle")
    assert nothing_beside(tmp_path, "bundle")


def test_force_on_a_link_to_a_bundle_leaves_a_whole_bundle_and_no_error(quick, golden_of, tmp_path):
    export(golden_of, NAME, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export(golden_of, OTHER, tmp_path / "link", force=True)
    assert is_whole(tmp_path / "link")
    assert nothing_beside(tmp_path, "link", "real")


@pytest.mark.parametrize("name", ["a [b] *.c", "ünïcode 包", "-rf"])
def test_any_name_is_a_target(quick, golden_of, tmp_path, name, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    export(golden_of, NAME, name)
    assert is_whole(Path(name))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_seq_len": 0}, ExportError, "max_seq_len is 0"),
        ({"max_seq_len": 321}, ExportError, "max_seq_len is 321.*1 to 320"),
        ({"max_batch_size": 0}, ExportError, "max_batch_size is 0"),
        ({"precision": "fp64"}, ExportError, "precision is fp64"),
        ({"precision": ()}, ExportError, "precision is empty"),
        ({"precision": ("fp32", "fp32")}, ExportError, "each once"),
        ({"tokenizer": "/nowhere"}, CheckpointError, "nowhere"),
        ({"step": 7}, CheckpointError, "no step 7"),
    ],
    ids=str,
)
def test_an_export_that_is_refused_leaves_nothing(quick, golden_of, tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        lrt_deploy.export_bundle(golden_of(NAME).folder, tmp_path / "bundle", **options)
    assert nothing_beside(tmp_path)


@pytest.mark.parametrize("damage", ["model_000000.pt", "meta_000000.json", "tokenizer/tokenizer.pkl"])
def test_an_export_of_a_damaged_checkpoint_leaves_nothing(golden_of, tmp_path, damage):
    source = shutil.copytree(golden_of(NAME).folder, tmp_path / "source")
    content = (source / damage).read_bytes()
    (source / damage).write_bytes(content[: len(content) // 2])
    with pytest.raises((CheckpointError, ConfigError), match=damage.rpartition("/")[2].replace(".", r"\.")):
        lrt_deploy.export_bundle(source, tmp_path / "bundle")
    assert nothing_beside(tmp_path, "source")


def test_an_export_that_fails_late_leaves_nothing_and_keeps_what_was_there(quick, golden_of, tmp_path):
    target = tmp_path / "bundle"
    export(golden_of, NAME, target)
    before = is_whole(target)

    def fail(name):
        raise OSError(28, "No space left on device")

    quick.after = fail
    with pytest.raises(OSError, match="No space"):
        export(golden_of, OTHER, target, force=True)
    assert is_whole(target) == before
    assert nothing_beside(tmp_path, "bundle")


@pytest.mark.parametrize("force", [True, False], ids=["force", "no force"])
def test_exports_to_one_target_at_once_leave_one_whole_bundle(quick, golden_of, tmp_path, force):
    target, meeting, outcomes = tmp_path / "bundle", threading.Barrier(2, timeout=60), {}
    if force:
        export(golden_of, NAME, target)
    quick.after = lambda name: meeting.wait()

    def run(name):
        try:
            outcomes[name] = export(golden_of, name, target, force=force)
        except Exception as error:
            outcomes[name] = error

    threads = [threading.Thread(target=run, args=(name,)) for name in (NAME, OTHER)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [outcome for outcome in outcomes.values() if isinstance(outcome, Exception)]
    assert all(isinstance(error, ExportError) for error in errors), errors
    assert is_whole(target)
    assert nothing_beside(tmp_path, "bundle")
    # Without force exactly one of the two may win: the other found a target that exists.
    assert len(errors) == (0 if force else 1)


EXPORT_AND_WAIT = """
import sys, time
import lrt_deploy
from lrt_deploy.cli import signals
def progress(what, done, total):
    if what == sys.argv[3]:
        print("waiting", flush=True)
        time.sleep(300)
signals.install()
lrt_deploy.export_bundle(sys.argv[1], sys.argv[2], force="--force" in sys.argv, progress=progress)
"""


def killed(golden_of, target, stage, number, *options):
    """Start an export in another process, stop it at a stage by a signal, and return its exit status."""
    command = [sys.executable, "-c", EXPORT_AND_WAIT, str(golden_of(NAME).folder), str(target), stage, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "waiting\n", process.stderr.read()
        assert any(path.name.startswith(".") for path in target.parent.iterdir())
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tracing", "hashing"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_an_export_that_is_asked_to_end_leaves_nothing(golden_of, tmp_path, stage, number):
    assert killed(golden_of, tmp_path / "bundle", stage, number) != 0
    assert nothing_beside(tmp_path)


@pytest.mark.slow
def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(golden_of, tmp_path, quick):
    target = tmp_path / "bundle"
    assert killed(golden_of, target, "hashing", signal.SIGKILL) == -signal.SIGKILL
    assert not target.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".bundle.partial-")
    with pytest.raises(BundleError):
        lrt_deploy.open_decoder(left)
    export(golden_of, NAME, target)
    assert is_whole(target)
    assert nothing_beside(tmp_path, "bundle")


@pytest.mark.slow
def test_a_killed_export_with_force_keeps_what_was_there(golden_of, tmp_path, quick):
    target = tmp_path / "bundle"
    export(golden_of, OTHER, target)
    before = is_whole(target)
    assert killed(golden_of, target, "hashing", signal.SIGKILL, "--force") == -signal.SIGKILL
    assert is_whole(target) == before
