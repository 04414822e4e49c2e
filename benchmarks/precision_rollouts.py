"""Precisions side by side on a golden, as a table and as JSON: KL, equal first choices, divergence, bits per byte.

Rollouts of 256 greedy steps from each of the golden's prompts against the PyTorch reference in float32, on ONNX
Runtime's CPU provider; bits per byte of the golden's rows. Two more rows: INT4 with every matrix quantized, and with
gates, head and attention output projections kept precise and the others rounded by GPTQ, measured like the others.
`--bundle` takes a bundle that has the precisions, and leaves these two rows out.

    python benchmarks/precision_rollouts.py GOLDEN_FOLDER [--steps 256] [--work FOLDER] [--out FILE.json]
    python benchmarks/precision_rollouts.py demo/checkpoint --recording tests/data/demo_golden.npz --bundle BUNDLE
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lrt_deploy
from lrt_deploy.bundle.manifest import weights_path
from lrt_deploy.evaluation.bits_per_byte import evaluate
from lrt_deploy.evaluation.rollout import Comparison, compare_rollouts
from lrt_deploy.model.checkpoint import open_checkpoint
from lrt_deploy.model.reference import ReferenceDecoder

PRECISIONS = ("fp32", "fp16", "int8", "int8-weight-only", "int4-weight-only")
INT4 = "int4-weight-only"
KEPT = ("gate", "lm_head", "attention_out")
CAPACITY = 384


@dataclass(frozen=True)
class Golden:
    """A checkpoint and the data it is measured on."""

    folder: Path
    arrays: dict[str, Any]

    @property
    def prompts(self) -> list[list[int]]:
        """All prompts of greedy runs."""
        return [self.arrays[name].tolist() for name in sorted(self.arrays) if name.startswith("prompt")]


def measure(golden: Golden, bundle: Path, precision: str, steps: int, label: str) -> dict[str, Any]:
    """One row of the table."""
    model = open_checkpoint(golden.folder).model(CAPACITY)
    reference = ReferenceDecoder(model, CAPACITY)
    with lrt_deploy.open_decoder(bundle, precision=precision, threads=1) as decoder:
        rollouts = [compare_rollouts(reference, decoder, prompt, steps, ("auto", None)) for prompt in golden.prompts]
        arrays = golden.arrays
        bits = evaluate(decoder, arrays["bpb_x"], arrays["bpb_y"], arrays["token_bytes"], batch_size=8).bits_per_byte
    points = [point for rollout in rollouts for point in rollout.points]
    parts = [next((i for i, point in enumerate(rollout.choices) if not point.same_top1), None) for rollout in rollouts]
    return {
        "precision": label,
        "mean_kl": sum(point.kl for point in points) / len(points),
        "max_kl": max(point.kl for point in points),
        "top1_agreement": sum(point.same_top1 for point in points) / len(points),
        "first_divergence": parts,
        "bits_per_byte": bits,
        "weight_bytes": (bundle / weights_path(precision)).stat().st_size,
        "positions": by_step(rollouts),
    }


def by_step(rollouts: list[Comparison]) -> dict[str, list[float]]:
    """The largest error of the logits and the largest KL of all rollouts after each step, in three digits."""
    steps = list(zip(*(rollout.choices for rollout in rollouts), strict=True))
    return {
        name: [float(f"{max(getattr(point, name) for point in points):.3g}") for points in steps]
        for name in ("logit_error", "kl")
    }


def show(rows: list[dict[str, Any]], steps: int) -> None:
    """The table in Markdown."""
    print(
        f"\n| precision | mean KL | largest KL | same first choice | parts at, of {steps} | bits per byte | weights |"
    )
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: |")
    for row in rows:
        parts = ", ".join("never" if at is None else str(at) for at in row["first_divergence"])
        kl = f"{row['mean_kl']:.1e} | {row['max_kl']:.1e} | {row['top1_agreement']:.1%}"
        rest = f"{parts} | {row['bits_per_byte']:.4f} | {row['weight_bytes'] / 1e6:.1f} MB"
        print(f"| {row['precision']} | {kl} | {rest} |")


def main() -> None:
    """Export where no bundle is given, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=Path)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--work", type=Path, help="folder for bundles, kept; default: a temporary one")
    parser.add_argument("--recording", type=Path, help="its prompts and rows; default: golden.npz in the folder")
    parser.add_argument("--bundle", type=Path, help="an existing bundle of these precisions")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    with np.load(args.recording or args.golden / "golden.npz") as file:
        golden = Golden(args.golden, dict(file))
    if args.bundle:
        rows = [measure(golden, args.bundle, precision, args.steps, precision) for precision in PRECISIONS]
    else:
        with tempfile.TemporaryDirectory() as temporary:
            rows = exported(golden, args.work or Path(temporary), args.steps)
    show(rows, args.steps)
    if args.out:
        args.out.write_text(json.dumps({"steps": args.steps, "rows": rows}) + "\n")


def exported(golden: Golden, work: Path, steps: int) -> list[dict[str, Any]]:
    """Export all precisions and the two variants of INT4, and measure them."""
    every, plain, best = work / "every", work / "plain", work / "kept"
    if not every.exists():
        lrt_deploy.export_bundle(golden.folder, every, precision=PRECISIONS, max_seq_len=CAPACITY)
        lrt_deploy.export_bundle(golden.folder, plain, precision=INT4, max_seq_len=CAPACITY, keep_high=())
    rows = [measure(golden, every, precision, steps, precision) for precision in PRECISIONS]
    rows.append(measure(golden, plain, INT4, steps, f"{INT4}, all quantized"))
    kept: dict[str, Any] = {"keep_high": KEPT, "compensate": True, "force": True}
    lrt_deploy.export_bundle(golden.folder, best, precision=INT4, max_seq_len=CAPACITY, **kept)
    rows.append(measure(golden, best, INT4, steps, f"{INT4}, three kept, GPTQ"))
    return rows


if __name__ == "__main__":
    main()
