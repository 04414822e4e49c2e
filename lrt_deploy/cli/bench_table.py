"""The fields of `lrt-deploy bench` for people: a sentence and a table."""

from __future__ import annotations

from typing import Any

from . import output


def summary(fields: dict[str, Any], prompt_tokens: int) -> str:
    """One line; of the prompts that were iterated, the one nearest to a length."""
    cache = "the GPU's cache" if fields["environment"]["threads"] is None else "the processor's cache"
    cached = f" (the weights fit {cache})" if fields["weights_fit_cache"] else ""
    line = (
        f"{fields['tpot_ms']['p50']:.3g} ms a token ({fields['tokens_per_s']:.0f} tokens/s), "
        f"{fields['roofline_fraction']:.0%} of the memory bandwidth{cached}"
    )
    iterated = [row for row in fields["prefill"] if row["policy"] == "fixed-point"]
    iterated = [row for row in iterated if row["algorithm"] != "plain"] or iterated  # plain: where nothing else is
    if not iterated:
        return line
    row = min(iterated, key=lambda row: abs(row["tokens"] - prompt_tokens))
    pace = f"{row['speedup']:.1f}x faster" if row["speedup"] >= 1 else f"{1 / row['speedup']:.1f}x slower"
    return f"{line}; a prompt of {row['tokens']} tokens is read {pace} than stepwise"


def decode_rows(fields: dict[str, Any]) -> dict[str, str]:
    """Decoding, for people."""
    ttft, tpot = fields["ttft_ms"], fields["tpot_ms"]
    peak, facts, copied = fields["peak_rss_bytes"], fields["environment"], fields["state_bytes_copied_per_step"]
    reading = fields["read_bandwidth_gb_s"]
    return {
        "runs on": f"{facts['backend_detail']}, {fields['precision']}; {facts['cpu']}",
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
    """Median and 99th percentile of times, the latter only where there are enough samples."""
    p99 = f"- ({samples} samples are too few)" if times["p99"] is None else f"{times['p99']:.3g} ms"
    return f"p50 {times['p50']:.3g} ms, p99 {p99}"


def prefill_rows(fields: dict[str, Any]) -> dict[str, str]:
    """The policies, for people: one line each, with tokens and algorithm, and the errors against stepwise reading."""
    rows = {}
    for row in fields["prefill"]:
        latent = "" if row["max_abs_latent_error"] is None else f"  latent {row['max_abs_latent_error']:7.1e}"
        error = "" if row["policy"] == "stepwise" else f"{latent}  KL {row['kl']:7.1e}"
        ran = "" if row["ran"] == row["policy"] else f"  ({row['note']})"
        name = row["algorithm"].removeprefix("interleaved, ").removeprefix("one pass with ")
        rows[f"{row['tokens']} {name}"] = (
            f"{row['seconds'] * 1e3:8.1f} ms  {row['speedup']:5.2f}x  {row['passes']:5.2f} passes{error}{ran}"
        )
    if left_out := fields["prefill_lengths_left_out"]:
        rows["left out"] = f"{', '.join(map(str, left_out))} tokens do not fit"
    return rows | ({"plot": fields["plot"]} if fields["plot"] else {})
