"""The engine: one thread that alone touches the batch; other threads submit requests and get their tokens as messages.

A request is one or more prompts with one or more continuations each, which share a ticket. Its events are delivered
once, all together, or, for a stream, step by step. Deliveries of one step are handed over together, because waking
another thread costs more than a token of a small model. A prompt that continues an earlier one starts from its state
(`prefix_states`). An error ends the request that it belongs to. A step in which the backend fails is done again; when
it goes on failing, requests end with the error, all that they hold is freed, and the engine takes no more until a
trial step succeeds (`Engine.trouble`). Knows no HTTP and no text formats.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lrt_deploy.errors import BackendError, Busy, InputError, LRTDeployError
from lrt_deploy.runtime.batch import BatchDecoder
from lrt_deploy.runtime.decoder import Decoder
from lrt_deploy.runtime.generation import NO_TOKEN, Event
from lrt_deploy.runtime.prefill import PrefillRequest
from lrt_deploy.runtime.prompt_cache import FEWEST_TOKENS
from lrt_deploy.runtime.shard import BatchEvent
from lrt_deploy.runtime.state import DecodeState

from .metrics import EngineMetrics
from .prefix_states import PrefixStates, StateFolder

RETRIES = 3  # of a step in which the backend failed
_RETRY_SECONDS = 0.05
TRIAL_SECONDS = (0.25, 30.0)  # from the failure to the first trial step, and at most between two; each wait is doubled


class Draining(Busy):
    """The engine takes no more requests, because its process is about to end."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down; send the request to another one, or again later")


class RequestError(BackendError):
    """One request could not be run, for lack of memory as a rule; the others and the engine go on."""


class Prompt(NamedTuple):
    """The token ids of a prompt, and how many tokens each of its continuations may have."""

    tokens: list[int]
    max_new_tokens: int


@dataclass(frozen=True)
class EngineRequest:
    """Prompts with `count` continuations each; `arguments` are those of `BatchDecoder.submit` beside the prompt."""

    prompts: Sequence[Prompt]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    count: int = 1
    stream: bool = False  # deliver the events of each step, not all at the end

    @property
    def size(self) -> int:
        """Continuations of all prompts together; number `prompt * count + i` is continuation i of a prompt."""
        return len(self.prompts) * self.count


class Delivery(NamedTuple):
    """Events of a request, each with the number of its continuation; `last` says that nothing follows."""

    events: Sequence[tuple[int, Event]]
    last: bool
    error: LRTDeployError | None = None


Deliver = Callable[[Delivery], None]
Post = Callable[[Sequence[tuple[Deliver, Delivery]]], None]


class Ticket:
    """A request that was submitted; only the engine changes it."""

    def __init__(self, request: EngineRequest, deliver: Deliver) -> None:
        self.request, self.deliver = request, deliver
        self.submitted_at = time.monotonic()
        self.events: list[tuple[int, Event]] = []  # not delivered yet
        self.numbers: list[int] = []  # in the batch
        self.open = request.size  # continuations that have not ended
        self.starts: dict[int, DecodeState] = {}  # by the number of the prompt whose beginning it holds
        self.begun = self.ended = False


@dataclass(eq=False)
class _Continuation:
    """What a request of the batch belongs to."""

    ticket: Ticket
    index: int
    made: int = 0  # tokens

    @property
    def prompt(self) -> Prompt:
        """The prompt that it continues."""
        return self.ticket.request.prompts[self.index // self.ticket.request.count]


def deliver_directly(deliveries: Sequence[tuple[Deliver, Delivery]]) -> None:
    """Deliver in the engine's own thread; the receivers must not block and must not raise."""
    for deliver, delivery in deliveries:
        deliver(delivery)


class Engine:
    """Runs requests on the slots of one decoder, at most `slots + max_waiting` continuations at a time.

    `states` and `folder` keep what was read for later requests. `post` is called in the engine's thread with the
    deliveries of each step; a server hands them to its event loop.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: int | None = None,
        max_waiting: int = 256,
        states: PrefixStates | None = None,
        folder: StateFolder | None = None,
        post: Post = deliver_directly,
    ) -> None:
        self.batch = BatchDecoder(decoder, slots)
        self.decoder, self.slots, self.max_waiting = decoder, self.batch.slots, max_waiting
        self.metrics, self.post = EngineMetrics(), post
        self.states, self.folder = PrefixStates(0) if states is None else states, folder
        self.draining = False
        self.trouble: str | None = None  # why the engine takes no requests: the backend fails
        self._messages: queue.SimpleQueue[tuple[str, Ticket | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of `_taken` and `_idle`
        self._taken = 0  # continuations that were submitted and have not ended
        self._idle = threading.Event()
        self._idle.set()
        self._open: dict[Ticket, None] = {}  # requests that have not ended
        self._running: dict[int, _Continuation] = {}  # by the number in the batch
        self._streams: dict[Ticket, None] = {}  # with events of this step
        self._failures = self._ended = 0  # steps that failed one after another, and requests that ended for memory
        self._trial_at, self._trial_wait = 0.0, 0.0  # when the next trial step is due, and the seconds after it
        self._outbox: list[tuple[Deliver, Delivery]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # From any thread

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return not self.draining and self.trouble is None and self._thread.is_alive()

    @property
    def outstanding(self) -> int:
        """Continuations that wait or run."""
        return self._taken

    def submit(self, request: EngineRequest, deliver: Deliver) -> Ticket:
        """Queue a request; `deliver` is called through `post` with all that becomes of it.

        Raises Busy at once where there is no room for it or the engine is draining, InputError where there never will
        be, and BackendError while the backend fails. What else is wrong with a request is delivered as an error.
        """
        most = self.slots + self.max_waiting
        if request.size > most:
            raise InputError(f"{request.size} continuations were asked for at once; this server takes at most {most}")
        with self._lock:
            if self.trouble is not None:
                raise BackendError(self.trouble)
            if self.draining:
                raise Draining
            if self._taken + request.size > most:
                raise Busy(f"{self._taken} continuations run or wait, of at most {most}; send the request again later")
            self._taken += request.size
            self._idle.clear()
        ticket = Ticket(request, deliver)
        self._messages.put(("submit", ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request; nothing more of it is delivered after the current step."""
        self._messages.put(("cancel", ticket))

    def drain(self) -> None:
        """Take no more requests; those that were taken go on. See `wait_until_idle`."""
        with self._lock:
            self.draining = True

    def wait_until_idle(self, seconds: float | None = None) -> bool:
        """Wait until no request is left, at most so long; return whether that came."""
        return self._idle.wait(seconds)

    def end_all(self) -> None:
        """End all requests with an error: their time is over."""
        self._messages.put(("end", None))

    def stop(self) -> None:
        """End the thread after its current step; requests that run are not answered."""
        if self._thread.is_alive():
            self._messages.put(("stop", None))
            self._thread.join()
        self.batch.close()
        if self.folder is not None:
            self.folder.close()

    def stats(self) -> dict[str, tuple[str, float]]:
        """Return what is the case now: name -> description and value."""
        running = self.batch.running
        return {
            "lrt_slots": ("Continuations that can run at a time.", self.slots),
            "lrt_running": ("Continuations that have a slot.", running),
            "lrt_waiting": ("Continuations that wait for a slot.", max(0, self._taken - running)),
            "lrt_paused": ("Continuations that have begun and wait for their next turn.", self.batch.paused),
            "lrt_ready": ("Whether requests are taken.", int(self.ready)),
            "lrt_kept_states": ("States of earlier requests in memory.", len(self.states)),
            "lrt_kept_state_bytes": ("Their bytes.", self.states.num_bytes),
            "lrt_state_folder_problems": ("Reads and writes of the state folder that failed.", self._problems()),
        }

    def _problems(self) -> int:
        return self.folder.problems if self.folder else 0

    # In the engine's thread

    def _run(self) -> None:
        while True:
            if not (self._running and self._messages.empty()) and not self._take_messages():
                return
            try:
                if self.trouble is not None:
                    self._try_again()
                elif self._running:
                    self._step()
            except Exception as error:
                self._retry(error)

    def _step(self) -> None:
        """Run a step, and deliver what has come of it."""
        events = self.batch.step()
        self._failures = self._ended = 0
        try:
            self._route(events)
            self._flush()
        except Exception as error:  # memory, or a fault of ours: no answer may lack a token
            self._give_up(f"events of a step could not be delivered: {_shown(error)}")
            self._flush()

    def _take_messages(self) -> bool:
        """Do what other threads have asked for; wait for something while there is nothing to run. False: stop."""
        if not self._running:
            self.metrics.idle()
        while True:
            try:
                kind, ticket = self._messages.get(not self._running, self._patience())
            except queue.Empty:
                return True
            if kind == "stop":
                return False
            try:
                self._do(kind, ticket)
                self._flush()
            except Exception as error:  # memory, or a fault of ours: it must not end the thread
                self.states.clear()
                if ticket is not None:
                    self._fail(ticket, RequestError(f"the request could not be taken: {_shown(error)}"))
                    self._flush()

    def _patience(self) -> float | None:
        """Return how long to wait for a message while nothing runs; None: until one comes."""
        return None if self.trouble is None else max(0.0, self._trial_at - time.monotonic())

    def _do(self, kind: str, ticket: Ticket | None) -> None:
        """Do one thing that another thread has asked for."""
        if ticket is None:
            self._fail_all(Draining())
        elif kind == "cancel":
            self._cancel(ticket)
        elif self.trouble is not None:  # it was sent before its sender could know
            self._fail(ticket, BackendError(self.trouble))
        elif kind == "submit":
            self._open[ticket] = None
            self._find_states(ticket)
        else:
            self._start(ticket)

    def _find_states(self, ticket: Ticket) -> None:
        """Look for states that hold the beginnings of a request's prompts, then start it."""
        request = ticket.request
        if "prompt_logprobs" in request.arguments or not (self.states.max_bytes or self.folder):
            self._start(ticket)
            return
        try:
            reading = self._reading(request)
        except LRTDeployError as error:
            self._fail(ticket, error)
            return
        held = {}
        for at, prompt in enumerate(request.prompts):
            state, held[at] = self.states.find(prompt.tokens, reading)
            if state is not None:
                ticket.starts[at] = state
        if self.folder is None or all(len(prompt.tokens) < FEWEST_TOKENS for prompt in request.prompts):
            self._start(ticket)
            return

        def found(states: Mapping[int, DecodeState]) -> None:
            ticket.starts |= states
            self._messages.put(("start", ticket))

        wanted = {at: (prompt.tokens, held[at]) for at, prompt in enumerate(request.prompts)}
        self.folder.load(self.decoder, wanted, reading, found)

    def _reading(self, request: EngineRequest) -> PrefillRequest:
        """Return how the prompts of a request are read."""
        policy, tolerance = request.arguments.get("policy", "stepwise"), request.arguments.get("tolerance")
        return PrefillRequest.of(policy, tolerance, self.decoder.config.memory, self.decoder.precision)

    def _start(self, ticket: Ticket) -> None:
        """Give the continuations of a request to the batch; what is wrong with it ends it."""
        request, keep = ticket.request, self.states.max_bytes > 0 or self.folder is not None
        if ticket.ended:  # cancelled while the folder was read
            return
        try:
            for at, prompt in enumerate(request.prompts):
                state = ticket.starts.pop(at, None)
                numbers = self.batch.submit(
                    prompt.tokens,
                    prompt.max_new_tokens,
                    state=state,
                    n=request.count,
                    keep_state=keep,
                    **request.arguments,
                )
                for i, number in enumerate([numbers] if isinstance(numbers, int) else numbers):
                    ticket.numbers.append(number)
                    self._running[number] = _Continuation(ticket, at * request.count + i)
        except LRTDeployError as error:
            self._fail(ticket, error)

    def _route(self, events: Sequence[BatchEvent]) -> None:
        """Give each event to its ticket."""
        now, made = time.monotonic(), 0
        for found in events:
            continuation = self._running.get(found.request)
            if continuation is None:  # cancelled with its ticket
                continue
            ticket, event = continuation.ticket, found.event
            if event is None:
                assert found.error is not None
                self._fail(ticket, found.error)
                continue
            if continuation.made == 0:
                self._count_prompt(continuation, event, now)
            if event.token != NO_TOKEN:
                continuation.made += 1
                made += 1
            if event.state is not None:
                self._keep(event.state, continuation)
                event = replace(event, state=None)
            ticket.events.append((continuation.index, event))
            if ticket.request.stream:
                self._streams[ticket] = None
            if event.finish_reason is not None:
                del self._running[found.request]
                ticket.open -= 1
                if ticket.open == 0:
                    self._end(ticket)
        self.metrics.step(now, made)

    def _count_prompt(self, continuation: _Continuation, event: Event, now: float) -> None:
        """Count the time to the first token of a request, and each prompt once."""
        ticket = continuation.ticket
        if not ticket.begun:
            ticket.begun = True
            self.metrics.first_token(now - ticket.submitted_at)
        if continuation.index % ticket.request.count == 0:
            self.metrics.prompt(len(continuation.prompt.tokens), event)

    def _keep(self, state: DecodeState, continuation: _Continuation) -> None:
        """Keep the state of a continuation that has ended, for prompts that go on from there.

        Its last token has not been run, and would be each time that the state is copied: it is left out.
        """
        try:
            state.rewind(len(continuation.prompt.tokens) + max(0, continuation.made - 1))
        except MemoryError:
            self.states.clear()
            return
        kept = self.states.keep(state) or self.states.max_bytes == 0
        if kept and self.folder is not None:
            self.folder.store(self.decoder, state, self._reading(continuation.ticket.request))

    def _end(self, ticket: Ticket, error: LRTDeployError | None = None) -> None:
        """Deliver the rest of a request."""
        self._streams.pop(ticket, None)
        self._outbox.append((ticket.deliver, Delivery(ticket.events, True, error)))
        self._release(ticket)
        self.metrics.ended("error" if error else "ok")

    def _fail(self, ticket: Ticket, error: LRTDeployError) -> None:
        if not ticket.ended:
            self._forget(ticket)
            self._end(ticket, error)

    def _cancel(self, ticket: Ticket) -> None:
        if not ticket.ended:
            self._forget(ticket)
            self._streams.pop(ticket, None)
            self._release(ticket)
            self.metrics.ended("cancelled")

    def _forget(self, ticket: Ticket) -> None:
        """Take the continuations of a request that have not ended out of the batch."""
        for number in ticket.numbers:
            if self._running.pop(number, None) is not None:
                self.batch.cancel(number)

    def _release(self, ticket: Ticket) -> None:
        """Make room for other requests."""
        ticket.ended = True
        self._open.pop(ticket, None)
        with self._lock:
            self._taken -= ticket.request.size
            if self._taken == 0:
                self._idle.set()

    def _flush(self) -> None:
        """Hand over what has come together for other threads."""
        for ticket in self._streams:
            self._outbox.append((ticket.deliver, Delivery(ticket.events, False)))
            ticket.events = []
        self._streams.clear()
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self.post(outbox)

    def _retry(self, error: Exception) -> None:
        """Let a step that failed be done again, since the batch has lost nothing; after `RETRIES` times, end requests.

        Where memory is short, kept states go first, then, one after another, the requests that hold the most.
        """
        self._failures += 1
        self.metrics.backend_errors += 1
        short = _is_shortage(error)
        if short:
            self.states.clear()
        if self._failures <= RETRIES:
            time.sleep(_RETRY_SECONDS)
            return
        text = f"a decode step failed {self._failures} times: {_shown(error)}"
        largest = self.batch.largest() if short and self._ended < self.slots else None
        if largest is None or (found := self._running.get(largest)) is None:
            self._give_up(text)
        else:
            self._ended += 1
            self._fail(found.ticket, RequestError(f"{text}; of the requests that run, this one held the most memory"))
        self._flush()

    def _give_up(self, text: str) -> None:
        """End all requests, let go of what they hold, and take no more until a trial step succeeds."""
        with self._lock:
            self.trouble = text
        self._fail_all(BackendError(text))
        self.states.clear()
        self.batch.clear()
        self._failures = self._ended = 0
        self._trial_wait = TRIAL_SECONDS[0]
        self._trial_at = time.monotonic() + self._trial_wait

    def _try_again(self) -> None:
        """Run a step of one token if it is time to; if that computes, requests are taken again."""
        if time.monotonic() < self._trial_at:
            return
        try:
            self.batch.submit([0], 1, stop_ids=[])
            for _ in self.batch.run():
                pass
        except Exception as error:
            self.metrics.backend_errors += 1
            self.batch.clear()
            self._trial_wait = min(2 * self._trial_wait, TRIAL_SECONDS[1])
            self._trial_at = time.monotonic() + self._trial_wait
            with self._lock:
                self.trouble = f"a trial step failed: {_shown(error)}"
            return
        with self._lock:
            self.trouble = None

    def _fail_all(self, error: LRTDeployError) -> None:
        for ticket in [*self._open]:
            self._fail(ticket, error)


def _shown(error: Exception) -> str:
    """Return the words of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _is_shortage(error: Exception) -> bool:
    """Whether memory was short; backends say so only in words."""
    words = ("alloc", "out of memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, BackendError) and any(word in str(error).lower() for word in words)
    )
