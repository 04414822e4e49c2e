"""Compare ways to read a prompt by iteration, at equal exactness: passes, error after each pass, KL, and time.

Every algorithm stops, pass by pass, when its true error (latent, max abs, all positions, against stepwise reading) is
within a target: stopping rules play no part. Time counts the passes alone and is given as a share of headless stepwise
reading in the same run; the repetitions of all algorithms take turns. What lost is written here, not in the library.

    .venv/bin/python benchmarks/prefill_algorithms.py [--bundle B] [--tokens 256 700] [--out FILE.json]

Without --bundle, the demo's checkpoint is exported to a temporary folder. `--calibrate N`
reads N prompts at several tolerances instead and reports the KL of the next token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import lrt_deploy
from lrt_deploy.evaluation.rollout import kl_divergence
from lrt_deploy.runtime.backends.base import Block
from lrt_deploy.runtime.backends.ort_cpu import OrtCpuBackend, OrtCpuBuffers
from lrt_deploy.runtime.decoder import Decoder
from lrt_deploy.runtime.fixed_point import SweepOptions, Sweeps, finish
from lrt_deploy.tolerances import DEFAULT_PREFILL_TOLERANCE, SMALLEST_PREFILL_TOLERANCE
from lrt_deploy.types import FloatArray, IntArray

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo" / "checkpoint"
RECORDING = ROOT / "tests" / "data" / "demo_golden.npz"
TARGETS = (DEFAULT_PREFILL_TOLERANCE, SMALLEST_PREFILL_TOLERANCE)
MAX_PASSES = 40
INT8_PASSES = 3


@dataclass
class Lab:
    """One model, one prompt, and the truth about it."""

    decoder: Decoder
    ids: IntArray
    cheap: OrtCpuBackend | None  # the same model with matrices in INT8, made by ONNX Runtime's tool
    latents: FloatArray = field(init=False)  # (T, C) read stepwise
    logits: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        truth = self.part(Sweeps, self.ids, 0, self.zeros, SweepOptions())
        finish(truth.finish_stepwise())
        self.latents, self.logits = truth.latents[1:], truth.logits

    @property
    def zeros(self) -> FloatArray:
        """The latent before the first token."""
        return np.zeros(self.decoder.config.n_embd, np.float32)

    def allocate(self) -> OrtCpuBuffers:
        """Empty caches for one row."""
        assert self.decoder._backend is not None
        buffers = self.decoder._backend.allocate(1)
        assert isinstance(buffers, OrtCpuBuffers)
        return buffers

    def part(self, kind: type[Sweeps], ids: IntArray, start: int, carried: FloatArray, options: SweepOptions) -> Sweeps:
        """An algorithm on fresh caches."""
        return kind(self.allocate(), 0, ids, start, carried, options)

    def kl(self, logits: FloatArray) -> float:
        """Of the next token, against stepwise reading, in float64."""
        return kl_divergence(self.logits.astype(np.float64), logits.astype(np.float64))

    def stepwise_seconds(self) -> float:
        """Headless but for the last token."""
        buffers = self.allocate()
        begin = time.perf_counter()
        for t, token in enumerate(self.ids):
            buffers.decode(np.array([token]), np.array([t]), head=t == len(self.ids) - 1)
        return time.perf_counter() - begin


class ZeroFirst(Sweeps):
    """The first pass is one parallel pass with zero memory, as in the plain iteration; sweeps follow."""

    def sweep(self) -> None:
        """As the library's, but for the first."""
        if self.done:
            super().sweep()
            return
        order, count = np.concatenate(self.members), len(self.tokens)
        first, end = self.start, self.start + count
        block = Block(self.row, self.tokens[order], first + order, first, end, first, True)
        memory = np.zeros_like(self.latents[:-1])
        memory[order == 0] = self.latents[0]
        self.latents[order + 1], logits = self.buffers.read(block, memory)
        self.logits, self.blocks, self.computed = logits.copy(), self.stride, count


class Anderson(Sweeps):
    """The plain iteration, mixed with the step before it (depth 1): one dot product a pass."""

    step: FloatArray | None = None
    found: FloatArray

    def sweep(self) -> None:
        """One pass; the latents left behind are the mixture that the next pass starts from."""
        before = self.latents[1:].copy()
        super().sweep()
        found = self.latents[1:].copy()
        step = found - before
        if self.step is not None and self.done > 2:
            turn = step - self.step
            share = float((step * turn).sum() / max(float((turn * turn).sum()), 1e-30))
            self.latents[1:] = found - share * (found - self.found)
        self.step, self.found = step, found


class EarlyInt8(Sweeps):
    """The first sweeps run on a graph quantized to INT8 that writes the same caches; the last ones are exact."""

    cheap: OrtCpuBuffers

    def sweep(self) -> None:
        """As the library's, on one of two graphs."""
        exact = self.buffers
        self.buffers = self.cheap if self.done < INT8_PASSES else exact
        super().sweep()
        self.buffers = exact


def share_memory(cheap: OrtCpuBackend, exact: OrtCpuBuffers, tokens: int) -> OrtCpuBuffers:
    """Buffers of the cheap session, bound to the caches and bounds of the exact one, with room for the tokens."""
    buffers = cheap.allocate(1)
    for each in (exact, buffers):
        each._make_room(tokens)  # so that neither grows later
    for name in ("_caches", "_starts", "_end", "_slot_positions", "_seen_positions", "_room"):
        setattr(buffers, name, getattr(exact, name))
    return buffers


@dataclass
class Result:
    """What one algorithm needed for one target."""

    passes: float
    seconds: float
    error: float
    kl: float
    errors: list[float]  # after each pass, where the prompt is one chunk


class Clock:
    """Adds up the seconds spent in its `with` blocks."""

    seconds = 0.0

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self.begin


def read_in_chunks(lab: Lab, kind: type[Sweeps], stride: int, chunk_tokens: int, target: float) -> Result:
    """Sweep each chunk until its error is within the target."""
    buffers, carried, start, clock, computed = lab.allocate(), lab.zeros, 0, Clock(), 0
    errors: list[float] = []  # of a chunk, after each pass
    worst: list[float] = []  # of each chunk, after its last pass
    # What a chunk leaves wrong, the next one inherits.
    within = target if chunk_tokens >= len(lab.ids) else 0.8 * target
    for chunk in np.array_split(lab.ids, -(-len(lab.ids) // chunk_tokens)):
        truth = lab.latents[start : start + len(chunk)]
        sweeps = kind(buffers, 0, chunk, start, carried, SweepOptions(stride=stride))
        if isinstance(sweeps, EarlyInt8):
            assert lab.cheap is not None
            sweeps.cheap = share_memory(lab.cheap, buffers, len(lab.ids))
        order, errors = np.concatenate(sweeps.members), []
        with clock:
            buffers.reorder(0, start, order, move=False)
        while sweeps.done < MAX_PASSES and not (errors and errors[-1] <= within):
            with clock:
                sweeps.sweep()
            latents = getattr(sweeps, "found", sweeps.latents[1:])
            errors.append(float(np.abs(latents - truth).max()))
        with clock:
            buffers.reorder(0, start, order, move=True)
        worst.append(errors[-1])
        carried, start, computed = latents[-1].copy(), start + len(chunk), computed + sweeps.computed
    whole = chunk_tokens >= len(lab.ids)
    return Result(computed / len(lab.ids), clock.seconds, max(worst), lab.kl(sweeps.logits), errors if whole else [])


def read_active_window(lab: Lab, window_tokens: int, target: float) -> Result:
    """Compute only a window that begins at the first position whose latent still changes, and slides along."""
    buffers, ids, count = lab.allocate(), lab.ids, len(lab.ids)
    latents = np.zeros((count + 1, len(lab.zeros)), np.float32)
    first, computed, begin, logits = 0, 0, time.perf_counter(), lab.logits
    while first < count:
        end = min(count, first + window_tokens)
        block = Block(0, ids[first:end], np.arange(first, end), first, end, first, end == count)
        found, last = buffers.read(block, latents[first:end])
        still = np.flatnonzero(np.abs(found - latents[first + 1 : end + 1]).max(axis=1) > target / 4)
        latents[first + 1 : end + 1], computed = found, computed + end - first
        logits = last.copy() if end == count else logits
        first = end if still.size == 0 else first + max(1, int(still[0]))
    seconds = time.perf_counter() - begin
    error = float(np.abs(latents[1:] - lab.latents).max())
    return Result(computed / count, seconds, error, lab.kl(logits), [])


def algorithms(lab: Lab) -> Iterator[tuple[str, Callable[[float], Result]]]:
    """All that are compared, by name."""

    def chunked(kind: type[Sweeps], stride: int, chunk: int = 10**9) -> Callable[[float], Result]:
        return partial(read_in_chunks, lab, kind, stride, chunk)

    yield "plain (stride 1)", chunked(Sweeps, 1)
    yield "plain, Anderson depth 1", chunked(Anderson, 1)
    if lab.cheap is not None:
        yield f"plain, first {INT8_PASSES} passes INT8", chunked(EarlyInt8, 1)
        for stride, chunk in ((8, 10**9), (8, 256), (4, 256), (4, 128), (2, 128)):
            where = f", chunks of {chunk}" if chunk < len(lab.ids) else ""
            yield f"stride {stride}{where}, first {INT8_PASSES} passes INT8", chunked(EarlyInt8, stride, chunk)
    for stride in (2, 4, 8, 16, 32):
        yield f"stride {stride}", chunked(Sweeps, stride)
    for stride in (4, 8, 16):
        yield f"stride {stride}, first pass parallel with zero memory", chunked(ZeroFirst, stride)
    for chunk in (64, 128, 256, 512):
        if chunk < len(lab.ids):
            yield f"plain, chunks of {chunk}", chunked(Sweeps, 1, chunk)
            for stride in (2, 4, 8):
                yield f"stride {stride}, chunks of {chunk}", chunked(Sweeps, stride, chunk)
    for window in (64, 128, 256):
        yield f"plain, active window of {window}", partial(read_active_window, lab, window)


def compare(lab: Lab, repeats: int, only: str) -> list[dict[str, Any]]:
    """One row an algorithm; the fastest of the repetitions, which take turns."""
    best: dict[tuple[str, float], Result] = {}
    stepwise = min(lab.stepwise_seconds() for _ in range(repeats))
    for _ in range(repeats):
        for name, read in algorithms(lab):
            if only not in name:
                continue
            for target in TARGETS:
                result = read(target)
                if (name, target) not in best or result.seconds < best[name, target].seconds:
                    best[name, target] = result
        stepwise = min(stepwise, lab.stepwise_seconds())
    return [
        {"algorithm": name, "target": target, "time_of_stepwise": round(result.seconds / stepwise, 3)} | vars(result)
        for (name, target), result in best.items()
    ]


def calibrate(decoder: Decoder, tokens: IntArray, count: int) -> list[dict[str, Any]]:
    """KL of the next token at several tolerances, over prompts of many lengths from one text."""
    rows = []
    for tolerance in (2e-2, 1e-2, 5e-3, 2e-3):
        rng = np.random.default_rng(0)
        found = [measure_prompt(decoder, tokens, rng, tolerance) for _ in range(count)]
        kls, residuals, errors, passes = (np.array(column) for column in zip(*found, strict=True))
        iterated = residuals > 0
        rows.append(
            {
                "tolerance": tolerance,
                "prompts": count,
                "finished_stepwise": int((~iterated).sum()),
                "kl": {"median": float(np.median(kls)), "p90": float(np.quantile(kls, 0.9)), "worst": float(kls.max())},
                "error": {"median": float(np.median(errors)), "worst": float(errors.max())},
                "worst_error_of_residual": float((errors[iterated] / residuals[iterated]).max()),
                "worst_kl_of_squared_error": float((kls[iterated] / errors[iterated] ** 2).max()),
                "passes": {"mean": float(passes.mean()), "worst": float(passes.max())},
            }
        )
        print(json.dumps(rows[-1]))
    return rows


def measure_prompt(
    decoder: Decoder, tokens: IntArray, rng: np.random.Generator, tolerance: float
) -> tuple[float, float, float, float]:
    """KL, residual, true error of the carried latent, and passes, for a piece of the text."""
    length = int(rng.integers(64, decoder.config.sequence_len + 1))
    start = int(rng.integers(0, len(tokens) - length + 1))
    ids = tokens[start : start + length].tolist()
    expected = decoder.prefill([ids], policy="stepwise")
    state = decoder.prefill([ids], policy="fixed-point", tolerance=tolerance)
    kl = kl_divergence(expected.logits[0].astype(np.float64), state.logits[0].astype(np.float64))
    assert state.latent is not None and expected.latent is not None and state.prefill.residual is not None
    return kl, state.prefill.residual, float(np.abs(state.latent - expected.latent).max()), state.prefill.passes


def quantized(bundle: Path, decoder: Decoder, folder: Path) -> OrtCpuBackend | str:
    """A backend on a copy with matrices in INT8 (dynamic activations), or why there is none."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = bundle / "graphs" / "fp32" / "prefill.windowed.onnx"
    target = folder / source.relative_to(bundle)
    target.parent.mkdir(parents=True)
    (target.parent / "weights.bin").write_bytes((source.parent / "weights.bin").read_bytes())
    try:
        quantize_dynamic(source, target, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)
        return OrtCpuBackend(folder, decoder.manifest, "fp32")
    except Exception as error:  # the tool and the session raise what they like
        return f"{type(error).__name__}: {error}"


def default_bundle(folder: Path) -> tuple[Path, IntArray]:
    """Export the demo, and return held-out tokens of its golden."""
    lrt_deploy.export_bundle(DEMO, folder / "bundle", max_seq_len=1100)
    return folder / "bundle", np.load(RECORDING)["bpb_x"].reshape(-1)


def text_tokens(decoder: Decoder, count: int) -> IntArray:
    """Tokens of our own prose where there is a tokenizer, else random ones."""
    if decoder.tokenizer is None:
        return np.random.default_rng(0).integers(0, decoder.config.vocab_size, count)
    text = "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    return np.resize(np.array(decoder.tokenizer.encode_prompt(text), np.int64), count)


def print_table(rows: list[dict[str, Any]]) -> None:
    """As Markdown, one row an algorithm."""
    head = " | ".join(f"passes to {t:.0e} | time/stepwise | KL" for t in TARGETS)
    print(f"| algorithm | {head} |\n|---|{'---|' * 3 * len(TARGETS)}")
    for name in dict.fromkeys(row["algorithm"] for row in rows):
        cells = [
            f"{row['passes']:.1f}{'' if row['error'] <= row['target'] else ' (not reached)'} | "
            f"{row['time_of_stepwise']:.2f} | {row['kl']:.0e}"
            for row in rows
            if row["algorithm"] == name
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Compare, print a table a length, and write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 700])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="leave out algorithms whose name does not contain this")
    parser.add_argument("--calibrate", type=int, metavar="N")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        bundle, tokens = (args.bundle, None) if args.bundle else default_bundle(Path(temporary))
        with lrt_deploy.open_decoder(bundle, threads=args.threads) as decoder:
            tokens = text_tokens(decoder, 4096) if tokens is None else tokens
            if args.calibrate:
                report["calibration"] = calibrate(decoder, tokens, args.calibrate)
            else:
                report = compare_lengths(decoder, bundle, tokens, args)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


def compare_lengths(decoder: Decoder, bundle: Path, tokens: IntArray, args: argparse.Namespace) -> dict[str, Any]:
    """The table for each length."""
    with tempfile.TemporaryDirectory() as folder:
        cheap = quantized(bundle, decoder, Path(folder) / "int8")
    report: dict[str, Any] = {"backend": decoder.backend_detail, "int8": cheap if isinstance(cheap, str) else "made"}
    print(f"{decoder.backend_detail}; INT8 copy: {report['int8']}")
    for length in args.tokens:
        lab = Lab(decoder, tokens[:length], None if isinstance(cheap, str) else cheap)
        report[str(length)] = rows = compare(lab, args.repeats, args.only)
        print(f"\n{length} tokens\n")
        print_table(rows)
        for row in rows:
            if row["errors"] and row["target"] == min(TARGETS):
                print(f"error after each pass, {row['algorithm']}: {' '.join(f'{e:.0e}' for e in row['errors'])}")
    return report


if __name__ == "__main__":
    main()
