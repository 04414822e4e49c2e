"""Several processes on one prompt cache that is too small for them: every token is compared with a run without it.

Prompts share beginnings, so that entries are found, rewound, extended, replaced and thrown out all the time. Prints
one JSON document; exits 1 if a token was wrong or an entry was found torn.

    python benchmarks/prompt_cache_soak.py demo/bundle --seconds 60
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from typing import Any

import numpy as np

import lrt_deploy
from lrt_deploy.runtime.decoder import Decoder
from lrt_deploy.runtime.prompt_cache import PromptCache
from lrt_deploy.types import PrefillPolicy

Reading = tuple[PrefillPolicy, float | None]
POLICIES: tuple[Reading, ...] = (("stepwise", None), ("fixed-point", 1e-4))
NEW_TOKENS, ENTRIES = 6, 12
NEAR_TIE = 1e-2  # what an error of 1e-4 in the latent may decide; stepwise reading must agree to the bit


def main() -> int:
    """Start the workers, or be one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worker", nargs=2, metavar=("SEED", "FOLDER"))
    options = parser.parse_args()
    if options.worker:
        return work(options.bundle, int(options.worker[0]), options.worker[1], options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, options.bundle, "--seconds", str(options.seconds), "--worker"]
        workers = [
            subprocess.Popen([*command, str(seed), folder], stdout=subprocess.PIPE, text=True)
            for seed in range(options.processes)
        ]
        reports = [json.loads(worker.communicate()[0]) for worker in workers]
    total: Counter[str] = sum((Counter(report) for report in reports), Counter())
    report = {"seconds": options.seconds, "processes": options.processes, "wrong": 0, "troubles": 0, "near_ties": 0}
    json.dump(report | total, sys.stdout, indent=2)
    return 1 if total["wrong"] or total["troubles"] or not total["requests"] else 0


def work(bundle: str, seed: int, folder: str, seconds: float) -> int:
    """Read random prompts through the cache until the time is over."""
    random, counts, truths = np.random.default_rng(seed), Counter[str](), dict[Any, Any]()
    with lrt_deploy.open_decoder(bundle) as decoder:
        pool = np.random.default_rng(99).integers(0, decoder.config.vocab_size, (3, 60)).tolist()
        state_bytes = decoder.prefill([pool[0]]).num_bytes
        cache = PromptCache(folder, max_bytes=ENTRIES * state_bytes)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            prompt = pool[random.integers(3)][: random.integers(18, 60)]
            if random.random() < 0.7:
                prompt = prompt + pool[random.integers(3)][: random.integers(1, 40)]
            policy, tolerance = POLICIES[random.integers(len(POLICIES))]
            counts.update(check(decoder, cache, prompt, (policy, tolerance), truths))
    json.dump(counts, sys.stdout)
    return 0


def check(
    decoder: Decoder, cache: PromptCache, prompt: list[int], reading: Reading, truths: dict[Any, Any]
) -> Counter[str]:
    """One request, with and without the cache."""
    policy, tolerance = reading
    state = cache.prefill(decoder, prompt, policy, tolerance)
    report, logits = state.prefill, state.logits[0]
    tokens = greedy(decoder, state)
    key = (tuple(prompt), policy)
    if key not in truths:
        plain = decoder.prefill([prompt], policy=policy, tolerance=tolerance)
        truths[key] = plain.logits[0], greedy(decoder, plain)
    expected_logits, expected = truths[key]
    counts = Counter(requests=1, reused_tokens=report.reused_tokens, hits=int(report.reused_tokens > 0))
    counts["whole_hits"] = int(report.reused_tokens == len(prompt))
    counts["troubles"] = int("cache" in (report.note or ""))
    if policy == "stepwise":
        counts["wrong"] = int(tokens != expected or not np.array_equal(logits, expected_logits))
    elif tokens != expected:
        at = next(i for i, pair in enumerate(zip(tokens, expected, strict=True)) if pair[0] != pair[1])
        ordered = np.sort(decoder.prefill([prompt + expected[:at]], policy="stepwise").logits[0])
        counts["near_ties" if ordered[-1] - ordered[-2] <= NEAR_TIE else "wrong"] = 1
    return counts


def greedy(decoder: Decoder, state: Any) -> list[int]:  # noqa: ANN401
    """The next tokens of a state."""
    return [event.token for event in decoder.generate(None, NEW_TOKENS, state=state, stop_ids=[])]


if __name__ == "__main__":
    sys.exit(main())
