"""The rows of one decode state with a request on each, and what a request is. Knows no queue; see `batch`.

What a shard has done is read off its state alone: a row carries its request, and the row's length says what has been
run. So every step may be interrupted and done again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import numpy as np

from lrt_deploy.bundle.weights import matrix_elements
from lrt_deploy.errors import InputError, LRTDeployError, NonFiniteError
from lrt_deploy.types import FloatArray, IntArray, PrefillReport

from .decoder import Decoder
from .generation import NO_TOKEN, Continuation, Event, PromptLogprob
from .prefill import PrefillRequest, policy_of, reused, stepwise_note
from .sampling import log_normalizers, top_logprobs
from .state import DecodeState


@dataclass(frozen=True)
class BatchEvent:
    """One token of one request, or the error that ended it. Other requests go on."""

    request: int
    event: Event | None = None
    error: LRTDeployError | None = None

    @property
    def last(self) -> bool:
        """Whether this is the last event of the request."""
        return self.event is None or self.event.finish_reason is not None


@dataclass(eq=False)
class Prompt:
    """The tokens that one request starts from, or several alike: they are read once."""

    ids: list[int]
    reading: PrefillRequest
    choices: int = 1  # requests that start from it
    start: DecodeState | None = None  # a copy that holds the first `shared` tokens
    done: DecodeState | None = None  # a copy that holds all of them
    shared: int = 0
    report: PrefillReport | None = None  # how it was read
    top: int | None = None  # alternatives of each token; None: no log-probabilities of the prompt
    scores: dict[int, PromptLogprob] = field(default_factory=dict)  # by position
    reader: int | None = None  # the request that reads it, or did

    def policy(self, decoder: Decoder) -> str:
        """Return how the tokens that are not held yet are read."""
        rest = np.array(self.ids[self.shared :], np.int64)
        return policy_of(rest, decoder.config.memory, self.reading, decoder.prefill_options)

    def read_stepwise(self, decoder: Decoder) -> None:
        """Set the report to that of stepwise reading."""
        below = decoder.prefill_options.stepwise_below if self.reading.policy == "auto" else None
        report = PrefillReport("stepwise", 1.0, note=stepwise_note(self.reading), stepwise_below=below)
        whole: list[IntArray] = [np.array(self.ids)]
        self.report = report
        if self.start is not None:
            self.report = reused(report, [self.shared], whole, self.start.read_within)

    def needs_score(self, position: int) -> bool:
        """Return whether the log-probabilities at a position are wanted and not known yet."""
        return self.top is not None and 0 < position < len(self.ids) and position not in self.scores

    def score(self, position: int, logits: FloatArray) -> None:
        """Set the log-probabilities at a position, from the logits (V) before it."""
        assert self.top is not None
        token, normalizer = self.ids[position], log_normalizers(logits[None])[0]
        top = top_logprobs(logits, normalizer, self.top) if self.top else ()
        self.scores[position] = PromptLogprob(token, logits.item(token) - normalizer, top)

    def scored(self) -> tuple[PromptLogprob, ...] | None:
        """Return the log-probabilities of all tokens, if they were asked for."""
        if self.top is None:
            return None
        return (PromptLogprob(self.ids[0], None, ()), *(self.scores[at] for at in range(1, len(self.ids))))


@dataclass(eq=False)
class Request:
    """A request that waits, runs or is suspended."""

    number: int
    prompt: Prompt
    continuation: Continuation  # of the prompt's tokens
    keep_state: bool = False
    latent_cosine: bool = False  # whether events have it
    priority: int = 0
    deadline: float = math.inf  # of the batch's clock
    row: DecodeState | None = None  # a copy of its row, from when it was suspended
    made: int = 0  # tokens that were chosen by then
    turns: int = 0  # that have ended
    behind: int = 0  # how many requests had been submitted when the last one ended

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Of two requests that wait, the one with the smaller order is admitted first."""
        return -self.priority, max(self.behind, self.number), self.turns, self.number


class Book(NamedTuple):
    """The progress of all requests of a batch."""

    submitted: int = 0  # requests so far; the next one has this number
    waiting: tuple[Request, ...] = ()  # in the order in which they are admitted
    reading: tuple[Request, ...] = ()  # have a slot and no row yet: their prompts are iterated, one after the other
    made: Mapping[int, int] = {}  # tokens that were chosen so far, by the number of each request with a row
    suspended: Mapping[int, Request] = {}
    events: tuple[BatchEvent, ...] = ()  # not delivered yet

    def without(self, numbers: set[int], *events: BatchEvent) -> Book:
        """Return the book without these requests, and with these events more."""
        return self._replace(
            waiting=tuple(request for request in self.waiting if request.number not in numbers),
            reading=tuple(request for request in self.reading if request.number not in numbers),
            made={number: count for number, count in self.made.items() if number not in numbers},
            suspended={number: request for number, request in self.suspended.items() if number not in numbers},
            events=self.events + events,
        )

    def seated(self, request: Request) -> Book:
        """Return the book with a row for a request that waited, or whose prompt was read."""
        book = self.without({request.number})
        return book._replace(made={**book.made, request.number: request.made})


class Shard:
    """The rows of one state, with a request on each (`DecodeState.tags`), stepped together."""

    def __init__(self, decoder: Decoder, slots: int, tokens: int = 0) -> None:
        """Make a shard without rows, whose first one will have so many tokens."""
        self.decoder, self.state = decoder, decoder.new_state(slots)
        if tokens:  # growing while it is empty copies nothing, and touches no memory
            for _ in range(len(self.state.buffers.read_slots(0, 0, 0)) + 1):
                self.state.fit(tokens)
        # After an interrupt, a thread may still run the step that was interrupted, or start only then. Plain attributes
        # and no lock: an interrupt at the end of a `with` block would leave a lock taken for ever.
        self.busy = False  # whether a thread runs a step
        self.ticket: object = None  # the step that may begin
        self.soon = 0  # tokens of a row that will be added when its prompt has been read
        self._failed: tuple[BatchEvent, ...] = ()  # of requests whose logits were not finite

    @property
    def room(self) -> int:
        """Free rows."""
        return self.state.slots - self.state.batch

    @property
    def requests(self) -> list[Request]:
        """The request of each row."""
        return cast("list[Request]", self.state.tags)

    def choose(self, book: Book) -> Book:
        """Choose a token for every row whose logits are there, and score the tokens of prompts that were read."""
        requests, lengths, made, ready = self.requests, self.state.row_lengths, dict(book.made), []
        for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            count = made.get(request.number)
            if count is None:
                continue
            if length == request.continuation.read + count:
                ready.append(row)
            elif request.prompt.top is not None and request.prompt.needs_score(length):
                request.prompt.score(length, self.state.row_logits(row))
        if not ready:
            return book
        found = [self.state.row_logits(row) for row in ready]
        logits = found[0][None] if len(found) == 1 else np.concatenate(found).reshape(len(found), -1)  # (n, V)
        tokenizer = self.decoder.tokenizer
        choices = tokenizer.vocab_size if tokenizer else None  # as in `Generation`
        largest, normalizers = logits[:, :choices].argmax(axis=1).tolist(), log_normalizers(logits)
        capacity, events = self.state.capacity, []
        for i, row in enumerate(ready):
            request, full = requests[row], lengths[row] == capacity
            number, continuation, report = request.number, request.continuation, request.prompt.report
            assert report is not None
            count = made[number]
            continuation.resume(count)
            if count == 0:
                self._share(row, request, book)
            if continuation.options.max_new_tokens == 0:
                event = Event(NO_TOKEN, "", "length", report, 0.0)
            else:
                try:
                    token = largest[i] if continuation.takes_the_largest else continuation.choose(logits[i])
                    logprob, more = logits.item(i, token) - normalizers[i], continuation.options.logprobs
                    top = top_logprobs(logits[i, :choices], normalizers[i], more) if more else ()
                    event = continuation.take(token, logprob, top, report, full)
                except InputError as error:  # a grammar that has become too costly
                    del made[number]
                    events.append(BatchEvent(number, error=error))
                    continue
                if request.latent_cosine:
                    event = replace(event, latent_cosine=self.state.latent_cosine(row))
            if count == 0 and request.prompt.top is not None:
                event = replace(event, prompt_logprobs=request.prompt.scored())
            made[number] = count + 1
            if event.finish_reason is not None:
                del made[number]
                if request.keep_state:
                    event = replace(event, state=self._kept(row, event, full))
            events.append(BatchEvent(number, event))
        return book._replace(made=made, events=(*book.events, *events))

    def _share(self, row: int, request: Request, book: Book) -> None:
        """Copy a prompt that has been read, if others wait for it."""
        prompt = request.prompt
        if prompt.choices > 1 and prompt.done is None and any(other.prompt is prompt for other in book.waiting):
            prompt.done = self.copy(row)

    def _kept(self, row: int, event: Event, full: bool) -> DecodeState:
        """Return a copy of a row that holds the token of its last event too, where there is room."""
        state = self.copy(row)
        if event.token != NO_TOKEN and not full:
            state.defer((event.token,), None)
        return state

    def copy(self, row: int) -> DecodeState:
        """Return a copy of a row."""
        state, request = self.state.rows([row]), self.requests[row]
        if request.prompt.report is not None:
            state.prefill = request.prompt.report
        return state

    def admit(self, request: Request) -> None:
        """Give a row to a request: the one that it had, or one that holds what is there of its prompt."""
        prompt = request.prompt
        if request.row is None and prompt.done is None:
            prompt.read_stepwise(self.decoder)
        self.state.add(request.row or prompt.done or prompt.start, tag=request)

    def run(self, made: Mapping[int, int]) -> None:
        """Run one decode step of all rows: a row runs its own last token, or the next one of its prompt.

        Rows with logits that are not finite are evicted, and the step is done again without them. Does nothing where a
        row has no next token: then the step has been done.
        """
        while requests := self.requests:
            lengths = self.state.row_lengths
            tokens = []
            for request, length in zip(requests, lengths, strict=True):
                continuation, count = request.continuation, made.get(request.number)
                if count is None or length == continuation.read + count:  # no token was chosen, or it does not run
                    return
                tokens.append(continuation.history[length])
            self.state.fit(self.soon)
            try:
                self.decoder.advance(self.state, np.array(tokens, np.int64))
            except NonFiniteError as error:
                for row in reversed(error.rows):
                    self._failed = (*self._failed, BatchEvent(requests[row].number, error=error))
                    self.state.drop(row)
                continue
            return

    def report(self, book: Book) -> Book:
        """End the requests that have failed in `run`."""
        if not self._failed:
            return book
        self._failed = failed = tuple(event for event in self._failed if event.request in book.made)
        return book.without({event.request for event in failed}, *failed) if failed else book

    def run_in_thread(self, made: Mapping[int, int], ticket: object) -> None:
        """Do `run`, unless it has been cancelled."""
        self.busy = True
        try:
            if self.ticket is ticket:
                self.run(made)
        finally:
            self.busy = False

    def free(self, made: Mapping[int, int]) -> None:
        """Evict the rows of requests that have ended, the last one first: the last row moves into the gap."""
        ended = [row for row, request in enumerate(self.requests) if request.number not in made]
        for row in reversed(ended):
            self.state.drop(row)

    def take(self, other: Shard, row: int) -> None:
        """Move a row of another shard here. After an interrupt both may have it; see `evict`."""
        self.state.add(other.state, row, tag=other.requests[row])
        other.state.drop(row)

    def evict(self, others: Shard) -> None:
        """Evict the rows that are in another shard too."""
        there = {request.number for request in others.requests}
        self.free({request.number: 0 for request in self.requests if request.number not in there})


# What a step costs without any cache slots, beside the weights that it reads: as much as reading so many bytes.
_DISPATCH_BYTES = 8 * 2**20
_ITEM_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int4-weight-only": 0.5}  # of a matrix's elements; others: 1


def slots_of_a_step(decoder: Decoder, state: DecodeState) -> float:
    """Return how many cache slots, of one row each, take as long to read as a step takes without any.

    A step reads the slots of the longest row for every row. Infinite where caches have all their memory from the start,
    so that a second state would double it.
    """
    if decoder.backend != "ort-cpu":
        return math.inf
    slot = sum(array.nbytes for array in state.buffers.read_slots(0, 0, 1).values())
    return (matrix_elements(decoder.config) * _ITEM_BYTES.get(decoder.precision, 1.0) + _DISPATCH_BYTES) / slot


def step_cost(lengths: Sequence[int], step: float) -> float:
    """Return the cost of a step of rows of these lengths in slots; `step` is that of `slots_of_a_step`."""
    return step + len(lengths) * max(lengths) if lengths else 0.0


def divided(lengths: Sequence[int], step: float) -> tuple[float, int]:
    """Return the least cost of rows of these lengths (the longest first) in two steps or one, and how many go first."""
    costs = [step_cost(lengths[:count], step) + step_cost(lengths[count:], step) for count in range(len(lengths))]
    return min(zip(costs, range(len(lengths)), strict=True))
