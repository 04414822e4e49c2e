"""Train a small Latent Recurrent Transformer in half an hour on one CPU core.

The text is what every machine with Python has: its reference topics and its standard library's docstrings and short
functions. Training is by multi-refinement (arXiv 2605.26797): pass 0 reads zeros for the latents, each later pass
reads the latents of the pass before, shifted right by one position, and the loss is a weighted mean over the passes.
The result is a checkpoint as the paper's authors write it, the one under `demo/`.

It does not resume, use a GPU, or try to be a good language model: some 1.9 million parameters, a few epochs of 2 MB.

    python examples/train_tiny.py --out demo/checkpoint --minutes 30 > demo/training.log
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import pickle
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tiktoken
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor

from lrt_deploy.config import LRTConfig
from lrt_deploy.model import LRT
from lrt_deploy.weights import weight_sources

PASS_WEIGHTS = (1.0, 2.0, 2.0)  # zero-memory pass, then the refinements
MODEL_CONFIG: dict[str, Any] = {
    "sequence_len": 256,
    "vocab_size": 2048,
    "n_layer": 5,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 160,
    "window_pattern": "SSSL",
    "use_value_embeds": True,
    "ve_every_layer": False,
    "use_x0_residual": True,
    "use_resid_lambdas": True,
    "ve_gate_channels": 0,
    "use_interleaved": False,
    "interleaved_num_passes": 2,
    "interleaved_kv_refresh": False,
    "use_multi_refine": True,
    "multi_refine_num_passes": len(PASS_WEIGHTS) - 1,
    "multi_refine_detach": False,
    "multi_refine_loss_weights": list(PASS_WEIGHTS),
}
CONFIG = LRTConfig.from_authors(MODEL_CONFIG)
BATCH_ROWS = 4
RUN = {"device_batch_size": BATCH_ROWS, "max_seq_len": CONFIG.sequence_len}
MATRIX_LR, EMBEDDING_LR, HEAD_LR, SCALAR_LR = 0.01, 0.4, 0.01, 0.03

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ["<|bos|>"] + [
    f"<|{who}_{edge}|>" for who in ("user", "assistant", "python", "output") for edge in ("start", "end")
]
SHORTEST_DOCSTRING = 80  # characters
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"}
PROMPTS = (
    'The "while" statement',
    "Return the",
    'def read(self, size=-1):\n    """',
    'class Queue:\n    """',
    "If the object is",
)


# --- text ---------------------------------------------------------------------------------------------------------


def paragraphs(text: str, size: int = 800) -> Iterator[str]:
    """Cut prose at blank lines into pieces of at least `size` characters."""
    piece = ""
    for paragraph in text.strip().split("\n\n"):
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
        if len(piece) >= size:
            yield piece
            piece = ""
    if piece:
        yield piece


def definitions(source: str) -> Iterator[str]:
    """A module's docstring, then each documented function or class: whole when short, else head and docstring."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        if len(doc := ast.get_docstring(node) or "") < SHORTEST_DOCSTRING:
            continue
        if isinstance(node, ast.Module):
            yield from paragraphs(doc)
        elif isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno < 20:
            yield textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        else:
            head = (
                f"class {node.name}" if isinstance(node, ast.ClassDef) else f"def {node.name}({ast.unparse(node.args)})"
            )
            yield f"{head}:\n" + textwrap.indent(f'"""{doc}\n"""', "    ")


def documents() -> Iterator[list[str]]:
    """One list of short texts for each topic and each module, always in the same order."""
    yield from (list(paragraphs(topics[name])) for name in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py"), key=Path.as_posix):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts) and not path.name.startswith("_sysconfigdata"):
            yield list(definitions(path.read_text(encoding="utf-8")))


# --- tokens -------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> tiktoken.Encoding:
    """Byte-level BPE: the bytes, then the merges in order, then the special tokens as the last ids."""
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    first_special = CONFIG.vocab_size - len(SPECIAL_TOKENS)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=first_special, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    decoder, vocabulary = byte_characters(), learner.get_vocab()
    merged = [bytes(decoder[c] for c in token) for token in sorted(vocabulary, key=vocabulary.__getitem__)[256:]]
    ranks = {token: rank for rank, token in enumerate([bytes([b]) for b in range(256)] + merged)}
    special = {name: first_special + i for i, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("python-docs", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def byte_characters() -> dict[str, int]:
    """The printable character by which byte-level BPE spells each byte -> that byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def count_bytes(encoding: tiktoken.Encoding) -> Tensor:
    """UTF-8 length of each decoded token, int32; 0 for special tokens."""
    ordinary = [len(encoding.decode([i]).encode()) for i in range(encoding.n_vocab - len(SPECIAL_TOKENS))]
    return torch.tensor(ordinary + [0] * len(SPECIAL_TOKENS), dtype=torch.int32)


class Rows:
    """Rows of sequence_len + 1 tokens, each from the start of a text (its <|bos|>) on, through the texts after it."""

    def __init__(self, texts: list[str], encoding: tiktoken.Encoding) -> None:
        bos = encoding.encode_single_token("<|bos|>")
        self.width = CONFIG.sequence_len + 1
        self.stream = torch.tensor([i for text in encoding.encode_ordinary_batch(texts) for i in (bos, *text)])
        starts = (self.stream == bos).nonzero()[:, 0]
        self.starts = starts[starts <= len(self.stream) - self.width]

    def sample(self, generator: torch.Generator) -> Tensor:
        """A random batch."""
        return self.at(self.starts[torch.randint(len(self.starts), (BATCH_ROWS,), generator=generator)])

    def spread(self, rows: int) -> Tensor:
        """`rows` rows, evenly spread and always the same."""
        return self.at(self.starts[torch.linspace(0, len(self.starts) - 1, rows).long()])

    def at(self, starts: Tensor) -> Tensor:
        """The rows (B, T + 1) at these places of the stream."""
        return self.stream[starts[:, None] + torch.arange(self.width)]


# --- model --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def initialize(model: LRT) -> None:
    """Uniform matrices of unit gain; blocks add nothing at first, gates are 1, the memory path starts small."""
    bound = (3 / CONFIG.n_embd) ** 0.5
    constants = {"attention_out": 0.0, "mlp_out": 0.0, "gate": 0.0}
    constants |= {"resid_lambdas": 1.0, "x0_lambdas": 0.1, "memory_lambdas": 0.1}
    for name, parameter in model.named_parameters():
        kind = name.rsplit(".")[-1]
        if kind in constants:
            parameter.fill_(constants[kind])
        elif kind in ("wte", "lm_head"):
            parameter.normal_(std=1.0 if kind == "wte" else 0.001)
        else:
            parameter.uniform_(-bound, bound).mul_(0.5 if kind == "memory_kv" else 1.0)


def refine(model: LRT, ids: Tensor, passes: int) -> Iterator[Tensor]:
    """Hidden states (B, T, C) of each pass, the zero-memory pass first."""
    memory = torch.zeros(*ids.shape, CONFIG.n_embd)
    for _ in range(passes):
        hidden, latent = model.parallel(ids, memory)
        yield hidden
        memory = F.pad(latent, (0, 0, 1, -1))  # position t reads the latent of t - 1, position 0 zeros


def losses(model: LRT, rows: Tensor) -> Tensor:
    """Nats of every target in every pass (passes, B, T)."""
    ids, targets = rows[:, :-1], rows[:, 1:]
    logits = torch.stack([model.logits(hidden) for hidden in refine(model, ids, len(PASS_WEIGHTS))])
    nats = F.cross_entropy(logits.flatten(0, 2), targets.expand(len(logits), -1, -1).flatten(), reduction="none")
    return nats.view(logits.shape[:3])


def optimizers(model: LRT) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for tables, head and scalars."""
    tables, head = [model.wte, model.value_embeds], [model.lm_head]
    scalars = [p for p in model.parameters() if p.ndim == 1]
    outside = {id(p) for p in (*tables, *head, *scalars)}
    matrices = [p for p in model.parameters() if id(p) not in outside]
    rates = zip((tables, head, scalars), (EMBEDDING_LR, HEAD_LR, SCALAR_LR), strict=True)
    groups = [{"params": parameters, "lr": rate} for parameters, rate in rates]
    muon = torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)]


def train(model: LRT, data: Rows, minutes: float, generator: torch.Generator) -> Iterator[tuple[int, float]]:
    """Optimize until the time is up; yield the step and a running mean of the loss after each step."""
    opts = optimizers(model)
    base = [[group["lr"] for group in opt.param_groups] for opt in opts]
    weights = torch.tensor(PASS_WEIGHTS) / sum(PASS_WEIGHTS)
    start, step, mean = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        scale = min(1.0, (step + 1) / 20, (1 - done) / 0.5)  # warm up, hold, fall to zero over the second half
        for opt, rates in zip(opts, base, strict=True):
            for group, rate in zip(opt.param_groups, rates, strict=True):
                group["lr"] = rate * scale
        with torch.autocast("cpu", torch.bfloat16):
            loss = weights @ losses(model, data.sample(generator)).mean((1, 2))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        step += 1
        mean += (loss.item() - mean) * max(0.02, 1 / step)
        yield step, mean


# --- what it has learnt -------------------------------------------------------------------------------------------


@torch.no_grad()
def bits_per_byte(model: LRT, rows: Tensor, token_bytes: Tensor) -> list[float]:
    """Bits per byte of each pass, over the targets that have bytes."""
    nats = torch.cat([losses(model, part) for part in rows.split(BATCH_ROWS)], dim=1)
    lengths = token_bytes[rows[:, 1:]]
    return ((nats * (lengths > 0)).sum((1, 2)) / (math.log(2) * lengths.sum())).tolist()


@torch.no_grad()
def contraction(model: LRT, rows: Tensor, passes: int = 12) -> list[float]:
    """Largest error of the hidden state after each pass, against 24 passes more."""
    states = list(refine(model, rows[:, :-1], passes + 24))
    return [(state - states[-1]).abs().max().item() for state in states[:passes]]


@torch.no_grad()
def generate(model: LRT, ids: list[int], count: int, temperature: float) -> list[int]:
    """Continue by true recurrence: one token at a time, its latent carried to the next; stops at <|bos|>."""
    shape = (1, CONFIG.n_kv_head, len(ids) + count, CONFIG.head_dim)
    keys = values = [torch.zeros(shape)] * CONFIG.n_layer
    latent, tokens = torch.zeros(1, 1, CONFIG.n_embd), list(ids)
    for t in range(len(ids) + count - 1):
        position = torch.tensor([t])
        step = model(torch.tensor([[tokens[t]]]), position[None], latent, keys, values, position)
        latent, keys, values = step.latent, step.keys, step.values
        if t >= len(ids) - 1:
            logits = model.logits(step.hidden)[0, 0]  # (V)
            drawn = torch.multinomial((logits / temperature).softmax(0), 1) if temperature else logits.argmax()
            if (token := int(drawn)) == ids[0]:
                break
            tokens.append(token)
    return tokens[len(ids) :]


# --- files --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def state_dict(model: LRT) -> dict[str, Tensor]:
    """The weights under the authors' names and in their shapes; embedding tables in bfloat16."""
    state: dict[str, Tensor] = {}
    for name, source in weight_sources(CONFIG).items():
        widths = [shape[0 if source.transposed else -1] for shape in source.shapes]
        parts = model.get_parameter(name).split(widths, dim=-1)
        if source.transposed:
            parts = [part.T for part in parts]
        dtype = torch.bfloat16 if name in ("wte", "value_embeds") else torch.float32
        state |= {n: torch.empty(p.shape, dtype=dtype).copy_(p) for n, p in zip(source.names, parts, strict=True)}
    return state


def write_tokenizer(folder: Path, encoding: tiktoken.Encoding) -> None:
    """The two tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding, protocol=4))
    torch.save(count_bytes(encoding), folder / "token_bytes.pt")


def write_model(folder: Path, model: LRT, step: int, facts: dict[str, Any]) -> list[Path]:
    """Weights and meta file of one step."""
    weights, meta = folder / f"model_{step:06d}.pt", folder / f"meta_{step:06d}.json"
    torch.save(state_dict(model), weights)
    meta.write_text(json.dumps({"step": step, **facts, "model_config": MODEL_CONFIG, **RUN}, indent=2) + "\n")
    return [weights, meta]


# --- the run ------------------------------------------------------------------------------------------------------


def load_texts() -> tuple[list[str], list[str]]:
    """Training and held-out texts; every 20th topic or module is held out whole."""
    training: list[str] = []
    held_out: list[str] = []
    for i, texts in enumerate(documents()):
        (held_out if i % 20 == 19 else training).extend(texts)
    return training, held_out


def show_bpb(bpb: list[float]) -> str:
    """One number for each pass."""
    return "bits per byte by pass " + " ".join(f"{value:.4f}" for value in bpb)


@torch.no_grad()
def report(model: LRT, rows: Tensor, token_bytes: Tensor, encoding: tiktoken.Encoding) -> list[float]:
    """Print what the model as written to disk (tables in bfloat16) has learnt; return bits per byte by pass."""
    for table in (model.wte, model.value_embeds):
        table.copy_(table.bfloat16())
    bpb, errors = bits_per_byte(model, rows, token_bytes), contraction(model, rows[:BATCH_ROWS])
    print(f"final, {len(rows)} held-out rows: {show_bpb(bpb)}")
    print(f"largest error of the latent after pass 1 to {len(errors)}: " + " ".join(f"{error:.1e}" for error in errors))
    last = max(i for i, error in enumerate(errors) if i < 2 or error > 1e-4)  # below, float32 noise comes in
    print(f"the error falls {(errors[0] / errors[last]) ** (1 / last):.2f} times a pass")
    bos = encoding.encode_single_token("<|bos|>")
    for prompt in PROMPTS:
        for temperature in (0.0, 0.7):
            tokens = generate(model, [bos, *encoding.encode_ordinary(prompt)], 100, temperature)
            print(f"\n--- temperature {temperature}\n{prompt}[...]{encoding.decode(tokens)}")
    return bpb


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=30.0, help="time to train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Text, tokenizer, training, report, checkpoint."""
    args = options()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    training, held_out = load_texts()
    encoding = train_tokenizer(training)
    token_bytes = count_bytes(encoding)
    write_tokenizer(args.out / "tokenizer", encoding)
    data, val = Rows(training, encoding), Rows(held_out, encoding).spread(96)
    print(f"{sum(map(len, training)):,} characters, {len(data.stream):,} tokens in {len(training):,} texts", flush=True)
    model = LRT(CONFIG)
    initialize(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    start, step, files = time.monotonic(), 0, []
    for step, loss in train(model, data, args.minutes, torch.Generator().manual_seed(args.seed)):
        if step % 50 == 0:
            seconds = time.monotonic() - start
            print(f"step {step:5d}  {seconds:6.0f} s  loss {loss:.4f}", flush=True)
        if step % 200 == 0:
            bpb = bits_per_byte(model, val[:32], token_bytes)
            print(f"step {step:5d}  {show_bpb(bpb)}", flush=True)
            written = write_model(args.out, model, step, {"val_bpb": bpb[-1], "val_per_pass_bpb": bpb})
            for old in files:
                old.unlink()
            files = written
    bpb = report(model, val, token_bytes, encoding)
    for old in files:
        old.unlink()
    write_model(args.out, model, step, {"val_bpb": bpb[-1], "val_per_pass_bpb": bpb})


if __name__ == "__main__":
    main()
