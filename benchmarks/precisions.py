"""What each precision costs in quality: bits per byte, distance from float32 on real text, and 200-step rollouts.

Everything is decoded token by token with the latent fed back, on ONNX Runtime's CPU provider. Three tables:

- quality: bits per byte (the authors' count), mean KL and equal first choices against the float32 graphs on the same
  rows, then greedy rollouts against the PyTorch reference;
- calibration: W8A8 with activation scales from stateful rollouts, and from the same tokens one by one (empty state,
  zero latent); the graphs are the same but for these scales;
- keep-high: W8A8 with other lists of matrices that stay precise.

    python benchmarks/precisions.py CHECKPOINT GOLDEN.npz [--steps 200] [--work FOLDER]

GOLDEN.npz holds `bpb_x`, `bpb_y` (N, T), `token_bytes` (V) and prompts `prompt_ids`, `prompt2_ids`, ...
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

import lrt_deploy
from lrt_deploy.checkpoint import open_checkpoint
from lrt_deploy.evaluation import evaluate
from lrt_deploy.exporters.calibration import calibrate
from lrt_deploy.exporters.calibration_text import calibration_rows
from lrt_deploy.exporters.lower import matrix_name
from lrt_deploy.manifest import graph_path, read_manifest, write_manifest
from lrt_deploy.parity import compare, kl_divergence
from lrt_deploy.reference import ReferenceDecoder
from lrt_deploy.runtime.decoder import Decoder
from lrt_deploy.tokenizer import Tokenizer

PRECISIONS = ("fp32", "fp16", "int8", "int8-weight-only", "int4-weight-only")
KEPT = (("none",), ("gate",), ("gate", "memory_kv"), ("gate", "lm_head"), ("gate", "mlp_out"))
CAPACITY = 512


@dataclass
class Text:
    """Rows of real text, and prompts to roll out from."""

    x: np.ndarray  # (N, T)
    y: np.ndarray  # (N, T)
    token_bytes: np.ndarray  # (V)
    prompts: list[list[int]]


def main() -> None:
    """Export, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("golden", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--work", type=Path, help="folder for bundles, kept; default: a temporary one")
    arguments = parser.parse_args()
    text = load(arguments.golden)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        bundle = export(arguments.checkpoint, work / "all", PRECISIONS)
        quality(arguments.checkpoint, bundle, text, arguments.steps)
        calibrations(arguments.checkpoint, bundle, work, text)
        keep_high(arguments.checkpoint, bundle, work, text)


def load(path: Path) -> Text:
    """Rows and prompts of a golden."""
    with np.load(path) as file:
        prompts = [file[name].tolist() for name in sorted(file) if name.startswith("prompt")]
        return Text(file["bpb_x"], file["bpb_y"], file["token_bytes"], prompts)


def export(checkpoint: Path, folder: Path, precisions: tuple[str, ...], keep: tuple[str, ...] | None = None) -> Path:
    """The bundle in `folder`, made where it is not there yet."""
    if not folder.exists():
        kept = None if keep is None else [name for name in keep if name != "none"]
        lrt_deploy.export_bundle(checkpoint, folder, precision=precisions, max_seq_len=CAPACITY, keep_high=kept)
    return folder


def quality(checkpoint: Path, bundle: Path, text: Text, steps: int) -> None:
    """The first table, and the rollouts."""
    print("\n| precision | weights, bytes | bits per byte | change | mean KL | max KL | same first choice |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    baseline = 0.0
    for precision in PRECISIONS:
        with opened(bundle, "fp32") as exact, opened(bundle, precision) as decoder:
            bits = bits_per_byte(decoder, text)
            baseline = baseline or bits
            kl, same = distance(exact, decoder, text)
        size = (bundle / "graphs" / precision / "weights.bin").stat().st_size
        print(
            f"| {precision} | {size:,} | {bits:.4f} | {bits / baseline - 1:+.3%} | {kl.mean():.1e} | {kl.max():.1e} | "
            f"{same:.2%} |"
        )
    print(f"\n| precision | prompt | {steps}-step greedy rollout: mean KL | max KL | same first choice | parts at |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for precision in PRECISIONS:
        for number, line in enumerate(rollouts(checkpoint, bundle, precision, text, steps)):
            print(f"| {precision} | {number} | {line}")


def rollouts(checkpoint: Path, bundle: Path, precision: str, text: Text, steps: int) -> Iterator[str]:
    """A line of the table for each prompt."""
    reference = ReferenceDecoder(open_checkpoint(checkpoint).model(CAPACITY), max_seq_len=CAPACITY)
    with opened(bundle, precision) as decoder:
        for prompt in text.prompts:
            found = compare(
                reference,
                decoder,
                prompt,
                steps,
                precision=precision,
                checkpoint_matches=True,
                backend=decoder.backend,
                prefill="stepwise",
            )
            parted = found.first_divergence
            where = "never" if parted is None else f"step {parted.step} (margin {parted.margin:.1e})"
            errors = f"logits {found.max_abs_logit_error:.1e}, latent {found.max_abs_latent_error or 0:.1e}"
            yield f"{found.mean_kl:.1e} | {found.max_kl:.1e} | {found.top1_agreement:.2%} | {where}; {errors} |"


def calibrations(checkpoint: Path, bundle: Path, work: Path, text: Text) -> None:
    """What calibrating on rollouts is worth."""
    print("\n| W8A8 calibrated on | bits per byte | mean KL | same first choice |\n| --- | ---: | ---: | ---: |")
    rows = calibration_rows(None, Tokenizer.open(bundle / "tokenizer"), len(text.token_bytes), CAPACITY).tokens
    model = open_checkpoint(checkpoint).model(CAPACITY)
    single = calibrate(model, [[token] for row in rows for token in row])
    scales = {name: seen.scale() for name, seen in single.inputs.items()}
    for what, folder in (
        ("stateful rollouts", bundle),
        ("the same tokens, one step each", rescaled(bundle, work / "one-step", scales)),
    ):
        print(f"| {what} | {measured(bundle, folder, text)} |")


def keep_high(checkpoint: Path, bundle: Path, work: Path, text: Text) -> None:
    """What keeping matrices precise is worth."""
    print("\n| W8A8 keeps precise | bits per byte | mean KL | same first choice |\n| --- | ---: | ---: | ---: |")
    for keep in KEPT:
        folder = export(checkpoint, work / f"keep-{'-'.join(keep)}", ("int8",), keep)
        print(f"| {', '.join(keep)} | {measured(bundle, folder, text)} |")


def measured(exact: Path, folder: Path, text: Text) -> str:
    """The columns of one W8A8 bundle."""
    with opened(exact, "fp32") as truth, opened(folder, "int8") as decoder:
        kl, same = distance(truth, decoder, text)
        return f"{bits_per_byte(decoder, text):.4f} | {kl.mean():.2e} | {same:.2%}"


def opened(bundle: Path, precision: str) -> Decoder:
    """One thread: results do not depend on how work is split."""
    return lrt_deploy.open_decoder(bundle, precision=precision, threads=1)


def bits_per_byte(decoder: Decoder, text: Text) -> float:
    """Sequential, as the authors count."""
    return evaluate(decoder, text.x, text.y, text.token_bytes, decoder.manifest.max_batch_size).bits_per_byte


def distance(exact: Decoder, other: Decoder, text: Text) -> tuple[np.ndarray, float]:
    """KL (N * T) of `other` from `exact` over the rows, each feeding on its own state, and equal first choices."""
    kl, same = [], []
    first = text.x[:, :1].tolist()
    states = [decoder.prefill(first, policy="stepwise") for decoder in (exact, other)]
    logits = [state.logits for state in states]
    for t in range(text.x.shape[1]):
        if t:
            steps = zip((exact, other), states, strict=True)
            logits = [decoder.step(state, text.x[:, t]) for decoder, state in steps]
        p, q = (array.astype(np.float64) for array in logits)
        kl += [kl_divergence(a, b) for a, b in zip(p, q, strict=True)]
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    return np.array(kl), float(np.mean(same))


def rescaled(bundle: Path, folder: Path, scales: dict[str, float]) -> Path:
    """A copy of the bundle whose W8A8 graphs have other activation scales."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bundle, folder)
    path = folder / graph_path("int8", "prefill", "windowed")
    model = ir.load(path)
    for node in model.graph:
        producer = node.inputs[0].producer() if node.op_type == "MatMul" else None
        if producer is None or producer.op_type != "DequantizeLinear":
            continue
        widened = producer.inputs[1].producer()
        name, scale = matrix_name(node), widened.inputs[0]
        scale.const_value = ir.tensor(np.array(scales[name], np.float16), name=scale.name)
    ir.save(model, path)
    write_manifest(folder, read_manifest(folder))
    return folder


if __name__ == "__main__":
    main()
