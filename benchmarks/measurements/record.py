"""JSON files of docs/measurements: figures with the date, the machine, the versions and the commands they come from."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrt_deploy.machine import cpu_model, versions

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "measurements"
PACKAGES = ("lrt-deploy", "numpy", "onnxruntime", "torch")


@dataclass(frozen=True)
class Start:
    """When and under what load a measurement began."""

    date: str
    load: float

    @classmethod
    def now(cls) -> Start:
        """Return today and the load of the last minute."""
        return cls(datetime.datetime.now(datetime.UTC).date().isoformat(), os.getloadavg()[0])


def write(name: str, mode: str, start: Start, commands: list[str], results: dict[str, Any]) -> Path:
    """Write the document of one measurement, whose last command has just ended."""
    found = versions()
    document = {
        "name": name,
        "mode": mode,
        "date": start.date,
        "processor": cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: found[package] for package in PACKAGES},
        "load_average": {"start": round(start.load, 2), "end": round(os.getloadavg()[0], 2)},
        "revision": revision(),
        "commands": commands,
        "results": results,
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(rounded(document), indent=1) + "\n", encoding="utf-8")
    return path


def read(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """Return all documents of a folder by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def revision() -> str:
    """Return the commit that is checked out, with a mark where files differ from it; unknown outside of a clone."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=8"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def rounded(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return the value with all floating-point numbers in five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value
