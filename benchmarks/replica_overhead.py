"""What `lrt-deploy serve --replicas 1` costs beside the single server, both at once and in turns.

    python benchmarks/replica_overhead.py BUNDLE [--rounds 7] [--requests 64] [--tokens 128] [--clients 8]

Runs in a network namespace of its own. In every round each server answers 20 short requests one after another, for the
time to the first token of a stream, and the same load of full answers and of streams from several clients. Prints the
median of the difference of first tokens in milliseconds, and the medians of the ratios of throughput.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import tempfile
import time
from pathlib import Path

import own_network
import psutil
from server_process import serving
from serving_load import request_bytes, through_http

_FIRST_TOKENS = 20


def first_token_ms(port: int) -> float:
    """Return the median time from sending a request to the first event of its stream."""
    times = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for index in range(_FIRST_TOKENS):
            began = time.perf_counter()
            connection.sendall(request_bytes(index, 2, stream=True))
            data = b""
            while b"data: {" not in data:
                data += connection.recv(65536)
            times.append((time.perf_counter() - began) * 1e3)
            while not data.endswith(b"0\r\n\r\n"):
                data += connection.recv(65536)
    return statistics.median(times)


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    for name, default in (("rounds", 7), ("requests", 64), ("tokens", 128), ("clients", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ov-")))
        servers = {
            name: stack.enter_context(serving(options.bundle, "--threads", "1", *words, log=place / name))
            for name, words in (("single", ()), ("replica", ("--replicas", "1")))
        }
        processes = {name: psutil.Process(server.process.pid) for name, server in servers.items()}
        shape = options.clients, options.requests, options.tokens
        for name, server in servers.items():  # warms up
            through_http(processes[name], server.port, options.clients, options.clients, options.tokens, True)
        for _ in range(options.rounds):
            first = {name: first_token_ms(server.port) for name, server in servers.items()}
            found.setdefault("first_token_ms_single", []).append(first["single"])
            found.setdefault("first_token_ms_added", []).append(first["replica"] - first["single"])
            for kind, stream in (("full_answers", False), ("streams", True)):
                rates = {
                    name: through_http(processes[name], server.port, *shape, stream).wall
                    for name, server in servers.items()
                }
                found.setdefault(f"{kind}_ratio", []).append(rates["replica"] / rates["single"])
    medians = {name: round(statistics.median(values), 3) for name, values in found.items()}
    rounds = {name: [round(value, 3) for value in values] for name, values in found.items()}
    print(json.dumps({"medians": medians, "rounds": rounds}, indent=2))


if __name__ == "__main__":
    own_network.enter()
    main()
