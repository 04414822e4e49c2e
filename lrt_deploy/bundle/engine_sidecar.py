"""The sidecar of an engine: everything that must be known of a plan before it may be used, as JSON beside it.

    bundle/engines/<backend>-<precision>/
      lrt.plan         the engine; only this version of TensorRT, on this kind of GPU, can read it
      lrt.plan.json    the sidecar
      lrt.runtime-cache  kernels that TensorRT-RTX has compiled from the plan; written when it is first run

A plan does not say what it was made from, so the runtime refuses one whose sidecar does not fit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
from msgspec import Meta, Struct

from lrt_deploy.errors import EngineError
from lrt_deploy.fields import Size, Whole, convert, raised_as, shown
from lrt_deploy.files import atomic_write, open_regular, read_json

SIDECAR_FORMAT = 1
_LARGEST_SIDECAR_BYTES = 16 * 2**20  # a model with 100 layers has about 0.1 MB
ENGINES, PLAN, RUNTIME_CACHE = "engines", "lrt.plan", "lrt.runtime-cache"
DECODE, PREFILL = "decode", "prefill"

# A row of a cache must start on TensorRT's boundary of 256 bytes, so that one row can be bound alone. 128 slots of at
# least two numbers of two bytes always end there.
_SLOTS = 128

Range = tuple[Whole, Whole, Whole]  # smallest, typical, largest
_GPU = Annotated[str, Meta(pattern=r"^[0-9]{1,3}\.[0-9]{1,3}\+?\Z")]


class Profile(Struct, frozen=True, forbid_unknown_fields=True):
    """One optimization profile: the shapes that the plan may be run with, by symbolic dimension."""

    name: str
    batch: Range
    tokens: Range

    def __post_init__(self) -> None:
        for smallest, typical, largest in (self.batch, self.tokens):
            if not 1 <= smallest <= typical <= largest:
                raise ValueError(f"the profile {shown(self.name)} spans {smallest}, {typical}, {largest}")


class _Tensor(Struct):
    name: str
    dtype: str
    shape: list[Any]


class _Pair(Struct):
    past: str
    present: str
    in_place: bool


class _Kernels(Struct):
    kernels: Whole
    faults: list[str] = []


class _Layers(Struct):
    kernels: dict[str, _Kernels] = {}
    matmul: dict[str, Whole] = {}
    norms: dict[str, Whole] = {}


class _Build(Struct):
    memory: dict[str, tuple[Whole, ...]] = {}
    peak_host_bytes: Whole | None = None


class EngineSidecar(Struct, frozen=True, forbid_unknown_fields=True):
    """The source, the purpose and the building of a plan.

    `capacity` is the number of cache slots, fixed in the plan; `max_seq_len` how many of them a sequence may use.
    `compute_capabilities` name GPUs: `8.9` is that one, `8.0+` that and all later ones. `layers` counts the layers of
    the network and the plan, `build` has the resources and messages of building, `smoke` whether and how the plan was
    run.
    """

    backend: str
    precision: str
    plan_sha256: str
    plan_bytes: Size
    onnx: str
    onnx_sha256: str
    weights_sha256: str
    tensorrt_version: str
    compute_capabilities: tuple[_GPU, ...]
    profiles: tuple[Profile, ...]
    flags: tuple[str, ...]
    capacity: Size
    max_seq_len: Size
    max_batch_size: Size
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    state: tuple[dict[str, Any], ...]
    layers: dict[str, Any]
    build: dict[str, Any]
    smoke: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if self.capacity < self.max_seq_len:
            raise ValueError(f"capacity is {self.capacity}, less than max_seq_len ({self.max_seq_len})")

    def profile(self, name: str) -> tuple[int, Profile]:
        """Return index and shapes of a profile."""
        names = [profile.name for profile in self.profiles]
        if name not in names:
            raise EngineError(f"the engine has no profile {name!r}; it has {', '.join(names)}")
        return names.index(name), self.profiles[names.index(name)]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return {"format_version": SIDECAR_FORMAT} | fields


def cache_capacity(max_seq_len: int) -> int:
    """Return the cache slots on a GPU for `max_seq_len` tokens; slots beyond these are masked and never written."""
    return -(-max_seq_len // _SLOTS) * _SLOTS


def engine_folder(bundle: Path, backend: str, precision: str) -> Path:
    """Return the folder of the engine of a backend and precision."""
    return bundle / ENGINES / f"{backend}-{precision}"


def sidecar_path(plan: Path) -> Path:
    """Return the path of a plan's sidecar."""
    return plan.with_name(f"{plan.name}.json")


def build_command(bundle: Path, backend: str, precision: str) -> str:
    """Return the command that builds an engine, or builds it again."""
    return f"lrt-deploy build {bundle} --backend {backend} --precision {precision} --force"


def write_sidecar(plan: Path, sidecar: EngineSidecar) -> None:
    """Write the sidecar of a plan; an interrupted write leaves the old one."""
    with atomic_write(sidecar_path(plan)) as partial:
        partial.write_text(json.dumps(sidecar.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_sidecar(plan: Path) -> EngineSidecar:
    """Read and check a plan's sidecar; raises EngineError if it is missing, damaged or of another format."""
    path = sidecar_path(plan)
    if not os.path.lexists(path):
        raise EngineError(
            f"{plan} has no sidecar ({path.name}), so it is unknown what it was made from; "
            "build the engine again with `lrt-deploy build --force`"
        )
    fields = read_json(path, "the sidecar", EngineError, _LARGEST_SIDECAR_BYTES)
    if not isinstance(fields, dict) or fields.pop("format_version", None) != SIDECAR_FORMAT:
        raise EngineError(f"{path} is not a sidecar of format {SIDECAR_FORMAT}; build the engine again")
    with raised_as(EngineError, f"{path} is damaged (", "); build the engine again"):
        sidecar = convert(EngineSidecar, fields)
        for kind, name in ((_Tensor, "inputs"), (_Tensor, "outputs"), (_Pair, "state")):
            convert(list[kind], fields[name], name)  # type: ignore[valid-type]
        convert(_Layers, sidecar.layers, "layers")
        convert(_Build, sidecar.build, "build")
        return sidecar


def check_plan(plan: Path, sidecar: EngineSidecar) -> None:
    """Raise EngineError if the plan is missing or has not the size that its sidecar says."""
    _open_plan(plan, sidecar).close()


def read_plan(plan: Path, sidecar: EngineSidecar) -> bytes:
    """Read the plan's bytes once; raises EngineError if they are not those that its sidecar describes."""
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


def runs_on(compute_capabilities: Sequence[str], found: tuple[int, int]) -> bool:
    """Return whether a GPU of this compute capability is among those that a plan names."""
    for named in compute_capabilities:
        major, _, minor = named.rstrip("+").partition(".")
        wanted = (int(major), int(minor))
        if found == wanted or (named.endswith("+") and found >= wanted):
            return True
    return False
