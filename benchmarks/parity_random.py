"""A right model never fails parity, a wrong one always does: both over random architectures with random weights.

Each configuration draws its layers, heads, windows, vocabulary, toggles and memory variant, is exported and compared
with its reference over a whole rollout to its capacity; then again with a reference in which one random matrix is off
by 1%. Exits with 1 if a right model failed or a wrong one passed. About 12 s a configuration on one core.

    .venv/bin/python benchmarks/parity_random.py [--count 50] [--seed 0] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import tempfile
from pathlib import Path
from typing import Any

# Matrices of which no norm takes 1% away again.
FAULTS = ("attention_out", "mlp_in", "mlp_out")


def draw_config(rng: random.Random) -> Any:  # noqa: ANN401 - an LRTConfig; heavy imports wait
    """An architecture that the contract allows, small enough to export in seconds."""
    from lrt_deploy.config import LRTConfig

    heads, layers = rng.choice((1, 2, 4)), rng.randint(1, 5)
    memory = rng.random() < 0.85
    enters = rng.choice(((True, True), (True, True), (True, False), (False, True)))
    width = heads * rng.choice((4, 8, 16))
    return LRTConfig(
        sequence_len=rng.randint(8, 48),
        vocab_size=rng.randint(40, 300),
        n_layer=layers,
        n_head=heads,
        n_kv_head=rng.choice([divisor for divisor in (1, 2, 4) if heads % divisor == 0]),
        n_embd=width,
        window_pattern="".join(rng.choice("SL") for _ in range(rng.randint(1, 4))),
        use_value_embeds=rng.random() < 0.8,
        ve_every_layer=rng.random() < 0.3,
        use_x0_residual=rng.random() < 0.7,
        use_resid_lambdas=rng.random() < 0.7,
        ve_gate_channels=rng.choice((0, 0, width // 2)),
        memory=memory,
        memory_projections=rng.choice(("layerwise", "shared")),
        memory_source_layer=rng.choice((None, rng.randrange(layers))),
        memory_kv=enters[0],
        memory_residual=enters[1],
    )


def run(index: int, rng: random.Random, folder: Path) -> dict[str, Any]:
    """Export one configuration and compare it with the right and with a wrong reference."""
    from random_models import random_model, write_native

    import lrt_deploy
    from lrt_deploy.evaluation.verdict import compare
    from lrt_deploy.model.reference import ReferenceDecoder

    config = draw_config(rng)
    model = random_model(config, seed=index, memory_scale=rng.choice((0.3, 1.0)))
    write_native(model, folder / "checkpoint")
    capacity = min(config.max_positions, 2 * config.sequence_len + rng.randint(8, 40))
    lrt_deploy.export_bundle(folder / "checkpoint", folder / "bundle", max_seq_len=capacity, force=True)
    prompt = [rng.randrange(config.vocab_size) for _ in range(rng.randint(1, capacity // 2))]
    fault = f"blocks.{rng.randrange(config.n_layer)}.{rng.choice(FAULTS)}"

    def verdict(decoder: Any) -> Any:  # noqa: ANN401
        reference = ReferenceDecoder(model, capacity)
        steps = capacity - len(prompt)
        return compare(
            reference, decoder, prompt, steps, precision="fp32", checkpoint_matches=None, backend=decoder.backend
        )

    with lrt_deploy.open_decoder(folder / "bundle", threads=1) as decoder:
        right = verdict(decoder)
        model.get_parameter(fault).data.mul_(1.01)
        wrong = verdict(decoder)
    changed = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {
        "config": changed,
        "positions": capacity,
        "passed": right.passed,
        "verdict": right.verdict,
        "max_abs_logit_error": right.max_abs_logit_error,
        "max_abs_latent_error": right.max_abs_latent_error or 0.0,
        "max_kl": right.max_kl,
        "prefill": right.prefill.policy,
        "fault": fault,
        "fault_passed": wrong.passed,
        "fault_logit_error": wrong.max_abs_logit_error,
    }


def main() -> None:
    """Run, print a line for each configuration and a summary, and write the JSON document if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rng, results = random.Random(args.seed), []  # noqa: S311 - nothing secret is drawn
    for index in range(args.count):
        with tempfile.TemporaryDirectory() as folder:
            results.append(run(index, rng, Path(folder)))
        last = results[-1]
        print(
            f"{index:3}  {last['verdict']}; 1% in {last['fault']}: logits {last['fault_logit_error']:.1e}", flush=True
        )
    right = sum(result["passed"] for result in results)
    caught = sum(not result["fault_passed"] for result in results)
    for name in ("max_abs_logit_error", "max_abs_latent_error", "max_kl"):
        print(f"{name}: at most {max(result[name] for result in results):.1e}")
    print(f"smallest effect of a fault on the logits: {min(result['fault_logit_error'] for result in results):.1e}")
    print(f"{right} of {args.count} right models pass, {caught} of {args.count} wrong ones fail")
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    raise SystemExit(0 if right == caught == args.count else 1)


if __name__ == "__main__":
    main()
