"""Read the `data.pkl` of a PyTorch archive without running pickle: the tensors that it describes, by name.

Only the instructions of a state dict of plain tensors are interpreted; see `pickle_machine`. Sizes are bounded before
anything of that size is made: a description of 2 MiB holds 10,000 tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from lrt_deploy.errors import CheckpointError
from lrt_deploy.pickle_machine import Global, Machine, type_name

MAX_PICKLE_BYTES = 2 * 1024 * 1024
MAX_OPCODES = 1_000_000
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**48

# Storage classes of torch -> element type and bytes per element.
STORAGES = {
    "FloatStorage": ("float32", 4),
    "DoubleStorage": ("float64", 8),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
}


class Storage(NamedTuple):
    """The bytes behind tensors: record `data/KEY` of the archive, `elements` of type `dtype`."""

    key: str
    dtype: str
    item_bytes: int
    elements: int


@dataclass(frozen=True)
class TensorDescription:
    """A dense tensor: `shape` and `strides` in elements, from element `offset` of its storage on."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)


_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_ORDERED = Global("collections", "OrderedDict")


class _Ordered(dict[str, object]):
    """An OrderedDict, whose attributes (`_metadata` of a state dict) BUILD may set; they are dropped."""


def parse_tensors(data: bytes, source: str) -> dict[str, TensorDescription]:
    """Interpret the pickle of a state dict: a description of each tensor, by name.

    Raises CheckpointError, naming `source`, for everything else.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{source} describes its tensors in {len(data)} bytes; at most {MAX_PICKLE_BYTES} do it")
    content = _Machine(data, source, MAX_OPCODES).run()
    if not isinstance(content, dict) or not all(isinstance(value, TensorDescription) for value in content.values()):
        kinds = {type_name(value) for value in content.values()} if isinstance(content, dict) else set()
        found = f"a dict with values of type {', '.join(sorted(kinds))}" if kinds else type_name(content)
        raise CheckpointError(f"{source} does not hold a state dict (tensors by name), but {found}")
    return content


class _Machine(Machine):
    globals = frozenset((_REBUILD, _PARAMETER, _ORDERED, *(Global("torch", name) for name in STORAGES)))
    longest_text = 1_000  # a name
    contents = "A state dict of dense tensors by name needs no code; nothing in it was run"

    def persistent(self, item: object) -> Storage:
        """Return the storage that `torch.save` describes so."""
        if (
            not isinstance(item, tuple)
            or tuple(map(type, item)) != (str, Global, str, str, int)
            or item[0] != "storage"
        ):
            self.refuse("refers to something outside its list of tensors that is no storage")
        _, kind, key, _, elements = item
        if kind.module != "torch" or not 0 <= elements <= MAX_ELEMENTS:
            self.refuse(f"has the storage {key!a} of {elements} elements of type {kind}")
        return Storage(key, *STORAGES[kind.name], elements)

    def call(self, opcode: str, function: Global, arguments: tuple[object, ...]) -> object:
        """Build an empty dict or a tensor; a parameter is its tensor."""
        if (opcode, function, arguments) == ("REDUCE", _ORDERED, ()):
            return _Ordered()
        if (opcode, function) == ("REDUCE", _REBUILD):
            return self._tensor(arguments)
        kinds = tuple(map(type, arguments))
        if (opcode, function) != ("REDUCE", _PARAMETER) or kinds[:1] != (TensorDescription,) or len(kinds) != 3:
            names = ", ".join(map(type_name, arguments))
            self.refuse(f"calls {function} with ({names}), which builds no dense tensor from stored numbers")
        return arguments[0]

    def build(self, target: object, state: object) -> None:
        """Drop the attributes of a state dict: its versions of modules, which no forward pass needs."""
        if not isinstance(target, _Ordered) or not isinstance(state, dict) or set(state) != {"_metadata"}:
            self.refuse("sets attributes other than _metadata on a state dict")

    def _tensor(self, arguments: tuple[object, ...]) -> TensorDescription:
        """Check the arguments of `_rebuild_tensor_v2`: storage, offset, shape, strides, gradient flag, hooks."""
        kinds = tuple(map(type, arguments))
        if kinds[:6] != (Storage, int, tuple, tuple, bool, _Ordered) or arguments[6:] not in ((), (None,)):
            self.refuse(f"describes a tensor by ({', '.join(map(type_name, arguments))})")
        tensor = TensorDescription(*arguments[:4])  # type: ignore[arg-type]  # the types were checked
        storage, offset, shape, strides = tensor.storage, tensor.offset, tensor.shape, tensor.strides
        numbers = (offset, *shape, *strides)
        if not all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in numbers) or len(shape) > MAX_DIMENSIONS:
            self.refuse(f"has a tensor in storage {storage.key!a} with a shape, stride or offset out of bounds")
        if not _is_dense(shape, strides) or offset + tensor.elements > storage.elements:
            self.refuse(
                f"has a tensor of shape {shape}, strides {strides} and offset {offset} in storage {storage.key!a} of "
                f"{storage.elements} elements: it overlaps itself, has gaps or reaches beyond. Save it .contiguous()"
            )
        return tensor


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether the elements fill a range of the storage, each once, in any order of the dimensions."""
    if len(shape) != len(strides):
        return False
    if 0 in shape:
        return True
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True
