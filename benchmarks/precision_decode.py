"""Decode with every precision of a bundle in turns, in one process, and measure the memory's bandwidth in between.

CPU time on one thread, so that a busy machine matters little. A turn is a few steps of one sequence, and all precisions
take turns, so that what the memory does meanwhile concerns all alike. Printed are the fastest and the median step, the
bytes that a step reads, and the best bandwidth of reading alone, by the same clock.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/precision_decode.py BUNDLE [--context 64] [--turns 6] [--out F.json]
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import lrt_deploy
from lrt_deploy.bundle.manifest import read_manifest
from lrt_deploy.bundle.precisions import ITEM_BYTES, base_dtype
from lrt_deploy.runtime import bench

TURN_STEPS, WARM_UP_STEPS = 4, 4
BANDWIDTH_EVERY = 6  # turns
ARRAY_BYTES, PART_BYTES = 2**29, 2**26  # what is read; a part is far larger than the caches and takes a few ms


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of all precisions and the bandwidths that were seen."""
    precisions = read_manifest(args.bundle).precisions
    with ExitStack() as stack:
        opened = (lrt_deploy.open_decoder(args.bundle, precision=name, threads=1) for name in precisions)
        decoders = [stack.enter_context(decoder) for decoder in opened]
        prompt = bench.random_tokens(args.context, decoders[0].config.vocab_size, seed=0)
        states = [decoder.prefill([prompt]) for decoder in decoders]
        times: list[list[float]] = [[] for _ in decoders]
        bandwidth, array = [], np.ones(ARRAY_BYTES // 4, np.float32)
        for turn in range(args.turns):
            if turn % BANDWIDTH_EVERY == 0:
                bandwidth.append(read_gb_s(array))
            for decoder, state, seen in zip(decoders, states, times, strict=True):
                seen += steps(decoder, state, prompt[turn % len(prompt)], warm_up=turn == 0)
                state.rewind(args.context)
        found = zip(decoders, times, strict=True)
        rows = [row(decoder, args.context + TURN_STEPS // 2, seen) for decoder, seen in found]
    return {"context": args.context, "read_bandwidth_gb_s": bandwidth, "rows": rows}


def steps(decoder: lrt_deploy.Decoder, state: lrt_deploy.DecodeState, token: int, warm_up: bool) -> list[float]:
    """Return the milliseconds of the steps of one turn; its first one, which refills the caches, is not counted."""
    seconds: list[float] = []
    for _ in range(WARM_UP_STEPS if warm_up else 0):
        decoder.step(state, [token])
    for _ in range(TURN_STEPS + 1):
        start = time.thread_time()
        decoder.step(state, [token])
        seconds.append(time.thread_time() - start)
    return [each * 1e3 for each in seconds[1:]]


def read_gb_s(array: np.ndarray) -> float:
    """Return the best bandwidth at which this thread reads a part of an array."""
    seconds = []
    for part in np.split(array, ARRAY_BYTES // PART_BYTES):
        start = time.thread_time()
        np.dot(part, part)
        seconds.append(time.thread_time() - start)
    return PART_BYTES / min(seconds) / 1e9


def row(decoder: lrt_deploy.Decoder, context: int, times: list[float]) -> dict[str, Any]:
    """Return the figures of one precision."""
    item = ITEM_BYTES[base_dtype(decoder.precision, "windowed")]
    weights = bench.weight_bytes_per_step(decoder.manifest, decoder.precision)
    return {
        "precision": decoder.precision,
        "steps": len(times),
        "min_ms": min(times),
        "median_ms": float(np.median(times)),
        "weight_bytes_per_step": weights,
        "state_bytes_per_step": bench.state_bytes_per_step(decoder.config, context, item)["state_bytes_read_per_step"],
        "weights_fit_cache": weights < (bench.last_level_cache_bytes() or 0),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    for name, default in (("context", 64), ("turns", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    result = measure(args)
    for each in result["rows"]:
        print(f"{each['precision']:18} {each['min_ms']:7.2f} ms min {each['median_ms']:7.2f} ms median")
    print(f"bandwidth of reading: {', '.join(f'{rate:.1f}' for rate in result['read_bandwidth_gb_s'])} GB/s")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
