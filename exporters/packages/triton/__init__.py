"""The package `triton`: a model repository whose one model runs the bundle by Triton's Python backend.

`model.py` and the tensors' names in `config.pbtxt` go with `runtime/serving/triton_model.py`, which is in the wheel.
Runs nothing of Triton.
"""

from __future__ import annotations

from lrt_deploy.errors import ExportError
from lrt_deploy.exporters.packages.source import Source
from lrt_deploy.exporters.packages.wheel import build_wheel

COMMAND = "tritonserver --model-repository=models"


def write(source: Source) -> str:
    """Write the repository, the wheel with its requirements, and the probe; return the command that serves it."""
    if source.manifest.tokenizer_tokens is None:
        raise ExportError(f"{source.bundle} has no tokenizer, and requests are texts; export it with --tokenizer")
    name, wheel = build_wheel()
    source.write_bytes(name, wheel)
    values = {"command": COMMAND, "wheel": name}
    for file in ("requirements.txt", "Dockerfile", "README.md"):
        source.write_template(f"triton/{file}", values)
    source.write_template("triton/probe.py.txt", values, "probe.py")
    model = f"models/{source.name}"
    source.write_template("triton/config.pbtxt", values, f"{model}/config.pbtxt")
    source.write_template("triton/model.py.txt", values, f"{model}/1/model.py")
    source.copy_bundle(f"{model}/1/bundle/")
    return COMMAND
