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
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lrt_deploy.errors import InputError

from .app import App, AppOptions, Log
from .engine import Engine
from .openai_api import Api

KEEP_ALIVE_SECONDS = 620  # longer than a proxy keeps its idle connections, or it would use one that is closed
SEND_SECONDS = 60.0  # a client that takes nothing of what is sent to it for so long has left
_CLOSING_SECONDS = 2  # for connections when all requests have ended
_FLUSH_SECONDS = 1  # for the last lines of the log
_POLL_SECONDS = 0.02

_Transports = dict[tuple[str, int], asyncio.Transport]


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


def _protocol_of(transports: _Transports) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with a register of the connections, by the addresses of the clients.

    It ends a connection whose client takes nothing for `SEND_SECONDS`.
    """

    class Protocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            transport.set_write_buffer_limits(0)  # whatever the system does not take at once starts the timer
            if self.client is not None:
                transports[self.client] = transport

        def pause_writing(self) -> None:
            super().pause_writing()
            self._wait(self.transport.get_write_buffer_size())

        def resume_writing(self) -> None:
            self._stop_timer()
            super().resume_writing()

        def _wait(self, size: int) -> None:
            self._timer = asyncio.get_running_loop().call_later(SEND_SECONDS, self._check, size)

        def _check(self, size: int) -> None:
            left = self.transport.get_write_buffer_size()
            if left < size:
                self._wait(left)
            else:
                self.transport.abort()

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)
            if self.client is not None:
                transports.pop(self.client, None)

    return Protocol


class Server:
    """An engine behind HTTP. `run` returns when `drain` has ended it."""

    def __init__(self, engine: Engine, api: Api, options: AppOptions) -> None:
        self.engine, self.log = engine, options.log
        self._transports: _Transports = {}
        self._app = App(engine, api, options, self._abort)
        self._draining: asyncio.Task[None] | None = None
        config = uvicorn.Config(
            self._app.asgi,
            http=_protocol_of(self._transports),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_CLOSING_SECONDS,
        )
        self._uvicorn = _Uvicorn(config)

    def _abort(self, client: Any) -> None:  # noqa: ANN401 - an address, from the scope of a request
        if client is not None and (transport := self._transports.get(tuple(client))) is not None:
            transport.abort()

    async def run(self, listener: socket.socket, started: Callable[[], None]) -> None:
        """Serve on a bound socket; `started` is called when connections are accepted."""
        self._app.connect()
        self.engine.start()
        handler, logger = _LogHandler(self.log), logging.getLogger("uvicorn.error")
        logger.addHandler(handler)
        try:
            serving = asyncio.create_task(self._uvicorn.serve([listener]))
            while not (self._uvicorn.started or serving.done()):
                await asyncio.sleep(_POLL_SECONDS)
            started()
            await serving
        finally:
            self.engine.stop()
            logger.removeHandler(handler)
            self.log.flush(_FLUSH_SECONDS)

    def drain(self, seconds: float) -> None:
        """Refuse new requests, let running ones end for at most so many seconds, end the rest with an error, stop."""
        self.engine.drain()
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain(seconds))

    async def _drain(self, seconds: float) -> None:
        if not await self._idle_within(seconds):
            self.engine.end_all()
            if not await self._idle_within(_CLOSING_SECONDS):
                for transport in self._writing():
                    transport.abort()
        self._uvicorn.should_exit = True

    async def _idle_within(self, seconds: float) -> bool:
        """Wait until all requests have ended and all answers were sent, at most so long; return whether that came."""
        until = asyncio.get_running_loop().time() + seconds
        while self.engine.outstanding or self._app.answering or self._writing():
            if asyncio.get_running_loop().time() >= until:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True

    def _writing(self) -> list[asyncio.Transport]:
        """Return the connections whose clients have not taken all that was sent to them."""
        return [transport for transport in self._transports.values() if transport.get_write_buffer_size()]


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
