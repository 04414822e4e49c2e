"""Decode with two checkouts of this repository in alternation: CPU time per token of the first over the second.

Each checkout has its own `.venv` and runs in a process of its own on the same bundle, with one thread. The two take
turns of a few dozen tokens, in changing order, so that a busy machine slows both alike. Several pairs of processes are
started, because where memory lands differs between processes. Measures time; that both compute the same is for the
tests to say.

    .venv/bin/python benchmarks/two_checkouts.py BEFORE AFTER BUNDLE [--pairs 5] [--turns 20] [--tokens 60]
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_TOKENS, ROWS = 16, 8
WORKLOADS = ("step", "step of 8", "generate", "sampled", "batch of 8")


def work(bundle: str, tokens: int) -> None:
    """Answer each workload named on stdin with the CPU microseconds that one call took, until stdin ends."""
    import lrt_deploy

    try:
        from lrt_deploy import BatchDecoder
    except ImportError:  # version 0.1.0 does not export it
        from lrt_deploy.runtime.batch_decoder import BatchDecoder

    decoder = lrt_deploy.open_decoder(bundle, threads=1)
    draw = np.random.default_rng(0)
    prompts = draw.integers(0, decoder.config.vocab_size, (ROWS, PROMPT_TOKENS)).tolist()
    options: dict[str, Any] = {"stop_ids": []}
    workloads: dict[str, Callable[[], Iterator[object]]] = {
        "step": lambda: steps(decoder, prompts[:1]),
        "step of 8": lambda: steps(decoder, prompts),
        "generate": lambda: decoder.generate(prompts[0], tokens + 2, policy="stepwise", **options),
        "sampled": lambda: decoder.generate(
            prompts[0], tokens + 2, policy="stepwise", temperature=1, seed=0, **options
        ),
        "batch of 8": lambda: batch(BatchDecoder(decoder, ROWS), [prompt[:2] for prompt in prompts], tokens + 8),
    }
    for line in sys.stdin:
        calls = workloads[line.strip()]()
        next(calls)
        with collector_off():
            start = time.thread_time()
            for _ in range(tokens):
                next(calls)
            print((time.thread_time() - start) / tokens * 1e6, flush=True)


def steps(decoder: Any, prompts: list[list[int]]) -> Iterator[object]:  # noqa: ANN401 - either checkout's
    """Steps of one token for each of the prompts."""
    state = decoder.prefill(prompts, policy="stepwise")
    while True:
        yield decoder.step(state, [0] * len(prompts))


def batch(decoder: Any, prompts: list[list[int]], tokens: int) -> Iterator[object]:  # noqa: ANN401 - either checkout's
    """Steps of a full batch whose prompts have been read."""
    for prompt in prompts:
        decoder.submit(prompt, tokens, stop_ids=[])
    while not decoder.step():
        pass
    while True:
        yield decoder.step()


@contextmanager
def collector_off() -> Iterator[None]:
    """Collections would fall into one turn and not into the next."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Worker:
    """A process of one checkout."""

    def __init__(self, checkout: Path, bundle: Path, tokens: int) -> None:
        command = [str(checkout / ".venv/bin/python"), __file__, "--work", str(bundle), str(tokens)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def turn(self, workload: str) -> float:
        """CPU microseconds that one call took."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(workload, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self.process.communicate()


def measure_pair(args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """One pair of processes: times (before, after) of each turn, by workload."""
    pair = [Worker(checkout, args.bundle, args.tokens) for checkout in (args.before, args.after)]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in args.workloads}
    for name in args.workloads:
        for worker in pair:
            worker.turn(name)  # memory is committed, shapes are bound
    for number in range(args.turns):
        for name in args.workloads:
            times = [worker.turn(name) for worker in (pair if number % 2 else reversed(pair))]
            before, after = times if number % 2 else reversed(times)
            found[name].append((before, after))
    for worker in pair:
        worker.close()
    return found


def main() -> None:
    """Print one line for each workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("before", "after", "bundle"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of processes")
    parser.add_argument("--turns", type=int, default=20, help="turns of each process at each workload")
    parser.add_argument("--tokens", type=int, default=60, help="tokens of a turn")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    args = parser.parse_args()
    pairs = [measure_pair(args) for _ in range(args.pairs)]
    print(f"{'':12}{'before':>10}{'after':>10}   before / after: median, quartiles of turns, range of pairs' medians")
    for name in args.workloads:
        times = np.array([pair[name] for pair in pairs])  # (pairs, turns, 2), microseconds
        ratios = times[..., 0] / times[..., 1]  # (pairs, turns)
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        medians = np.median(ratios, axis=1)
        before, after = np.median(times, axis=(0, 1))
        print(
            f"{name:12}{before:7.1f} us{after:7.1f} us   "
            f"{middle:.3f}   {low:.3f} to {high:.3f}   {medians.min():.3f} to {medians.max():.3f}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], int(sys.argv[3]))
    else:
        main()
