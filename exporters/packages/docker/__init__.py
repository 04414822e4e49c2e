"""The package `docker`: an image of lrt-deploy's HTTP server for the bundle, and a compose file that runs it.

The image installs pinned packages and the wheel of the lrt-deploy that made the package. Nothing is built or pulled
here. `write_image` writes what an image is built from; the package for Kubernetes has the same image.
"""

from __future__ import annotations

from lrt_deploy.exporters.packages.source import Source
from lrt_deploy.exporters.packages.wheel import build_wheel

COMMAND = "docker compose up --build"
GRACE_SECONDS = 60  # from SIGTERM to SIGKILL: more than `serve --drain-seconds` and the closing of connections
# Where the packages of requirements-gpu.txt have their libraries, in the base image's Python.
_LIBRARIES = ":".join(f"/usr/local/lib/python3.11/site-packages/nvidia/{name}/lib" for name in ("cu13", "cudnn"))


def write(source: Source) -> str:
    """Write what the image is built from, and the compose file; return the command that starts it."""
    write_image(source, "")
    source.write_template("docker/compose.yaml", {"grace": GRACE_SECONDS})
    source.write_template("docker/README.md", {"command": COMMAND})
    return COMMAND


def write_image(source: Source, folder: str) -> None:
    """Write the Dockerfile, the requirements, the wheel and the bundle below `folder`: empty, or ends with a slash."""
    name, wheel = build_wheel()
    source.write_bytes(f"{folder}{name}", wheel)
    for variant in ("cpu", "gpu"):
        file = f"requirements-{variant}.txt"
        source.write_template(f"docker/{file}", {}, f"{folder}{file}")
    source.write_template("docker/Dockerfile", {"wheel": name, "libraries": _LIBRARIES}, f"{folder}Dockerfile")
    source.copy_bundle(f"{folder}bundle/")
