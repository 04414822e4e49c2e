"""Several sequences on one loop. Each keeps its place until it leaves; no other row moves when one joins or leaves.

A sequence joins as a state of its own that holds a token which was chosen and not run. The state goes on holding what
was handed out; where it is used otherwise, or is told to, it leaves: its cache entries and latents are copied back, and
what the loop has run beyond is dropped.
"""

from __future__ import annotations

from lrt_deploy.errors import BackendError, InputError
from lrt_deploy.runtime.backends.device import DeviceBackend, DeviceBuffers
from lrt_deploy.runtime.generation import Continuation
from lrt_deploy.runtime.state import DecodeState
from lrt_deploy.types import FloatArray

from .ahead import Chosen, chosen_of, pool_of, seat_of
from .loop import AHEAD, DeviceLoop


class Member:
    """One sequence on a loop; see `DecodeState.ahead`."""

    overshoot = 0  # the loop writes to caches of its own

    def __init__(self, rows: LoopRows, row: int, state: DecodeState, continuation: Continuation) -> None:
        self.row, self.state, self.continuation = row, state, continuation
        self.since = 0  # the first step that is its own
        self._rows = rows

    def fetch(self, row: int, start: int, stop: int) -> FloatArray:
        """Copy the row's cache entries into the state's caches, and return the latents of these tokens."""
        self.state.buffers.copy_row(row, self._rows.buffers, self.row, stop)
        return self._rows.loop.latents(self.row, start, stop)

    def release(self) -> None:
        """Leave."""
        self._rows.members[self.row] = None
        self._rows.loop.leave(self.row)


class LoopRows:
    """`slots` places for sequences of one backend; `logits`: alternatives of tokens can be asked for."""

    def __init__(self, backend: DeviceBackend, slots: int, logits: bool = False) -> None:
        pool = pool_of(backend)
        if pool is None:
            raise BackendError(f"{backend.name} was opened with device_loop=False; no tokens are chosen on the device")
        self.loop: DeviceLoop = pool.take(slots)
        self.buffers: DeviceBuffers = backend.allocate(slots)
        self.members: list[Member | None] = [None] * slots
        self.loop.attach(self.buffers.memory, logits)

    def join(self, state: DecodeState, continuation: Continuation) -> Member:
        """Take in a state of one sequence that holds a token it has not run; InputError where no place is free."""
        token, source = state.unfed_token(), state.buffers
        if token is None or None not in self.members or continuation.options.grammar is not None:
            raise InputError("a sequence joins with a token that was not run, without a grammar, where a place is free")
        assert isinstance(source, DeviceBuffers)
        member = Member(self, self.members.index(None), state, continuation)
        seat = seat_of(state, continuation, token)
        self.buffers.copy_row(member.row, source, 0, seat.length)
        state.ahead = self.members[member.row] = member
        self.loop.seat(member.row, seat)
        member.since = self.loop.started
        return member

    def step(self) -> list[tuple[Member, Chosen | None]]:
        """Return the next token of each member that has one by now; None where the host has to choose it.

        A token counts when the state follows it, as `Continuation.emit` does.
        """
        while self.loop.waiting <= AHEAD:
            self.loop.enqueue()
        taken = self.loop.take()
        present = [member for member in self.members if member is not None and member.since <= taken.number]
        return [(m, chosen_of(taken, m.row, m.state, m.continuation.options)) for m in present]
