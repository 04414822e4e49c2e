"""An exception between any two lines leaves a state as it was: every operation is walked line by line.

A tracer raises at the n-th line that the runtime executes, which is where a Ctrl-C, a timeout raised in a signal
handler or an allocation that fails may end an operation. Afterwards the very exception must have come out, and the
state must be what it was to the bit, or refuse with StateError. A batch must give every token of an undisturbed run
once.

Walks a seeded sample of lines. With LRT_DEPLOY_ALL_LINES=all (`make interrupts`) it raises every kind of error at every
line, with `one` one kind at each line in turn; counts are then appended to build/interrupts.jsonl.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import lrt_deploy
from lrt_deploy.errors import NonFiniteError, StateError
from lrt_deploy.runtime.backends.ort_cpu import OrtCpuBuffers
from lrt_deploy.runtime.batch import BatchDecoder
from lrt_deploy.runtime.shard import Shard
from lrt_deploy.runtime.state import DecodeState

ALL_LINES = os.environ.get("LRT_DEPLOY_ALL_LINES", "")
SAMPLE = 6  # lines of each walk where not all are walked
ROOT = Path(__file__).parents[1]
RUNTIME = str(Path(lrt_deploy.runtime.__file__).parent)
LONG, SHORT = [3, 1, 4, 1, 5, 9, 2], [6, 5, 3]
OTHER, NEXT = [8, 9, 7, 9], [11, 12]


class TimeIsUp(Exception):  # noqa: N818 - somebody else's
    """What a caller's own signal handler raises."""


ERRORS = (KeyboardInterrupt, MemoryError, TimeIsUp)


class Tracer:
    """Counts the lines that files of the runtime execute in this thread, and raises `error` at the n-th."""

    def __init__(self, at=0, error=None):
        self.at, self.error, self.lines = at, error, 0

    def __enter__(self):
        sys.settrace(self.call)
        return self

    def __exit__(self, *error):
        sys.settrace(None)

    def call(self, frame, event, argument):
        return self.line if frame.f_code.co_filename.startswith(RUNTIME) else None

    def line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise self.error
        return self.line


def count_lines(action):
    action()  # imports and remembers what later runs find
    with Tracer() as tracer:
        action()
    return tracer.lines


def walked(lines, seed, sample=SAMPLE):
    """(line, kind of error) pairs: all, or a sample."""
    if ALL_LINES == "all":
        return [(line, kind) for line in range(1, lines + 1) for kind in ERRORS]
    if ALL_LINES == "one":
        return [(line, ERRORS[line % 3]) for line in range(1, lines + 1)]
    chosen = np.random.default_rng([*seed.encode()]).permutation(lines)[:sample] + 1
    return [(line, ERRORS[i % 3]) for i, line in enumerate(chosen.tolist())]


def raised_at(line, kind, action):
    """Run until an error of this kind comes at a line; it must come out as it is. False where the action ends first."""
    error = kind(f"line {line}")
    try:
        with Tracer(line, error):
            action()
    except BaseException as found:
        assert found is error, f"line {line}: {found!r} came out instead of {error!r}"
        return True
    return False


def content(decoder, state):
    """Everything that a caller sees, and what follows from the next step, to the bit."""
    found = {
        "tokens": state.tokens,
        "lengths": state.lengths.tolist(),
        "prefill": state.prefill,
        "read_within": state.read_within,
        "extra": state.extra,
        "latent": None if state.latent is None else state.latent.tobytes(),
        "logits": None if 0 in state.lengths else state.logits.tobytes(),
    }
    if state.batch and max(state.lengths) < state.capacity:
        found["next"] = decoder.step(state, NEXT[: state.batch] or [1]).tobytes()
    return found


def outcome(decoder, state, expected):
    """`unchanged` or `refused`; anything else is the fault that this file is about."""
    try:
        found = content(decoder, state)
    except StateError:
        return "refused"
    wrong = [name for name in expected if found.get(name) != expected[name]]
    assert not wrong, f"{wrong} changed"
    return "unchanged"


COUNTS = Counter()


@pytest.fixture(scope="module", autouse=True)
def _counts():
    yield
    if ALL_LINES:
        path = ROOT / "build" / "interrupts.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"walked": ALL_LINES} | COUNTS, sort_keys=True) + "\n")


@pytest.fixture(scope="module", params=["mr_gqa_SSSL", "baseline_ve"])
def decoder(request, export_once):
    with lrt_deploy.open_decoder(export_once(request.param)) as opened:
        opened.other = lrt_deploy.open_decoder(export_once(request.param))
        yield opened
        opened.other.close()


def one(decoder):
    return decoder.prefill([LONG], policy="stepwise")


def ragged(decoder):
    return decoder.prefill([LONG, SHORT], policy="stepwise")


def iterated(decoder):
    """Read by sweeps and gone on, so that logits are kept."""
    state = decoder.prefill([LONG, SHORT], policy="fixed-point", tolerance=1e-1)
    decoder.step(state, [1, 2])
    return state


def rewound(decoder):
    """Its logits wait to be computed, and tokens, caches and latents beyond its lengths are those of another end."""
    state = decoder.prefill([[*LONG, 7, 7], [*SHORT, 7]], policy="stepwise")
    state.rewind([len(LONG), len(SHORT)])
    return state


def moved(decoder):
    """A row was dropped, and the last one has not been moved into its place yet."""
    state = decoder.prefill([OTHER, SHORT, LONG], policy="stepwise")
    state.drop(0)
    return state


def emitted(decoder):
    """The last token has not been fed yet."""
    state = one(decoder)
    list(decoder.generate(None, 2, state=state, stop_ids=[]))
    return state


def full_caches(decoder):
    """The next token makes the caches grow."""
    return decoder.prefill([list(range(32)), SHORT], policy="stepwise")


STATES = (one, ragged, iterated, rewound, moved, emitted, full_caches)


def tokens_for(state):
    return [10, 13][: state.batch]


def fails(decoder, state):
    """A step to numbers that are not finite: its own handlers are walked too."""

    def spoiled(tokens, positions, head):
        logits = OrtCpuBuffers.decode(state.buffers, tokens, positions, head)
        logits[0, 3] = np.nan
        for layer in range(decoder.config.n_layer):
            for array in state.buffers.cache(layer, state.capacity):
                array[0, :, positions[0]] = np.nan
        return logits

    vars(state.buffers)["decode"] = spoiled
    try:
        with pytest.raises(NonFiniteError):
            decoder.step(state, tokens_for(state))
    finally:
        vars(state.buffers).pop("decode", None)


def prompts(state):
    return [[21, 22, 23], [24]][: state.batch]


def long_prompts(state):
    return [list(range(40, 60)), list(range(60, 73))][: state.batch]


def edited(state):
    """What each row holds, but for its last two tokens, and something else."""
    return [[*row[:-2], 31, 32, 33, 34] for row in state.tokens]


def read(decoder, state, rows, **options):
    decoder.prefill(rows, state=state, **options)


OPERATIONS = {
    "step": lambda d, s: d.step(s, tokens_for(s)),
    "advance": lambda d, s: d.advance(s, np.array(tokens_for(s))),
    "step that fails": fails,
    "prefill stepwise": lambda d, s: read(d, s, prompts(s), policy="stepwise"),
    "prefill auto": lambda d, s: read(d, s, prompts(s)),
    "prefill fixed-point": lambda d, s: read(d, s, long_prompts(s), policy="fixed-point", tolerance=1e-2),
    "prefill zero": lambda d, s: d.config.memory and read(d, s, prompts(s), policy="zero"),
    "reuse": lambda d, s: read(d, s, edited(s), reuse=True, policy="stepwise"),
    "reuse fixed-point": lambda d, s: read(d, s, edited(s), reuse=True, policy="fixed-point", tolerance=1e-1),
    "reuse all": lambda d, s: read(d, s, [row[:-1] for row in s.tokens], reuse=True),
    "reuse nothing": lambda d, s: read(d, s, [[99, 98]] * s.batch, reuse=True, policy="stepwise"),
    "rewind": lambda d, s: s.rewind([n - 1 for n in s.lengths]),
    "rewind to nothing": lambda d, s: s.rewind(0),
    "logits": lambda d, s: s.logits,
    "latent": lambda d, s: (s.latent, s.cache(0)),
    "fork": lambda d, s: s.fork(),
    "rows": lambda d, s: s.rows([0, s.batch - 1, 0]),
    "drop": lambda d, s: s.drop(0),
    "adopt": lambda d, s: d.other.adopt(s),
    "score": lambda d, s: d.score([row[:4] for row in s.tokens]),
}
RECOMPUTED = {"rewind", "rewind to nothing"}  # what the state would compute anyway is not part of what it is


@pytest.mark.parametrize("make", STATES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupted_operation_leaves_the_state_as_it_was(decoder, name, make):
    operation, expected = OPERATIONS[name], content(decoder, make(decoder))
    lines = count_lines(lambda: operation(decoder, make(decoder))) - count_lines(lambda: make(decoder))
    for line, kind in walked(lines, f"{name} {make.__name__}"):
        state = make(decoder)
        if raised_at(line, kind, lambda state=state: operation(decoder, state)):
            COUNTS[f"{kind.__name__}, {outcome(decoder, state, expected)}"] += 1


@pytest.mark.parametrize("empty", [True, False])
def test_an_interrupted_add_leaves_no_row(decoder, empty):
    source = None if empty else one(decoder)

    def state_of():
        state = decoder.new_state(3)
        state.add(ragged(decoder), 1)
        return state

    expected = content(decoder, state_of())
    lines = count_lines(lambda: state_of().add(source)) - count_lines(state_of)
    for line, kind in walked(lines, f"add {empty}"):
        state = state_of()
        if raised_at(line, kind, lambda state=state: state.add(source)):
            COUNTS[f"{kind.__name__}, {outcome(decoder, state, expected)}"] += 1


def test_an_interrupted_save_or_load_leaves_state_and_file(decoder, tmp_path):
    path, expected, saved = tmp_path / "one.state", content(decoder, ragged(decoder)), ragged(decoder)
    saved.save(path)
    before = path.read_bytes()
    other = emitted(decoder)
    for action, seed in ((lambda: other.save(path), "save"), (lambda: decoder.load_state(path), "load")):
        lines = count_lines(action)
        saved.save(path)
        for line, kind in walked(lines, seed):
            assert raised_at(line, kind, action)
            assert path.read_bytes() == before or decoder.load_state(path).tokens == other.tokens
            assert list(tmp_path.iterdir()) == [path]
            saved.save(path)
            COUNTS[f"{kind.__name__}, {outcome(decoder, decoder.load_state(path), expected)}"] += 1


# Generating


GENERATIONS = {
    "greedy": {"max_new_tokens": 4, "stop_ids": []},
    "sampled": {"max_new_tokens": 4, "stop_ids": [], "temperature": 1.0, "seed": 3, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("prompt", [None, OTHER], ids=["goes on", "with a prompt"])
@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("make", [one, rewound, emitted], ids=lambda make: make.__name__)
def test_an_interrupted_generation_leaves_what_was_emitted(decoder, name, prompt, make):
    def fresh():
        return make(decoder).rows([0])

    options, state = GENERATIONS[name], fresh()
    start = state.tokens[0]
    whole = [event.token for event in decoder.generate(prompt, state=state, **options)]

    def after(count):
        """The state that holds this many emitted tokens, and the prompt if there is one."""
        state = fresh()
        for _ in zip(range(count), decoder.generate(prompt, state=state, **options), strict=False):
            pass
        return content(decoder, state)

    expected = [content(decoder, fresh()), *(after(count) for count in range(1, 5))]
    assert expected[4]["tokens"] == [start + (prompt or []) + whole]

    def run(state, events, close_after=9):
        found = decoder.generate(prompt, state=state, **options)
        for event in found:
            events.append(event.token)
            if len(events) == close_after:
                found.close()

    for close_after in (2, 9):
        state = fresh()
        lines = count_lines(lambda close=close_after: run(fresh(), [], close)) - count_lines(fresh)
        for line, kind in walked(lines, f"{name} {prompt} {make.__name__}"):
            state, events = fresh(), []
            raised = raised_at(line, kind, lambda s=state, e=events, c=close_after: run(s, e, c))
            assert events == whole[: len(events)]
            COUNTS[f"{kind.__name__}, {outcome(decoder, state, expected[len(events)])}"] += raised


# Batches


REQUESTS = [
    {"prompt": LONG, "max_new_tokens": 3, "stop_ids": []},
    {"prompt": SHORT, "max_new_tokens": 4, "stop_ids": [], "temperature": 1.0, "seed": 5},
    {"prompt": OTHER, "max_new_tokens": 1, "stop_ids": [], "policy": "fixed-point", "tolerance": 1e-1},
    {"prompt": [1], "max_new_tokens": 2, "stop_ids": [], "temperature": 0.5, "seed": 1, "stop_strings": ["zq"]},
]


class Persistent:
    """A client that does again what an interrupt has ended, and writes down what it is given."""

    def __init__(self, decoder, lanes, spoil=False):
        self.batch, self.events, self.numbers = BatchDecoder(decoder, 2, lanes), {}, []
        self.errors, self.spoil = [], spoil

    def again(self, action):
        """Until it succeeds; the tracer raises once."""
        while True:
            try:
                return action()
            except ERRORS as error:
                self.errors.append(error)

    def note(self, found):
        assert found.error is None or self.spoil
        self.events.setdefault(found.request, []).append(found.error or found.event)

    def drain(self):
        for found in self.batch.run():
            self.note(found)

    def work(self, continued):
        with self.batch:
            for request in REQUESTS:
                self.numbers.append(self.again(lambda request=request: self.batch.submit(**request)))
            unwanted = self.again(lambda: self.batch.submit([5, 5], 9, stop_ids=[]))
            waiting = self.again(lambda: self.batch.submit([5], 9, stop_ids=[]))
            self.again(lambda: self.batch.cancel(waiting))
            for _ in range(2):
                for found in self.again(self.batch.step):
                    self.note(found)
            self.again(lambda: self.batch.cancel(unwanted))
            self.numbers.append(self.again(lambda: self.batch.submit(None, 2, state=continued, stop_ids=[])))
            self.again(self.drain)
            assert (self.batch.waiting, self.batch.running) == (0, 0)
            self.served(continued)
        self.events.pop(unwanted, None)
        assert waiting not in self.events
        return [self.events[number] for number in self.numbers]

    def served(self, continued):
        """What a server asks for: choices, scores, states, sequences that go on, and rows that wait for a while."""
        choices = self.again(lambda: self.batch.submit(SHORT, 2, n=2, seed=3, temperature=1.0, stop_ids=[]))
        scored = {"logprobs": 1, "prompt_logprobs": 1, "keep_state": True, "priority": 1, "stop_ids": []}
        self.numbers += [*choices, self.again(lambda: self.batch.submit(OTHER, 2, **scored))]
        longer = {"state": continued, "policy": "fixed-point", "tolerance": 1e-1, "stop_ids": []}
        self.numbers.append(self.again(lambda: self.batch.submit([*LONG, 8, 8], 2, **longer)))
        moved = (choices[1], self.numbers[-1])
        for number in (*moved, *moved):
            for found in self.again(self.batch.step):
                self.note(found)
            self.again(lambda number=number: self.batch.suspend(number))
            self.again(lambda number=number: self.batch.resume(number))
        self.again(self.drain)
        assert (self.batch.waiting, self.batch.running) == (0, 0)
        last = self.events[self.numbers[-2]][-1]
        assert last.state.tokens == [OTHER + [event.token for event in self.events[self.numbers[-2]]]]
        assert [score.token for score in self.events[self.numbers[-2]][0].prompt_logprobs] == OTHER


@pytest.mark.parametrize("lanes", [1, 2])
def test_an_interrupted_batch_loses_no_token_and_doubles_none(decoder, lanes):
    continued = one(decoder)
    expected = Persistent(decoder, lanes).work(continued)
    alone = [list(decoder.generate(**({"policy": "stepwise"} | request))) for request in REQUESTS]
    assert [[e.token for e in events] for events in expected[:4]] == [[e.token for e in events] for events in alone]
    lines = count_lines(lambda: Persistent(decoder, lanes).work(continued))
    for line, kind in walked(lines, f"batch {lanes}", sample=40):
        client = Persistent(decoder, lanes)
        error = kind(f"line {line}")
        with Tracer(line, error):
            try:
                found = client.work(continued)
            except ERRORS:  # in __init__ or __exit__, where there is nothing to lose
                continue
        assert client.errors in ([], [error])
        assert found == expected, f"line {line}"
        COUNTS[f"{kind.__name__}, {'batch goes on'}"] += 1
    assert continued.tokens == [LONG]


def test_a_batch_is_interrupted_while_its_caches_change_their_size(decoder):
    def work(client):
        for prompt, budget in (([2] * 60, 2), (SHORT, 34)):
            client.again(lambda prompt=prompt, budget=budget: client.batch.submit(prompt, budget, stop_ids=[]))
        client.again(client.drain)
        return client.events

    expected = work(Persistent(decoder, 1))
    lines = count_lines(lambda: work(Persistent(decoder, 1)))
    for line, kind in walked(lines, "sizes", sample=12):
        client = Persistent(decoder, 1)
        with Tracer(line, kind(f"line {line}")):
            found = work(client)
        assert found == expected, f"line {line}"
        COUNTS[f"{kind.__name__}, batch goes on"] += 1


def test_a_batch_is_interrupted_while_requests_take_turns(decoder):
    def work(client):
        client.batch.turn_tokens = 2
        for prompt in (SHORT, OTHER, [7], [8]):
            client.again(lambda prompt=prompt: client.batch.submit(prompt, 5, stop_ids=[]))
        client.again(client.drain)
        return client.events

    expected = work(Persistent(decoder, 1))
    lines = count_lines(lambda: work(Persistent(decoder, 1)))
    for line, kind in walked(lines, "turns", sample=25):
        client = Persistent(decoder, 1)
        with Tracer(line, kind(f"line {line}")):
            found = work(client)
        assert found == expected, f"line {line}"
        COUNTS[f"{kind.__name__}, batch goes on"] += 1


def test_a_batch_is_interrupted_while_rows_move_between_shards(decoder, monkeypatch):
    monkeypatch.setattr("lrt_deploy.runtime.batch.slots_of_a_step", lambda decoder, state: 7.0)
    moves, take = [], Shard.take
    monkeypatch.setattr(Shard, "take", lambda self, other, row: (moves.append(row), take(self, other, row)))

    def work(client):
        client.batch = client.again(lambda: BatchDecoder(decoder, 3))
        client.again(lambda: client.batch.submit([2] * 9, 5, stop_ids=[]))
        for _ in range(6):
            for found in client.again(client.batch.step):
                client.note(found)
        for prompt, budget in ((SHORT, 9), ([7], 4)):
            client.again(lambda prompt=prompt, budget=budget: client.batch.submit(prompt, budget, stop_ids=[]))
        client.again(client.drain)
        return client.events

    expected = work(Persistent(decoder, 1))
    assert moves
    lines = count_lines(lambda: work(Persistent(decoder, 1)))
    for line, kind in walked(lines, "moves", sample=25):
        client = Persistent(decoder, 1)
        with Tracer(line, kind(f"line {line}")):
            found = work(client)
        assert found == expected, f"line {line}"
        COUNTS[f"{kind.__name__}, batch goes on"] += 1


def test_a_batch_is_interrupted_while_a_request_fails(decoder):
    """Rows with unusable numbers leave; the handlers for that are walked too."""

    def work(client):
        shard, calls = client.batch._shards[0], []

        def spoiled(tokens, positions, head):
            logits = OrtCpuBuffers.decode(shard.state.buffers, tokens, positions, head)
            calls.extend(positions.tolist())
            if len(tokens) == 2 and int(tokens[1]) == 77:
                logits[1, 3] = np.nan
            return logits

        vars(shard.state.buffers)["decode"] = spoiled
        good = client.again(lambda: client.batch.submit(LONG, 3, stop_ids=[]))
        bad = client.again(lambda: client.batch.submit([4, 77, 5], 3, stop_ids=[]))
        client.again(client.drain)
        assert [type(event) for event in client.events[bad]] == [NonFiniteError]
        return client.events[good]

    expected = work(Persistent(decoder, 1, spoil=True))
    assert [e.token for e in expected] == [e.token for e in decoder.generate(LONG, 3, stop_ids=[], policy="stepwise")]
    lines = count_lines(lambda: work(Persistent(decoder, 1, spoil=True)))
    for line, kind in walked(lines, "failing"):
        client = Persistent(decoder, 1, spoil=True)
        with Tracer(line, kind(f"line {line}")):
            found = work(client)
        assert found == expected, f"line {line}"
        COUNTS[f"{kind.__name__}, batch goes on"] += 1


@pytest.mark.parametrize("broken", ["nothing is undone", "the commit is not taken back"])
def test_a_state_that_is_not_put_back_is_found_out(decoder_of, monkeypatch, broken):
    """The twin: the walk must see the faults that it is here for."""
    decoder = decoder_of("mr_gqa_SSSL")
    expected, found = content(decoder, ragged(decoder)), Counter()
    lines = count_lines(lambda: decoder.step(ragged(decoder), NEXT)) - count_lines(lambda: ragged(decoder))
    if broken == "nothing is undone":
        monkeypatch.setattr(DecodeState, "_restore", lambda self, undo: setattr(self, "undo", None))
    else:
        monkeypatch.setattr(DecodeState, "_now", Sticky(), raising=False)
    for line in range(1, lines + 1):
        state = ragged(decoder)
        if raised_at(line, KeyboardInterrupt, lambda state=state: decoder.step(state, NEXT)):
            try:
                found[outcome(decoder, state, expected)] += 1
            except (AssertionError, NonFiniteError):
                found["wrong"] += 1
    assert found["wrong"] and found["unchanged"]


class Sticky:
    """An attribute that does not go back to what it was before."""

    def __get__(self, state, owner=None):
        return vars(state)["now"]

    def __set__(self, state, value):
        if "now" not in vars(state) or vars(state).get("past") is not value:
            vars(state)["past"], vars(state)["now"] = vars(state).get("now"), value
