"""One lane of a batch: the rows of one state, a request on each, stepped together.

Every step feeds one token to every row: its own last token, or the next one of its prompt. Knows no queue.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lrt_deploy.errors import LRTDeployError, NonFiniteError
from lrt_deploy.interface import FloatArray, IntArray, PrefillReport

from .generation import Continuation, Event, Generation
from .prefill import PrefillRequest, way_of
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


@dataclass
class Request:
    """A request that waits or runs; `unread` are the tokens of its prompt that were not yet fed."""

    number: int
    options: Generation
    reading: PrefillRequest
    unread: deque[int] = field(default_factory=deque)
    state: DecodeState | None = None  # where it starts from, if not from a prompt
    prefill: PrefillReport | None = None
    continuation: Continuation | None = None
    token: int | None = None  # chosen and not yet fed


class Lane:
    """Requests on the rows of one state; row i is request i, and the last one moves into a gap."""

    def __init__(self, decoder: Decoder, slots: int) -> None:
        self.decoder, self.state = decoder, decoder.new_state(slots)
        self.requests: list[Request] = []
        self._events: list[BatchEvent] = []  # kept until they are taken, also when a backend fails in between
        self._reader: DecodeState | None = None

    @property
    def room(self) -> int:
        """Free rows."""
        return self.state.slots - len(self.requests)

    def take_events(self) -> list[BatchEvent]:
        """What has happened since the last call."""
        events, self._events = self._events, []
        return events

    def choose(self) -> None:
        """Choose a token for every row whose logits are there; rows that end leave."""
        ready = [row for row, request in enumerate(self.requests) if not request.unread and request.token is None]
        if not ready:
            return
        logits = self.state.logits_of(ready)
        tokenizer = self.decoder.tokenizer
        choices = tokenizer.vocab_size if tokenizer else None  # as in `Generation`
        largest = logits[:, :choices].argmax(axis=1).tolist()
        events = [self._take(row, logits[i], largest[i]) for i, row in enumerate(ready)]
        for row, event in zip(reversed(ready), reversed(events), strict=True):  # the last row moves into the gap
            if event.last:
                self.leave(row)
        self._events += events

    def join(self, request: Request) -> None:
        """Give a request a row; one whose logits are there chooses at once."""
        ids = np.array(request.unread, np.int64)
        options, reading = self.decoder.prefill_options, request.reading
        if request.state is None and way_of(ids, self.decoder.config.memory, reading, options) == "stepwise":
            below = options.stepwise_below if reading.policy == "auto" else None
            request.prefill = PrefillReport("stepwise", passes=1.0, stepwise_below=below)
            self.state.add()
            self.requests.append(request)
            return
        try:
            source = self._read(ids, reading) if request.state is None else request.state
            self.state.add(source)
        except LRTDeployError as error:
            self._events.append(BatchEvent(request.number, error=error))
            return
        request.prefill, request.state = source.prefill, None
        request.unread.clear()
        self.requests.append(request)
        self.choose()

    def feed(self) -> None:
        """One decode step for all rows; rows with unusable numbers leave, and the others are stepped without them."""
        while self.requests:
            tokens = [request.unread[0] if request.unread else request.token for request in self.requests]
            try:
                self.decoder.advance(self.state, np.array(tokens, np.int64))
            except NonFiniteError as error:
                for row in reversed(error.rows):
                    self._events.append(BatchEvent(self.requests[row].number, error=error))
                    self.leave(row)
                continue
            for request in self.requests:
                if request.unread:
                    request.unread.popleft()
                request.token = None
            return

    def leave(self, row: int) -> None:
        """Free a row."""
        self.state.drop(row)
        last = self.requests.pop()
        if row < len(self.requests):
            self.requests[row] = last

    def _take(self, row: int, logits: FloatArray, largest: int) -> BatchEvent:
        request = self.requests[row]
        if request.continuation is None:
            request.continuation = Continuation(request.options, self.state.row_tokens(row))
        continuation, report = request.continuation, request.prefill
        assert report is not None
        request.token = largest if continuation.takes_the_largest else continuation.choose(logits)
        full = self.state.length(row) == self.state.capacity
        return BatchEvent(request.number, continuation.take(request.token, report, full))

    def _read(self, ids: IntArray, reading: PrefillRequest) -> DecodeState:
        """Read a prompt by itself, into a state that is used again for the next."""
        if self._reader is None:
            self._reader = self.decoder.new_state(1)
            self._reader.add()
        self._reader.rewind(0)
        rows = [ids.tolist()]
        return self.decoder.prefill(rows, state=self._reader, policy=reading.policy, tolerance=reading.tolerance)
