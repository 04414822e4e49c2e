"""A campaign: many trials over several worker processes, resumable, with every death and every hang recorded.

Results are one JSON line a trial in a file; a campaign that finds lines there goes on after them. The first line names
the seed and the commit, and a campaign of another seed or commit does not mix with them.
"""

from __future__ import annotations

import json
import os
import queue
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .trial import CRASH, HANG

ROOT = Path(__file__).parents[2]
SOURCES = ("lrt_deploy", "exporters", "runtime", "tests")  # what a campaign's outcome depends on
BATCH = 100
LIFE = 4000  # trials after which a worker is replaced
HANG_SECONDS, HANG_CPU_SECONDS, LONGEST_SECONDS = 30.0, 12.0, 240.0
START_SECONDS = 300.0


@dataclass
class Campaign:
    """`counts`: kind -> number of trials. `results`: the file that lines are appended to; None keeps them in memory."""

    counts: dict[str, int]
    seed: str
    originals: Path
    results: Path | None = None
    workers: int = 2
    found: list[dict] = field(default_factory=list)

    def run(self, say=lambda text: None) -> list[dict]:
        """All results, those found in the file included."""
        done = self._resume()
        jobs: queue.Queue[tuple[str, int, int]] = queue.Queue()
        for job in self._batches(done):
            jobs.put(job)
        lock, self._started = threading.Lock(), time.monotonic()
        threads = [
            threading.Thread(target=self._serve, args=(jobs, lock, say), daemon=True) for _ in range(self.workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if missing := sum(self.counts.values()) - len(self.found):
            raise RuntimeError(f"{missing} trials were not run, because workers did not start; run it again")
        return self.found

    def _resume(self) -> set[tuple[str, int]]:
        head = {"seed": self.seed, "commit": commit()}
        if self.results is None:
            return set()
        if self.results.exists() and (lines := self.results.read_text().splitlines()):
            if json.loads(lines[0]) != head:
                raise SystemExit(f"{self.results} holds a campaign of {lines[0]}, this is {head}; name another file")
            for line in lines[1:]:
                try:
                    self.found.append(json.loads(line))
                except ValueError:
                    continue  # the line that an interrupt cut
            wanted = self.counts
            self.found = [r for r in self.found if r["index"] < wanted.get(r["kind"], 0)]
        else:
            self.results.write_text(json.dumps(head) + "\n")
        return {(result["kind"], result["index"]) for result in self.found}

    def _batches(self, done: set[tuple[str, int]]) -> Iterator[tuple[str, int, int]]:
        """Jobs of all kinds in turns, so that what is there early speaks of all."""
        todo = {}
        for kind, count in self.counts.items():
            missing = [index for index in range(count) if (kind, index) not in done]
            runs: list[tuple[int, int]] = []
            for index in missing:
                if runs and runs[-1][1] == index and index - runs[-1][0] < BATCH:
                    runs[-1] = (runs[-1][0], index + 1)
                else:
                    runs.append((index, index + 1))
            todo[kind] = runs
        while any(todo.values()):
            for kind, runs in todo.items():
                if runs:
                    yield kind, *runs.pop(0)

    def _serve(self, jobs: queue.Queue, lock: threading.Lock, say) -> None:
        worker: Worker | None = None
        try:
            while True:
                try:
                    kind, first, last = jobs.get_nowait()
                except queue.Empty:
                    return
                while first < last:
                    if worker is None or worker.served >= LIFE:
                        if worker is not None:
                            worker.stop()
                        worker = Worker(self.originals, self.seed)
                    for result in worker.work(kind, first, last):
                        first = result["index"] + 1
                        with lock:
                            self._keep(result, say)
                    if worker.dead:
                        worker = None
        finally:
            if worker is not None:
                worker.stop()

    def _keep(self, result: dict, say) -> None:
        from .trial import FINE

        self.found.append(result)
        if self.results is not None:
            with self.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
        if result["verdict"] not in FINE:
            name = f"{result['verdict'].upper()} {result['kind']} #{result['index']}"
            say(f"{name}: {result['what'][:120]} -> {result['detail'][:300]}")
        if len(self.found) % 1000 == 0:
            rate = len(self.found) / (time.monotonic() - self._started)
            say(f"{len(self.found)} of {sum(self.counts.values())} ({rate:.0f} a second)")


class Worker:
    """One worker process and its folder."""

    def __init__(self, originals: Path, seed: str) -> None:
        self.box = Path(tempfile.mkdtemp(prefix="lrt-hostile-"))
        self.served, self.dead = 0, False
        environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
        environment |= {"ORT_DISABLE_TELEMETRY": "1", "PYTHONWARNINGS": "ignore", "TERM": "dumb", "COLUMNS": "100"}
        command = [sys.executable, "-P", "-m", "hostile.worker", str(originals), str(self.box), seed]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._lines = self._read_lines()
        try:
            ready = self._next(START_SECONDS)
            if ready != b"ready":
                raise RuntimeError(f"a worker did not start: {self.log()}")
        except BaseException:
            self.stop()
            raise

    def work(self, kind: str, first: int, last: int) -> Iterator[dict]:
        """Results one after the other; after a death or a hang the last one says so, and the worker is dead."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{kind}\t{first}\t{last}\n".encode())
        self.process.stdin.flush()
        for index in range(first, last):
            line = self._next(None)
            if line is not None:
                self.served += 1
                yield json.loads(line)
                continue
            verdict, detail = self._end()
            yield {
                "kind": kind,
                "index": index,
                "verdict": verdict,
                "detail": detail,
                "parses": True,
                "what": f"see index {index}",
                "cpu_seconds": 0.0,
                "grown_bytes": 0,
                "extra": {},
            }
            return

    def _end(self) -> tuple[str, str]:
        hung = self.process.poll() is None
        if hung:
            self.process.send_signal(signal.SIGUSR1)  # where it stands, into its log
            time.sleep(0.5)
        code, log = self.process.poll(), self.log()
        self.stop()
        if hung:
            return HANG, f"killed: {log}"
        return CRASH, f"ended with {code}: {log}"

    def log(self) -> str:
        """The last things that the worker's libraries said."""
        try:
            return (self.box / "log").read_bytes()[-1500:].decode(errors="replace")
        except OSError:
            return ""

    def stop(self) -> None:
        """Kill the process and remove its folder."""
        self.dead = True
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue
        shutil.rmtree(self.box, ignore_errors=True)

    def _next(self, seconds: float | None) -> bytes | None:
        """The next line; None when the process is dead, or at work without progress for too long."""
        started, cpu = time.monotonic(), self._cpu()
        while True:
            line = next(self._lines)
            if line is not None:
                return line
            if self.process.poll() is not None:
                return next(self._lines)
            waited = time.monotonic() - started
            if seconds is not None:
                if waited > seconds:
                    return None
                continue
            busy = self._cpu() - cpu
            if waited > LONGEST_SECONDS or (waited > HANG_SECONDS and (busy > HANG_CPU_SECONDS or busy < 1)):
                return None

    def _read_lines(self) -> Iterator[bytes | None]:
        """Lines as they come; None when there is none within a second."""
        assert self.process.stdout is not None
        number, buffer = self.process.stdout.fileno(), b""
        with selectors.DefaultSelector() as selector:
            selector.register(number, selectors.EVENT_READ)
            while True:
                while b"\n" in buffer:
                    line, _, buffer = buffer.partition(b"\n")
                    yield line
                if selector.select(1.0):
                    data = os.read(number, 65_536)
                    if not data:
                        self.process.wait()
                        while True:
                            yield None
                    buffer += data
                else:
                    yield None

    def _cpu(self) -> float:
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def commit() -> str:
    """The commit that is checked out, with a mark when source files differ from it."""
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", *SOURCES], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
