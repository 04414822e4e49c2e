"""Verify what TensorRT makes of a graph: the network before the build, and the layers of the plan after it.

A plan cannot be inspected without a GPU, and a plan that was built in another type than was asked for shows no error.
The network that the parser made can be inspected everywhere, and TensorRT, being strongly typed, builds from it without
changing types. What is expected follows from the model configuration, the precision and the matrices that the manifest
says are kept precise, never from the graph: 2L cache updates on the network's own inputs and outputs, L attentions each
under the mask of its window, every weight matrix multiplied exactly once and in the expected type, norms and logits in
float32.

With detailed profiling verbosity a build prints every layer of its plan (TensorRT-RTX 1.7.1; where there is no list,
nothing is found). One layer is one kernel, so their number is the latency of a decode step, and their tensors show
whether attention is one kernel that reads the caches themselves, whether a cache is copied, and whether quantized
weights are dequantized inside their product.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.engine_sidecar import DECODE
from lrt_deploy.bundle.manifest import Manifest
from lrt_deploy.bundle.precisions import FORMATS, base_dtype
from lrt_deploy.bundle.tensorrt_libraries import TENSORRT_DTYPES
from lrt_deploy.bundle.weights import matrix_shapes
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import EngineError

_MASK = 3  # position among the inputs of an attention layer: query, key, value, mask
# What may stand between a weight and the product that uses it.
_CARRIERS = ("SHUFFLE", "CAST", "DEQUANTIZE", "IDENTITY", "UNSQUEEZE", "SQUEEZE")
_NAMED = 12  # layers named in a message


@dataclass(frozen=True)
class Product:
    """A matrix product with a weight: the type it computes in, and the quantized types of its two sides, if any."""

    compute: str
    weight: str | None = None
    activation: str | None = None

    def __str__(self) -> str:
        quantized = [
            f"{side} {what}s" for what, side in (("weight", self.weight), ("activation", self.activation)) if side
        ]
        return f"{self.compute}{' with ' + ' and '.join(quantized) if quantized else ''}"


@dataclass(frozen=True)
class ExpectedNetwork:
    """What the network must consist of; `products` by the name of the weight."""

    precision: str
    config: LRTConfig
    base: str
    products: dict[str, Product]


def expected_network(manifest: Manifest, precision: str) -> ExpectedNetwork:
    """Return what a precision of this bundle expects; the manifest says which matrices are kept precise."""
    config, base = manifest.model, base_dtype(precision, "full")
    details = manifest.precision_details.get(precision, {})
    kept, wide = set(details.get("keep_high", ())), set(details.get("multiplied_in_float32", ()))
    kind, products = FORMATS.get(precision), {}
    integers = None if kind is None else f"int{kind.bits}"
    quantized = (integers, integers if kind and kind.activations else None)
    for name in matrix_shapes(config):
        plain = name in kept or name in wide
        products[name] = Product("float32" if name in wide else base, *((None, None) if plain else quantized))
    return ExpectedNetwork(precision, config, base, products)


def verify(trt: Any, network: Any, expected: ExpectedNetwork) -> dict[str, Any]:  # noqa: ANN401 - TensorRT ships no types
    """Compare the parsed network with what is expected and return its counts; EngineError names the layers at fault."""
    view = _Network(trt, network)
    faults = [*_cache_faults(view, expected), *_attention_faults(view, expected)]
    faults += [*_product_faults(view, expected), *_float32_faults(view)]
    if faults:
        more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise EngineError(
            f"the network that TensorRT parsed is not what {expected.precision} expects, so nothing was built: "
            f"{'; '.join(faults[:_NAMED])}{more}"
        )
    return view.counts()


class _Network:
    """The layers of a network by kind, and the layer that makes each tensor."""

    def __init__(self, trt: Any, network: Any) -> None:  # noqa: ANN401
        self.trt = trt
        self.layers = [network.get_layer(index) for index in range(network.num_layers)]
        self.inputs = {network.get_input(index).name for index in range(network.num_inputs)}
        self.outputs = {network.get_output(i).name: network.get_output(i) for i in range(network.num_outputs)}
        self.makers = {layer.get_output(i).name: layer for layer in self.layers for i in range(layer.num_outputs)}
        self.by_kind: dict[str, list[Any]] = defaultdict(list)
        for layer in self.layers:
            self.by_kind[layer.type.name].append(layer)

    def products(self) -> Iterator[tuple[str, Product, str]]:
        """Yield weight, product and layer name of every matrix product; the weight is '' where it is no constant."""
        for layer in self.by_kind["MATRIX_MULTIPLY"]:
            weight, quantized = self._source(layer.get_input(1))
            _, activation = self._source(layer.get_input(0))
            yield weight, Product(_dtype(layer.get_output(0)), quantized, activation), layer.name

    def readers(self, caches: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yield cache and layer for every layer besides updates that reads a cache's entries."""
        for layer in self.layers:
            if layer.type.name not in ("KV_CACHE_UPDATE", "SHAPE"):
                for tensor in (layer.get_input(index) for index in range(layer.num_inputs)):
                    if tensor is not None and tensor.name in caches:
                        yield tensor.name, layer.name

    def counts(self) -> dict[str, Any]:
        """Count the layers, for the sidecar."""
        products = Counter(str(product) for _, product, _ in self.products())
        return {
            "layers": len(self.layers),
            "kv_cache_update": len(self.by_kind["KV_CACHE_UPDATE"]),
            "attention": len(self.by_kind["ATTENTION_INPUT"]),
            "attention_masks": len({layer.get_input(_MASK).name for layer in self.by_kind["ATTENTION_INPUT"]}),
            "matmul": dict(products),
            "quantized_matmul": sum(count for product, count in products.items() if " with " in product),
            "norms": dict(Counter(_dtype(layer.get_output(0)) for layer in self.by_kind["REDUCE"])),
        }

    def looks_back(self, mask: Any) -> set[int]:  # noqa: ANN401
        """Return the numbers subtracted from `position_ids` on the way to a mask: how far back a query attends."""
        found, todo, done = set(), [mask.name], set()
        while todo:
            name = todo.pop()
            layer = self.makers.get(name)
            if layer is None or name in done:
                continue
            done.add(name)
            inputs = [layer.get_input(i) for i in range(layer.num_inputs) if layer.get_input(i) is not None]
            todo += [tensor.name for tensor in inputs]
            if layer.type.name == "ELEMENTWISE" and self._source(inputs[0])[0] == "position_ids":
                found |= self._number(inputs[1])
        return found

    def _number(self, tensor: Any) -> set[int]:  # noqa: ANN401
        """Return the one number of a constant, behind layers that only pass it on; empty for anything else."""
        while (layer := self.makers.get(tensor.name)) is not None and layer.type.name in _CARRIERS:
            tensor = layer.get_input(0)
        if layer is None or layer.type.name != "CONSTANT":
            return set()
        layer.__class__ = self.trt.IConstantLayer  # the network hands out base classes
        weights = layer.weights
        return {int(weights.item())} if weights.size == 1 else set()

    def _source(self, tensor: Any) -> tuple[str, str | None]:  # noqa: ANN401
        """Return the constant or input behind a tensor ('' if neither), and the type that it was dequantized from."""
        quantized = None
        while (layer := self.makers.get(tensor.name)) is not None and layer.type.name in _CARRIERS:
            tensor = layer.get_input(0)
            if layer.type.name == "DEQUANTIZE":
                quantized = _dtype(tensor)
        if layer is None:
            return str(tensor.name), quantized
        return layer.name if layer.type.name == "CONSTANT" else "", quantized


def _cache_faults(view: _Network, network: ExpectedNetwork) -> Iterator[str]:
    expected = {pair.past: pair for pair in contract.state_pairs(network.config, network.base) if pair.in_place}
    updates = {layer.get_input(0).name: layer for layer in view.by_kind["KV_CACHE_UPDATE"]}
    for past, pair in expected.items():
        layer = updates.get(past)
        if layer is None:
            yield f"{past} is not updated in place by a KV_CACHE_UPDATE layer"
        elif past not in view.inputs or layer.get_output(0).name != pair.present or pair.present not in view.outputs:
            yield f"{layer.name} makes {layer.get_output(0).name} of {past}, not the network output {pair.present}"
        elif _dtype(layer.get_output(0)) != network.base:
            yield f"{layer.name} keeps {past} in {_dtype(layer.get_output(0))}, expected is {network.base}"
    for past, name in view.readers(expected):
        yield f"{name} reads {past} beside its update, and may see the new entries"
    extra = [layer.name for past, layer in updates.items() if past not in expected]
    if extra or len(view.by_kind["KV_CACHE_UPDATE"]) != len(expected):
        found = len(view.by_kind["KV_CACHE_UPDATE"])
        yield f"{found} KV_CACHE_UPDATE layers, expected are {len(expected)} ({', '.join(extra) or 'none is foreign'})"


def _attention_faults(view: _Network, expected: ExpectedNetwork) -> Iterator[str]:
    found, windows = view.by_kind["ATTENTION_INPUT"], expected.config.windows
    if len(found) != len(windows) or len(view.by_kind["ATTENTION_OUTPUT"]) != len(windows):
        names = ", ".join(layer.name for layer in found) or "none"
        yield f"{len(found)} attention layers, expected are {len(windows)} ({names})"
        return
    layer_of = {contract.present_cache(i)[1]: i for i in range(len(windows))}
    for layer in found:
        index = layer_of.get(layer.get_input(2).name)
        mask = layer.get_input(_MASK) if layer.num_inputs > _MASK else None
        if index is None:
            yield f"{layer.name} attends to {layer.get_input(2).name}, which is no layer's value cache"
        elif mask is None:
            yield f"{layer.name} has no mask: its window of {windows[index]} would be dropped"
        elif (looks_back := view.looks_back(mask)) != {windows[index]}:
            seen = ", ".join(map(str, sorted(looks_back))) or "any number of"
            yield f"{layer.name} looks back {seen} positions, expected is its window of {windows[index]}"
        if _dtype(layer.get_output(0)) != expected.base:
            yield f"{layer.name} attends in {_dtype(layer.get_output(0))}, expected is {expected.base}"


def _product_faults(view: _Network, expected: ExpectedNetwork) -> Iterator[str]:
    found: dict[str, list[tuple[Product, str]]] = defaultdict(list)
    for weight, product, layer in view.products():
        found[weight].append((product, layer))
    for weight, wanted in expected.products.items():
        uses = found.pop(weight, [])
        if len(uses) != 1:
            yield f"{weight} is multiplied {len(uses)} times, expected is once"
        elif (product := uses[0][0]) != wanted:
            yield f"{uses[0][1]} ({weight}) computes in {product}, expected is {wanted}"
    for weight, uses in found.items():
        yield f"{uses[0][1]} multiplies {weight or 'two activations'}, which is not expected"


def _float32_faults(view: _Network) -> Iterator[str]:
    for layer in view.by_kind["REDUCE"]:
        if _dtype(layer.get_output(0)) != "float32":
            yield f"{layer.name} sums squares in {_dtype(layer.get_output(0))}, expected is float32"
    logits = view.outputs.get("logits")
    if logits is None or _dtype(logits) != "float32":
        yield f"logits are {_dtype(logits) if logits is not None else 'missing'}, expected is float32"


def _dtype(tensor: Any) -> str:  # noqa: ANN401
    name = str(tensor.dtype.name)
    return TENSORRT_DTYPES.get(name, name.lower())


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
        inputs, constants, outputs = (
            tuple(
                Tensor(tensor, tuple(int(size) for size in shape.split(",") if size), dtype)
                for tensor, shape, dtype in _TENSOR.findall(part)
            )
            for part in tensors
        )
        number = int(profile[1]) if profile else 0
        layers.append(FusedLayer(name, kind, number, inputs, constants, outputs, frozenset(_NODE.findall(nodes))))
    return layers


def summarize(
    layers: Sequence[FusedLayer], expected: ExpectedNetwork, capacity: int, profiles: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Count kernels, attentions and dequantized weights by profile, and list what is slow; empty without layers.

    `layers` are those of all profiles, `profiles` their names in order, `capacity` the slots of a cache. For each
    profile: `kernels`; `kernels_per_layer`, the most from one attention to the next (None where attentions are not one
    kernel each); `attentions` in one kernel; `attentions_on_caches`, those that read caches, queries and a mask alone;
    `weights_in_products`, quantized matrices dequantized in the kernel that multiplies by them; `kinds` of kernels;
    `faults`, which cost time and change no number.
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
            # Read by one kernel, which does not write it dequantized.
            "weights_in_products": sum(
                len(readers) == 1 and not _written_matrices(readers[0], expected)
                for readers in (_readers(kernels, name, expected) for name in quantized)
            ),
            "kinds": dict(Counter(layer.kind for layer in kernels)),
            "faults": [*_kernel_faults(kernels, expected, capacity), *_weight_faults(kernels, expected)],
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
    return [*([] if decomposable else _kernel_faults(kernels, expected, capacity)), *weights]


def _kernels(layers: Sequence[FusedLayer], profile: int) -> list[FusedLayer]:
    return [layer for layer in layers if layer.profile == profile and layer.kind not in _NO_KERNELS]


def _attentions_on_caches(kernels: Sequence[FusedLayer], expected: ExpectedNetwork) -> int:
    plain = [
        kernel.inputs
        for kernel in kernels
        if _ATTENTION in kernel.name and len(kernel.inputs) == 4 and sum(t.dtype == "Bool" for t in kernel.inputs) == 1
    ]
    read = [{tensor.name for tensor in inputs} for inputs in plain]
    caches = [set(contract.present_cache(i)) for i in range(expected.config.n_layer)]
    return sum(any(pair <= names for names in read) for pair in caches)


def _kernel_faults(kernels: Sequence[FusedLayer], expected: ExpectedNetwork, capacity: int) -> Iterator[str]:
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
