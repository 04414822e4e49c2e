"""A worker process of a campaign: makes and runs trials one after the other, in bounded memory, and reports each.

Reads lines `kind TAB first TAB last` from stdin, writes one JSON line a trial to stdout. Whatever the libraries print
goes to a file. A trial that kills the process, or never ends, is the parent's to notice.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from random import Random

SPARE_BYTES = 1536 * 2**20  # of private memory, beyond what the process holds when it has warmed up
CHECK_EVERY = 40


def main(originals_folder: str, box_folder: str, seed: str) -> None:
    """Serve trials until stdin ends."""
    box = Path(box_folder)
    report = os.fdopen(os.dup(1), "w", buffering=1)
    log = os.open(box / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    watched = tuple(box / name for name in ("home", "tmp", "cache", "cwd"))
    for folder in watched:
        folder.mkdir(exist_ok=True)
    os.environ |= {"HOME": str(watched[0]), "TMPDIR": str(watched[1]), "XDG_CACHE_HOME": str(watched[2])}
    tempfile.tempdir = None
    os.chdir(watched[3])
    warnings.simplefilter("ignore")
    from .kinds import KINDS, SelfTest
    from .originals import Originals

    originals = Originals(Path(originals_folder))
    warm_up(originals)
    report.write("ready\n")
    for line in sys.stdin:
        kind, first, last = line.rstrip("\n").split("\t")
        for index in range(int(first), int(last)):
            make = KINDS[kind][0] if kind in KINDS else partial(SelfTest(), index=index)
            result = one(make, kind, index, seed, box, originals, watched)
            if index % CHECK_EVERY == 0 and (why := spoiled(originals)):
                result |= {"verdict": "wrong tokens", "detail": f"afterwards {why}; {result['detail']}"}
            report.write(json.dumps(result) + "\n")


def one(make, kind: str, index: int, seed: str, box: Path, originals, watched: tuple[Path, ...]) -> dict:
    """Make and run the trial of a kind, an index and a seed."""
    from .trial import run

    place = box / "trial"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    trial = made(make, f"{seed}/{kind}/{index}", place, originals)
    result = run(trial, place, watched)
    return {"kind": kind, "index": index} | dataclasses.asdict(result)


def made(make, seed: str, place: Path, originals):
    """The trial of a seed; where a second change does not fit what a first one left, another one."""
    for attempt in range(9):
        try:
            return make(Random(f"{seed}/{attempt}" if attempt else seed), place, originals)  # noqa: S311
        except (LookupError, ValueError, TypeError, AttributeError, OSError, StopIteration):
            if attempt == 8:
                raise
            shutil.rmtree(place)
            place.mkdir()
    raise AssertionError


def warm_up(originals) -> None:
    """Load every library once, and bound the private memory from here on."""
    import torch

    from lrt_deploy.model.checkpoint import open_checkpoint

    torch.set_num_threads(1)
    assert originals.numbers
    open_checkpoint(originals.folder / "native").model()
    with open("/proc/self/status", "rb") as file:  # noqa: PTH123
        data = next(int(line.split()[1]) * 1024 for line in file if line.startswith(b"VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + SPARE_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def spoiled(originals) -> str:
    """What is wrong with the shared decoder, if anything: no refused input may change it."""
    import numpy as np

    from .originals import decoded

    if not np.array_equal(decoded(originals.decoder), originals.numbers["bundle"]):
        return "the decoder gives other numbers"
    return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
