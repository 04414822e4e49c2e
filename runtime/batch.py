"""Continuous batching: a fixed number of slots kept full from a queue, each request streamed as if it ran alone.

A prompt that is read stepwise costs no step of its own. One that is iterated is read beside the others: a few blocks of
it, then a decode step of all rows. A row that ends makes room before the next step. There is no padding: rows have
their own lengths, latents, stop rules and random numbers, and the result of a request does not depend on its neighbours
beyond the rounding of float32 sums. One thread uses one BatchDecoder, which may use several: `lanes` divides the slots
into shards that are stepped side by side, which small models on several cores gain from. With one lane, rows that are
much longer than others are in a second shard where two steps cost less than one: a step reads as many cache slots for
every row as for the longest.

Interrupts: where the requests stand is one `Book`, replaced in one assignment. What a shard has done is read off its
state alone (`shard`). A prompt whose iteration was interrupted is read again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from inspect import GEN_CLOSED, getgeneratorstate
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeVar, Unpack, overload

import numpy as np

from lrt_deploy.errors import Busy, DeadlineExceeded, InputError, LRTDeployError, StateError
from lrt_deploy.fields import LARGEST_COUNT, check_flag, check_is, check_number, check_whole
from lrt_deploy.text.grammar import Grammar
from lrt_deploy.types import PrefillPolicy

from .decoder import Decoder
from .fixed_point import InBlocks
from .generation import Continuation, Generation
from .prefill import PrefillRequest, reused, shared_tokens
from .sampling import SamplingArguments
from .shard import BatchEvent, Book, Prompt, Request, Shard, divided, slots_of_a_step, step_cost
from .state import Content, DecodeState

_POLL_SECONDS = 1e-3
# Of a prompt that is iterated, computed between two steps of the other rows. They take about as long as six steps of
# eight rows. Longer blocks are computed in pieces of equal length.
_PIECE_TOKENS = 80
_COPIES_PER_SLOT = 4  # of rows whose turn has ended
_MOST_CHOICES = 1024  # of one request
_Found = TypeVar("_Found")


class RequestOptions(SamplingArguments, total=False):
    """The options of `BatchDecoder.submit`, for type checkers."""

    state: DecodeState | None
    stop_ids: Sequence[int] | None
    stop_strings: Sequence[str]
    policy: PrefillPolicy
    tolerance: float | None
    logprobs: int | None
    prompt_logprobs: int | None
    keep_state: bool
    priority: int
    deadline_s: float | None
    latent_cosine: bool
    grammar: Grammar | None


class Iterated(NamedTuple):
    """A prompt that is being iterated."""

    request: Request
    state: DecodeState
    reading: InBlocks[Content]

    @property
    def goes_on(self) -> bool:
        """Whether the reading has not come to its end, or to an exception."""
        return getgeneratorstate(self.reading) != GEN_CLOSED


class BatchDecoder:
    """Runs requests on `slots` rows of one decoder (default: as many as the bundle allows).

    Call `submit` at any time, also between steps, and `run` until all is done, or `step` in a loop. With several lanes
    use it in a `with` block, or call `close`. Beyond the free slots, `max_waiting` requests may wait, and prompts of
    `max_waiting_tokens` (None: any number). A prompt that is iterated is read in blocks of half a chunk, as a rule,
    longer ones in pieces of at most 80 tokens, of which `blocks_per_step` come before each decode step of the others.

    `turn_tokens` makes requests take turns: while others of at least its priority wait, one that has had so many tokens
    since it was admitted goes to the end of the queue, with a copy of its row, and goes on exactly there when its turn
    comes. At most four copies for each slot are held. None, the default: each request runs to its end.
    """

    turn_tokens: int | None = None

    def __init__(
        self,
        decoder: Decoder,
        slots: int | None = None,
        lanes: int = 1,
        *,
        max_waiting: int | None = None,
        max_waiting_tokens: int | None = None,
        blocks_per_step: int = 1,
    ) -> None:
        most = check_is(decoder, Decoder, "decoder").manifest.max_batch_size
        slots = most if slots is None else check_whole(slots, "slots", 1, most)
        lanes = check_whole(lanes, "lanes", 1)
        if not 1 <= lanes <= slots:
            raise InputError(f"{lanes} lanes were asked for on {slots} slots; expected 1 to {slots}")
        self.decoder, self.slots = decoder, slots
        unlimited = LARGEST_COUNT
        self.max_waiting = unlimited if max_waiting is None else check_whole(max_waiting, "max_waiting")
        tokens = unlimited if max_waiting_tokens is None else check_whole(max_waiting_tokens, "max_waiting_tokens")
        self.max_waiting_tokens, self.blocks_per_step = tokens, check_whole(blocks_per_step, "blocks_per_step", 1)
        self._lanes, self._shards = lanes, [*self._new_shards(lanes)]
        self._step_slots = slots_of_a_step(decoder, self._shards[0].state) if lanes == 1 else math.inf
        self._threads = ThreadPoolExecutor(lanes) if lanes > 1 else None
        self._clock: Callable[[], float] = time.monotonic
        self._book = Book()
        self._chosen = True  # tokens follow from all logits that are there
        self._timed = False  # whether any request had a deadline
        self._iterated: Iterated | None = None  # the prompt that is being iterated
        self._reader: DecodeState | None = None  # where prompts are iterated, one after the other

    def _new_shards(self, lanes: int) -> Iterator[Shard]:
        """Make shards without rows, which have all slots together."""
        return (Shard(self.decoder, (self.slots + i) // lanes) for i in range(lanes))

    @property
    def waiting(self) -> int:
        """Requests without a slot, those that are suspended not counted."""
        return len(self._book.waiting)

    @property
    def paused(self) -> int:
        """Requests that wait for their next turn."""
        return sum(request.row is not None for request in self._book.waiting)

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return len(self._book.made) + len(self._book.reading)

    @overload
    def submit(
        self,
        prompt: str | Sequence[int] | None,
        max_new_tokens: int = 64,
        *,
        n: Literal[1] = 1,
        **options: Unpack[RequestOptions],
    ) -> int: ...

    @overload
    def submit(
        self,
        prompt: str | Sequence[int] | None,
        max_new_tokens: int = 64,
        *,
        n: int,
        **options: Unpack[RequestOptions],
    ) -> int | list[int]: ...

    def submit(
        self,
        prompt: str | Sequence[int] | None,
        max_new_tokens: int = 64,
        *,
        state: DecodeState | None = None,
        n: int = 1,
        stop_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        policy: PrefillPolicy = "stepwise",
        tolerance: float | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        keep_state: bool = False,
        priority: int = 0,
        deadline_s: float | None = None,
        latent_cosine: bool = False,
        grammar: Grammar | None = None,
        **sampling: Unpack[SamplingArguments],
    ) -> int | list[int]:
        """Queue a request, options as in `Decoder.generate`; returns its number.

        Reading stepwise is exact, and also the cheapest in a batch, where one row more adds little to a step. With
        `policy="auto"` a long prompt has its first token sooner, and steps of the other requests come between blocks of
        it. Without a prompt the request continues a copy of `state`, of one sequence. With both, the prompt is the
        whole sequence: the copy is cut to what it shares with the prompt, and only the rest is read.

        `n` above 1 continues one prompt n times, reads it once, and returns a list of n numbers: each choice is a
        request of its own, with events of its own. Choice i draws from `seed` + i, or from fresh entropy without one.
        `max_new_tokens` 0 reads the prompt only: one event with the token `NO_TOKEN` (-1) and the finish reason
        `length`. `logprobs` is how many of the likeliest tokens each event lists. `prompt_logprobs` is how many the
        first event's `prompt_logprobs` list for each token of the prompt; the prompt is then read stepwise and as a
        whole. With `keep_state`, the last event has the state that holds every token. With `latent_cosine`, every event
        has one.

        Of the requests that wait, those of a higher `priority` are admitted first. A request that has not ended
        `deadline_s` seconds from now ends with the error `DeadlineExceeded`. Raises `Busy` at once where `max_waiting`
        is reached, InputError for options that cannot be used, and StateError for a prompt beyond the capacity.
        """
        vocabulary = (self.decoder.tokenizer, self.decoder.config.vocab_size)
        options = Generation.of(vocabulary, max_new_tokens, (stop_ids, stop_strings), logprobs, sampling, grammar)
        reading = PrefillRequest.of(policy, tolerance, self.decoder.config.memory, self.decoder.precision)
        n = check_whole(n, "n", 1, _MOST_CHOICES)
        check_flag(keep_state, "keep_state")
        check_flag(latent_cosine, "latent_cosine")
        priority = check_whole(priority, "priority", -(2**31))
        deadline = math.inf if deadline_s is None else self._clock() + check_number(deadline_s, "deadline_s", 0)
        self._timed = self._timed or deadline < math.inf
        if prompt_logprobs is None:
            source = self._prompt(prompt, state, reading, n)
        elif prompt is None or policy not in ("auto", "stepwise"):
            raise InputError(
                "prompt_logprobs needs a prompt and the policy stepwise or auto, since it is read stepwise"
            )
        else:
            source = self._prompt(prompt, None, replace(reading, policy="stepwise"), n)
            source.top = check_whole(prompt_logprobs, "prompt_logprobs", 0, vocabulary[1])
        first, requests = self._book.submitted, []
        for i in range(n):
            continuation = Continuation(options.choice(i), source.ids)
            requests.append(Request(first + i, source, continuation, keep_state, latent_cosine, priority, deadline))
        book = _queued(self._book._replace(submitted=first + n), *requests)
        return self._commit(book, first if n == 1 else list(range(first, first + n)))

    def cancel(self, request: int) -> None:
        """Cancel a request, waiting, running or suspended; no more events of it follow."""
        request = check_whole(request, "request")
        book = self._book.without({request})
        self._book = book._replace(events=tuple(event for event in book.events if event.request != request))

    def suspend(self, request: int) -> None:
        """Take a request from its slot, or from the queue, until `resume`; it goes on exactly where it was.

        Its row is copied, and makes room in the next step. A prompt that is iterated is begun anew. Events that it has
        had are still delivered. Does nothing for a request that has ended or is suspended.
        """
        number = check_whole(request, "request")
        self._wait()
        queued = (r for r in (*self._book.waiting, *self._book.reading) if r.number == number)
        found = self._copied(number) or next(queued, None)
        if found is not None:
            book = self._book.without({number})
            self._book = book._replace(suspended={**book.suspended, number: found})

    def _copied(self, number: int) -> Request | None:
        """Return a request that has a row, with a copy of the row; None for another one."""
        for shard in self._shards:
            for row, held in enumerate(shard.requests):
                if held.number == number in self._book.made:
                    held.row, held.made = shard.copy(row), self._book.made[number]
                    return held
        return None

    def resume(self, request: int) -> None:
        """Put a suspended request back into the queue. Does nothing for another one."""
        number = check_whole(request, "request")
        if (found := self._book.suspended.get(number)) is not None:
            self._book = _queued(self._book.without({number}), found)

    def largest(self) -> int | None:
        """Return the request with the most tokens among those that have a slot, else the first that waits."""
        sizes = [(len(request.prompt.ids), request.number) for request in self._book.reading]
        for shard in self._shards:
            sizes += [(n, r.number) for r, n in zip(shard.requests, shard.state.row_lengths, strict=True)]
        sizes = [(length, number) for length, number in sizes if number in self._live()]
        waiting = [request.number for request in self._book.waiting[:1]]
        return max(sizes)[1] if sizes else next(iter(waiting), None)

    def clear(self) -> None:
        """Forget all requests and let go of the memory of their rows."""
        self._wait()
        self._book, self._chosen = Book(submitted=self._book.submitted), True
        self._iterated = self._reader = None
        self._shards = []  # made again by the next step

    def run(self) -> Iterator[BatchEvent]:
        """Yield events of all requests as they come, until none is left but suspended ones; more may be submitted.

        Events that were not taken, because of an error or because the iterator was closed, come with the next call.
        """
        while True:
            while events := self._book.events:
                yield self._commit(self._book._replace(events=events[1:]), events[0])
            if not (self.waiting or self.running):
                return
            self._advance()

    def step(self) -> list[BatchEvent]:
        """Fill the slots, run one step of all rows, and choose a token for every row whose logits are there.

        Raises what a backend raises; then nothing is lost, and the next step goes on from there. The same holds for an
        interrupt.
        """
        self._advance()
        return self._commit(self._book._replace(events=()), list(self._book.events))

    def _advance(self) -> None:
        """Do everything of `step` but delivering events."""
        self._wait()
        if not self._shards:
            self._shards = [*self._new_shards(self._lanes)]
        if not self._chosen:  # the last step was interrupted
            self._choose()
        if self._timed:
            self._expire()
        if self.turn_tokens is not None and self._book.waiting:
            self._end_turns(self.turn_tokens)
        self._free()
        self._divide()
        while self._book.waiting and self.running < self.slots and (request := self._next()):
            self._admit(request)
        for _ in range(self.blocks_per_step):
            if self._book.reading:
                self._read_block(self._book.reading[0])
        for shard in self._shards:
            shard.soon = 0
        if self._book.reading:
            longest = max(len(request.prompt.ids) for request in self._book.reading)
            if (place := self._place(longest)) is not None:
                place.soon = longest
        self._chosen = False
        if self._threads is None:
            for shard in self._shards:
                shard.run(self._book.made)
        else:
            ticket, running = object(), []
            for shard in self._shards:
                shard.ticket = ticket
                running.append(self._threads.submit(shard.run_in_thread, self._book.made, ticket))
            wait(running)
            for done in running:
                done.result()
        self._choose()
        self._chosen = True

    def _choose(self) -> None:
        """Choose tokens for the rows whose logits are there, and evict those that have ended."""
        for shard in self._shards:
            self._book = shard.choose(shard.report(self._book))
            shard.free(self._book.made)

    def _free(self) -> None:
        """Evict the rows of requests that have ended, and those that an interrupted move has left in two shards."""
        for shard in self._shards:
            shard.free(self._book.made)
        if self._lanes == 1 and len(self._shards) > 1:
            self._shards[1].evict(self._shards[0])
            self._shards = [shard for shard in self._shards if shard.requests] or self._shards[:1]

    def _place(self, length: int) -> Shard | None:
        """Return the shard in which a row of so many tokens costs least; None: a second one that is not there yet."""
        if self._lanes > 1:
            return max(self._shards, key=lambda shard: shard.room)
        step, found = self._step_slots, list[tuple[float, int]]()
        for shard in self._shards:
            held = shard.state.row_lengths
            found.append((step_cost([*held, length], step) - step_cost(held, step), len(found)))
        cost, index = min(found)
        return None if len(found) == 1 and cost > step + length else self._shards[index]

    def _placed(self, length: int) -> Shard:
        """Return the same, and add the second shard where it is not there."""
        if (place := self._place(length)) is None:
            place = Shard(self.decoder, self.slots, length)
            self._shards = [*self._shards, place]
        return place

    def _divide(self) -> None:
        """Move one row to the other shard, where steps cost clearly less when all rows are where they belong."""
        held = [shard.state.row_lengths for shard in self._shards]
        if self._lanes > 1 or (len(held) == 1 and len(held[0]) * max(held[0], default=0) < self._step_slots):
            return
        rows = sorted(((n, at, row) for at, lengths in enumerate(held) for row, n in enumerate(lengths)), reverse=True)
        if len(rows) < 2:
            return
        cost, longer = divided([n for n, _, _ in rows], self._step_slots)
        if sum(step_cost(lengths, self._step_slots) for lengths in held) - cost < self._step_slots / 4:
            return
        # Whichever shard has more of the longer rows is to have all of them.
        ways = [
            [row for i, row in enumerate(rows) if row[1] != (first if i < longer else 1 - first)] for first in (0, 1)
        ]
        (_, at, row) = min(ways, key=lambda wrong: sum(n for n, _, _ in wrong))[0]
        if len(held) == 1:
            self._shards = [*self._shards, Shard(self.decoder, self.slots, held[at][row])]
        self._shards[1 - at].take(self._shards[at], row)

    def _live(self) -> set[int]:
        """Return the numbers of the requests that have a slot."""
        return self._book.made.keys() | {request.number for request in self._book.reading}

    def _next(self) -> Request | None:
        """Return the first request in the queue that need not wait for another one to read its prompt."""
        live = self._live()
        for request in self._book.waiting:
            prompt = request.prompt
            if request.row or prompt.done or prompt.reader not in live:
                return request
        return None

    def _admit(self, request: Request) -> None:
        """Give a slot to a request that waits; one whose logits are there chooses a token at once."""
        prompt = request.prompt
        if not (request.row or prompt.done):
            prompt.reader = request.number
            if prompt.policy(self.decoder) != "stepwise":
                book = self._book.without({request.number})
                self._book = book._replace(reading=(*book.reading, request))
                return
        start = request.row or prompt.done or prompt.start
        shard = self._placed(start.row_lengths[0] if start else 0)
        shard.admit(request)
        self._seat(request, shard)

    def _seat(self, request: Request, shard: Shard) -> None:
        """Note that a request has a row; what it was copied from goes, unless others need it."""
        self._book, request.row, prompt = self._book.seated(request), None, request.prompt
        if prompt.choices == 1 or not any(other.prompt is prompt for other in self._book.waiting):
            prompt.start, prompt.done, prompt.shared = None, None, 0
        self._book = shard.choose(self._book)
        shard.free(self._book.made)

    def _read_block(self, request: Request) -> None:
        """Read a block of a prompt that is iterated; after the last one the request has its row."""
        try:
            if not (self._iterated and self._iterated.request is request and self._iterated.goes_on):
                self._iterated = Iterated(request, *self._start_reading(request.prompt))
            source, reading = self._iterated.state, self._iterated.reading
            next(reading)
        except StopIteration as end:
            content: Content = end.value
            request.prompt.report = request.prompt.report or content.prefill  # not of a reading of what has been read
            source.commit(content, None)
            shard = self._placed(len(request.prompt.ids))
            shard.state.add(source, tag=request)
            self._seat(request, shard)
        except LRTDeployError as error:
            self._book = self._book.without({request.number}, BatchEvent(request.number, error=error))

    def _start_reading(self, prompt: Prompt) -> tuple[DecodeState, InBlocks[Content]]:
        """Begin to iterate a prompt, in a state that later prompts use again, or in the copy of its beginning."""
        if prompt.start is not None:
            return self.decoder.reading([prompt.ids], prompt.start, prompt.reading, True, _PIECE_TOKENS)
        if self._reader is None:
            reader = self.decoder.new_state(1)
            reader.add()
            self._reader = reader
        self._reader.rewind(0)
        return self.decoder.reading([prompt.ids], self._reader, prompt.reading, False, _PIECE_TOKENS)

    def _expire(self) -> None:
        """End the requests whose deadline has passed."""
        book, rows = self._book, [request for shard in self._shards for request in shard.requests]
        live = (*book.waiting, *book.reading, *book.suspended.values(), *(r for r in rows if r.number in book.made))
        now, words = self._clock(), "the request has not ended within its deadline; send it again, or allow more time"
        late = [request.number for request in live if request.deadline <= now]
        if late:
            ended = (BatchEvent(number, error=DeadlineExceeded(words)) for number in late)
            self._book = book.without(set(late), *ended)

    def _end_turns(self, tokens: int) -> None:
        """Send as many requests to the end of the queue as others wait for their slots, the longest turns first."""
        book = self._book
        rows = {r.number: r for shard in self._shards for r in shard.requests if r.number in book.made}
        turns = sorted(((book.made[number] - request.made, -number) for number, request in rows.items()), reverse=True)
        room = _COPIES_PER_SLOT * self.slots - self.paused
        for waiting in book.waiting[max(0, self.slots - self.running) :][: max(0, room)]:
            ended = (-n for made, n in turns if made >= tokens and rows[-n].priority <= waiting.priority)
            if (number := next(ended, None)) is None or (found := self._copied(number)) is None:
                return
            turns = [turn for turn in turns if turn[1] != -number]
            found.turns, found.behind = found.turns + 1, book.submitted
            self._book = _queued(self._book.without({number}), found)

    def _wait(self) -> None:
        """Wait for shards that an interrupt has left running, and cancel the steps that have not begun."""
        if self._threads is None:
            return
        for shard in self._shards:
            shard.ticket = None
        while any(shard.busy for shard in self._shards):
            time.sleep(_POLL_SECONDS)

    def _commit(self, book: Book, result: _Found) -> _Found:
        """Make `book` where the requests stand and return `result`, both or neither."""
        before = self._book
        try:
            self._book = book
            return result
        except BaseException:
            self._book = before
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

    def _check_room(self, requests: int, tokens: int) -> None:
        """Raise Busy where `requests` more of a prompt of `tokens` would be more than may wait."""
        waiting, free = self._book.waiting, self.slots - self.running
        if len(waiting) + requests <= free:
            return
        if len(waiting) + requests > self.max_waiting + free:
            found = f"{len(waiting)} requests wait for {free} free slots, and {self.max_waiting} more may"
            raise Busy(f"{found}; send the request again later")
        held = sum(len(prompt.ids) for prompt in {request.prompt for request in waiting})
        if held + tokens > self.max_waiting_tokens:
            found = f"prompts of {held} tokens wait, this one has {tokens}, and {self.max_waiting_tokens} may wait"
            raise Busy(f"{found}; send the request again later")

    def _prompt(
        self, prompt: str | Sequence[int] | None, state: DecodeState | None, reading: PrefillRequest, choices: int
    ) -> Prompt:
        """Return what requests start from, with a copy of what there is of it in a state."""
        if state is not None:
            if check_is(state, DecodeState, "state").batch != 1 or state.lengths[0] == 0:
                raise InputError(f"the state has {state.batch} sequence(s), expected one that holds tokens")
            self.decoder.fingerprint.check_same(state.owner.fingerprint)
        if prompt is None:
            if state is None:
                raise InputError("a request starts from a prompt, from a state, or from both; there is neither")
            self._check_room(choices, int(state.lengths[0]))
            return Prompt(state.tokens[0], reading, choices, done=state.fork(), report=state.prefill)
        ids = self.decoder.prompt_ids(prompt)
        if len(ids) > self.decoder.max_seq_len:
            raise StateError(f"the prompt has {len(ids)} tokens and a slot holds {self.decoder.max_seq_len}")
        self._check_room(choices, len(ids))
        found = Prompt(ids, reading, choices)
        if state is not None:
            rows = [np.array(ids)]
            (shared,) = shared_tokens(state.tokens, rows, state.read_within, reading)
            if shared == len(ids) == state.lengths[0]:
                found.done = state.fork()
                report = replace(state.prefill, passes=0.0, note=None)
                found.report = reused(report, [shared], rows, state.read_within)
            elif shared := min(shared, len(ids) - 1):  # the last token is read again, beside the other rows
                found.start, found.shared = state.fork(), shared
                found.start.rewind(shared)
        return found


def _queued(book: Book, *requests: Request) -> Book:
    """Return the book with requests in its queue."""
    waiting = (*book.waiting, *requests)
    if book.waiting and book.waiting[-1].order > requests[0].order:
        waiting = tuple(sorted(waiting, key=lambda request: request.order))
    return book._replace(waiting=waiting)
