"""`lrt-deploy bench`: the speed of a bundle and the cost of each prefill policy, measured by `runtime.bench`."""

from __future__ import annotations

import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrt_deploy.errors import InputError
from lrt_deploy.files import check_writable
from lrt_deploy.machine import cpu_model, missing, peak_rss_bytes

from . import doctor, options, output
from .options import option

if TYPE_CHECKING:
    from lrt_deploy.runtime.decoder import Decoder


def summary(fields: dict[str, Any]) -> str:
    """Summarize in one line; of the iterated prompts, take the one nearest to 512 tokens."""
    cache = "the GPU's cache" if fields["environment"]["threads"] is None else "the processor's cache"
    cached = f" (the weights fit {cache})" if fields["weights_fit_cache"] else ""
    line = (
        f"{fields['tpot_ms']['p50']:.3g} ms a token ({fields['tokens_per_s']:.0f} tokens/s), "
        f"{fields['roofline_fraction']:.0%} of the memory bandwidth{cached}"
    )
    iterated = [row for row in fields["prefill"] if row["policy"] == "fixed-point"]
    iterated = [row for row in iterated if (row["stride"] or 1) > 1] or iterated
    if not iterated:
        return line
    row = min(iterated, key=lambda row: abs(row["tokens"] - _LONGEST_CONVERGENCE))
    pace = f"{row['speedup']:.1f}x faster" if row["speedup"] >= 1 else f"{1 / row['speedup']:.1f}x slower"
    return f"{line}; a prompt of {row['tokens']} tokens is read {pace} than stepwise"


def decode_rows(fields: dict[str, Any]) -> dict[str, str]:
    """Return the rows of a table on decoding."""
    ttft, tpot = fields["ttft_ms"], fields["tpot_ms"]
    peak, environment, copied = fields["peak_rss_bytes"], fields["environment"], fields["state_bytes_copied_per_step"]
    reading = fields["read_bandwidth_gb_s"]
    return {
        "runs on": f"{environment['backend_detail']}, {fields['precision']}; {environment['cpu']}",
        "first token": f"{percentile_text(ttft, fields['samples']['ttft_ms'])} after {fields['prompt_tokens']} tokens",
        "after opening": f"{fields['open_ms']:.0f} ms to open, {fields['first_ttft_ms']:.3g} ms to a token",
        "each token": f"{percentile_text(tpot, fields['samples']['tpot_ms'])}; "
        f"{fields['outside_backend_fraction']:.1%} outside of the backend",
        "weights a step": output.bytes_text(fields["weight_bytes_per_step"]),
        "state a step": f"{output.bytes_text(fields['state_bytes_read_per_step'])} read, "
        f"{output.bytes_text(fields['state_bytes_written_per_step'])} written, "
        f"{'copies not counted' if copied is None else f'{output.bytes_text(copied)} copied'}; "
        f"{output.bytes_text(fields['latent_record_bytes_per_step'])} recorded for rewinding",
        "bandwidth": f"{fields['bandwidth_gb_s']:.1f} GB/s ({fields['bandwidth_of']}), "
        f"{fields['roofline_fraction']:.0%} used{'' if reading is None else f'; {reading:.1f} GB/s reading alone'}",
        "peak memory": "unknown" if peak is None else f"{output.bytes_text(peak)} on the host",
    }


def percentile_text(times: dict[str, Any], samples: int) -> str:
    """Format median and 99th percentile, the latter only where there are enough samples."""
    p99 = f"- ({samples} samples are too few)" if times["p99"] is None else f"{times['p99']:.3g} ms"
    return f"p50 {times['p50']:.3g} ms, p99 {p99}"


def prefill_rows(fields: dict[str, Any]) -> dict[str, str]:
    """Return a row for each prompt length and policy: time, passes, errors against stepwise reading."""
    rows = {}
    for row in fields["prefill"]:
        latent = "" if row["max_abs_latent_error"] is None else f"  latent {row['max_abs_latent_error']:7.1e}"
        error = "" if row["policy"] == "stepwise" else f"{latent}  KL {row['kl']:7.1e}"
        ran = "" if row["ran"] == row["policy"] else f"  ({row['note']})"
        name = row["policy"] if row["stride"] is None else f"stride {row['stride']}"
        name += "*" if row["auto"] else ""
        rows[f"{row['tokens']} {name}"] = (
            f"{row['seconds'] * 1e3:7.1f} ms  {row['speedup']:5.2f}x  {row['passes']:5.2f} passes{error}{ran}"
        )
    if any(row["auto"] for row in fields["prefill"]):
        rows["*"] = "what auto takes"
    if left_out := fields["prefill_lengths_left_out"]:
        rows["left out"] = f"{', '.join(map(str, left_out))} tokens do not fit"
    return rows | ({"plot": fields["plot"]} if fields["plot"] else {})


_LONGEST_CONVERGENCE = 512


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and where it is plotted."""

    prompt_tokens: Annotated[int, option("Prompt length where decoding is measured.")] = 64
    new_tokens: Annotated[int, option("Tokens decoded after it.")] = 64
    repeats: Annotated[int, option("Repeats of decoding, and rounds over the prefill policies.")] = 3
    prefill_lengths: Annotated[
        str, option("Prompt lengths for the policies; those that do not fit are left out.", "T,T,...")
    ] = "32,64,128,256,512,1024,2048"
    text: Annotated[str | None, option("Take the prompts from this text; default: random token ids.", "FILE")] = None
    tolerance: Annotated[float | None, option("Largest error of the latent that fixed-point prefill may leave.")] = None
    plot: Annotated[Path | None, option("Where to plot; default: BUNDLE/reports/prefill.png.", "FILE.png")] = None
    seed: Annotated[int, option("Of the random token ids.")] = 0

    def __post_init__(self) -> None:
        options.check_tolerance(self.tolerance)
        for part in self._parts():
            if not re.fullmatch(r"[1-9][0-9]{0,8}", part):
                raise typer.BadParameter(f"--prefill-lengths has {part[:40]!r} where a length is expected, as in 32,64")

    def _parts(self) -> list[str]:
        return [part.strip() for part in self.prefill_lengths.split(",") if part.strip()]

    @property
    def lengths(self) -> list[int]:
        """The prompt lengths, sorted; an empty text is none."""
        return sorted(set(map(int, self._parts())))

    def tokens(self, decoder: Decoder) -> list[int]:
        """Return as many ids as the capacity holds: of the text, or random ones."""
        from lrt_deploy.runtime.bench import random_tokens

        if self.text is None:
            return random_tokens(decoder.max_seq_len, decoder.config.vocab_size, self.seed)
        return options.prompt_ids(decoder, options.read_text(self.text))[: decoder.max_seq_len]


def bench(
    bundle: options.BundlePath, *, asked: BenchOptions, opening: options.DecoderOptions, json: options.Json = False
) -> None:
    """Measure decoding and reading prompts: times, bytes, and the share of the memory bandwidth."""
    from lrt_deploy import figures

    if asked.plot is not None:
        figures.require("bench", "a plot", "--plot")
        figures.check_target(asked.plot)
        check_writable(asked.plot, InputError)
    options.check_file(None if asked.text in (None, "-") else Path(asked.text), "the text")
    started = time.perf_counter()
    with opening.open(bundle) as decoder:
        opened_ms = (time.perf_counter() - started) * 1e3
        # No bar: its thread would run within what is timed.
        fields = {"open_ms": opened_ms} | measure(decoder, asked.tokens(decoder), asked, output.lines(quiet=json))
    fields["plot"] = draw(fields, bundle, asked.plot)
    output.result(json, fields, summary(fields), decode_rows(fields), prefill_rows(fields))


def measure(decoder: Decoder, tokens: list[int], asked: BenchOptions, progress: output.Progress) -> dict[str, Any]:
    """Measure everything; return the JSON fields."""
    from lrt_deploy.runtime import bench

    if asked.prompt_tokens > len(tokens):
        raise InputError(f"--prompt-tokens is {asked.prompt_tokens}; the text and the capacity give {len(tokens)}")
    prompt, tolerance = tokens[: asked.prompt_tokens], asked.tolerance
    fields: dict[str, Any] = {"backend": decoder.backend, "precision": decoder.precision}
    fields |= bench.measure_decode(decoder, prompt, asked.new_tokens, asked.repeats, tolerance, progress)
    fields |= {"peak_rss_bytes": peak_rss_bytes()}
    progress("memory bandwidth", 0, 0)  # after decoding: its arrays would count into the peak memory
    memory, cache_bytes = bench.measure_bandwidth(decoder.device, thread_count(decoder) or 1)
    weights, moved = fields["weight_bytes_per_step"], fields["state_bytes_read_per_step"]
    share = (weights + moved) * fields["tokens_per_s"] / (memory["bandwidth_gb_s"] * 1e9)
    fields |= memory | {"roofline_fraction": share, "weights_fit_cache": weights < cache_bytes}
    fields |= {name: getattr(asked, name) for name in ("prompt_tokens", "new_tokens", "repeats")}
    fits = [length for length in asked.lengths if length <= len(tokens)]
    short = [length for length in fits if 1 < length <= _LONGEST_CONVERGENCE]
    return fields | {
        "prefill": [
            row
            for length in fits
            for row in bench.compare_prefill(decoder, tokens[:length], asked.repeats, tolerance, progress)
        ],
        "convergence": bench.measure_convergence(decoder, tokens[: max(short)], progress) if short else [],
        "prefill_lengths_left_out": [length for length in asked.lengths if length not in fits],
        "environment": environment(decoder),
    }


def draw(fields: dict[str, Any], bundle: Path, plot: Path | None) -> str | None:
    """Write the plot and return where; without --plot, what stands in its way is only said."""
    from lrt_deploy import figures

    if not fields["prefill"] or (plot is None and missing("bench")):
        return None
    path = bundle / "reports" / "prefill.png" if plot is None else plot
    threads = fields["environment"]["threads"]
    named = f", {threads} thread{'s' if threads > 1 else ''}" if threads else ""
    title = f"{fields['backend']}, {fields['precision']}{named}"
    try:
        figures.plot_prefill(path, fields["prefill"], fields["convergence"], title)
    except OSError as error:
        if plot is not None:
            raise
        output.say(f"no plot: {error.strerror} ({path}); --plot puts it elsewhere")
        return None
    return str(path)


def thread_count(decoder: Decoder) -> int | None:
    """Return the CPU threads that the backend runs on, all cores where it decides itself; None on a GPU."""
    return None if decoder.device is not None else decoder.threads or int(doctor.environment()["cpu_count"] or 1)


def environment(decoder: Decoder) -> dict[str, Any]:
    """Return the machine, the versions, and the command."""
    from lrt_deploy.runtime.bench import last_level_cache_bytes

    return doctor.environment() | {
        "cpu": cpu_model(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "threads": thread_count(decoder),
        "backend_detail": decoder.backend_detail,
        "command": shlex.join(["lrt-deploy", *sys.argv[1:]]),
    }
