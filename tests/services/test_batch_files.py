"""`lrt-deploy batch`: answers in a file, a run that is killed goes on, nothing of others is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from lrt_deploy.errors import BackendError
from lrt_deploy.runtime.serving import engine as engine_module
from lrt_deploy.runtime.serving import jsonl
from lrt_deploy.runtime.serving.engine import Engine
from lrt_deploy.runtime.serving.openai_api import Api, ApiOptions

BIN = Path(sys.executable).parent


def command(bundle, source, target, *options):
    words = [BIN / "lrt-deploy", "batch", bundle, source, target, "--threads", "1", *options]
    return [str(word) for word in words]


def run(bundle, source, target, *options):
    words = command(bundle, source, target, *options)
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)


def line(name, body, url="/v1/completions", **more):
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body} | more) + "\n"


def completions(count, tokens=20):
    return [
        line(f"r{i}", {"prompt": f"def f{i}(", "max_tokens": tokens, "seed": i, "temperature": i % 2})
        for i in range(count)
    ]


def results(target):
    lines = [json.loads(text) for text in target.read_text().splitlines()]
    assert Counter(line["custom_id"] for line in lines).most_common(1)[0][1] == 1
    return {line["custom_id"]: line for line in lines}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(completions(12)))
    return path


def test_each_request_is_answered_as_if_alone_and_wrong_ones_have_an_error(bundle, decoder, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    messages = [{"role": "user", "content": "Hello"}]
    lines = completions(12)
    lines += [line("chat", {"messages": messages, "max_tokens": 9, "temperature": 0}, "/v1/chat/completions"), "\n"]
    lines += [line("wrong", {"prompt": "a", "suffix": "b"}), line("stream", {"prompt": "a", "stream": True})]
    source.write_text("".join(lines))
    result = run(bundle, source, target, "--json")
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout)
    assert (counts["requests"], counts["answered"], counts["failed"], counts["skipped"]) == (15, 13, 2, 0)
    assert counts["completion_tokens"] == 12 * 20 + 9
    found = results(target)
    for i in range(12):
        events = decoder.generate(f"def f{i}(", 20, temperature=float(i % 2), seed=i)
        body = found[f"r{i}"]["response"]["body"]
        assert body["choices"][0]["text"] == "".join(event.text for event in events)
        assert body["object"] == "text_completion" and found[f"r{i}"]["error"] is None
    events = decoder.generate(decoder.tokenizer.render_chat(messages), 9)
    answer = found["chat"]["response"]["body"]["choices"][0]["message"]["content"]
    assert answer == "".join(event.text for event in events)
    for name, field in (("wrong", "suffix"), ("stream", "stream")):
        response = found[name]["response"]
        assert response["status_code"] == 400 and response["body"]["error"]["param"] == field


def test_a_killed_run_goes_on_where_it_stood(bundle, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(completions(60, 100)))
    process = subprocess.Popen(command(bundle, source, target), stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not target.exists() or target.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    complete = target.read_bytes()
    complete = complete[: complete.rfind(b"\n") + 1]
    with target.open("ab") as file:
        file.write(b'{"id":"batch_req_0123')  # torn
    done = complete.count(b"\n")
    result = run(bundle, source, target, "--json")
    counts = json.loads(result.stdout)
    assert (counts["skipped"], counts["answered"]) == (done, 60 - done)
    assert target.read_bytes().startswith(complete) and len(results(target)) == 60
    again = json.loads(run(bundle, source, target, "--json").stdout)
    assert (again["skipped"], again["answered"]) == (60, 0)


@pytest.mark.parametrize("lasting", [False, True])
def test_a_request_that_memory_does_not_suffice_for_has_an_error_and_the_others_are_answered(
    decoder, tmp_path, monkeypatch, lasting
):
    monkeypatch.setattr(engine_module, "_RETRY_SECONDS", 0.001)
    source, target, advance = tmp_path / "in.jsonl", tmp_path / "out.jsonl", decoder.advance
    large = line("large", {"prompt": [5] * 60, "max_tokens": 100, "temperature": 0, "prefill": "stepwise"})
    source.write_text("".join([*completions(3), large, *completions(7)[3:]]))

    def short(state, ids):
        if lasting or max(state.row_lengths) >= 60:
            raise MemoryError
        return advance(state, ids)

    monkeypatch.setattr(decoder, "advance", short)
    engine = Engine(decoder, 2)
    engine.start()
    try:
        if lasting:
            with pytest.raises(BackendError, match="MemoryError"):
                jsonl.run(engine, Api(decoder, ApiOptions("demo")), source, target, lambda *_: None)
            assert target.read_bytes() == b""  # the next run tries them all again
            return
        counts = jsonl.run(engine, Api(decoder, ApiOptions("demo")), source, target, lambda *_: None)
    finally:
        engine.stop()
    assert (counts.requests, counts.answered, counts.failed) == (8, 7, 1)
    found = results(target)
    assert found["large"]["response"]["status_code"] == 503
    assert "this one held the most memory" in found["large"]["response"]["body"]["error"]["message"]
    for i in range(7):
        events = decoder.generate(f"def f{i}(", 20, temperature=float(i % 2), seed=i)
        text = found[f"r{i}"]["response"]["body"]["choices"][0]["text"]
        assert text == "".join(event.text for event in events)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n", "line 2 of"),
        ("[]\n", "line 2 of"),
        (line("r0", {}), "an earlier line has too"),
        (line("x", {}, "/v1/embeddings"), "url is '/v1/embeddings'"),
        (line("x", {}, method="GET"), "method is 'GET'"),
        (line("x", []), "body is []"),
        ('{"url": "/v1/completions", "body": {}}\n', "custom_id is missing"),
        ('{"custom_id": "\\ud800", "url": "/v1/completions", "body": {}}\n', "line 2 of"),
    ],
)
def test_a_line_that_is_no_request_is_named_before_anything_is_run(bundle, tmp_path, text, message):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(completions(1)[0] + text)
    result = run(bundle, source, target)
    assert result.returncode == 1 and message in result.stderr, result.stderr
    assert not target.exists() and "Traceback" not in result.stderr


@pytest.mark.parametrize("content", ["notes\n", '{"id": 1}\n', "no newline", '{"custom_id": "a"}\n'])
def test_a_file_that_is_no_output_of_a_batch_is_left_as_it_is(bundle, source, tmp_path, content):
    target = tmp_path / "notes.txt"
    target.write_text(content)
    result = run(bundle, source, target)
    assert result.returncode == 1 and "line 1 of" in result.stderr
    assert target.read_text() == content
    assert run(bundle, source, source).returncode == 1
    assert source.read_text() == "".join(completions(12))


def test_two_runs_do_not_write_one_file(bundle, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(completions(200, 300)))
    first = subprocess.Popen(command(bundle, source, target), stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not target.exists() or not target.read_bytes():
        assert time.monotonic() < until
        time.sleep(0.01)
    second = run(bundle, source, target)
    first.terminate()
    assert first.wait() == 143
    assert second.returncode == 1 and "another run" in second.stderr


def test_an_output_on_a_full_disk_is_named_and_the_next_run_goes_on(bundle, source, tmp_path):
    source.write_text("".join(completions(40, 8)))
    target = tmp_path / "out.jsonl"
    limit = ["prlimit", "--fsize=3000", *command(bundle, source, target)]
    result = subprocess.run(limit, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 1 and f"the output {target} cannot be written" in result.stderr, result.stderr
    assert "goes on" in result.stderr and "--debug" not in result.stderr
    kept = target.read_bytes()
    assert len(kept) == 3000 and kept.count(b"\n") > 1
    counts = json.loads(run(bundle, source, target, "--json").stdout)
    assert counts["skipped"] == kept.count(b"\n") and counts["answered"] == 40 - counts["skipped"]
    assert target.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    found = results(target)
    assert len(found) == 40 and {line["response"]["status_code"] for line in found.values()} == {200}


@pytest.mark.parametrize("kind", ["named pipe", "link to one", "device"])
def test_an_output_that_is_no_regular_file_is_refused_as_that(bundle, source, tmp_path, kind):
    target = tmp_path / "out.jsonl"
    os.mkfifo(tmp_path / "pipe")
    target.symlink_to("/dev/null" if kind == "device" else tmp_path / "pipe")
    result = run(bundle, source, tmp_path / "pipe" if kind == "named pipe" else target)
    assert result.returncode == 1 and "is no regular file" in result.stderr, result.stderr
    assert "something broke" not in result.stderr


@pytest.mark.parametrize("target", ["nowhere/out.jsonl", ".", "out\0"])
def test_an_output_that_cannot_be_written_is_one_message(bundle, source, tmp_path, target):
    if "\0" in target:
        target = "/dev/full"
    result = run(bundle, source, tmp_path / target)
    assert result.returncode == 1 and "the output" in result.stderr and result.stderr.count("\n") <= 2
