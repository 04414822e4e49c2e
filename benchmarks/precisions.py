"""What quantizing costs on real text: bits per byte, and the distance from float32.

Everything is decoded token by token with the latent fed back, on ONNX Runtime's CPU provider; KL in nats per token
from the float32 graphs on the same rows, each side on its own state. Four tables:

- quality: every precision;
- calibration: W8A8 with activation scales from stateful rollouts, and from the same tokens one by one (empty state,
  zero latent); the graphs are the same but for these scales;
- keep-high: W8A8 with other lists of matrices that stay precise;
- blocks: INT4 with 32, 64 and 128 rows to a scale, where the model's width allows, plain and compensated.

    python benchmarks/precisions.py CHECKPOINT ROWS [--work FOLDER]

ROWS is an .npz with `bpb_x`, `bpb_y` (N, T) and `token_bytes` (V), or a text, of which the first 16 rows of 256 tokens
are taken. Rollouts against the PyTorch reference: precision_rollouts.py.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import lrt_deploy
from lrt_deploy.bundle.manifest import graph_path, read_manifest, weights_path, write_manifest
from lrt_deploy.evaluation.bits_per_byte import evaluate, rows_from_text
from lrt_deploy.evaluation.rollout import kl_divergence
from lrt_deploy.exporters.graph.rewrite import matrix_name
from lrt_deploy.exporters.quantize.calibrate import calibrate, calibration_rows
from lrt_deploy.model.checkpoint import open_checkpoint
from lrt_deploy.runtime.decoder import Decoder
from lrt_deploy.text.tokenizer import Tokenizer

PRECISIONS = ("fp32", "fp16", "int8", "int8-weight-only", "int4-weight-only")
KEPT = (("none",), ("gate",), ("gate", "memory_kv"), ("gate", "lm_head"), ("gate", "mlp_out"))
BLOCKS = (32, 64, 128)
CAPACITY = 512
ROWS, ROW_TOKENS = 16, 256  # of a text


@dataclass
class Text:
    """Rows of real text."""

    x: np.ndarray  # (N, T)
    y: np.ndarray  # (N, T)
    token_bytes: np.ndarray  # (V)


def main() -> None:
    """Export, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--work", type=Path, help="folder for bundles, kept; default: a temporary one")
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        bundle = export(checkpoint, work / "all", PRECISIONS)
        text = load(arguments.rows, Tokenizer.open(bundle / "tokenizer"))
        quality(bundle, text)
        calibrations(checkpoint, bundle, work, text)
        keep_high(checkpoint, bundle, work, text)
        blocks(checkpoint, bundle, work, text)


def load(path: Path, tokenizer: Tokenizer) -> Text:
    """Rows of a golden or of a text."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            return Text(file["bpb_x"], file["bpb_y"], file["token_bytes"])
    x, y = rows_from_text(path.read_text(encoding="utf-8"), tokenizer, ROW_TOKENS)
    whole = min(ROWS, sum(len(row) == ROW_TOKENS for row in x))
    return Text(np.array(x[:whole]), np.array(y[:whole]), np.array(tokenizer.byte_lengths))


def export(checkpoint: Path, folder: Path, precisions: tuple[str, ...], **options: Any) -> Path:  # noqa: ANN401 - theirs
    """The bundle in `folder`, made where it is not there yet; the options are `export_bundle`'s."""
    if not folder.exists():
        size = {"max_seq_len": CAPACITY, "max_batch_size": ROWS}
        lrt_deploy.export_bundle(checkpoint, folder, precision=precisions, **size, **options)
    return folder


def quality(bundle: Path, text: Text) -> None:
    """The first table."""
    print(f"{text.x.size:,} tokens")
    print("\n| precision | weights, bytes | bits per byte | change | mean KL | max KL | same first choice |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    baseline = 0.0
    for precision in PRECISIONS:
        found = measured(bundle, bundle, precision, text)
        baseline = baseline or found.bits
        size = (bundle / weights_path(precision)).stat().st_size
        print(
            f"| {precision} | {size:,} | {found.bits:.4f} | {found.bits / baseline - 1:+.3%} | {found.kl.mean():.1e} | "
            f"{found.kl.max():.1e} | {found.same:.2%} |"
        )


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
        print(f"| {what} | {measured(bundle, folder, 'int8', text)} |")


def keep_high(checkpoint: Path, bundle: Path, work: Path, text: Text) -> None:
    """What keeping matrices precise is worth."""
    print("\n| W8A8 keeps precise | bits per byte | mean KL | same first choice |\n| --- | ---: | ---: | ---: |")
    for keep in KEPT:
        kept = [name for name in keep if name != "none"]
        folder = export(checkpoint, work / f"keep-{'-'.join(keep)}", ("int8",), keep_high=kept)
        print(f"| {', '.join(keep)} | {measured(bundle, folder, 'int8', text)} |")


def blocks(checkpoint: Path, bundle: Path, work: Path, text: Text) -> None:
    """What longer blocks cost, and what compensating gives back."""
    width = read_manifest(bundle).model.n_embd
    print("\n| INT4, rows to a scale | | bits per byte | mean KL | same first choice |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for block in [block for block in BLOCKS if width % block == 0]:
        for compensate in (False, True):
            how = "compensated" if compensate else "plain"
            options = {"int4_block": block, "compensate": compensate}
            folder = export(checkpoint, work / f"int4-{block}-{how}", ("int4-weight-only",), **options)
            print(f"| {block} | {how} | {measured(bundle, folder, 'int4-weight-only', text)} |")


@dataclass
class Quality:
    """How well a precision predicts, and how far it is from float32."""

    bits: float  # per byte
    kl: np.ndarray  # (N * T)
    same: float  # share of equal first choices

    def __str__(self) -> str:
        return f"{self.bits:.4f} | {self.kl.mean():.2e} | {self.same:.2%}"


def measured(exact: Path, folder: Path, precision: str, text: Text) -> Quality:
    """One precision of the bundle in `folder`, against float32 in `exact`."""
    with opened(exact, "fp32") as truth, opened(folder, precision) as decoder:
        bits = evaluate(decoder, text.x, text.y, text.token_bytes, len(text.x)).bits_per_byte
        return Quality(bits, *distance(truth, decoder, text))


def opened(bundle: Path, precision: str) -> Decoder:
    """One thread: results do not depend on how work is split."""
    return lrt_deploy.open_decoder(bundle, precision=precision, threads=1)


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
