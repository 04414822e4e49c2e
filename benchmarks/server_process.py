"""`lrt-deploy serve` as a process of a benchmark, on a free port."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Served(NamedTuple):
    """A server that takes connections. `process.returncode` is its exit code once it was ended."""

    process: subprocess.Popen[str]
    url: str

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1."""
        return int(self.url.rpartition(":")[2])


@contextlib.contextmanager
def serving(bundle: Path, *options: str, log: Path | None = None) -> Iterator[Served]:
    """Start a server of a bundle, and end it whatever comes of it; its log goes to stderr, or to a file."""
    command = [sys.executable, "-m", "lrt_deploy", "serve", str(bundle), "--port", "0", "--json", *options]
    with contextlib.ExitStack() as stack:
        stderr = None if log is None else stack.enter_context(log.open("w"))
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True))
        stack.callback(process.terminate)
        assert process.stdout is not None
        document = ""
        while (line := process.stdout.readline()) not in ("}\n", ""):
            document += line
        if not line or '"url"' not in document:
            raise RuntimeError(f"the server has ended: {document}{line}{'' if log is None else log.read_text()}")
        yield Served(process, json.loads(document + line)["url"])
