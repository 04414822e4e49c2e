"""Read the `data.pkl` of a PyTorch archive without running pickle: the tensors that it describes, by name.

A pickle is a program, and checkpoints come from strangers. This module interprets only the instructions that a state
dict of plain tensors is made of. Names of globals are text to it; nothing is ever imported, looked up or called.
Everything else is refused by name, and every refusal is a `CheckpointError`. Sizes are bounded before anything of that
size is made: a description of 2 MiB holds 10,000 tensors.

Knows the description only: where a tensor's bytes lie and how they are read is for `pt_file` to say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from lrt_deploy.errors import CheckpointError
from lrt_deploy.pickle_machine import Machine, type_name

MAX_PICKLE_BYTES = 2 * 1024 * 1024
MAX_OPCODES = 1_000_000
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**48
MAX_TEXT = 1_000

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
        """How many numbers the tensor holds."""
        return math.prod(self.shape)


class _Global(NamedTuple):
    """The name of a global: inert text."""

    module: str
    name: str

    def __str__(self) -> str:
        return ascii(f"{self.module}.{self.name}")[1:-1][:200]


_REBUILD = _Global("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = _Global("torch._utils", "_rebuild_parameter")
_ORDERED = _Global("collections", "OrderedDict")
_CALLED = (_REBUILD, _PARAMETER, _ORDERED)


class _Ordered(dict[str, object]):
    """An OrderedDict, whose attributes (`_metadata` of a state dict) BUILD may set; they are dropped."""


def parse_tensors(data: bytes, source: str) -> dict[str, TensorDescription]:
    """Interpret the pickle of a state dict: a description of each tensor, by name.

    Raises CheckpointError, naming `source`, for everything else.
    """
    content = _parse(data, source)
    if not isinstance(content, dict) or not all(isinstance(value, TensorDescription) for value in content.values()):
        kinds = {type(value).__name__.strip("_") for value in content.values()} if isinstance(content, dict) else set()
        found = f"a dict with values of type {', '.join(sorted(kinds))}" if kinds else type_name(content)
        raise CheckpointError(f"{source} does not hold a state dict (tensors by name), but {found}")
    return content


def _parse(data: bytes, source: str) -> object:
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{source} describes its tensors in {len(data)} bytes; at most {MAX_PICKLE_BYTES} do it")
    try:
        return _Machine(data, source, MAX_OPCODES).run()
    except CheckpointError:
        raise
    except Exception as error:  # the opcode reader raises many types on damaged files; all mean the same here
        text = ascii(str(error))[:200]
        raise CheckpointError(f"{source} is damaged: its list of tensors is not a readable pickle ({text})") from error


class _Machine(Machine):
    """Dict keys are text only, so that no hash can be made slow."""

    too_many = " in its list of tensors"
    no_other = "pickle instruction {}, which no state dict contains"
    its_end = "the end of its list of tensors"

    def text(self, value: str) -> None:
        """Push a text, which is a name and so not long."""
        if len(value) > MAX_TEXT:
            self.refuse(f"holds a name of {len(value)} characters; at most {MAX_TEXT} are accepted")
        self.stack.append(value)

    def set_items(self, items: tuple[object, ...]) -> None:
        """Put keys and values, in turns, into the dict below them."""
        target = self.stack[-1] if self.stack else None
        if not isinstance(target, dict) or len(items) % 2:
            self.refuse("sets items of what is no dict, or a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                self.refuse(f"does not hold a state dict: it has a key of type {type_name(key)} and not a name")
            if key in target:
                self.refuse(f"holds two values for the name {key!a}")
            target[key] = value

    def push_global(self, module: str, name: str) -> None:
        """Push the name of a storage type or of one of the functions that build tensors."""
        found = _Global(module, name)
        if len(module) + len(name) > MAX_TEXT:
            self.refuse(f"names a global of {len(module) + len(name)} characters")
        if found not in _CALLED and not (module == "torch" and name in STORAGES):
            near = next((item for item in reversed(self.stack) if type(item) is str), None)
            where = f" near {near!a}" if near else ""
            self.refuse(
                f"names {found}{where}, and dense tensors need only {', '.join(map(str, _CALLED))} and storages"
            )
        self.stack.append(found)

    def persistent(self) -> None:
        """Replace the description of a storage, as `torch.save` writes it, by the storage."""
        item = self.pop(tuple)
        kinds = tuple(map(type, item))
        if kinds != (str, _Global, str, str, int) or item[0] != "storage":
            self.refuse("refers to something outside its list of tensors that is no storage")
        _, kind, key, _, elements = item
        if kind in _CALLED or not 0 <= elements <= MAX_ELEMENTS:
            self.refuse(f"has the storage {key!a} of {elements} elements of type {kind}")
        self.stack.append(Storage(key, *STORAGES[kind.name], elements))

    def call(self) -> None:
        """Build what one of the known functions builds; it is not called."""
        arguments, function = self.pop(tuple), self.pop(_Global)
        if function == _ORDERED and not arguments:
            self.stack.append(_Ordered())
        elif function == _REBUILD:
            self.stack.append(self._tensor(arguments))
        elif function == _PARAMETER and len(arguments) == 3 and type(arguments[0]) is TensorDescription:
            self.stack.append(arguments[0])
        else:
            kinds = ", ".join(map(type_name, arguments))
            self.refuse(f"calls {function} with ({kinds}), which builds no dense tensor from stored numbers")

    def _tensor(self, arguments: tuple[object, ...]) -> TensorDescription:
        """Check the arguments of `_rebuild_tensor_v2`: storage, offset, shape, strides, gradient flag, hooks."""
        kinds = tuple(map(type, arguments))
        if kinds[:6] != (Storage, int, tuple, tuple, bool, _Ordered) or arguments[6:] not in ((), (None,)):
            self.refuse(f"describes a tensor by ({', '.join(map(type_name, arguments))})")
        storage, offset, shape, strides = arguments[:4]
        assert isinstance(storage, Storage)
        assert isinstance(shape, tuple)
        assert isinstance(strides, tuple)
        assert isinstance(offset, int)
        numbers = (offset, *shape, *strides)
        if not all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in numbers) or len(shape) > MAX_DIMENSIONS:
            self.refuse(f"has a tensor in storage {storage.key!a} with a shape, stride or offset out of bounds")
        tensor = TensorDescription(storage, offset, shape, strides)
        if not _is_dense(shape, strides) or offset + tensor.elements > storage.elements:
            self.refuse(
                f"has a tensor of shape {shape}, strides {strides} and offset {offset} in storage {storage.key!a} of "
                f"{storage.elements} elements: it overlaps itself, has gaps or reaches beyond. Save it .contiguous()"
            )
        return tensor

    def build(self) -> None:
        """Set attributes of an OrderedDict: a state dict's versions of modules, which no forward pass needs."""
        state, target = self.pop(dict), self.pop(_Ordered)
        if set(state) != {"_metadata"}:
            self.refuse("sets attributes other than _metadata on a state dict")
        self.stack.append(target)

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self.source} was refused: it {what}. A state dict of tensors needs no code; nothing in it was run"
        )


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements fill a range of the storage, each once, in any order of the dimensions."""
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


_Machine.actions = {
    **Machine.actions,
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.text),
    "BINPERSID": lambda machine, _: machine.persistent(),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
}
