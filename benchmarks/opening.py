"""What opening a bundle for ONNX Runtime on a CPU is made of, in a fresh process: imports, hashes, session, token.

    .venv/bin/python benchmarks/opening.py BUNDLE [--threads 2] [--prompt-tokens 64]

Prints one JSON document. Memory is this process' own after each part; the packed copies of the matrices are what the
session adds to it. The files' pages are in the system's cache from the second run on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Time the parts one after the other, then `open_decoder` as a whole, which does the same but for forced hashes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    args = parser.parse_args()
    parts: dict[str, Any] = {}
    begin = time.perf_counter()
    memory = {"start": own_bytes()}

    def done(part: str) -> None:
        nonlocal begin
        parts[f"{part}_ms"] = round((time.perf_counter() - begin) * 1e3, 1)
        memory[part] = own_bytes()
        begin = time.perf_counter()

    import lrt_deploy
    from lrt_deploy import manifest
    from lrt_deploy.runtime import decoder, ort_cpu

    done("imports")
    found = manifest.read_manifest(args.bundle)
    manifest.verify_files(args.bundle, found, force=True)
    done("hashing_all_files")
    manifest.verify_files(args.bundle, found)
    done("hashing_what_is_not_remembered")
    loaded = ort_cpu.OrtCpuBackend(args.bundle, found, found.precisions[0], args.threads)
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
    lrt_deploy.open_decoder(args.bundle, threads=args.threads)
    done("open_decoder_again")
    matrices = decoder_bytes(found)
    print(json.dumps({"parts": parts, "own_bytes": memory, "matrix_bytes": matrices}, indent=2))


def decoder_bytes(found: Any) -> int:  # noqa: ANN401 - a manifest, which is imported late
    """Bytes of the matrices that the session multiplies by."""
    from lrt_deploy.runtime import traffic

    return traffic.matrix_bytes(found, found.precisions[0], "windowed")


def own_bytes() -> int:
    """Private resident bytes of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


if __name__ == "__main__":
    main()
