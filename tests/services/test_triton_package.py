"""The package `triton` in the real tritonserver: its tokens are those of `lrt-deploy generate`, and it ends well.

`make triton-env` makes the environment: NVIDIA's wheel with tritonserver and its Python backend, Triton's client, and
the packages that the package itself lists.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest

HERE = Path(__file__).parents[2]
SECONDS = 120
PROMPT = "def emit(self, record):\n"
GREEDY = {"temperature": 0, "prefill": "stepwise", "ignore_eos": True}


@pytest.fixture(scope="module")
def environment():
    folder = Path(os.environ.get("LRT_DEPLOY_TRITON_ENV") or HERE / "build" / "triton")
    assert (folder / "bin" / "python").exists(), f"{folder} is missing: `make triton-env`"
    return folder


@pytest.fixture(scope="module")
def package(bundle, environment, package_of):
    """The package; what its README installs is in the environment."""
    folder = package_of(bundle, "triton")
    line = re.search(r"^`pip (install [^`]*)`", (folder / "README.md").read_text(), re.MULTILINE)[1]
    command = [environment / "bin" / "python", "-m", "pip", *shlex.split(line), "--quiet"]
    for more in ((), ("--force-reinstall", *folder.glob("*.whl"))):
        words = command if not more else [*command[:4], "--no-deps", "--quiet", *more]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def backends(environment, tmp_path_factory):
    """A folder with the Python backend, for this version of Python."""
    folder = tmp_path_factory.mktemp("backends")
    (server,) = environment.glob("lib/python*/site-packages/pytriton/tritonserver")
    shutil.copytree(server / "backends" / "python", folder / "python")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", folder / "python")
    os.chmod(stub, 0o755)  # noqa: PTH101, S103
    return folder


class Triton:
    """The command of the README, with addresses on this machine."""

    def __init__(self, package: Path, environment: Path, backends: Path, log: Path) -> None:
        self.package, self.environment, self.log = package, environment, log
        self.model = next((package / "models").iterdir()).name
        (libraries,) = environment.glob("lib/python*/site-packages/nvidia_pytriton.libs")
        (program,) = environment.glob("lib/python*/site-packages/pytriton/tritonserver/bin/tritonserver")
        with contextlib.ExitStack() as free:
            sockets = [free.enter_context(socket.socket()) for _ in range(3)]
            for found in sockets:
                found.bind(("127.0.0.1", 0))
            self.http, self.grpc, self.metrics = (found.getsockname()[1] for found in sockets)
        command = re.search(r"\A```console\n\$ (.*)\n```", (package / "README.md").read_text())[1]
        name, *options = shlex.split(command)
        assert name == "tritonserver"
        options += [f"--backend-directory={backends}", "--exit-timeout-secs=5"]
        for kind in ("http", "grpc", "metrics"):
            options += [f"--{kind}-address=127.0.0.1", f"--{kind}-port={getattr(self, kind)}"]
        variables = os.environ | {
            "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "LD_LIBRARY_PATH": f"{libraries}{os.pathsep}{sysconfig.get_config_var('LIBDIR')}",
            "OMP_NUM_THREADS": "1",
        }
        program.chmod(0o755)
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [program, *options], cwd=package, env=variables, stdout=file, stderr=subprocess.STDOUT
            )
        self.wait_for(self.is_ready)

    def is_ready(self):
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            return self.get("/v2/health/ready")[0] == 200
        return False

    def wait_for(self, condition):
        until = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)

    def get(self, path, body=None, port=None):
        connection = http.client.HTTPConnection("127.0.0.1", port or self.http, timeout=SECONDS)
        try:
            connection.request("GET" if body is None else "POST", path, body)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def open_stream(self, inputs):
        """Send a request to `generate_stream`; returns its connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=SECONDS)
        connection.request("POST", f"/v2/models/{self.model}/generate_stream", json.dumps(inputs))
        return connection

    def stream(self, inputs):
        """The events of `generate_stream`."""
        with contextlib.closing(self.open_stream(inputs)) as connection:
            return read_events(connection)

    def generate(self, inputs):
        return self.get(f"/v2/models/{self.model}/generate", json.dumps(inputs))

    def by_grpc(self, *requests, cancel_after=None):
        """Answers of Triton's own client; see triton_client.py."""
        script = Path(__file__).with_name("triton_client.py")
        command = [self.environment / "bin" / "python", script, f"127.0.0.1:{self.grpc}", self.model]
        asked = json.dumps({"requests": requests, "cancel_after": cancel_after})
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["answers"]

    def metric(self, name):
        _, text = self.get("/metrics", port=self.metrics)
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
        return float(line.rpartition(" ")[2])

    def probe(self):
        command = [
            self.environment / "bin" / "python",
            self.package / "probe.py",
            f"http://127.0.0.1:{self.http}",
            "20",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def close(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(SECONDS)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def start(package, environment, backends, tmp_path_factory):
    started = []

    def launch():
        started.append(Triton(package, environment, backends, tmp_path_factory.mktemp("log") / "log"))
        return started[-1]

    yield launch
    for triton in started:
        triton.close()


@pytest.fixture(scope="module")
def triton(start):
    return start()


def inputs_of(text, stream=True, returns=("token_ids", "finish_reason"), **sampling):
    flags = {f"return_{name}": True for name in returns}
    return {"text_input": text, "stream": stream, "sampling_parameters": json.dumps(sampling), **flags}


def read_events(connection):
    response = connection.getresponse()
    assert response.status == 200, response.read()
    return [json.loads(line[5:]) for line in response if line.startswith(b"data:")]


def tokens_of(events):
    """Triton shows an array of one value as that value."""
    found = []
    for event in events:
        tokens = event.get("token_ids", [])
        found += tokens if isinstance(tokens, list) else [tokens]
    return found


def generated(decoder, text, count, **options):
    prompt = decoder.tokenizer.encode_prompt(text)
    return [event.token for event in decoder.generate(prompt, max_new_tokens=count, policy="stepwise", **options)]


def test_both_streams_give_the_tokens_of_the_command(triton, bundle):
    command = [Path(sys.executable).with_name("lrt-deploy"), "generate", bundle, "--prompt", PROMPT, "--json"]
    command += ["--max-new-tokens", "64", "--prefill", "stepwise", "--ignore-stop-tokens"]
    expected = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    inputs = inputs_of(PROMPT, max_tokens=64, **GREEDY)
    (by_grpc,) = triton.by_grpc(inputs)
    assert by_grpc["error"] is None and by_grpc["finish_reason"] == "length"
    assert by_grpc["token_ids"] == expected["tokens"] and by_grpc["text"] == expected["text"]
    events = triton.stream(inputs)
    assert tokens_of(events) == expected["tokens"]
    assert "".join(event["text_output"] for event in events) == expected["text"]
    assert [event["finish_reason"] for event in events][-1] == "length"
    assert {event["finish_reason"] for event in events[:-1]} <= {"None"}


def test_a_request_that_is_not_streamed_gets_one_answer_with_its_prompt_unless_it_is_excluded(triton, decoder):
    counts = ("token_ids", "num_input_tokens", "num_output_tokens", "cumulative_logprob")
    inputs = inputs_of(PROMPT, stream=False, returns=counts, max_tokens=16, **GREEDY)
    expected = generated(decoder, PROMPT, 16, stop_ids=[])
    status, text = triton.generate(inputs)
    answer = json.loads(text)
    assert status == 200 and answer["token_ids"] == expected
    assert answer["text_output"] == PROMPT + decoder.tokenizer.decode(expected)
    assert answer["num_input_tokens"] == len(decoder.tokenizer.encode_prompt(PROMPT))
    assert answer["num_output_tokens"] == 16 and answer["cumulative_logprob"] < 0
    _, text = triton.generate(inputs | {"exclude_input_in_output": True})
    assert json.loads(text)["text_output"] == decoder.tokenizer.decode(expected)


def test_a_seed_gives_the_tokens_of_the_library_and_several_answers_have_seeds_of_their_own(triton, decoder):
    sampling = {
        "max_tokens": 12,
        "temperature": 1.0,
        "top_p": 0.9,
        "prefill": "stepwise",
        "ignore_eos": True,
        "seed": 5,
    }
    (answer,) = triton.by_grpc(inputs_of(PROMPT, **sampling))
    alone = [generated(decoder, PROMPT, 12, temperature=1.0, top_p=0.9, seed=seed, stop_ids=[]) for seed in (5, 6)]
    assert answer["token_ids"] == alone[0]
    _, text = triton.generate(inputs_of(PROMPT, stream=False, n=2, **sampling) | {"exclude_input_in_output": True})
    assert json.loads(text)["text_output"] == [decoder.tokenizer.decode(tokens) for tokens in alone]


def test_eight_streams_share_their_steps_and_each_has_its_own_tokens(triton, decoder):
    texts = [f"class Handler{number}:\n" for number in range(8)]
    count = 500
    steps, tokens = triton.metric("lrt_steps_total"), triton.metric("lrt_generated_tokens_total")
    connections = [triton.open_stream(inputs_of(text, max_tokens=count, **GREEDY)) for text in texts]
    answers = [tokens_of(read_events(connection)) for connection in connections]
    for connection in connections:
        connection.close()
    assert answers == [generated(decoder, text, count, stop_ids=[]) for text in texts]
    triton.wait_for(lambda: triton.metric("lrt_generated_tokens_total") - tokens == 8 * count)
    occupied = 8 * count / (triton.metric("lrt_steps_total") - steps)
    assert occupied >= 2.5, "rows of a batch"


def test_a_client_that_cancels_frees_its_slots(triton):
    """It asks for more than the slots can do soon: 64 answers of 500 tokens, of which most wait."""
    before = triton.metric("lrt_generated_tokens_total")
    inputs = inputs_of(PROMPT, returns=(), max_tokens=500, n=64, **GREEDY)
    triton.by_grpc(inputs, cancel_after=1)
    triton.wait_for(lambda: triton.metric("lrt_running") == triton.metric("lrt_waiting") == 0)
    assert triton.metric("lrt_generated_tokens_total") - before < 64 * 500 / 2
    connection = triton.open_stream(inputs)
    connection.sock.recv(1)
    connection.sock.close()
    connection.close()
    triton.wait_for(lambda: triton.metric("lrt_running") == triton.metric("lrt_waiting") == 0)
    assert triton.metric("lrt_generated_tokens_total") - before < 64 * 500
    assert triton.probe().returncode == 0


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (inputs_of("", max_tokens=1), "prompt is empty"),
        (inputs_of("a", max_tokens=10_000), "this model's capacity is 640 tokens"),
        (inputs_of("a", temperature="hot"), "temperature"),
        (inputs_of("a", stop_token_ids=[3]), "stop_token_ids is not supported"),
        (inputs_of("a", best_of=3, n=2), "best_of"),
        (inputs_of("a") | {"sampling_parameters": "{"}, "sampling_parameters is not valid JSON"),
        (inputs_of("a") | {"sampling_parameters": "[]"}, "sampling_parameters is no JSON object"),
        (inputs_of("a") | {"exclude_input_in_output": False}, "exclude_input_in_output is false"),
        (inputs_of("a") | {"return_logprobs": True}, "return_logprobs is true"),
    ],
)
def test_what_is_wrong_is_an_error_that_names_it(triton, wrong, reason):
    (answer,) = triton.by_grpc(wrong)
    assert answer["error"] is not None and reason in answer["error"]
    assert answer["text"] == ""


def test_the_probe_notices_that_the_process_of_the_model_was_killed(start):
    """Triton itself says that it is ready: the twin, and why there is a probe."""
    triton = start()
    assert triton.probe().returncode == 0
    (stub,) = psutil.Process(triton.process.pid).children()
    stub.kill()
    triton.wait_for(lambda: triton.probe().returncode == 1)
    assert "gives no token: " in triton.probe().stderr
    assert triton.get("/v2/health/ready")[0] == 200


def test_hadolint_finds_nothing(package):
    command = [Path(sys.executable).with_name("hadolint"), "--no-color", package / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
