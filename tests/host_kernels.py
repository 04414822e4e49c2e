"""The GPU's kernels compiled by g++: as functions on numpy arrays, and as what `FakeDriver` runs for cuLaunchKernel."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

from lrt_deploy.runtime.device_loop.kernels import PTX

HERE = Path(__file__).parent
FLAGS = ("-O2", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas")
MISSING = "g++ is not installed" if shutil.which("g++") is None else None


def compile_kernels(folder, source=None):
    """Compile them into a library; `source` is the text of other kernels."""
    includes = [f"-I{HERE}", f"-I{PTX.parent}"]
    if source is not None:
        (folder / "kernels.cu").write_text(source)
        includes.insert(0, f"-I{folder}")
    made = folder / "kernels.so"
    subprocess.run(["g++", *FLAGS, *includes, "-o", made, HERE / "kernels_on_host.cpp"], check=True)
    return made


class HostKernels:
    """A library's functions, with the sizes of their parameters as the PTX declares them."""

    def __init__(self, library, threads=None):
        self.library, self.threads = ctypes.CDLL(str(library)), threads  # another number than was asked for
        self.parameters = {}
        for name, found in re.findall(r"\.entry (\w+)\((.*?)\)", PTX.read_text(), re.DOTALL):
            self.parameters[name] = [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", found)]

    def load(self, data):
        """Take the shipped PTX and nothing else."""
        return data == PTX.read_bytes() + b"\0"

    def bind(self, name, places):
        """Read parameters as cuLaunchKernel does, at once: those of 8 bytes, which are addresses, and all of them."""
        sizes = self.parameters[name]
        pointers = (ctypes.c_void_p * len(sizes)).from_address(places)
        values = [ctypes.create_string_buffer(ctypes.string_at(p, n), n) for p, n in zip(pointers, sizes, strict=True)]
        addresses = [int.from_bytes(value.raw, "little") for value in values if len(value) == 8]
        return addresses, values

    def run(self, name, blocks, threads, values, seed=0):
        places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        self.library[f"run_{name}"](blocks, self.threads or threads, seed, places)

    def call(self, name, blocks, threads, values, seed=0):
        """Run a kernel on numpy arrays and numbers of ctypes."""
        plain = [ctypes.c_void_p(v.ctypes.data) if hasattr(v, "ctypes") else v for v in values]
        self.run(name, blocks, threads, plain, seed)
