"""Kill what writes files at random moments, fill its disk, bound its files: the old or the new stays, never a half.

For each operation (export, export --force over a bundle, export --add to one, package, package --force for each
target, build, saving a state, writing to a prompt cache):

- kills: SIGKILL at a random moment of the time that it takes. Afterwards the target is whole, old or new, or it is
  absent where there was no old one, and at most one temporary file or folder lies beside it: each run has removed what
  the one before it left. A last run that is not killed leaves nothing.
- full disk: on a small tmpfs with a random number of free bytes. Where mounting is not allowed this is skipped, and the
  report says so.
- file limit: `ulimit -f` at a random size. In both the operation succeeds or raises, and leaves nothing temporary.

Each trial is a fork of this process, which has imported everything, traced the model, built the plan and read the
prompts once; these write nothing. With --whole each trial of an export or a build does them again. Prints one JSON
document; exits 1 if there was a fault.

    python benchmarks/kills.py tests/data/golden/padded_vocab --trials 100
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import lrt_deploy
from lrt_deploy.bundle.engine_sidecar import PLAN, engine_folder, read_plan, read_sidecar
from lrt_deploy.bundle.manifest import read_manifest, verify_files
from lrt_deploy.errors import LRTDeployError
from lrt_deploy.exporters.engine import build as engine_module
from lrt_deploy.exporters.graph import trace as trace_module
from lrt_deploy.exporters.packages import web
from lrt_deploy.exporters.packages.package import TARGETS, Target, package_bundle, verify_package
from lrt_deploy.runtime.prompt_cache import PromptCache
from lrt_deploy.runtime.state_file import read_file

OLD_CAPACITY, NEW_CAPACITY = 32, 64
TMPFS_BYTES = 24 * 2**20
PROMPTS = 64  # of which a prompt cache holds three at a time
SUCCEEDED, RAISED, BROKE = 0, 1, 2
TEMPORARY = (".partial-", ".retired-", ".tmp")


@dataclass(frozen=True)
class Operation:
    """Something that writes below a folder. `check` returns old, new or nothing, or raises for a half."""

    name: str
    prepare: Callable[[Path], None]  # what is there before
    run: Callable[[Path], None]
    check: Callable[[Path], str]
    bytes: int  # at most what it writes, for the full disk


def main() -> int:
    """Run all operations and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--only", nargs="*", help="names of operations; default: all")
    parser.add_argument("--only-kills", action="store_true", help="no full disk and no limit on the size of files")
    parser.add_argument("--whole", action="store_true", help="trace and build in each trial")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, report = random.Random(options.seed), dict[str, Any]()  # noqa: S311 - no secrets
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        for operation in operations(options.checkpoint, Path(folder), options.whole):
            if not options.only or operation.name in options.only:
                report[operation.name] = try_all(operation, Path(folder), options.trials, chance, options.only_kills)
    if importlib.util.find_spec("tensorrt_rtx") is None:
        report["build"] = "skipped: tensorrt-rtx is not installed"
    faults = sum(len(kind["faults"]) for found in report.values() if isinstance(found, dict) for kind in found.values())
    json.dump({"trials": options.trials, "faults": faults, **report}, sys.stdout, indent=2)
    return 1 if faults else 0


def operations(checkpoint: Path, folder: Path, whole: bool) -> Iterator[Operation]:
    """Make what all trials share, and the operations."""
    bundles = {capacity: folder / f"bundle-{capacity}" for capacity in (OLD_CAPACITY, NEW_CAPACITY)}
    if not whole:
        trace_once()
    for capacity, path in bundles.items():
        lrt_deploy.export_bundle(checkpoint, path, max_seq_len=capacity)
    size = folder_bytes(bundles[NEW_CAPACITY])
    yield Operation("export", nothing, exporting(checkpoint), check_bundle, size)
    yield Operation("export --force", copying(bundles[OLD_CAPACITY]), exporting(checkpoint), check_bundle, size)
    yield Operation("export --add", copying(bundles[OLD_CAPACITY]), adding(checkpoint), check_added(bundles), size)
    yield from package_operations(bundles, folder)
    yield from build_operation(bundles[NEW_CAPACITY], whole)
    yield from state_operations(bundles[NEW_CAPACITY])


def trace_once() -> None:
    """Trace a model of each capacity once for this process and its forks; tracing writes nothing."""
    original, traced = trace_module.trace, dict[Any, Any]()

    def trace(model: Any) -> Any:  # noqa: ANN401
        capacity = model.cos.shape
        if capacity not in traced:
            traced[capacity] = original(model)
        return traced[capacity].clone()

    trace_module.trace = trace


def nothing(folder: Path) -> None:
    """There is no old target."""


def copying(source: Path) -> Callable[[Path], None]:
    """The old target is a copy of this bundle."""
    return lambda folder: shutil.copytree(source, folder / "target", dirs_exist_ok=True) and None


def exporting(checkpoint: Path) -> Callable[[Path], None]:
    """Export, in place of what is there."""

    def run(folder: Path) -> None:
        lrt_deploy.export_bundle(checkpoint, folder / "target", max_seq_len=NEW_CAPACITY, force=True)

    return run


def check_bundle(folder: Path) -> str:
    """Whether the target is a whole bundle, and which."""
    if not os.path.lexists(folder / "target"):
        return "nothing"
    manifest = read_manifest(folder / "target")
    verify_files(folder / "target", manifest, force=True)
    return {OLD_CAPACITY: "old", NEW_CAPACITY: "new"}[manifest.max_seq_len]


def adding(checkpoint: Path) -> Callable[[Path], None]:
    """Add a precision to what is there."""
    return lambda folder: lrt_deploy.export_bundle(checkpoint, folder / "target", precision="bf16", add=True) and None


def check_added(bundles: dict[int, Path]) -> Callable[[Path], str]:
    """Whether the target is the old bundle or the one with the added precision; the old files never change."""
    old = read_manifest(bundles[OLD_CAPACITY])

    def check(folder: Path) -> str:
        manifest = read_manifest(folder / "target")
        verify_files(folder / "target", manifest, force=True)
        if not manifest.files.items() >= old.files.items():
            raise LRTDeployError("files that were there have changed")
        return {("fp32",): "old", ("fp32", "bf16"): "new"}[manifest.precisions]

    return check


def package_operations(bundles: dict[int, Path], folder: Path) -> Iterator[Operation]:
    """Package a bundle for the web where nothing is, and for each target in place of an older package."""
    assets = folder / "assets"  # in place of npm's packages, which are copied and not run
    for name in web.ASSETS:
        (assets / name).parent.mkdir(parents=True, exist_ok=True)
        (assets / name).write_bytes(bytes(100_000))

    def check(folder: Path) -> str:
        if not os.path.lexists(folder / "target"):
            return "nothing"
        verify_package(folder / "target")
        (path,) = (folder / "target").rglob("manifest.json")
        return {OLD_CAPACITY: "old", NEW_CAPACITY: "new"}[read_manifest(path.parent).max_seq_len]

    for target in TARGETS:
        packages = {capacity: folder / f"{target}-{capacity}" for capacity in bundles}
        for capacity, path in packages.items():
            package_bundle(bundles[capacity], path, target, assets=assets)

        def run(folder: Path, target: Target = target) -> None:
            package_bundle(bundles[NEW_CAPACITY], folder / "target", target, assets=assets, force=True)

        size = folder_bytes(packages[NEW_CAPACITY])
        if target == "web":
            yield Operation("package", nothing, run, check, size)
        yield Operation(f"package {target} --force", copying(packages[OLD_CAPACITY]), run, check, size)


def build_operation(bundle: Path, whole: bool) -> Iterator[Operation]:
    """Build an engine with TensorRT-RTX, where it is installed, in place of an older one."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return
    options: dict[str, Any] = {"backend": "tensorrt-rtx", "force": True}
    if not whole:
        original, built = engine_module._built, dict[str, Any]()

        def build_once(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
            if "plan" not in built:
                built["plan"] = original(*arguments, **named)
            return built["plan"]

        engine_module._built = build_once
    engine_module.build_engine(bundle, **options)
    place = engine_folder(bundle, "tensorrt-rtx", "fp32")
    old = read_sidecar(place / PLAN)

    def check(folder: Path) -> str:
        plan = engine_folder(folder / "target", "tensorrt-rtx", "fp32") / PLAN
        sidecar = read_sidecar(plan)
        read_plan(plan, sidecar)
        return "old" if sidecar == old else "new"

    def run(folder: Path) -> None:
        engine_module.build_engine(folder / "target", **options)

    yield Operation("build", copying(bundle), run, check, folder_bytes(place))
    shutil.rmtree(bundle / "engines")


def state_operations(bundle: Path) -> Iterator[Operation]:
    """Saving a state over another one, and storing prompts in a cache that is too small for them."""
    decoder = lrt_deploy.open_decoder(bundle, threads=1)
    prompts = [[first] * 60 for first in (1, 2)]
    states = [decoder.prefill([prompt]) for prompt in prompts]
    size = states[0].num_bytes + 20_000

    def check_state(folder: Path) -> str:
        return {1: "old", 2: "new"}[decoder.load_state(folder / "target").tokens[0][0]]

    yield Operation(
        "state save",
        lambda folder: states[0].save(folder / "target"),
        lambda folder: states[1].save(folder / "target"),
        check_state,
        size,
    )

    rng = np.random.default_rng(0)
    many = [rng.integers(0, decoder.config.vocab_size, 60).tolist() for _ in range(PROMPTS)]
    read = {tuple(prompt): decoder.prefill([prompt]) for prompt in many}

    def sometimes_empty(folder: Path) -> None:
        if time.monotonic_ns() % 4 == 0:  # in a full cache room has to be made, and a full disk is no obstacle
            for path in (folder / "cache").glob("*/*.state"):
                path.unlink()

    def store(folder: Path) -> None:
        prompt = many[time.monotonic_ns() % PROMPTS]
        # Read before, so that kills fall into storing.
        with patch.object(decoder, "prefill", lambda tokens, **reading: read[tuple(tokens[0])]):
            state = PromptCache(folder / "cache", max_bytes=3 * size).prefill(decoder, prompt)
        if state.prefill.note and "cache" in state.prefill.note:
            raise LRTDeployError(state.prefill.note)

    def check_cache(folder: Path) -> str:
        entries = list((folder / "cache").glob("*/*.state"))
        for path in entries:
            read_file(path)
        if sum(path.stat().st_size for path in entries) > 3 * size:
            raise LRTDeployError(f"{len(entries)} entries in a cache of three")
        return "new" if entries else "nothing"

    yield Operation("prompt cache", sometimes_empty, store, check_cache, size)


def try_all(
    operation: Operation, scratch: Path, trials: int, chance: random.Random, only_kills: bool
) -> dict[str, Any]:
    """Kills, a limit on the size of files, and a full disk; each is reported on stderr when it is done."""
    report: dict[str, Any] = {}

    def done(kind: str, found: dict[str, Any]) -> None:
        report[kind] = found
        print(f"{operation.name}: {kind}: {json.dumps(found)}", file=sys.stderr, flush=True)

    done("kills", kills(operation, fresh(scratch, operation), trials, chance))
    if only_kills:
        return report
    done("file limit", failing(operation, fresh(scratch, operation), trials, chance, file_limit))
    with small_disk(scratch / "disk") as refused:
        if refused:
            done("full disk", {"skipped": refused, "faults": []})
        else:
            done("full disk", failing(operation, scratch / "disk", trials, chance, full_disk))
    return report


def fresh(scratch: Path, operation: Operation) -> Path:
    """An empty folder."""
    return Path(tempfile.mkdtemp(prefix=f"{operation.name.replace(' ', '')}-", dir=scratch))


def kills(operation: Operation, folder: Path, trials: int, chance: random.Random) -> dict[str, Any]:
    """Kill at random moments of the time that the operation takes, until `trials` kills came before its end."""
    counts, faults, seconds = Counter[str](), list[str](), list[float]()
    for _ in range(3):
        reset(operation, folder)
        began = time.monotonic()
        if wait(fork(operation, folder)) != SUCCEEDED:
            faults.append("it does not run")
        seconds.append(time.monotonic() - began)
    longest, attempts = 1.05 * statistics.median(seconds), 0
    while counts["killed"] < trials and (attempts := attempts + 1) <= 10 * trials:
        reset(operation, folder)
        child = fork(operation, folder)
        time.sleep(chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        code = wait(child)
        killed = code == -signal.SIGKILL
        counts["killed" if killed else "over before"] += 1
        longest *= 1.03 if killed else 0.9  # how long it takes depends on what else the machine does
        left = temporary(folder)
        counts["with something left"] += bool(left)
        if code == BROKE or len(left) > 1:
            faults.append(f"exit {code}, left: {left}")
        note(operation, folder, counts, faults)
    if counts["killed"] < trials:
        faults.append("most kills came too late")
    if wait(fork(operation, folder)) != SUCCEEDED or temporary(folder):
        faults.append(f"the last run failed or left {temporary(folder)}")
    return {"seconds": round(statistics.median(seconds), 3), **counts, "faults": faults}


Obstacle = Callable[[Operation, Path, random.Random], Any]


def failing(
    operation: Operation, folder: Path, trials: int, chance: random.Random, obstacle: Obstacle
) -> dict[str, Any]:
    """Run where writing fails at a random byte."""
    counts, faults = Counter[str](), list[str]()
    for _ in range(trials):
        reset(operation, folder)
        hinder = obstacle(operation, folder, chance)
        code = wait(fork(operation, folder, hinder))
        (folder / "filler").unlink(missing_ok=True)
        counts[{SUCCEEDED: "succeeded", RAISED: "raised"}.get(code, "broke")] += 1
        if code not in (SUCCEEDED, RAISED) or temporary(folder):
            faults.append(f"exit {code}, left: {temporary(folder)}")
        note(operation, folder, counts, faults)
    return {"trials": trials, **counts, "faults": faults}


def full_disk(operation: Operation, folder: Path, chance: random.Random) -> Callable[[], None]:
    """Fill the disk up to a random number of bytes."""
    statistics_of = os.statvfs(folder)
    free = statistics_of.f_bavail * statistics_of.f_bsize
    with (folder / "filler").open("wb") as file:
        if (size := free - chance.randrange(int(1.1 * operation.bytes))) > 0:
            os.posix_fallocate(file.fileno(), 0, size)
    return lambda: None


def file_limit(operation: Operation, folder: Path, chance: random.Random) -> Callable[[], None]:
    """No file may become larger than a random size."""
    size = int(operation.bytes ** chance.uniform(0.3, 1))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@contextmanager
def small_disk(folder: Path) -> Iterator[str | None]:
    """Mount a small tmpfs; yields why it cannot be, or None."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        yield f"a tmpfs cannot be mounted here: {error.strerror}"
        return
    if done.returncode:
        yield f"a tmpfs cannot be mounted here: {done.stderr.strip()}"
        return
    try:
        yield None
    finally:
        subprocess.run(["umount", folder], check=True)


def reset(operation: Operation, folder: Path) -> None:
    """Bring back what is there before; what killed trials left stays."""
    if (folder / "target").is_dir():
        engines = list((folder / "target").glob("engines/.*"))  # left beside an engine, within the bundle
        if engines:
            return
        shutil.rmtree(folder / "target")
    operation.prepare(folder)


def fork(operation: Operation, folder: Path, hinder: Callable[[], None] | None = None) -> int:
    """Run the operation in a fork of this process; returns its number when it has begun."""
    begun, begin = os.pipe()
    child = os.fork()
    if child:
        os.close(begin)
        os.read(begun, 1)
        os.close(begun)
        return child
    code = BROKE
    try:
        os.close(begun)
        if hinder is not None:
            hinder()
        os.write(begin, b"x")
        operation.run(folder)
        code = SUCCEEDED
    except (LRTDeployError, OSError):
        code = RAISED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def note(operation: Operation, folder: Path, counts: Counter[str], faults: list[str]) -> None:
    """Count what is there after a trial."""
    try:
        counts[operation.check(folder)] += 1
    except (LRTDeployError, KeyError) as error:
        faults.append(f"a half: {error!r}")


def temporary(folder: Path) -> list[str]:
    """Temporary files and folders, without what is in them."""
    found = [path.relative_to(folder) for path in folder.rglob(".*") if any(mark in path.name for mark in TEMPORARY)]
    return [str(path) for path in found if not any(mark in str(path.parent) for mark in TEMPORARY)]


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
