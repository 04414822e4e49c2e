"""The sidecar of an engine: everything that must be known of a plan before it may be used, as JSON beside it.

    bundle/engines/<backend>-<precision>/
      lrt.plan         what TensorRT built; only this TensorRT, on this kind of GPU, can read it
      lrt.plan.json    the sidecar

A plan cannot be asked what it was made from, and without a GPU not even whether it is whole. So exporters write down
here what they built, and the runtime refuses a plan whose sidecar does not fit. Knows no TensorRT.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import EngineError
from .files import atomic_write

SIDECAR_FORMAT = 1
ENGINES, PLAN = "engines", "lrt.plan"
DECODE, PREFILL = "decode", "prefill"

# A row of a cache must start on TensorRT's boundary of 256 bytes, so that one row can be bound alone. 128 slots of at
# least two numbers of two bytes always end there.
_SLOTS = 128

Range = tuple[int, int, int]  # smallest, typical, largest


@dataclass(frozen=True)
class Profile:
    """One optimization profile: the shapes that the plan may be run with, by symbolic dimension."""

    name: str
    batch: Range
    tokens: Range


@dataclass(frozen=True)
class EngineSidecar:
    """What a plan was made from, for what, and how.

    `capacity` is the number of cache slots, fixed in the plan; `max_seq_len` how many of them a sequence may use.
    `compute_capabilities` name GPUs: `8.9` is that one, `8.0+` that and all later ones. `layers` is what the proof
    counted in the network before it was built, `build` what building took and said, `smoke` whether and how the plan
    was run afterwards.
    """

    backend: str
    precision: str
    plan_sha256: str
    plan_bytes: int
    onnx: str
    onnx_sha256: str
    weights_sha256: str
    tensorrt_version: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    flags: tuple[str, ...]
    capacity: int
    max_seq_len: int
    max_batch_size: int
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    state: tuple[dict[str, Any], ...]
    layers: dict[str, Any]
    build: dict[str, Any]
    smoke: dict[str, Any] = field(default_factory=dict)

    def profile(self, name: str) -> tuple[int, Profile]:
        """Index and shapes of a profile."""
        for index, profile in enumerate(self.profiles):
            if profile.name == name:
                return index, profile
        raise EngineError(f"the engine has no profile {name!r}; it has {', '.join(p.name for p in self.profiles)}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"format_version": SIDECAR_FORMAT} | dataclasses.asdict(self)


def cache_capacity(max_seq_len: int) -> int:
    """Cache slots on a GPU for sequences of up to `max_seq_len` tokens; those beyond are masked and never written."""
    return -(-max_seq_len // _SLOTS) * _SLOTS


def engine_folder(bundle: Path, backend: str, precision: str) -> Path:
    """Where the engine of a backend and precision lies."""
    return bundle / ENGINES / f"{backend}-{precision}"


def sidecar_path(plan: Path) -> Path:
    """The sidecar of a plan."""
    return plan.with_name(f"{plan.name}.json")


def build_command(bundle: Path, backend: str, precision: str) -> str:
    """The command that makes an engine, or makes it again."""
    return f"lrt-deploy build {bundle} --backend {backend} --precision {precision} --force"


def write_sidecar(plan: Path, sidecar: EngineSidecar) -> None:
    """Write it in one step, so that it is whole or the old one."""
    text = json.dumps(sidecar.to_dict(), indent=2, ensure_ascii=False) + "\n"
    with atomic_write(sidecar_path(plan)) as partial:
        partial.write_text(text, encoding="utf-8")


def read_sidecar(plan: Path) -> EngineSidecar:
    """The sidecar of a plan, its types checked; EngineError for one that is missing, damaged or of another format."""
    path = sidecar_path(plan)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EngineError(
            f"{plan} has no sidecar ({path.name}: {error.strerror}), so nobody can say what it was made from; "
            "build the engine again with `lrt-deploy build --force`"
        ) from error
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path} is damaged ({error}); build the engine again") from error
    if not isinstance(fields, dict) or fields.pop("format_version", None) != SIDECAR_FORMAT:
        raise EngineError(f"{path} is not a sidecar of format {SIDECAR_FORMAT}; build the engine again")
    try:
        return _parse(fields)
    except (TypeError, ValueError, KeyError) as error:
        raise EngineError(f"{path} is damaged ({error}); build the engine again") from error


def check_plan(plan: Path, sidecar: EngineSidecar) -> None:
    """The plan must be there and as long as its sidecar says; EngineError for one that is missing or cut."""
    try:
        size = plan.stat().st_size
    except OSError as error:
        raise EngineError(f"cannot read {plan}: {error.strerror}; build the engine again") from error
    if size != sidecar.plan_bytes:
        raise EngineError(
            f"{plan} has {size} bytes, its sidecar says {sidecar.plan_bytes}: truncated or altered; "
            "build the engine again with --force"
        )


def read_plan(plan: Path, sidecar: EngineSidecar) -> bytes:
    """The plan's bytes, read once and hashed; EngineError for one that is not the one its sidecar describes."""
    check_plan(plan, sidecar)
    data = plan.read_bytes()
    if hashlib.sha256(data).hexdigest() != sidecar.plan_sha256:
        raise EngineError(
            f"{plan} does not match its sidecar's SHA-256: it was altered or is another plan; "
            "build the engine again with --force"
        )
    return data


def _parse(fields: Mapping[str, Any]) -> EngineSidecar:
    """Hold every field against the type that the class declares, in its outlines."""
    kinds = {"str": str, "int": int, "dict[str, Any]": dict}
    known = {f.name: str(f.type) for f in dataclasses.fields(EngineSidecar)}
    if set(fields) != set(known):
        raise ValueError(f"it has {', '.join(sorted(set(fields) ^ set(known)))} too many or too few")
    values: dict[str, Any] = {}
    for name, declared in known.items():
        value = fields[name]
        if not isinstance(value, kinds.get(declared, list)) or isinstance(value, bool):
            raise ValueError(f"{name} is {str(value)[:60]}")
        values[name] = tuple(value) if isinstance(value, list) else value
    values["profiles"] = tuple(_profile(entry) for entry in values["profiles"])
    return EngineSidecar(**values)


def _profile(entry: Mapping[str, Any]) -> Profile:
    return Profile(str(entry["name"]), _range(entry["batch"]), _range(entry["tokens"]))


def _range(values: Sequence[Any]) -> Range:
    smallest, typical, largest = (int(value) for value in values)
    if not 1 <= smallest <= typical <= largest:
        raise ValueError(f"a profile spans {smallest}, {typical}, {largest}")
    return smallest, typical, largest


def runs_on(compute_capabilities: Sequence[str], found: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability is among those that a plan names."""
    for named in compute_capabilities:
        major, _, minor = named.rstrip("+").partition(".")
        wanted = (int(major), int(minor))
        if found == wanted or (named.endswith("+") and found >= wanted):
            return True
    return False
