"""What is released: the wheel and the source distribution hold what the tree holds, and the metadata are true.

A sub-package or data file that pyproject.toml forgets would be missing; a package that is imported and not declared
would be missing in a user's environment, and one that is declared and not imported would be installed for nothing.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lrt_deploy import machine

ROOT = Path(__file__).parents[1]
FOLDERS = {"lrt_deploy": "lrt_deploy", "exporters": "lrt_deploy/exporters", "runtime": "lrt_deploy/runtime"}
LOOSE = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
RELEASE_FILES = (
    "CHANGELOG.md",
    "CITATION.cff",
    "SECURITY.md",
    "CONTRIBUTING.md",
    "constraints.txt",
    "requirements.lock",
    "Makefile",
    "mkdocs.yml",
)
RELEASE_FOLDERS = ("benchmarks", "demo", "docs", "examples", "tests")
# Names that a package is imported by, where they are not its own.
IMPORTED_AS = {"onnxruntime-gpu": "onnxruntime", "protobuf": "google", "cuda-bindings": "cuda", "pyyaml": "yaml"}
IMPORTED_AS |= {"tensorrt-rtx-cu13": "tensorrt_rtx"}
# Imported by another package: torch's exporter runs on it.
NOT_IMPORTED_BY_US = {"onnxscript"}


def copy_tree(folder):
    """What a build reads; not build/, from which a wheel would take files that are deleted since."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in LOOSE:
        shutil.copy(ROOT / name, folder / name)
    return folder


def tree_files(root):
    """Every file of the three folders under the name that it has when installed."""
    return {
        f"{installed}/{path.relative_to(root / name).as_posix()}"
        for name, installed in FOLDERS.items()
        for path in (root / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def released(root):
    """Every file of a source distribution beside those of the packages."""
    found = {name for name in (*RELEASE_FILES, *LOOSE) if (root / name).is_file()}
    for name in RELEASE_FOLDERS:
        files = (path for path in (root / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        found |= {path.relative_to(root).as_posix() for path in files}
    return found


def build_wheel(root, folder):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", ".", "--wheel-dir", str(folder)]
    command += ["--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def wheel_files(root, folder):
    wheel = build_wheel(root, folder)
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "tree").mkdir()
    return copy_tree(tmp_path / "tree")


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_tree(tree, tmp_path):
    expected = tree_files(tree)
    found = wheel_files(tree, tmp_path / "wheel")
    assert found == expected
    assert {"lrt_deploy/py.typed", "lrt_deploy/errors.py", "lrt_deploy/runtime/__init__.py"} <= found


@pytest.mark.slow
def test_an_unlisted_sub_package_is_noticed(tree, tmp_path):
    (tree / "runtime" / "unlisted").mkdir()
    (tree / "runtime" / "unlisted" / "__init__.py").touch()
    missing = tree_files(tree) - wheel_files(tree, tmp_path / "wheel")
    assert "lrt_deploy/runtime/unlisted/__init__.py" in missing


@pytest.mark.slow
def test_the_wheel_that_is_built_from_the_source_distribution_is_that_of_the_tree(tree, tmp_path):
    for name in RELEASE_FILES:
        shutil.copy(ROOT / name, tree / name)
    for name in RELEASE_FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "bundle"))
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    archive = tmp_path / done.stdout.splitlines()[-1]
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert wheel_files(unpacked, tmp_path / "wheel") == tree_files(tree)
    assert not [path for path in unpacked.rglob("*") if path.is_symlink()]  # not all that unpack them make links
    assert released(tree) - released(unpacked) == set()


@pytest.mark.slow
def test_a_clean_environment_runs_the_verbs_of_the_wheel_without_torch(tree, tmp_path):
    """The wheel alone; `make wheel-check` tries every extra."""
    wheel = build_wheel(tree, tmp_path / "wheel")
    command = [sys.executable, ROOT / "tests/wheel_smoke.py", wheel, "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0 and done.stdout.startswith("none: works"), done.stdout + done.stderr


def modules(*folders):
    """Top-level names that the files of some folders import, by statement or as a text in `import_module`."""
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
        found |= set(re.findall(r"""import_module\(["'](\w+)""", text))
    return found - set(sys.stdlib_module_names) - {"lrt_deploy"}


def named(requirements):
    """The module that each requirement is imported as; requirements of this project itself are left out."""
    names = {Requirement(text).name for text in requirements} - {"lrt-deploy"}
    return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}


def test_every_import_is_declared_and_every_declared_package_is_imported():
    product_extras = EXTRAS.keys() - {"test", "docs", "release"}
    declared = named([*PROJECT["dependencies"], *(text for extra in product_extras for text in EXTRAS[extra])])
    imported = modules("lrt_deploy", "exporters", "runtime")
    by_name = set(machine.MODULES["tensorrt"]) | set(machine.MODULES["tensorrt-rtx"])  # `TensorRTLibrary.load`
    assert imported - declared == set()
    assert declared - imported - by_name == NOT_IMPORTED_BY_US


def test_the_runtime_declares_what_it_imports_without_an_extra():
    optional = named(
        text for extra in ("serve", "ray", "grammar", "bench", "tensorrt", "tensorrt-rtx") for text in EXTRAS[extra]
    )
    assert modules("runtime") <= named(PROJECT["dependencies"]) | optional
    assert "torch" not in modules("runtime") | named(PROJECT["dependencies"])


def test_what_the_tests_import_is_declared():
    own = {path.stem for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")} | {
        "hostile",
        "measurements",
    }
    all_declared = named([*PROJECT["dependencies"], *(text for texts in EXTRAS.values() for text in texts)])
    elsewhere = {"contenders", "tritonclient"}  # tritonclient is in the environment of `make triton-env`
    assert modules("tests", "examples") - own - elsewhere <= all_declared


PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("win32", "AMD64"), ("win32", "ARM64"), ("darwin", "arm64")]


@pytest.mark.parametrize(("platform", "machine_name"), [*PLATFORMS, ("darwin", "x86_64")])
def test_every_platform_gets_one_onnxruntime(platform, machine_name):
    here = {"sys_platform": platform, "platform_machine": machine_name, "extra": ""}
    every = [Requirement(text) for text in (*PROJECT["dependencies"], *(t for texts in EXTRAS.values() for t in texts))]
    found = [r.name for r in every if r.name.startswith("onnxruntime") and (not r.marker or r.marker.evaluate(here))]
    assert len(found) == 1


@pytest.mark.parametrize("both", [False, True])
def test_doctor_names_the_clash_of_two_onnxruntimes(monkeypatch, both):
    original = importlib.metadata.version

    def version(name):
        if name not in ("onnxruntime", "onnxruntime-gpu"):
            return original(name)
        if name == "onnxruntime" and not both:
            raise importlib.metadata.PackageNotFoundError
        return "1.31.1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    text = machine.onnxruntime_clash()
    assert (text is not None) == both
    assert not both or "onnxruntime 1.31.1 and onnxruntime-gpu 1.31.1 are both installed" in text


def test_pins_and_hashes_name_no_place_and_agree():
    """requirements.lock holds what constraints.txt pins, each with the hashes of its files."""
    lock, constraints = ((ROOT / name).read_text() for name in ("requirements.lock", "constraints.txt"))
    assert "://" not in lock + constraints and "--index-url" not in lock
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", constraints, re.MULTILINE))
    plain = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    locked = re.findall(r"^([\w.-]+)==([^\s;]+)[^\n]*\\\n    --hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE)
    assert len(locked) == len(re.findall(r"^[\w.-]+==", lock, re.MULTILINE)) > 80
    assert [pin for pin in locked if plain.get(pin[0], pin[1]) != pin[1]] == []
    direct = {Requirement(text).name.lower() for text in PROJECT["dependencies"]} - {"lrt-deploy"}
    assert {re.sub(r"[-_.]+", "-", name) for name in direct} <= {name for name, _ in locked}


def test_versions_of_the_metadata_agree():
    assert f"version: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert importlib.metadata.version("lrt-deploy") == PROJECT["version"]
    assert f"\n## {PROJECT['version']}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_every_extra_of_the_product_is_tried_in_a_clean_environment():
    """All but full TensorRT, whose libraries are on another index."""
    sys.path.insert(0, str(ROOT / "tests"))
    import wheel_smoke

    tried = re.search(r"^EXTRAS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert {*tried} == {*wheel_smoke.TRIALS} == {"none", *EXTRAS} - {"test", "docs", "release", "tensorrt"}
