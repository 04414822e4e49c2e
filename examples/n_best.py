"""Read a prompt once, continue it n times, and rank the continuations by what the model thinks of them.

python examples/n_best.py BUNDLE "Return the" 5
"""

from __future__ import annotations

import argparse

import numpy as np

import lrt_deploy


def main(bundle: str, prompt: str, count: int = 4, new_tokens: int = 16) -> None:
    """Sample from forks of one state, then score all samples in one batch of forks."""
    with lrt_deploy.open_decoder(bundle) as decoder:
        assert decoder.tokenizer is not None
        state = decoder.prefill([decoder.tokenizer.encode_prompt(prompt)])
        batch = lrt_deploy.BatchDecoder(decoder)
        for seed in range(count):
            batch.submit(None, new_tokens, state=state, temperature=0.8, top_p=0.95, seed=seed, stop_ids=[])
        samples: list[list[int]] = [[] for _ in range(count)]
        for found in batch.run():
            assert found.event is not None, found.error
            samples[found.request].append(found.event.token)

        forks, scores = state.rows([0] * count), np.zeros(count)
        for tokens in np.array(samples).T:  # (n) one token of every sample
            logits = forks.logits.astype(np.float64)
            scores += logits[np.arange(count), tokens] - np.log(np.exp(logits).sum(axis=1))
            decoder.step(forks, tokens)
        for index in np.argsort(-scores):
            print(f"{scores[index]:8.2f}  {prompt + decoder.tokenizer.decode(samples[index])!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("prompt")
    parser.add_argument("count", type=int, nargs="?", default=4, help="how many continuations")
    parser.add_argument("new_tokens", type=int, nargs="?", default=16, help="tokens of each")
    main(**vars(parser.parse_args()))
