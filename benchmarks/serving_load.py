"""Throughput of `lrt-deploy serve` beside `BatchDecoder.run` and `Decoder.generate`, as ratios within one run.

    python benchmarks/serving_load.py BUNDLE [--clients 8] [--tokens 128] [--requests 64] [--rounds 5] [--out FILE.json]

Clients are threads of this process with raw sockets, because OpenAI's own client costs more than the server. In every
round each way serves the same requests, one after another; printed are the medians of the rounds' ratios, of tokens per
second and of tokens per second of processor time of the process that decodes. The second hardly depends on what else
the machine does; the first is what users see where the machine is theirs.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
from server_process import serving

import lrt_deploy

SILENCE_SECONDS = 60.0  # after which a client gives up


def request_bytes(index: int, tokens: int, stream: bool) -> bytes:
    """Return the request of this number."""
    body = {"prompt": [1, 2 + index % 200, 3], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    data = json.dumps(body | {"stream": stream}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)


def read_response(connection: socket.socket, stream: bool) -> None:
    """Read one response to its end; raises ConnectionError for one that is torn or no success."""
    data = b""
    end = b"0\r\n\r\n" if stream else None
    while end is None or not data.endswith(end):
        part = connection.recv(65536)
        data += part
        if not part or not data.startswith(b"HTTP/1.1 200"[: len(data)]):
            raise ConnectionError(f"the server's answer ends, or is no success: {data[-500:]!r}")
        if end is None and b"\r\n\r\n" in data:
            head, _, body = data.partition(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
            )
            if len(body) == length:
                return


class Rate(NamedTuple):
    """Tokens per second, and per second of processor time of the process that decodes."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, tokens: int, started: tuple[float, float], process: psutil.Process) -> Rate:
        """Return the rate since `started`, which `now` has given."""
        wall, cpu = now(process)
        return cls(tokens / (wall - started[0]), tokens / (cpu - started[1]))


def now(process: psutil.Process) -> tuple[float, float]:
    """Return the time, and the processor time that a process has taken."""
    times = process.cpu_times()
    return time.perf_counter(), times.user + times.system


def through_http(server: psutil.Process, port: int, clients: int, requests: int, tokens: int, stream: bool) -> Rate:
    """Return the rate of all clients together; raises what one of them raises."""
    numbers, lock, failed = iter(range(requests)), threading.Lock(), threading.Event()

    def client() -> None:
        try:
            with socket.create_connection(("127.0.0.1", port), SILENCE_SECONDS) as connection:
                while not failed.is_set():
                    with lock:
                        index = next(numbers, None)
                    if index is None:
                        return
                    connection.sendall(request_bytes(index, tokens, stream))
                    read_response(connection, stream)
        except BaseException:
            failed.set()
            raise

    started = now(server)
    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
    for done in running:
        done.result()
    return Rate.of(requests * tokens, started, server)


def through_batch(decoder: lrt_deploy.Decoder, slots: int, requests: int, tokens: int) -> Rate:
    """Return the rate of `BatchDecoder.run`."""
    batch = lrt_deploy.BatchDecoder(decoder, slots)
    for index in range(requests):
        batch.submit([1, 2 + index % 200, 3], tokens, stop_ids=[])
    started = now(psutil.Process())
    return Rate.of(sum(1 for _ in batch.run()), started, psutil.Process())


def through_generate(decoder: lrt_deploy.Decoder, requests: int, tokens: int) -> Rate:
    """Return the rate of `Decoder.generate`, one request after another."""
    started = now(psutil.Process())
    count = sum(1 for i in range(requests) for _ in decoder.generate([1, 2 + i % 200, 3], tokens, stop_ids=[]))
    return Rate.of(count, started, psutil.Process())


def share(rate: Rate, of: Rate) -> Rate:
    """Return a rate as a share of another one."""
    return Rate(rate.wall / of.wall, rate.cpu / of.cpu)


def main() -> None:
    """Measure, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    for name, default in (("clients", 8), ("tokens", 128), ("requests", 64), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    found: dict[str, list[Rate]] = {}
    words = ("--threads", str(options.threads), "--slots", str(options.clients))
    with (
        tempfile.TemporaryDirectory() as place,
        serving(options.bundle, *words, log=Path(place) / "log") as served,
        lrt_deploy.open_decoder(options.bundle, threads=options.threads) as decoder,
    ):
        process, port, shape = psutil.Process(served.process.pid), served.port, (options.requests, options.tokens)
        through_http(process, port, options.clients, options.clients, options.tokens, True)  # warms up
        for _ in range(options.rounds):
            batch = through_batch(decoder, options.clients, *shape)
            for name, stream in (("full answers", False), ("streams", True)):
                rate = through_http(process, port, options.clients, *shape, stream)
                found.setdefault(f"{name} / BatchDecoder.run", []).append(share(rate, batch))
            alone = through_generate(decoder, options.requests // options.clients, options.tokens)
            rate = through_http(process, port, 1, options.requests // options.clients, options.tokens, False)
            found.setdefault("one client, full answers / Decoder.generate", []).append(share(rate, alone))
    for name, ratios in found.items():
        print(f"{name}: {statistics.median(ratio.wall for ratio in ratios):.2f}", end=", ")
        print(f"in processor time {statistics.median(ratio.cpu for ratio in ratios):.2f}", end="; rounds: ")
        print(", ".join(f"{ratio.wall:.2f} {ratio.cpu:.2f}" for ratio in ratios))
    if options.out:
        rates = {name: [ratio._asdict() for ratio in ratios] for name, ratios in found.items()}
        options.out.write_text(json.dumps(rates, indent=2) + "\n")


if __name__ == "__main__":
    main()
