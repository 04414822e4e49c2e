"""The front of several replicas: checks requests, sends each to the replica that its conversation belongs to.

Which one that is only saves time: every replica can answer every request. A request whose replica dies before it has
answered anything is sent to another one; where a stream breaks in its middle, the client gets an error event and sends
its request again. Knows no Ray: `Replicas` is what calls the replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, Protocol

import msgspec
from starlette.requests import ClientDisconnect
from starlette.requests import Request as StarletteRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lrt_deploy.errors import BackendError, LRTDeployError
from lrt_deploy.runtime.serving.app import (
    LEFT,
    AppOptions,
    failure_response,
    gated,
    json_response,
    stream_event,
    until_left,
)
from lrt_deploy.runtime.serving.bodies import Bodies
from lrt_deploy.runtime.serving.engine import Draining
from lrt_deploy.runtime.serving.metrics import CONTENT_TYPE, counter, gauges
from lrt_deploy.runtime.serving.request_fields import Failure

from .replica import Part, Request

SESSION_HEADER = b"x-session-id"
MOST_TRIES = 3  # of a request that no replica has begun to answer; it may be what kills them
_WAIT_SECONDS = 0.1  # before a further try but the first
_READY_SECONDS = 2.0
_BEGINNING_BYTES = 256  # of a prompt: what belongs to one conversation begins alike
_ALIVE, _READY = ("/health", "/v2/health/live"), ("/ready", "/v2/health/ready")
# Of one connection, or what the front has checked.
_NOT_PASSED_ON = frozenset((b"authorization", b"connection", b"origin", b"cookie", b"transfer-encoding", b"expect"))


class ReplicaLost(BackendError):  # noqa: N818 - a condition that passes, not a fault
    """The replica that was answering has died or cannot be reached."""


class Replicas(Protocol):
    """What calls replicas. Its methods raise ReplicaLost for one that dies, and Busy where all are full."""

    def ask(self, request: Request, key: str) -> AsyncGenerator[Part, None]:
        """Yield the parts of the answer of the replica that a key belongs to; closing it cancels the request."""

    async def close(self) -> None:
        """Let go of the replicas, which run on."""

    async def metrics(self) -> Mapping[str, str]:
        """Return the text of `GET /metrics` of each replica, by its name."""


class _Turn(msgspec.Struct):
    role: str = ""


class _Beginning(msgspec.Struct):
    """The fields of a body that tell which conversation it belongs to, as they stand in its text."""

    prompt: msgspec.Raw = msgspec.Raw(b"")
    messages: list[msgspec.Raw] = []


def affinity_key(headers: Mapping[bytes, bytes], body: bytes | bytearray) -> str:
    """Return what requests of one conversation have in common: the session header, or how the conversation begins.

    A chat begins with its messages up to the first of the user, a prompt with its first bytes. Empty where there is
    nothing to go by.
    """
    if session := headers.get(SESSION_HEADER):
        return hashlib.sha256(b"session " + session).hexdigest()
    try:
        fields = msgspec.json.decode(body, type=_Beginning)
        beginning = list[bytes]()
        for message in fields.messages:
            beginning.append(bytes(message))
            if msgspec.json.decode(message, type=_Turn).role == "user":
                break
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return ""  # the replica says what is wrong with it
    text = b"\n".join(beginning) or bytes(fields.prompt)[:_BEGINNING_BYTES]
    return hashlib.sha256(text).hexdigest() if text else ""


class Front:
    """The routes of `App` in front of replicas, as a service of `Server`."""

    def __init__(self, replicas: Replicas, options: AppOptions) -> None:
        self.replicas, self.options = replicas, options
        self.abort: Callable[[Any], None] = lambda client: None
        self.asgi = gated(self._answer, options)
        self.draining = False
        self.retries = self.lost = 0  # requests sent again, and streams that broke
        self._running: set[asyncio.Task[None]] = set()
        self._bodies = Bodies(lambda body: False)

    # A service

    async def start(self) -> None:
        """Do nothing: the replicas run already."""

    def drain(self) -> None:
        """Refuse new requests; running ones go on."""
        self.draining = True

    @property
    def busy(self) -> bool:
        """Whether requests run."""
        return bool(self._running)

    def end_all(self) -> None:
        """Cancel running requests; their connections are closed."""
        for task in self._running:
            task.cancel()

    async def stop(self) -> None:
        """Let go of the replicas, which run on."""
        await self.replicas.close()

    # Requests

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if (own := await self._own(scope)) is not None:
            await own(scope, receive, send)
            return
        if self.draining and scope["method"] == "POST":
            await failure_response(Draining())(scope, receive, send)
            return
        sending, headers = StarletteRequest(scope, receive), dict(scope["headers"])
        size = headers.get(b"content-length", b"0").decode("latin-1")
        try:
            async with contextlib.AsyncExitStack() as held:
                body = await held.enter_async_context(self._bodies.held(size, sending.stream()))
                request, key = _request(scope, bytes(body)), affinity_key(headers, body)
                await self._unless_left(self._forward(request, key, scope, send, held.aclose), scope, receive)
        except LRTDeployError as error:
            await failure_response(error)(scope, receive, send)
        except ClientDisconnect:
            scope["entry"]["status"] = LEFT

    async def _own(self, scope: Scope) -> Response | None:
        """Return the answer to a request that is about the front itself."""
        if scope["method"] not in ("GET", "HEAD"):
            return None
        if scope["path"] in _ALIVE:
            return json_response({"status": "alive"})
        if scope["path"] in _READY:
            return await self._ready()
        return await self._metrics() if scope["path"] == "/metrics" else None

    async def _ready(self) -> Response:
        """Answer 200 if any replica takes requests."""
        if self.draining:
            return json_response({"status": "draining"}, 503)
        try:
            async with asyncio.timeout(_READY_SECONDS):
                first = await self._first(self.replicas.ask(Request("GET", "/ready", b"", [], b""), ""))
            assert first.head is not None
            return Response(first.body, first.head[0], media_type="application/json")
        except (TimeoutError, LRTDeployError):
            return json_response({"status": "no replica answers"}, 503)

    @staticmethod
    async def _first(parts: AsyncGenerator[Part, None]) -> Part:
        async with contextlib.aclosing(parts):
            return await anext(parts)

    async def _metrics(self) -> Response:
        """Return the counters of all replicas, each with a label, and those of the front."""
        try:
            found = await self.replicas.metrics()
        except LRTDeployError as error:
            return failure_response(error)
        lines = [
            *labelled(found),
            *gauges({"lrt_replicas": ("Replicas that answer.", len(found))}),
            *counter("lrt_front_retries_total", "Requests that were sent to another replica.", self.retries),
            *counter("lrt_front_lost_total", "Streams that broke because their replica died.", self.lost),
        ]
        return Response("\n".join(lines) + "\n", headers={"content-type": CONTENT_TYPE})

    async def _unless_left(self, answering: Coroutine[Any, Any, None], scope: Scope, receive: Receive) -> None:
        """Run a coroutine that answers a request, and cancel it when the client leaves."""
        task = asyncio.create_task(answering)
        self._running.add(task)
        watch = asyncio.create_task(until_left(receive))
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                scope["entry"]["status"] = LEFT
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        finally:
            self._running.discard(task)
            watch.cancel()
            task.cancel()

    async def _forward(
        self, request: Request, key: str, scope: Scope, send: Send, begun: Callable[[], Awaitable[None]]
    ) -> None:
        """Send a request to a replica and its answer to the client; `begun` is awaited when the body is not needed."""
        async with contextlib.AsyncExitStack() as stack:
            parts, part = await self._begin(request, key, stack)
            await begun()
            assert part.head is not None
            status, headers = part.head
            streams = any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)
            await send({"type": "http.response.start", "status": status, "headers": headers})
            try:
                while part.entry is None:
                    await send({"type": "http.response.body", "body": part.body, "more_body": True})
                    part = await anext(parts)
                scope["entry"] |= {name: value for name, value in part.entry.items() if name != "status"}
                body = part.body
            except (ReplicaLost, StopAsyncIteration):
                self.lost += 1
                scope["entry"]["lost"] = True
                if not streams:
                    raise  # the connection ends before its answer does
                body = stream_event(_LOST.body())
            await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _begin(
        self, request: Request, key: str, stack: contextlib.AsyncExitStack
    ) -> tuple[AsyncGenerator[Part, None], Part]:
        """Return the parts of an answer and the first of them, from another replica if the first one is lost."""
        tries = 0
        while True:
            parts = self.replicas.ask(request, key)
            try:
                first = await anext(parts)
            except (ReplicaLost, StopAsyncIteration) as error:
                tries += 1
                if tries == MOST_TRIES:
                    text = f"{tries} replicas died before they answered; send the request again later"
                    raise ReplicaLost(text) from error
                self.retries += 1
                await asyncio.sleep(_WAIT_SECONDS * (tries - 1))
                continue
            await stack.enter_async_context(contextlib.aclosing(parts))
            return parts, first


async def _live(receive: Receive, send: Send) -> None:
    """Answer ASGI's messages about start and end, which Ray Serve's proxies send: there is nothing to do."""
    while True:
        event = (await receive())["type"]
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return


def _request(scope: Scope, body: bytes) -> Request:
    """Return a request as replicas take it: with its length, without what was between the client and the front."""
    headers = [(name, value) for name, value in scope["headers"] if name not in _NOT_PASSED_ON | {b"content-length"}]
    length = [(b"content-length", b"%d" % len(body))] if body else []
    return Request(scope["method"], scope["path"], scope["query_string"], headers + length, body)


_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")


def labelled(texts: Mapping[str, str]) -> list[str]:
    """Join expositions of several replicas: each metric's head once, each sample with the name of its replica."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        name = ""
        for line in text.splitlines():
            if line.startswith("#"):
                name = line.split(" ", 3)[2]
                if line not in heads.setdefault(name, []):
                    heads[name].append(line)
            elif found := _SAMPLE.fullmatch(line):
                labels = ",".join(filter(None, (f'replica="{replica}"', found[2])))
                samples.setdefault(name, []).append(f"{found[1]}{{{labels}}} {found[3]}")
    return [line for name, head in heads.items() for line in (*head, *samples.get(name, ()))]


_LOST = Failure(
    503, "the replica that was answering has died; send the request again", "server_error", None, "replica_lost"
)
