"""Contender (c): what a user gets from `torch.onnx.export` and a Python loop, with a cache that grows by concatenation.

The graph takes the past keys and values and gives them out one token longer; the loop feeds outputs back as inputs.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .serving import Greedy


def export(checkpoint: Path, target: Path) -> dict[str, Any]:
    """Trace the reference with concatenated caches into `target/model.onnx`."""
    import torch

    from lrt_deploy.model.checkpoint import open_checkpoint

    model = open_checkpoint(checkpoint).model()
    config = model.config

    class Growing(torch.nn.Module):
        """`LRT` from past caches (B, G, P, D) to present ones (B, G, P + T, D)."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, latent: Any, keys: Any, values: Any) -> tuple[Any, ...]:  # noqa: ANN401
            past, count = keys[0].shape[2], ids.shape[1]
            positions = torch.arange(past, past + count).expand_as(ids)
            present: tuple[list[Any], list[Any]] = ([], [])

            def write(layer: int, k: Any, v: Any) -> tuple[Any, Any]:  # noqa: ANN401
                present[0].append(torch.cat((keys[layer], k), 2))
                present[1].append(torch.cat((values[layer], v), 2))
                return present[0][-1], present[1][-1]

            hidden, latent = self.model._run(ids, positions, latent, torch.arange(past + count), write)
            return self.model.logits(hidden[:, -1]), latent, *present[0], *present[1]

    batch, tokens, past = (torch.export.Dim(name) for name in ("batch", "tokens", "past"))
    cache = [torch.zeros(2, config.n_kv_head, 5, config.head_dim) for _ in range(config.n_layer)]
    example = (
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(2, 3, config.n_embd),
        cache,
        [c.clone() for c in cache],
    )
    grows = [{0: batch, 2: past} for _ in cache]
    names = [f"{kind}_{i}" for kind in ("key", "value") for i in range(config.n_layer)]
    warnings.simplefilter("ignore")  # advice of the exporter on its own names
    torch.onnx.export(
        Growing().eval(),
        example,
        target / "model.onnx",
        dynamo=True,
        opset_version=23,
        dynamic_shapes=({0: batch, 1: tokens}, {0: batch, 1: tokens}, grows, grows),
        input_names=["ids", "latent", *(f"past_{name}" for name in names)],
        output_names=["logits", "next_latent", *(f"present_{name}" for name in names)],
        external_data=True,
        verbose=False,
    )
    return {"bytes": sum(file.stat().st_size for file in target.iterdir())}


class PlainRoute(Greedy):
    """An InferenceSession, a dict of feeds, a loop."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.shapes = {value.name: value.shape for value in self.session.get_inputs()}
        self.facts: dict[str, Any] = {"runs": f"ONNX Runtime {ort.__version__}, {threads} thread(s)"}

    def start(self, rows: list[list[int]], exact: bool) -> None:
        """See `serving.Contender`."""
        batch, count = len(rows), len(rows[0])
        self.past = {
            name: np.zeros((batch, shape[1], 0, shape[3]), np.float32)
            for name, shape in self.shapes.items()
            if name.startswith("past_")
        }
        self.latent = np.zeros((batch, 1, self.shapes["latent"][2]), np.float32)
        for part in range(0, count, 1 if exact else count):
            width = 1 if exact else count
            memory = self.latent if exact else np.zeros((batch, count, self.latent.shape[2]), np.float32)
            self._run(np.array([row[part : part + width] for row in rows]), memory)

    def step(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """See `serving.Contender`."""
        return self._run(np.array(tokens)[:, None], self.latent)

    def _run(self, ids: npt.NDArray[np.int64], latent: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        logits, latents, *present = self.session.run(None, {"ids": ids, "latent": latent} | self.past)
        self.past = dict(zip(self.past, present, strict=True))
        self.latent = latents[:, -1:]
        self.facts["bytes_allocated_per_step"] = sum(array.nbytes for array in (logits, latents, *present))
        return logits
