"""TensorRT and TensorRT-RTX: an engine of the bundle on the current GPU, with the whole state in its memory.

Decoding runs as a CUDA graph. Prompts are iterated plainly, because an engine's mask wants slots in the order of
positions (see `fixed_point`).
"""

from __future__ import annotations

import weakref
from pathlib import Path

import ml_dtypes
import numpy as np

from lrt_deploy.bundle.engine_sidecar import PREFILL
from lrt_deploy.bundle.manifest import Manifest
from lrt_deploy.bundle.precisions import base_dtype
from lrt_deploy.errors import BackendError
from lrt_deploy.gpu import find_gpu

from .base import BlockLimits
from .cuda import Arena, CudaDevice, Device
from .device_buffers import DeviceBuffers
from .device import PrefillStep, Setup
from .host_tables import HostTables
from .tensorrt_engine import Engine, open_engine


class TensorRTBackend:
    """An opened engine on a device; see `open`."""

    def __init__(
        self,
        engine: Engine,
        device: Device,
        manifest: Manifest,
        cuda_graph: bool = True,
        tables: HostTables | None = None,
    ) -> None:
        sidecar, base = engine.sidecar, base_dtype(engine.sidecar.precision, "full")
        dtype = np.dtype(ml_dtypes.bfloat16 if base == "bfloat16" else base)
        self.name, self.precision, self.capacity = sidecar.backend, sidecar.precision, manifest.max_seq_len
        self.state_dtype = dtype.name
        self.device = device
        self.setup = Setup(
            runner=engine,
            device=device,
            config=manifest.model,
            dtype=dtype,
            inputs=sidecar.inputs,
            state=sidecar.state,
            capacity=sidecar.capacity,
            chunk_tokens=sidecar.profile(PREFILL)[1].tokens[2],
            cuda_graph=cuda_graph,
            tables=tables or HostTables({}),
        )
        arena = Arena(device)
        weakref.finalize(self, arena.release).atexit = False
        self.prefill = PrefillStep(self.setup, arena)
        self.blocks = BlockLimits(self.setup.chunk_tokens, in_order=True)
        graph = "decoding as a CUDA graph" if cuda_graph else "no CUDA graph"
        self.detail = f"{sidecar.backend} {sidecar.tensorrt_version}, {sidecar.precision} engine, {graph}"

    @classmethod
    def open(
        cls, bundle: Path, manifest: Manifest, backend: str, precision: str, cuda_graph: bool = True
    ) -> TensorRTBackend:
        """Open the bundle's engine on the current GPU."""
        gpu, reason = find_gpu()
        if gpu is None:
            raise BackendError(f"{backend} needs an NVIDIA GPU: {reason}; take the backend ort-cpu")
        engine = open_engine(bundle, manifest, backend, precision, gpu)
        opened = cls(engine, CudaDevice(), manifest, cuda_graph, HostTables.open(bundle, manifest, precision))
        opened.detail += f", {gpu.name}"
        return opened

    def allocate(self, batch: int) -> DeviceBuffers:
        """Zeroed device memory for a state of this many sequences."""
        return DeviceBuffers(self.setup, self.prefill, batch, self.capacity)
