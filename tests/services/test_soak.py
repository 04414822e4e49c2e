"""Requests of mixed kinds from many clients, with disconnects and errors: each answer is that of its single run.

200 requests, or as many as LRT_DEPLOY_SOAK says; build/serving-soak.json has what was seen.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import threading
import time

import numpy as np

REQUESTS = int(os.environ.get("LRT_DEPLOY_SOAK", "200"))
DISTINCT, CLIENTS, TOKENS = 400, 16 if REQUESTS <= 200 else 64, 60
STEPWISE_TIE, ITERATED_TIE = 1e-3, 1e-2  # in logits, or in probability around the random number
WORDS = (
    "def",
    "class",
    "import",
    "return",
    "the",
    "value",
    "of",
    "list",
    "file",
    "for",
    "each",
    "name",
    "in",
    "object",
)


def prompt_of(random, capacity):
    length = int(random.choice([3, 10, 40, 300], p=[0.35, 0.35, 0.2, 0.1]))
    return " ".join(random.choice(WORDS) for _ in range(length))[: capacity * 2]


def request_of(index, capacity):
    """A request and what becomes of it: `whole`, `stream`, `leave` or `wrong`."""
    random = np.random.default_rng(index)
    body = {"prompt": prompt_of(random, capacity), "max_tokens": int(random.integers(1, TOKENS)), "temperature": 0}
    if random.random() < 0.5:
        body |= {"temperature": 1.0, "seed": index, "top_p": 0.9}
    if random.random() < 0.2:
        body["stop"] = ["\n\n", "return"]
    kind = random.choice(["whole", "stream", "leave", "wrong"], p=[0.4, 0.35, 0.15, 0.1])
    return body | ({"top_p": 2} if kind == "wrong" else {}), str(kind)


def alone(decoder, body):
    sampling = {name: body[name] for name in ("temperature", "seed", "top_p") if name in body}
    return list(decoder.generate(body["prompt"], body["max_tokens"], stop_strings=body.get("stop", ()), **sampling))


def is_near_tie(decoder, body, events, text):
    """Whether the first token whose text differs was as good as another one: its margin is what rounding can move."""
    shown = list(itertools.accumulate(event.text for event in events))
    at = next((at for at, found in enumerate(shown) if not text.startswith(found)), len(events) - 1)
    ids = decoder.prompt_ids(body["prompt"])
    before = [*ids, *(event.token for event in events[:at])]
    logits = decoder.prefill([before], policy="stepwise").logits[0].astype(np.float64)
    tie = STEPWISE_TIE if events[0].prefill.policy == "stepwise" else ITERATED_TIE
    first, second = np.sort(logits)[::-1][:2]
    if body["temperature"] == 0:
        return first - second < tie
    weights = np.exp(logits - logits.max())
    order = np.argsort(-weights, kind="stable")
    reached = weights[order].cumsum() / weights.sum()
    kept = np.sort(order[: int(np.searchsorted(reached, body["top_p"])) + 1])
    if np.abs(reached - body["top_p"]).min() < tie:
        return True
    borders = weights[kept].cumsum() / weights[kept].sum()
    number = np.random.Generator(np.random.PCG64(body["seed"])).random(at + 1)[at]
    return np.abs(borders - number).min() < tie


def test_every_answer_of_a_crowd_is_that_of_its_single_run_and_nothing_leaks(launch, decoder, root):
    server = launch("--state-bytes", 20_000_000)
    requests = [request_of(index, decoder.max_seq_len) for index in range(min(REQUESTS, DISTINCT))]
    answers, numbers, lock = {}, iter(range(REQUESTS)), threading.Lock()
    memory, started = [], time.monotonic()

    def ask(index):
        body, kind = requests[index % DISTINCT]
        if kind in ("whole", "wrong"):
            reply = server.post("/v1/completions", body)
            return reply.json["choices"][0]["text"] if reply.status == 200 else reply.status
        stream = server.open_stream("/v1/completions", body)
        texts = []
        for event in stream.events():
            if event != "[DONE]":
                texts.append(event["choices"][0]["text"])
            if kind == "leave" and len(texts) > index % 7:
                break
        stream.close()
        return "".join(texts)

    def client():
        while True:
            with lock:
                index = next(numbers, None)
            if index is None:
                return
            answers[index] = ask(index)
            if index % 50 == 0:
                seconds = round(time.monotonic() - started, 1)
                memory.append((seconds, server.gauge("process_resident_memory_bytes")))

    server.complete("warm", max_tokens=2)
    files = server.gauge("process_open_fds")
    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - started
    assert len(answers) == REQUESTS
    expected = functools.cache(lambda at: alone(decoder, requests[at][0]))
    tokens = ties = 0
    for index, answer in answers.items():
        body, kind = requests[index % DISTINCT]
        if kind == "wrong":
            assert answer == 400
            continue
        events = expected(index % DISTINCT)
        text = "".join(event.text for event in events)
        tokens += len(events) if kind != "leave" else 1 + index % 7
        if not (text.startswith(answer) if kind == "leave" else text == answer):
            assert is_near_tie(decoder, body, events, answer), (body, text, answer)
            ties += 1
    seen = {"requests": REQUESTS, "clients": CLIENTS, "seconds": seconds, "tokens": tokens, "near_ties": ties}
    (root / "build").mkdir(exist_ok=True)
    (root / "build" / "serving-soak.json").write_text(json.dumps(seen | {"memory": sorted(memory)}))
    assert tokens > 10 * REQUESTS and ties <= 1 + tokens / 5000
    server.wait_for("lrt_running", 0)
    server.wait_for("lrt_waiting", 0)
    server.wait_for("process_open_fds", files)
    assert server.gauge("lrt_kept_state_bytes") <= 20_000_000
    assert server.gauge("lrt_backend_errors_total") == 0
