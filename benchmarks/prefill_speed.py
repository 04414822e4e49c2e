"""Prefill on a random LRT of width 768 and 12 layers: stepwise, plain iteration, the default algorithm, zero memory.

All ways alternate within one run, so that ratios hold on a busy machine too. The memory path of the random weights is
scaled so that the plain iteration contracts by about 0.3 a pass, as trained models do; the contraction is measured and
printed. Weights are random: this measures time, not text. Takes about ten minutes and 4 GB of memory.

    .venv/bin/python benchmarks/prefill_speed.py [--threads 2] [--folder DIR] [--out FILE.json]
    .venv/bin/python benchmarks/prefill_speed.py --layers 2 --width 64 --heads 2 --tokens 64,128 --rounds 1,1
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

MAX_SEQ_LEN = 2560
MOST_OVERHEAD = 1.1  # of a fixed-point prefill over as many zero-memory passes


def make(folder: Path, args: argparse.Namespace) -> None:
    """Write random weights in the native form and export them."""
    from random_models import random_model, write_native

    import lrt_deploy
    from lrt_deploy.config import LRTConfig

    config = LRTConfig(
        sequence_len=2048,
        vocab_size=args.vocab,
        n_layer=args.layers,
        n_head=args.heads,
        n_kv_head=args.heads,
        n_embd=args.width,
        window_pattern="SSSL",
    )
    write_native(random_model(config, memory_scale=args.memory_scale), folder / "checkpoint")
    lrt_deploy.export_bundle(folder / "checkpoint", folder / "bundle", max_seq_len=MAX_SEQ_LEN)


def measure(bundle: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All lengths, each with its contraction, its table and its check."""
    import lrt_deploy
    from lrt_deploy.cli.bench import environment
    from lrt_deploy.runtime.bench import compare_prefill, measure_convergence, random_tokens

    results = []
    with lrt_deploy.open_decoder(bundle, threads=args.threads) as decoder:
        for length, rounds in zip(args.tokens, args.rounds, strict=True):
            tokens = random_tokens(length, args.vocab, seed=0)
            # The iteration works chunk by chunk; one chunk shows how it contracts.
            curve = measure_convergence(decoder, tokens[: decoder.prefill_options.sweeps.chunk_tokens], say)
            rows = compare_prefill(decoder, tokens, rounds, args.tolerance, say)
            result = {"tokens": length, "rounds": rounds, "contraction": contraction(curve), "rows": rows}
            results.append(result | {"convergence": curve})
            results[-1]["checks"] = checks(rows)
            report(results[-1])
        return {"results": results, "arguments": model_facts(args), "environment": environment(decoder) | command()}


def contraction(curve: list[dict[str, Any]]) -> dict[str, list[float]]:
    """By algorithm: error after a sweep / error after the sweep before it, as long as it is above 1e-4."""
    errors: dict[str, list[float]] = {}
    for point in curve:
        errors.setdefault(point["algorithm"], []).append(point["max_abs_latent_error"])
    return {name: [b / a for a, b in pairwise(found) if b > 1e-4] for name, found in errors.items()}


def checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether each iteration takes at most 1.1 x passes x one zero-memory pass, by the fastest rounds of both."""
    zero = next(row["min_seconds"] for row in rows if row["policy"] == "zero")
    found = []
    for row in rows:
        if row["policy"] == "fixed-point":
            overhead = row["min_seconds"] / (row["passes"] * zero)
            found.append({"algorithm": row["algorithm"], "overhead": overhead, "holds": overhead <= MOST_OVERHEAD})
    return found


def report(result: dict[str, Any]) -> None:
    """One length, for people."""
    print(f"\n{result['tokens']} tokens, {result['rounds']} round(s)")
    for name, ratios in result["contraction"].items():
        print(f"  {name}: the error shrinks by {', '.join(f'{ratio:.2f}' for ratio in ratios) or 'nothing'} a sweep")
    for row in result["rows"]:
        print(
            f"  {row['algorithm']:26} {row['min_seconds']:8.3f} s min {row['seconds']:8.3f} s median "
            f"{row['speedup']:6.2f}x {row['passes']:6.2f} passes  KL {row['kl']:.1e}  ran {row['ran']}"
        )
    for check in result["checks"]:
        verdict = "holds" if check["holds"] else "DOES NOT HOLD"
        print(f"  {check['algorithm']}: {check['overhead']:.2f} x passes x zero, at most {MOST_OVERHEAD}: {verdict}")


def say(what: str, done: int, total: int) -> None:
    """Progress."""
    count = f" {done + 1}/{total}" if total else ""
    print(f"{what}{count}", file=sys.stderr)


def model_facts(args: argparse.Namespace) -> dict[str, Any]:
    """What was run, without where."""
    left_out = ("folder", "out", "only_make")
    return {name: value for name, value in vars(args).items() if name not in left_out}


def command() -> dict[str, str]:
    """The command as it is given in a checkout."""
    return {"command": " ".join(["benchmarks/prefill_speed.py", *sys.argv[1:]])}


def numbers(text: str) -> list[int]:
    """Whole numbers from `512,2048`."""
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 12), ("width", 768), ("heads", 12), ("vocab", 8192), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--memory-scale", type=float, default=0.3)
    parser.add_argument("--tolerance", type=float, help="default: the runtime's")
    parser.add_argument("--tokens", type=numbers, default=[512, 2048])
    parser.add_argument("--rounds", type=numbers, default=[5, 2], help="for each length")
    parser.add_argument("--folder", type=Path, help="keeps the bundle here, and takes it from here if there is one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only-make", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if len(args.tokens) != len(args.rounds):
        parser.error("--tokens and --rounds differ in number")
    return args


def main() -> None:
    """Make the bundle in a process of its own, so that no torch is loaded where time is measured; then measure."""
    args = arguments()
    if args.only_make:
        make(args.folder, args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "bundle").is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            making = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--only-make"]
            subprocess.run(making, check=True)
        results = measure(folder / "bundle", args)
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
