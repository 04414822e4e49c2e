"""How long a batch lets its rows wait: when a long prompt joins, when caches grow, and after a long row has left.

CPU time of one thread, so that a busy machine matters little, as multiples of the median step of the rows alone. A
1,900-token row leaves beside short ones, then steps are compared with those of a batch that never held it, in turns.

The batch needs a slot for each row and one for the prompt: 9 with 8 rows, so export with `--max-batch-size 9` or more.

    .venv/bin/python benchmarks/batch_gaps.py BUNDLE [--rows 8] [--prompt-tokens 900] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import lrt_deploy


def step_seconds(batch: lrt_deploy.BatchDecoder) -> tuple[float, list[int]]:
    """CPU seconds of one step, and the requests that had a token."""
    start = time.thread_time()
    events = batch.step()
    return time.thread_time() - start, [event.request for event in events]


def rows_of(decoder: lrt_deploy.Decoder, rows: int, slots: int, tokens: int = 1500) -> lrt_deploy.BatchDecoder:
    """A batch with rows that have read their short prompts."""
    batch = lrt_deploy.BatchDecoder(decoder, slots)
    for row in range(rows):
        batch.submit([row + 1] * 4, tokens, stop_ids=[])
    for _ in range(8):
        batch.step()
    return batch


def joins(decoder: lrt_deploy.Decoder, prompt: list[int], rows: int) -> dict[str, Any]:
    """A long prompt joins rows that run: the longest gap of a row in steps, and the time to its first token."""
    batch = rows_of(decoder, rows, rows + 1)
    usual = median(step_seconds(batch)[0] for _ in range(30))
    number = batch.submit(prompt, 4, policy="auto", stop_ids=[])
    gaps, seen = [], False
    while not seen:
        seconds, requests = step_seconds(batch)
        gaps.append(seconds)
        seen = number in requests
    start = time.thread_time()
    decoder.prefill([prompt], policy="auto")
    alone = time.thread_time() - start
    return {
        "step_ms": usual * 1e3,
        "longest_gap_steps": max(gaps) / usual,
        "median_gap_steps": median(gaps) / usual,
        "first_token_ratio": sum(gaps) / alone,
        "first_token_ratio_own_work": (sum(gaps) - len(gaps) * usual) / alone,
        "steps_meanwhile": len(gaps),
    }


def grows(decoder: lrt_deploy.Decoder, rows: int) -> dict[str, Any]:
    """Rows grow from nothing: the longest step, in medians of the steps around it."""
    batch = rows_of(decoder, rows, rows)
    times = [step_seconds(batch)[0] for _ in range(500)]
    around = [median(times[max(0, i - 20) : i + 21]) for i in range(len(times))]
    return {"steps": len(times), "longest_step": max(t / m for t, m in zip(times, around, strict=True))}


def leaves(decoder: lrt_deploy.Decoder, rows: int) -> dict[str, Any]:
    """A row of 1,900 tokens has left: later steps over those of a batch that never held it."""
    state = decoder.prefill([np.random.default_rng(1).integers(0, decoder.config.vocab_size, 1900).tolist()])
    batch, fresh = lrt_deploy.BatchDecoder(decoder, rows), lrt_deploy.BatchDecoder(decoder, rows)
    for row in range(rows - 1):
        for one in (batch, fresh):
            one.submit([row + 1] * 4, 400, stop_ids=[])
    batch.submit(None, 3, state=state, stop_ids=[])
    beside = [step_seconds(batch)[0] for _ in range(3)]
    for _ in range(60):
        batch.step()
    for _ in range(63):
        fresh.step()
    pairs = [(step_seconds(batch)[0], step_seconds(fresh)[0]) for _ in range(40)]
    usual = median(after for _, after in pairs)
    return {"beside_it": median(beside) / usual, "after_it": median(a for a, _ in pairs) / usual}


def main() -> None:
    """Measure all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=900)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with lrt_deploy.open_decoder(args.bundle, threads=1) as decoder:
        if (most := decoder.manifest.max_batch_size) <= args.rows:
            parser.error(f"{args.rows} rows and a prompt need {args.rows + 1} slots, and the bundle has {most}")
        draw = np.random.default_rng(0)
        prompt = draw.integers(0, decoder.config.vocab_size, args.prompt_tokens).tolist()
        result: dict[str, Any] = {"rows": args.rows, "prompt_tokens": args.prompt_tokens}
        result["a prompt joins"] = joins(decoder, prompt, args.rows)
        print(json.dumps(result["a prompt joins"]), flush=True)
        result["a long row leaves"] = leaves(decoder, args.rows)
        print(json.dumps(result["a long row leaves"]), flush=True)
        result["caches grow"] = grows(decoder, args.rows)
        print(json.dumps(result["caches grow"]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
