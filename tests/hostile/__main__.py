"""`python -m hostile`: run a campaign, or one trial again. See the options; `make fuzz` calls it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from . import campaign, originals, table, worker
from .kinds import KINDS

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # for `random_models`


def main() -> int:
    """Exit code 1 where anything failed."""
    parser = argparse.ArgumentParser(
        prog="hostile", description="Hostile inputs in great number, each outcome classified."
    )
    parser.add_argument("--inputs", type=int, default=100_000, help="how many in all; each kind has its share")
    parser.add_argument("--least", type=int, default=0, help="at least so many of each kind but the smallest two")
    parser.add_argument("--kinds", default="", help="only kinds whose names contain one of these, comma-separated")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, help="JSON lines; a campaign that is found there goes on")
    parser.add_argument("--summary", type=Path, help="JSON with the numbers by kind")
    parser.add_argument("--page", type=Path, help="page whose table is replaced")
    parser.add_argument("--originals", type=Path, help="folder of the undamaged files, made if it is missing")
    parser.add_argument("--one", type=int, help="run the trial of this index of the one kind named, in this process")
    options = parser.parse_args()
    wanted = [name for name in options.kinds.split(",") if name]
    kinds = {k: v for k, v in KINDS.items() if not wanted or any(name in k for name in wanted)}
    if not kinds:
        parser.error(f"no kind contains {options.kinds!r}; there are {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="lrt-hostile-originals-") as temporary:
        folder = (options.originals or Path(temporary)).resolve()  # workers have folders of their own
        mark = folder / "made"
        if not mark.exists() or mark.read_text() != campaign.commit():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            originals.make(folder)
            mark.write_text(campaign.commit())
        if options.one is not None:
            return again(next(iter(kinds)), options.one, options.seed, folder)
        return many(kinds, options, folder)


def many(kinds: dict, options: argparse.Namespace, folder: Path) -> int:
    """Run the campaign and write what was asked for."""
    shares = sum(share for _, share in kinds.values())
    counts = {}
    for kind, (_, share) in kinds.items():
        count = round(options.inputs * share / shares)
        counts[kind] = count if share < 3 else max(count, options.least)
    run = campaign.Campaign(counts, options.seed, folder, options.results, options.workers)
    results = run.run(lambda text: print(text, file=sys.stderr, flush=True))  # noqa: T201
    order = {kind: place for place, kind in enumerate(KINDS)}
    results.sort(key=lambda result: (order[result["kind"]], result["index"]))
    found = table.summary(results, {"seed": options.seed, "commit": campaign.commit()})
    print(table.table(found))  # noqa: T201
    if options.summary:
        options.summary.write_text(json.dumps(found, indent=2) + "\n")
    if options.page:
        table.write_page(options.page, found)
    return 1 if found["failures"] else 0


def again(kind: str, index: int, seed: str, folder: Path) -> int:
    """One trial in this process, with its traceback."""
    import logging
    import traceback

    logging.disable()
    found = originals.Originals(folder)
    with tempfile.TemporaryDirectory(prefix="lrt-hostile-one-") as place:
        trial = worker.made(KINDS[kind][0], f"{seed}/{kind}/{index}", Path(place), found)
        print(f"{trial.what}\nparses: {trial.parses}\n{sorted(Path(place).rglob('*'))[:20]}")  # noqa: T201
        try:
            print(trial.act())  # noqa: T201
        except BaseException:
            traceback.print_exc()
    return 0


if __name__ == "__main__":
    sys.exit(main())
