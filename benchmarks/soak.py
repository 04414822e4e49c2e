"""Generate and open for a long time, and look whether memory and file descriptors stay level.

python benchmarks/soak.py BUNDLE --generations 10000 --openings 2000

Prints one JSON document: resident memory and open descriptors of the process at ten points of each part, and what the
second half of each part has added. Prompts, lengths, policies and ways to end a generation change all the time, so that
what is kept for each of them would show. It says nothing of speed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import lrt_deploy
from lrt_deploy.runtime.batch import BatchDecoder
from lrt_deploy.runtime.decoder import Decoder

POINTS = 10
_WARM_UP = 20  # runs before the first point: libraries make their arenas, and Python its caches
_LONGEST_PROMPT, _MOST_TOKENS = 60, 12
_BATCH_EVERY = 50


def resident_bytes() -> int:
    """Memory of this process that lies in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    """Open files, sockets and pipes of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def generate_once(decoder: Decoder, index: int, rng: np.random.Generator) -> None:
    """One generation of its own kind: policy, sampling, continued or not, closed early or not."""
    prompt = rng.integers(0, decoder.config.vocab_size, int(rng.integers(1, _LONGEST_PROMPT))).tolist()
    count = int(rng.integers(1, _MOST_TOKENS))
    if index % _BATCH_EVERY == 0:
        batch = BatchDecoder(decoder, 2)
        for length in (1, 5, 9):
            batch.submit(prompt[:length], count, temperature=1.0, seed=index)
        list(batch.run())
        return
    state = decoder.prefill([prompt], policy=("auto", "stepwise", "fixed-point")[index % 3], tolerance=1e-2)
    events = decoder.generate(None, count, state=state, temperature=float(index % 2), seed=index)
    for _ in itertools.islice(events, count if index % 5 else 1):
        pass
    if index % 7 == 0:
        fork = state.fork()
        fork.rewind(1)
        decoder.prefill([prompt[:3]], state=fork, policy="stepwise")


def open_once(bundle: Path, index: int) -> None:
    """Open, take two tokens, and close, or forget to close."""
    decoder = lrt_deploy.open_decoder(bundle)
    list(decoder.generate([1 + index % 5], 2))
    if index % 4:
        decoder.close()


def watched(runs: int, run: Callable[[int], None]) -> dict[str, Any]:
    """Resident bytes and descriptors at ten points, and what came between the middle and the end."""
    points = list(_points(runs, run))
    middle, last = points[len(points) // 2], points[-1]
    return {
        "runs": runs,
        "resident_bytes": [resident for resident, _ in points],
        "descriptors": [count for _, count in points],
        "added_bytes_in_second_half": last[0] - middle[0],
        "added_descriptors_in_second_half": last[1] - middle[1],
    }


def _points(runs: int, run: Callable[[int], None]) -> Iterator[tuple[int, int]]:
    for index in range(_WARM_UP):
        run(index)
    for point in range(POINTS):
        for index in range(point * runs // POINTS, (point + 1) * runs // POINTS):
            run(index)
        gc.collect()
        yield resident_bytes(), descriptors()


def soak(bundle: Path, generations: int, openings: int) -> dict[str, Any]:
    """Both parts."""
    rng = np.random.default_rng(0)
    with lrt_deploy.open_decoder(bundle) as decoder:
        generating = watched(generations, lambda index: generate_once(decoder, index, rng))
    return {"generations": generating, "openings": watched(openings, lambda index: open_once(bundle, index))}


def main() -> None:
    """Run it and print the document."""
    parser = argparse.ArgumentParser(description="Soak: memory and descriptors of many generations and openings.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--generations", type=int, default=10_000)
    parser.add_argument("--openings", type=int, default=2_000)
    arguments = parser.parse_args()
    json.dump(soak(arguments.bundle, arguments.generations, arguments.openings), sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
