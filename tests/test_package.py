"""`lrt-deploy package`: whole or not at all, replaces packages only, and needs nothing but the runtime."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import lrt_deploy
from lrt_deploy.cli.app import app
from lrt_deploy.errors import BundleError, ExportError, InputError
from lrt_deploy.exporters.packages import web
from lrt_deploy.exporters.packages.package import LIST, TARGETS, package_bundle, read_package, verify_package
from lrt_deploy.exporters.packages.source import fill


@pytest.fixture(scope="module")
def bundle(export_once):
    return export_once("padded_vocab")


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """A folder as npm makes it, with other content: what is copied is not run here."""
    folder = tmp_path_factory.mktemp("assets")
    for number, name in enumerate(web.ASSETS):
        path = folder / "node_modules" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {number}")
    return folder


@pytest.fixture(scope="module")
def make(bundle, assets):
    """(out, target, options) -> the package's list."""

    def package(out, to="web", **options):
        return package_bundle(options.pop("source", bundle), out, to, **{"assets": assets} | options)

    return package


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("target", TARGETS)
def test_a_package_lists_every_file_and_its_readme_begins_with_the_command(make, tmp_path, target):
    package = make(tmp_path / "out", target)
    assert verify_package(tmp_path / "out") == package == read_package(tmp_path / "out")
    assert {LIST, *package.files} == set(tree(tmp_path / "out"))
    lines = (tmp_path / "out" / "README.md").read_text().splitlines()
    assert lines[:3] == ["```console", f"$ {package.run}", "```"] and len(lines) <= 12
    assert not [name for name in package.files if "@" in name]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_bundle_gives_the_same_package(make, tmp_path, target):
    make(tmp_path / "first", target)
    make(tmp_path / "second", target)
    assert tree(tmp_path / "first") == tree(tmp_path / "second")


def test_force_replaces_a_package_and_nothing_else(make, tmp_path):
    out = tmp_path / "out"
    make(out)
    with pytest.raises(ExportError, match="exists; choose another folder, or pass --force"):
        make(out)
    make(out, force=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"also holds notes\.txt, which is no part of it"):
        make(out, force=True)
    (out / "notes.txt").unlink()
    (out / "bundle" / "more").mkdir()
    with pytest.raises(ExportError, match="also holds bundle/more"):
        make(out, force=True)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a.txt": "x"}, "holds a.txt and no lrt-package.json"),
        ({LIST: "{"}, "has a damaged list"),
        ({LIST: '{"files": {}}'}, "has a damaged list"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(make, tmp_path, content, reason):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    before = tree(tmp_path)
    with pytest.raises(ExportError, match=reason):
        make(tmp_path, force=True)
    assert tree(tmp_path) == before


def test_neither_a_bundle_nor_a_file_nor_a_link_is_replaced(make, bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("bundle", "file", "link"):
        with pytest.raises(ExportError, match="is not a package"):
            make(tmp_path / name, force=True)
    with pytest.raises(ExportError, match="lies inside the bundle"):
        make(copy / "out", source=copy)
    assert tree(copy) == tree(bundle)


def test_an_empty_folder_is_replaced_with_force(make, tmp_path):
    make(tmp_path, force=True)
    verify_package(tmp_path)


def test_a_damaged_bundle_is_refused_and_leaves_nothing(make, bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    weights = copy / "graphs" / "fp32" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[5000] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.bin does not match its hash in the manifest"):
        make(tmp_path / "out", source=copy)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_error_leaves_the_old_package(make, tmp_path):
    out = tmp_path / "out"
    make(out)
    before = tree(out)

    def stop(what, done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(out, force=True, progress=stop)
    assert tree(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_bundle_of_links_is_packaged_as_files(make, bundle, tmp_path):
    linked = tmp_path / "linked"
    for path in bundle.rglob("*"):
        place = linked / path.relative_to(bundle)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir() if path.is_dir() else place.symlink_to(path)
    make(tmp_path / "out", source=linked)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    verify_package(tmp_path / "out")


def test_without_assets_the_npm_line_is_printed(bundle, tmp_path):
    line = "npm install --prefix web-assets onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0"
    with pytest.raises(ExportError, match=line):
        package_bundle(bundle, tmp_path / "out", "web")
    (tmp_path / "assets").mkdir()
    with pytest.raises(ExportError, match=r"assets has no onnxruntime-web/dist/ort\.wasm\.min\.mjs; run `npm install"):
        package_bundle(bundle, tmp_path / "out", "web", assets=tmp_path / "assets")
    assert not (tmp_path / "out").exists()


def test_what_a_browser_cannot_run_is_refused(make, host_embeddings_once, in_every_precision, tmp_path):
    with pytest.raises(ExportError, match="whose embedding tables are on the host"):
        make(tmp_path / "out", source=host_embeddings_once("mr_gqa_SSSL"))
    several = in_every_precision("mr_gqa_SSSL")
    with pytest.raises(ExportError, match="is a bundle in fp16; a browser runs graphs with a float32 state"):
        make(tmp_path / "out", source=several, precision="fp16")
    assert make(tmp_path / "out", source=several).precision == "fp32", "the most precise one"


def test_wrong_arguments_are_named(bundle, tmp_path):
    with pytest.raises(InputError, match="target"):
        package_bundle(bundle, tmp_path / "out", "floppy")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="force"):
        package_bundle(bundle, tmp_path / "out", "web", force="yes")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="has no fp16; it holds fp32"):
        package_bundle(bundle, tmp_path / "out", "web", precision="fp16")
    with pytest.raises(BundleError, match="does not exist"):
        package_bundle(tmp_path / "none", tmp_path / "out", "web")


def test_templates_have_no_value_that_is_missing():
    assert fill("a @name@ b@c d@huggingface/x", {"name": "n"}) == "a n b@c d@huggingface/x"
    with pytest.raises(KeyError):
        fill("@nothing@", {})


def test_the_verb_prints_the_command_or_one_document(bundle, assets, tmp_path):
    words = ["package", str(bundle), str(tmp_path / "out"), "--to", "web", "--assets", str(assets)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and result.stdout.startswith(f"packaged {tmp_path / 'out'} (")
    assert web.COMMAND in result.stdout
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 1 and json.loads(result.stdout)["error"]["type"] == "ExportError"
    result = CliRunner().invoke(app, [*words, "--json", "--force"])
    fields = json.loads(result.stdout)
    assert fields["target"] == "web" and fields["run"] == web.COMMAND and fields["files"] > 10
    assert CliRunner().invoke(app, ["package", str(bundle), str(tmp_path / "x"), "--to", "floppy"]).exit_code == 2


def test_packaging_needs_neither_torch_nor_the_graph_tools(bundle, assets, tmp_path):
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript', 'onnx_ir', 'onnxruntime'): sys.modules[name] = None\n"
        "from lrt_deploy.__main__ import main\n"
        "main()\n"
    )
    words = ["package", bundle, tmp_path / "out", "--to", "web", "--assets", assets, "--json"]
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    verify_package(tmp_path / "out")


def test_what_is_packaged_is_the_bundle(make, bundle, tmp_path):
    """The files of the web page are those of the bundle, byte for byte."""
    make(tmp_path / "out")
    packaged = tmp_path / "out" / "bundle"
    for name, data in tree(packaged).items():
        assert (bundle / name).read_bytes() == data
    assert lrt_deploy.open_decoder(bundle).precision == read_package(tmp_path / "out").precision
