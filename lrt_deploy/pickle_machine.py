"""Interpret a pickle of plain data without running pickle: the stack, the memo, and a few instructions.

`text.tiktoken_pickle` (a tokenizer) and `model.tensor_pickle` (a state dict) build on it. Names of globals are text;
nothing is ever imported, looked up or called.

Not an allow-list `pickle.Unpickler` after a scan of the opcodes: with the opcodes of real files alone, 140 bytes of
tuples that share parts through the memo hang it in `hash`, 400 kB of integer keys with equal hashes take 12 seconds,
and a 1 MB tuple of nested tuples as a key kills the interpreter.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar

from .errors import CheckpointError

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
    contents: ClassVar[str]

    def __init__(self, data: bytes, source: str, most_instructions: int) -> None:
        self.stack: list[object] = []
        self._data, self._source, self._most = data, source, most_instructions
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
            if count >= self._most:
                self.refuse(f"has more than {self._most} instructions")
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
