"""A state of one sequence that `generate` continues on the GPU: tokens come from a loop that runs ahead of it.

The state counts only tokens that were handed out. Its latents stay on the device until the state is used otherwise;
then it lands: the loop ends, what it ran beyond is dropped, and the state is what it would be without it.
"""

from __future__ import annotations

from typing import NamedTuple

from lrt_deploy.runtime.backends.base import Backend
from lrt_deploy.runtime.backends.device import DeviceBackend, DeviceBuffers
from lrt_deploy.runtime.generation import Continuation, Generation
from lrt_deploy.runtime.sampling import TokenLogprob, log_normalizers, top_logprobs
from lrt_deploy.runtime.state import DecodeState
from lrt_deploy.types import FloatArray

from .kernels import Kernels
from .loop import AHEAD, DeviceLoop, DeviceTables, Seat, Taken
from .selection import CHOSEN, RowRules


class Chosen(NamedTuple):
    """A token that the loop has chosen, and what an event tells of it."""

    token: int
    logprob: float
    top: tuple[TokenLogprob, ...]
    full: bool  # whether the state has no room for it


def chosen_of(taken: Taken, row: int, state: DecodeState, options: Generation) -> Chosen | None:
    """Return the token that a step has chosen for a row, which continues a state; None where it has not."""
    record = taken.records[row]
    token, length = int(record["token"]), int(record["length"])
    if record["status"] != CHOSEN or length != state.row_lengths[0]:
        return None
    full = length == state.capacity
    if taken.logits is None or not options.logprobs:
        return Chosen(token, float(record["logprob"]), (), full)
    logits = taken.logits[row]
    normalizer = log_normalizers(logits[None])[0]
    top = top_logprobs(logits[: options.choices], normalizer, options.logprobs)
    return Chosen(token, logits.item(token) - normalizer, top, full)


def seat_of(state: DecodeState, continuation: Continuation, token: int) -> Seat:
    """Return how a row begins that continues a state of one sequence, whose last token was not run."""
    options, buffers, length = continuation.options, state.buffers, state.row_lengths[0] - 1
    assert isinstance(buffers, DeviceBuffers)
    choices = options.choices or state.owner.config.vocab_size
    rules = RowRules(options.sampler, choices, continuation.made, continuation.history)
    limit = min(state.capacity, length + options.max_new_tokens - continuation.made)
    return Seat(token, length, limit, buffers.current_latent, rules)


class LoopPool:
    """The kernels and tables of a backend, and its loops that are free."""

    def __init__(self, backend: DeviceBackend) -> None:
        self.setup = backend.setup
        with self.setup.device.lock:
            self.setup.device.begin()
            self._kernels, self._tables = Kernels(self.setup.device), DeviceTables(self.setup)
        self._free: list[DeviceLoop] = []

    def take(self, rows: int) -> DeviceLoop:
        """Return a loop for so many rows."""
        for index, loop in enumerate(self._free):
            if loop.rows == rows:
                return self._free.pop(index)
        with self.setup.device.lock:
            self.setup.device.begin()
            return DeviceLoop(self.setup, self._kernels, self._tables, rows)

    def give_back(self, loop: DeviceLoop) -> None:
        """Keep a loop for the next one who asks."""
        self._free.append(loop)


def pool_of(backend: Backend) -> LoopPool | None:
    """Return the loops of a backend; None for one that has none."""
    if not isinstance(backend, DeviceBackend) or not backend.loops:
        return None
    if backend.loop_pool is None:
        backend.loop_pool = LoopPool(backend)
    pool: LoopPool = backend.loop_pool
    return pool


class Ahead:
    """A loop that continues a state; see `DecodeState.ahead`."""

    overshoot = AHEAD + 1  # slots beyond the state's length that may have been written

    def __init__(self, pool: LoopPool, continuation: Continuation) -> None:
        self._pool, self.continuation = pool, continuation
        self._loop = pool.take(1)
        options = continuation.options
        self._left = options.max_new_tokens - continuation.made  # tokens that may still be chosen
        self._depth = 0 if options.grammar is not None else AHEAD  # a mask depends on the token before
        self._sound = True

    def start(self, state: DecodeState, token: int) -> None:
        """Begin with a token that the state holds and has not run."""
        seat, buffers = seat_of(state, self.continuation, token), state.buffers
        assert isinstance(buffers, DeviceBuffers)
        self._sound = False
        self._loop.attach(buffers.memory, logits=self.continuation.options.logprobs > 0)
        self._loop.seat(0, seat)
        self._sound = True

    def next(self, state: DecodeState) -> Chosen | None:
        """Return the token after the one that the state holds and has not run; None where the host has to choose it."""
        options = self.continuation.options
        self._sound = False
        if options.grammar is not None:
            self._loop.allow(0, self.continuation.allowed())
        while self._loop.waiting < min(self._left, self._depth + 1):
            self._loop.enqueue()
        taken = self._loop.take()
        self._sound = True
        self._left -= 1
        return chosen_of(taken, 0, state, options)

    def fetch(self, row: int, start: int, stop: int) -> FloatArray:
        """Return latents that are still on the device; the caches are the state's own."""
        return self._loop.latents(row, start, stop)

    def release(self) -> None:
        """End: another state may have the loop."""
        if self._sound:
            self._pool.give_back(self._loop)


def start_ahead(backend: Backend, state: DecodeState, continuation: Continuation) -> Ahead | None:
    """Start a loop for a state that holds a token which it has not run; None where there is none."""
    pool = pool_of(backend)
    token = state.unfed_token() if pool is not None else None
    if pool is None or token is None:
        return None
    state.ahead = ahead = Ahead(pool, continuation)
    ahead.start(state, token)
    return ahead
