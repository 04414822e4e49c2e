"""What a state belongs to: the backend that runs it, and the fingerprint of the model that its numbers come from.

Two decoders whose fingerprints agree may exchange states, on any backends.
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
class ModelFingerprint:
    """What the numbers of a state depend on, and the bundle that they came from, which is not compared."""

    model_sha256: str  # configuration and weights
    precision: str
    state_dtype: str  # of the caches
    bundle_sha256: str = dataclasses.field(compare=False)
    checkpoint_sha256: str = dataclasses.field(default="", compare=False)  # empty where it is not known

    @classmethod
    def of(cls, backend: Backend, manifest: Manifest, bundle_sha256: str) -> ModelFingerprint:
        """Compute the fingerprint of a loaded bundle."""
        weights = {
            name: record.sha256
            for name, record in manifest.files.items()
            if name.startswith(f"graphs/{backend.precision}/") and not name.endswith(".onnx")
        }
        parts = json.dumps([dataclasses.asdict(manifest.model), weights], sort_keys=True)
        model = hashlib.sha256(parts.encode()).hexdigest()
        checkpoint = manifest.provenance.get("checkpoint", {})
        source = str(checkpoint.get("sha256", "")) if isinstance(checkpoint, dict) else ""
        return cls(model, backend.precision, backend.state_dtype, bundle_sha256, source)

    def why_not(self, other: ModelFingerprint) -> str | None:
        """Return why a state of `other` must not be used here; None if it may."""
        if self == other:
            return None
        found, here = f"{other.precision} with {other.state_dtype} caches", f"{self.precision} with {self.state_dtype}"
        same_kind = (other.precision, other.state_dtype) == (self.precision, self.state_dtype)
        # Weights are stored in each precision, so their hash differs between precisions of one model too.
        if self.model_sha256 == other.model_sha256 or (not same_kind and self._same_source(other)):
            return (
                f"it is of {found}, expected {here}; open that precision, or read its tokens with this decoder instead"
            )
        precisions = "" if same_kind else f", and of {found} instead of {here}"
        return (
            f"it is of another model (configuration and weights hash to {other.model_sha256[:12]}, here to "
            f"{self.model_sha256[:12]}){precisions}; read its tokens with this decoder instead"
        )

    def _same_source(self, other: ModelFingerprint) -> bool:
        """Whether both come from one bundle, or from one checkpoint."""
        checkpoint = self.checkpoint_sha256
        return self.bundle_sha256 == other.bundle_sha256 or (checkpoint != "" and checkpoint == other.checkpoint_sha256)


@dataclass(frozen=True, eq=False)
class Owner:
    """The decoder's side of its states."""

    backend: Backend
    config: LRTConfig
    max_batch_size: int
    capacity: int  # tokens of a row
    fingerprint: ModelFingerprint

    def check_same(self, other: Owner) -> None:
        """Raise StateError for a state of another model or precision."""
        if why := self.fingerprint.why_not(other.fingerprint):
            raise StateError(f"this state cannot be taken over: {why}")
