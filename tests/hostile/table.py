"""Results of a campaign as numbers by kind, as a table for people, and into the page that shows it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from .trial import EQUAL, FAILURES, OTHER, REFUSED

BEGIN, END = "<!-- table of the campaign: written by `make fuzz` -->", "<!-- end of the table -->"


def summary(results: list[dict], head: dict[str, object]) -> dict[str, object]:
    """By kind: inputs, share that the first parser takes, and how many ended in each way."""
    kinds: dict[str, dict[str, object]] = {}
    for kind in dict.fromkeys(result["kind"] for result in results):
        of_kind = [result for result in results if result["kind"] == kind]
        verdicts = Counter(result["verdict"] for result in of_kind)
        kinds[kind] = {
            "inputs": len(of_kind),
            "parsed": sum(result["parses"] for result in of_kind) / len(of_kind),
            "verdicts": {name: verdicts.get(name, 0) for name in (REFUSED, EQUAL, OTHER, *FAILURES)},
            "cpu_seconds": round(sum(result["cpu_seconds"] for result in of_kind), 1),
            "longest_cpu_seconds": round(max(result["cpu_seconds"] for result in of_kind), 2),
            "most_grown_mib": round(max(result["grown_bytes"] for result in of_kind) / 2**20),
        }
    return head | {"inputs": len(results), "failures": sum(r["verdict"] in FAILURES for r in results), "kinds": kinds}


def table(found: dict) -> str:
    """Markdown."""
    names = (REFUSED, EQUAL, OTHER, *FAILURES)
    lines = [
        f"| kind | inputs | pass the first parser | {' | '.join(names)} | longest (CPU s) | most memory (MiB) |",
        f"|---|{'--:|' * (4 + len(names))}",
    ]
    totals: Counter[str] = Counter()
    parsed = 0.0
    for kind, row in found["kinds"].items():
        cells = [f"{row['verdicts'][name]:,}" for name in names]
        lines.append(
            f"| {kind} | {row['inputs']:,} | {row['parsed']:.0%} | {' | '.join(cells)} | "
            f"{row['longest_cpu_seconds']:.1f} | {row['most_grown_mib']} |"
        )
        totals.update(row["verdicts"])
        parsed += row["parsed"] * row["inputs"]
    cells = [f"**{totals[name]:,}**" for name in names]
    lines.append(
        f"| **all** | **{found['inputs']:,}** | **{parsed / max(1, found['inputs']):.0%}** | {' | '.join(cells)} | | |"
    )
    return "\n".join(lines)


def write_page(path: Path, found: dict) -> None:
    """Replace the table in the page."""
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    line = (
        f"Seed `{found['seed']}`, commit `{found['commit']}`, {found['inputs']:,} inputs, {found['failures']} failures."
    )
    path.write_text(f"{before}{BEGIN}\n\n{line}\n\n{table(found)}\n\n{END}{after}", encoding="utf-8")
