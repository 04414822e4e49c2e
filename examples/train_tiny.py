"""Train a small Latent Recurrent Transformer in half an hour on one CPU core.

The text is what every machine with Python has: its reference topics and its standard library's docstrings and short
functions. Training is by multi-refinement (arXiv 2605.26797): pass 0 reads zeros for the latents, each later pass
reads the latents of the pass before, shifted right by one position, and the loss is a weighted mean over the passes.
The result is a checkpoint as the paper's authors write it; `demo/checkpoint` came from this script.

It does not resume, use a GPU, or try to be a good language model: 3 million parameters (more with --width), a few
epochs of 2.4 MB. It needs tiktoken, which the extra `test` brings.

    python examples/train_tiny.py --out demo/checkpoint --minutes 30 > demo/training.log
    python examples/train_tiny.py --out mine --text FILE --minutes 10
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

import tiktoken
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor

from lrt_deploy.bundle.weights import weight_sources
from lrt_deploy.config import LRTConfig
from lrt_deploy.model.model import LRT
from lrt_deploy.model.reference import ReferenceDecoder
from lrt_deploy.text.tokenizer import token_byte_lengths

SEQUENCE_LEN, VOCAB_SIZE, WIDTH = 256, 2048, 160
PASS_WEIGHTS = (1.0, 2.0, 2.0)  # of the loss: zero-memory pass, then the refinements
TABLES = ("wte", "value_embeds")  # bfloat16 on disk, as the authors' training leaves them
BATCH_ROWS = 4
MATRIX_LR, EMBEDDING_LR, HEAD_LR, SCALAR_LR = 0.01, 0.4, 0.01, 0.03

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPEAKERS = ("user", "assistant", "python", "output")
SPECIAL_TOKENS = ["<|bos|>", *(f"<|{speaker}_{edge}|>" for speaker in SPEAKERS for edge in ("start", "end"))]
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"}
FEWEST_PIECES = 100  # of a text of your own; every 20th is held out
SHORTEST_DOCSTRING, LONGEST_FUNCTION = 80, 20  # characters, lines
PROMPTS = (
    'The "while" statement',
    "Return the",
    'def read(self, size=-1):\n    """',
    'class Queue:\n    """',
    "If the object is",
)


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
    """A module's docstring, then each function and class that has one: whole if short, else head and docstring."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        if len(doc := ast.get_docstring(node) or "") < SHORTEST_DOCSTRING:
            continue
        quoted = textwrap.indent(f'"""{doc}\n"""', "    ")
        if isinstance(node, ast.Module):
            yield from paragraphs(doc)
        elif isinstance(node, ast.ClassDef):
            yield f"class {node.name}:\n{quoted}"
        elif (end := node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION:
            yield textwrap.dedent("\n".join(source.splitlines()[node.lineno - 1 : end]))
        else:
            yield f"def {node.name}({ast.unparse(node.args)}):\n{quoted}"


def documents() -> Iterator[list[str]]:
    """One list of short texts for each topic and each module, always in the same order."""
    yield from (list(paragraphs(topics[name])) for name in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py"), key=Path.as_posix):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts) and not path.name.startswith("_sysconfigdata"):
            yield list(definitions(path.read_text(encoding="utf-8")))


def documents_of(file: Path) -> list[list[str]]:
    """Return the pieces of a text of your own, each a document: it is cut at blank lines."""
    try:
        found = [[piece] for piece in paragraphs(file.read_text(encoding="utf-8"))]
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"--text {file} is no text that can be read: {error}") from None
    if len(found) < FEWEST_PIECES:
        raise SystemExit(f"{file} has {len(found)} pieces of 800 characters; expected at least {FEWEST_PIECES} (80 kB)")
    return found


def train_tokenizer(texts: list[str]) -> tiktoken.Encoding:
    """Byte-level BPE: the bytes, then the merges in order, then the special tokens as the last ids."""
    first_special, alphabet = VOCAB_SIZE - len(SPECIAL_TOKENS), pre_tokenizers.ByteLevel.alphabet()
    learner = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(vocab_size=first_special, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    vocabulary = learner.get_vocab()
    if len(vocabulary) < first_special:
        raise SystemExit(f"the text gives {len(vocabulary)} tokens, expected {first_special}: it is too short")
    # Byte-level BPE spells a byte as its character where that is visible, else as one of the characters from 256 on.
    invisible = [b for b in range(256) if b == ord(" ") or not chr(b).isprintable()]
    byte_of = {chr(256 + invisible.index(b)) if b in invisible else chr(b): b for b in range(256)}
    merged = [bytes(byte_of[c] for c in token) for token in sorted(vocabulary, key=vocabulary.__getitem__)[256:]]
    ranks = {token: rank for rank, token in enumerate([bytes([b]) for b in range(256)] + merged)}
    special = {name: first_special + i for i, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("python-docs", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)


class Rows:
    """One row of tokens for each text: from its <|bos|> on, through that text and the texts after it."""

    def __init__(self, texts: list[str], encoding: tiktoken.Encoding) -> None:
        bos = encoding.encode_single_token("<|bos|>")
        self.stream = torch.tensor([i for text in encoding.encode_ordinary_batch(texts) for i in (bos, *text)])
        starts = (self.stream == bos).nonzero()  # (texts, 1)
        self.starts = starts[starts[:, 0] < len(self.stream) - SEQUENCE_LEN]

    def __getitem__(self, index: Tensor) -> Tensor:
        """The rows (B, T + 1) at index (B)."""
        return self.stream[self.starts[index] + torch.arange(SEQUENCE_LEN + 1)]


@torch.no_grad()
def initialize(model: LRT) -> None:
    """Uniform matrices of unit gain; blocks add nothing at first, gates are 1, the memory path starts small."""
    constants = {"attention_out": 0.0, "mlp_out": 0.0, "gate": 0.0}
    constants |= {"resid_lambdas": 1.0, "x0_lambdas": 0.1, "memory_lambdas": 0.1}
    bound = math.sqrt(3 / model.config.n_embd)
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-1]
        if kind in constants:
            parameter.fill_(constants[kind])
        elif kind in ("wte", "lm_head"):
            parameter.normal_(std=1.0 if kind == "wte" else 0.001)
        else:
            parameter.uniform_(-bound, bound).mul_(0.5 if kind == "memory_kv" else 1.0)


def refine(model: LRT, ids: Tensor, passes: int) -> Iterator[Tensor]:
    """Hidden states (B, T, C) of each pass, the zero-memory pass first."""
    memory = torch.zeros(*ids.shape, model.config.n_embd)  # (B, T, C)
    for _ in range(passes):
        hidden, latent = model.parallel(ids, memory)
        yield hidden
        memory = F.pad(latent, (0, 0, 1, -1))  # position t reads the latent of t - 1, position 0 zeros


def losses(model: LRT, rows: Tensor) -> Tensor:
    """Nats of every target in every pass (passes, B, T)."""
    logits = torch.stack([model.logits(hidden) for hidden in refine(model, rows[:, :-1], len(PASS_WEIGHTS))])
    targets = rows[:, 1:].expand(len(PASS_WEIGHTS), -1, -1)
    return F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(targets.shape)


def optimizers(model: LRT) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for tables, head and scalars."""
    named = dict(model.named_parameters())
    groups = [
        {"params": [named.pop(name) for name in TABLES], "lr": EMBEDDING_LR},
        {"params": [named.pop("lm_head")], "lr": HEAD_LR},
        {"params": [p for p in named.values() if p.ndim == 1], "lr": SCALAR_LR},
    ]
    matrices = [p for p in named.values() if p.ndim == 2]
    muon = torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)]


def train(model: LRT, data: Rows, minutes: float, generator: torch.Generator) -> Iterator[tuple[int, float]]:
    """Optimize until the time is up; yield the number of steps and a running mean of the loss after each."""
    opts = optimizers(model)
    groups = [(group, group["lr"]) for opt in opts for group in opt.param_groups]
    weights = torch.tensor(PASS_WEIGHTS) / sum(PASS_WEIGHTS)
    start, step, mean = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group, rate in groups:  # warm up, hold, fall to zero over the second half
            group["lr"] = rate * min(1.0, (step + 1) / 20, (1 - done) / 0.5)
        batch = data[torch.randint(len(data.starts), (BATCH_ROWS,), generator=generator)]
        with torch.autocast("cpu", torch.bfloat16):
            nats = losses(model, batch)
        loss = weights @ nats.mean((1, 2))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        step += 1
        mean += (loss.item() - mean) * max(0.02, 1 / step)
        yield step, mean


@torch.no_grad()
def bits_per_byte(model: LRT, rows: Tensor, token_bytes: Tensor) -> list[float]:
    """Bits per byte of each pass, over the targets that have bytes."""
    nats = torch.cat([losses(model, part) for part in rows.split(BATCH_ROWS)], dim=1)  # (passes, B, T)
    lengths = token_bytes[rows[:, 1:]]
    return [float(bpb) for bpb in (nats * (lengths > 0)).sum((1, 2)) / (math.log(2) * lengths.sum())]


def generate(decoder: ReferenceDecoder, prompt: list[int], temperature: float, count: int = 100) -> list[int]:
    """Continue by true recurrence until the next text would start."""
    state, tokens = decoder.prefill([prompt]), []
    for _ in range(count):
        logits = torch.tensor(state.logits[0])
        drawn = torch.multinomial((logits / temperature).softmax(0), 1) if temperature else logits.argmax()
        if int(drawn) == prompt[0]:
            break
        tokens.append(int(drawn))
        decoder.step(state, tokens[-1:])
    return tokens


@torch.no_grad()
def report(model: LRT, rows: Tensor, encoding: tiktoken.Encoding) -> None:
    """Print how the passes converge, and samples."""
    states = list(refine(model, rows[:, :-1], 36))
    errors = [(state - states[-1]).abs().max().item() for state in states[:12]]
    last = max(i for i, error in enumerate(errors) if i < 2 or error > 1e-4)  # below, float32 noise comes in
    print("largest error of the latent after pass 1 to 12: " + " ".join(f"{error:.1e}" for error in errors))
    print(f"the error falls {(errors[0] / errors[last]) ** (1 / last):.2f} times a pass")
    decoder, bos = ReferenceDecoder(model), encoding.encode_single_token("<|bos|>")
    for prompt in PROMPTS:
        for temperature in (0.0, 0.7):
            tokens = generate(decoder, [bos, *encoding.encode_ordinary(prompt)], temperature)
            print(f"\n--- temperature {temperature}\n{prompt}[...]{encoding.decode(tokens)}")


@torch.no_grad()
def state_dict(model: LRT) -> dict[str, Tensor]:
    """The weights under the authors' names and in their shapes; embedding tables in bfloat16."""
    state: dict[str, Tensor] = {}
    for name, source in weight_sources(model.config).items():
        dtype = torch.bfloat16 if name in TABLES else torch.float32
        widths = [shape[0 if source.transposed else -1] for shape in source.shapes]
        for theirs, part in zip(source.names, model.get_parameter(name).split(widths, dim=-1), strict=True):
            stored = part.T if source.transposed else part
            state[theirs] = torch.empty(stored.shape, dtype=dtype).copy_(stored)
    return state


def model_config(config: LRTConfig) -> dict[str, object]:
    """The model and how it was trained, in the authors' fields."""
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("memory")}
    unused = {"use_interleaved": False, "interleaved_num_passes": 2, "interleaved_kv_refresh": False}
    trained = {"use_multi_refine": True, "multi_refine_num_passes": len(PASS_WEIGHTS) - 1}
    return {**fields, **unused, **trained, "multi_refine_detach": False, "multi_refine_loss_weights": PASS_WEIGHTS}


def write_tokenizer(folder: Path, encoding: tiktoken.Encoding) -> Tensor:
    """The two files of a tokenizer; how much each token (V) counts in bits per byte."""
    folder.mkdir(parents=True, exist_ok=True)  # it may be left from a run that was stopped
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding, protocol=4))
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    special = [encoding.encode_single_token(name) for name in SPECIAL_TOKENS]
    token_bytes = torch.tensor(token_byte_lengths(tokens, special), dtype=torch.int32)
    torch.save(token_bytes, folder / "token_bytes.pt")
    return token_bytes


def write_model(folder: Path, model: LRT, step: int, bpb: list[float]) -> None:
    """Weights and meta file; those of an earlier step go."""
    earlier = [*folder.glob("model_*.pt"), *folder.glob("meta_*.json")]
    torch.save(state_dict(model), folder / f"model_{step:06d}.pt")
    facts = {"step": step, "val_bpb": bpb[-1], "val_per_pass_bpb": bpb, "model_config": model_config(model.config)}
    facts |= {"device_batch_size": BATCH_ROWS, "max_seq_len": SEQUENCE_LEN}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(facts, indent=2) + "\n")
    for file in earlier:
        file.unlink()


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint, without one in it")
    parser.add_argument("--text", type=Path, metavar="FILE", help="train on this UTF-8 text instead of Python's own")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long to train")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the model, a multiple of 8")
    parser.add_argument("--held-out", type=Path, metavar="FILE", help="write the text that is not trained on here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Text, tokenizer, training, checkpoint, report."""
    args = options()
    if earlier := [*args.out.glob("model_*.pt"), *args.out.glob("meta_*.json")]:
        raise SystemExit(
            f"{args.out} holds {earlier[0].name}, which would be removed; name a folder without a checkpoint"
        )
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    # Every 20th is held out whole.
    groups = list(documents()) if args.text is None else documents_of(args.text)
    held_out = [text for texts in groups[19::20] for text in texts]
    training = [text for i, texts in enumerate(groups) if i % 20 != 19 for text in texts]
    encoding = train_tokenizer(training)
    token_bytes = write_tokenizer(args.out / "tokenizer", encoding)
    data, unseen = Rows(training, encoding), Rows(held_out, encoding)
    val = unseen[torch.linspace(0, len(unseen.starts) - 1, 96).long()]
    print(f"{sum(map(len, training)):,} characters, {len(data.stream):,} tokens in {len(training):,} texts")
    if args.held_out:
        args.held_out.write_text("\n\n".join(held_out), encoding="utf-8")
    config = LRTConfig(
        SEQUENCE_LEN, VOCAB_SIZE, n_layer=5, n_head=4, n_kv_head=2, n_embd=args.width, window_pattern="SSSL"
    )
    model, step, start = LRT(config), 0, time.monotonic()
    initialize(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    for step, loss in train(model, data, args.minutes, torch.Generator().manual_seed(args.seed)):
        if step % 50 == 0:
            print(f"step {step:5d}  {time.monotonic() - start:6.0f} s  loss {loss:.4f}", flush=True)
        if step % 200 == 0:
            bpb = bits_per_byte(model, val[:32], token_bytes)
            print(f"step {step:5d}  bits per byte by pass {' '.join(f'{value:.4f}' for value in bpb)}", flush=True)
            write_model(args.out, model, step, bpb)
    model.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items() if k in TABLES}, strict=False)
    bpb = bits_per_byte(model, val, token_bytes)
    print(f"final, {len(val)} held-out rows: bits per byte by pass {' '.join(f'{value:.4f}' for value in bpb)}")
    write_model(args.out, model, step, bpb)
    report(model, val[:BATCH_ROWS], encoding)
    print(f"wrote {args.out}; export it: lrt-deploy export {args.out} my-bundle --max-seq-len 1024")


if __name__ == "__main__":
    main()
