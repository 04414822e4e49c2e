"""Read the fused layers of a plan from what TensorRT says while it builds: what runs, and with which tensors.

A plan cannot be inspected without a GPU, but with detailed profiling verbosity a build prints every layer of it. One
layer is one kernel, so their number is the latency of a decode step, and their tensors show what no network shows:
whether attention is one kernel that reads the caches themselves, whether a cache is copied, and whether quantized
weights are dequantized inside their product. TensorRT-RTX 1.7.1 prints the list. Where there is none, nothing is found.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.engine_sidecar import DECODE
from lrt_deploy.bundle.weights import matrix_shapes

from .verify import ExpectedNetwork

_LAYER = re.compile(
    r"Name: (.+?), LayerType: (\w+), Inputs: (.*?), Constants: (.*?), Outputs: (.*?), TacticName: .*?, Metadata: ?(.*)"
)
_TENSOR = re.compile(r"Name: ([^,]+), Dimensions: \[([-\d,]*)\][^}]*?Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^]]+)\]")
_OTHER_PROFILE = re.compile(r" \[profile \d+\]")  # in the names of every profile but the first
_PROFILE = re.compile(r"_myl(\d+)_\d+$")
_NO_KERNELS = {"shape_call", "signal", "wait"}  # computed on the host; events between streams
_ATTENTION = "_mha_"  # in the name of a fused attention
_FLOATS = {"Float", "Half", "BFloat16"}
# TensorRT-RTX 1.7.1 dequantizes an int4 matrix into memory where each column is one block, of 128 rows at most.
_SMALL_ROWS = 128


@dataclass(frozen=True)
class Tensor:
    """A tensor of a layer; a free dimension is -1."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as TensorRT prints it: Half, Float, Bool, Int8

    @property
    def fixed_elements(self) -> int:
        """Product of the dimensions that are not free."""
        return math.prod(size for size in self.shape if size != -1)

    @property
    def elements(self) -> int:
        """Number of elements; 0 where a dimension is free."""
        return 0 if -1 in self.shape else self.fixed_elements


@dataclass(frozen=True)
class FusedLayer:
    """One layer of a plan, for one of its profiles, and the nodes of the ONNX graph that it computes."""

    name: str
    kind: str
    profile: int
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: frozenset[str]


def parse_layers(text: str) -> list[FusedLayer]:
    """Return the layers that a message of the build lists, one a line; none where it lists none."""
    layers = []
    for found in _LAYER.finditer(_OTHER_PROFILE.sub("", text)):
        name, kind, *tensors, nodes = found.groups()
        profile = _PROFILE.search(name)
        inputs, constants, outputs = (_tensors(part) for part in tensors)
        number = int(profile[1]) if profile else 0
        layers.append(FusedLayer(name, kind, number, inputs, constants, outputs, frozenset(_NODE.findall(nodes))))
    return layers


def summarize(
    layers: Sequence[FusedLayer], expected: ExpectedNetwork, capacity: int, profiles: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Count kernels, attentions and dequantized weights by profile, and list what is slow; empty without layers.

    Args:
        layers: of all profiles.
        expected: the network that the plan was built from.
        capacity: slots of a cache.
        profiles: the names of the profiles, in their order.

    Returns:
        For each profile `kernels`; `kernels_per_layer`, the most from one attention to the next (None where attentions
        are not one kernel each); `attentions` in one kernel; `attentions_on_caches`, those that read caches, queries
        and a mask, and nothing else; `weights_in_products`, quantized matrices that are dequantized in the kernel that
        multiplies by them; `kinds` of kernels; `faults`, which cost time and change no number.

    """
    found: dict[str, dict[str, Any]] = {}
    for index, profile in enumerate(profiles if layers else ()):
        kernels = _kernels(layers, index)
        places = [place for place, kernel in enumerate(kernels) if _ATTENTION in kernel.name]
        spans = [later - place for place, later in itertools.pairwise(places)]
        quantized = [name for name, product in expected.products.items() if product.weight]
        found[profile] = {
            "kernels": len(kernels),
            "kernels_per_layer": max(spans) if spans and len(places) == expected.config.n_layer else None,
            "attentions": len(places),
            "attentions_on_caches": _attentions_on_caches(kernels, expected),
            "weights_in_products": sum(_in_product(kernels, name, expected) for name in quantized),
            "kinds": dict(Counter(layer.kind for layer in kernels)),
            "faults": [*_attention_faults(kernels, expected, capacity), *_weight_faults(kernels, expected)],
        }
    return found


def find_slow_decoding(
    layers: Sequence[FusedLayer], expected: ExpectedNetwork, capacity: int, profiles: Sequence[str], decomposable: bool
) -> list[str]:
    """Return the faults of decoding for which a plan should not be kept; none where the build listed no layers.

    Matrices of at most 128 rows are not among them, and with `decomposable` attention is not: there is no kernel for
    its shape or type, and a slower plan is wanted still.
    """
    kernels = _kernels(layers, list(profiles).index(DECODE))
    if not kernels:
        return []
    shapes = matrix_shapes(expected.config)
    large = {name: product for name, product in expected.products.items() if shapes[name][0] > _SMALL_ROWS}
    weights = _weight_faults(kernels, dataclasses.replace(expected, products=large))
    return [*([] if decomposable else _attention_faults(kernels, expected, capacity)), *weights]


def _kernels(layers: Sequence[FusedLayer], profile: int) -> list[FusedLayer]:
    return [layer for layer in layers if layer.profile == profile and layer.kind not in _NO_KERNELS]


def _attentions_on_caches(kernels: Sequence[FusedLayer], expected: ExpectedNetwork) -> int:
    """Count the layers whose attention is one kernel that reads caches, queries and a mask, and nothing else."""
    read = [{tensor.name for tensor in kernel.inputs} for kernel in kernels if _is_plain_attention(kernel)]
    caches = [set(contract.present_cache(i)) for i in range(expected.config.n_layer)]
    return sum(any(pair <= names for names in read) for pair in caches)


def _is_plain_attention(kernel: FusedLayer) -> bool:
    masks = [tensor for tensor in kernel.inputs if tensor.dtype == "Bool"]
    return _ATTENTION in kernel.name and len(kernel.inputs) == 4 and len(masks) == 1


def _attention_faults(kernels: Sequence[FusedLayer], expected: ExpectedNetwork, capacity: int) -> Iterator[str]:
    count, config = sum(_ATTENTION in kernel.name for kernel in kernels), expected.config
    if count != config.n_layer:
        yield f"{count} of {config.n_layer} attentions are one kernel"
    elif (direct := _attentions_on_caches(kernels, expected)) != count:
        yield f"{direct} of {count} attentions read their caches, queries and a mask, and nothing else"
    size = config.n_kv_head * capacity * config.head_dim  # of a cache, for one sequence
    for kernel in kernels:
        for tensor in kernel.outputs:
            whole = {capacity, config.head_dim} <= set(tensor.shape) and tensor.fixed_elements >= size
            if whole and not tensor.name.startswith("present_"):
                sources = [source.name for source in kernel.inputs if source.name.startswith(("past_", "present_"))]
                yield f"{kernel.name} copies {sources[0] if sources else 'a cache'}"


def _weight_faults(kernels: Sequence[FusedLayer], expected: ExpectedNetwork) -> Iterator[str]:
    for kernel in kernels:
        if names := _written_matrices(kernel, expected):
            yield f"{kernel.name} writes {' and '.join(names)} into memory"
    for name, product in expected.products.items():
        count = len(_readers(kernels, name, expected)) if product.weight else 1
        if count != 1:
            yield f"{count} kernels read {name} in {product.weight}, expected is one"


def _in_product(kernels: Sequence[FusedLayer], name: str, expected: ExpectedNetwork) -> bool:
    """Return whether a quantized matrix is read by one kernel, which does not write it dequantized."""
    readers = _readers(kernels, name, expected)
    return len(readers) == 1 and not _written_matrices(readers[0], expected)


def _readers(kernels: Sequence[FusedLayer], name: str, expected: ExpectedNetwork) -> list[FusedLayer]:
    """Return the kernels that dequantize a matrix and hold it as a constant."""
    kind, size = expected.products[name].weight, _elements(expected, name)
    return [
        kernel
        for kernel in kernels
        if f"{name}.dequantized" in kernel.nodes
        and any(held.dtype.lower() == kind and held.elements >= size for held in kernel.constants)
    ]


def _written_matrices(kernel: FusedLayer, expected: ExpectedNetwork) -> list[str]:
    """Return the matrices that a kernel writes as floats: those that it dequantizes, or any of an output's shape."""
    shapes, written = {n: s for n, s in matrix_shapes(expected.config).items() if n in expected.products}, []
    for out in kernel.outputs:
        if out.dtype in _FLOATS and out.elements:
            shape = tuple(size for size in out.shape if size != 1)
            own = [n for n in shapes if f"{n}.dequantized" in kernel.nodes and out.elements >= _elements(expected, n)]
            written += own or [f"a matrix like {n}" for n, found in shapes.items() if found == shape][:1]
    return written


def _elements(expected: ExpectedNetwork, name: str) -> int:
    """Return the elements of a matrix, without the columns that pad the vocabulary."""
    rows, columns = matrix_shapes(expected.config)[name]
    return rows * (expected.config.vocab_size if name == "lm_head" else columns)


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name, tuple(int(size) for size in shape.split(",") if size), dtype)
        for name, shape, dtype in _TENSOR.findall(text)
    )
