"""What operators get: health, bounds, clients that leave or read slowly, keys, drains, metrics, the log."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lrt_deploy.runtime.serving.app import Log
from lrt_deploy.runtime.serving.bodies import MAX_BODY_BYTES, MAX_HELD_BYTES

from .conftest import BIN

PROMPT = "import os\n"
# 64 continuations of all the capacity: minutes of work, which nothing but a cancellation ends soon.
ENDLESS = {"prompt": [[1]] * 8, "n": 8, "max_tokens": 640, "ignore_eos": True}


def in_thread(call, *args, **options):
    """Start a call; returns a function that waits for its result."""
    found = []
    thread = threading.Thread(target=lambda: found.append(call(*args, **options)), daemon=True)
    thread.start()

    def result():
        thread.join(120)
        return found[0]

    return result


def idle(server):
    server.wait_for("lrt_running", 0)
    server.wait_for("lrt_waiting", 0)


# Clients


def test_a_client_that_leaves_frees_its_slots_streaming_or_not(server):
    for stream in (True, False):
        idle(server)
        cancelled = server.gauge('lrt_requests_total{outcome="cancelled"}')
        generated = server.gauge("lrt_generated_tokens_total")
        exchange = server.open_stream("/v1/completions", ENDLESS)
        if not stream:
            exchange.close()
            idle(server)
            cancelled = server.gauge('lrt_requests_total{outcome="cancelled"}')
            exchange = server.open_stream("/v1/completions", ENDLESS | {"user": "x"})
        server.wait_for("lrt_running", 8)
        if stream:
            assert next(exchange.events())["choices"]
        exchange.close()
        idle(server)
        assert server.gauge('lrt_requests_total{outcome="cancelled"}') == cancelled + 1
        assert server.gauge("lrt_generated_tokens_total") - generated < 64 * 640


def test_a_client_that_leaves_while_it_sends_its_body_is_a_499(launch):
    server = launch()
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        connection = server.connect()
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b'{"prompt": ')
        time.sleep(0.1)  # the server waits for the rest
        connection.close()
    until = time.monotonic() + 60
    while len(lines := [line for line in server.log.read_text().splitlines() if line.startswith("{")]) < 3:
        assert time.monotonic() < until
    assert [json.loads(line)["status"] for line in lines] == [499] * 3
    assert "Traceback" not in server.log.read_text()


def test_a_slow_reader_costs_bounded_memory_and_nobody_elses_answer(server, decoder):
    expected = "".join(event.text for event in decoder.generate(PROMPT, 20))
    idle(server)
    before = server.gauge("process_resident_memory_bytes")
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 600, "ignore_eos": True, "n": 4}
    body |= {"logprobs": True, "top_logprobs": 20}  # 4 MB
    slow = server.open_stream("/v1/chat/completions", body, receive_buffer=4096)
    assert server.complete(PROMPT, max_tokens=20, temperature=0)["choices"][0]["text"] == expected
    idle(server)  # the slots are free, although most of the answer was not taken
    assert server.gauge("process_resident_memory_bytes") - before < 100 * 2**20
    *chunks, done = slow.events()
    assert done == "[DONE]"
    entries = [entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]]
    assert len(entries) == 4 * 600
    slow.close()


def test_health_answers_while_prompts_are_read(server):
    long = [[7] * 600] * 8
    result = in_thread(server.complete, long, max_tokens=1, prefill="stepwise")
    seen = 0
    while server.gauge("lrt_running") + server.gauge("lrt_waiting") or not seen:
        assert server.get("/health").status == server.get("/ready").status == 200
        seen += 1
    assert seen and result()["usage"]["completion_tokens"] == 8


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(server):
    connection = server.connect()
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", str(10**9))
    connection.endheaders()  # and no body
    response = connection.getresponse()
    assert response.status == 413 and "bytes" in json.loads(response.read())["error"]["message"]
    connection.close()
    connection = server.connect()
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    try:
        for _ in range(80):
            connection.send(b"10000\r\n" + b" " * 65536 + b"\r\n")
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):  # the server had refused before all was sent
        pass
    finally:
        connection.close()


def test_bodies_that_come_together_are_bounded_together_and_small_ones_are_answered(server):
    body = b'{"prompt": [' + b" " * (MAX_BODY_BYTES - 20) + b"1]}"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
            for _ in range(MAX_HELD_BYTES // MAX_BODY_BYTES + 1)
        ]
        for connection in opened:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have been refused
                connection.sendall(head + body[:-1])
        (refused, *_), _, _ = select.select(opened, [], [], 60)
        assert b" 503 " in refused.recv(4096)
        assert server.complete(PROMPT, max_tokens=1)["usage"]["completion_tokens"] == 1
        opened.remove(refused)
        for connection in opened:
            connection.sendall(body[-1:])
            assert b" 200 " in connection.recv(4096)


def test_hostile_values_cost_the_memory_of_few_of_them(launch):
    server = launch()
    before = peak_bytes(server)
    hostile = b'{"prompt": [' + b"[]," * 1_300_000 + b"[]]}"  # 90 MB of lists
    results = [in_thread(server.post, "/v1/completions", hostile) for _ in range(24)]
    assert {result().status for result in results} <= {400, 503}
    assert peak_bytes(server) - before < 800e6


def peak_bytes(server):
    """Return the largest resident memory that a server has had."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


# Bounds


def test_a_full_queue_is_a_429_before_any_work(launch):
    server = launch("--slots", 1, "--max-waiting", 1)
    running = server.open_stream("/v1/completions", {"prompt": [1], "max_tokens": 640, "ignore_eos": True})
    next(running.events())
    body = {"prompt": [[1]] * 2, "max_tokens": 5}
    read = server.gauge("lrt_prompt_tokens_total")
    reply = server.post("/v1/completions", body)
    assert reply.status == 429 and int(reply.headers["retry-after"]) >= 1
    assert reply.error["type"] == "rate_limit_error"
    assert server.gauge("lrt_prompt_tokens_total") == read
    reply = server.post("/v1/completions", body | {"n": 2})
    assert reply.status == 400 and "at most 2" in reply.error["message"]
    running.close()
    idle(server)
    assert server.complete([1], max_tokens=5)["choices"]


def test_a_request_beyond_its_deadline_is_a_504_and_frees_its_slots(server):
    idle(server)
    for where in ({"deadline_s": 0.1}, {"lrt": {"deadline_s": 0.1}}):
        reply = server.post("/v1/completions", ENDLESS | where)
        assert (reply.status, reply.error["code"], reply.error["param"]) == (504, "deadline_exceeded", "deadline_s")
        idle(server)


def test_of_requests_that_wait_the_one_of_the_highest_priority_comes_first(launch):
    server = launch("--slots", 1, "--turn-tokens", 0)
    running = server.open_stream("/v1/completions", ENDLESS | {"prompt": [1], "n": 1})
    next(running.events())
    results = []
    for waiting, priority in enumerate(({}, {"priority": -1}, {"priority": 5}, {"lrt": {"priority": 9}}), 1):
        results.append(in_thread(server.complete, [1], max_tokens=200, ignore_eos=True, **priority))
        server.wait_for("lrt_waiting", waiting)
    running.close()
    ids = [result()["id"] for result in results]
    until = time.monotonic() + 60
    while len(logged := [line["id"] for line in log_of(server) if line.get("id") in ids]) < 4:
        assert time.monotonic() < until
    assert logged == [ids[3], ids[2], ids[0], ids[1]]


def test_an_answer_that_is_given_in_turns_is_that_of_a_single_run(launch):
    server = launch("--slots", 1, "--turn-tokens", 16)
    body = {"prompt": [1], "max_tokens": 600, "temperature": 1, "seed": 3, "ignore_eos": True}
    running = server.open_stream("/v1/completions", body)
    found = running.events()
    first = next(found)
    assert server.complete([2], max_tokens=5, ignore_eos=True)["usage"]["completion_tokens"] == 5
    text = "".join(event["choices"][0]["text"] for event in (first, *found) if event != "[DONE]")
    assert text == server.post("/v1/completions", body).json["choices"][0]["text"]


def log_of(server):
    lines = server.log.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]


def test_the_limit_of_new_tokens_holds_for_what_is_said_and_for_silence(launch, decoder):
    server = launch("--max-tokens-limit", 5, "--served-model-name", "demo")
    reply = server.post("/v1/completions", {"prompt": "a", "max_tokens": 6, "model": "demo"})
    assert reply.status == 400 and reply.error["param"] == "max_tokens"
    answer = server.chat([{"role": "user", "content": "a"}], ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 5 and answer["model"] == "demo"


def test_an_implicit_bos_is_put_before_token_prompts_that_lack_it(launch, decoder):
    server = launch("--implicit-bos")
    ids = decoder.tokenizer.encode(PROMPT)
    expected = "".join(event.text for event in decoder.generate(PROMPT, 10))
    for prompt in (PROMPT, ids, [decoder.tokenizer.bos_id, *ids]):
        answer = server.complete(prompt, max_tokens=10, temperature=0)
        assert answer["choices"][0]["text"] == expected
        assert answer["usage"]["prompt_tokens"] == len(ids) + 1
    echoed = server.complete(ids, max_tokens=10, temperature=0, echo=True)
    assert echoed["choices"][0]["text"] == PROMPT + expected


def test_a_slash_at_the_end_of_a_path_is_a_404_and_no_redirect(server):
    for path in ("/v1/completions/", "/health/", "/metrics/"):
        reply = server.get(path)
        assert reply.status == 404 and "location" not in reply.headers and path in reply.error["message"]


# Keys and origins


def test_with_a_key_only_health_and_preflights_answer_without_it(launch):
    origin = "https://example.org"
    server = launch("--cors-origin", origin, environment={"LRT_DEPLOY_API_KEY": "s3cret"})
    body = {"prompt": "a", "max_tokens": 1}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": "Bearer é"}):
        headers = {name: value.encode() for name, value in headers.items()}
        reply = server.post("/v1/completions", body, headers=headers)
        assert reply.status == 401 and reply.error["type"] == "authentication_error"
        assert server.get("/metrics", headers=headers).status == 401
    key = {"Authorization": "Bearer s3cret", "Origin": origin}
    reply = server.post("/v1/completions", body, headers=key)
    assert reply.status == 200 and reply.headers["access-control-allow-origin"] == origin
    for scheme in ("bearer", "BEARER"):  # RFC 9110, 11.1: the scheme's case does not matter
        assert server.get("/v1/models", headers={"Authorization": f"{scheme} s3cret"}).status == 200
    for path in ("/health", "/ready", "/v2/health/live", "/v2/health/ready"):
        assert server.get(path).status == 200
    asking = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    assert server.request("OPTIONS", "/v1/completions", headers=asking).status == 200
    asking["Origin"] = "https://other.example"
    assert "access-control-allow-origin" not in server.request("OPTIONS", "/v1/completions", headers=asking).headers
    assert "s3cret" not in server.log.read_text()


def test_without_origins_no_page_of_others_may_call(server):
    reply = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, headers={"Origin": "https://example.org"})
    assert reply.status == 403 and not [name for name in reply.headers if name.startswith("access-control")]


def test_requests_of_pages_from_elsewhere_are_refused_before_any_work(server, launch):
    body = {"prompt": "a", "max_tokens": 1}
    host, work = f"127.0.0.1:{server.port}", server.gauge("lrt_prompt_tokens_total")
    foreign = (
        "https://example.org",
        "null",
        "",
        f"http://{host}.example.org",
        "http://127.0.0.1",
        f"x@{host}",
        "http://[",
    )
    for origin in foreign:
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            reply = server.post(path, body, headers={"Origin": origin, "Content-Type": "text/plain"})
            assert reply.status == 403 and "Origin" in reply.error["message"], origin
    assert server.gauge("lrt_prompt_tokens_total") == work
    own = {"Origin": f"http://{host}"}
    assert server.post("/v1/completions", body, headers=own).status == 200
    allowing = launch("--cors-origin", "https://a.example", "--cors-origin", "https://b.example")
    for origin, status in (("https://b.example", 200), ("https://c.example", 403)):
        assert allowing.post("/v1/completions", body, headers={"Origin": origin}).status == status
    everyone = launch("--cors-origin", "*")
    assert everyone.post("/v1/completions", body, headers={"Origin": "https://c.example"}).status == 200


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("--host", "host"),
        ("--cors-origin", "cors_origin"),
        ("--served-model-name", "served_model_name"),
        ("--api-key", "API key"),
    ],
)
def test_an_empty_option_is_an_error_that_names_it(bundle, name, named):
    command = [str(BIN / "lrt-deploy"), "serve", str(bundle), "--port", "0", name, ""]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 1 and f"{named} is empty" in result.stderr
    assert result.stderr.count("\n") == 1


# The end


def test_a_drain_finishes_running_answers_and_refuses_new_ones(launch, decoder):
    server = launch()
    stream = server.open_stream("/v1/completions", ENDLESS | {"n": 2, "temperature": 0})
    events = stream.events()
    first = next(events)["choices"][0]
    waiting = server.connect()
    waiting.connect()  # accepted before the signal
    server.signal()
    while server.get("/ready").status == 200:
        time.sleep(0.01)
    assert server.get("/health").status == 200
    reply = server.post("/v1/completions", {"prompt": "a"})
    assert reply.status == 503 and reply.headers["retry-after"]
    texts = {first["index"]: first["text"]}
    *rest, done = events
    for event in rest:
        for choice in event["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert done == "[DONE]" and len(texts) == 16
    expected = "".join(event.text for event in decoder.generate([1], 640, stop_ids=[]))
    assert set(texts.values()) == {expected}
    stream.close()
    waiting.close()
    assert server.wait() == 0


def test_a_drain_ends_in_time_and_a_second_signal_at_once(launch):
    server = launch("--drain-seconds", 0.2)
    stream = server.open_stream("/v1/completions", ENDLESS)
    next(stream.events())
    server.signal(signal.SIGINT)
    *_, error = stream.events()
    assert "shutting down" in error["error"]["message"]
    assert server.wait() == 0
    stream.close()
    server = launch("--drain-seconds", 1000)
    end_by_two_signals(server)


def end_by_two_signals(server):
    """Signal a server that answers, again when it drains: the second one ends it at once."""
    stream = server.open_stream("/v1/completions", ENDLESS)
    next(stream.events())
    server.signal()
    while server.get("/ready").status == 200:
        time.sleep(0.01)
    server.signal()
    assert server.wait() == 143
    stream.close()


# What is seen


def test_metrics_are_prometheus_text_and_count_what_was_done(server):
    idle(server)
    names = ("lrt_prompt_tokens_total", "lrt_generated_tokens_total", 'lrt_requests_total{outcome="ok"}')
    before = [server.gauge(name) for name in names]
    server.complete([1, 2, 3], max_tokens=4, n=2, ignore_eos=True)
    assert [server.gauge(name) - old for name, old in zip(names, before, strict=True)] == [3, 8, 1]
    text = server.get("/metrics").body.decode()
    assert server.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")
    declared = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            float(value)
            base = name.partition("{")[0]
            assert base in declared or base.rpartition("_")[0] in declared, line
    count = server.gauge("lrt_time_to_first_token_seconds_count")
    assert count == server.gauge('lrt_time_to_first_token_seconds_bucket{le="+Inf"}') > 0


def test_each_request_is_one_json_line_on_stderr(server):
    answer = server.complete([1, 2], max_tokens=3, ignore_eos=True)
    until = time.monotonic() + 60  # it is written after the answer was sent
    while not (lines := [line for line in server.log.read_text().splitlines() if answer["id"] in line]):
        assert time.monotonic() < until
    (line,) = map(json.loads, lines)
    assert (line["path"], line["status"], line["prompt_tokens"], line["tokens"]) == ("/v1/completions", 200, 2, 3)
    assert line["ms"] > 0 and line["method"] == "POST"


def test_a_stderr_that_nobody_reads_stops_neither_answers_nor_signals(launch):
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    servers = [launch("--drain-seconds", 1000, stderr=writing) for _ in range(2)]
    for server in servers:
        for _ in range(40):
            assert server.get(f"/{'a' * 200}").status == 404
    draining, ended = servers
    draining.signal()
    assert draining.wait() == 0
    end_by_two_signals(ended)
    os.close(reading)
    os.close(writing)


def test_lines_that_the_log_has_no_room_for_are_counted():
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    log = Log(writing, most=8)
    for number in range(1000):
        log.put(f"{number:099d}")
    found, written, dropped = b"", 0, 0
    while written + dropped < 1000:
        found += os.read(reading, 65536)
        lines = found.decode().splitlines() if found.endswith(b"\n") else []
        notes = [line for line in lines if "dropped" in line]
        written, dropped = len(lines) - len(notes), sum(int(line.split()[0]) for line in notes)
    assert written + dropped == 1000 and dropped
    log.put("again")
    assert os.read(reading, 100) == b"again\n"
    os.close(reading)
    os.close(writing)


def test_only_serve_loads_starlette_and_uvicorn(bundle, tmp_path):
    code = """if True:
        import sys, lrt_deploy
        from lrt_deploy.cli.app import app
        source, target = sys.argv[2:]
        for words in (["generate", sys.argv[1], "--tokens", "1,2", "--max-new-tokens", "2"],
                      ["batch", sys.argv[1], source, target, "--json"]):
            assert app(words, standalone_mode=False) == 0
        import lrt_deploy.runtime.serving.openai_api
        assert not {"starlette", "uvicorn", "torch"} & sys.modules.keys()
    """
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a"}}) + "\n")
    command = [sys.executable, "-c", code, str(bundle), str(source), str(tmp_path / "out.jsonl")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert result.returncode == 0, result.stderr
