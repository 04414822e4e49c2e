"""`lrt-deploy serve`: an HTTP server with OpenAI's API on one bundle. Reads options and signals.

The first SIGTERM or SIGINT drains: the server is not ready, running answers end, the exit code is 0. A second one ends
the process at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrt_deploy.errors import InputError

from . import options, output

if TYPE_CHECKING:
    from pathlib import Path

    from lrt_deploy.runtime.decoder import Decoder
    from lrt_deploy.runtime.serving.engine import Engine
    from lrt_deploy.runtime.serving.openai_api import Api
    from lrt_deploy.runtime.serving.server import Server

API_KEY = "LRT_DEPLOY_API_KEY"
MAX_WAITING = 256
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _serving(*names: str, help: str, **settings: Any) -> Any:  # noqa: ANN401 - as typer calls it
    return typer.Option(*names, help=help, rich_help_panel="The server", **settings)


@dataclass(frozen=True)
class ApiOptions:
    """What the API does where a request is silent; the same for `serve` and `batch`."""

    slots: Annotated[int | None, _serving(help="Continuations that run at a time; default: all of the bundle.")] = None
    served_model_name: Annotated[
        str | None, _serving(metavar="NAME", help="Name of the model in requests; default: the bundle's folder.")
    ] = None
    max_tokens_limit: Annotated[int | None, _serving(help="Most new tokens that a request may ask for.")] = None
    implicit_bos: Annotated[
        bool, _serving("--implicit-bos", help="Put <|bos|> in front of token prompts that lack it.")
    ] = False
    prefill: options.Prefill = "auto"
    tolerance: options.Tolerance = None

    def __post_init__(self) -> None:
        options.check_tolerance(self.tolerance)
        if self.max_tokens_limit is not None and self.max_tokens_limit < 1:
            raise InputError(f"max_tokens_limit is {self.max_tokens_limit}, expected at least 1")


def serve(
    bundle: options.BundlePath,
    *,
    host: Annotated[str, _serving(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, _serving(help="Port to listen on; 0 takes a free one.")] = 8000,
    max_waiting: Annotated[
        int, _serving(help="Continuations that may wait for a slot; more are refused.")
    ] = MAX_WAITING,
    api_key: Annotated[
        str | None, _serving(metavar="KEY", envvar=API_KEY, help="Key that clients must send; better set by variable.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, _serving(metavar="URL", help="Origin of web pages that may call; repeatable.")
    ] = None,
    drain_seconds: Annotated[float, _serving(help="Time for running answers after SIGTERM.")] = 30.0,
    api: ApiOptions,
    opening: options.DecoderOptions,
    json: options.Json = False,
) -> None:
    """Serve a bundle over HTTP with OpenAI's API. With --json the address is printed as one document."""
    from lrt_deploy.runtime.serving.app import AppOptions
    from lrt_deploy.runtime.serving.server import Server, listen

    if api_key == "":
        raise InputError(f"the API key is empty; set {API_KEY} to a text, or leave it out for a server without a key")
    listener = listen(host, port)
    with listener, opening.open(bundle) as decoder:
        engine, checked = engine_of(decoder, bundle, api, max_waiting)
        server = Server(engine, checked, AppOptions(api_key, tuple(cors_origin or ())))
        address = f"[{host}]" if ":" in host else host
        about = {
            "url": f"http://{address}:{listener.getsockname()[1]}",
            "model": checked.options.model,
            "slots": engine.slots,
            "backend": decoder.backend,
            "precision": decoder.precision,
        }

        def started() -> None:
            if json:
                output.document(about)
            output.say("serving {model} on {url} ({backend}, {precision}, {slots} slots)".format(**about))

        async def run() -> None:
            _handle_signals(server, drain_seconds)
            await server.run(listener, started)

        asyncio.run(run())


def engine_of(decoder: Decoder, bundle: Path, api: ApiOptions, max_waiting: int = MAX_WAITING) -> tuple[Engine, Api]:
    """Return an engine on a decoder, not started, and what checks requests to it."""
    from lrt_deploy.runtime.serving import openai_api
    from lrt_deploy.runtime.serving.engine import Engine

    name = api.served_model_name or bundle.resolve().name
    settings = openai_api.ApiOptions(name, api.prefill, api.tolerance, api.implicit_bos, api.max_tokens_limit)
    return Engine(decoder, api.slots, max_waiting), openai_api.Api(decoder, settings)


def _handle_signals(server: Server, drain_seconds: float) -> None:
    """Drain at the first signal, end at the second."""
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        if len(received) > 1:
            output.say(f"ended by a second {signal.Signals(number).name}; running answers are lost")
            os._exit(128 + number)
        output.say(
            f"{signal.Signals(number).name}: draining for at most {drain_seconds:g} s; a second one ends at once"
        )
        server.drain(drain_seconds)

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
