"""The front of replicas, on replicas in this process: what it does when they die, are full, or compute nothing."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest

import lrt_deploy
from lrt_deploy.errors import BackendError, Busy
from lrt_deploy.runtime.serving.app import AppOptions
from lrt_deploy.runtime.serving.replicas.front import Front, ReplicaLost, affinity_key, labelled
from lrt_deploy.runtime.serving.replicas.replica import Replica, ReplicaOptions, Request
from lrt_deploy.runtime.serving.server import Server, listen

from .conftest import Reply, Stream

BODY = {"prompt": [1, 2, 3], "max_tokens": 40, "temperature": 0, "ignore_eos": True}


class InProcess:
    """Replicas of this process; each of `faults` is raised once, after so many parts of an answer."""

    def __init__(self, bundle, count=1, **options):
        self.options = ReplicaOptions(str(bundle), "demo", {"threads": 1}, **options)
        self.count, self.replicas, self.faults, self.keys = count, [], [], []

    async def start(self):
        self.replicas = [Replica(self.options) for _ in range(self.count)]
        for replica in self.replicas:
            await replica.start()

    async def ask(self, request, key):
        self.keys.append(key)
        parts, fault = 0, self.faults.pop(0) if self.faults else None
        answer = self.replicas[len(self.keys) % self.count].answer(request)
        try:
            while True:
                if fault and parts == fault[0]:
                    raise fault[1]
                try:
                    yield await anext(answer)
                except StopAsyncIteration:
                    return
                parts += 1
        finally:
            await answer.aclose()

    async def metrics(self):
        return {f"r{at}": replica.metrics() for at, replica in enumerate(self.replicas)}

    async def close(self):
        for replica in self.replicas:
            await replica.close()


class Local:
    """A front with its replicas and a real socket, in this process."""

    def __init__(self, replicas):
        self.replicas, self.listener = replicas, listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        options = AppOptions()
        self.front = Front(replicas, options)
        self.server = Server(self.front, options.log)
        self.loop, started = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self._run, args=(started.set,), daemon=True)
        self.thread.start()
        assert started.wait(60)

    def _run(self, started):
        self.loop.run_until_complete(self.replicas.start())
        self.loop.run_until_complete(self.server.run(self.listener, started))

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def stream(self, **fields):
        return Stream(self.port, "/v1/completions", BODY | {"stream": True} | fields, None)

    def complete(self, **fields):
        stream = Stream(self.port, "/v1/completions", BODY | fields, None)
        return Reply(stream.response.status, dict(stream.response.getheaders()), stream.response.read())

    def stop(self):
        self.loop.call_soon_threadsafe(self.server.drain, 0)
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture
def local(bundle):
    servers = []

    def start(count=1, **options):
        servers.append(Local(InProcess(bundle, count, **options)))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def expected(decoder):
    return "".join(event.text for event in decoder.generate(BODY["prompt"], 40, stop_ids=[]))


def text_of(events):
    return "".join(choice["text"] for event in events if "choices" in event for choice in event["choices"])


# Replicas that die


def test_a_replica_that_dies_before_it_answers_is_not_noticed(local, expected):
    server = local(2)
    for faults in (1, 2):
        server.replicas.faults = [(0, ReplicaLost("it died"))] * faults
        assert server.complete().json["choices"][0]["text"] == expected
        server.replicas.faults = [(0, ReplicaLost("it died"))] * faults
        *events, done = server.stream().events()
        assert done == "[DONE]" and text_of(events) == expected
    assert server.front.retries == 6 and server.front.lost == 0


def test_a_request_that_kills_each_replica_is_not_sent_to_all_of_them(local):
    server = local()
    server.replicas.faults = [(0, ReplicaLost("it died"))] * 3
    reply = server.complete()
    assert reply.status == 503 and "3 replicas died" in reply.error["message"]
    assert len(server.replicas.keys) == 3


def test_a_stream_whose_replica_dies_ends_with_an_error_and_its_retry_is_whole(local, expected):
    server = local()
    server.replicas.faults = [(1, ReplicaLost("it died"))]
    *events, error = server.stream().events()
    assert error["error"]["code"] == "replica_lost" and events and expected.startswith(text_of(events))
    *events, done = server.stream().events()
    assert done == "[DONE]" and text_of(events) == expected
    assert server.front.lost == 1


@pytest.mark.parametrize(("fault", "status"), [(Busy("all are full"), 429), (BackendError("it failed"), 503)])
def test_errors_of_calling_replicas_have_their_status(local, fault, status):
    server = local()
    server.replicas.faults = [(0, fault)]
    reply = server.complete()
    assert reply.status == status and reply.error["message"] == str(fault)


def test_a_client_that_leaves_cancels_its_request(local):
    server = local()
    engine = server.replicas.replicas[0].engine
    stream = server.stream(max_tokens=600)
    next(stream.events())
    assert engine.outstanding == 1
    stream.close()
    assert engine.wait_until_idle(60)


def test_a_front_that_drains_refuses_new_requests_and_is_not_ready(local):
    server = local()
    server.front.drain()
    reply = server.complete()
    assert reply.status == 503 and reply.error["code"] == "draining"


def test_a_host_that_announces_start_and_end_is_answered(bundle):
    sent = []

    async def send(message):
        sent.append(message["type"])

    async def live():
        events = iter(["lifespan.startup", "lifespan.shutdown"])

        async def receive():
            return {"type": next(events)}

        await Front(InProcess(bundle), AppOptions()).asgi({"type": "lifespan"}, receive, send)

    asyncio.run(live())
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


# Replicas alone


def parts_of(replica, body):
    async def collect():
        request = Request("POST", "/v1/completions", b"", [], json.dumps(body).encode())
        return [part async for part in replica.answer(request)]

    return collect()


def test_a_whole_answer_is_one_part_with_what_a_log_says_of_it(local, expected):
    server = local()
    (part,) = server.call(parts_of(server.replicas.replicas[0], BODY))
    assert part.head[0] == 200 and json.loads(part.body)["choices"][0]["text"] == expected
    assert part.entry["tokens"] == 40 and part.entry["prompt_tokens"] == 3


def test_health_is_a_token_that_was_computed(local):
    server = local(state_dir=None)
    replica = server.replicas.replicas[0]
    for _ in range(3):
        before = replica.engine.metrics.generated_tokens
        server.call(replica.check())
        assert replica.engine.metrics.generated_tokens == before + 1
    stream = server.stream(max_tokens=600)
    next(stream.events())
    before = replica.engine.metrics.requests["ok"]
    server.call(replica.check())  # the stream's tokens show it
    assert replica.engine.metrics.requests["ok"] == before


def test_a_replica_that_is_full_is_healthy_and_one_whose_backend_fails_is_not(local, monkeypatch):
    server = local(slots=1, max_waiting=0)
    replica = server.replicas.replicas[0]
    stream = server.stream(max_tokens=600)
    next(stream.events())
    server.call(replica.check())
    server.call(replica.check())
    stream.close()
    assert replica.engine.wait_until_idle(60)
    server.call(replica.check())

    def lost(*args):
        raise BackendError("the device was lost")

    monkeypatch.setattr(replica.engine.decoder, "advance", lost)
    for _ in range(2):
        with pytest.raises(BackendError, match="the device was lost"):
            server.call(replica.check())


def test_a_state_folder_that_cannot_be_made_costs_time_only(local, tmp_path, expected):
    (tmp_path / "file").touch()
    server = local(state_dir=str(tmp_path / "file" / "states"))
    assert server.complete().json["choices"][0]["text"] == expected


# Which conversation a request belongs to


def key(body, **headers):
    return affinity_key({name.encode(): value for name, value in headers.items()}, json.dumps(body).encode())


def chat(*contents):
    roles = ("system", "user", "assistant")
    return {"messages": [{"role": roles[at % 3], "content": text} for at, text in enumerate(contents)]}


def test_turns_of_a_chat_have_one_key_and_other_chats_others():
    first = key(chat("be brief", "hello"))
    assert (
        first == key(chat("be brief", "hello", "hi") | {"stream": True}) == key(chat("be brief", "hello", "hi", "and"))
    )
    assert len({first, key(chat("be brief", "help")), key(chat("be long", "hello")), ""}) == 4


def test_prompts_that_begin_alike_have_one_key():
    text = "word " * 100
    assert key({"prompt": text}) == key({"prompt": text + "and more"}) != key({"prompt": "another " + text})
    tokens = list(range(200))
    assert key({"prompt": tokens}) == key({"prompt": [*tokens, 5]}) != key({"prompt": tokens[1:]})


def test_the_session_header_goes_before_the_body():
    assert key({"prompt": "a"}, **{"x-session-id": b"s"}) == key({"prompt": "b"}, **{"x-session-id": b"s"})
    assert key({"prompt": "a"}, **{"x-session-id": b"s"}) != key({"prompt": "a"}, **{"x-session-id": b"t"})


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'{"messages": 3}', b'{"messages": [3]}', b'{"prompt": ' + b"[" * 5000]
)
def test_bodies_that_are_wrong_have_no_key(body):
    assert affinity_key({}, body) == ""


def test_metrics_of_replicas_are_one_exposition():
    text = '# HELP a b\n# TYPE a counter\na{x="1"} 2\na 3\n'
    text += '# HELP c d\n# TYPE c histogram\nc_bucket{le="+Inf"} 4\nc_sum 5\n'
    lines = labelled({"p": text, "q": text})
    assert lines.count("# HELP a b") == lines.count("# TYPE c histogram") == 1
    samples = ['a{replica="p",x="1"} 2', 'a{replica="p"} 3', 'a{replica="q",x="1"} 2', 'a{replica="q"} 3']
    assert lines[2:6] == samples
    assert 'c_bucket{replica="q",le="+Inf"} 4' in lines and 'c_sum{replica="q"} 5' in lines


def test_the_modules_of_front_and_replica_need_no_ray():
    folder = Path(lrt_deploy.runtime.serving.__file__).parent / "replicas"
    assert [path.name for path in folder.glob("*.py") if "import ray" in path.read_text()] == ["cluster.py"]
