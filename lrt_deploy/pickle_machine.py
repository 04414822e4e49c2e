"""The stack and the memo of a pickle, interpreted without running pickle.

What the readers of two kinds of files share: `pickles` (a tokenizer) and `tensor_pickle` (a state dict). Each adds the
few instructions that its files need. Names of globals are text; nothing is ever imported, looked up or called.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn, TypeVar

_T = TypeVar("_T")


class _Mark:
    """The start of a run of stack items."""


_MARK = _Mark()
_IGNORED = {"PROTO", "FRAME", "STOP"}


class Machine:
    """Interprets the instructions in `literals`, which push one value, and `actions`; every other one is refused.

    A reader sets `too_many`, `no_other` and `its_end`, which complete the messages about instructions and the end.
    """

    literals: ClassVar[Mapping[str, Callable[[Any], object]]] = {
        **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), lambda arg: arg),
        "NONE": lambda _: None,
        "NEWTRUE": lambda _: True,
        "NEWFALSE": lambda _: False,
        "EMPTY_TUPLE": lambda _: (),
        "EMPTY_DICT": lambda _: {},
        "MARK": lambda _: _MARK,
    }
    actions: ClassVar[Mapping[str, Callable[[Any, Any], None]]] = {
        **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), lambda machine, index: machine.put(index)),
        **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, index: machine.get(index)),
        "TUPLE": lambda machine, _: machine.stack.append(machine.take(None)),
        "TUPLE1": lambda machine, _: machine.stack.append(machine.take(1)),
        "TUPLE2": lambda machine, _: machine.stack.append(machine.take(2)),
        "TUPLE3": lambda machine, _: machine.stack.append(machine.take(3)),
        "SETITEM": lambda machine, _: machine.set_items(machine.take(2)),
        "SETITEMS": lambda machine, _: machine.set_items(machine.take(None)),
        "GLOBAL": lambda machine, arg: machine.push_global(*arg.split(" ", 1)),
        "STACK_GLOBAL": lambda machine, _: machine.push_named_global(),
    }
    too_many: ClassVar[str]
    no_other: ClassVar[str]
    its_end: ClassVar[str]

    def __init__(self, data: bytes, source: str, most_instructions: int) -> None:
        self.stack: list[object] = []
        self.data, self.source = data, source
        self._most_instructions = most_instructions
        self._memo: dict[int, object] = {}

    def run(self) -> object:
        """Interpret to STOP; return the one object left on the stack."""
        end = 0
        for count, (opcode, arg, position) in enumerate(pickletools.genops(self.data)):
            if count >= self._most_instructions:
                self.refuse(f"has more than {self._most_instructions} instructions{self.too_many}")
            if opcode.name in self.literals:
                self.stack.append(self.literals[opcode.name](arg))
            elif opcode.name in self.actions:
                self.actions[opcode.name](self, arg)
            elif opcode.name not in _IGNORED:
                self.refuse(f"holds the {self.no_other.format(opcode.name)}")
            end = (position or 0) + 1
        if trailing := len(self.data) - end:
            self.refuse(f"has {trailing} bytes after {self.its_end}")
        result = self.pop(object)
        if self.stack:
            self.refuse(f"leaves {len(self.stack)} unused items behind")
        return result

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
        """Take the topmost items in the order in which they were pushed: so many, or all since the last mark."""
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

    def pop(self, kind: type[_T]) -> _T:
        """Take the top of the stack, which must be of this type."""
        (item,) = self.take(1)
        if not isinstance(item, kind):
            self.refuse(f"has a {type_name(item)} where a {kind.__name__.strip('_')} belongs")
        return item

    def set_items(self, items: tuple[object, ...]) -> None:
        """Put keys and values, in turns, into the dict below them; which keys are accepted is the reader's to say."""
        raise NotImplementedError

    def push_global(self, module: str, name: str) -> None:
        """Push the name of a global that the reader knows, and refuse every other one."""
        raise NotImplementedError

    def push_named_global(self) -> None:
        """As `push_global`, with the names on the stack."""
        name, module = self.pop(str), self.pop(str)
        self.push_global(module, name)

    def refuse(self, what: str) -> NoReturn:
        """Raise the reader's error, which says what was found."""
        raise NotImplementedError


def type_name(item: object) -> str:
    """The name of an object's type, for messages."""
    return type(item).__name__.strip("_")
