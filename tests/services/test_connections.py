"""Connections: their number, requests that do not come to their end, clients that close one side, names of the host."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import time

import pytest

from .conftest import BIN

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.fixture(scope="module")
def small(launch):
    """A server with small bounds."""
    times = ("--head-seconds", 0.5, "--body-seconds", 0.7, "--idle-seconds", 0.6)
    return launch("--max-connections", 4, *times)


@contextlib.contextmanager
def connected(server, data=b""):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(data)
        yield connection


def all_of(connection):
    """Read until the server closes; a reset is an end too."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return found


def answers_in(data):
    """Yield the bodies of whole answers, without interim ones."""
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        if status(head) != 100:
            length = int(re.search(rb"content-length: (\d+)", head)[1])
            yield json.loads(data[:length])
            data = data[length:]


def request(body, *fields, path="/v1/completions", version="1.1"):
    data = json.dumps(body).encode()
    head = [f"POST {path} HTTP/{version}", "Host: 127.0.0.1", f"Content-Length: {len(data)}", *fields]
    return "\r\n".join([*head, "", ""]).encode() + data


def status(data):
    return int(data.split(b" ", 2)[1])


def test_a_request_whose_head_or_body_does_not_come_is_a_408(small):
    parts = (HEAD, HEAD[:20], HEAD + b"Content-Length: 99\r\n\r\n{", b"G")
    for part in parts:
        with connected(small, part) as connection:
            found = all_of(connection)
        assert status(found) == 408 and b"connection: close" in found
        error = json.loads(found.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "request_timeout"
    assert "Traceback" not in small.log.read_text()


def test_a_head_that_comes_byte_by_byte_has_no_longer(small):
    with connected(small) as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for byte in HEAD * 40:
            connection.sendall(bytes([byte]))
            time.sleep(0.01)
        pytest.fail("the server has read all of it")


def test_connections_that_say_nothing_are_closed_new_or_used(small):
    with connected(small) as connection:
        assert all_of(connection) == b""
    with connected(small, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") as connection:
        found = all_of(connection)
    assert status(found) == 200 and found.count(b"HTTP/1.1") == 1


def test_a_connection_too_many_takes_the_place_of_an_idle_one_or_gets_a_503(launch):
    server = launch("--max-connections", 3)
    waiting = HEAD + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n"  # its answer says when the server has read it
    with contextlib.ExitStack() as stack:
        idle = stack.enter_context(connected(server))
        busy = [stack.enter_context(connected(server, waiting)) for _ in range(2)]
        busy.append(stack.enter_context(connected(server, waiting)))  # makes `idle` go
        assert all_of(idle) == b""
        for connection in busy:
            assert connection.recv(12) == b"HTTP/1.1 100"
        with connected(server, request({"prompt": "a" * 10**5})) as refused:
            found = all_of(refused)
        assert status(found) == 503 and b"retry-after: 1" in found
        assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["code"] == "connections"
        busy.pop().close()
        until = time.monotonic() + 60
        while True:
            with connected(server, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n") as health:
                if status(all_of(health)) == 200:
                    break
            assert time.monotonic() < until


def test_more_connections_than_files_are_refused_at_the_start(bundle):
    command = [BIN / "lrt-deploy", "serve", bundle, "--port", "0", "--max-connections", str(2**40)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 1 and "max_connections is 1099511627776" in result.stderr


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_closed_its_sending_side_gets_its_answer(server, decoder, stream):
    body = {"prompt": "import os\n", "max_tokens": 60, "temperature": 0, "stream": stream, "ignore_eos": True}
    expected = "".join(event.text for event in decoder.generate("import os\n", 60, stop_ids=[]))
    with connected(server, request(body)) as connection:
        connection.shutdown(socket.SHUT_WR)
        found = all_of(connection)  # and the server closes
    while found.startswith(b"HTTP/1.1 100 "):
        found = found.partition(b"\r\n\r\n")[2]
    head, _, rest = found.partition(b"\r\n\r\n")
    assert status(head) == 200
    if stream:
        assert rest.rstrip().endswith(b"0") and b"data: [DONE]" in rest
    else:
        assert json.loads(rest)["choices"][0]["text"] == expected


def test_a_client_that_has_left_is_known_from_one_that_waits(server):
    endless = {"prompt": [[1]] * 8, "n": 8, "max_tokens": 640, "ignore_eos": True}
    server.wait_for("lrt_running", 0)
    for stream in (False, True):
        cancelled = server.gauge('lrt_requests_total{outcome="cancelled"}')
        with connected(server, request(endless | {"stream": stream})) as connection:
            server.wait_for("lrt_running", 8)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(9) == b"HTTP/1.1 "
        server.wait_for("lrt_running", 0)
        assert server.gauge('lrt_requests_total{outcome="cancelled"}') == cancelled + 1


def test_a_client_that_has_sent_more_than_its_request_and_left_frees_its_slots(server):
    endless = {"prompt": [[1]] * 8, "n": 8, "max_tokens": 640, "ignore_eos": True}
    for further in (b"G", b"\r\n", request(endless)):
        server.wait_for("lrt_running", 0)
        cancelled = server.gauge('lrt_requests_total{outcome="cancelled"}')
        with connected(server, request(endless)) as connection:
            server.wait_for("lrt_running", 8)
            connection.sendall(further)
        server.wait_for("lrt_running", 0)
        assert server.gauge('lrt_requests_total{outcome="cancelled"}') == cancelled + 1


def test_requests_that_are_sent_ahead_are_answered_in_order_also_when_no_more_can_come(server, decoder):
    prompts = ("import os\n", "def f(x):\n", "class A:\n")
    with connected(server) as connection:
        fields = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
        connection.sendall(b"".join(request({"prompt": prompt, **fields}) for prompt in prompts))
        connection.shutdown(socket.SHUT_WR)
        found = all_of(connection)
    texts = [body["choices"][0]["text"] for body in answers_in(found)]
    assert texts == ["".join(event.text for event in decoder.generate(text, 20, stop_ids=[])) for text in prompts]


def test_on_a_loopback_address_only_loopback_names_and_allowed_ones_are_hosts(server, launch):
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "1.2.3.4", "[::2]", "a b"):
        for path in ("/v1/completions", "/tokenize"):
            reply = server.post(path, {"prompt": "a", "max_tokens": 1}, headers={"Host": host})
            assert reply.status == 403 and "Host" in reply.error["message"], host
            own = {"Host": host, "Origin": f"http://{host}"}  # as a page has it whose name was pointed at this server
            assert server.post(path, {"prompt": "a"}, headers=own).status == 403
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "127.8.9.1:80", "[::1]", "[::1]:8000"):
        assert server.get("/v1/models", headers={"Host": host}).status == 200, host
    with connected(server, b"GET /v1/models HTTP/1.0\r\n\r\n") as connection:  # browsers always send one
        assert status(all_of(connection)) == 200
    allowing = launch("--allowed-host", "models.example.org")
    assert allowing.get("/v1/models", headers={"Host": "Models.example.org:80"}).status == 200
    assert allowing.get("/v1/models", headers={"Host": "other.example.org"}).status == 403
