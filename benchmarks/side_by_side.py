"""Decoding side by side: this runtime, and what one would use instead, in alternating rounds, each in its own process.

Contenders (see `contenders/`): `ours` on an LRT; `no-memory`, the same runtime on the plain model of the same shape;
`pytorch` and `pytorch-compiled`, a recurrent decoder with preallocated caches; `plain-route`, torch.onnx.export with a
growing cache; `genai`, onnxruntime-genai on a plain Llama of equal bytes, which needs an environment of its own:

    python -m venv /tmp/genai && /tmp/genai/bin/pip install onnxruntime-genai transformers torch onnx-ir
    .venv/bin/python benchmarks/side_by_side.py --genai /tmp/genai/bin/python --out side_by_side.json

Weights are random: this measures time, not text; that the contenders compute the same is for tests/test_side_by_side.py
to say. Models are kept in --folder (256/6: 0.3 GB, 768/12: 5 GB, 1280/20: 15 GB) and made when they are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from contenders import field, models, serving
from contenders.field import Running, Setting
from contenders.measured import Measured

from lrt_deploy.bundle.manifest import read_manifest
from lrt_deploy.cli.bench import cpu_model
from lrt_deploy.runtime import bench

REST_S = 0.05  # before each turn: threads of the contender before it stop spinning
TURN_STEPS = 4  # few, because the speed of a machine's memory changes within seconds

Points = dict[tuple[str, int, int, str], Measured]  # by precision, context, batch and contender


def measure(settings: list[Setting], args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All contexts and batches of one size, its precisions in turns; by precision one row a contender."""
    points: Points = defaultdict(Measured)
    size = settings[0].size
    contexts = [context for context in args.contexts if context < size.sequence_len]

    def use(running: list[Running]) -> None:
        for context in contexts:
            for batch in args.batches:
                alternate(running, size, (context, batch), args, points)

    for number in range(args.processes):
        say(f"processes {number + 1}/{args.processes}")
        field.run_all(args.contenders, settings, use, number / args.processes)
    rows: dict[str, list[dict[str, Any]]] = {setting.precision: [] for setting in settings}
    for (precision, context, batch, name), seen in points.items():
        row = {"contender": name, "context": context, "batch": batch} | seen.summary(batch)
        keys = [(precision, context, batch, other) for other in args.contenders]
        first = next(points[key] for key in keys if key in points)
        ratios = {"min_over_first": seen.ratio(first, min), "median_over_first": seen.ratio(first, np.median)}
        rows[precision].append(row | ratios | seen.facts)
    for found in rows.values():
        found.sort(key=lambda row: args.contenders.index(row["contender"]))
        found.sort(key=lambda row: (contexts.index(row["context"]), args.batches.index(row["batch"])))
    return rows


def alternate(
    running: list[Running], size: models.Size, point: tuple[int, int], args: argparse.Namespace, points: Points
) -> None:
    """Rounds over the contenders at one context and batch: all read the prompt, then they decode in short turns.

    The last step stands at the context where it is long. Every other turn goes in reverse order, so that none always
    has the same contender before it.
    """
    context, batch = point
    seen = [points[contender.precision, context, batch, contender.name] for contender in running]
    for measured in seen:
        measured.sets.append([])
    turns = [min(TURN_STEPS, args.steps - done) for done in range(0, args.steps, TURN_STEPS)]
    steps = serving.WARM_UP_STEPS + len(turns) * serving.COLD_STEPS + args.steps
    start = max(1, min(context, size.sequence_len - steps - 1))
    prompts = [bench.random_tokens(start, size.vocab, seed) for seed in range(batch)]
    for number in range(args.rounds):
        say(f"{context} tokens, batch {batch}, round {number + 1}/{args.rounds}")
        for contender in running:
            contender.ask("start", rows=prompts)
        for turn, count in enumerate(turns):
            for contender, measured in list(zip(running, seen, strict=True))[:: 1 if turn % 2 == 0 else -1]:
                time.sleep(REST_S)
                measured.sets[-1] += contender.ask("decode", steps=count)["ms"]
    for contender, measured in zip(running, seen, strict=True):
        measured.facts = contender.ask("facts") | contender.ask("memory")


def weight_bytes(setting: Setting, contenders: list[str]) -> dict[str, int]:
    """Bytes of weights that a step reads, with and without memory, of those that were measured."""
    found = {}
    for name in [name for name in ("ours", "no-memory") if name in contenders]:
        held = read_manifest(models.bundle(setting.folder, setting.size, setting.precision, memory=name == "ours"))
        found[name] = bench.weight_bytes_per_step(held, held.precisions[0])
    return found


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one line a contender; ratios of times to the first one that runs in this precision."""
    lines = [
        "| model | precision | context | batch | contender | min ms | median ms | tokens/s | of first: min | median |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        for row in result["rows"]:
            cells = (result["size"], result["precision"], row["context"], row["batch"], row["contender"])
            numbers = f"{row['min_ms']:.2f} | {row['median_ms']:.2f} | {row['tokens_per_s']:.1f}"
            ratios = f"{row['min_over_first']} | {row['median_over_first']}"
            lines.append(f"| {' | '.join(map(str, cells))} | {numbers} | {ratios} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words, numbers = (lambda text: text.split(",")), (lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--sizes", type=words, default=["256/6", "768/12"], help=f"of {', '.join(models.SIZES)}")
    parser.add_argument("--precisions", type=words, default=["fp32"], help="int4-weight-only:64 is in blocks of 64")
    parser.add_argument("--contexts", type=numbers, default=[64, 1024])
    parser.add_argument("--batches", type=numbers, default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--processes", type=int, default=1, help="how often all contenders begin anew, each time another one first"
    )
    parser.add_argument("--steps", type=int, default=24, help=f"in each round, in turns of {TURN_STEPS}")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--contenders", type=words, default=list(field.NAMES), help="the first is what others are held to"
    )
    parser.add_argument("--genai", metavar="PYTHON", help="interpreter of the environment that has onnxruntime-genai")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/models"), help="keeps models and exports")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, write the JSON."""
    args = arguments()
    results = []
    for name in args.sizes:
        folder, size = args.folder / name.replace("/", "-"), models.SIZES[name]
        settings = [Setting(folder, size, precision, args.threads, args.genai) for precision in args.precisions]
        rows = measure(settings, args)
        for setting in settings:
            weights = weight_bytes(setting, args.contenders)
            of = {"size": name, "precision": setting.precision, "weight_bytes_per_step": weights}
            results.append(of | {"rows": rows[setting.precision]})
    print(table(results))
    if args.out:
        packages = ("lrt-deploy", "torch", "onnxruntime-gpu", "numpy")
        environment = {"cpu": cpu_model(), "threads": args.threads} | {name: version(name) for name in packages}
        command = " ".join(["benchmarks/side_by_side.py", *sys.argv[1:]])
        memory = {"triad_gb_s": bench.triad_gb_s(args.threads)}
        document = {"command": command, "environment": environment | memory, "results": results}
        args.out.write_text(json.dumps(document, indent=2, default=dataclasses.asdict) + "\n")


if __name__ == "__main__":
    main()
