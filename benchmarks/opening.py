"""What opening a bundle for ONNX Runtime on a CPU is made of, in a fresh process: imports, hashes, session, token.

    .venv/bin/python benchmarks/opening.py BUNDLE [--threads 2] [--prompt-tokens 64] [--precision P]

Prints one JSON document. Memory is this process' own after each part; the packed copies of the matrices are what the
session adds to it. The files' pages are in the system's cache from the second run on.

    .venv/bin/python benchmarks/opening.py BUNDLE --cold [--no-read-ahead]

drops the weights from the system's memory first, as after a restart, and then opens, reads and decodes random tokens:
what steps wait for the disk with reading ahead and without.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

COLD_STEPS = 100


def main() -> None:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--precision", help="default: the only or most precise one")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--no-read-ahead", action="store_true")
    args = parser.parse_args()
    text = json.dumps(cold_start(args) if args.cold else parts_of_opening(args), indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def cold_start(args: argparse.Namespace) -> dict[str, Any]:
    """Open a bundle that the system does not hold, read a prompt, decode; random tokens, rows that nobody has read."""
    import numpy as np

    import lrt_deploy
    from lrt_deploy.bundle.manifest import read_manifest, weights_path
    from lrt_deploy.runtime import opening

    found = read_manifest(args.bundle)
    with (args.bundle / weights_path(args.precision or found.precisions[0])).open("rb") as weights:
        os.posix_fadvise(weights.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if args.no_read_ahead:
        opening.read_ahead = lambda file: None
    tokens = np.random.default_rng(0).integers(0, found.model.vocab_size, args.prompt_tokens + COLD_STEPS)
    times = [time.perf_counter()]
    decoder = lrt_deploy.open_decoder(args.bundle, precision=args.precision, threads=args.threads)
    times.append(time.perf_counter())
    state = decoder.prefill([tokens[: args.prompt_tokens]])
    times.append(time.perf_counter())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    for token in tokens[args.prompt_tokens :]:
        decoder.step(state, [token])
        times.append(time.perf_counter())
    took = np.diff(times) * 1e3
    waits = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before
    steps = {"median_ms": round(float(np.median(took[2:])), 1), "mean_ms": round(float(took[2:].mean()), 1)}
    return {"open_ms": round(took[0]), "first_token_ms": round(took[1]), "steps": steps | {"waits_for_the_disk": waits}}


def parts_of_opening(args: argparse.Namespace) -> dict[str, Any]:
    """Time the parts one after the other, then `open_decoder` as a whole, which does the same but for forced hashes."""
    parts: dict[str, Any] = {}
    begin = time.perf_counter()
    memory = {"start": own_bytes()}

    def done(part: str) -> None:
        nonlocal begin
        parts[f"{part}_ms"] = round((time.perf_counter() - begin) * 1e3, 1)
        memory[part] = own_bytes()
        begin = time.perf_counter()

    import lrt_deploy
    from lrt_deploy.bundle import manifest
    from lrt_deploy.runtime import decoder
    from lrt_deploy.runtime.backends import ort_cpu

    done("imports")
    found = manifest.read_manifest(args.bundle)
    manifest.verify_files(args.bundle, found, force=True)
    done("hashing_all_files")
    manifest.verify_files(args.bundle, found)
    done("hashing_what_is_not_remembered")
    precision = args.precision or found.precisions[0]
    loaded = ort_cpu.OrtCpuBackend(args.bundle, found, precision, args.threads)
    done("session")
    opened = decoder.Decoder(found, loaded, None)
    prompt = [(7 * i) % found.model.vocab_size for i in range(args.prompt_tokens)]
    opened.prefill([prompt])
    done("first_token")
    opened.prefill([prompt])
    done("first_token_again")
    opened.close()
    del opened, loaded
    begin = time.perf_counter()
    lrt_deploy.open_decoder(args.bundle, precision=precision, threads=args.threads)
    done("open_decoder_again")
    matrices = decoder_bytes(found, precision)
    return {"precision": precision, "parts": parts, "own_bytes": memory, "matrix_bytes": matrices}


def decoder_bytes(found: Any, precision: str) -> int:  # noqa: ANN401 - a manifest, which is imported late
    """Bytes of the matrices that the session multiplies by."""
    from lrt_deploy.runtime import bench

    return bench.matrix_bytes(found, precision, "windowed")


def own_bytes() -> int:
    """Private resident bytes of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


if __name__ == "__main__":
    main()
