"""A server as a process, on a bundle of the demo, and clients to it. Tests here are never skipped: CI must run them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest

START_SECONDS, ANSWER_SECONDS = 300, 120
BIN = Path(sys.executable).parent


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"{item.nodeid} was skipped, and tests of services must run"


class Reply:
    """A whole HTTP response."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


class Server:
    """`lrt-deploy serve` as a process."""

    def __init__(
        self,
        bundle: Path,
        log: Path,
        *options: str,
        environment: dict[str, str] | None = None,
        stderr: int | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.log = log
        command = [str(BIN / "lrt-deploy"), "serve", str(bundle), "--port", "0", "--json", "--threads", "1", *options]
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=file if stderr is None else stderr,
                env={**os.environ, **(environment or {})},
                preexec_fn=prepare,
            )
        try:
            self.about = self._first_document()
        except BaseException:
            self.kill()
            raise
        self.port = int(self.about["url"].rpartition(":")[2])

    def _first_document(self) -> dict[str, Any]:
        text, lines = "", SimpleQueue()
        assert self.process.stdout is not None

        def read() -> None:
            for line in self.process.stdout:
                lines.put(line)
            lines.put(b"")

        threading.Thread(target=read, daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=START_SECONDS)
            except Empty:
                raise AssertionError(f"the server did not start: {self.log.read_text()}") from None
            assert line, f"the server ended: {self.log.read_text()}"
            text += line.decode()
            with contextlib.suppress(ValueError):
                return json.loads(text)

    @property
    def model(self) -> str:
        return self.about["model"]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        connection = self.connect()
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **options: Any) -> Reply:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> Reply:
        return self.request("POST", path, body, **options)

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        reply = self.post("/v1/completions", {"prompt": prompt, **fields})
        assert reply.status == 200, reply.body
        return reply.json

    def chat(self, messages: Any, **fields: Any) -> dict[str, Any]:
        reply = self.post("/v1/chat/completions", {"messages": messages, **fields})
        assert reply.status == 200, reply.body
        return reply.json

    def open_stream(self, path: str, body: dict[str, Any], receive_buffer: int | None = None) -> Stream:
        return Stream(self.port, path, body | {"stream": True}, receive_buffer)

    def gauge(self, name: str) -> float:
        lines = self.get("/metrics").body.decode().splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))

    def wait_for(self, name: str, value: float) -> None:
        """Wait until a value of /metrics is this."""
        until = time.monotonic() + ANSWER_SECONDS
        while self.gauge(name) != value:
            assert time.monotonic() < until, f"{name} is {self.gauge(name)}, not {value}"
            time.sleep(0.005)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(timeout=ANSWER_SECONDS)

    def stop(self) -> None:
        """End it as an operator does, and check that it ended well."""
        if self.process.poll() is None:
            self.signal()
            assert self.wait() == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Stream:
    """The events of one streamed answer, read from a raw socket only when they are asked for."""

    def __init__(self, port: int, path: str, body: dict[str, Any], receive_buffer: int | None) -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(ANSWER_SECONDS)
        self.socket.connect(("127.0.0.1", port))
        data = json.dumps(body).encode()
        fields = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        head = f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n"
        self.socket.sendall(head.encode() + data)
        self._response: http.client.HTTPResponse | None = None

    @property
    def response(self) -> http.client.HTTPResponse:
        if self._response is None:
            self._response = http.client.HTTPResponse(self.socket)
            self._response.begin()
        return self._response

    def events(self) -> Iterator[Any]:
        """Yield the data of each event: JSON, or the text [DONE]."""
        for line in self.response:
            if line.strip():
                assert line.startswith(b"data: ")
                text = line[6:].strip().decode()
                yield text if text == "[DONE]" else json.loads(text)

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
        self.socket.close()


@pytest.fixture(scope="session")
def bundle(export_once) -> Path:
    return export_once("demo")


@pytest.fixture(scope="session")
def decoder(decoder_of):
    """The same model in this process, alone."""
    return decoder_of("demo")


@pytest.fixture(scope="session")
def launch(bundle, tmp_path_factory):
    """(options) -> Server; it is ended, well, when the session ends."""
    servers: list[Server] = []

    def start(*options: Any, where: Path = bundle, **settings: Any) -> Server:
        log = tmp_path_factory.mktemp("server") / "stderr"
        servers.append(Server(where, log, *map(str, options), **settings))
        return servers[-1]

    try:
        yield start
        for server in servers:
            server.stop()
    finally:
        for server in servers:
            server.kill()


@pytest.fixture(scope="session")
def server(launch) -> Server:
    """One server for all tests that change nothing of it."""
    return launch()


@pytest.fixture(scope="session")
def client(server):
    """OpenAI's own client."""
    import openai

    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client
