"""The package `kserve`: manifests that run the bundle on Kubernetes, with KServe or without, and the image they name.

Memory follows from the sizes in the bundle: the weights, and the state of a sequence of full length. Contacts no
cluster and no registry.
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from math import prod

from lrt_deploy.bundle.manifest import MANIFEST, Manifest, hash_file, weights_path
from lrt_deploy.bundle.precisions import ITEM_BYTES
from lrt_deploy.exporters.packages.docker import GRACE_SECONDS, write_image
from lrt_deploy.exporters.packages.source import Source, fill, read_template

COMMAND = "kubectl apply -k ."
THREADS = 2
PAUSE_SECONDS = 5  # before SIGTERM, so that load balancers stop sending
UTILIZATION = 70  # per cent of the CPU request at which replicas are added
# Measured on the demo and on a model of 12 layers and 750 MB: a server that has opened its bundle takes 105 MB and at
# most the size of the weights file; integer matrices are packed into more bytes than the file has.
_PROCESS_BYTES, _WEIGHTS_SHARE = 160e6, 1.5
_PAUSED_SLOTS = 4  # rows that wait for their next turn, for each slot (`BatchDecoder.turn_tokens`)
_MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes that a server of a bundle takes: of its process, its weights, and a sequence of full length."""

    process: int
    weights: int
    row: int
    slots: int

    @classmethod
    def of(cls, manifest: Manifest, precision: str) -> Memory:
        """Read the sizes from the manifest."""
        caches = [
            ITEM_BYTES[spec["dtype"]] * prod(manifest.max_seq_len if size == "capacity" else size for size in shape[1:])
            for spec in manifest.contracts[precision]["windowed"]["inputs"]
            if len(shape := spec["shape"]) == 4
        ]
        weights = manifest.files[weights_path(precision)].bytes
        return cls(int(_PROCESS_BYTES), weights, sum(caches), manifest.max_batch_size)

    @property
    def kept(self) -> int:
        """States of earlier requests (`--state-bytes`): as many as run."""
        return self.slots * self.row

    @property
    def request(self) -> int:
        """What a busy server takes: every slot is full."""
        return int(self.process + _WEIGHTS_SHARE * self.weights) + self.slots * self.row + self.kept

    @property
    def limit(self) -> int:
        """What it takes at most: four sequences for each slot wait for their next turn, and caches are being moved."""
        return self.request + (_PAUSED_SLOTS + 1) * self.slots * self.row


def write(source: Source) -> str:
    """Write the manifests and what the image is built from; return the command that applies them."""
    memory = Memory.of(source.manifest, source.precision)
    tag = f"{source.values['version']}-{hash_file(source.bundle / MANIFEST)[:12]}"
    values = {
        **source.values,
        **asdict(memory),
        "command": COMMAND,
        "repository": source.name,
        "tag": tag,
        "image": f"{source.name}:{tag}",
        "container": "server",
        "threads": THREADS,
        "state_bytes": memory.kept,
        "request": -(-memory.request // _MIB),
        "limit": -(-memory.limit // _MIB),
        "weights": f"{memory.weights / 1e6:.0f}",
        "row": f"{memory.row / 1e6:.1f}",
        "paused": _PAUSED_SLOTS * memory.slots,
        "pause": PAUSE_SECONDS,
        "grace": PAUSE_SECONDS + GRACE_SECONDS,
        "utilization": UTILIZATION,
    }
    for name, container, depth in (("deployment", "server", 6), ("inferenceservice", "kserve-container", 4)):
        pod = fill(read_template("kserve/pod.yaml"), {**values, "container": container})
        indented = textwrap.indent(pod.rstrip("\n"), " " * depth)
        source.write_template(f"kserve/{name}.yaml", {**values, "pod": indented})
    for name in ("kustomization.yaml", "README.md"):
        source.write_template(f"kserve/{name}", values)
    write_image(source, "image/")
    return COMMAND
