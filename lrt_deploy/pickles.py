"""Read pickles of strangers without running pickle: the tensors of a state dict, and a tiktoken `Encoding`.

`Machine` interprets a pickle of plain data: the stack, the memo, and a few instructions. Names of globals are text;
nothing is ever imported, looked up or called, and everything that the two kinds of files do not need is refused.

Not an allow-list `pickle.Unpickler` after a scan of the opcodes: with the opcodes of real files alone, 140 bytes of
tuples that share parts through the memo hang it in `hash`, 400 kB of integer keys with equal hashes take 12 seconds,
and a 1 MB tuple of nested tuples as a key kills the interpreter.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar

from .errors import CheckpointError
from .files import read_bytes

_T = TypeVar("_T")


class Global(NamedTuple):
    """The name of a global: inert text."""

    module: str
    name: str

    def __str__(self) -> str:
        return ascii(f"{self.module}.{self.name}")[1:-1][:200]


_MARK = object()  # the start of a run of stack items


class Machine:
    """Interprets the instructions in `_PUSHED` and `_ACTIONS`; every other one is refused.

    A reader sets the class variables and overrides `call`, `build` and `persistent`. Keys of dicts are of `key_types`
    only, so that no hash can be made slow or to collide. `contents` completes the message of a refusal.
    """

    globals: ClassVar[frozenset[Global]]
    key_types: ClassVar[tuple[type, ...]] = (str,)
    longest_text: ClassVar[int]
    most_instructions: ClassVar[int]
    contents: ClassVar[str]

    def __init__(self, data: bytes, source: str) -> None:
        self.stack: list[object] = []
        self._data, self._source = data, source
        self._memo: dict[int, object] = {}

    def run(self) -> object:
        """Interpret to STOP; return the one object left on the stack."""
        try:
            self._interpret()
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # the opcode reader raises many types on damaged files; all mean the same here
            raise self._error(f"is cut off or damaged, not a readable pickle ({ascii(str(error))[:200]})") from error
        result = self.pop(object)
        if self.stack:
            self.refuse(f"leaves {len(self.stack)} unused items behind")
        return result

    def call(self, opcode: str, function: Global, arguments: tuple[object, ...]) -> object:
        """Return what a known function would return for REDUCE or NEWOBJ; it is not called."""
        raise NotImplementedError

    def build(self, target: object, state: object) -> None:
        """Give an object that `call` returned its attributes."""
        raise NotImplementedError

    def persistent(self, item: object) -> object:
        """Return the object that a persistent id stands for."""
        self.refuse(f"refers to something outside of it by a {type_name(item)}")

    def pop(self, kind: type[_T]) -> _T:
        """Take the top of the stack, which must be of this type."""
        (item,) = self.take(1)
        if not isinstance(item, kind):
            self.refuse(f"has a {type_name(item)} where a {kind.__name__.strip('_')} belongs")
        return item

    def take(self, count: int | None) -> tuple[object, ...]:
        """Take the topmost `count` items, or all since the last mark, in the order in which they were pushed."""
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

    def refuse(self, what: str) -> NoReturn:
        """Raise CheckpointError; `what` says what the file does."""
        raise self._error(what)

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._source} was refused: it {what}. {self.contents}")

    def _interpret(self) -> None:
        end = 0
        for count, (opcode, argument, position) in enumerate(pickletools.genops(self._data)):
            if count >= self.most_instructions:
                self.refuse(f"has more than {self.most_instructions} instructions")
            if opcode.name in _PUSHED:
                self.stack.append(argument)
            elif opcode.name in _ACTIONS:
                _ACTIONS[opcode.name](self, argument)
            elif opcode.name not in ("PROTO", "FRAME", "STOP"):
                self.refuse(f"holds the pickle instruction {opcode.name}, which no such file needs")
            end = (position or 0) + 1
        if trailing := len(self._data) - end:
            self.refuse(f"has {trailing} bytes after its end")

    def _text(self, value: str) -> None:
        if len(value) > self.longest_text:
            self.refuse(f"holds a name of {len(value)} characters; at most {self.longest_text} are accepted")
        self.stack.append(value)

    def _put(self, index: int | None) -> None:
        """Remember the top of the stack, under the next free number if given none."""
        item = self.pop(object)
        self.stack.append(item)
        self._memo[len(self._memo) if index is None else index] = item

    def _get(self, index: int) -> None:
        if index not in self._memo:
            self.refuse(f"refers to item {index} of its memo, which it never stored")
        self.stack.append(self._memo[index])

    def _set_items(self, items: tuple[object, ...]) -> None:
        """Put keys and values, in turns, into the dict below them."""
        target = self.pop(dict)
        self.stack.append(target)
        if len(items) % 2:
            self.refuse("has a dict key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in self.key_types:
                self.refuse(f"has a dict key of type {type_name(key)}, expected {self.key_types[0].__name__}")
            if key in target:
                self.refuse(f"holds two values for the name {ascii(key)[:200]}")
            target[key] = value

    def _global(self, found: Global) -> None:
        if found not in self.globals:
            near = next((ascii(item)[:200] for item in reversed(self.stack) if type(item) is str), "its begin")
            self.refuse(
                f"names {found} near {near}, which could run code when unpickled; allowed are only "
                f"{', '.join(sorted(map(str, self.globals)))}"
            )
        self.stack.append(found)

    def _call(self, opcode: str) -> None:
        arguments, function = self.pop(tuple), self.pop(Global)
        self.stack.append(self.call(opcode, function, arguments))

    def _build(self) -> None:
        target, state = self.take(2)
        self.build(target, state)
        self.stack.append(target)


# Push the argument that pickletools has read.
_PUSHED = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_ACTIONS: Mapping[str, Callable[[Machine, Any], None]] = {
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), Machine._text),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine._put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), Machine._get),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "MARK": lambda machine, _: machine.stack.append(_MARK),
    "TUPLE": lambda machine, _: machine.stack.append(machine.take(None)),
    "TUPLE1": lambda machine, _: machine.stack.append(machine.take(1)),
    "TUPLE2": lambda machine, _: machine.stack.append(machine.take(2)),
    "TUPLE3": lambda machine, _: machine.stack.append(machine.take(3)),
    "SETITEM": lambda machine, _: machine._set_items(machine.take(2)),
    "SETITEMS": lambda machine, _: machine._set_items(machine.take(None)),
    "GLOBAL": lambda machine, argument: machine._global(Global(*argument.split(" ", 1))),
    "STACK_GLOBAL": lambda machine, _: machine._global(Global(*reversed((machine.pop(str), machine.pop(str))))),
    "REDUCE": lambda machine, _: machine._call("REDUCE"),
    "NEWOBJ": lambda machine, _: machine._call("NEWOBJ"),
    "BUILD": lambda machine, _: machine._build(),
    "BINPERSID": lambda machine, _: machine.stack.append(machine.persistent(machine.pop(object))),
}


def type_name(item: object) -> str:
    """Return the name of an object's type, for messages."""
    return type(item).__name__.strip("_")


MAX_PICKLE_BYTES = 2 * 1024 * 1024
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
    """Interpret the `data.pkl` of a PyTorch archive, the pickle of a state dict: a description of each tensor, by name.

    Sizes are bounded before anything of that size is made: 2 MiB describe 10,000 tensors. Raises CheckpointError,
    naming `source`, for everything else.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{source} describes its tensors in {len(data)} bytes; at most {MAX_PICKLE_BYTES} do it")
    content = _StateDict(data, source).run()
    if not isinstance(content, dict) or not all(isinstance(value, TensorDescription) for value in content.values()):
        kinds = {type_name(value) for value in content.values()} if isinstance(content, dict) else set()
        found = f"a dict with values of type {', '.join(sorted(kinds))}" if kinds else type_name(content)
        raise CheckpointError(f"{source} does not hold a state dict (tensors by name), but {found}")
    return content


class _StateDict(Machine):
    globals = frozenset((_REBUILD, _PARAMETER, _ORDERED, *(Global("torch", name) for name in STORAGES)))
    longest_text = 1_000  # a name
    most_instructions = 1_000_000
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


MAX_FILE_BYTES = 64 * 1024 * 1024  # 15 times the need of the largest public vocabulary (200 thousand tokens)
PROTOCOLS = range(2, 6)
STATE_KEYS = ("name", "pat_str", "mergeable_ranks", "special_tokens")


@dataclass(frozen=True)
class EncodingData:
    """The fields of a tiktoken `Encoding`. Types are checked; whether the ids fit together is not."""

    name: str
    pat_str: str
    mergeable_ranks: dict[bytes, int]
    special_tokens: dict[str, int]


# The object itself, and how protocol 2 spells a bytes literal: _codecs.encode(text, 'latin1').
_ENCODING, _ENCODE = Global("tiktoken.core", "Encoding"), Global("_codecs", "encode")


class _Object:
    """The `Encoding` under construction: no type of its own, only the state that BUILD brings."""

    state: object = None


def read_encoding(path: Path, limit: int | None = None) -> EncodingData:
    """Read the tiktoken `Encoding` pickled in a file of at most `limit` bytes (None: `MAX_FILE_BYTES`); run nothing."""
    return parse_encoding(read_bytes(path, "the tokenizer", CheckpointError, limit or MAX_FILE_BYTES), str(path))


def parse_encoding(data: bytes, source: str) -> EncodingData:
    """Read a pickled `Encoding` from bytes; `source` names them in errors."""
    if len(data) < 2 or data[0] != 0x80 or data[1] not in PROTOCOLS:
        raise CheckpointError(
            f"{source} does not begin as a pickle of protocol 2 to 5 (found the bytes {data[:2]!r}); the authors' "
            "training code writes protocol 4. Take the tokenizer.pkl that training wrote"
        )
    return _validated(_Encoding(data, source).run(), source)


class _Encoding(Machine):
    globals = frozenset((_ENCODING, _ENCODE))
    key_types = (str, bytes)
    longest_text = MAX_FILE_BYTES
    most_instructions = 2_000_000  # twice the need of that vocabulary
    contents = (
        "Expected nothing but a pickled tiktoken Encoding, as the authors' training code writes it; do not open this "
        "file with pickle"
    )

    def __init__(self, data: bytes, source: str) -> None:
        super().__init__(data, source)
        self._encodable_chars = len(data)  # an honest file spells out every text that it encodes

    def call(self, opcode: str, function: Global, arguments: tuple[object, ...]) -> object:
        """Begin an `Encoding`, which takes no arguments here, or make a bytes literal of protocol 2."""
        if (opcode, function, arguments) == ("NEWOBJ", _ENCODING, ()):
            return _Object()
        if (opcode, function, arguments[1:]) != ("REDUCE", _ENCODE, ("latin1",)) or type(arguments[0]) is not str:
            self.refuse(
                f"calls {function} with {len(arguments)} arguments; known are only a new {_ENCODING} with none and "
                f"{_ENCODE} with a text and 'latin1'"
            )
        self._encodable_chars -= len(arguments[0])
        if self._encodable_chars < 0:
            self.refuse("encodes the same text again and again")
        return arguments[0].encode("latin1")

    def build(self, target: object, state: object) -> None:
        """Give the `Encoding` its state, once."""
        if not isinstance(target, _Object):
            self.refuse(f"sets attributes of a {type_name(target)}")
        if target.state is not None:
            self.refuse("sets the state of one object twice")
        target.state = state


def _validated(result: object, source: str) -> EncodingData:
    state = result.state if isinstance(result, _Object) else None
    if isinstance(state, str):
        raise CheckpointError(
            f"{source} holds only the name {state[:100]!a} of an encoding that tiktoken downloads by itself, not "
            "the tokens. Write the tokens out: a tokenizer.json for this folder, or an Encoding of a name of your own"
        )
    if not isinstance(state, dict) or set(state) != set(STATE_KEYS):
        found = "other keys" if isinstance(state, dict) else f"only the type {type_name(state or result)}"
        raise CheckpointError(f"{source} holds {found}; a tiktoken Encoding has {', '.join(STATE_KEYS)}")
    if problem := next(_problems(state), None):
        raise CheckpointError(f"{source}: {problem}; tiktoken would not take it either. The file is damaged")
    return EncodingData(**state)


def _problems(state: dict[str, Any]) -> Iterator[str]:
    for key in ("name", "pat_str"):
        if not is_text(state[key]):
            yield f"{key} is a {type_name(state[key])}, expected valid Unicode text"
    for key, kind in (("mergeable_ranks", bytes), ("special_tokens", str)):
        if type(table := state[key]) is not dict:
            yield f"{key} is a {type_name(table)}, expected a dict"
        for token, rank in table.items():
            if type(token) is not kind or (kind is str and not is_text(token)):
                yield f"{key} has the token {token[:100]!a}, expected {kind.__name__}"
            if type(rank) is not int or not 0 <= rank < 2**31:
                shown = str(rank) if type(rank) is int else f"of type {type_name(rank)}"
                yield f"{key}[{token[:100]!a}] is {shown}, expected a whole number from 0 to 2**31 - 1"


def is_text(value: object) -> bool:
    """Return whether it is a str without lone surrogates, which pickle can carry and Unicode cannot."""
    try:
        return type(value) is str and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False
