r"""Export models in every precision, as they should be, and see that `parity` passes them in all its parts.

Each checkpoint that is named, as often as it is named, and a number of random models are exported in fp32, fp16, int8,
int8-weight-only and int4-weight-only, with options that change from one export to the next: GPTQ or plain rounding,
which matrices are kept precise, the block of int4. `lrt_deploy.parity` must pass with each: weights, the windowed graph
and the kernels that ran; the graph of the `full` flavour is held to the same limits. Quality is judged by its limits
where the model is trained; elsewhere it is measured.

A line of JSON is added to RESULTS for each precision of each export; exports that are in it are not done again. The
tables are of all lines in it. Exits with 1 if something failed. About half a minute an export on one core.

    python benchmarks/right_exports.py --trained demo/checkpoint --untrained tests/data/golden/* --random 8 \
        --results RESULTS.jsonl [--markdown FILE.md]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from random_models import random_model, write_native

import lrt_deploy
from lrt_deploy.model.checkpoint import open_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from parity_random import draw_config
from planted_faults import PRECISIONS, Graphs

CAPACITY, RANDOM_CAPACITY = 384, 96
KEEP_HIGH: tuple[tuple[str, ...] | None, ...] = (None, (), ("mlp_out",), ("lm_head", "attention_out"))
BLOCKS = (None, 64, 128)
NO_LIMITS = {"max_kl": 15.0, "min_agreement": 0.0}


@dataclass(frozen=True)
class Case:
    """One export: of the checkpoint in `folder`, or of a random model where that is None."""

    index: int
    name: str
    folder: Path | None
    trained: bool

    @property
    def options(self) -> dict[str, Any]:
        """The options of the export that change from one to the next."""
        return {
            "compensate": self.index % 2 == 1,
            "keep_high": KEEP_HIGH[(self.index // 2) % len(KEEP_HIGH)],
            "int4_block": BLOCKS[(self.index // 2) % len(BLOCKS)],
        }

    @property
    def words(self) -> str:
        """The options in the words of the command line."""
        options, words = self.options, []
        if options["compensate"]:
            words.append("--compensate")
        if options["keep_high"] is not None:
            words.append("--keep-high " + ("none" if not options["keep_high"] else ", ".join(options["keep_high"])))
        if options["int4_block"] is not None:
            words.append(f"--int4-block {options['int4_block']}")
        return ", ".join(words) or "defaults"


def cases(trained: list[Path], untrained: list[Path], count: int) -> list[Case]:
    """All exports: the named checkpoints in their order, then the random models."""
    named = [(path, True) for path in trained] + [(path, False) for path in untrained]
    found = [Case(i, _name(path), path, is_trained) for i, (path, is_trained) in enumerate(named)]
    return found + [Case(len(named) + i, f"random {i}", None, trained=False) for i in range(count)]


def _name(path: Path) -> str:
    """What a checkpoint is called: its folder's name, or that of the folder around one called checkpoint."""
    path = path.resolve()
    return path.parent.name if path.name == "checkpoint" else path.name


def random_checkpoint(index: int, folder: Path) -> Path:
    """Write a random model of any size; every second one is up to 256 wide."""
    rng = random.Random(1000 + index)  # noqa: S311 - draws test cases
    config = draw_config(rng)
    if index % 2:
        config = dataclasses.replace(config, n_embd=config.n_head * rng.choice((32, 48, 64)))
    write_native(random_model(config, seed=index, memory_scale=rng.choice((0.3, 1.0))), folder)
    return folder


def export_and_judge(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Export one case and judge each precision; returns the lines for the results."""
    source = case.folder or random_checkpoint(case.index, folder / "checkpoint")
    checkpoint, began = open_checkpoint(source), time.monotonic()
    capacity = min(checkpoint.config.max_positions, RANDOM_CAPACITY if case.folder is None else CAPACITY)
    lrt_deploy.export_bundle(source, folder / "bundle", precision=PRECISIONS, max_seq_len=capacity, **case.options)
    exported = time.monotonic() - began
    model = {name: getattr(checkpoint.config, name) for name in ("n_layer", "n_embd", "memory")}
    same = {"index": case.index, "name": case.name, "trained": case.trained, "options": case.words, **model}
    lines = []
    for precision in PRECISIONS:
        began = time.monotonic()
        line = same | {"precision": precision, "export_s": round(exported, 1)} | judged(case, source, folder, precision)
        lines.append(line | {"parity_s": round(time.monotonic() - began, 1)})
    return lines


def judged(case: Case, source: Path, folder: Path, precision: str) -> dict[str, Any]:
    """What parity makes of one precision, and the graph of the other flavour."""
    options = {} if case.trained or precision == "fp32" else NO_LIMITS
    report = lrt_deploy.parity(folder / "bundle", source, precision=precision, **options)
    full = Graphs(folder / "bundle", open_checkpoint(source), precision, "full").part(None, folder)
    assert full is not None and report.weights is not None
    ran = report.arithmetic
    worst = report.weights.worst
    return {
        "passed": report.passed and full.passed,
        "verdict": report.verdict if report.passed else f"{report.verdict}; full: {full.line}",
        "weights": None if worst is None else dataclasses.asdict(worst),
        "full": dataclasses.asdict(full.graph),
        "windowed": None if ran is None else dataclasses.asdict(ran.graph),
        "kernels": None if ran is None or ran.kernels is None else dataclasses.asdict(ran.kernels),
        "logit_error": report.max_abs_logit_error,
        "latent_error": report.max_abs_latent_error,
        "mean_kl": report.mean_kl,
        "top1_agreement": report.top1_agreement,
        "median_margin": median(point.margin for point in report.points) if report.points else None,
        "positions": len(report.points),
    }


def tables(lines: list[dict[str, Any]]) -> str:
    """Both tables in Markdown: exports by precision, and the largest errors of each precision."""
    rows = ["| model | layers, width | export | " + " | ".join(PRECISIONS) + " |"]
    rows.append("| --- | --- | --- |" + " --- |" * len(PRECISIONS))
    by_case: dict[int, dict[str, dict[str, Any]]] = {}
    for line in lines:
        by_case.setdefault(line["index"], {})[line["precision"]] = line
    for case in (found for _, found in sorted(by_case.items())):
        one = next(iter(case.values()))
        shape = f"{one['n_layer']}, {one['n_embd']}" + ("" if one["memory"] else ", no memory")
        words = ["pass" if case[p]["passed"] else "**FAIL**" if p in case else "-" for p in PRECISIONS]
        rows.append(f"| {one['name']} | {shape} | {one['options']} | {' | '.join(words)} |")
    rows += ["", "| precision | passed | graphs: logits | latent | kernels: logits | typical | latent | "]
    rows[-1] += "trained: largest mean KL | least same first choice |"
    rows.append("| --- | --- |" + " ---: |" * 7)
    return "\n".join(rows + [_summary(p, [line for line in lines if line["precision"] == p]) for p in PRECISIONS])


def _summary(precision: str, lines: list[dict[str, Any]]) -> str:
    """The largest errors of one precision, a row of the second table."""

    def largest(parts: tuple[str, ...], field: str) -> str:
        found = [line[part][field] for line in lines for part in parts if line[part] is not None]
        return f"{max(found):.1e}" if found else "-"

    graph, trained = ("full", "windowed"), [line for line in lines if line["trained"]]
    fields = ("max_abs_logit_error", "typical_logit_error", "max_abs_latent_error")
    cells = [f"{sum(line['passed'] for line in lines)} of {len(lines)}", largest(graph, fields[0])]
    cells += [largest(graph, fields[2]), *(largest(("kernels",), field) for field in fields)]
    cells.append(f"{max((line['mean_kl'] for line in trained), default=0):.1e}")
    cells.append(f"{min((line['top1_agreement'] for line in trained), default=1):.1%}")
    return f"| {precision} | {' | '.join(cells)} |"


def main() -> None:
    """Export what is not in the results yet, then print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, nargs="*", default=[], metavar="CHECKPOINT")
    parser.add_argument("--untrained", type=Path, nargs="*", default=[], metavar="CHECKPOINT")
    parser.add_argument("--random", type=int, default=8, help="how many random models")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    before = args.results.read_text(encoding="utf-8") if args.results.exists() else ""
    lines = [json.loads(line) for line in before.splitlines()]
    done = {line["index"] for line in lines}
    for case in cases(args.trained, args.untrained, args.random):
        if case.index in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = export_and_judge(case, Path(folder))
        with args.results.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in found)
        lines += found
        failed = [f"{line['precision']}: {line['verdict']}" for line in found if not line["passed"]]
        print(f"{case.index}: {case.name}, {case.words}: {'; '.join(failed) or 'all pass'}", flush=True)
    text = tables(lines)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    if not all(line["passed"] for line in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
