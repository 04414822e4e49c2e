"""What operations on states cost: fork, rewind, save and load, a chat's turns, and many requests at once.

Counts are exact and repeatable; times are from this machine and are best read as ratios within one run. The model is
the demo checkpoint, on ONNX Runtime's CPU provider in float32.

    python benchmarks/state_costs.py --bundle demo/bundle --text README.md [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import lrt_deploy
from lrt_deploy.runtime.batch import BatchDecoder
from lrt_deploy.runtime.decoder import Decoder

TOKENS = (10, 100, 500, 1000)
REQUESTS, SLOTS, ROUNDS = 64, 8, 3
# Tokens of prompts and of answers: from, up to.
MIXES = {"short": ((8, 64), (16, 96)), "longer": ((8, 160), (16, 128))}
NEAR_TIE = 2e-4  # see tolerances: two float32 logits this close may change places


def main() -> None:
    """Measure all and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--text", required=True, help="a text of a few thousand tokens")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: standard output")
    options = parser.parse_args()
    with lrt_deploy.open_decoder(options.bundle, threads=options.threads) as decoder:
        assert decoder.tokenizer is not None
        ids = decoder.tokenizer.encode_prompt(Path(options.text).read_text(encoding="utf-8"))
        report = {
            "backend": decoder.backend_detail,
            "operations": operations(decoder, ids),
            "chat": chat(decoder, ids),
            "batch": {name: batch(decoder, ids, *mix) for name, mix in MIXES.items()},
        }
    text = json.dumps(report, indent=2) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        sys.stdout.write(text)


def best_ms(action: Callable[[], object], rounds: int = 7) -> float:
    """The shortest of several runs."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        times.append((time.perf_counter() - started) * 1e3)
    return round(min(times), 3)


def operations(decoder: Decoder, ids: list[int]) -> list[dict[str, Any]]:
    """Fork, rewind, save and load at several lengths, in one state of the full capacity."""
    found = []
    for count in (n for n in TOKENS if n < decoder.max_seq_len):
        state = decoder.prefill([ids[:count]], policy="stepwise")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "one.state"
            entry = {
                "tokens": count,
                "state_bytes": state.num_bytes,
                "step_ms": best_ms(lambda state=state: decoder.step(state.fork(), [1])),
                "fork_ms": best_ms(state.fork),
                "save_ms": best_ms(lambda state=state, path=path: state.save(path)),
                "load_ms": best_ms(lambda path=path: decoder.load_state(path)),
                "file_bytes": path.stat().st_size,
            }
        entry["read_again_ms"] = best_ms(lambda count=count: decoder.prefill([ids[:count]]), rounds=3)
        forks = iter([state.fork() for _ in range(7)])
        entry["rewind_ms"] = best_ms(lambda forks=forks, count=count: next(forks).rewind(count - 1))
        found.append(entry)
    return found


def chat(decoder: Decoder, ids: list[int]) -> list[dict[str, Any]]:
    """Turns of 40 tokens and answers of 20: token positions computed in each, and how many were new."""
    state, history, turns = decoder.prefill([ids[:1]]), ids[:1], []
    for turn in range(5):
        before, history = state.computed_tokens, history + ids[1 + 40 * turn : 41 + 40 * turn]
        events = list(decoder.generate(history, 20, state=state, reuse=True, policy="stepwise", stop_ids=[]))
        history = history + [event.token for event in events]
        turns.append({"turn": turn + 1, "context": len(history), "computed": state.computed_tokens - before})
    state.rewind(61)
    before = state.computed_tokens
    decoder.prefill([[*history[:121], *ids[300:320]]], state=state, reuse=True, policy="stepwise")
    turns.append({"turn": "rewound to 61 and 80 others read", "computed": state.computed_tokens - before})
    return turns


def batch(decoder: Decoder, ids: list[int], prompts: tuple[int, int], answers: tuple[int, int]) -> dict[str, Any]:
    """64 requests of mixed lengths on 8 slots against one at a time, alternating; the best round of each."""
    random = np.random.default_rng(0)
    requests = []
    for _ in range(REQUESTS):
        start, length = random.integers(0, len(ids) - prompts[1]), random.integers(*prompts)
        requests.append(([ids[0], *ids[start : start + length]], int(random.integers(*answers))))
    runs: dict[str, Callable[[], list[list[int]]]] = {
        "one at a time, auto": lambda: alone(decoder, requests, "auto"),
        "one at a time, stepwise": lambda: alone(decoder, requests, "stepwise"),
        "8 slots": lambda: together(decoder, requests, lanes=1),
        "8 slots in 2 lanes": lambda: together(decoder, requests, lanes=2),
    }
    seconds, outputs = dict.fromkeys(runs, float("inf")), {}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            started = time.perf_counter()
            outputs[name] = run()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    new = sum(budget for _, budget in requests)
    truth = outputs["one at a time, stepwise"]
    return {
        "requests": REQUESTS,
        "prompt_tokens": sum(len(prompt) for prompt, _ in requests),
        "new_tokens": new,
        "new_tokens_per_s": {name: round(new / took) for name, took in seconds.items()},
        "times_one_at_a_time_auto": {name: round(seconds["one at a time, auto"] / s, 2) for name, s in seconds.items()},
        "outputs_equal": {n: sum(a == b for a, b in zip(truth, o, strict=True)) for n, o in outputs.items()},
        "first_differences": differences(decoder, requests, truth, outputs),
    }


def alone(decoder: Decoder, requests: list[tuple[list[int], int]], policy: Any) -> list[list[int]]:  # noqa: ANN401
    """Every request by itself, one after the other."""
    return [[e.token for e in decoder.generate(p, n, policy=policy, stop_ids=[])] for p, n in requests]


def together(decoder: Decoder, requests: list[tuple[list[int], int]], lanes: int) -> list[list[int]]:
    """All requests through one BatchDecoder."""
    found: list[list[int]] = [[] for _ in requests]
    with BatchDecoder(decoder, SLOTS, lanes) as running:
        for prompt, budget in requests:
            running.submit(prompt, budget, stop_ids=[])
        for event in running.run():
            assert event.event is not None, event.error
            found[event.request].append(event.event.token)
    return found


def differences(
    decoder: Decoder, requests: list[tuple[list[int], int]], truth: list[list[int]], outputs: dict[str, list[list[int]]]
) -> list[dict[str, Any]]:
    """Where an output leaves its single run, with the margin of the top two logits there."""
    found = []
    for name, output in outputs.items():
        for number, (ours, theirs) in enumerate(zip(output, truth, strict=True)):
            if ours != theirs:
                at = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
                logits = np.sort(decoder.prefill([requests[number][0] + theirs[:at]], policy="stepwise").logits[0])
                margin = float(logits[-1] - logits[-2])
                found.append({"run": name, "request": number, "at": at, "margin": margin, "tie": margin <= NEAR_TIE})
    return found


if __name__ == "__main__":
    main()
