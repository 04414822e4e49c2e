"""Parse a graph into a TensorRT network and build a plan from it: one plan, two optimization profiles.

Polygraphy's loaders configure and build; parsing is done here, because theirs cannot take a graph from memory whose
weights lie in a file. The library (full TensorRT or TensorRT-RTX) is the caller's choice and named in every message.
Knows neither bundles nor what a network should consist of: see `engine` and `tensorrt_proof`.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrt_deploy.bundle.engine_sidecar import Profile, Range
from lrt_deploy.bundle.tensorrt_flavours import TensorRTFlavour, collecting_logger
from lrt_deploy.errors import EngineError
from lrt_deploy.files import atomic_write, read_bytes

from .tensorrt_log import BuildLog, Cancellation, Progress, progress_monitor, run_interruptibly

# What TensorRT says where attention has a shape or type that none of its fused kernels is for.
_LARGEST_CACHE = 2**30  # bytes; measured times of one model take a few MB
_NO_FUSED_KERNEL = "not supported by a dedicated kernel"


class NoFusedAttentionError(EngineError):
    """The network's attention would have to be decomposed, and must not be."""


@dataclass
class Parsed:
    """A network, and what must live as long as it does."""

    trt: Any
    builder: Any
    network: Any
    parser: Any
    log: BuildLog


@dataclass(frozen=True)
class Plan:
    """What was built: the plan's bytes, and the flags that TensorRT was given."""

    data: memoryview
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """What the builder is told beside the profiles.

    `workspace_bytes` bounds the scratch memory of a layer; None: TensorRT's own limit. `timing_cache` is read where it
    exists and replaced after the build.
    """

    workspace_bytes: int | None = None
    timing_cache: Path | None = None


def parse(
    flavour: TensorRTFlavour, model: bytes, weights_beside: Path, listener: Callable[[str, str], None] | None = None
) -> Parsed:
    """Parse ONNX bytes, whose external weights lie beside the file `weights_beside`, into a strongly typed network.

    `listener` is called with severity and text of every message of TensorRT, during the build as well.
    """
    trt, log = flavour.load(), BuildLog(listener=listener)
    logger = collecting_logger(trt, log.take)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not run_interruptibly(lambda: bool(parser.parse(model, path=str(weights_beside))), Cancellation()):
        raise EngineError(
            f"{flavour.backend} {trt.__version__} cannot parse {weights_beside}: {'; '.join(_parser_errors(parser))}"
        )
    return Parsed(trt, builder, network, parser, log)


def build(
    flavour: TensorRTFlavour,
    parsed: Parsed,
    profiles: Sequence[Profile],
    settings: Settings,
    progress: Progress,
) -> Plan:
    """Build a plan with these profiles.

    What `progress` raises, and an interrupt of this thread, cancel the build and pass through.
    """
    cancellation = Cancellation()
    polygraphy = _polygraphy(flavour)
    shapes = [polygraphy_profile(polygraphy, parsed.network, profile) for profile in profiles]
    cache = settings.timing_cache
    limits = {parsed.trt.MemoryPoolType.WORKSPACE: settings.workspace_bytes} if settings.workspace_bytes else None
    with _quiet(), _errors_named(flavour, parsed):
        config = polygraphy.CreateConfig(
            profiles=shapes,
            memory_pool_limits=limits,
            progress_monitor=progress_monitor(parsed.trt, progress, cancellation),
        )(parsed.builder, parsed.network)
        if cache is not None:  # Polygraphy would leave a lock file beside it
            known = read_bytes(cache, "the timing cache", EngineError, _LARGEST_CACHE) if cache.exists() else b""
            config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
        flags = tuple(sorted(_flags(parsed.trt, config, parsed.network)))
        loader = polygraphy.EngineBytesFromNetwork((parsed.builder, parsed.network, parsed.parser), config)
        plan = Plan(memoryview(run_interruptibly(loader, cancellation)), flags)
        if cache is not None:
            with atomic_write(cache) as partial:
                partial.write_bytes(bytes(config.get_timing_cache().serialize()))
        return plan


def input_shapes(network: Any, sizes: Mapping[str, Range]) -> dict[str, tuple[tuple[int, ...], ...]]:  # noqa: ANN401
    """Smallest, typical and largest shape of every network input, from the sizes of its symbolic dimensions."""
    shapes = {}
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        dims = [(size, tensor.get_dimension_name(axis)) for axis, size in enumerate(tensor.shape)]
        unknown = [name for size, name in dims if size < 0 and name not in sizes]
        if unknown:
            raise EngineError(
                f"input {tensor.name} has the free dimension {unknown[0]}, profiles give {', '.join(sizes)}"
            )
        shapes[str(tensor.name)] = tuple(
            tuple(sizes[name][which] if size < 0 else int(size) for size, name in dims) for which in range(3)
        )
    return shapes


def polygraphy_profile(polygraphy: Any, network: Any, profile: Profile) -> Any:  # noqa: ANN401
    """One of our profiles as one of Polygraphy's."""
    result = polygraphy.Profile()
    for name, (smallest, typical, largest) in input_shapes(
        network, {"batch": profile.batch, "tokens": profile.tokens}
    ).items():
        result.add(name, min=smallest, opt=typical, max=largest)
    return result


def _polygraphy(flavour: TensorRTFlavour) -> Any:  # noqa: ANN401
    """Polygraphy's TensorRT loaders. It decides once per process, when they are imported, which library they drive."""
    settings: Any = importlib.import_module("polygraphy.config")
    rtx = flavour.backend == "tensorrt-rtx"
    if "polygraphy.backend.trt" in sys.modules and rtx != settings.USE_TENSORRT_RTX:
        raise EngineError(
            f"this process has already used Polygraphy with another TensorRT than {flavour.backend}; "
            "build in a process of its own"
        )
    settings.USE_TENSORRT_RTX = rtx
    return importlib.import_module("polygraphy.backend.trt")


@contextmanager
def _quiet() -> Iterator[None]:
    """Polygraphy writes to stdout, which is the answer's, and uses what TensorRT-RTX calls deprecated."""
    log = importlib.import_module("polygraphy.logger").G_LOGGER
    with log.verbosity(log.CRITICAL + 1), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextmanager
def _errors_named(flavour: TensorRTFlavour, parsed: Parsed) -> Iterator[None]:
    refused = importlib.import_module("polygraphy.exception").PolygraphyException
    try:
        yield
    except refused as error:
        words = parsed.log.last_words()
        kind = NoFusedAttentionError if _NO_FUSED_KERNEL in words else EngineError
        raise kind(f"{flavour.backend} {parsed.trt.__version__} built no plan: {words}") from error


def _parser_errors(parser: Any) -> Iterator[str]:  # noqa: ANN401
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        yield f"node {error.node_name() or error.node()} ({error.node_operator()}): {' '.join(error.desc().split())}"


def _flags(trt: Any, config: Any, network: Any) -> Iterator[str]:  # noqa: ANN401
    """Names of all flags that are set, of the configuration and of the network."""
    for name, flag in trt.BuilderFlag.__members__.items():
        if config.get_flag(flag):
            yield str(name)
    if network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED):
        yield "STRONGLY_TYPED"
