"""What no client can bring about: faults of the backend under a running server, and clients that never read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import lrt_deploy
from lrt_deploy.runtime.serving import app
from lrt_deploy.runtime.serving import server as serving
from lrt_deploy.runtime.serving.engine import Engine
from lrt_deploy.runtime.serving.openai_api import Api, ApiOptions
from lrt_deploy.runtime.serving.server import Server, listen

from .conftest import Reply, Stream

BODY = {"prompt": [1, 2, 3], "max_tokens": 60, "temperature": 0, "ignore_eos": True}


class Local:
    """A server in this process, with real sockets, so that faults can be planted under it."""

    def __init__(self, decoder, send_buffer=None, **options):
        self.engine = Engine(decoder, **options)
        options = app.AppOptions()
        self.server = Server(app.App(self.engine, Api(decoder, ApiOptions("demo")), options), options.log)
        self.listener = listen("127.0.0.1", 0)
        if send_buffer:
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.port = self.listener.getsockname()[1]
        started = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, args=(started.set,), daemon=True)
        self.thread.start()
        assert started.wait(60)

    def _run(self, started):
        self.loop.run_until_complete(self.server.run(self.listener, started))
        self.loop.close()

    def stop(self):
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.server.drain, 0)
        self.thread.join(60)
        assert not self.thread.is_alive()

    def stream(self, body, receive_buffer=None):
        return Stream(self.port, "/v1/completions", BODY | {"stream": True} | body, receive_buffer)

    def complete(self, body):
        stream = Stream(self.port, "/v1/completions", BODY | body, None)
        return Reply(stream.response.status, dict(stream.response.getheaders()), stream.response.read())


@pytest.fixture
def local(decoder):
    servers = []

    def start(**options):
        servers.append(Local(decoder, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def spoil(monkeypatch, engine, position, token):
    """Make the logits after this token at this position NaN."""
    buffers = type(engine.batch._shards[0].state.buffers)
    real = buffers.decode

    def decode(self, tokens, positions, head):
        logits = real(self, tokens, positions, head)
        if logits is not None:
            for row, at in enumerate(positions.tolist()):
                if at == position and tokens[row] == token:
                    logits[row] = np.nan
        return logits

    monkeypatch.setattr(buffers, "decode", decode)


def test_an_error_in_mid_stream_is_its_last_event_and_others_go_on(local, decoder, monkeypatch):
    events = list(decoder.generate(BODY["prompt"], 60, stop_ids=[]))
    others = list(decoder.generate([300, 700], 60, stop_ids=[]))
    other = "".join(event.text for event in others)
    assert others[20].token != events[19].token
    server = local()
    spoil(monkeypatch, server.engine, 22, events[19].token)
    good, bad = server.stream({"prompt": [300, 700]}), server.stream({})
    *chunks, error = bad.events()
    assert error["error"]["type"] == "server_error" and "finite" in error["error"]["message"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "".join(event.text for event in events[:20])
    *chunks, done = good.events()
    assert done == "[DONE]" and "".join(chunk["choices"][0]["text"] for chunk in chunks) == other
    reply = server.complete({})
    assert reply.status == 500 and reply.error["code"] == "non_finite"


def test_a_backend_that_is_lost_makes_the_server_unready_and_says_why(local, decoder, monkeypatch):
    server = local()

    def lost(*args):
        raise lrt_deploy.BackendError("the device was lost")

    monkeypatch.setattr(decoder, "advance", lost)
    for _ in range(2):
        reply = server.complete({})
        assert reply.status == 503 and "the device was lost" in reply.error["message"]
    assert not server.engine.ready


@pytest.mark.parametrize("whole", [False, True])
def test_a_client_that_never_reads_is_dropped_in_the_end(local, monkeypatch, caplog, whole):
    monkeypatch.setattr(serving, "SEND_SECONDS", 0.3)
    server = local(send_buffer=4096)
    big = {"max_tokens": 600, "logprobs": 5, "n": 4}
    never = server.stream(big | ({"stream": False} if whole else {}), receive_buffer=2048)
    until = time.monotonic() + 60
    while not server.server._connections.by_client:
        assert time.monotonic() < until
    while server.server._connections.by_client:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert server.engine.wait_until_idle(60)
    assert server.complete({}).status == 200
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := never.socket.recv(65536):
            received += part
    assert received and b"[DONE]" not in received and b'"usage"' not in received
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_a_client_that_takes_too_little_is_dropped_before_much_waits_for_it(local, monkeypatch):
    monkeypatch.setattr(app, "_MOST_PENDING", 200)
    server = local(send_buffer=4096)
    never = server.stream({"max_tokens": 600, "logprobs": 5, "n": 4}, receive_buffer=2048)
    until = time.monotonic() + 60
    while server.engine.metrics.requests["cancelled"] == 0:
        assert time.monotonic() < until
        time.sleep(0.01)
    never.close()
    assert server.complete({}).status == 200


@pytest.mark.parametrize("whole", [False, True])
def test_a_drain_waits_for_a_client_that_still_reads_a_finished_answer(local, monkeypatch, whole):
    monkeypatch.setattr(serving, "_CLOSING_SECONDS", 0.1)
    server = local(send_buffer=4096)
    slow = server.stream({"max_tokens": 600, "logprobs": 5, "stream": not whole}, receive_buffer=2048)
    until = time.monotonic() + 60
    while server.engine.metrics.requests["ok"] == 0:
        assert time.monotonic() < until
        time.sleep(0.01)
    server.loop.call_soon_threadsafe(server.server.drain, 1000)
    time.sleep(1)  # more than the time for closing
    received = slow.response.read()
    assert received.endswith(b"data: [DONE]\n\n") or json.loads(received)["usage"]["completion_tokens"] == 600
    slow.close()
    server.thread.join(60)
    assert not server.thread.is_alive()


def test_first_requests_for_the_model_score_its_text_once(local, decoder, monkeypatch):
    calls, real = [], decoder.score

    def score(texts):
        calls.append(texts)
        time.sleep(0.2)
        return real(texts)

    monkeypatch.setattr(decoder, "score", score)
    server = local()

    def get(_):
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/v1/models", timeout=60) as response:
            return response.status

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(get, range(8))) == [200] * 8
    assert len(calls) == 1


def test_small_answers_are_sent_at_once(local):
    server = local()
    with socket.create_connection(("127.0.0.1", server.port)):
        until = time.monotonic() + 60
        while not server.server._connections.by_client:
            assert time.monotonic() < until
        (transport,) = server.server._connections.by_client.values()
        accepted = transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
