"""Compile kernels.cu to kernels.ptx, the intermediate code that a GPU's driver finishes for its own GPU.

    python -m lrt_deploy.runtime.device_loop.make_ptx [--nvcc PATH]

Compute capability 8.0 and later run it. The compiler comes from PyPI's wheels, of one version, so that the same source
gives the same bytes; it is of CUDA 13.0, because a driver refuses code of a later CUDA than its own. Without --nvcc
the wheels are installed into build/nvcc (250 MB). The first line of the file names what it was made from.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lrt_deploy.files import atomic_write

SOURCE = Path(__file__).with_name("kernels.cu")
PTX = SOURCE.with_suffix(".ptx")
RELEASE = "V13.0.88"  # as nvcc --version says
WHEELS = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
)
FLAGS = ("-arch=compute_80", "-fmad=false")
FOLDER = Path("build/nvcc")


def source_line() -> str:
    """Return the first line of a file made from today's source."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    return f"// nvcc {RELEASE} -ptx {' '.join(FLAGS)}, of {SOURCE.name} with the SHA-256 {digest}"


def find_nvcc() -> Path | None:
    """Return a compiler of the right release: that of the wheels, or one on the path; None if there is none."""
    for found in (FOLDER / "nvidia/cu13/bin/nvcc", shutil.which("nvcc")):
        if found and Path(found).exists():
            said = subprocess.run([str(found), "--version"], capture_output=True, text=True, check=False).stdout
            if RELEASE in said:
                return Path(found).absolute()
    return None


def install_nvcc() -> Path:
    """Install the wheels and return the compiler."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER)]
    subprocess.run([*pip, *WHEELS], check=True)
    found = find_nvcc()
    assert found is not None
    return found


def compile_ptx(nvcc: Path) -> str:
    """Compile the source in a folder of its own, so that no path gets into the result."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(SOURCE, folder)
        command = [str(nvcc), "-ptx", *FLAGS, "-o", PTX.name, SOURCE.name]
        subprocess.run(command, cwd=folder, check=True)
        return f"{source_line()}\n{(Path(folder) / PTX.name).read_text()}"


def main(arguments: list[str]) -> None:
    """Write the file."""
    nvcc = Path(arguments[1]) if arguments[:1] == ["--nvcc"] else find_nvcc() or install_nvcc()
    text = compile_ptx(nvcc)
    with atomic_write(PTX) as partial:
        partial.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
