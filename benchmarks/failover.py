"""Kill replicas of `lrt-deploy serve --replicas N` while they answer chats, and compare the answers.

    python benchmarks/failover.py BUNDLE [--replicas 2] [--chats 20] [--turns 5] [--kills 20] [--folder shared]

Runs in a network namespace of its own. Four chats go on at a time, turn by turn; in some turns a replica is killed with
SIGKILL: in the middle of a stream, while it reads a prompt, or while it writes a state. A client whose answer breaks
sends the same request once more. Each answer is compared with `Decoder.generate` on the same messages, near ties
counted apart. `--folder`: `shared` is what the replicas save states in; `none`, `missing` (removed while they run),
`full` (a file system without room) and `torn` (files are cut and overwritten all the time) are what may be wrong with
it. Prints one JSON document: counts, and medians and maxima in milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import own_network
import psutil
from server_process import serving

import lrt_deploy
from lrt_deploy.files import PARTIAL

TOGETHER = 4  # chats that go on at a time
NEAR_TIE = 1e-2  # DESIGN: the margin of the two best logits, for prompts that may have been read by iterations
MODES = ("stream", "prefill", "saving")
START_SECONDS = 300
TOKENS = 48
BUSY_NS = 2_000_000  # of 20 ms: more than a replica that waits
RANDOM = random.Random()  # noqa: S311 - when a replica dies
WORDS = ("parse", "return", "value", "list", "file", "module", "class", "import", "string", "number", "loop", "index")


class Broken(Exception):  # noqa: N818
    """An answer broke, or was an error."""


class Answer(NamedTuple):
    """A whole answer, and when its first token came."""

    text: str
    reused: int
    first_at: float


@dataclass
class Client:
    """Sends one turn of a chat at a time, and counts how it went."""

    port: int
    found: Found
    events: int = 0  # of streams, of all turns

    def ask(self, messages: Sequence[dict[str, str]]) -> str:
        """Return the answer to a conversation, after at most one retry."""
        try:
            return self._once(messages).text
        except Broken as error:
            noticed = time.monotonic()
            if self.found.killed_at:
                self.found.notice_ms.append((noticed - self.found.killed_at) * 1e3)
            self.found.retries.append(str(error))
        answer = self._once(messages)
        self.found.resume_ms.append((answer.first_at - noticed) * 1e3)
        self.found.reused.append(answer.reused)
        return answer.text

    def _once(self, messages: Sequence[dict[str, str]]) -> Answer:
        body = {"messages": messages, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        text, first_at, usage = "", 0.0, None
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            try:
                connection.request("POST", "/v1/chat/completions", json.dumps(body))
                response = connection.getresponse()
                if response.status != 200:
                    raise Broken(f"status {response.status}: {response.read().decode()}")
                for line in response:
                    if not line.startswith(b"data: {"):
                        if line.startswith(b"data: [DONE]") and usage is not None:
                            return Answer(text, usage["lrt"]["reused_tokens"], first_at)
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise Broken(event["error"]["code"])
                    self.events += 1
                    first_at = first_at or time.monotonic()
                    usage = event.get("usage") or usage
                    text += "".join(choice["delta"].get("content", "") for choice in event["choices"])
            except (OSError, http.client.HTTPException) as error:
                raise Broken(type(error).__name__) from error
        raise Broken("the stream ended early")


@dataclass
class Found:
    """What was counted and measured."""

    equal: int = 0
    near_ties: int = 0
    wrong: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    retries: list[str] = field(default_factory=list)  # by clients: why
    notice_ms: list[float] = field(default_factory=list)  # from the kill to the client's error
    resume_ms: list[float] = field(default_factory=list)  # from the client's retry to its first token
    reused: list[int] = field(default_factory=list)  # tokens, by these retries
    restart_ms: list[float] = field(default_factory=list)  # from a kill until all replicas answer again
    front_retries: float = 0.0  # of requests that had not been answered yet
    killed_at: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Return JSON types."""

        def figures(values: Sequence[float]) -> dict[str, float] | None:
            return {"median": round(statistics.median(values), 1), "max": round(max(values), 1)} if values else None

        return {
            "equal": self.equal,
            "near_ties": self.near_ties,
            "wrong": self.wrong,
            "kills": dict(self.kills),
            "client_retries": dict(Counter(self.retries)),
            "front_retries": self.front_retries,
            "notice_ms": figures(self.notice_ms),
            "resume_ms": figures(self.resume_ms),
            "reused_tokens": figures(self.reused),
            "restart_ms": figures(self.restart_ms),
        }


class Reference:
    """The model alone in this process."""

    def __init__(self, bundle: Path) -> None:
        self.decoder = lrt_deploy.open_decoder(bundle, threads=1)
        self._lock = threading.Lock()

    def compare(self, messages: Sequence[dict[str, str]], text: str, found: Found) -> None:
        """Count an answer as equal, as a near tie at its first different token, or as wrong."""
        tokenizer = self.decoder.tokenizer
        assert tokenizer is not None
        with self._lock:
            ids = tokenizer.render_chat(list(messages))
            events = list(self.decoder.generate(ids, TOKENS, stop_ids=[], logprobs=2))
        expected = ""
        for event in events:
            expected += event.text
            if not text.startswith(expected):
                best, second = (logprob for _, logprob in event.top_logprobs[:2])
                if best - second < NEAR_TIE:
                    found.near_ties += 1
                else:
                    found.wrong.append(f"{text!r} instead of {expected!r}, margin {best - second:.4f}")
                return
        if text == expected:
            found.equal += 1
        else:
            found.wrong.append(f"{text!r} instead of {expected!r}")


class Replicas:
    """The processes of replicas below a server's, and their end."""

    def __init__(self, server: int, port: int, count: int, folder: Path) -> None:
        self.server, self.port, self.count, self.folder = psutil.Process(server), port, count, folder

    def pids(self) -> list[int]:
        """Return the replicas' processes."""
        found = []
        for process in self.server.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "ServeReplica" in " ".join(process.cmdline()):
                    found.append(process.pid)
        return sorted(found)

    def wait(self) -> None:
        """Wait until all replicas answer."""
        until = time.monotonic() + START_SECONDS
        while (found := self.metric("lrt_replicas")) != self.count:
            assert time.monotonic() < until, f"{found} of {self.count} replicas answer"
            time.sleep(0.1)

    def metric(self, name: str) -> float:
        """Return a value of the front's metrics."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        return next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)

    def kill(self, mode: str, events: Client, found: Found) -> None:
        """Kill a replica that does what the mode says; one that does not is counted under `other`."""
        pids = self.pids()
        if mode == "saving":
            pid = _writer(pids, self.folder, seconds=2.0) if self.folder.exists() else None
        else:
            if mode == "stream":
                _wait_for_events(events, RANDOM.randint(1, 2 * TOKENS))
            else:
                time.sleep(RANDOM.uniform(0.01, 0.08))
            pid = _busiest(pids)
        found.kills[mode if pid else "other"] += 1
        os.kill(pid or RANDOM.choice(pids), signal.SIGKILL)
        found.killed_at = time.monotonic()
        for other in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(other, signal.SIGCONT)


def _wait_for_events(client: Client, count: int) -> None:
    """Wait until clients have got so many events, at most a second."""
    wanted, until = client.events + count, time.monotonic() + 1
    while client.events < wanted and time.monotonic() < until:
        time.sleep(0.001)


def _busiest(pids: Sequence[int]) -> int | None:
    """Return the process that computes the most for some hundredths of a second; None if none does."""

    def used(pid: int) -> int:
        """Return the nanoseconds that the threads of a process have run."""
        total = 0
        with contextlib.suppress(OSError):  # threads end
            for task in Path(f"/proc/{pid}/task").iterdir():
                total += int((task / "schedstat").read_text().split()[0])
        return total

    before = {pid: used(pid) for pid in pids}
    time.sleep(0.02)
    spent = {pid: used(pid) - before[pid] for pid in pids}
    pid = max(spent, key=lambda pid: spent[pid])
    return pid if spent[pid] > BUSY_NS else None


def _writer(pids: Sequence[int], folder: Path, seconds: float) -> int | None:
    """Return a process that has a state open for writing; it and the others are stopped, so that it stays so.

    None if none was found in this time.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(PARTIAL in path.name for place in folder.glob("*") if place.is_dir() for path in place.iterdir()):
            continue
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if PARTIAL in entry.readlink().name:
                        return pid
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    return None


def chats(count: int, turns: int) -> list[list[str]]:
    """Return the user's messages of each chat; some are long, so that reading them takes a while."""
    pick = random.Random(1)  # noqa: S311

    def message(long: bool) -> str:
        return " ".join(pick.choice(WORDS) for _ in range(120 if long else 12)) + "?"

    return [[message(long=turn in (0, 3)) for turn in range(turns)] for _ in range(count)]


def run(port: int, replicas: Replicas, reference: Reference, shape: tuple[int, int, int]) -> Found:
    """Go through all chats, with a kill in each of the first rounds."""
    count, turns, kills = shape
    found = Found()
    client, questions = Client(port, found), chats(count, turns)
    rounds = [(group, turn) for group in range(0, count, TOGETHER) for turn in range(turns)]
    order = [MODES[i % len(MODES)] for i in range(kills)]
    talks: list[list[dict[str, str]]] = [[] for _ in range(count)]
    with ThreadPoolExecutor(TOGETHER) as pool:
        for at, (group, turn) in enumerate(rounds):
            found.killed_at = 0.0
            members = range(group, min(group + TOGETHER, count))
            for chat in members:
                talks[chat].append({"role": "user", "content": questions[chat][turn]})
            asked = [pool.submit(client.ask, [*talks[chat]]) for chat in members]
            # spread over all rounds
            if len(order) * (at + 1) // len(rounds) > sum(found.kills.values()):
                replicas.kill(order[sum(found.kills.values())], client, found)
            for chat, answer in zip(members, asked, strict=True):
                reference.compare(talks[chat], answer.result(), found)
                talks[chat].append({"role": "assistant", "content": answer.result()})
            if found.killed_at:
                replicas.wait()
                found.restart_ms.append((time.monotonic() - found.killed_at) * 1e3)
    found.front_retries = replicas.metric("lrt_front_retries_total")
    return found


@contextlib.contextmanager
def troubled(kind: str, folder: Path) -> Iterator[list[str]]:
    """Yield the server's options for a folder of states that is as `kind` says."""
    ended = threading.Event()

    def tear() -> None:
        while not ended.wait(0.02):
            for path in folder.glob("*/*.state"):
                with contextlib.suppress(OSError):
                    size = path.stat().st_size
                    if RANDOM.random() < 0.5:
                        os.truncate(path, RANDOM.randint(0, size))
                    else:
                        path.write_bytes(RANDOM.randbytes(size))

    def remove() -> None:
        while not ended.wait(0.02):
            shutil.rmtree(folder, ignore_errors=True)

    thread = threading.Thread(target={"torn": tear, "missing": remove}.get(kind, ended.wait))
    if kind == "full":
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=True)
    thread.start()
    try:
        yield [] if kind == "none" else ["--state-dir", str(folder)]
    finally:
        ended.set()
        thread.join()
        if kind == "full":
            subprocess.run(["umount", "-l", folder], check=True)


def main() -> None:
    """Run, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    for name, default in (("replicas", 2), ("chats", 20), ("turns", 5), ("kills", 20), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", choices=("shared", "none", "missing", "full", "torn"), default="shared")
    options = parser.parse_args()
    RANDOM.seed(options.seed)
    with tempfile.TemporaryDirectory(prefix="fo-") as place, troubled(options.folder, Path(place) / "s") as folder:
        log = Path(place) / "log"
        words = ("--threads", "1", "--replicas", str(options.replicas), *folder)
        with serving(options.bundle, *words, log=log) as server:
            replicas = Replicas(server.process.pid, server.port, options.replicas, Path(place) / "s")
            replicas.wait()
            shape = options.chats, options.turns, options.kills
            found = run(server.port, replicas, Reference(options.bundle), shape)
        assert server.process.returncode == 0, log.read_text()
    print(json.dumps({"replicas": options.replicas, "folder": options.folder, **found.summary()}, indent=2))
    sys.exit(bool(found.wrong))


if __name__ == "__main__":
    own_network.enter()
    main()
