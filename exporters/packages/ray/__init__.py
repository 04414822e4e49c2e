"""The package `ray`: a Serve config file, the module with the application, and the bundle, for a cluster of Ray.

The application is that of `lrt-deploy serve --replicas`, behind Ray Serve's proxies. Contacts no cluster.
"""

from __future__ import annotations

from lrt_deploy.exporters.packages.source import Source

COMMAND = "PYTHONPATH=$PWD serve run serve_config.yaml"
THREADS = 2
_BUNDLE = "bundle/"


def write(source: Source) -> str:
    """Write the config file, the application and the bundle; return the command that runs them."""
    source.copy_bundle(_BUNDLE)
    values = {**source.values, "command": COMMAND, "threads": THREADS}
    for name in ("serve_config.yaml", "README.md"):
        source.write_template(f"ray/{name}", values)
    source.write_template("ray/application.txt", values, "lrt_app.py")
    return COMMAND
