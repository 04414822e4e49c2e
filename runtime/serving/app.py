"""HTTP around the engine: routes, bodies, streams, the key, and the log. What requests mean is `openai_api`'s.

An `App` is an ASGI application. It hands requests to the engine's thread and gets deliveries back on its event loop,
where each request has a mailbox. A client that leaves cancels its request, streamed or not. Errors come in OpenAI's
form, and in the middle of a stream as its last event.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lrt_deploy.errors import LRTDeployError

from . import page
from .answers import Answer
from .bodies import Bodies
from .engine import Deliver, Delivery, Draining, Engine, deliver_directly
from .metrics import CONTENT_TYPE, gauges, process_gauges
from .openai_api import Api, Call
from .request_fields import ApiError, Failure

_MOST_PENDING = 16384  # events of a stream that its client has not taken
_RETRY_AFTER_SECONDS = 1
_MOST_LINES = 4096  # of the log that wait to be written
_LOG_SECONDS = 0.01  # in which lines gather: to wake another thread costs the one that wakes it time
LEFT = 499  # the status that the log shows for a client that has gone
# Without the key. The page has nothing of the model; it asks its user for the key.
_OPEN_PATHS = frozenset({"/health", "/ready", "/v2/health/live", "/v2/health/ready", *page.FILES})


_Parsed = TypeVar("_Parsed")


class Log:
    """Write lines to a file descriptor, stderr's by default, in a thread of its own: no caller waits for a reader.

    At most `most` lines wait. Further ones are dropped, and a line says how many when writing goes on.
    """

    def __init__(self, descriptor: int | None = None, most: int = _MOST_LINES) -> None:
        self._descriptor = _stderr() if descriptor is None else descriptor
        self._lines: queue.Queue[str | threading.Event] = queue.Queue(most)
        self._lock = threading.Lock()  # of `_dropped` and `_thread`
        self._dropped = 0
        self._thread: threading.Thread | None = None

    def put(self, line: str | threading.Event) -> None:
        """Write a line, or set an event when all lines before it were written; both may be dropped."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            try:
                self._lines.put_nowait(line)
            except queue.Full:
                self._dropped += isinstance(line, str)

    def flush(self, seconds: float) -> None:
        """Wait until all lines were written, at most so long."""
        written = threading.Event()
        self.put(written)
        written.wait(seconds)

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            time.sleep(_LOG_SECONDS)
            with contextlib.suppress(queue.Empty):
                while True:
                    if isinstance(line, threading.Event):
                        line.set()
                    else:
                        self._write(line)
                    line = self._lines.get_nowait()
            with self._lock:
                dropped, self._dropped = self._dropped, 0
            if dropped:
                self._write(f"{dropped} lines of the log were dropped here: stderr was not read")

    def _write(self, line: str) -> None:
        # Not sys.stderr: this thread would hold its lock while it waits, and the process could not end.
        data = f"{line}\n".encode(errors="backslashreplace")
        with contextlib.suppress(OSError):  # stderr is closed
            while data and self._descriptor is not None:
                data = data[os.write(self._descriptor, data) :]


def _stderr() -> int | None:
    """Return the file descriptor of stderr; None if it is closed."""
    try:
        return None if sys.stderr is None else sys.stderr.fileno()
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class AppOptions:
    """Options of the HTTP server."""

    api_key: str | None = None
    cors_origins: Sequence[str] = ()
    hosts: Sequence[str] | None = None  # beside loopback addresses, names that a Host header may have; None: all
    log: Log = field(default_factory=Log)


class Mailbox:
    """Deliveries for one request, in the event loop. `overflow` is called where a client takes too few of them."""

    def __init__(self, overflow: Callable[[], None]) -> None:
        self._found: list[Delivery] = []
        self._wake = asyncio.Event()
        self._pending = 0  # events that were not taken
        self._overflow = overflow
        self.left = False  # the client has gone

    def put(self, delivery: Delivery) -> None:
        """Add a delivery."""
        self._found.append(delivery)
        self._pending += len(delivery.events)
        self._wake.set()
        if self._pending > _MOST_PENDING and not delivery.last:
            self._overflow()

    def leave(self) -> None:
        """Note that the client has gone."""
        self.left = True
        self._wake.set()

    async def take(self) -> Delivery | None:
        """Wait for deliveries and join them to one; None: the client has gone."""
        await self._wake.wait()
        self._wake.clear()
        if self.left:
            return None
        found, self._found, self._pending = self._found, [], 0
        if len(found) == 1:
            return found[0]
        return Delivery([event for part in found for event in part.events], found[-1].last, found[-1].error)


class App:
    """The server's routes on one engine. Whoever serves it sets `abort`, which ends a client's connection at once."""

    def __init__(self, engine: Engine, api: Api, options: AppOptions) -> None:
        self.engine, self.api, self.options = engine, api, options
        self.abort: Callable[[Any], None] = lambda client: None  # by the address in the scope of its request
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/v2/health/live", self.health),
            Route("/v2/health/ready", self.ready),
            Route("/metrics", self.metrics),
            *(Route(path, _file(file)) for path, file in page.FILES.items()),
        ]
        handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
            **dict.fromkeys((404, 405), _http_error),
            500: _broken,
            ClientDisconnect: _client_left,
        }
        inner = Starlette(routes=routes, exception_handlers=handlers)
        inner.router.redirect_slashes = False  # Starlette's redirects name http://, also behind a proxy with TLS
        self.inner: ASGIApp = inner  # without origins, the key and the log; needs an `entry` in its scope
        self.asgi = gated(inner, options)
        self._bodies = Bodies(api.takes_long)
        self._describing = asyncio.Lock()  # the first description of the model scores a text; others wait for it
        self.answering = 0  # requests whose answers are not all handed to their connections

    async def start(self) -> None:
        """Start the engine; its deliveries come to the running event loop."""
        loop = asyncio.get_running_loop()

        def post(deliveries: Sequence[tuple[Deliver, Delivery]]) -> None:
            loop.call_soon_threadsafe(deliver_directly, deliveries)

        self.engine.post = post
        self.engine.start()

    def drain(self) -> None:
        """Refuse new requests; running ones go on."""
        self.engine.drain()

    @property
    def busy(self) -> bool:
        """Whether requests run, or answers are not all handed to their connections."""
        return bool(self.engine.outstanding or self.answering)

    def end_all(self) -> None:
        """End running requests with an error."""
        self.engine.end_all()

    async def stop(self) -> None:
        """Stop the engine, and write the states that wait for that."""
        self.engine.stop()

    # Generation

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        return await self._generate(request, self.api.parse_completion)

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._generate(request, self.api.parse_chat)

    async def _generate(self, request: Request, parse: Callable[[object], Call]) -> Response:
        client, entry = request.scope.get("client"), request.scope["entry"]
        try:
            if self.engine.draining:
                raise Draining
            call = await self._parsed(request, parse)
            most = self.engine.slots + self.engine.max_waiting
            if call.request.size > most:
                asked = f"{call.request.size} continuations were asked for at once"
                raise ApiError(
                    f"{asked}; this server takes at most {most}", "n" if call.request.count > 1 else "prompt"
                )
            mailbox = Mailbox(lambda: self.abort(client))
            ticket = self.engine.submit(call.request, mailbox.put)
        except LRTDeployError as error:
            self.engine.metrics.ended("refused")
            return failure_response(error)
        entry |= {"id": call.id, "prompt_tokens": call.prompt_tokens}
        answer = Answer(call, self.api.tokenizer)
        exchange = Exchange(answer, mailbox, entry, lambda: self.engine.cancel(ticket))
        return _Counted(self, exchange)

    async def _parsed(self, request: Request, parse: Callable[[object], _Parsed]) -> _Parsed:
        size = request.headers.get("content-length", "0")
        return await self._bodies.parsed(size, request.stream(), parse)

    # Everything else

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        return json_response({"object": "list", "data": [await self._description()]})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/NAME`."""
        try:
            self.api.check_model(request.path_params["model"])
        except LRTDeployError as error:
            return failure_response(error)
        return json_response(await self._description())

    async def _description(self) -> dict[str, Any]:
        async with self._describing:
            return await run_in_threadpool(self.api.model)

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`: the token ids of a text or of chat messages."""
        return await self._answered(request, self.api.tokenize)

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`: the text of token ids."""
        return await self._answered(request, self.api.detokenize)

    async def _answered(self, request: Request, answer: Callable[[object], dict[str, Any]]) -> Response:
        try:
            return json_response(await self._parsed(request, answer))
        except LRTDeployError as error:
            return failure_response(error)

    async def tokenizer_info(self, request: Request) -> Response:
        """`GET /tokenizer_info`: the names of special tokens."""
        try:
            return json_response(self.api.tokenizer_info())
        except LRTDeployError as error:
            return failure_response(error)

    async def health(self, request: Request) -> Response:
        """Whether the process answers."""
        return json_response({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        """Whether it takes requests; 503 while it drains, or while the backend fails."""
        if self.engine.ready:
            return json_response({"status": "ready"})
        return json_response({"status": "draining" if self.engine.draining else self.engine.trouble or "stopped"}, 503)

    async def metrics(self, request: Request) -> Response:
        """Counters in Prometheus' text format."""
        return Response(self.metrics_text(), headers={"content-type": CONTENT_TYPE})

    def metrics_text(self) -> str:
        """Return the counters."""
        lines = [*self.engine.metrics.lines(), *gauges(self.engine.stats() | process_gauges())]
        return "\n".join(lines) + "\n"


class _Counted(Response):
    """A response that the app counts in `answering` until it has ended."""

    def __init__(self, app: App, response: Response) -> None:
        self._app, self._response, self.background = app, response, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        self._app.answering += 1
        try:
            await self._response(scope, receive, send)
        finally:
            self._app.answering -= 1


class Exchange(Response):
    """One call and its answer on their way from the engine to the client."""

    def __init__(
        self,
        answer: Answer,
        mailbox: Mailbox,
        entry: dict[str, Any],
        cancel: Callable[[], None],
    ) -> None:
        self.answer, self.mailbox, self.entry, self.cancel = answer, mailbox, entry, cancel
        self.call = answer.call
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; whatever ends this early cancels the request."""
        ended = False
        watch = asyncio.create_task(self._watch(receive))
        try:
            # The first delivery tells whether the answer is an error, which the status says.
            while (delivery := await self.mailbox.take()) is not None:
                ended = delivery.last
                if ended and not self.call.stream:
                    await self._whole(delivery)(scope, receive, send)
                    return
                await self._send_part(delivery, scope, receive, send)
                if ended:
                    return
            self.entry["status"] = LEFT
        finally:
            watch.cancel()
            if not ended:
                self.cancel()
            self.entry["tokens"] = sum(choice.tokens for choice in self.answer.choices)

    async def _watch(self, receive: Receive) -> None:
        await until_left(receive)
        self.mailbox.leave()

    def _whole(self, delivery: Delivery) -> Response:
        if delivery.error is not None:
            return failure_response(delivery.error)
        self.answer.add(delivery)
        return json_response(self.answer.body())

    async def _send_part(self, delivery: Delivery, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the chunks of a delivery; with the first of them the head."""
        first = "status" not in self.entry
        if first and delivery.error is not None and not delivery.events:
            await failure_response(delivery.error)(scope, receive, send)
            return
        if first:
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        chunks = [stream_event(chunk) for chunk in self.answer.chunks(self.answer.add(delivery))]
        if delivery.error is not None:
            chunks.append(stream_event(Failure.of(delivery.error).body()))
        elif delivery.last:
            if self.call.include_usage:
                chunks.append(stream_event(self.answer.usage_chunk()))
            chunks.append(b"data: [DONE]\n\n")
        if not (chunks or first):
            return
        await send({"type": "http.response.body", "body": b"".join(chunks), "more_body": not delivery.last})


async def until_left(receive: Receive) -> None:
    """Wait until the client of a request has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def gated(app: ASGIApp, options: AppOptions) -> ASGIApp:
    """Return an application behind the gate, and in front of it the answers to preflights where origins are allowed."""
    gate: ASGIApp = Gate(app, options)
    if not options.cors_origins:
        return gate
    return CORSMiddleware(gate, allow_origins=options.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"])


class Gate:
    """Everything that comes before and after a request: its origin, the key, the log. A middleware."""

    def __init__(self, app: ASGIApp, options: AppOptions) -> None:
        self.app, self.log, self._origins = app, options.log, frozenset(options.cors_origins)
        self._hosts = None if options.hosts is None else {"localhost", *(name.lower() for name in options.hosts)}
        self._expected = None if options.api_key is None else options.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and log a line about it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        entry: dict[str, Any] = {}
        scope["entry"], started = entry, time.perf_counter()

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.setdefault("status", message["status"])
            await send(message)

        try:
            await self._answering(scope)(scope, receive, noted)
        finally:
            self._log(scope, entry, time.perf_counter() - started)

    def _answering(self, scope: Scope) -> ASGIApp:
        """Return what answers a request: the app, or an error."""
        if scope["path"] in _OPEN_PATHS:
            return self.app
        if not self._for_here(scope):
            return _MISDIRECTED
        if not self._from_here(scope):
            return _FOREIGN
        return self.app if self._has_key(scope) else _UNAUTHORIZED

    def _for_here(self, scope: Scope) -> bool:
        """Return whether a request names this server: an attacker's DNS may point another name at it."""
        if self._hosts is None:
            return True
        hosts = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
        return all(_name_of(host) in self._hosts or is_loopback(_name_of(host)) for host in hosts)

    def _from_here(self, scope: Scope) -> bool:
        """Return whether no page of another site sends a request, unless its origin is among the options."""
        origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
        hosts = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
        return "*" in self._origins or all(
            origin in self._origins or origin.partition("://")[2].lower() in hosts for origin in origins
        )

    def _has_key(self, scope: Scope) -> bool:
        if self._expected is None:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        return hmac.compare_digest(key.strip(), self._expected) and scheme.lower() == b"bearer"

    def _log(self, scope: Scope, entry: dict[str, Any], seconds: float) -> None:
        if scope["path"] in _OPEN_PATHS and entry.get("status") == 200:
            return
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = {"time": at, "method": scope["method"], "path": scope["path"][:200], "status": LEFT, **entry}
        self.log.put(msgspec.json.encode(line | {"ms": round(seconds * 1e3, 1)}).decode())


def _name_of(host: str) -> str:
    """Return a host without its port and its brackets."""
    found = re.fullmatch(r"\[([0-9a-f:.]+)\](?::\d*)?|([^:]*)(?::\d*)?", host)
    return (found[1] or found[2] or "").rstrip(".") if found else ""


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine by its name or address, so that no other one can be meant."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _file(file: page.PageFile) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler of a file of the chat page."""
    response = Response(file.content, 200, page.HEADERS, file.media_type)

    async def respond(request: Request) -> Response:
        return response

    return respond


def stream_event(value: object) -> bytes:
    """Return a server-sent event."""
    return b"data: %b\n\n" % msgspec.json.encode(value)


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON value as a response."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def failure_response(error: LRTDeployError) -> Response:
    """Return an error in OpenAI's form."""
    failure = Failure.of(error)
    headers = {}
    if failure.status in (429, 503):
        headers["retry-after"] = str(_RETRY_AFTER_SECONDS)
    if isinstance(error, ApiError) and failure.status in (413, 503):
        headers["connection"] = "close"  # what is left of the body is not read
    return json_response(failure.body(), failure.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    what = "there is no" if status == 404 else f"{request.method} is not a method of"
    return failure_response(ApiError(f"{what} {request.url.path[:200]}", None, status))


async def _client_left(request: Request, error: Exception) -> Response:
    """Answer a client that has left before its body was read: nothing is sent, the log has the status."""
    return Response(status_code=LEFT)


async def _broken(request: Request, error: Exception) -> Response:
    """Answer a request that a fault of ours has ended; uvicorn logs the traceback."""
    return json_response(Failure(500, "something broke in the server; its log says what", "server_error").body(), 500)


_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes the events on as they come
]
_FOREIGN = json_response(
    Failure(
        403,
        "the Origin of this request is neither this server's nor one that --cors-origin allows",
        "permission_error",
    ).body(),
    403,
)
_MISDIRECTED = json_response(
    Failure(
        403,
        "the Host of this request is no loopback name, and this server listens on a loopback address only; "
        "--allowed-host NAME allows another name",
        "permission_error",
    ).body(),
    403,
)
_UNAUTHORIZED = json_response(
    Failure(
        401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", "authentication_error"
    ).body(),
    401,
    {"www-authenticate": "Bearer"},
)
