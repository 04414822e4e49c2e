"""Read the `data.pkl` of a PyTorch archive without running pickle: the tensors that it describes, by name.

A pickle is a program, and checkpoints come from strangers. This module interprets only the instructions that a state
dict of plain tensors is made of. Names of globals are text to it; nothing is ever imported, looked up or called.
Everything else is refused by name, and every refusal is a `CheckpointError`. Sizes are bounded before anything of that
size is made: a description of 2 MiB holds 10,000 tensors.

Knows the description only: where a tensor's bytes lie and how they are read is for `pt_file` to say.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeVar

from .errors import CheckpointError

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

_T = TypeVar("_T")


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


class _Mark:
    """The start of a run of stack items."""


_MARK = _Mark()


def parse_tensors(data: bytes, source: str) -> dict[str, TensorDescription]:
    """Interpret the pickle of a state dict: a description of each tensor, by name.

    Raises CheckpointError, naming `source`, for everything else.
    """
    content = _parse(data, source)
    if not isinstance(content, dict) or not all(isinstance(value, TensorDescription) for value in content.values()):
        kinds = {type(value).__name__.strip("_") for value in content.values()} if isinstance(content, dict) else set()
        found = f"a dict with values of type {', '.join(sorted(kinds))}" if kinds else _type_name(content)
        raise CheckpointError(f"{source} does not hold a state dict (tensors by name), but {found}")
    return content


def _parse(data: bytes, source: str) -> object:
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{source} describes its tensors in {len(data)} bytes; at most {MAX_PICKLE_BYTES} do it")
    try:
        return _Machine(data, source).run()
    except CheckpointError:
        raise
    except Exception as error:  # the opcode reader raises many types on damaged files; all mean the same here
        text = ascii(str(error))[:200]
        raise CheckpointError(f"{source} is damaged: its list of tensors is not a readable pickle ({text})") from error


class _Machine:
    """The stack and the memo. Dict keys are text only, so that no hash can be made slow."""

    def __init__(self, data: bytes, source: str) -> None:
        self.stack: list[object] = []
        self._data = data
        self._source = source
        self._memo: dict[int, object] = {}

    def run(self) -> object:
        """Interpret to STOP; the one object left on the stack."""
        end = 0
        for count, (opcode, arg, position) in enumerate(pickletools.genops(self._data)):
            if count >= MAX_OPCODES:
                self.refuse(f"has more than {MAX_OPCODES} instructions in its list of tensors")
            if opcode.name in _LITERALS:
                self.stack.append(_LITERALS[opcode.name](arg))
            elif opcode.name in _ACTIONS:
                _ACTIONS[opcode.name](self, arg)
            elif opcode.name not in _IGNORED:
                self.refuse(f"holds the pickle instruction {opcode.name}, which no state dict contains")
            end = (position or 0) + 1
        if trailing := len(self._data) - end:
            self.refuse(f"has {trailing} bytes after the end of its list of tensors")
        result = self.pop(object)
        if self.stack:
            self.refuse(f"leaves {len(self.stack)} unused items behind")
        return result

    def text(self, value: str) -> None:
        """Push a text, which is a name and so not long."""
        if len(value) > MAX_TEXT:
            self.refuse(f"holds a name of {len(value)} characters; at most {MAX_TEXT} are accepted")
        self.stack.append(value)

    def put(self, index: int | None) -> None:
        """Remember the top of the stack, under the next free number if given none."""
        item = self.pop(object)
        self.stack.append(item)
        self._memo[len(self._memo) if index is None else index] = item

    def get(self, index: int) -> None:
        """Push what was remembered."""
        if index not in self._memo:
            self.refuse(f"refers to item {index} of its memo, which it never stored")
        self.stack.append(self._memo[index])

    def take(self, count: int | None) -> tuple[object, ...]:
        """The topmost items in the order in which they were pushed: so many, or all since the last mark."""
        items: list[object] = []
        while len(items) != count:
            if not self.stack:
                self.refuse("takes more items from its stack than there are")
            item = self.stack.pop()
            if item is not _MARK:
                items.append(item)
            elif count is None:
                break
            else:
                self.refuse("takes a mark for an item")
        return tuple(reversed(items))

    def set_items(self, items: tuple[object, ...]) -> None:
        """Put keys and values, in turns, into the dict below them."""
        target = self.stack[-1] if self.stack else None
        if not isinstance(target, dict) or len(items) % 2:
            self.refuse("sets items of what is no dict, or a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                self.refuse(f"does not hold a state dict: it has a key of type {_type_name(key)} and not a name")
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

    def push_named_global(self) -> None:
        """As `push_global`, with the names on the stack."""
        name, module = self.pop(str), self.pop(str)
        self.push_global(module, name)

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
            kinds = ", ".join(map(_type_name, arguments))
            self.refuse(f"calls {function} with ({kinds}), which builds no dense tensor from stored numbers")

    def _tensor(self, arguments: tuple[object, ...]) -> TensorDescription:
        """Check the arguments of `_rebuild_tensor_v2`: storage, offset, shape, strides, gradient flag, hooks."""
        kinds = tuple(map(type, arguments))
        if kinds[:6] != (Storage, int, tuple, tuple, bool, _Ordered) or arguments[6:] not in ((), (None,)):
            self.refuse(f"describes a tensor by ({', '.join(map(_type_name, arguments))})")
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

    def pop(self, kind: type[_T]) -> _T:
        """Take the top of the stack, which must be of this type."""
        (item,) = self.take(1)
        if not isinstance(item, kind):
            self.refuse(f"has a {_type_name(item)} where a {kind.__name__.strip('_')} belongs")
        return item

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self._source} was refused: it {what}. A state dict of tensors needs no code; nothing in it was run"
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


def _type_name(item: object) -> str:
    return type(item).__name__.strip("_")


_IGNORED = {"PROTO", "FRAME", "STOP"}
_LITERALS: dict[str, Callable[[Any], object]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), lambda arg: arg),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_DICT": lambda _: {},
    "MARK": lambda _: _MARK,
}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.text),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "TUPLE": lambda machine, _: machine.stack.append(machine.take(None)),
    "TUPLE1": lambda machine, _: machine.stack.append(machine.take(1)),
    "TUPLE2": lambda machine, _: machine.stack.append(machine.take(2)),
    "TUPLE3": lambda machine, _: machine.stack.append(machine.take(3)),
    "SETITEM": lambda machine, _: machine.set_items(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.take(None)),
    "GLOBAL": lambda machine, arg: machine.push_global(*arg.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.push_named_global(),
    "BINPERSID": lambda machine, _: machine.persistent(),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
}
