"""The package `docker` as far as it runs without Docker: its lines, in a fresh environment, make a server that answers.

What the Dockerfile copies, installs, starts and asks for its health is read from the Dockerfile itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

START_SECONDS = 120


class Dockerfile:
    """Instructions of a Dockerfile up to its second stage."""

    def __init__(self, path: Path) -> None:
        text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE))
        stages = re.split(r"^(?=FROM )", text, flags=re.MULTILINE)
        self.lines = [tuple(line.split(None, 1)) for line in stages[1].splitlines() if line]
        self.arguments = dict(value.split("=", 1) for value in self.all("ARG"))
        self.last_stage = stages[-1]

    def all(self, name):
        return [value for instruction, value in self.lines if instruction == name]

    def one(self, name):
        (value,) = self.all(name)
        return value

    def words(self, name):
        """The list of an ENTRYPOINT, a CMD, or the CMD of a HEALTHCHECK."""
        return json.loads(self.one(name)[self.one(name).index("[") :])

    def filled(self, text):
        return re.sub(r"\$\{(\w+)\}", lambda match: self.arguments[match[1]], text)


@pytest.fixture(scope="module")
def package(bundle, package_of):
    return package_of(bundle, "docker")


@pytest.fixture(scope="module")
def dockerfile(package):
    return Dockerfile(package / "Dockerfile")


@pytest.fixture(scope="module")
def installed(package, dockerfile, tmp_path_factory):
    """The variables of an environment in which the Dockerfile's RUN lines have run on what it copies."""
    place = tmp_path_factory.mktemp("image")
    subprocess.run([sys.executable, "-m", "venv", place / "venv"], check=True)
    for words in map(shlex.split, dockerfile.all("COPY")):
        *names, target = map(dockerfile.filled, words)
        assert target == "./"
        for name in names:
            shutil.copy(package / name, place / name)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables = clean | {
        "PATH": f"{place / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(place / "nowhere"),
        "XDG_CACHE_HOME": str(place / "cache"),
    }
    for line in dockerfile.all("RUN"):
        run = dockerfile.filled(line).split("&&")
        for command in run:
            done = subprocess.run(command, shell=True, cwd=place, env=variables, capture_output=True, text=True)  # noqa: S602
            assert done.returncode == 0, done.stdout + done.stderr
    return variables


def lint(path):
    command = [Path(sys.executable).with_name("hadolint"), "--no-color", path]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_hadolint_finds_nothing_and_would_find_a_fault(package, tmp_path):
    done = lint(package / "Dockerfile")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    bad = tmp_path / "Dockerfile"
    text = (package / "Dockerfile").read_text()
    for right, wrong, code in (
        ("USER 10001:10001", "USER root", "DL3002"),
        ("pip install --no-cache-dir", "pip install", "DL3042"),
    ):
        assert right in text
        bad.write_text(text.replace(right, wrong))
        assert code in lint(bad).stdout


def test_the_lines_of_the_dockerfile_make_a_server_that_answers(package, dockerfile, installed, decoder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = {"/bundle": str(package / "bundle"), "0.0.0.0": "127.0.0.1", "8000": port}  # noqa: S104
    command = [here.get(word, word) for word in [*dockerfile.words("ENTRYPOINT"), *dockerfile.words("CMD")]]
    probe = [word.replace(":8000/", f":{port}/") for word in dockerfile.words("HEALTHCHECK")]
    program = shutil.which(command[0], path=installed["PATH"])
    assert program and "venv" in program
    with subprocess.Popen([program, *command[1:]], env=installed, stderr=subprocess.PIPE, text=True) as server:
        try:
            until = time.monotonic() + START_SECONDS
            while subprocess.run(probe, env=installed, capture_output=True, check=False).returncode:
                assert server.poll() is None, server.stderr.read()
                assert time.monotonic() < until, "the server is not healthy"
            body = {"prompt": "def emit(self", "max_tokens": 16, "temperature": 0, "prefill": "stepwise"}
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode())
            with urllib.request.urlopen(request, timeout=START_SECONDS) as reply:  # noqa: S310
                text = json.load(reply)["choices"][0]["text"]
            prompt = decoder.tokenizer.encode_prompt("def emit(self")
            events = decoder.generate(prompt, max_new_tokens=16, policy="stepwise")
            assert text == "".join(event.text for event in events)
            signals = {name: getattr(signal, name) for name in dockerfile.all("STOPSIGNAL")}
            server.send_signal(*signals.values())
            assert server.wait(START_SECONDS) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.kill()


def test_the_requirements_are_whole(installed):
    """All that is needed is installed, but for the name of ONNX Runtime's package without CUDA."""
    command = ["python", "-m", "pip", "--disable-pip-version-check", "check"]
    done = subprocess.run(command, env=installed, capture_output=True, text=True, check=False)
    missing = [line for line in done.stdout.splitlines() if "requires" in line]
    assert all("onnxruntime-gpu, which is not installed" in line for line in missing), done.stdout
    code = "import jinja2, llguidance, starlette, uvicorn, h11, onnxruntime, tokenizers"
    subprocess.run(["python", "-c", code], env=installed, check=True)


def test_a_package_made_there_has_the_same_wheel_and_an_altered_installation_makes_none(package, installed, tmp_path):
    command = ["lrt-deploy", "package", package / "bundle", tmp_path / "again", "--to", "docker", "--json"]
    program = shutil.which(command[0], path=installed["PATH"])
    subprocess.run([program, *command[1:]], env=installed, capture_output=True, check=True)
    (name,) = (path.name for path in package.glob("*.whl"))
    assert (tmp_path / "again" / name).read_bytes() == (package / name).read_bytes()
    (errors,) = Path(program).parents[1].glob("lib/python*/site-packages/lrt_deploy/errors.py")
    original = errors.read_bytes()
    errors.write_bytes(original + b"# altered\n")
    try:
        command[3] = tmp_path / "altered"
        done = subprocess.run([program, *command[1:]], env=installed, capture_output=True, text=True, check=False)
    finally:
        errors.write_bytes(original)
    assert (
        done.returncode == 1
        and "errors.py was altered after its installation" in json.loads(done.stdout)["error"]["message"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]


def test_the_image_is_no_root_and_the_compose_file_mounts_the_bundle_read_only(package, dockerfile):
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", dockerfile.one("USER"))
    assert "COPY --chmod=0555 bundle /bundle" in dockerfile.last_stage
    services = yaml.safe_load((package / "compose.yaml").read_text())["services"]
    assert list(services) == ["cpu", "gpu"]
    for name, service in services.items():
        assert service["volumes"] == ["./bundle:/bundle:ro"] and service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["build"] == {"context": ".", "target": "server", "args": {"VARIANT": name}}
        assert int(service["stop_grace_period"][:-1]) > 30 + 2 + 2, "the drain and the closing of connections"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert "profiles" not in services["cpu"] and services["gpu"]["profiles"] == ["gpu"]


def test_versions_are_those_that_the_tests_ran_with(package):
    root = Path(__file__).parents[2]
    pins = {name.lower(): version for name, version in read_pins(root / "constraints.txt")}
    for variant in ("cpu", "gpu"):
        listed = dict(read_pins(package / f"requirements-{variant}.txt"))
        known = {name: version for name, version in listed.items() if not name.startswith("nvidia-")}
        assert {name: pins[name.lower()] for name in known} == known
    assert "onnxruntime" not in listed and "onnxruntime-gpu" in listed


def read_pins(path):
    return re.findall(r"^([\w.-]+)==([\w.]+)$", path.read_text(), re.MULTILINE)
