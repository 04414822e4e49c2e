"""Serve one of the contenders that live in this project's environment: `worker.py NAME PATH THREADS`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from contenders import serving


def make(name: str, path: Path, threads: int) -> serving.Contender:
    """The contender; only what it needs is imported."""
    if name in ("ours", "no-memory"):
        from contenders.our_runtime import OurRuntime

        return OurRuntime(path, threads)
    if name in ("pytorch", "pytorch-compiled"):
        from contenders.pytorch import PyTorch

        return PyTorch(path, threads, compiled=name == "pytorch-compiled")
    assert name == "plain-route", name
    from contenders.plain_route import PlainRoute

    return PlainRoute(path, threads)


if __name__ == "__main__":
    serving.serve(make(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
