"""A model of Triton's Python backend: requests in the tensors of its vLLM backend, run by the engine of this package.

The engine batches by itself; Triton hands over each request at once (`execute`) and takes its responses whenever they
come (the model is decoupled). Only `_Responses`, a thread, talks to Triton's response senders: it sends, and asks now
and then whether a client has left. Sampling parameters are those of `/v1/completions`, by the same checks.

The module of the backend exists in its own processes only, so the packaged `model.py` passes it in.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lrt_deploy.errors import BackendError, Busy, LRTDeployError
from lrt_deploy.runtime.decoder import open_decoder
from lrt_deploy.runtime.generation import NO_TOKEN

from .answers import REASONS
from .engine import Deliver, Delivery, Engine
from .openai_api import Api, ApiOptions, Call
from .prefix_states import PrefixStates
from .request_fields import ApiError, json_value

BUNDLE = "bundle"  # in the folder of the model's version
_CANCEL_SECONDS = 0.02  # between two questions whether clients have left; each is a message to Triton
_DRAIN_SECONDS = 20.0  # for running requests when the model is unloaded
_FLAGS = ("stream", "exclude_input_in_output")
_RETURNS = ("finish_reason", "cumulative_logprob", "num_input_tokens", "num_output_tokens", "token_ids")
METRICS = {
    "lrt_steps_total": "Decode steps.",
    "lrt_generated_tokens_total": "Tokens that were generated; by the steps, the rows of a batch.",
    "lrt_running": "Continuations that have a slot.",
    "lrt_waiting": "Continuations that wait for a slot.",
}
# Sampling parameters of vLLM that are not supported, and the values that ask for nothing.
_REFUSED: dict[str, tuple[object, ...]] = {
    "bad_words": (None, []),
    "guided_decoding": (None,),
    "structured_outputs": (None,),
    "include_stop_str_in_output": (None, False),
    "logprobs": (None, False),
    "lora_name": (None,),
    "min_tokens": (None, 0),
    "prompt_logprobs": (None,),
    "skip_special_tokens": (None, True),
    "stop_token_ids": (None, []),
}


@dataclass(frozen=True)
class Inputs:
    """The input tensors of a request; `returns` are the outputs that it asks for beside the text."""

    text: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    prepend: bool = False  # the prompt before the answer
    returns: frozenset[str] = frozenset()

    @classmethod
    def read(cls, tensor: Callable[[str], Any]) -> Inputs:
        """Read the values of a request; `tensor` returns an input's array, or None. Raises ApiError."""
        values = {name: _flag(tensor(name), name) for name in (*_FLAGS, *(f"return_{name}" for name in _RETURNS))}
        if _flag(tensor("return_logprobs"), "return_logprobs"):
            raise ApiError("return_logprobs is true, which this model does not support; leave it out")
        text = _text(tensor("text_input"), "text_input")
        sampling = _text(tensor("sampling_parameters"), "sampling_parameters", "{}")
        stream, exclude = bool(values["stream"]), values["exclude_input_in_output"]
        if stream and exclude is False:
            raise ApiError("exclude_input_in_output is false, which streams cannot have; leave it out, or set it")
        parameters = json_value(sampling.encode(), "sampling_parameters")
        if not isinstance(parameters, dict):
            raise ApiError("sampling_parameters is no JSON object")
        returns = frozenset(name for name in _RETURNS if values[f"return_{name}"])
        return cls(text, parameters, stream, not stream and not exclude, returns)

    def body(self) -> dict[str, Any]:
        """Return the body of `/v1/completions` that asks for the same."""
        for name, silent in _REFUSED.items():
            if self.sampling.get(name) not in silent:
                raise ApiError(f"sampling_parameters: {name} is not supported by this model")
        ours = {"model", "prompt", "stream", "stream_options", "echo", *_REFUSED}
        given = {name: value for name, value in self.sampling.items() if name not in ours}
        return given | {"prompt": self.text, "stream": self.stream}


def _flag(value: Any, name: str) -> bool | None:  # noqa: ANN401 - an array of one value
    """Return a boolean input; None where it is not given."""
    if value is None:
        return None
    if value.size != 1:
        raise ApiError(f"{name} has {value.size} values, expected one")
    return bool(value.reshape(-1)[0])


def _text(value: Any, name: str, default: str | None = None) -> str:  # noqa: ANN401
    """Return a text input."""
    if value is None and default is not None:
        return default
    if value is None or value.size != 1:
        raise ApiError(f"{name} has {0 if value is None else value.size} texts, expected one")
    data = value.reshape(-1)[0]
    try:
        return data if isinstance(data, str) else bytes(data).decode()
    except UnicodeDecodeError as error:
        raise ApiError(f"{name} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from error


@dataclass(eq=False)
class Running:
    """A request that was taken: where its responses go, and what has come that was not sent yet."""

    sender: Any
    inputs: Inputs
    call: Call
    ticket: Any = None
    texts: list[str] = field(init=False)  # of each continuation, as the next three
    tokens: list[list[int]] = field(init=False)
    logprobs: list[float] = field(init=False)
    reasons: list[str] = field(init=False)
    ended: bool = False
    error: LRTDeployError | None = None

    def __post_init__(self) -> None:
        count = self.call.request.size
        self.texts = [self.inputs.text if self.inputs.prepend else ""] * count
        self.tokens, self.logprobs, self.reasons = [[] for _ in range(count)], [0.0] * count, ["None"] * count

    def add(self, delivery: Delivery) -> None:
        """Take in events."""
        self.ended, self.error = delivery.last, delivery.error
        for index, event in delivery.events:
            self.texts[index] += event.text
            if event.token != NO_TOKEN:
                self.tokens[index].append(event.token)
                self.logprobs[index] += event.logprob
            if event.finish_reason is not None:
                self.reasons[index] = REASONS[event.finish_reason]

    def outputs(self) -> dict[str, Any]:
        """Return the arrays of a response with what is new: those that the request asks for."""
        found = {
            "text_output": np.array([text.encode() for text in self.texts], dtype=object),
            "finish_reason": np.array([reason.encode() for reason in self.reasons], dtype=object),
            "cumulative_logprob": np.array(self.logprobs, dtype=np.float32),
            "num_input_tokens": np.array([self.call.prompt_tokens], dtype=np.uint32),
            "num_output_tokens": np.array([len(tokens) for tokens in self.tokens], dtype=np.uint32),
            "token_ids": np.array([token for tokens in self.tokens for token in tokens], dtype=np.int32),
        }
        self.texts, self.tokens = [""] * len(self.texts), [[] for _ in self.tokens]
        return {name: array for name, array in found.items() if name == "text_output" or name in self.inputs.returns}

    @property
    def worth_sending(self) -> bool:
        """Whether something is new that the client can see."""
        seen = {"num_output_tokens", "token_ids"} & self.inputs.returns
        return any(self.texts) or (bool(seen) and any(self.tokens))


class TritonModel:
    """What Triton's Python backend calls; `backend` is its module `triton_python_backend_utils`."""

    backend: Any = None

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle beside `model.py` and start the engine. Parameters of the model's config are options."""
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        whole = {
            name: int(given[name]) for name in ("threads", "slots", "max_waiting", "state_bytes") if given.get(name)
        }
        folder = Path(args["model_repository"], args["model_version"], BUNDLE)
        self.decoder = open_decoder(
            folder,
            backend=given.get("backend", "ort-cpu"),
            precision=given.get("precision") or None,
            threads=whole.get("threads"),
        )
        self.api = Api(self.decoder, ApiOptions(args["model_name"]))
        self.responses = _Responses(self.backend, {"model": args["model_name"], "version": args["model_version"]})
        states = PrefixStates(whole.get("state_bytes", 2**30))
        self.engine = Engine(
            self.decoder, whole.get("slots"), whole.get("max_waiting", 256), states, post=self.responses.post
        )
        self.responses.start(self.engine)
        self.engine.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests; their responses are sent later. Inputs are read here: they are gone afterwards."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._take(request, sender)
            except LRTDeployError as error:
                self.responses.refuse(sender, error)

    def _take(self, request: Any, sender: Any) -> None:  # noqa: ANN401
        """Check a request and give it to the engine."""

        def tensor(name: str) -> Any:  # noqa: ANN401
            found = self.backend.get_input_tensor_by_name(request, name)
            return None if found is None else found.as_numpy()

        inputs = Inputs.read(tensor)
        call = self.api.parse_completion(inputs.body())
        if call.choices != call.request.size:
            raise ApiError("sampling_parameters: best_of is not supported by this model, only n")
        running = Running(sender, inputs, call)
        deliver = self.responses.deliver_to(running)
        try:
            running.ticket = self.engine.submit(call.request, deliver)
        except LRTDeployError:
            self.responses.forget(running)
            raise

    def finalize(self) -> None:
        """Let running requests end, at most some seconds, and close the bundle."""
        self.engine.drain()
        if not self.engine.wait_until_idle(_DRAIN_SECONDS):
            self.engine.end_all()
            self.engine.wait_until_idle(_DRAIN_SECONDS)
        self.engine.stop()
        self.responses.stop()
        self.decoder.close()


class _Responses:
    """A thread that sends what the engine delivers, and tells it which clients have left."""

    def __init__(self, backend: Any, labels: Mapping[str, str]) -> None:  # noqa: ANN401
        self._backend, self._labels = backend, labels
        self._found: queue.SimpleQueue[Sequence[tuple[Deliver, Delivery]] | None] = queue.SimpleQueue()
        self._open: dict[Running, None] = {}  # requests whose last response was not sent
        self._changed: dict[Running, None] = {}  # those for which something new has come
        self._thread = threading.Thread(target=self._run, name="responses", daemon=True)

    def start(self, engine: Engine) -> None:
        """Start the thread."""
        self._engine = engine
        self._metrics = _Metrics(self._backend, self._labels, engine)
        self._thread.start()

    def stop(self) -> None:
        """End the thread when all was sent."""
        self._found.put(None)
        self._thread.join()

    def post(self, deliveries: Sequence[tuple[Deliver, Delivery]]) -> None:
        """Queue deliveries; called by the engine."""
        self._found.put(deliveries)

    def deliver_to(self, running: Running) -> Deliver:
        """Return what sends the deliveries of a request; its cancellation is watched from now on."""
        self._do(lambda: self._open.setdefault(running))
        return partial(self._add, running)

    def forget(self, running: Running) -> None:
        """Send nothing for a request."""
        self._do(lambda: self._open.pop(running, None))

    def refuse(self, sender: Any, error: LRTDeployError) -> None:  # noqa: ANN401
        """Answer a request with an error."""
        self._do(lambda: self._guard(partial(self._send_error, sender, error)))

    def _do(self, action: Callable[[], object]) -> None:
        """Queue something for the thread."""

        def run(_: Delivery) -> None:
            action()

        self._found.put([(run, Delivery((), False))])

    def _run(self) -> None:
        asked = 0.0
        while True:
            found = list[Sequence[tuple[Deliver, Delivery]] | None]()
            with contextlib.suppress(queue.Empty):
                found.append(self._found.get(timeout=_CANCEL_SECONDS if self._open else None))
                while True:
                    found.append(self._found.get_nowait())
            for deliver, delivery in (pair for deliveries in found if deliveries is not None for pair in deliveries):
                deliver(delivery)
            while self._changed:
                running, _ = self._changed.popitem()
                self._guard(partial(self._send, running))
            if (now := time.monotonic()) - asked >= _CANCEL_SECONDS or not self._open:
                asked = now
                for running in [*self._open]:
                    self._guard(partial(self._end_if_cancelled, running))
                self._guard(self._metrics.report)
            if None in found:
                return

    def _guard(self, action: Callable[[], object]) -> None:
        """Do something; what Triton raises ends no other request."""
        try:
            action()
        except Exception as error:
            self._backend.Logger.log_error(f"Triton took no response or metric: {error!r}")

    def _add(self, running: Running, delivery: Delivery) -> None:
        """Take in what has come for a request, unless it was cancelled."""
        if running in self._open:
            running.add(delivery)
            self._changed[running] = None

    def _send(self, running: Running) -> None:
        """Send what is new of a request: what has come while others were sent is one response."""
        if running.ended:
            del self._open[running]
        if running.error is not None:
            self._send_error(running.sender, running.error)
        elif running.ended or running.worth_sending:
            tensors = [self._backend.Tensor(name, array) for name, array in running.outputs().items()]
            flags = self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL if running.ended else 0
            running.sender.send(self._backend.InferenceResponse(output_tensors=tensors), flags=flags)

    def _end_if_cancelled(self, running: Running) -> None:
        """Cancel a request whose client has left."""
        if running.ticket is not None and running.sender.is_cancelled():
            del self._open[running]
            self._engine.cancel(running.ticket)
            self._fail(running.sender, "the request was cancelled", "CANCELLED")

    def _send_error(self, sender: Any, error: LRTDeployError) -> None:  # noqa: ANN401
        self._fail(sender, str(error), "UNAVAILABLE" if isinstance(error, Busy | BackendError) else "INVALID_ARG")

    def _fail(self, sender: Any, message: str, code: str) -> None:  # noqa: ANN401
        """Send the last response of a request, an error with one of Triton's codes."""
        error = self._backend.TritonError(message, getattr(self._backend.TritonError, code))
        response = self._backend.InferenceResponse(output_tensors=[], error=error)
        sender.send(response, flags=self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class _Metrics:
    """Values of the engine on Triton's metrics page; none where Triton runs without metrics."""

    def __init__(self, backend: Any, labels: Mapping[str, str], engine: Engine) -> None:  # noqa: ANN401
        self._engine, self._families, self._metrics = engine, list[Any](), dict[str, Any]()
        self._shown = dict.fromkeys(METRICS, 0.0)
        try:
            for name, text in METRICS.items():
                kind = backend.MetricFamily.COUNTER if name.endswith("_total") else backend.MetricFamily.GAUGE
                family = backend.MetricFamily(name=name, description=text, kind=kind)
                self._metrics[name] = family.Metric(labels=dict(labels))
                self._families.append(family)  # a metric ends with its family
        except backend.TritonModelException:
            self._metrics = {}

    def report(self) -> None:
        """Bring the page up to date; each value that has changed is a message to Triton."""
        counts, stats = self._engine.metrics, self._engine.stats()
        values = {"lrt_steps_total": counts.steps, "lrt_generated_tokens_total": counts.generated_tokens}
        values |= {name: int(stats[name][1]) for name in ("lrt_running", "lrt_waiting")}
        for name, metric in self._metrics.items():
            if (value := values[name]) != (shown := self._shown[name]):
                metric.increment(value - shown) if name.endswith("_total") else metric.set(value)
                self._shown[name] = value
