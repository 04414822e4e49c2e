"""Parse a graph into a TensorRT network and build a plan from it: one plan, two optimization profiles.

The network is parsed from a copy of the bundle's `full` graph, edited for TensorRT: cache slots become a fixed number
(TensorRT updates a cache in place only then), `rows` becomes 1, and attention that has no fused kernel may be
decomposed. The copy lives in memory; its weights stay in the bundle's file.

Polygraphy's loaders configure and build; parsing is done here, because theirs cannot take a graph from memory whose
weights lie in a file. Nothing is printed.
"""

from __future__ import annotations

import importlib
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lrt_deploy.bundle.engine_sidecar import Profile
from lrt_deploy.bundle.tensorrt_libraries import TensorRTLibrary, collecting_logger
from lrt_deploy.errors import EngineError
from lrt_deploy.files import atomic_write, read_bytes


def tensorrt_copy(graph: Path, capacity: int, decompose: bool = False) -> bytes:
    """Return the graph as `passes.for_tensorrt` edits it, as ONNX bytes that name its weights file as it does."""
    import onnx_ir as ir

    from lrt_deploy.exporters.graph.passes import for_tensorrt

    try:
        model = ir.load(graph)
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read the graph {graph}: {error}; export the bundle again") from error
    for node in model.graph:
        if dropped := _dropped(node):
            raise EngineError(
                f"{graph}: {node.name} has {dropped}, which TensorRT's parser drops without a message; expected are "
                "queries, keys, values and a mask; export the bundle again"
            )
    for_tensorrt(model, capacity, decompose)
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


_KNOWN = {"scale", "q_num_heads", "kv_num_heads", "qk_matmul_output_mode", "softmax_precision"}


def _dropped(node: Any) -> str | None:  # noqa: ANN401 - an `ir.Node`
    """Return what of an Attention changes its numbers and is dropped, or read otherwise, by TensorRT; None if nothing.

    Lengths (`nonpad_kv_seqlen`) and `left_window_size` are dropped; `is_causal` has two readings beside a cache.
    """
    if node.op_type != "Attention":
        return None
    if len(node.inputs) > 4 and (extra := [value.name for value in node.inputs[4:] if value is not None]):
        return f"the input {extra[0]}"
    changed = [name for name, attribute in node.attributes.items() if name not in _KNOWN and attribute.value]
    return f"the attribute {changed[0]}" if changed else None


Progress = Callable[[str, int, int], None]
Listener = Callable[[str, str], None]  # called with severity and text of a message of TensorRT
T = TypeVar("T")

_KEPT = 40  # messages of a kind; a build repeats itself
_STOPPING_S = 2.0  # how long an interrupted build is waited for
_SERIOUS = ("INTERNAL_ERROR", "ERROR")
# TensorRT says so of every int64 input; the contract says that they are int64.
_EXPECTED = re.compile(r"Make sure input \S+ has Int64 binding")
_MEMORY = re.compile(r"Total (Activation|Scratch|Weights|Host Persistent|Device Persistent) Memory: (\d+) bytes")


@dataclass
class BuildLog:
    """TensorRT's errors and warnings, each text once, and its memory figures in order."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    memory: dict[str, list[int]] = field(default_factory=dict)
    fused_layers: str = ""  # the list of the plan's layers, one a line
    listener: Listener | None = None  # called with every message as it comes

    def take(self, severity: str, text: str) -> None:
        """Record one message."""
        if text.startswith("Layers:"):
            self.fused_layers = text
        text = " ".join(text.split())
        if self.listener is not None:
            self.listener(severity, text)
        if found := _MEMORY.search(text):
            name = f"{found[1].lower().replace(' ', '_')}_bytes"
            self.memory.setdefault(name, []).append(int(found[2]))
        if severity not in (*_SERIOUS, "WARNING") or _EXPECTED.search(text):
            return
        kept = self.errors if severity in _SERIOUS else self.warnings
        if text not in kept and len(kept) < _KEPT:
            kept.append(text)

    def error_text(self) -> str:
        """Join the errors in one line."""
        return "; ".join(self.errors[:4]) or "it gave no reason"


class Cancellation:
    """A request to stop a build, and the exception that the caller's progress function raised."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.error: BaseException | None = None

    def report(self, progress: Progress, what: str, done: int, total: int) -> None:
        """Call `progress`. What it raises stops the build: TensorRT would swallow it."""
        try:
            progress(what, done, total)
        except BaseException as error:
            self.error = self.error or error
            self.asked.set()


def progress_monitor(trt: Any, progress: Progress, cancellation: Cancellation) -> Any:  # noqa: ANN401 - chosen at run time
    """Make a TensorRT progress monitor that reports the innermost phase with steps, and stops a cancelled build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            if parent_phase is None:
                cancellation.report(progress, f"TensorRT: {phase_name.lower()}", 0, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            total = self.steps.get(phase_name, 0)
            if total > 1:
                cancellation.report(progress, f"TensorRT: {phase_name.lower()}", min(step + 1, total), total)
            return not cancellation.asked.is_set()

    return Monitor()


def run_interruptibly(work: Callable[[], T], cancellation: Cancellation) -> T:
    """Run `work` in a thread of its own, so that an interrupt reaches this one while TensorRT is busy.

    TensorRT calls back into Python, and an exception that a signal handler raises in such a call is lost. After an
    interrupt `cancellation.asked` is set; the thread is given a moment to stop and is left behind if it does not.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="tensorrt", daemon=True).start()
    try:
        wait([future])
    except BaseException:
        cancellation.asked.set()
        wait([future], _STOPPING_S)
        raise
    if cancellation.error is not None:
        raise cancellation.error
    return future.result()


_LARGEST_CACHE = 2**30  # bytes; measured times of one model take a few MB
_NO_FUSED_KERNEL = "not supported by a dedicated kernel"  # TensorRT, of attention of this shape and type


class NoFusedAttentionError(EngineError):
    """No fused kernel fits the network's attention, and it is not marked as decomposable."""


@dataclass
class Parsed:
    """A network, and the objects that must live as long as it does."""

    trt: Any
    builder: Any
    network: Any
    parser: Any
    log: BuildLog


Plan = tuple[memoryview, tuple[str, ...]]  # its bytes, and the flags that TensorRT was given


def parse(library: TensorRTLibrary, model: bytes, weights_beside: Path, listener: Listener | None = None) -> Parsed:
    """Parse ONNX bytes, whose external weights lie beside the file `weights_beside`, into a strongly typed network.

    `listener` is called with severity and text of every message of TensorRT, during the build as well.
    """
    trt, log = library.load(), BuildLog(listener=listener)
    logger = collecting_logger(trt, log.take)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not run_interruptibly(lambda: bool(parser.parse(model, path=str(weights_beside))), Cancellation()):
        raise EngineError(
            f"{library.backend} {trt.__version__} cannot parse {weights_beside}: {'; '.join(_parser_errors(parser))}"
        )
    return Parsed(trt, builder, network, parser, log)


def build(
    library: TensorRTLibrary,
    parsed: Parsed,
    profiles: Sequence[Profile],
    progress: Progress,
    workspace_bytes: int | None = None,
    cache: Path | None = None,
) -> Plan:
    """Build a plan with these profiles.

    `workspace_bytes` bounds the scratch memory of a layer; None: TensorRT's own limit. `cache` holds measured kernel
    times, and is read where it exists and replaced after the build. What `progress` raises, and an interrupt of this
    thread, cancel the build and pass through.
    """
    cancellation = Cancellation()
    polygraphy = _polygraphy(library)
    limits = {parsed.trt.MemoryPoolType.WORKSPACE: workspace_bytes} if workspace_bytes else None
    with _errors_named(library, parsed):
        config = polygraphy.CreateConfig(
            profiles=[_profile(polygraphy, parsed.network, profile) for profile in profiles],
            memory_pool_limits=limits,
            profiling_verbosity=parsed.trt.ProfilingVerbosity.DETAILED,  # lists the plan's layers
            progress_monitor=progress_monitor(parsed.trt, progress, cancellation),
        )(parsed.builder, parsed.network)
        if cache is not None:  # Polygraphy would leave a lock file beside it
            known = read_bytes(cache, "the timing cache", EngineError, _LARGEST_CACHE) if cache.exists() else b""
            config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
        if library.backend == "tensorrt-rtx":
            # Without it TensorRT-RTX may allocate while it runs, which a CUDA graph must not.
            config.set_flag(parsed.trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        flags = tuple(sorted(_flags(parsed.trt, config, parsed.network)))
        loader = polygraphy.EngineBytesFromNetwork((parsed.builder, parsed.network, parsed.parser), config)
        plan = memoryview(run_interruptibly(loader, cancellation))
        if cache is not None:
            with atomic_write(cache) as partial:
                partial.write_bytes(bytes(config.get_timing_cache().serialize()))
        return plan, flags


def _profile(polygraphy: Any, network: Any, profile: Profile) -> Any:  # noqa: ANN401
    """Return Polygraphy's profile: the smallest, typical and largest shape of every input of the network."""
    result, sizes = polygraphy.Profile(), {"batch": profile.batch, "tokens": profile.tokens}
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        dims = [(size, tensor.get_dimension_name(axis)) for axis, size in enumerate(tensor.shape)]
        if unknown := [name for size, name in dims if size < 0 and name not in sizes]:
            raise EngineError(
                f"input {tensor.name} has the free dimension {unknown[0]}, profiles give {', '.join(sizes)}"
            )
        shapes = [tuple(sizes[name][i] if size < 0 else int(size) for size, name in dims) for i in range(3)]
        result.add(str(tensor.name), *shapes)
    return result


def _polygraphy(library: TensorRTLibrary) -> Any:  # noqa: ANN401
    """Import Polygraphy's loaders, which drive one of the two libraries for the whole process."""
    settings: Any = importlib.import_module("polygraphy.config")
    rtx = library.backend == "tensorrt-rtx"
    if "polygraphy.backend.trt" in sys.modules and rtx != settings.USE_TENSORRT_RTX:
        raise EngineError(
            f"this process has already used Polygraphy with another TensorRT than {library.backend}; "
            "build in a process of its own"
        )
    settings.USE_TENSORRT_RTX = rtx
    return importlib.import_module("polygraphy.backend.trt")


@contextmanager
def _errors_named(library: TensorRTLibrary, parsed: Parsed) -> Iterator[None]:
    """Raise Polygraphy's errors as our own, and silence it: it writes to stdout and uses deprecated functions."""
    log = importlib.import_module("polygraphy.logger").G_LOGGER
    try:
        with log.verbosity(log.CRITICAL + 1), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    except importlib.import_module("polygraphy.exception").PolygraphyException as error:
        words = parsed.log.error_text()
        kind = NoFusedAttentionError if _NO_FUSED_KERNEL in words else EngineError
        raise kind(f"{library.backend} {parsed.trt.__version__} built no plan: {words}") from error


def _parser_errors(parser: Any) -> Iterator[str]:  # noqa: ANN401
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        yield f"node {error.node_name() or error.node()} ({error.node_operator()}): {' '.join(error.desc().split())}"


def _flags(trt: Any, config: Any, network: Any) -> Iterator[str]:  # noqa: ANN401
    """Yield the names of all flags that are set, of the configuration and of the network."""
    for name, flag in trt.BuilderFlag.__members__.items():
        if config.get_flag(flag):
            yield str(name)
    if network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED):
        yield "STRONGLY_TYPED"
