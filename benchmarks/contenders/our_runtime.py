"""Contenders (a) and (e): this project's runtime on an LRT, or on the plain model without memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import lrt_deploy
from lrt_deploy.runtime.bench import state_bytes_per_step


class OurRuntime:
    """An opened bundle and one state."""

    def __init__(self, bundle: Path, threads: int, **options: Any) -> None:  # noqa: ANN401 - of open_decoder
        self.decoder = lrt_deploy.open_decoder(bundle, threads=threads, **options)
        unknown = self.decoder.new_state(1).buffers.copies_note
        copied = state_bytes_per_step(self.decoder.config, 1)["state_bytes_copied_per_step"]
        self.facts = {
            "runs": self.decoder.backend_detail,
            "bytes_allocated_per_step": 0,
            "state_bytes_copied_per_step": None if unknown else copied,
        }

    def start(self, rows: list[list[int]], exact: bool) -> None:
        """See `serving.Contender`."""
        fast = "zero" if self.decoder.config.memory else "fixed-point"
        self.state = self.decoder.prefill(rows, policy="stepwise" if exact else fast)

    def step(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """See `serving.Contender`."""
        return self.decoder.step(self.state, tokens)

    def greedy(self, tokens: list[int]) -> list[int]:
        """What `Decoder.generate` does for each token, for any number of rows: the state's logits are not copied."""
        self.decoder.advance(self.state, np.array(tokens))
        return [int(self.state.row_logits(row).argmax()) for row in range(len(tokens))]
