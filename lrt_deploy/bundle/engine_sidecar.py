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
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lrt_deploy.errors import EngineError
from lrt_deploy.fields import decode, decode_as, shown
from lrt_deploy.files import atomic_write, open_regular, read_json

SIDECAR_FORMAT = 1
_LARGEST_SIDECAR_BYTES = 16 * 2**20  # a model with 100 layers has about 0.1 MB
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
    if not os.path.lexists(path):
        raise EngineError(
            f"{plan} has no sidecar ({path.name}), so it is unknown what it was made from; "
            "build the engine again with `lrt-deploy build --force`"
        )
    fields = read_json(path, "the sidecar", EngineError, _LARGEST_SIDECAR_BYTES)
    if not isinstance(fields, dict) or fields.pop("format_version", None) != SIDECAR_FORMAT:
        raise EngineError(f"{path} is not a sidecar of format {SIDECAR_FORMAT}; build the engine again")
    try:
        sidecar = decode(EngineSidecar, fields)
        _check(sidecar)
    except ValueError as error:
        raise EngineError(f"{path} is damaged ({error}); build the engine again") from error
    return sidecar


def check_plan(plan: Path, sidecar: EngineSidecar) -> None:
    """The plan must be there and as long as its sidecar says; EngineError for one that is missing or cut."""
    _open_plan(plan, sidecar).close()


def read_plan(plan: Path, sidecar: EngineSidecar) -> bytes:
    """The plan's bytes, read once and hashed; EngineError for one that is not the one its sidecar describes."""
    with _open_plan(plan, sidecar) as file:
        data = file.read(sidecar.plan_bytes + 1)
    if hashlib.sha256(data).hexdigest() != sidecar.plan_sha256:
        raise EngineError(
            f"{plan} does not match its sidecar's SHA-256: it was altered or is another plan; "
            "build the engine again with --force"
        )
    return data


def _open_plan(plan: Path, sidecar: EngineSidecar) -> BinaryIO:
    file = open_regular(plan, "the engine's plan", EngineError)
    if (size := os.fstat(file.fileno()).st_size) != sidecar.plan_bytes:
        file.close()
        raise EngineError(
            f"{plan} has {size} bytes, its sidecar says {sidecar.plan_bytes}: truncated or altered; "
            "build the engine again with --force"
        )
    return file


def _check(sidecar: EngineSidecar) -> None:
    """Refuse by ValueError what later code relies on beyond the types."""
    if sidecar.plan_bytes < 1 or sidecar.max_seq_len < 1 or sidecar.max_batch_size < 1:
        raise ValueError("plan_bytes, max_seq_len and max_batch_size are not all 1 or more")
    if sidecar.capacity < sidecar.max_seq_len:
        raise ValueError(f"capacity is {sidecar.capacity}, less than max_seq_len ({sidecar.max_seq_len})")
    for named in sidecar.compute_capabilities:
        if not re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}\+?", named):
            raise ValueError(f"compute_capabilities has {shown(named)}, expected as in 8.9 or 8.0+")
    for profile in sidecar.profiles:
        for smallest, typical, largest in (profile.batch, profile.tokens):
            if not 1 <= smallest <= typical <= largest:
                raise ValueError(f"the profile {shown(profile.name)} spans {smallest}, {typical}, {largest}")
    for counts in ("matmul", "norms"):
        decode_as(dict[str, int], sidecar.layers.get(counts, {}), f"layers.{counts}")
    decode_as(dict[str, tuple[int, ...]], sidecar.build.get("memory", {}), "build.memory")
    decode_as(int | None, sidecar.build.get("peak_host_bytes"), "build.peak_host_bytes")
    tensor, pair = {"name": str, "dtype": str, "shape": list}, {"past": str, "present": str, "in_place": bool}
    for field_name, kinds in (("inputs", tensor), ("outputs", tensor), ("state", pair)):
        for index, entry in enumerate(getattr(sidecar, field_name)):
            for key, kind in kinds.items():
                if not isinstance(entry.get(key), kind):
                    name = f"{field_name}[{index}].{key}"
                    raise ValueError(f"{name} is {shown(entry.get(key))}, expected {kind.__name__}")


def runs_on(compute_capabilities: Sequence[str], found: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability is among those that a plan names."""
    for named in compute_capabilities:
        major, _, minor = named.rstrip("+").partition(".")
        wanted = (int(major), int(minor))
        if found == wanted or (named.endswith("+") and found >= wanted):
            return True
    return False
