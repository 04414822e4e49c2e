"""One lane of a batch: the rows of one state, a request on each, stepped together.

Every step feeds one token to every row: its own last token, or the next one of its prompt. Knows no queue. What a lane
has done is told from its state alone: a row carries its request, and the row's length says what has been fed. So
nothing has to be kept in step with anything else when an interrupt comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from lrt_deploy.errors import LRTDeployError, NonFiniteError
from lrt_deploy.types import IntArray, PrefillReport

from .generation import Continuation, Event
from .prefill import PrefillRequest, way_of
from .sampling import log_normalizers
from .state import DecodeState

if TYPE_CHECKING:
    from .decoder import Decoder


@dataclass(frozen=True)
class BatchEvent:
    """One token of one request, or the error that ended it; other requests go on."""

    request: int
    event: Event | None = None
    error: LRTDeployError | None = None

    @property
    def last(self) -> bool:
        """Whether nothing of this request follows."""
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
        """The token to feed to a row of `length` tokens; None where none was chosen, or the request does not run."""
        if made is None or length == self.continuation.read + made:
            return None
        return self.continuation.history[length]


class Book(NamedTuple):
    """Where the requests of a batch stand. Replaced in one assignment."""

    submitted: int = 0  # numbers below are taken
    joined: int = 0  # requests of numbers below have been taken from the queue
    cancelled: frozenset[int] = frozenset()  # of those in the queue
    made: Mapping[int, int] = {}  # tokens that were chosen so far, by the number of each running request
    events: tuple[BatchEvent, ...] = ()  # not delivered yet

    def ended(self, numbers: set[int], events: tuple[BatchEvent, ...]) -> Book:
        """The same without these running requests, and with these events more."""
        made = {number: count for number, count in self.made.items() if number not in numbers}
        return self._replace(made=made, events=self.events + events)


class Lane:
    """Requests on the rows of one state; row i is request i, and the last one moves into a gap."""

    def __init__(self, decoder: Decoder, slots: int) -> None:
        self.decoder, self.state = decoder, decoder.new_state(slots)
        # A thread may still be feeding when an interrupt has ended the step that started it, or start only then. Plain
        # attributes and no lock: an interrupt at the end of a `with` block would leave a lock taken for good.
        self.busy = False  # whether a thread is feeding
        self.ticket: object = None  # which feeding may begin
        self._failed: tuple[BatchEvent, ...] = ()  # of requests whose rows gave unusable numbers
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
        logits = self.state.logits_of(ready)
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
        return Book(book.submitted, book.joined, book.cancelled, made, (*book.events, *events))

    def join(self, request: Request) -> None:
        """Give a request a row; raises LRTDeployError where it cannot be started."""
        read = request.continuation.read
        ids = np.array(request.continuation.history[:read], np.int64)
        options, reading = self.decoder.prefill_options, request.reading
        if request.state is None and way_of(ids, self.decoder.config.memory, reading, options) == "stepwise":
            below = options.stepwise_below if reading.policy == "auto" else None
            request.prefill = PrefillReport("stepwise", passes=1.0, stepwise_below=below)
            self.state.add(tag=request)
            return
        source = self._read(ids, reading) if request.state is None else request.state
        request.prefill = source.prefill
        self.state.add(source, tag=request)

    def feed(self, made: Mapping[int, int]) -> None:
        """One decode step for all rows; rows with unusable numbers leave, and the others are stepped without them.

        Does nothing where a row has no token to be fed: what was to be done has been done.
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
        """End the requests that have failed while they were fed."""
        if not self._failed:
            return book
        self._failed = failed = tuple(event for event in self._failed if event.request in book.made)
        return book.ended({event.request for event in failed}, failed) if failed else book

    def feed_in_thread(self, made: Mapping[int, int], ticket: object) -> None:
        """`feed`, unless it has been called off."""
        self.busy = True
        try:
            if self.ticket is ticket:
                self.feed(made)
        finally:
            self.busy = False

    def free(self, made: Mapping[int, int]) -> None:
        """Drop the rows of requests that do not run, the last one first: the last row moves into the gap."""
        requests = self.requests
        for row in reversed(range(len(requests))):
            if requests[row].number not in made:
                self.state.drop(row)

    def _read(self, ids: IntArray, reading: PrefillRequest) -> DecodeState:
        """Read a prompt by itself, into a state that is used again for the next."""
        if self._reader is None:
            reader = self.decoder.new_state(1)
            reader.add()
            self._reader = reader
        self._reader.rewind(0)
        rows = [ids.tolist()]
        return self.decoder.prefill(rows, state=self._reader, policy=reading.policy, tolerance=reading.tolerance)
