"""The kernels of kernels.cu on a GPU: loaded from the PTX beside it, and launched on the device's stream."""

from __future__ import annotations

import ctypes
from pathlib import Path

from lrt_deploy.errors import BackendError
from lrt_deploy.files import read_bytes
from lrt_deploy.runtime.backends.cuda import CudaDevice

PTX = Path(__file__).with_name("kernels.ptx")
THREADS = 1024  # of a block; no result depends on it
_LARGEST_PTX = 2**24  # bytes


class Kernels:
    """The functions of kernels.cu, for one device. To be used with the device's lock held."""

    def __init__(self, device: CudaDevice, threads: int = THREADS) -> None:
        self._device, self._threads = device, threads
        self._module = device.load(read_bytes(PTX, "the kernels", BackendError, _LARGEST_PTX))
        self._select = device.function(self._module, "select_tokens")

    def select_tokens(self, rows: int, vocab: int, logits: int, addresses: tuple[int, int, int, int]) -> None:
        """Enqueue the choice of a token for each row of logits (rows, vocab) float32.

        `addresses` are those of the rules, the choices and two arrays to work in; see `selection.Selection`.
        """
        rules, choices, scores, weights = map(ctypes.c_uint64, addresses)
        values = (ctypes.c_uint64(logits), ctypes.c_int32(vocab), rules, choices, scores, weights)
        self._device.run_kernel(self._select, rows, self._threads, values)
