"""The HTTP server's process: uvicorn on one socket, its start, and an end in which running answers are finished.

Installs no signal handlers: the command line does, and calls `Server.drain`. uvicorn would refuse connections from its
first signal on, where a load balancer still has to see that this server is not ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, cast

import h11
import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from lrt_deploy.errors import InputError

from .app import Log
from .request_fields import Failure

KEEP_ALIVE_SECONDS = 620  # longer than a proxy keeps its idle connections, or it would use one that is closed
SEND_SECONDS = 60.0  # a client that takes nothing of what is sent to it for so long has left
_CLOSING_SECONDS = 2  # for connections when all requests have ended
_FLUSH_SECONDS = 1  # for the last lines of the log
_POLL_SECONDS = 0.02
_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS = 0.001, 0.25  # at a connection that is half closed
_MOST_AHEAD = 64 * 2**10  # bytes of further requests that are read while one is answered
_MOST_REFUSED = 64  # connections beyond the limit that get an answer at a time
_OTHER_FILES = 128  # beside connections: graphs, weights, states, the log, connections that are refused

_Phase = Literal["new", "head", "body", "answer", "idle"]


class _Uvicorn(uvicorn.Server):
    """Without handlers of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the command line."""
        yield


class _LogHandler(logging.Handler):
    """Passes uvicorn's errors to the log, so that they do not wait for a reader of stderr either."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record, with its traceback."""
        self._log.put(self.format(record))


@dataclass(frozen=True)
class ConnectionOptions:
    """Bounds of connections. A request's head, its body, and the time between two requests have their own."""

    most: int = 512
    head_seconds: float = 20.0  # from the first byte, or for a new connection from its start, to the end of the head
    body_seconds: float = 120.0  # from the end of the head to that of the body
    idle_seconds: float = KEEP_ALIVE_SECONDS

    def check(self) -> None:
        """Make sure that the process may open so many; raises InputError."""
        with contextlib.suppress(ImportError):  # no such limit
            import resource

            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            needed = self.most + _OTHER_FILES
            if soft != resource.RLIM_INFINITY and soft < needed:
                if hard != resource.RLIM_INFINITY and hard < needed:
                    raise InputError(
                        f"max_connections is {self.most}, which needs {needed} open files, and this process may have "
                        f"{hard}; give a smaller number, or raise the limit (ulimit -n)"
                    )
                resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class _Connections:
    """The open connections, those that were used last at the end."""

    def __init__(self, options: ConnectionOptions) -> None:
        self.options = options
        self.open: dict[_Protocol, None] = {}
        self.by_client: dict[Any, asyncio.Transport] = {}  # by the address, as the scope of a request has it
        self.refused = 0  # that get an error and are about to be closed

    def make_room(self) -> bool:
        """Close the longest idle connection if there are as many as may be; return whether there is room."""
        if len(self.open) < self.options.most:
            return True
        idle = next((connection for connection in self.open if connection.phase in ("new", "idle")), None)
        if idle is not None:
            self.open.pop(idle)
            idle.transport.abort()
        return idle is not None


class _Joined:
    """A transport that sends together what is written in one turn of the event loop, as the head and body of an answer.

    Each send lets other threads run, and waits until one of them lets this one go on.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - of the transport
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send some bytes at the end of this turn."""
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)

    def flush(self) -> None:
        """Send what was written."""
        if self._parts:
            parts, self._parts = self._parts, []
            self._transport.write(b"".join(parts))

    def write_eof(self) -> None:
        """Close this side of the connection when all that was written is sent."""
        self.flush()
        self._transport.write_eof()

    def close(self) -> None:
        """Close the connection when all that was written is sent."""
        self.flush()
        self._transport.close()


class _Protocol(H11Protocol):
    """uvicorn's protocol with bounds on time and on the number of connections, and an answer for half-closed ones.

    It ends a connection whose client takes nothing for `SEND_SECONDS`.
    """

    def __init__(self, connections: _Connections, **options: Any) -> None:  # noqa: ANN401 - uvicorn's
        super().__init__(**options)
        self._all = connections
        self.phase: _Phase = "new"
        self._phase_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._refused = self._half_closed = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = transport = cast(asyncio.Transport, _Joined(transport, self.loop))
        transport.set_write_buffer_limits(0)  # whatever the system does not take at once starts the timer
        if self._all.make_room():
            self._all.open[self] = None
            if self.client is not None:
                self._all.by_client[self.client] = transport
            self._phase_timer = self.loop.call_later(self._all.options.head_seconds, self._late)
        else:
            self._refuse()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._phase_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._all.refused -= self._refused
        self._all.open.pop(self, None)
        if self.client is not None and self._all.by_client.get(self.client) is self.transport:
            del self._all.by_client[self.client]
        super().connection_lost(exc)

    def _refuse(self) -> None:
        """Answer a connection that is one too many, without a look at its request, and close it soon."""
        self._refused = True
        self._all.refused += 1
        if self._all.refused > _MOST_REFUSED:
            self.transport.abort()
            return
        self.transport.write(_TOO_MANY)
        self.transport.write_eof()  # closed at once, what the client sends would be answered by a reset
        self._phase_timer = self.loop.call_later(_CLOSING_SECONDS, self.transport.abort)

    # Phases of a request

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
            self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._half_closed and self.conn.their_state in (h11.IDLE, h11.SEND_BODY):  # no further request has come
            self.transport.close()
        elif self in self._all.open:
            self._all.open[self] = self._all.open.pop(self)  # the last one used
            self._follow()

    def _follow(self) -> None:
        """Find the phase of the connection, and start its time if it is a new one."""
        phase: _Phase = "answer"
        if self.conn.their_state is h11.SEND_BODY:
            phase = "body"
        elif self.conn.their_state is h11.IDLE:
            phase = "head" if self.conn.trailing_data[0] else "idle"
        elif len(self.conn.trailing_data[0]) < _MOST_AHEAD:
            self.flow.resume_reading()  # uvicorn reads nothing more, and would not see that the client leaves
        if phase == self.phase:
            return
        self.phase = phase
        if self._phase_timer is not None:
            self._phase_timer.cancel()
            self._phase_timer = None
        if phase in ("head", "body"):
            options = self._all.options
            seconds = options.head_seconds if phase == "head" else options.body_seconds
            self._phase_timer = self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        """End a connection whose request has not come in time."""
        if self.phase != "new" and not (self.phase == "body" and self.cycle.response_started):
            self.transport.write(_TOO_LATE)
        self.transport.close()

    # Clients that have closed their side

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Keep the connection for the answer where the client may wait for it, having sent all that it had to say.

        A client that has left altogether looks the same until something is sent to it. An interim response, which
        clients of HTTP/1.1 skip, makes its system say so.
        """
        waits = self.phase == "answer" and self.cycle is not None and not self.cycle.response_complete
        if not waits or self.scope["http_version"] != "1.1" or self._refused:
            return None
        self._half_closed = True
        if not self.cycle.response_started:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._look(_FIRST_LOOK_SECONDS)
        return True

    def _look(self, seconds: float) -> None:
        """Look soon, and then less and less often, whether the client's system has said that it is gone."""
        found = self.transport.get_extra_info("socket")
        if self.transport.is_closing() or found is None:
            return
        if found.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        self._phase_timer = self.loop.call_later(seconds, self._look, min(2 * seconds, _LAST_LOOK_SECONDS))

    # Slow readers

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().resume_writing()

    def _wait(self, size: int) -> None:
        self._write_timer = self.loop.call_later(SEND_SECONDS, self._check, size)

    def _check(self, size: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left < size:
            self._wait(left)
        else:
            self.transport.abort()


def _closing(status: str, failure: Failure, *fields: str) -> bytes:
    """Return a whole response after which the connection ends."""
    body = msgspec.json.encode(failure.body())
    head = (f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(body)}", *fields)
    return "\r\n".join((*head, "connection: close", "", "")).encode() + body


_TOO_MANY = _closing(
    "503 Service Unavailable",
    Failure(
        503, "this server has as many connections as it takes; try again later", "server_error", None, "connections"
    ),
    "retry-after: 1",
)
_TOO_LATE = _closing(
    "408 Request Timeout",
    Failure(408, "the rest of the request did not come in time", "invalid_request_error", None, "request_timeout"),
)


class Service(Protocol):
    """What a server serves: an ASGI application with a start and an end."""

    asgi: ASGIApp
    abort: Callable[[Any], None]  # the server's: end the connection of this address at once

    async def start(self) -> None: ...  # noqa: D102
    def drain(self) -> None: ...  # noqa: D102 - take no new requests
    @property
    def busy(self) -> bool: ...  # noqa: D102 - whether requests have not ended
    def end_all(self) -> None: ...  # noqa: D102 - end running requests with an error
    async def stop(self) -> None: ...  # noqa: D102


class Server:
    """A service behind HTTP. `run` returns when `drain` has ended it."""

    def __init__(self, service: Service, log: Log, bounds: ConnectionOptions = ConnectionOptions()) -> None:
        self.service, self.log = service, log
        self._connections = _Connections(bounds)
        service.abort = self._abort
        self._draining: asyncio.Task[None] | None = None
        config = uvicorn.Config(
            service.asgi,
            http=partial(_Protocol, self._connections),  # type: ignore[arg-type] # as uvicorn calls a class
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=bounds.idle_seconds,  # type: ignore[arg-type] # seconds of a timer
            timeout_graceful_shutdown=_CLOSING_SECONDS,
        )
        self._uvicorn = _Uvicorn(config)

    def _abort(self, client: Any) -> None:  # noqa: ANN401 - an address, from the scope of a request
        if client is not None and (transport := self._connections.by_client.get(tuple(client))) is not None:
            transport.abort()

    async def run(self, listener: socket.socket, started: Callable[[], None]) -> None:
        """Serve on a bound socket; `started` is called when connections are accepted."""
        await self.service.start()
        handler, logger = _LogHandler(self.log), logging.getLogger("uvicorn.error")
        logger.addHandler(handler)
        try:
            serving = asyncio.create_task(self._uvicorn.serve([listener]))
            while not (self._uvicorn.started or serving.done()):
                await asyncio.sleep(_POLL_SECONDS)
            started()
            await serving
        finally:
            await self.service.stop()
            logger.removeHandler(handler)
            self.log.flush(_FLUSH_SECONDS)

    def drain(self, seconds: float) -> None:
        """Refuse new requests, let running ones end for at most so many seconds, end the rest with an error, stop."""
        self.service.drain()
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain(seconds))

    async def _drain(self, seconds: float) -> None:
        if not await self._idle_within(seconds):
            self.service.end_all()
            if not await self._idle_within(_CLOSING_SECONDS):
                for transport in self._writing():
                    transport.abort()
        self._uvicorn.should_exit = True

    async def _idle_within(self, seconds: float) -> bool:
        """Wait until all requests have ended and all answers were sent, at most so long; return whether that came."""
        until = asyncio.get_running_loop().time() + seconds
        while self.service.busy or self._writing():
            if asyncio.get_running_loop().time() >= until:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True

    def _writing(self) -> list[asyncio.Transport]:
        """Return the connections whose clients have not taken all that was sent to them."""
        transports = [connection.transport for connection in self._connections.open]
        return [transport for transport in transports if transport.get_write_buffer_size()]


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket; port 0 takes a free one. Raises InputError with the system's reason."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # asyncio sends small packets at once (TCP_NODELAY) only where the protocol is named.
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"the server cannot listen on {host} port {port}: {reason}") from error
    return found
