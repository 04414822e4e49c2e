"""Continuous batching: a fixed number of slots kept full from a queue, each request streamed as if it ran alone.

A prompt that is read stepwise joins the batch at once and costs no step of its own; one that is iterated is read by
itself (many tokens a call already) and then joins. A row that ends makes room before the next step. There is no
padding: rows have their own lengths, latents, stop rules and random numbers, and what a request gives does not depend
on its neighbours beyond the rounding of float32 sums. One thread uses one BatchDecoder, which may use several: `lanes`
divides the slots into batches that are stepped side by side, which small models on several cores gain from.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from lrt_deploy.arguments import check_is, check_whole
from lrt_deploy.errors import InputError, LRTDeployError, StateError
from lrt_deploy.text.prompts import check_ids, check_prompts
from lrt_deploy.types import PrefillPolicy

from .batch_lane import BatchEvent, Book, Lane, Request
from .generation import Continuation, Generation
from .prefill import PrefillRequest
from .state import DecodeState

if TYPE_CHECKING:
    from .decoder import Decoder

_POLL_SECONDS = 1e-3
_Found = TypeVar("_Found")


class BatchDecoder:
    """Runs requests on `slots` rows of one decoder (default: as many as the bundle allows).

    `submit` as often as wanted, also between steps; `run` until all is done, or `step` in a loop of your own. With
    several lanes use it in a `with` block, or call `close`.
    """

    def __init__(self, decoder: Decoder, slots: int | None = None, lanes: int = 1) -> None:
        from .decoder import Decoder

        most = check_is(decoder, Decoder, "decoder").manifest.max_batch_size
        slots = most if slots is None else check_whole(slots, "slots", 1, most)
        lanes = check_whole(lanes, "lanes", 1)
        if not 1 <= lanes <= slots:
            raise InputError(f"{lanes} lanes were asked for on {slots} slots; expected 1 to {slots}")
        self.decoder, self.slots = decoder, slots
        self._lanes = [Lane(decoder, (slots + i) // lanes) for i in range(lanes)]
        self._threads = ThreadPoolExecutor(lanes) if lanes > 1 else None
        self._queue: deque[Request] = deque()  # which of them count, the book says
        self._book = Book()

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return self._book.submitted - self._book.joined - len(self._book.cancelled)

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

        Reading stepwise is exact, and in a batch it is the cheapest too: a row more costs a step little. A long prompt
        has its first token sooner with `policy="auto"`, at the cost of the others.
        Without a prompt it continues a copy of `state`, of one sequence: n times the same one for n continuations.
        """
        stop_ids = None if stop_ids is None else check_ids(stop_ids, self.decoder.config.vocab_size, "stop_ids")
        options = Generation.of(self.decoder.tokenizer, max_new_tokens, stop_ids, stop_strings, sampling)
        reading = PrefillRequest.of(policy, tolerance, self.decoder.config.memory, self.decoder.precision)
        if (prompt is None) == (state is None):
            raise InputError("a request starts from a prompt or from a state, and needs exactly one of the two")
        book, start = self._book, None if state is None else self._start(state)
        tokens = self._prompt(prompt) if start is None else start.row_tokens(0)
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
        """Forget a request, waiting or running; nothing more is heard of it."""
        request, book = check_whole(request, "request"), self._book
        if book.joined <= request < book.submitted:
            book = book._replace(cancelled=book.cancelled | {request})
        events = tuple(event for event in book.events if event.request != request)
        self._book = book.ended({request}, ())._replace(events=events)

    def run(self) -> Iterator[BatchEvent]:
        """Events of all requests as they come, until none is left; more may be submitted meanwhile.

        Events that were not taken, because of an error or because the iterator was closed, come with the next call.
        """
        while True:
            while self._book.events:
                yield self._deliver(self._book.events[0], self._book.events[1:])
            if not (self.waiting or self.running):
                return
            self._advance()

    def step(self) -> list[BatchEvent]:
        """Choose a token for every row whose logits are there, fill the slots, and feed all rows.

        Raises what a backend raises; then nothing is lost, and the next step goes on from there. The same holds for an
        interrupt.
        """
        self._advance()
        return self._deliver(list(self._book.events), ())

    def _advance(self) -> None:
        """Everything that `step` does but delivering."""
        self._wait()
        for lane in self._lanes:
            self._book = lane.report(self._book)
            self._book = lane.choose(self._book)
            lane.free(self._book.made)
        while (request := self._next()) and (lane := max(self._lanes, key=lambda lane: lane.room)).room:
            self._join(request, lane)
        if self._threads is None:
            self._lanes[0].feed(self._book.made)
        else:
            ticket, feeding = object(), []
            for lane in self._lanes:
                lane.ticket = ticket
                feeding.append(self._threads.submit(lane.feed_in_thread, self._book.made, ticket))
            wait(feeding)
            for fed in feeding:
                fed.result()
        for lane in self._lanes:
            self._book = lane.report(self._book)

    def _next(self) -> Request | None:
        """The first request in the queue; those that do not count any more are removed."""
        book, queue = self._book, self._queue
        while queue and (queue[0].number < book.joined or queue[0].number in book.cancelled):
            queue.popleft()
        return queue[0] if queue and queue[0].number < book.submitted else None

    def _join(self, request: Request, lane: Lane) -> None:
        """Move a request from the queue to a lane; one whose logits are there chooses at once."""
        number, book = request.number, self._book
        book = book._replace(joined=number + 1, cancelled=frozenset(n for n in book.cancelled if n > number))
        try:
            lane.join(request)
        except LRTDeployError as error:
            self._book = book.ended(set(), (BatchEvent(number, error=error),))
            return
        self._book = book._replace(made={**book.made, number: 0})
        request.state = None
        self._book = lane.choose(self._book)
        lane.free(self._book.made)

    def _wait(self) -> None:
        """Wait for lanes that an interrupt has left alone while they were fed, and call off what has not begun."""
        if self._threads is None:
            return
        for lane in self._lanes:
            lane.ticket = None
        while any(lane.busy for lane in self._lanes):
            time.sleep(_POLL_SECONDS)

    def _deliver(self, found: _Found, rest: tuple[BatchEvent, ...]) -> _Found:
        """Hand out events, in one step with noting that only `rest` is left to be delivered."""
        book = self._book
        try:
            self._book = Book(book.submitted, book.joined, book.cancelled, book.made, rest)
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
        self._lanes[0].state.origin.check_same(state.origin)
        return state.fork()

    def _prompt(self, prompt: str | Sequence[int] | None) -> list[int]:
        assert prompt is not None
        ids = self.decoder.prompt_ids(prompt)
        check_prompts([ids], self.decoder.config.vocab_size)
        if len(ids) > self.decoder.max_seq_len:
            raise StateError(f"the prompt has {len(ids)} tokens and a slot holds {self.decoder.max_seq_len}")
        return ids
