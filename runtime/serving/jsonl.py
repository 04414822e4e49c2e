"""Batches of requests in a file: OpenAI's batch format, run on the engine without HTTP.

A line of the input is `{"custom_id", "method", "url", "body"}`; each has one line of output, in the order in which they
are finished. The output is the progress: a run that was killed goes on after the lines that are there, and a last line
that is torn is dropped. A request that is wrong, or that memory does not suffice for, has an error as its answer. An
error of the backend that concerns all requests ends the run, and they have no line.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import queue
import stat
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import msgspec

from lrt_deploy.errors import BackendError, InputError, NonFiniteError
from lrt_deploy.fields import convert, shown
from lrt_deploy.files import open_regular, try_lock

from .answers import Answer
from .engine import Delivery, Engine, RequestError
from .openai_api import Api, Call
from .request_fields import ApiError, Failure, json_value

MAX_LINE_BYTES = 64 * 2**20
_BEGINNING = b'{"id":"batch_req_'  # of every line of the output
_WAITING = 2  # requests in the engine for each slot, so that none is empty

Progress = Callable[[str, int, int], None]
Append = Callable[[bytes], None]  # to the output


class Line(msgspec.Struct):
    """One request of the input."""

    custom_id: str
    body: dict[str, Any]
    url: Literal["/v1/completions", "/v1/chat/completions"]
    method: Literal["POST"] = "POST"


class _Result(msgspec.Struct):
    """What is read of a line of the output."""

    custom_id: str
    response: dict[str, Any]


@dataclass
class Counts:
    """Requests of a run by what became of them, and the tokens of its answers."""

    requests: int = 0
    skipped: int = 0  # finished by an earlier run
    answered: int = 0
    failed: int = 0  # answered with an error
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Done(NamedTuple):
    """An answer that is complete."""

    line: Line
    call: Call
    delivery: Delivery


def run(engine: Engine, api: Api, source: Path, target: Path, progress: Progress) -> Counts:
    """Answer all requests of `source` into `target`, which is continued if it exists.

    Raises InputError for lines that are no requests, before anything is run, for a target that is something else, and
    for one that cannot be written any further; what stands in it by then is skipped by the next run.
    """
    counts = Counts(requests=sum(1 for _ in read_requests(source)))
    with _output(target) as (append, finished):
        runner = _Runner(engine, api, append, counts, progress)
        for line in read_requests(source):
            if line.custom_id in finished:
                counts.skipped += 1
            else:
                runner.submit(line)
        runner.finish()
    return counts


class _Runner:
    """Keeps the engine's slots full and writes what comes out."""

    def __init__(self, engine: Engine, api: Api, append: Append, counts: Counts, progress: Progress) -> None:
        self._engine, self._api, self._append, self._counts, self._progress = engine, api, append, counts, progress
        self._done: queue.SimpleQueue[_Done] = queue.SimpleQueue()
        self._running = 0
        self._unrun: list[_Done] = []  # without an answer for lack of memory, until one later shows that it was theirs

    def submit(self, line: Line) -> None:
        """Start a request, when there is room for it."""
        parse = self._api.parse_chat if line.url == "/v1/chat/completions" else self._api.parse_completion
        try:
            call = parse(line.body)
            if call.stream:
                raise ApiError("stream is true, and a batch has no streams", "stream")
        except InputError as error:
            self._write(line, None, Failure.of(error))
            return
        while self._running and self._engine.outstanding + call.request.size > _WAITING * self._engine.slots:
            self._take()  # an output that is full ends the run; it is no error of this line
        try:
            self._engine.submit(call.request, lambda delivery: self._done.put(_Done(line, call, delivery)))
        except InputError as error:
            self._write(line, None, Failure.of(error))
            return
        self._running += 1

    def finish(self) -> None:
        """Write what still runs."""
        while self._running:
            self._take()
        self._write_unrun()

    def _take(self) -> None:
        """Wait for an answer, and write it."""
        while True:
            with contextlib.suppress(queue.Empty):
                done = self._done.get(timeout=0.5)
                break
            self._show()  # raises a signal whose exception got lost
        self._running -= 1
        error = done.delivery.error
        if isinstance(error, BackendError) and not isinstance(error, (NonFiniteError, RequestError)):
            raise error
        if isinstance(error, RequestError):
            self._unrun.append(done)
            return
        if error is not None:
            self._write(done.line, done.call.id, Failure.of(error))
            return
        self._write_unrun()
        answer = Answer(done.call, self._api.tokenizer)
        answer.add(done.delivery)
        body = answer.body()
        self._counts.prompt_tokens += body["usage"]["prompt_tokens"]
        self._counts.completion_tokens += body["usage"]["completion_tokens"]
        self._write(done.line, done.call.id, body)

    def _write_unrun(self) -> None:
        """Write the errors of requests that memory did not suffice for; a run that ends with the backend drops them."""
        while self._unrun:
            done = self._unrun.pop(0)
            assert done.delivery.error is not None
            self._write(done.line, done.call.id, Failure.of(done.delivery.error))

    def _write(self, line: Line, call: str | None, answer: dict[str, Any] | Failure) -> None:
        """Append a line to the output, in one piece."""
        status, body = (answer.status, answer.body()) if isinstance(answer, Failure) else (200, answer)
        response = {"status_code": status, "request_id": call, "body": body}
        result = {"custom_id": line.custom_id, "response": response, "error": None}
        text = msgspec.json.encode({"id": f"batch_req_{uuid.uuid4().hex}"} | result)
        self._append(text + b"\n")
        if isinstance(answer, Failure):
            self._counts.failed += 1
        else:
            self._counts.answered += 1
        self._show()

    def _show(self) -> None:
        counts = self._counts
        self._progress("requests", counts.skipped + counts.answered + counts.failed, counts.requests)


def read_requests(path: Path) -> Iterator[Line]:
    """Yield the requests of a file; raises InputError that names the line that is none, or has an id twice."""
    seen = set()
    with open_regular(path, "the input", InputError) as file:
        for number, text in enumerate(_lines(file), 1):
            name = f"line {number} of {path}"
            if not text.strip():
                continue
            if len(text) > MAX_LINE_BYTES:
                raise InputError(f"{name} has more than {MAX_LINE_BYTES} bytes, the most that are accepted")
            line = _line(Line, text, name)
            if line.custom_id in seen:
                raise InputError(f"{name} has the custom_id {shown(line.custom_id)}, which an earlier line has too")
            seen.add(line.custom_id)
            yield line


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE_BYTES + 2):
        yield line


def _line(kind: type[Any], text: bytes, name: str) -> Any:  # noqa: ANN401 - of the kind that is given
    try:
        return convert(kind, json_value(text, name))
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error


@contextlib.contextmanager
def _output(path: Path) -> Iterator[tuple[Append, set[str]]]:
    """Open the output without a torn last line; gives what appends to it, and the ids that are finished."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        number = os.open(path, flags, 0o666)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"the output {path} cannot be written: {reason}") from error
    if not stat.S_ISREG(os.fstat(number).st_mode):  # before `fdopen`, which refuses what cannot seek
        os.close(number)
        raise InputError(f"the output {path} is no regular file; a run is continued by what stands in it")
    with os.fdopen(number, "r+b", buffering=0) as file:  # no buffer that would be written again when it is closed
        if try_lock(number) is False:
            raise InputError(f"the output {path} is being written by another run; wait for its end")
        reader = io.BufferedReader(file)
        finished, end = _finished(reader, path)
        reader.detach()
        file.truncate(end)
        file.seek(end)
        yield functools.partial(_append, number, path), finished


def _append(number: int, path: Path, text: bytes) -> None:
    """Write a line at the end of the output; part of it may stand there after an error, and the next run drops it."""
    while text:
        try:
            text = text[os.write(number, text) :]
        except OSError as error:
            raise InputError(
                f"the output {path} cannot be written any further: {error.strerror}; the answers that stand in it "
                "stay, and the same command goes on after them when there is room"
            ) from error


def _finished(file: BinaryIO, path: Path) -> tuple[set[str], int]:
    """Return the ids of the complete lines of an output, and where they end."""
    finished, end = set(), 0
    for number, text in enumerate(_lines(file), 1):
        name = f"line {number} of {path}"
        if not text.endswith(b"\n"):
            if text[: len(_BEGINNING)] != _BEGINNING[: len(text)]:
                raise InputError(f"{name} is no result of a batch; name a new file for the output")
            break
        finished.add(_line(_Result, text, name).custom_id)
        end += len(text)
    return finished, end
