"""Where `parity --report` puts things: a page, its picture and its numbers, in the bundle's `reports/` or elsewhere.

Runs of other precisions on the same prompt that lie in the folder stand beside the new one in its page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrt_deploy import extras
from lrt_deploy.bundle.precisions import PRECISIONS

from . import output


def write_reports(folder: Path, bundle: str, fields: Mapping[str, Any]) -> Path:
    """Write `parity-BACKEND-PRECISION` as .json, .html and, where matplotlib is installed, .png; returns the page."""
    from lrt_deploy import figures
    from lrt_deploy.evaluation import plots
    from lrt_deploy.evaluation.html import page
    from lrt_deploy.files import atomic_write

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = f"parity-{fields['backend']}-{fields['precision']}"
    title = f"Parity of {bundle}: {fields['backend']}, {fields['precision']}"
    with atomic_write(folder / f"{name}.json", private=True) as path:
        path.write_text(json.dumps(fields) + "\n", encoding="utf-8")
    others = comparable(folder, fields)
    with atomic_write(folder / f"{name}.html", private=True) as path:
        path.write_text(page(title, fields, others), encoding="utf-8")
    if not fields["positions"]["position"]:  # stored weights alone were judged
        return folder / f"{name}.html"
    if not figures.available():
        output.say(f"no pictures beside the page: matplotlib is not installed; {extras.install('bench')}")
        return folder / f"{name}.html"
    plots.plot_parity(folder / f"{name}.png", fields, title)
    if len(others) > 1:
        plots.plot_precisions(folder / "parity-precisions.png", others, f"Parity of {bundle} by precision")
    return folder / f"{name}.html"


def comparable(folder: Path, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stored runs over the same prompt and as many steps, from the most precise on."""
    found = []
    for path in sorted(folder.glob("parity-*.json")):
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
            same = all(other[name] == fields[name] for name in ("prompt_tokens", "steps"))
            prompt = fields["prompt_tokens"]
            same = same and bool(other["positions"]["position"])  # something was run
            if same and other["tokens"][:prompt] == fields["tokens"][:prompt] and other["precision"] in PRECISIONS:
                found.append(other)
        except (ValueError, KeyError, TypeError):
            output.say(f"{path} is not a report of this version and was left out")
    return sorted(found, key=lambda other: (PRECISIONS.index(other["precision"]), other["backend"]))
