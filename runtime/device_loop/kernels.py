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
        self._functions = {name: device.function(self._module, name) for name in ("select_tokens", "advance_rows")}

    def select_tokens(self, rows: int, logits: int, vocab: int, *addresses: int) -> None:
        """Enqueue the choice of a token for each row of logits (rows, vocab) float32.

        `addresses` are those of the rules, the places (0: all rows are active), the choices, and two arrays to work in.
        """
        found = map(ctypes.c_uint64, addresses)
        self._run("select_tokens", rows, ctypes.c_uint64(logits), ctypes.c_int32(vocab), *found)

    def advance_rows(self, rows: int, *parameters: int) -> None:
        """Enqueue what follows; parameters as in kernels.cu."""
        types = [ctypes.c_int32 if index in (4, 8, 9, 11) else ctypes.c_uint64 for index in range(len(parameters))]
        self._run("advance_rows", rows, *(type_(value) for type_, value in zip(types, parameters, strict=True)))

    def _run(self, name: str, rows: int, *values: ctypes.c_uint64 | ctypes.c_int32) -> None:
        self._device.run_kernel(self._functions[name], rows, self._threads, values)
