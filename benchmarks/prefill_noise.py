"""What stopping at the rounding noise of a precision costs: iterated prompts against stepwise, beside the noise itself.

Each prompt is read stepwise, by iteration as a decoder reads it, by many more sweeps, and stepwise in a batch of 8. KL
is over the next token and 24 more of the text, teacher-forced, so that it has the cache in it as well as the latent; in
float64, in nats. More sweeps show the noise of the kernels that run: no reading in blocks is nearer to stepwise.

    .venv/bin/python benchmarks/prefill_noise.py BUNDLE [--precision P] [--prompts 15] [--threads 1]

Takes the repository's own prose where the bundle has a tokenizer, every third prompt and all others random tokens.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import lrt_deploy
from lrt_deploy.evaluation.rollout import kl_divergence
from lrt_deploy.runtime.decoder import Decoder
from lrt_deploy.runtime.fixed_point import RowReading, SweepOptions, Sweeps, chunk_size, finish, read_row
from lrt_deploy.tolerances import prefill_limits
from lrt_deploy.types import FloatArray, IntArray

ROOT = Path(__file__).parents[1]
LENGTHS = (24, 60, 100, 200, 384)
FOLLOWING = 24
MANY_SWEEPS = 9
BATCH = 8


@dataclass(frozen=True)
class Reading:
    """A prompt that was read, and what follows."""

    latents: FloatArray  # (T, C)
    logits: FloatArray  # (1 + FOLLOWING, V)
    passes: float = 1.0
    residual: float = 0.0
    fallback: str | None = None


@dataclass(frozen=True)
class Difference:
    """One reading against stepwise."""

    error: float  # of the latents, max abs
    rms: float
    kl: float
    same: float  # share of equal first choices


class Lab:
    """A decoder and its text."""

    def __init__(self, decoder: Decoder) -> None:
        assert decoder._backend is not None
        self.decoder, self.backend = decoder, decoder._backend
        limits = prefill_limits(decoder.precision)
        self.tolerance = limits.default
        sweeps = decoder.prefill_options.sweeps
        self.options = replace(sweeps, noise=limits.noise, noise_rms=limits.noise_rms)

    def tokens(self, number: int) -> IntArray:
        """A prompt and what follows it."""
        count, rng = LENGTHS[number % len(LENGTHS)] + FOLLOWING, np.random.default_rng(1000 + number)
        if self.decoder.tokenizer is None or number % 3 == 2:
            return rng.integers(0, self.decoder.config.vocab_size, count)
        text = "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
        ids = np.array(self.decoder.tokenizer.encode_prompt(text), np.int64)
        start = int(rng.integers(0, len(ids) - count))
        return ids[start : start + count]

    def stepwise(self, ids: IntArray, rows: int) -> Reading:
        """Read in a batch of equal rows; of these, take the first."""
        buffers, latents, logits = self.backend.allocate(rows), [], []
        for t, token in enumerate(ids):
            found = buffers.decode(np.repeat(token, rows), np.full(rows, t), True)
            assert found is not None
            latents.append(np.array(buffers.latent[0]))
            logits.append(found[0].copy())
        prompt = len(ids) - FOLLOWING
        return Reading(np.stack(latents[:prompt]), np.stack(logits[prompt - 1 :]))

    def iterated(self, ids: IntArray, sweeps: int | None = None) -> Reading:
        """Read as a decoder does, or with this many sweeps."""
        buffers, prompt = self.backend.allocate(1), ids[:-FOLLOWING]
        if sweeps is None:
            found = finish(read_row(buffers, 0, prompt, 0, self.tolerance, self.options))
        else:
            found = self.swept(buffers, prompt, sweeps)
        buffers.set_latent(np.array([0]), found.latents[-1:])
        logits = [found.logits.copy()]
        for t in range(len(prompt), len(ids)):
            after = buffers.decode(ids[t : t + 1], np.array([t]), True)
            assert after is not None
            logits.append(after[0].copy())
        passes = found.computed / len(prompt)
        return Reading(found.latents, np.stack(logits), passes, found.residual, found.fallback)

    def swept(self, buffers: object, prompt: IntArray, sweeps: int) -> RowReading:
        """As `read_row`, without an estimate."""
        latents, carried, computed = [], np.zeros(self.decoder.config.n_embd, np.float32), 0
        start, plain = 0, SweepOptions()
        while start < len(prompt):
            chunk = prompt[start:][: chunk_size(start, len(prompt), plain)]
            part = Sweeps(buffers, 0, chunk, start, carried, self.options)  # type: ignore[arg-type]
            order = np.concatenate(part.members)
            part.buffers.reorder(0, start, order, move=False)
            while part.done < sweeps and part.exact < len(chunk):
                part.sweep()
            part.buffers.reorder(0, start, order, move=True)
            latents.append(part.latents[1:])
            carried, start, computed = part.latents[-1], start + len(chunk), computed + part.computed
        return RowReading(np.concatenate(latents), part.logits, computed, 0.0, None)


def difference(truth: Reading, other: Reading) -> Difference:
    """Latents over the prompt; KL and first choices over the tokens after it."""
    error = other.latents.astype(np.float64) - truth.latents
    pairs = list(zip(truth.logits.astype(np.float64), other.logits.astype(np.float64), strict=True))
    same = np.mean(truth.logits.argmax(1) == other.logits.argmax(1))
    kl = np.mean([kl_divergence(a, b) for a, b in pairs])
    return Difference(float(np.abs(error).max()), float(np.sqrt((error**2).mean())), float(kl), float(same))


def report(lab: Lab, prompts: int) -> None:
    """Print one line a way of reading, as Markdown."""
    ways: dict[str, list[tuple[Reading, Difference]]] = {"iterated": [], "more sweeps": [], "stepwise, batch of 8": []}
    for number in range(prompts):
        ids = lab.tokens(number)
        truth = lab.stepwise(ids, 1)
        found = (lab.iterated(ids), lab.iterated(ids, MANY_SWEEPS), lab.stepwise(ids, BATCH))
        for way, reading in zip(ways.values(), found, strict=True):
            way.append((reading, difference(truth, reading)))
    for name, way in ways.items():
        readings, differences = [r for r, _ in way], [d for _, d in way]
        mean = {key: float(np.mean([getattr(d, key) for d in differences])) for key in ("rms", "kl", "same")}
        above = [d.error / r.residual for r, d in way if r.residual]
        print(
            f"| {lab.decoder.precision} | {name} | {np.mean([r.passes for r in readings]):.2f} | "
            f"{max(d.error for d in differences):.2g} | {mean['rms']:.2g} | {max(r.residual for r in readings):.2g} | "
            f"{max(above, default=0):.2f} | {mean['kl']:.2e} | {mean['same']:.1%} | "
            f"{sum(r.fallback is not None for r in readings)} |",
            flush=True,
        )


def main() -> None:
    """Measure one precision, or all that the bundle has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", action="append", help="default: all of the bundle's")
    parser.add_argument("--prompts", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print("| precision | read | passes | latent, max | RMS | residual | error ÷ residual, max | KL | same | fell |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    precisions = args.precision or list(lrt_deploy.bundle.manifest.read_manifest(args.bundle).precisions)
    for precision in precisions:
        with lrt_deploy.open_decoder(args.bundle, precision=precision, threads=args.threads) as decoder:
            report(Lab(decoder), args.prompts)


if __name__ == "__main__":
    main()
