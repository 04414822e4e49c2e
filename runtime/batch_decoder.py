"""Continuous batching: a fixed number of slots kept full from a queue, each request streamed as if it ran alone.

A prompt that is read stepwise joins the batch at once and costs no step of its own; one that is iterated is read by
itself (many tokens a call already) and then joins. A row that ends makes room before the next step. There is no
padding: rows have their own lengths, latents, stop rules and random numbers, and what a request gives does not depend
on its neighbours beyond the rounding of float32 sums. One thread uses one BatchDecoder, which may use several: `lanes`
divides the slots into batches that are stepped side by side, which small models on several cores gain from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import TYPE_CHECKING, Self

from lrt_deploy.errors import InputError, StateError
from lrt_deploy.interface import PrefillPolicy
from lrt_deploy.prompts import check_prompts

from .batch_lane import BatchEvent, Lane, Request
from .generation import Generation
from .prefill import PrefillRequest
from .state import DecodeState

if TYPE_CHECKING:
    from .decoder import Decoder


class BatchDecoder:
    """Runs requests on `slots` rows of one decoder (default: as many as the bundle allows).

    `submit` as often as wanted, also between steps; `run` until all is done, or `step` in a loop of your own. With
    several lanes use it in a `with` block, or call `close`.
    """

    def __init__(self, decoder: Decoder, slots: int | None = None, lanes: int = 1) -> None:
        slots = decoder.manifest.max_batch_size if slots is None else slots
        if not 1 <= lanes <= slots:
            raise InputError(f"{lanes} lanes were asked for on {slots} slots; expected 1 to {slots}")
        self.decoder, self.slots = decoder, slots
        self._lanes = [Lane(decoder, (slots + i) // lanes) for i in range(lanes)]
        self._threads = ThreadPoolExecutor(lanes) if lanes > 1 else None
        self._queue: deque[Request] = deque()
        self._submitted = 0

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return sum(len(lane.requests) for lane in self._lanes)

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
        options = Generation.of(self.decoder.tokenizer, max_new_tokens, stop_ids, stop_strings, sampling)
        reading = PrefillRequest.of(policy, tolerance, self.decoder.config.memory, self.decoder.precision)
        if (prompt is None) == (state is None):
            raise InputError("a request starts from a prompt or from a state, and needs exactly one of the two")
        request = Request(self._submitted, options, reading)
        if state is not None:
            request.state, request.prefill = self._start(state), state.prefill
        elif prompt is not None:
            request.unread = self._prompt(prompt)
        self._submitted += 1
        self._queue.append(request)
        return request.number

    def cancel(self, request: int) -> None:
        """Forget a request, waiting or running; nothing more is heard of it."""
        self._queue = deque(waiting for waiting in self._queue if waiting.number != request)
        for lane in self._lanes:
            for row in [row for row, running in enumerate(lane.requests) if running.number == request]:
                lane.leave(row)

    def run(self) -> Iterator[BatchEvent]:
        """Events of all requests as they come, until none is left; more may be submitted meanwhile."""
        while self._queue or self.running:
            yield from self.step()

    def step(self) -> list[BatchEvent]:
        """Choose a token for every row whose logits are there, fill the slots, and feed all rows.

        Raises what a backend raises; then nothing is lost, and the next step goes on from there.
        """
        for lane in self._lanes:
            lane.choose()
        while self._queue and (lane := max(self._lanes, key=lambda lane: lane.room)).room:
            lane.join(self._queue.popleft())
        if self._threads is None:
            self._lanes[0].feed()
        else:
            feeding = [self._threads.submit(lane.feed) for lane in self._lanes]
            wait(feeding)
            for fed in feeding:
                fed.result()
        return [event for lane in self._lanes for event in lane.take_events()]

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

    def _prompt(self, prompt: str | Sequence[int]) -> deque[int]:
        ids = self.decoder.prompt_ids(prompt)
        check_prompts([ids], self.decoder.config.vocab_size)
        if len(ids) > self.decoder.max_seq_len:
            raise StateError(f"the prompt has {len(ids)} tokens and a slot holds {self.decoder.max_seq_len}")
        return deque(ids)
