"""What a state belongs to: the backend that runs it, and the model, weights and precision that its numbers are of.

Two decoders whose identities agree may exchange states, whatever runs them: the numbers mean the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from lrt_deploy.bundle.manifest import Manifest
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import StateError
from lrt_deploy.runtime.backends.base import Backend


@dataclass(frozen=True)
class Identity:
    """What the numbers of a state depend on, and the bundle that they came from, which decides nothing."""

    model_sha256: str  # configuration and weights
    precision: str
    state_dtype: str  # of the caches
    bundle_sha256: str = dataclasses.field(compare=False)
    checkpoint_sha256: str = dataclasses.field(default="", compare=False)  # empty where it is not known

    def why_not(self, other: Identity) -> str | None:
        """Why a state of `other` must not be used here; None if it may."""
        if self == other:
            return None
        kind = (other.precision, other.state_dtype)
        found, here = f"{other.precision} with {other.state_dtype} caches", f"{self.precision} with {self.state_dtype}"
        # Weights are stored in each precision, so that their hash differs between precisions of one model too.
        if kind != (self.precision, self.state_dtype) and self._same_source(other):
            return (
                f"it is of {found}, expected {here}; open that precision, or read its tokens with this decoder instead"
            )
        if self.model_sha256 != other.model_sha256:
            precisions = "" if kind == (self.precision, self.state_dtype) else f", and of {found} instead of {here}"
            return (
                f"it is of another model (configuration and weights hash to {other.model_sha256[:12]}, here to "
                f"{self.model_sha256[:12]}){precisions}; read its tokens with this decoder instead"
            )
        return f"it is of {found}, expected {here}; open that precision, or read its tokens with this decoder instead"

    def _same_source(self, other: Identity) -> bool:
        """Whether both come from one bundle, or from one checkpoint."""
        checkpoint = self.checkpoint_sha256
        return self.bundle_sha256 == other.bundle_sha256 or (checkpoint != "" and checkpoint == other.checkpoint_sha256)


@dataclass(frozen=True, eq=False)
class Origin:
    """The decoder's side of a state."""

    backend: Backend
    config: LRTConfig
    max_batch_size: int
    capacity: int
    identity: Identity

    @classmethod
    def of(cls, backend: Backend, manifest: Manifest, bundle_sha256: str) -> Origin:
        """What a decoder's states belong to."""
        weights = {
            name: record.sha256
            for name, record in manifest.files.items()
            if name.startswith(f"graphs/{backend.precision}/") and not name.endswith(".onnx")
        }
        parts = json.dumps([dataclasses.asdict(manifest.model), weights], sort_keys=True)
        model = hashlib.sha256(parts.encode()).hexdigest()
        checkpoint = manifest.provenance.get("checkpoint", {})
        source = str(checkpoint.get("sha256", "")) if isinstance(checkpoint, dict) else ""
        identity = Identity(model, backend.precision, backend.state_dtype, bundle_sha256, source)
        return cls(backend, manifest.model, manifest.max_batch_size, manifest.max_seq_len, identity)

    def check_same(self, other: Origin) -> None:
        """Refuse a state of another model or precision."""
        if why := self.identity.why_not(other.identity):
            raise StateError(f"this state cannot be taken over: {why}")
