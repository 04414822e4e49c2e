"""The undamaged files that trials start from: small, made by code, once for all workers of a campaign.

lrt/, plain/       checkpoints in the authors' layout, each with tokenizer/
native/            the same LRT as config.json and model.safetensors
bundle/ hosted/ narrow/ large/    exported: float32, tables on the host, int8 and int4, weights beyond 4 MiB
one.state two.state      states of `bundle`
cache/             a prompt cache of `bundle` with three entries
engine/            a plan (random bytes) with its sidecar
golden.npz rows.npz      a recording of `bundle`, and token rows for evaluation
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np

SIZES = {"sequence_len": 16, "vocab_size": 270, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "window_pattern": "SL"}
SPECIAL = (
    *("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
    *("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
)
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
MERGED = (b"th", b"the", b" t", b"in", b" a")
CAPACITY, BATCH = 64, 4
PROMPT = [261, 5, 70, 8, 120, 33]
LONG_PROMPT = [261, *[(37 * i + 11) % 256 for i in range(23)]]
STEPS = 4  # tokens decoded to compare an opened bundle with its original
LARGE_BYTES = 4 * 2**20 + 4096  # hashes of files beyond 4 MiB are remembered


def ranks() -> dict[bytes, int]:
    """The ordinary tokens of the tiny tokenizer: all bytes and a few merges."""
    return {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(MERGED)}


def encoding_state() -> dict[str, object]:
    """What a pickled tiktoken Encoding of the tiny tokenizer holds."""
    found = ranks()
    special = {name: len(found) + i for i, name in enumerate(SPECIAL)}
    return {"name": "tiny", "pat_str": PATTERN, "mergeable_ranks": found, "special_tokens": special}


def pickled(state: dict[str, object], protocol: int = 4) -> bytes:
    """The state as the authors' training code writes it."""
    import tiktoken

    encoding = tiktoken.Encoding.__new__(tiktoken.Encoding)
    encoding.__dict__["_fuzz_state"] = state
    return _Pickler.dumps(encoding, state, protocol)


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes an Encoding with any state, valid or not."""

    @classmethod
    def dumps(cls, encoding, state, protocol):
        import copyreg
        import io

        file = io.BytesIO()
        pickler = cls(file, protocol)
        pickler.dispatch_table = {type(encoding): lambda _: (copyreg.__newobj__, (type(encoding),), state)}
        pickler.dump(encoding)
        return file.getvalue()


def make(folder: Path) -> None:
    """Write all originals into an empty folder."""
    import torch
    from random_models import random_model, write_native

    import lrt_deploy
    from lrt_deploy.config import LRTConfig

    torch.set_num_threads(1)
    lrt = LRTConfig(**SIZES, n_layer=2)
    plain = LRTConfig(**SIZES, n_layer=1, memory=False)
    for name, config in (("lrt", lrt), ("plain", plain)):
        write_native(random_model(config, seed=7), folder / f"{name}-native")
        _write_authors(folder / name, config, folder / f"{name}-native" / "model.safetensors")
    (folder / "lrt-native").rename(folder / "native")
    options = {"max_seq_len": CAPACITY, "max_batch_size": BATCH}
    lrt_deploy.export_bundle(folder / "lrt", folder / "bundle", **options)
    lrt_deploy.export_bundle(folder / "lrt", folder / "hosted", host_embeddings=True, **options)
    (folder / "text.txt").write_text("The king is in the tree, and the three things in there are thin.\n" * 2)
    quantized = {"precision": ("int8", "int4-weight-only"), "calibration": folder / "text.txt"}
    lrt_deploy.export_bundle(folder / "plain", folder / "narrow", **quantized, **options)
    _write_large(folder)
    _write_states(folder)
    _write_engine(folder)


def _write_authors(folder: Path, config, weights: Path) -> None:
    import safetensors.torch
    import torch

    (folder / "tokenizer").mkdir(parents=True)
    tensors = safetensors.torch.load_file(weights)
    torch.save({key: tensor.clone() for key, tensor in tensors.items()}, folder / "model_000010.pt")
    names = [*SIZES, "n_layer", "use_value_embeds", "use_x0_residual", "use_resid_lambdas", "ve_gate_channels"]
    fields = {name: getattr(config, name) for name in names}
    fields |= {"use_interleaved": config.memory, "use_multi_refine": False}
    meta = {"step": 10, "val_bpb": 1.5, "model_config": fields, "user_config": {"run": "tiny", "depth": config.n_layer}}
    (folder / "meta_000010.json").write_text(json.dumps(meta, indent=2))
    (folder / "tokenizer" / "tokenizer.pkl").write_bytes(pickled(encoding_state()))
    lengths = [len(t.decode("utf-8", "replace").encode()) for t in ranks()] + [0] * len(SPECIAL)
    torch.save(torch.tensor(lengths, dtype=torch.int32), folder / "tokenizer" / "token_bytes.pt")


def _write_large(folder: Path) -> None:
    """The bundle with weights that are padded beyond the size up to which files are hashed at every opening."""
    import shutil

    shutil.copytree(folder / "bundle", folder / "large")
    weights = folder / "large" / "graphs" / "fp32" / "weights.bin"
    weights.write_bytes(weights.read_bytes().ljust(LARGE_BYTES, b"\0"))
    rehash(folder / "large")


def rehash(bundle: Path, text: str | None = None) -> None:
    """Make sizes and digests of a manifest (or of the text that stands for it) fit the files, then its own digest."""
    path = bundle / "manifest.json"
    text = path.read_text() if text is None else text
    try:
        fields = json.loads(text)
        for name, record in fields["files"].items():
            data = (bundle / name).read_bytes()
            record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        pass  # it is meant to be wrong
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    (bundle / "manifest.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")


def _write_states(folder: Path) -> None:
    import lrt_deploy
    from lrt_deploy.runtime.prompt_cache import PromptCache

    with lrt_deploy.open_decoder(folder / "bundle", threads=1) as decoder:
        one = decoder.prefill([PROMPT], policy="stepwise")
        decoder.step(one, [9])
        one.extra = {"chat": ["first", {"turn": 1}]}
        one.save(folder / "one.state")
        decoder.prefill([PROMPT, LONG_PROMPT], policy="stepwise").save(folder / "two.state")
        cache = PromptCache(folder / "cache")
        for count in (18, 21, 24):
            cache.prefill(decoder, LONG_PROMPT[:count], policy="stepwise")
        ids = np.array([LONG_PROMPT[:12], LONG_PROMPT[6:18]])
        logits, latents = _recorded(decoder, ids)
    np.savez(folder / "golden.npz", ids=ids, seq_logits=logits, seq_h_final=latents)
    np.savez(folder / "rows.npz", x=ids[:, :-1], y=ids[:, 1:])


def _recorded(decoder, ids):
    logits, latents = [], []
    state = decoder.prefill(ids[:, :1].tolist(), policy="stepwise")
    for t in range(ids.shape[1]):
        if t:
            decoder.step(state, ids[:, t])
        logits.append(state.logits)
        latents.append(state.latent)
    return np.stack(logits, 1), np.stack(latents, 1)


def _write_engine(folder: Path) -> None:
    from lrt_deploy.bundle.engine_sidecar import EngineSidecar, Profile, write_sidecar
    from lrt_deploy.bundle.manifest import read_manifest

    manifest = read_manifest(folder / "bundle")
    (folder / "engine").mkdir()
    plan = folder / "engine" / "lrt.plan"
    data = np.random.default_rng(0).bytes(4096)
    plan.write_bytes(data)
    contract = manifest.contracts["fp32"]["full"]
    profiles = (Profile("decode", (1, 1, 4), (1, 1, 1)), Profile("prefill", (1, 1, 1), (1, 16, 64)))
    graph = "graphs/fp32/prefill.onnx"
    sidecar = EngineSidecar(
        *("tensorrt-rtx", "fp32", hashlib.sha256(data).hexdigest(), len(data), graph, manifest.files[graph].sha256),
        *(manifest.files["graphs/fp32/weights.bin"].sha256, "1.7.0", ("8.6", "8.9", "12.0"), profiles, ("REFIT",)),
        *(128, CAPACITY, BATCH, tuple(contract["inputs"]), tuple(contract["outputs"]), tuple(contract["state"])),
        *({"MatMul": 12}, {"seconds": 3.5}),
    )
    write_sidecar(plan, sidecar)


@dataclasses.dataclass(frozen=True)
class Originals:
    """The folder of originals, and what they give, computed once in each process."""

    folder: Path

    @functools.cached_property
    def decoder(self):
        """The opened `bundle`."""
        import lrt_deploy

        return lrt_deploy.open_decoder(self.folder / "bundle", threads=1)

    @functools.cached_property
    def numbers(self) -> dict[str, np.ndarray]:
        """Logits (STEPS, V) after the prompt and after each greedy token, by bundle."""
        import lrt_deploy

        found = {}
        for name in ("bundle", "hosted", "narrow", "large"):
            with lrt_deploy.open_decoder(self.folder / name, threads=1) as decoder:
                found[name] = decoded(decoder)
        return found

    @functools.lru_cache  # noqa: B019 - one instance a process
    def bytes_of(self, name: str) -> bytes:
        """The content of a file."""
        return (self.folder / name).read_bytes()

    @functools.lru_cache  # noqa: B019
    def tensors(self, name: str):
        """The tensors of a checkpoint in the authors' layout, and the parameters of its model."""
        import torch

        from lrt_deploy.model.checkpoint import open_checkpoint

        tensors = torch.load(self.folder / name / "model_000010.pt", weights_only=True)
        return tensors, parameters(open_checkpoint(self.folder / name).model())


def parameters(model) -> dict[str, np.ndarray]:
    """All parameters of a reference model."""
    return {name: value.detach().float().numpy() for name, value in model.named_parameters()}


def decoded(decoder, prompt=PROMPT) -> np.ndarray:
    """Logits (STEPS, V) of a greedy continuation."""
    state = decoder.prefill([prompt], policy="stepwise")
    rows = [state.logits[0]]
    for _ in range(STEPS - 1):
        rows.append(decoder.step(state, [int(rows[-1].argmax())])[0])
    return np.stack(rows)
