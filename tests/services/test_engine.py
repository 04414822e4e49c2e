"""The engine in this process: what it delivers, when, and what it does with errors, cancellations and too much work."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from lrt_deploy.errors import BackendError, Busy, DeadlineExceeded, InputError, NonFiniteError, StateError
from lrt_deploy.runtime.serving import engine as engine_module
from lrt_deploy.runtime.serving.engine import RETRIES, Draining, Engine, EngineRequest, Prompt
from lrt_deploy.runtime.serving.prefix_states import PrefixStates
from lrt_deploy.runtime.serving.request_fields import Failure

NAME = "padded_vocab"
PROMPT = [1, 2, 3, 4, 5]


@pytest.fixture
def decoder(decoder_of):
    return decoder_of(NAME)


class Receiver:
    """Takes deliveries in the engine's thread."""

    def __init__(self):
        self.deliveries, self.done = [], threading.Event()

    def __call__(self, delivery):
        self.deliveries.append(delivery)
        if delivery.last:
            self.done.set()

    def wait(self):
        assert self.done.wait(60)
        return self

    def tokens(self, index=0):
        return [event.token for delivery in self.deliveries for at, event in delivery.events if at == index]


@pytest.fixture
def engine_of(decoder):
    """(options) -> a running engine, which ends with the test."""
    started = []

    def start(**options):
        started.append(Engine(decoder, **options))
        started[-1].start()
        return started[-1]

    yield start
    for engine in started:
        engine.stop()


def request(tokens=PROMPT, new=10, count=1, stream=False, **arguments):
    return EngineRequest([Prompt(tokens, new)], {"stop_ids": [], **arguments}, count, stream)


def submit(engine, *args, **options):
    receiver = Receiver()
    receiver.ticket = engine.submit(request(*args, **options), receiver)
    return receiver


def alone(decoder, prompt, new, **options):
    return [event.token for event in decoder.generate(prompt, new, stop_ids=[], policy="stepwise", **options)]


def test_a_whole_answer_is_one_delivery_and_a_stream_one_for_each_token(engine_of, decoder):
    engine = engine_of(slots=2)
    whole, stream = submit(engine).wait(), submit(engine, stream=True).wait()
    assert whole.tokens() == stream.tokens() == alone(decoder, PROMPT, 10)
    assert [len(d.events) for d in whole.deliveries] == [10]
    assert [len(d.events) for d in stream.deliveries] == [1] * 10
    assert [d.last for d in stream.deliveries] == [False] * 9 + [True]


def test_streams_of_one_step_are_handed_over_together(engine_of):
    handed = []

    def post(deliveries):
        handed.append(len(deliveries))
        for deliver, delivery in deliveries:
            deliver(delivery)

    engine = engine_of(slots=2, post=post)
    prompts = [Prompt(PROMPT, 20), Prompt(PROMPT[::-1], 20)]
    receiver = Receiver()
    engine.submit(EngineRequest(prompts, {"stop_ids": []}, stream=True), receiver)
    receiver.wait()
    assert handed == [1] * 20  # both continuations are in one delivery
    assert [sorted(at for at, _ in d.events) for d in receiver.deliveries] == [[0, 1]] * 20


def test_requests_share_the_batch_and_each_is_as_if_alone(engine_of, decoder):
    engine = engine_of(slots=3)
    options = [{"temperature": 1.0, "seed": seed} for seed in range(8)] + [{}]
    receivers = [submit(engine, PROMPT[: 1 + i % 5], 12, **more) for i, more in enumerate(options)]
    for i, (receiver, more) in enumerate(zip(receivers, options, strict=True)):
        assert receiver.wait().tokens() == alone(decoder, PROMPT[: 1 + i % 5], 12, **more)
    assert engine.wait_until_idle(10) and engine.outstanding == 0


def test_continuations_of_one_prompt_differ_and_the_first_has_the_seed(engine_of, decoder):
    receiver = submit(engine_of(), count=3, temperature=1.0, seed=4).wait()
    found = [receiver.tokens(index) for index in range(3)]
    assert found[0] == alone(decoder, PROMPT, 10, temperature=1.0, seed=4)
    assert len({tuple(tokens) for tokens in found}) == 3


def test_a_cancelled_request_leaves_within_two_steps_and_is_not_delivered(engine_of, monkeypatch):
    engine = engine_of(slots=2)
    steps, step = [], engine.batch.step
    monkeypatch.setattr(engine.batch, "step", lambda: steps.append(1) or step())
    at_cancel = []
    receiver = Receiver()

    def deliver(delivery):
        receiver(delivery)
        if len(receiver.deliveries) == 5:
            at_cancel.append(len(steps))
            engine.cancel(ticket)

    ticket = engine.submit(request(new=100, count=2, stream=True), deliver)
    assert engine.wait_until_idle(60)
    assert len(receiver.deliveries) == 5 and not receiver.done.is_set()
    assert len(steps) - at_cancel[0] <= 2 and engine.batch.running == engine.batch.waiting == 0
    assert engine.metrics.requests["cancelled"] == 1
    engine.cancel(ticket)  # again: nothing happens
    assert submit(engine).wait().tokens()


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_with_a_request_ends_that_one(engine_of, decoder, stream):
    engine = engine_of()
    good = submit(engine, new=40)
    for wrong in (request(new=2, nonsense=1), request(new=2, temperature=-1.0), request([1, 9999], 2)):
        receiver = Receiver()
        engine.submit(wrong, receiver)
        assert isinstance(receiver.wait().deliveries[-1].error, InputError)
    too_long = submit(engine, [1] * (decoder.max_seq_len + 1), stream=stream).wait()
    assert isinstance(too_long.deliveries[-1].error, StateError)
    assert good.wait().tokens() == alone(decoder, PROMPT, 40)


def test_rows_that_are_not_finite_end_alone_with_what_they_had(engine_of, decoder, monkeypatch):
    engine = engine_of(slots=2)
    good = alone(decoder, PROMPT, 30)
    real = type(engine.batch._shards[0].state.buffers).decode

    def decode(self, tokens, positions, head):
        logits = real(self, tokens, positions, head)
        if logits is not None:
            for row, position in enumerate(positions.tolist()):
                if position == 12 and tokens[row] != good[7]:
                    logits[row] = np.nan
        return logits

    monkeypatch.setattr(type(engine.batch._shards[0].state.buffers), "decode", decode)
    bad, fine = submit(engine, [9, 8, 7], 30, stream=True), submit(engine, new=30, stream=True)
    assert fine.wait().tokens() == good
    error = bad.wait().deliveries[-1].error
    assert isinstance(error, BackendError) and "finite" in str(error)
    assert 0 < len(bad.tokens()) < 30


def test_a_backend_that_fails_for_a_while_costs_time_only(engine_of, decoder, monkeypatch):
    engine = engine_of()
    failures, advance = [BackendError("the device was lost")] * RETRIES, decoder.advance

    def sometimes(*args):
        if failures:
            raise failures.pop()
        return advance(*args)

    monkeypatch.setattr(decoder, "advance", sometimes)
    assert submit(engine).wait().tokens() == alone(decoder, PROMPT, 10)
    assert engine.ready and engine.metrics.backend_errors == RETRIES


@pytest.fixture
def failing(decoder, monkeypatch):
    """While the list holds an error, every step raises it."""
    errors, advance = [], decoder.advance

    def sometimes(*args):
        if errors:
            raise errors[0]
        return advance(*args)

    monkeypatch.setattr(decoder, "advance", sometimes)
    return errors


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


SHORTAGES = [MemoryError(), BackendError("ONNX Runtime failed: Failed to allocate memory for requested buffer")]


@pytest.mark.parametrize("error", [BackendError("the device was lost"), *SHORTAGES])
def test_a_backend_that_goes_on_failing_ends_all_requests_and_the_readiness_until_a_step_computes(
    engine_of, decoder, monkeypatch, failing, error
):
    monkeypatch.setattr(engine_module, "TRIAL_SECONDS", (0.01, 0.04))
    found = engine_of(slots=1, states=PrefixStates(2**24))
    assert submit(found, new=20).wait().tokens() and len(found.states) == 1
    shards = found.batch._shards
    failing.append(error)
    for receiver in [submit(found, stream=bool(i)) for i in range(3)]:
        ended = receiver.wait().deliveries[-1].error
        assert isinstance(ended, BackendError) and "failed" in str(ended)
    until(lambda: not found.ready)
    assert found.outstanding == 0 and len(found.states) == found.states.num_bytes == 0
    assert found.batch._shards is not shards and found.batch.running == found.batch.waiting == 0
    with pytest.raises(BackendError, match="failed"):
        submit(found)
    errors = found.metrics.backend_errors
    until(lambda: found.metrics.backend_errors >= errors + 3)  # it goes on trying
    assert not found.ready and found._trial_wait == 0.04
    failing.clear()
    until(lambda: found.ready)
    for stream in (False, True):
        assert submit(found, stream=stream).wait().tokens() == alone(decoder, PROMPT, 10)


@pytest.mark.parametrize("error", SHORTAGES)
def test_where_memory_is_short_the_largest_request_ends_and_the_others_go_on(engine_of, decoder, monkeypatch, error):
    advance = decoder.advance

    def short(state, ids):
        if max(state.row_lengths) >= 40:
            raise error
        return advance(state, ids)

    monkeypatch.setattr(decoder, "advance", short)
    found = engine_of(slots=3)
    large = submit(found, [7] * 30, 60)
    small = [submit(found, PROMPT[: 1 + i], 20, temperature=1.0, seed=i) for i in range(4)]
    ended = large.wait().deliveries[-1].error
    assert isinstance(ended, engine_module.RequestError) and "this one held the most memory" in str(ended)
    for i, receiver in enumerate(small):
        assert receiver.wait().tokens() == alone(decoder, PROMPT[: 1 + i], 20, temperature=1.0, seed=i)
    assert found.ready and found.metrics.requests == {"ok": 4, "error": 1, "cancelled": 0, "refused": 0}


def test_a_shortage_of_memory_costs_kept_states_before_any_request(engine_of, decoder, monkeypatch):
    found = engine_of(slots=2, states=PrefixStates(2**24))
    assert submit(found, new=20).wait().tokens() and len(found.states) == 1
    advance = decoder.advance

    def short(*args):
        if len(found.states):
            raise MemoryError
        return advance(*args)

    monkeypatch.setattr(decoder, "advance", short)
    assert submit(found).wait().tokens() == alone(decoder, PROMPT, 10)
    assert found.ready and found.metrics.requests["error"] == 0


@pytest.mark.parametrize("where", ["submit", "step"])
def test_memory_that_is_short_outside_of_a_step_ends_requests_and_not_the_engine(
    engine_of, decoder, monkeypatch, where
):
    monkeypatch.setattr(engine_module, "TRIAL_SECONDS", (0.01, 0.04))
    found = engine_of(slots=2)

    def short(*args, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(*{"submit": (found.batch, "submit", short), "step": (found, "_count_prompt", short)}[where])
        error = submit(found).wait().deliveries[-1].error
        assert isinstance(error, BackendError) and "MemoryError" in str(error)
    until(lambda: found.ready)
    assert found.outstanding == 0
    assert submit(found).wait().tokens() == alone(decoder, PROMPT, 10)


LIMITED = """
import resource, sys, time
from pathlib import Path
from tests.services.test_engine import Receiver, Engine, PrefixStates, engine_module, alone, submit, until
from lrt_deploy import BackendError, open_decoder

engine_module.TRIAL_SECONDS = (0.05, 0.2)

def limit_data(spare):
    used = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    soft = int(used.split()[1]) * 1024 + spare if spare else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_DATA, (soft, resource.RLIM_INFINITY))

with open_decoder(sys.argv[1], threads=1) as decoder:
    long = [1 + i % 90 for i in range(600)]
    expected = {n: alone(decoder, [n], 25) for n in range(1, 9)} | {600: alone(decoder, long, 9)}
    engine = Engine(decoder, 8, states=PrefixStates(2**24))
    engine.start()
    assert submit(engine, [3], 25).wait().tokens() == expected[3]
    limit_data(2**22)
    for policy in ("stepwise", "fixed-point"):
        large, small = submit(engine, long, 9, policy=policy), [submit(engine, [n], 25) for n in range(1, 9)]
        error = large.wait().deliveries[-1].error
        assert isinstance(error, BackendError), error
        for n, receiver in enumerate(small, 1):
            ended = receiver.wait().deliveries[-1].error
            assert isinstance(ended, BackendError) if ended else receiver.tokens() == expected[n], (n, ended)
        until(lambda: engine.ready)
        assert submit(engine, [2], 25).wait().tokens() == expected[2]
    limit_data(0)
    assert submit(engine, long, 9).wait().tokens() == expected[600]
    assert engine.ready and engine.outstanding == 0 and engine.batch.running == engine.batch.waiting == 0
    engine.stop()
"""


def test_a_real_shortage_of_memory_ends_requests_and_not_the_service(bundle, root):
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }  # caches: memory of their own
    command = [sys.executable, "-c", LIMITED, bundle]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (DeadlineExceeded("late"), 504, "deadline_exceeded"),
        (Busy("the deadline is near and the queue full"), 429, "queue_full"),
        (engine_module.Draining(), 503, "draining"),
        (engine_module.RequestError("late"), 503, "backend_failed"),
        (BackendError("the deadline"), 503, "backend_failed"),
        (NonFiniteError("the deadline", [0]), 500, "non_finite"),
        (InputError("the deadline"), 400, None),
    ],
)
def test_the_status_of_an_error_follows_from_its_class_and_not_from_its_words(error, status, code):
    failure = Failure.of(error)
    assert (failure.status, failure.code) == (status, code)


def test_too_much_work_is_refused_at_once(engine_of):
    engine = engine_of(slots=1, max_waiting=2)
    release = threading.Event()
    blocked = Receiver()
    engine.submit(request(new=2, stream=True), lambda delivery: (release.wait(60), blocked(delivery)))
    others = [submit(engine) for _ in range(2)]
    with pytest.raises(Busy, match="at most 3"):
        submit(engine)
    with pytest.raises(InputError, match="at most 3"):
        submit(engine, count=4)
    release.set()
    for receiver in [blocked, *others]:
        receiver.wait()
    assert engine.wait_until_idle(60)
    assert submit(engine, count=3).wait().tokens(2)


def test_a_drain_ends_what_runs_and_takes_nothing_more(engine_of, decoder):
    engine = engine_of(slots=1)
    receivers = [submit(engine, new=40) for _ in range(3)]
    engine.drain()
    assert not engine.ready
    with pytest.raises(Draining):
        submit(engine)
    assert engine.wait_until_idle(60)
    assert all(receiver.wait().tokens() == alone(decoder, PROMPT, 40) for receiver in receivers)


def test_many_threads_submit_and_cancel_at_once(engine_of, decoder):
    engine = engine_of(slots=4)
    expected = alone(decoder, PROMPT, 10)
    wrong = []

    def work(seed):
        random = np.random.default_rng(seed)
        for _ in range(15):
            receiver = submit(engine, new=10, stream=bool(random.integers(2)))
            if random.integers(3) == 0:
                time.sleep(random.random() / 200)
                engine.cancel(receiver.ticket)
            elif receiver.wait().tokens() != expected:
                wrong.append(receiver.tokens())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong and engine.wait_until_idle(60)
    assert not engine._running and engine.batch.running == engine.batch.waiting == 0
