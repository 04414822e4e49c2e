"""Continuous batching: a fixed number of slots kept full from a queue, each request streamed as if it ran alone.

A prompt that is read stepwise is admitted at once and costs no step of its own; one that is iterated is first read by
itself (many tokens a call already). A row that ends makes room before the next step. There is no padding: rows have
their own lengths, latents, stop rules and random numbers, and the result of a request does not depend on its neighbours
beyond the rounding of float32 sums. One thread uses one BatchDecoder, which may use several: `lanes` divides the slots
into shards that are stepped side by side, which small models on several cores gain from.

Interrupts: where the requests stand is one `Book`, replaced in one assignment. What a shard has done is read off its
state alone: a row carries its request, and the row's length says what has been run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self, TypeVar, cast

import numpy as np

from lrt_deploy.arguments import check_is, check_whole
from lrt_deploy.errors import InputError, LRTDeployError, NonFiniteError, StateError
from lrt_deploy.text.prompts import check_ids
from lrt_deploy.types import IntArray, PrefillPolicy, PrefillReport

from .decoder import Decoder
from .generation import Continuation, Event, Generation
from .prefill import PrefillRequest, policy_of
from .sampling import log_normalizers
from .state import DecodeState

_POLL_SECONDS = 1e-3
_Found = TypeVar("_Found")


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
class Request:
    """A request that waits or runs."""

    number: int
    continuation: Continuation  # of the tokens of its prompt, or of the state that it starts from
    reading: PrefillRequest
    state: DecodeState | None = None  # where it starts from, if not from a prompt
    prefill: PrefillReport | None = None

    def next_token(self, made: int | None, length: int) -> int | None:
        """Return the next token of a row of `length` tokens; None if none was chosen or the request does not run."""
        if made is None or length == self.continuation.read + made:
            return None
        return self.continuation.history[length]


class Book(NamedTuple):
    """The progress of all requests of a batch."""

    submitted: int = 0  # requests so far; the next one has this number
    admitted: int = 0  # requests of lower numbers have left the queue
    cancelled: frozenset[int] = frozenset()  # of those in the queue
    made: Mapping[int, int] = {}  # tokens that were chosen so far, by the number of each running request
    events: tuple[BatchEvent, ...] = ()  # not delivered yet

    def ended(self, numbers: set[int], events: tuple[BatchEvent, ...]) -> Book:
        """Return the book without these running requests, and with these events more."""
        made = {number: count for number, count in self.made.items() if number not in numbers}
        return self._replace(made=made, events=self.events + events)


class Shard:
    """The rows of one state, with a request on each (`DecodeState.tags`), stepped together. Knows no queue."""

    def __init__(self, decoder: Decoder, slots: int) -> None:
        self.decoder, self.state = decoder, decoder.new_state(slots)
        # After an interrupt, a thread may still run the step that was interrupted, or start only then. Plain attributes
        # and no lock: an interrupt at the end of a `with` block would leave a lock taken for ever.
        self.busy = False  # whether a thread runs a step
        self.ticket: object = None  # the step that may begin
        self._failed: tuple[BatchEvent, ...] = ()  # of requests whose logits were not finite
        self._reader: DecodeState | None = None

    @property
    def room(self) -> int:
        """Free rows."""
        return self.state.slots - self.state.batch

    @property
    def requests(self) -> list[Request]:
        """The request of each row."""
        return cast("list[Request]", self.state.tags)

    def choose(self, book: Book) -> Book:
        """Choose a token for every row whose logits are there."""
        requests, lengths = self.requests, self.state.row_lengths
        ready = [
            row
            for row, request in enumerate(requests)
            if request.number in book.made and lengths[row] == request.continuation.read + book.made[request.number]
        ]
        if not ready:
            return book
        logits = np.concatenate([self.state.row_logits(row) for row in ready]).reshape(len(ready), -1)  # (n, V)
        tokenizer = self.decoder.tokenizer
        choices = tokenizer.vocab_size if tokenizer else None  # as in `Generation`
        largest = logits[:, :choices].argmax(axis=1).tolist()
        normalizers, capacity = log_normalizers(logits), self.state.capacity
        made, events = dict(book.made), []
        for i, row in enumerate(ready):
            request = requests[row]
            continuation, report, number = request.continuation, request.prefill, request.number
            assert report is not None
            continuation.resume(made[number])
            token = largest[i] if continuation.takes_the_largest else continuation.choose(logits[i])
            logprob = logits.item(i, token) - normalizers[i]
            event = continuation.take(token, logprob, report, lengths[row] == capacity)
            events.append(BatchEvent(number, event))
            made[number] += 1
            if event.finish_reason is not None:
                del made[number]
        return Book(book.submitted, book.admitted, book.cancelled, made, (*book.events, *events))

    def admit(self, request: Request) -> None:
        """Give a request a row; raises LRTDeployError where it cannot be started."""
        read = request.continuation.read
        ids = np.array(request.continuation.history[:read], np.int64)
        options, reading = self.decoder.prefill_options, request.reading
        if request.state is None and policy_of(ids, self.decoder.config.memory, reading, options) == "stepwise":
            below = options.stepwise_below if reading.policy == "auto" else None
            request.prefill = PrefillReport("stepwise", passes=1.0, stepwise_below=below)
            self.state.add(tag=request)
            return
        source = self._read(ids, reading) if request.state is None else request.state
        request.prefill = source.prefill
        self.state.add(source, tag=request)

    def run(self, made: Mapping[int, int]) -> None:
        """Run one decode step of all rows: a row runs its own last token, or the next one of its prompt.

        Rows with logits that are not finite are evicted, and the step is done again without them. Does nothing where a
        row has no next token: then the step has been done.
        """
        while requests := self.requests:
            lengths = self.state.row_lengths
            tokens = [r.next_token(made.get(r.number), n) for r, n in zip(requests, lengths, strict=True)]
            if None in tokens:
                return
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
        return book.ended({event.request for event in failed}, failed) if failed else book

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
        requests = self.requests
        for row in reversed(range(len(requests))):
            if requests[row].number not in made:
                self.state.drop(row)

    def _read(self, ids: IntArray, reading: PrefillRequest) -> DecodeState:
        """Read a prompt by itself, into a state that later prompts use again."""
        if self._reader is None:
            reader = self.decoder.new_state(1)
            reader.add()
            self._reader = reader
        self._reader.rewind(0)
        rows = [ids.tolist()]
        return self.decoder.prefill(rows, state=self._reader, policy=reading.policy, tolerance=reading.tolerance)


class BatchDecoder:
    """Runs requests on `slots` rows of one decoder (default: as many as the bundle allows).

    Call `submit` at any time, also between steps, and `run` until all is done, or `step` in a loop. With several lanes
    use it in a `with` block, or call `close`.
    """

    def __init__(self, decoder: Decoder, slots: int | None = None, lanes: int = 1) -> None:
        most = check_is(decoder, Decoder, "decoder").manifest.max_batch_size
        slots = most if slots is None else check_whole(slots, "slots", 1, most)
        lanes = check_whole(lanes, "lanes", 1)
        if not 1 <= lanes <= slots:
            raise InputError(f"{lanes} lanes were asked for on {slots} slots; expected 1 to {slots}")
        self.decoder, self.slots = decoder, slots
        self._shards = [Shard(decoder, (slots + i) // lanes) for i in range(lanes)]
        self._threads = ThreadPoolExecutor(lanes) if lanes > 1 else None
        self._queue: deque[Request] = deque()  # the book says which of them count
        self._book = Book()

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return self._book.submitted - self._book.admitted - len(self._book.cancelled)

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return len(self._book.made)

    def submit(
        self,
        prompt: str | Sequence[int] | None,
        max_new_tokens: int = 64,
        *,
        state: DecodeState | None = None,
        stop_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        policy: PrefillPolicy = "stepwise",
        tolerance: float | None = None,
        **sampling: float | int | None,
    ) -> int:
        """Queue a request, options as in `Decoder.generate`; returns its number.

        Reading stepwise is exact, and also the cheapest in a batch, where one row more adds little to a step. With
        `policy="auto"` a long prompt has its first token sooner, and the other requests wait for it. Without a prompt
        the request continues a copy of `state`, of one sequence; submit it n times for n continuations.
        """
        stop_ids = None if stop_ids is None else check_ids(stop_ids, self.decoder.config.vocab_size, "stop_ids")
        options = Generation.of(self.decoder.tokenizer, max_new_tokens, stop_ids, stop_strings, sampling)
        reading = PrefillRequest.of(policy, tolerance, self.decoder.config.memory, self.decoder.precision)
        if (prompt is None) == (state is None):
            raise InputError("a request starts from a prompt or from a state, and needs exactly one of the two")
        book, start = self._book, None if state is None else self._start(state)
        tokens = self._prompt(prompt) if start is None else start.tokens[0]
        request = Request(book.submitted, Continuation(options, tokens), reading, start)
        while self._queue and self._queue[-1].number >= request.number:  # left by an interrupt
            self._queue.pop()
        self._queue.append(request)
        try:
            self._book = book._replace(submitted=book.submitted + 1)
            return request.number
        except BaseException:
            self._book = book
            raise

    def cancel(self, request: int) -> None:
        """Cancel a request, waiting or running; no more events of it follow."""
        request, book = check_whole(request, "request"), self._book
        if book.admitted <= request < book.submitted:
            book = book._replace(cancelled=book.cancelled | {request})
        events = tuple(event for event in book.events if event.request != request)
        self._book = book.ended({request}, ())._replace(events=events)

    def run(self) -> Iterator[BatchEvent]:
        """Yield events of all requests as they come, until none is left; more may be submitted meanwhile.

        Events that were not taken, because of an error or because the iterator was closed, come with the next call.
        """
        while True:
            while self._book.events:
                yield self._deliver(self._book.events[0], self._book.events[1:])
            if not (self.waiting or self.running):
                return
            self._advance()

    def step(self) -> list[BatchEvent]:
        """Choose a token for every row whose logits are there, fill the slots, and run one step of all rows.

        Raises what a backend raises; then nothing is lost, and the next step goes on from there. The same holds for an
        interrupt.
        """
        self._advance()
        return self._deliver(list(self._book.events), ())

    def _advance(self) -> None:
        """Do everything of `step` but delivering events."""
        self._wait()
        for shard in self._shards:
            self._book = shard.report(self._book)
            self._book = shard.choose(self._book)
            shard.free(self._book.made)
        while (request := self._next()) and (shard := max(self._shards, key=lambda shard: shard.room)).room:
            self._admit(request, shard)
        if self._threads is None:
            self._shards[0].run(self._book.made)
        else:
            ticket, running = object(), []
            for shard in self._shards:
                shard.ticket = ticket
                running.append(self._threads.submit(shard.run_in_thread, self._book.made, ticket))
            wait(running)
            for done in running:
                done.result()
        for shard in self._shards:
            self._book = shard.report(self._book)

    def _next(self) -> Request | None:
        """Return the first request in the queue; removes those that were cancelled or interrupted."""
        book, queue = self._book, self._queue
        while queue and (queue[0].number < book.admitted or queue[0].number in book.cancelled):
            queue.popleft()
        return queue[0] if queue and queue[0].number < book.submitted else None

    def _admit(self, request: Request, shard: Shard) -> None:
        """Move a request from the queue to a shard; one whose logits are there chooses a token at once."""
        number, book = request.number, self._book
        book = book._replace(admitted=number + 1, cancelled=frozenset(n for n in book.cancelled if n > number))
        try:
            shard.admit(request)
        except LRTDeployError as error:
            self._book = book.ended(set(), (BatchEvent(number, error=error),))
            return
        self._book = book._replace(made={**book.made, number: 0})
        request.state = None
        self._book = shard.choose(self._book)
        shard.free(self._book.made)

    def _wait(self) -> None:
        """Wait for shards that an interrupt has left running, and cancel the steps that have not begun."""
        if self._threads is None:
            return
        for shard in self._shards:
            shard.ticket = None
        while any(shard.busy for shard in self._shards):
            time.sleep(_POLL_SECONDS)

    def _deliver(self, found: _Found, rest: tuple[BatchEvent, ...]) -> _Found:
        """Return events, in one step with noting that only `rest` is left to be delivered."""
        book = self._book
        try:
            self._book = Book(book.submitted, book.admitted, book.cancelled, book.made, rest)
            return found
        except BaseException:
            self._book = book
            raise

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, state: DecodeState) -> DecodeState:
        if state.batch != 1 or state.lengths[0] == 0:
            raise InputError(f"the state has {state.batch} sequence(s), expected one that holds tokens")
        self.decoder.fingerprint.check_same(state.owner.fingerprint)
        return state.fork()

    def _prompt(self, prompt: str | Sequence[int] | None) -> list[int]:
        assert prompt is not None
        ids = self.decoder.prompt_ids(prompt)
        if len(ids) > self.decoder.max_seq_len:
            raise StateError(f"the prompt has {len(ids)} tokens and a slot holds {self.decoder.max_seq_len}")
        return ids
