"""Read the fused layers of a plan from what TensorRT says while it builds: what runs, and with which tensors.

A plan cannot be inspected without a GPU, but with detailed profiling verbosity a build prints every layer of it. One
layer is one kernel, so their number is the latency of a decode step, and their inputs and outputs show what no network
shows: whether attention is one kernel that reads the caches themselves, whether a cache is copied, and whether
quantized weights are dequantized inside their product. TensorRT-RTX 1.7.1 prints the list; where there is none, nothing
is found and nothing is said. Knows neither plans nor networks: see `verify`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.weights import matrix_shapes
from lrt_deploy.config import LRTConfig

_LAYER = re.compile(r"Name: (?=\S+, LayerType: )")
_HEAD = re.compile(r"(\S+), LayerType: (\w+), Inputs: (.*), Constants: (.*), Outputs: (.*), TacticName: ")
_TENSOR = re.compile(r"Name: (\S+), Dimensions: \[([-\d,]*)\][^}]*Datatype: (\w+)")
_PROFILE = re.compile(r"_myl(\d+)_\d+$")
_NO_KERNEL = "shape_call"  # computed on the host
_ATTENTION = "_mha_"  # in the name of a fused attention
_FLOATS = {"Float", "Half", "BFloat16"}


@dataclass(frozen=True)
class Tensor:
    """An input or output of a layer; a free dimension is -1."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as TensorRT prints it: Half, Float, Bool


@dataclass(frozen=True)
class FusedLayer:
    """One layer of a plan, for one of its profiles."""

    name: str
    kind: str
    profile: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def parse_layers(text: str) -> list[FusedLayer]:
    """Return the layers that a message of the build lists, none where it lists none."""
    layers = []
    for part in _LAYER.split(text)[1:]:
        if head := _HEAD.match(part):
            name, kind, inputs, _, outputs = head.groups()
            profile = _PROFILE.search(name)
            layers.append(
                FusedLayer(name, kind, int(profile[1]) if profile else 0, _tensors(inputs), _tensors(outputs))
            )
    return layers


def summarize(layers: Sequence[FusedLayer], config: LRTConfig, profiles: Sequence[str]) -> dict[str, Any]:
    """Return, by profile, the number of kernels and attentions, and the attentions that read the caches themselves.

    `faults` lists what costs time and changes no number: attention in more than one kernel, copies of a cache, weights
    that are dequantized into memory. Empty where the build listed no layers.
    """
    if not layers:
        return {}
    found: dict[str, Any] = {}
    for index, profile in enumerate(profiles):
        kernels = [layer for layer in layers if layer.profile == index and layer.kind != _NO_KERNEL]
        found[profile] = {
            "kernels": len(kernels),
            "attentions": sum(_ATTENTION in kernel.name for kernel in kernels),
            "attentions_on_caches": sum(_reads_caches(kernels, layer) for layer in range(config.n_layer)),
            "kinds": dict(Counter(layer.kind for layer in kernels)),
            "faults": list(_faults(kernels, config, _cache_slots(layers))),
        }
    return found


def _reads_caches(kernels: Sequence[FusedLayer], layer: int) -> bool:
    """Whether one attention kernel reads the caches of a layer, queries and a mask, and nothing else."""
    wanted = {contract.present_key(layer), contract.present_value(layer)}
    return any(
        _ATTENTION in kernel.name
        and len(kernel.inputs) == len(wanted) + 2
        and wanted <= {tensor.name for tensor in kernel.inputs}
        and any(tensor.dtype == "Bool" for tensor in kernel.inputs)
        for kernel in kernels
    )


def _faults(kernels: Sequence[FusedLayer], config: LRTConfig, slots: int) -> Iterator[str]:
    if (count := sum(_ATTENTION in kernel.name for kernel in kernels)) != config.n_layer:
        yield f"{count} of {config.n_layer} attentions are one kernel"
    matrices = {tuple(sorted(shape)) for shape in matrix_shapes(config).values()}
    for kernel in kernels:
        for tensor in kernel.outputs:
            if {slots, config.head_dim} <= set(tensor.shape) and not tensor.name.startswith("present_"):
                yield f"{kernel.name} copies a cache"
            if tensor.dtype in _FLOATS and tuple(sorted(tensor.shape)) in matrices:
                yield f"{kernel.name} writes a whole weight matrix"


def _cache_slots(kernels: Sequence[FusedLayer]) -> int:
    """Slots of a cache; 0 where no kernel names one."""
    names = contract.present_key(0), contract.past_key(0)
    tensors = [tensor for kernel in kernels for tensor in (*kernel.inputs, *kernel.outputs) if tensor.name in names]
    return tensors[0].shape[2] if tensors else 0


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name, tuple(int(size) for size in shape.split(",") if size), dtype)
        for name, shape, dtype in _TENSOR.findall(text)
    )
