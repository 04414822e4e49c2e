"""`lrt-deploy serve`: an HTTP server with OpenAI's API on one bundle. Reads options and signals.

The first SIGTERM or SIGINT drains: the server is not ready, running answers end, the exit code is 0. A second one ends
the process at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrt_deploy.errors import InputError

from . import options, output
from .options import option

if TYPE_CHECKING:
    from lrt_deploy.runtime.decoder import Decoder
    from lrt_deploy.runtime.serving.app import AppOptions
    from lrt_deploy.runtime.serving.engine import Engine
    from lrt_deploy.runtime.serving.openai_api import Api
    from lrt_deploy.runtime.serving.server import ConnectionOptions, Server, Service

API_KEY = "LRT_DEPLOY_API_KEY"
MAX_WAITING = 256
_FLUSH_SECONDS = 0.2  # for the last line before the process is ended
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


SERVING = "The server"  # the group of options in the help


@dataclass(frozen=True)
class ApiOptions:
    """What the API does where a request is silent; the same for `serve` and `batch`."""

    slots: Annotated[
        int | None, option("Continuations that run at a time; default: all of the bundle.", panel=SERVING)
    ] = None
    served_model_name: Annotated[
        str | None, option("Name of the model in requests; default: the bundle's folder.", "NAME", SERVING)
    ] = None
    max_tokens_limit: Annotated[int | None, option("Most new tokens that a request may ask for.", panel=SERVING)] = None
    implicit_bos: Annotated[bool, option("Put <|bos|> in front of token prompts that lack it.", panel=SERVING)] = False
    state_bytes: Annotated[
        int, option("Memory for states of earlier requests, which later ones continue; 0 keeps none.", panel=SERVING)
    ] = 2**30
    state_dir: Annotated[
        Path | None, option("Keep these states in this folder too; other servers may share it.", "DIR", SERVING)
    ] = None
    prefill: options.Prefill = "auto"
    tolerance: options.Tolerance = None

    def __post_init__(self) -> None:
        options.check_tolerance(self.tolerance)
        if self.served_model_name == "":
            raise InputError("served_model_name is empty; set it to a name, or leave it out for the bundle's folder")
        if self.state_bytes < 0:
            raise InputError(f"state_bytes is {self.state_bytes}, expected a number from 0 on")
        if self.max_tokens_limit is not None and self.max_tokens_limit < 1:
            raise InputError(f"max_tokens_limit is {self.max_tokens_limit}, expected at least 1")


@dataclass(frozen=True)
class ServerOptions:
    """Options of the HTTP server."""

    host: Annotated[str, option("Address to listen on.", panel=SERVING)] = "127.0.0.1"
    port: Annotated[int, option("Port to listen on; 0 takes a free one.", panel=SERVING)] = 8000
    max_waiting: Annotated[int, option("Continuations that may wait for a slot; more are refused.", panel=SERVING)] = (
        MAX_WAITING
    )
    turn_tokens: Annotated[
        int, option("Tokens that a continuation has before one that waits gets its slot; 0: all.", panel=SERVING)
    ] = 256
    api_key: Annotated[
        str | None,
        typer.Option(envvar=API_KEY, metavar="KEY", help="Key that clients must send.", rich_help_panel=SERVING),
    ] = None
    cors_origin: Annotated[
        list[str] | None, option("Origin of web pages that may call; repeatable.", "URL", SERVING)
    ] = None
    allowed_host: Annotated[
        list[str] | None,
        option("Name that requests may have as their Host on a loopback address; repeatable.", "NAME", SERVING),
    ] = None
    max_connections: Annotated[
        int,
        option(
            "Connections that may be open; the longest idle one makes room, or a new one gets a 503.", panel=SERVING
        ),
    ] = 512
    head_seconds: Annotated[float, option("Time in which the head of a request must come.", panel=SERVING)] = 20.0
    body_seconds: Annotated[float, option("Time in which the body of a request must come.", panel=SERVING)] = 120.0
    idle_seconds: Annotated[
        float, option("Time for which idle connections stay open; more than a proxy's.", panel=SERVING)
    ] = 620.0
    drain_seconds: Annotated[float, option("Time for running answers after SIGTERM.", panel=SERVING)] = 30.0
    replicas: Annotated[int | None, option("Run so many replicas of the server by Ray Serve.", panel=SERVING)] = None
    max_replicas: Annotated[int | None, option("Start up to so many replicas while requests wait.", panel=SERVING)] = (
        None
    )

    def __post_init__(self) -> None:
        if self.api_key == "":
            raise InputError(f"the API key is empty; set {API_KEY} to a text, or leave it out for a server without one")
        if self.host == "":
            raise InputError("host is empty; set it to an address (0.0.0.0 for all), or leave it out for 127.0.0.1")
        if "" in (self.cors_origin or ()):
            raise InputError("cors_origin is empty; set it to an origin such as https://example.org, or leave it out")
        if "" in (self.allowed_host or ()):
            raise InputError("allowed_host is empty; set it to a name such as models.example.org, or leave it out")
        if self.max_replicas is not None and self.replicas is None:
            raise InputError(f"max_replicas is {self.max_replicas}, which needs --replicas, the fewest")
        if self.replicas is not None and (self.replicas < 1 or (self.max_replicas or self.replicas) < self.replicas):
            raise InputError(
                f"replicas is {self.replicas} and max_replicas {self.max_replicas}, expected 1 or more, and a larger "
                "or equal number"
            )
        if self.turn_tokens < 0:
            raise InputError(f"turn_tokens is {self.turn_tokens}, expected a number from 0 on")
        if self.max_connections < 1:
            raise InputError(f"max_connections is {self.max_connections}, expected at least 1")
        for name in ("head_seconds", "body_seconds", "idle_seconds"):
            if not 0 < (value := getattr(self, name)) < inf:
                raise InputError(f"{name} is {value}, expected a number of seconds above 0")
        if self.max_waiting < 0 or not 0 <= self.drain_seconds < inf:
            raise InputError(
                f"max_waiting is {self.max_waiting} and drain_seconds {self.drain_seconds}, expected numbers from 0 on"
            )


def serve(
    bundle: options.BundlePath,
    *,
    server: ServerOptions,
    api: ApiOptions,
    opening: options.DecoderOptions,
    json: options.Json = False,
) -> None:
    """Serve a bundle over HTTP with OpenAI's API. With --json the address is printed as one document."""
    from lrt_deploy.runtime.serving.app import App, AppOptions, Log, is_loopback
    from lrt_deploy.runtime.serving.server import ConnectionOptions, listen

    bounds = ConnectionOptions(server.max_connections, server.head_seconds, server.body_seconds, server.idle_seconds)
    bounds.check()
    hosts = tuple(server.allowed_host or ()) if is_loopback(server.host) else None
    settings = AppOptions(server.api_key, tuple(server.cors_origin or ()), hosts, Log())
    with listen(server.host, server.port) as listener:
        process = _Process(listener, settings, bounds, server, json)
        with opening.open(bundle) as decoder:
            engine, checked = engine_of(decoder, bundle, api, server.max_waiting, settings.log.put)
            engine.batch.turn_tokens = server.turn_tokens or None
            process.describe(engine, checked.options.model)
            if server.replicas is None:
                process.run(lambda: App(engine, checked, settings))
                return
            engine.stop()  # all options are right; the replicas open the bundle for themselves
        _serve_replicas(process, bundle, api, opening)


@dataclass(frozen=True)
class _Process:
    """What a server's process has, whatever it serves."""

    listener: socket.socket
    settings: AppOptions
    bounds: ConnectionOptions
    options: ServerOptions
    json: bool
    about: dict[str, Any] = field(default_factory=dict)  # printed when it takes connections

    def describe(self, engine: Engine, model: str) -> None:
        """Note what the server says of itself when it has started."""
        host, decoder = self.options.host, engine.decoder
        address = f"[{host}]" if ":" in host else host
        self.about["url"] = f"http://{address}:{self.listener.getsockname()[1]}"
        self.about.update(model=model, slots=engine.slots, backend=decoder.backend, precision=decoder.precision)
        if self.options.replicas is not None:
            self.about["replicas"] = self.options.replicas

    def run(self, make: Callable[[], Service]) -> None:
        """Serve what `make` returns until a signal has ended it; `make` is called in the event loop."""
        from lrt_deploy.runtime.serving.server import Server

        def started() -> None:
            if self.json:
                output.document(self.about)
            text = "serving {model} on {url} ({backend}, {precision}, {slots} slots".format(**self.about)
            many = f", {self.options.replicas} replicas" if self.options.replicas else ""
            self.settings.log.put(f"{text}{many})")

        async def run() -> None:
            server = Server(make(), self.settings.log, self.bounds)
            _handle_signals(server, self.options.drain_seconds)
            await server.run(self.listener, started)

        asyncio.run(run())


def _serve_replicas(process: _Process, bundle: Path, api: ApiOptions, opening: options.DecoderOptions) -> None:
    """Start replicas, and serve them until a signal has ended the server."""
    from lrt_deploy.runtime.serving.replicas.cluster import LocalCluster, Scaling, deployment
    from lrt_deploy.runtime.serving.replicas.front import Front
    from lrt_deploy.runtime.serving.replicas.replica import ReplicaOptions

    server = process.options
    chosen = ReplicaOptions(
        bundle=str(bundle.resolve()),
        model=process.about["model"],
        opening=asdict(opening),
        prefill=api.prefill,
        tolerance=api.tolerance,
        implicit_bos=api.implicit_bos,
        max_tokens_limit=api.max_tokens_limit,
        slots=process.about["slots"],
        max_waiting=server.max_waiting,
        turn_tokens=server.turn_tokens or None,
        state_bytes=api.state_bytes,
        state_dir=None if api.state_dir is None else str(api.state_dir.resolve()),
    )
    assert server.replicas is not None
    scaling = Scaling(server.replicas, server.max_replicas, server.drain_seconds, process.about["slots"])
    with LocalCluster() as cluster:
        cluster.start(deployment(chosen, scaling, gpus=0 if process.about["backend"] == "ort-cpu" else 1))
        process.run(lambda: Front(cluster.replicas(), process.settings))


def engine_of(
    decoder: Decoder,
    bundle: Path,
    api: ApiOptions,
    max_waiting: int = MAX_WAITING,
    say: Callable[[str], None] = output.say,
) -> tuple[Engine, Api]:
    """Return an engine on a decoder, not started, and what checks requests to it. `say` shows notes to a person."""
    from lrt_deploy.runtime.serving import openai_api
    from lrt_deploy.runtime.serving.engine import Engine
    from lrt_deploy.runtime.serving.prefix_states import PrefixStates, StateFolder

    name = api.served_model_name or bundle.resolve().name
    settings = openai_api.ApiOptions(name, api.prefill, api.tolerance, api.implicit_bos, api.max_tokens_limit)
    checked = openai_api.Api(decoder, settings)
    folder = None if api.state_dir is None else StateFolder(api.state_dir, say)
    return Engine(decoder, api.slots, max_waiting, PrefixStates(api.state_bytes), folder), checked


def _handle_signals(server: Server, drain_seconds: float) -> None:
    """Drain at the first signal, end at the second."""
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        if len(received) > 1:
            server.log.put(f"ended by a second {signal.Signals(number).name}; running answers are lost")
            server.log.flush(_FLUSH_SECONDS)
            os._exit(128 + number)
        server.log.put(
            f"{signal.Signals(number).name}: draining for at most {drain_seconds:g} s; a second one ends at once"
        )
        server.drain(drain_seconds)

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
