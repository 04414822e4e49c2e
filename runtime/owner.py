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
    # Empty where it is not known; version 0.1.0 did not write it to state files.
    checkpoint_sha256: str = dataclasses.field(default="", compare=False)

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

    def check_same(self, other: ModelFingerprint, what: object = "this state") -> None:
        """Raise StateError, which says why, where `what` of the fingerprint `other` must not be continued here."""
        if self == other:
            return
        found, here = f"{other.precision} with {other.state_dtype} caches", f"{self.precision} with {self.state_dtype}"
        same_kind = (other.precision, other.state_dtype) == (self.precision, self.state_dtype)
        checkpoint = self.checkpoint_sha256
        same_source = self.bundle_sha256 == other.bundle_sha256 or checkpoint == other.checkpoint_sha256 != ""
        # Weights are stored in each precision, so their hash differs between precisions of one model too.
        if self.model_sha256 == other.model_sha256 or (not same_kind and same_source):
            why = f"it is of {found}, expected {here}; open that precision, or"
        else:
            precisions = "" if same_kind else f", and of {found} instead of {here}"
            why = (
                f"it is of another model (configuration and weights hash to {other.model_sha256[:12]}, here to "
                f"{self.model_sha256[:12]}){precisions};"
            )
        raise StateError(f"{what} cannot be used here: {why} read its tokens with this decoder instead")


@dataclass(frozen=True, eq=False)
class Owner:
    """The decoder's side of its states."""

    backend: Backend
    config: LRTConfig
    max_batch_size: int
    capacity: int  # tokens of a row
    fingerprint: ModelFingerprint
