"""Replicas by Ray Serve: their deployment, a cluster on this machine alone, and an application for an existing one.

Ray starts replicas, restarts those that die or compute nothing, adds and removes some by the queues' depth, and drains
those that it removes. Its HTTP proxy is not used on one machine: it chooses a replica before it has seen a request's
body, and takes 6 to 10 ms. The front calls replicas through a handle of Serve's, whose router hashes conversations.

A local cluster listens on 127.0.0.1 only, sends no usage statistics, has no dashboard, and keeps its files in a
temporary folder that is removed at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lrt_deploy.errors import BackendError, Busy, InputError

# Read when Ray is imported. On the caller's event loop, by gRPC, a call takes 1.3 ms instead of 3.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",  # 15 otherwise, and the replicas are what this machine is for
}
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray import serve  # noqa: E402
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError  # noqa: E402
from ray.serve.config import AutoscalingConfig, RequestRouterConfig  # noqa: E402
from ray.serve.exceptions import BackPressureError, RayServeException  # noqa: E402
from ray.serve.handle import DeploymentHandle  # noqa: E402
from ray.serve.schema import LoggingConfig  # noqa: E402

from lrt_deploy.runtime.serving.app import AppOptions  # noqa: E402

from .front import Front, ReplicaLost  # noqa: E402
from .replica import Part, Replica, ReplicaOptions, Request  # noqa: E402

API_KEY = "LRT_DEPLOY_API_KEY"
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_HEALTH_SECONDS, _HEALTH_LIMIT_SECONDS = 2.0, 30.0
_STORE_BYTES = 100 * 10**6  # of Ray's shared memory: requests and answers are smaller, and travel by gRPC
_METRICS_SECONDS = 2.0
_LONGEST_FOLDER = 40  # of a temporary folder: Ray's sockets in it have paths of at most 107 bytes


@dataclass(frozen=True)
class Scaling:
    """How many replicas there are. With `most` above `replicas`, their number follows the requests that wait or run."""

    replicas: int = 1
    most: int | None = None
    drain_seconds: float = 30.0
    slots: int = 8  # of one replica: beyond so many requests for each, another one is started

    def __post_init__(self) -> None:
        if self.replicas < 1 or (self.most is not None and self.most < self.replicas):
            raise InputError(
                f"replicas is {self.replicas} and max_replicas {self.most}, expected at least 1, and no fewer than it"
            )

    @property
    def options(self) -> dict[str, Any]:
        """What a deployment is told."""
        if self.most is None or self.most == self.replicas:
            return {"num_replicas": self.replicas}
        limits = AutoscalingConfig(
            min_replicas=self.replicas,
            max_replicas=self.most,
            target_ongoing_requests=self.slots,
            upscale_delay_s=5.0,
            downscale_delay_s=120.0,
        )
        return {"autoscaling_config": limits}


class _ServeReplica:
    """A replica as Ray Serve runs one."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._replica = Replica(ReplicaOptions(**options))
        self._started = False

    async def start(self) -> None:
        if not self._started:
            self._started = True
            await self._replica.start()

    async def answer(self, request: tuple[Any, ...]) -> AsyncGenerator[tuple[Any, ...], None]:
        await self.start()
        async with contextlib.aclosing(self._replica.answer(Request(*request))) as parts:
            async for part in parts:
                yield tuple(part)

    async def metrics(self) -> tuple[str, str]:
        return serve.get_replica_context().replica_id.unique_id, self._replica.metrics()

    async def check_health(self) -> None:
        """Raise unless a token was computed; Ray Serve calls it, and restarts a replica after three failures."""
        await self.start()
        await self._replica.check()

    async def __del__(self) -> None:
        """End: Ray Serve calls it when no request runs any more, or the time for that is over."""
        await self._replica.close()


def deployment(options: ReplicaOptions, scaling: Scaling, gpus: float = 0) -> serve.Application:
    """Return the deployment of the replicas, each with so many GPUs."""
    most = scaling.slots + options.max_waiting
    made: Any = serve.deployment(
        _ServeReplica,
        name="replica",
        max_ongoing_requests=most,
        max_queued_requests=most,
        health_check_period_s=_HEALTH_SECONDS,
        health_check_timeout_s=_HEALTH_LIMIT_SECONDS,
        graceful_shutdown_timeout_s=scaling.drain_seconds,
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),  # type: ignore[arg-type]
        **scaling.options,
    )
    bound: serve.Application = made.bind(dataclasses.asdict(options))
    return bound


class HandleReplicas:
    """Replicas behind a handle of Ray Serve. Used in the event loop that made it."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._metrics = handle
        self._answers = handle.options(method_name="answer", stream=True)

    async def ask(self, request: Request, key: str) -> AsyncGenerator[Part, None]:
        """Yield the parts of the answer of the replica that a key belongs to; closing it cancels the request."""
        found: Any = None
        with _translated():
            found = (
                self._answers.options(session_id=key).remote(tuple(request))
                if key
                else self._answers.remote(tuple(request))
            )
        ended = False
        try:
            while True:
                with _translated():
                    try:
                        part = Part(*await anext(found))
                    except StopAsyncIteration:
                        ended = True
                        return
                ended = part.entry is not None
                yield part
                if ended:
                    return
        except ReplicaLost:
            ended = True
            raise
        finally:
            if not ended:
                found.cancel()

    async def close(self) -> None:
        """Stop what the handle runs in this event loop."""
        await self._metrics.shutdown_async()  # type: ignore[no-untyped-call]

    async def metrics(self) -> dict[str, str]:
        """Return the text of `GET /metrics` of each replica, by its name."""
        with _translated():
            response = self._metrics.broadcast("metrics")
            found = await response.results_async(timeout_s=_METRICS_SECONDS, return_exceptions=True)
            return dict(sorted(pair for pair in found if isinstance(pair, tuple)))


@contextlib.contextmanager
def _translated() -> Any:  # noqa: ANN401 - a generator, as contextmanager wants it
    """Turn Ray's errors into ours."""
    try:
        yield
    except RayActorError as error:
        raise ReplicaLost("the replica has died") from error
    except BackPressureError as error:
        raise Busy("all replicas have as many requests as they take; send the request again later") from error
    except TaskCancelledError as error:
        raise ReplicaLost("the replica ended the request") from error
    except (RayTaskError, RayServeException) as error:
        raise BackendError(f"a replica failed: {' '.join(str(error).split())[-300:]}") from error
    except TimeoutError as error:
        raise ReplicaLost("no replica answers in time") from error


def only_loopback() -> None:
    """Let Ray Serve's replicas in this process listen on 127.0.0.1; Ray runs it in each worker of a local cluster.

    Ray Serve 2.60 binds its gRPC server to all addresses and has no option for it.
    """
    from ray.serve._private import replica as module

    replica: Any = module
    bind = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))


def _prepare_start() -> int:
    """Set what `ray.init` has no arguments for; return the port for metrics, for which it has one.

    Without an autoscaler, which adds machines, and the dashboard's server, which Ray starts even without a dashboard,
    there are two processes and 250 MB less. With ports that are chosen beforehand, Ray's first process does not give up
    when its agents, which choose them otherwise, take more than 15 s to start on a busy machine.
    """
    from ray._private import node, parameter
    from ray._raylet import persist_port  # type: ignore[attr-defined]

    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    module, kind = cast(Any, parameter), cast(Any, node.Node)
    start = kind.start_ray_processes

    def start_with_ports(self: Any) -> None:  # noqa: ANN401 - Ray's node
        for name, port in ports.items():
            persist_port(self._session_dir, self._node_id, name, port)
        start(self)

    kind.start_ray_processes = start_with_ports
    kind.start_api_server = lambda self, **options: None
    export = ports["metrics_export_port"]
    chosen = {name: port for name, port in ports.items() if port != export}
    module.RayParams = functools.partial(module.RayParams, no_monitor=True, **chosen)
    return export


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [int(found.getsockname()[1]) for found in sockets]


class LocalCluster:
    """Ray on this machine, in processes of its own, while the context is open."""

    def __init__(self) -> None:
        base = tempfile.gettempdir()
        self._folder = Path(tempfile.mkdtemp(prefix="lrt-", dir=base if len(base) < _LONGEST_FOLDER else "/tmp"))  # noqa: S108

    def start(self, replicas: serve.Application) -> None:
        """Start Ray and the replicas; returns when all of them run, and raises BackendError if they do not."""
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        export = _prepare_start()
        gpus = (replicas._bound_deployment.ray_actor_options or {}).get("num_gpus", 0)
        hook = f"{__name__}.{only_loopback.__name__}"
        ray.init(
            address="local",
            num_cpus=1,
            num_gpus=None if gpus else 0,
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            _metrics_export_port=export,
            _temp_dir=str(self._folder),
            configure_logging=False,
            runtime_env={"worker_process_setup_hook": hook},
        )
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        serve.start(proxy_location="Disabled", logging_config=quiet)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            serve.run(replicas, name="lrt", route_prefix=None)
        except RuntimeError as error:
            raise BackendError(f"the replicas do not start: {' '.join(str(error).split())[-600:]}") from error

    @staticmethod
    def replicas() -> HandleReplicas:
        """Return what calls the replicas, in the running event loop."""
        return HandleReplicas(serve.get_deployment_handle("replica", app_name="lrt"))

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *error: object) -> None:
        """Drain the replicas and end all of Ray's processes."""
        try:
            if ray.is_initialized():
                serve.delete("lrt")  # drains; `serve.shutdown` would want the event loop of the handle, which is closed
        finally:
            ray.shutdown()
            shutil.rmtree(self._folder, ignore_errors=True)


class _ServeFront:
    """The front as a deployment, behind Ray Serve's proxies on an existing cluster."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    def __serve_build_asgi_app__(self) -> Any:  # noqa: ANN401 - the name that Ray Serve calls
        """Return the ASGI application."""
        return Front(HandleReplicas(self._handle), AppOptions(os.environ.get(API_KEY) or None)).asgi


def application(arguments: Mapping[str, Any]) -> serve.Application:
    """Build the application of a Serve config file, whose `args` are the fields of `ReplicaOptions`.

    `bundle` is a folder that every node has. Numbers of replicas and resources are the config file's.
    """
    known = {field.name for field in dataclasses.fields(ReplicaOptions)}
    if unknown := sorted(set(arguments) - known):
        raise InputError(f"args has {unknown[0]}, expected some of {', '.join(sorted(known))}")
    given = {"model": Path(str(arguments.get("bundle", ""))).name, **arguments}
    if not given.get("bundle"):
        raise InputError("args has no bundle, expected the folder that holds it on every node")
    replicas = deployment(ReplicaOptions(**given), Scaling(slots=given.get("slots") or 8))
    front: Any = serve.deployment(serve.ingress()(_ServeFront), name="front", ray_actor_options={"num_cpus": 0})
    bound: serve.Application = front.bind(replicas)
    return bound
