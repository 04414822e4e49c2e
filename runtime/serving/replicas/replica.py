"""One replica: the decoder, the engine and the API of `lrt-deploy serve`, without a socket.

Requests come as values and answers leave as a stream of parts, so that whatever calls a replica (Ray, a test) needs no
HTTP in between. Origins, keys and the log of requests are the front's. A replica is healthy while it computes tokens.
Knows no Ray and no other replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import lrt_deploy
from lrt_deploy.errors import BackendError, Busy, StateError
from lrt_deploy.runtime.serving.app import App, AppOptions, Log
from lrt_deploy.runtime.serving.engine import Delivery, Engine, EngineRequest, Prompt
from lrt_deploy.runtime.serving.openai_api import Api, ApiOptions
from lrt_deploy.runtime.serving.prefix_states import DEFAULT_BYTES, PrefixStates, StateFolder
from lrt_deploy.types import PrefillPolicy

Headers = list[tuple[bytes, bytes]]
_MOST_AHEAD = 64 * 2**10  # bytes of an answer that its caller has not taken
_LOOK_SECONDS = 0.05  # between two looks at whether the engine makes progress
_FIRST = 2**31 - 1  # the priority of a token that shows health


@dataclass(frozen=True)
class ReplicaOptions:
    """What a replica runs, in types that JSON has. Those without a default here are as in `lrt-deploy serve`."""

    bundle: str
    model: str
    opening: Mapping[str, Any] = field(default_factory=dict)  # arguments of `open_decoder` beside the bundle
    prefill: str = "auto"
    tolerance: float | None = None
    implicit_bos: bool = False
    max_tokens_limit: int | None = None
    slots: int | None = None
    max_waiting: int = 256
    turn_tokens: int | None = 256
    state_bytes: int = DEFAULT_BYTES
    state_dir: str | None = None


class Request(NamedTuple):
    """An HTTP request whose body has come."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes


class Part(NamedTuple):
    """A part of an answer: the first has the head, the last what a log says of the request."""

    body: bytes
    head: tuple[int, Headers] | None = None
    entry: dict[str, Any] | None = None


class Replica:
    """A decoder behind the routes of `App`. `start` and `close` belong to the event loop that calls `answer`."""

    def __init__(self, options: ReplicaOptions, say: Callable[[str], None] | None = None) -> None:
        self.log = Log()
        say = say or self.log.put
        self._stack = contextlib.ExitStack()
        decoder = self._stack.enter_context(lrt_deploy.open_decoder(options.bundle, **options.opening))
        policy = cast(PrefillPolicy, options.prefill)
        settings = ApiOptions(options.model, policy, options.tolerance, options.implicit_bos, options.max_tokens_limit)
        api = Api(decoder, settings)
        states, folder = PrefixStates(options.state_bytes), _folder(options.state_dir, say)
        self.engine = Engine(decoder, options.slots, options.max_waiting, states, folder)
        self.engine.batch.turn_tokens = options.turn_tokens or None
        self.app = App(self.engine, api, AppOptions(log=self.log))
        self.app.abort = self._abort
        self._open: dict[int, _Exchange] = {}  # by the number that stands for a client's address
        self._numbers = itertools.count()
        self._seen = 0  # tokens at the last look

    async def start(self) -> None:
        """Start the engine."""
        await self.app.start()

    async def close(self) -> None:
        """End what runs with an error, write the states that wait for that, and close the decoder."""
        self.app.drain()
        self.app.end_all()
        await asyncio.to_thread(self.engine.stop)
        self._stack.close()

    async def answer(self, request: Request) -> AsyncGenerator[Part, None]:
        """Yield the parts of an answer as they come; closing the generator cancels the request."""
        number = next(self._numbers)
        entry: dict[str, Any] = {}
        exchange = self._open[number] = _Exchange(request.body)
        scope = _scope(request, number) | {"entry": entry}
        task = asyncio.create_task(self._run(scope, exchange))
        task.add_done_callback(lambda task: exchange.wake.set())
        try:
            while not task.done():
                await exchange.wake.wait()
                body, head = exchange.take()
                if task.done():
                    break
                if body or head:
                    yield Part(body, head)
            else:
                body, head = exchange.take()
            task.result()
            yield Part(body, head, entry)
        finally:
            del self._open[number]
            exchange.leave()
            if not task.done():
                await asyncio.wait({task})

    async def _run(self, scope: dict[str, Any], exchange: _Exchange) -> None:
        await self.app.inner(scope, exchange.receive, exchange.send)

    def metrics(self) -> str:
        """Return the text of `GET /metrics`."""
        return self.app.metrics_text()

    async def check(self) -> None:
        """Return when a token was computed since the last check, one of our own if no request needs any.

        Raises BackendError while the backend fails. Waits for as long as nothing is computed: the caller has a limit.
        """
        if not self._progress():
            await self._compute()

    async def _compute(self) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Delivery] = loop.create_future()
        ticket = None

        def deliver(found: Delivery) -> None:
            if not done.done():
                done.set_result(found)

        request = EngineRequest([Prompt([0], 1)], {"stop_ids": [], "priority": _FIRST})
        with contextlib.suppress(Busy):  # it is full: its own requests show whether it computes
            ticket = self.engine.submit(request, deliver)
        try:
            while not done.done() and not self._progress():
                if self.engine.trouble is not None:
                    raise BackendError(self.engine.trouble)
                await asyncio.wait({done}, timeout=_LOOK_SECONDS)
        finally:
            if ticket is not None and not done.done():
                self.engine.cancel(ticket)
        self._progress()  # our own token is none of the next check's
        if done.done() and (error := done.result().error) is not None:
            raise error

    def _progress(self) -> bool:
        seen, self._seen = self._seen, self.engine.metrics.generated_tokens
        return seen != self._seen

    def _abort(self, client: Any) -> None:  # noqa: ANN401 - the address in the scope of a request
        if (exchange := self._open.get(client[1])) is not None:
            exchange.leave()


class _Exchange:
    """The two ends of one request of an ASGI application."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._head: tuple[int, Headers] | None = None
        self._found = bytearray()
        self._left, self._taken = asyncio.Event(), asyncio.Event()
        self.wake = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        """Return the body, and later that the client has left."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Mapping[str, Any]) -> None:
        """Take a message of the application; waits while the caller has much to take."""
        if message["type"] == "http.response.start":
            self._head = message["status"], [(bytes(name), bytes(value)) for name, value in message["headers"]]
            return
        self._found += message.get("body", b"")
        if message.get("more_body", False):  # the end of the application wakes the caller for the rest
            self.wake.set()
        while len(self._found) > _MOST_AHEAD and message.get("more_body", False) and not self._left.is_set():
            self._taken.clear()
            await self._taken.wait()

    def take(self) -> tuple[bytes, tuple[int, Headers] | None]:
        """Return what was sent since the last time."""
        self.wake.clear()
        body, head = bytes(self._found), self._head
        self._found.clear()
        self._head = None
        self._taken.set()
        return body, head

    def leave(self) -> None:
        """Tell the application that its client has gone."""
        self._left.set()
        self._taken.set()


def _scope(request: Request, number: int) -> dict[str, Any]:
    """Return the ASGI scope of a request; its client's address is a number of ours."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": request.headers,
        "client": ("replica", number),
        "server": ("127.0.0.1", 0),
    }


def _folder(name: str | None, say: Callable[[str], None]) -> StateFolder | None:
    """Open the folder of states; without one that can be made, every prompt is read."""
    if name is None:
        return None
    try:
        return StateFolder(Path(name), say)
    except StateError as error:
        say(f"state folder: {error}; it costs time only")
        return None
