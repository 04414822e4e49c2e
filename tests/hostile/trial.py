"""One trial: a hostile input, what may come of it, and what came of it.

A trial is a failure when anything else happens than a refusal that names the thing, the numbers of the undamaged
original, or another valid thing that gives exactly what it says.
"""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

REFUSED, EQUAL, OTHER = "refused", "equal", "accepted other"
UNNAMED, TRACEBACK, INTERNAL = "refused without a name", "traceback", "internal error"
CRASH, HANG, MEMORY, WRONG, LEFT = "crash", "hang", "out of memory", "wrong tokens", "file left"
FINE = (REFUSED, EQUAL, OTHER)
FAILURES = (UNNAMED, TRACEBACK, INTERNAL, CRASH, HANG, MEMORY, WRONG, LEFT)

LONGEST_MESSAGE = 3000
SLOW_CPU_SECONDS = 10.0
GROWTH_BYTES = 400 * 2**20  # beyond what a process holds before a trial; the inputs have a few kilobytes


@dataclass
class Trial:
    """`act` gives the input to the package and says EQUAL, OTHER or WRONG, with a detail, or raises.

    `parses`: whether the first parser (zip, JSON, protobuf, pickle opcodes, safetensors header) takes the input.
    `names`: a refusal must contain one of them. `writes`: files in the trial's folder that may appear, by name.
    """

    what: str
    parses: bool
    act: Callable[[], tuple[str, str]]
    names: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    cache_may_be_written: bool = True


@dataclass
class Result:
    """What came of a trial."""

    verdict: str
    detail: str
    parses: bool
    what: str
    cpu_seconds: float = 0.0
    grown_bytes: int = 0
    extra: dict[str, object] = field(default_factory=dict)


class InternalError(Exception):
    """The command line said that something broke inside, or died."""


def run(trial: Trial, place: Path, watched: tuple[Path, ...]) -> Result:
    """Run a trial whose files lie in `place`; nothing may appear in the `watched` folders."""
    from lrt_deploy.errors import LRTDeployError

    before, outside = _listing(place), [_listing(folder) for folder in watched]
    baseline = _reset_peak()
    started = time.process_time()
    try:
        verdict, detail = trial.act()
    except LRTDeployError as error:
        verdict, detail = _judge_refusal(error, trial)
    except MemoryError as error:
        verdict, detail = MEMORY, _where(error)
    except InternalError as error:
        verdict, detail = INTERNAL, str(error)[-600:]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # panics of Rust libraries are no Exceptions
        verdict, detail = TRACEBACK, _where(error)
    cpu = time.process_time() - started
    grown = _peak() - baseline
    if verdict in FINE and grown > GROWTH_BYTES:
        verdict, detail = MEMORY, f"took {grown / 2**20:.0f} MiB; {verdict}: {detail}"
    if verdict in FINE and cpu > SLOW_CPU_SECONDS:
        verdict, detail = HANG, f"took {cpu:.1f} s; {verdict}: {detail}"
    left = _listing(place) - before - set(trial.writes)
    for folder, found in zip(watched, outside, strict=True):
        left |= {f"{folder.name}/{name}" for name in _listing(folder) - found}
    left = {name for name in left if not _is_known(name, trial)}
    if verdict in FINE and left:
        verdict, detail = LEFT, f"{sorted(left)[:4]} after {verdict}: {detail}"
    return Result(verdict, detail, trial.parses, trial.what[:300], cpu, grown)


def _judge_refusal(error: Exception, trial: Trial) -> tuple[str, str]:
    text = str(error)
    if not 10 <= len(text) <= LONGEST_MESSAGE:
        return UNNAMED, f"{type(error).__name__} of {len(text)} characters: {text[:200]}"
    if trial.names and not any(name in text for name in trial.names):
        return UNNAMED, f"{type(error).__name__} names none of {trial.names}: {text[:300]}"
    if re.search(r"something broke|Traceback \(most recent", text):
        return INTERNAL, text[:300]
    return REFUSED, f"{type(error).__name__}: {text[:200]}"


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    return f"{type(error).__name__}: {str(error)[:300]} [{places}]"


def _is_known(name: str, trial: Trial) -> bool:
    """The memory of hashes is the one file that an opening may write outside; and what a trial names as a folder."""
    known = {"cache/lrt-deploy", "cache/lrt-deploy/verified.json"}
    if trial.cache_may_be_written and name in known:
        return True
    return any(name.startswith(f"{folder}/") for folder in trial.writes)


def _listing(folder: Path) -> set[str]:
    found: set[str] = set()
    pending = [(str(folder), "")]
    while pending:
        path, prefix = pending.pop()
        try:
            entries = list(os.scandir(path))
        except OSError:
            continue
        for entry in entries:
            found.add(prefix + entry.name)
            if entry.is_dir(follow_symlinks=False):
                pending.append((entry.path, f"{prefix}{entry.name}/"))
    return found


def _reset_peak() -> int:
    """Set the peak of the resident memory back to what it is now, and return it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _peak()


def _peak() -> int:
    try:
        lines = Path("/proc/self/status").read_bytes().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(b"VmHWM")), 0)


def command(*arguments: str, stdin: str | None = None) -> tuple[int, str]:
    """Run a verb of the command line in this process; its exit code and stdout. Raises for what must not happen."""
    from typer.testing import CliRunner

    from lrt_deploy.cli.app import app
    from lrt_deploy.errors import LRTDeployError

    result = CliRunner().invoke(app, list(arguments), input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    text = result.stderr + result.stdout
    if "something broke inside" in text or result.exit_code not in (0, 1, 2):
        raise InternalError(f"exit code {result.exit_code}: {text}")
    if "out of memory" in text:
        raise MemoryError(text)
    if result.exit_code != 2 and "--json" in arguments:
        json.loads(result.stdout)  # one document and nothing else, of an error too
    if result.exit_code:
        raise LRTDeployError(text.strip())
    return result.exit_code, result.stdout
