"""Contender (d): onnxruntime-genai on a plain Llama of equal bytes, built by its own builder from random weights.

Runs in an environment of its own (`pip install onnxruntime-genai transformers torch onnx-ir`), without this project:

    python genai.py build TARGET PRECISION WIDTH LAYERS HEADS VOCAB INNER TOKENS
    python genai.py serve TARGET THREADS
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent))
import serving

CHECKED_TOKENS = 12


def build(target: Path, precision: str, shape: list[int]) -> dict[str, Any]:
    """A random Llama checkpoint, the builder's graph of it, and how far their logits are apart."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    width, layers, heads, vocab, inner, tokens = shape
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=tokens,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        torch_dtype="float32",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(target / "checkpoint")
    special = {"eos_token": "t1", "pad_token": "t1"}
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(vocab)}))
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(target / "checkpoint")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(target / "checkpoint")]
    command += ["-o", str(target / "model"), "-p", precision, "-e", "cpu", "-c", str(target / "cache")]
    if precision == "int4":
        command += ["--extra_options", "int4_accuracy_level=4"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    ids = np.random.default_rng(0).integers(2, vocab, CHECKED_TOKENS)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0, -1].numpy()
    built = Genai(target, 1)
    built.start([ids[:-1].tolist()], exact=True)
    found = built.step([int(ids[-1])])[0]
    return {
        "max_abs_logit_error": float(np.abs(found - expected).max()),
        "max_abs_logit": float(np.abs(expected).max()),
        "bytes": sum(file.stat().st_size for file in (target / "model").iterdir()),
    }


class Genai(serving.Greedy):
    """A Generator; choosing the token is its own work too."""

    def __init__(self, target: Path, threads: int) -> None:
        import onnxruntime
        import onnxruntime_genai as og

        path = target / "model" / "genai_config.json"
        config = json.loads(path.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        path.write_text(json.dumps(config, indent=2))
        self.og, self.model = og, og.Model(str(target / "model"))
        self.capacity = config["model"]["context_length"]
        versions = f"onnxruntime-genai {og.__version__}, ONNX Runtime {onnxruntime.__version__}"
        self.facts = {"runs": f"{versions}, {threads} thread(s)", "bytes_allocated_per_step": None}

    def start(self, rows: list[list[int]], exact: bool) -> None:
        """See `serving.Contender`; a plain model has one way to read."""
        parameters = self.og.GeneratorParams(self.model)
        # As long as the capacity, so that no end of text ends it.
        lengths = {"max_length": self.capacity, "min_length": self.capacity}
        parameters.set_search_options(do_sample=False, batch_size=len(rows), **lengths)
        self.generator = self.og.Generator(self.model, parameters)
        self.generator.append_tokens(np.array(rows, np.int32))

    def step(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """See `serving.Contender`."""
        self.generator.append_tokens(np.array(tokens, np.int32)[:, None])
        logits: npt.NDArray[np.float32] = self.generator.get_logits()[:, -1]
        return logits

    def greedy(self, tokens: list[int]) -> list[int]:
        """One step of its own loop: it holds the last token itself."""
        self.generator.generate_next_token()
        return [int(token) for token in self.generator.get_next_tokens()]


if __name__ == "__main__":
    if sys.argv[1] == "build":
        print(json.dumps(build(Path(sys.argv[2]), sys.argv[3], [int(number) for number in sys.argv[4:]])))
    else:
        serving.serve(Genai(Path(sys.argv[2]), int(sys.argv[3])))
