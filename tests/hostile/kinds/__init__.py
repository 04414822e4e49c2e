"""All kinds of hostile input by name, and how many of each a campaign of a hundred makes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from hostile.originals import Originals
from hostile.trial import Trial

from . import bundles, checkpoints, configs, exported, graphs, inputs, native, small_files, states, tokenizer_files

Make = Callable[[Random, Path, Originals], Trial]

# Kind -> what makes a trial of it, and its share of a campaign in percent (`exported`: of a thousand in all).
KINDS: dict[str, tuple[Make, float]] = {
    "checkpoints (.pt)": (checkpoints.weights, 6.0),
    "configs (JSON)": (configs.configs, 6.5),
    "safetensors": (native.weights, 6.5),
    "tokenizer pickles": (tokenizer_files.pickles, 5.5),
    "tokenizer.json": (tokenizer_files.tokenizer_json, 6.0),
    "token byte counts": (tokenizer_files.byte_counts, 4.5),
    "bundles, hashes recomputed": (bundles.manifests, 5.5),
    "graphs, hashes recomputed": (graphs.graphs, 5.2),
    "bundles, hashes as they were": (bundles.damaged, 5.5),
    "remembered hashes": (bundles.memory_of_hashes, 2.0),
    "states": (states.states, 7.0),
    "prompt cache entries": (states.cache_entries, 5.2),
    "engine sidecars": (small_files.sidecars, 5.5),
    "recorded arrays (npz)": (small_files.recordings, 5.2),
    "token input": (inputs.tokens, 8.0),
    "options": (inputs.options, 7.0),
    "text input": (inputs.texts, 9.0),
    "text files": (small_files.text_files, 6.0),
    "full exports": (exported.exports, 0.03),
}


class SelfTest:
    """Makes trials for the tests of a campaign itself: by number one that is fine, one that dies, one that waits."""

    def __call__(self, rng: Random, place: Path, originals: Originals, index: int = 0) -> Trial:
        """The trial of an index."""
        acts = {1: os.abort, 2: lambda: time.sleep(3600)}
        return Trial("self test", True, acts.get(index, lambda: ("equal", "")))
