"""Measure and render: `make bench`, `make bench BENCH=full` (more rounds), or `make bench-render`.

python -m measurements [--full] [--only NAME,NAME] [--render]
"""

from __future__ import annotations

import argparse

from . import plots, runs, tables


def main() -> None:
    """Measure unless only rendering was asked for; then render the page and its pictures."""
    parser = argparse.ArgumentParser(prog="python -m measurements", description=__doc__)
    parser.add_argument("--full", action="store_true", help="more rounds")
    parser.add_argument("--only", metavar="NAME,NAME", help=f"some of {', '.join(runs.RUNS)}")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    asked = parser.parse_args()
    names = asked.only.split(",") if asked.only else list(runs.RUNS)
    if unknown := [name for name in names if name not in runs.RUNS]:
        parser.error(f"--only has {unknown[0]!r}; expected some of {', '.join(runs.RUNS)}")
    if not asked.render:
        runs.run(names, asked.full)
    tables.write_page()
    plots.write_pictures()


if __name__ == "__main__":
    main()
