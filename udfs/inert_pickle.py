"""A pickle -> plain containers, read as data: nothing that it names is looked up, imported, called or set.

A pickle is a program for a small stack machine, two of whose instructions import and call. The machine here has its
instructions from the standard library's list of them (pickletools), and knows containers, numbers, text, and the few names
that the caller says how to take. Every other name, and whatever is made by calling it, is a `Foreign` thing that does nothing.
What cannot be there but to run something (os.system, eval) is refused outright, and so is what would cost memory or time
without end.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

STEPS = 1_000_000  # instructions: a byte of one may make an object of 200; a ViT-L with its optimizer has some ten thousand
LARGE = 2**60  # whole numbers from here on may be chosen to have one hash: as keys they would take quadratic time
COPIED = 1_000_000  # items that containers are made from, in all: a pickle may copy one long list again and again
# names that stand in no honest file of data: the alarm, not the lock
ALARM = re.compile(
    r"(os|posix|nt|subprocess|sys|pty|shutil|socket|importlib|runpy|ctypes|_ctypes|code|codeop|webbrowser|commands|pickle|_pickle|marshal)\..*"
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|open|input|breakpoint|__import__)"
)
CONTAINERS = {f"{module}.{kind.__name__}": kind for module in ("builtins", "__builtin__") for kind in (frozenset, list, set, tuple)}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "  # noqa: SIM905
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)


class Named(NamedTuple):
    """A class or function that a pickle names; it was not looked up."""

    name: str


class Foreign(NamedTuple):
    """An object that a pickle makes by a name that is not known here: it was not made."""

    name: str


class Refused(Exception):
    """The message says what the pickle holds that it must not."""


def load(pickled: bytes, calls: Mapping[str, Callable[..., object]], persistent: Callable[[Any], object]) -> tuple[Any, list[str]]:
    """-> (the object, the names that were not known). Raises Refused.

    calls: name -> what makes the object, of the arguments that the pickle gives; persistent: what a reference to something
    outside of the pickle stands for.
    """
    machine = _Machine(calls, persistent)
    try:
        return machine.run(pickled), sorted(machine.unknown)
    # whatever a broken pickle makes the machine stumble over
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise Refused(f"no whole pickle of data ({type(error).__name__}: {str(error)[:200]})") from None


class _Machine:
    def __init__(self, calls: Mapping[str, Callable[..., object]], persistent: Callable[[Any], object]) -> None:
        self._calls, self._persistent = calls, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._copied = 0
        self.unknown: set[str] = set()

    def run(self, pickled: bytes) -> Any:
        for step, (opcode, argument, place) in enumerate(pickletools.genops(pickled)):
            if step >= STEPS:
                raise Refused(f"it has more than {STEPS} instructions")
            if opcode.name in VALUES:
                self._stack.append(argument)
            elif opcode.name in CONSTANTS:
                self._stack.append(CONSTANTS[opcode.name]())
            elif (act := getattr(self, f"_{opcode.name.lower()}", None)) is not None:
                act(argument)
            elif opcode.name not in ("PROTO", "FRAME", "STOP"):
                raise Refused(f"the instruction {opcode.name} at byte {place}, which no file of data needs")
        return self._stack[-1]  # genops ends at STOP, or raises

    # the stack and the memo

    def _mark(self, _: object) -> None:
        self._marks.append(len(self._stack))

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _pop(self, _: object) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _pop_mark(self, _: object) -> None:
        self._since_mark()

    def _dup(self, _: object) -> None:
        self._stack.append(self._stack[-1])

    def _put(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: object) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, number: int) -> None:
        self._stack.append(self._memo[number])

    _binget = _long_binget = _get

    # containers

    def _tuple(self, _: object) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _tuple1(self, _: object) -> None:
        self._stack[-1:] = [tuple(self._stack[-1:])]

    def _tuple2(self, _: object) -> None:
        self._stack[-2:] = [tuple(self._stack[-2:])]

    def _tuple3(self, _: object) -> None:
        self._stack[-3:] = [tuple(self._stack[-3:])]

    def _list(self, _: object) -> None:
        self._stack.append(self._since_mark())

    def _dict(self, _: object) -> None:
        items = self._since_mark()
        self._stack.append({})
        self._set(items)

    def _frozenset(self, _: object) -> None:
        self._stack.append(frozenset(_hashable(self._since_mark())))

    def _append(self, _: object) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: object) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not Foreign:
            _of(list, self._stack[-1]).extend(items)

    def _setitem(self, _: object) -> None:
        value = self._stack.pop()
        self._set([self._stack.pop(), value])

    def _setitems(self, _: object) -> None:
        self._set(self._since_mark())

    def _set(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not Foreign:
            _of(dict, self._stack[-1]).update(zip(_hashable(items[::2]), items[1::2], strict=True))

    def _additems(self, _: object) -> None:
        items = self._since_mark()
        if type(self._stack[-1]) is not Foreign:
            _of(set, self._stack[-1]).update(_hashable(items))

    # names and what is made by them

    def _global(self, named: str) -> None:
        """pickletools gives module and name with a blank between."""
        name = named.replace(" ", ".")
        if ALARM.fullmatch(name):
            raise Refused(f"it asks for {name}, which no file of data needs: the file means to run code; delete it")
        if name not in self._calls and name not in CONTAINERS:
            self.unknown.add(name)
        self._stack.append(Named(name))

    def _stack_global(self, _: object) -> None:
        name, module = _of(str, self._stack.pop()), _of(str, self._stack.pop())
        self._global(f"{module} {name}")

    def _binpersid(self, _: object) -> None:
        self._stack.append(self._persistent(self._stack.pop()))

    def _reduce(self, _: object) -> None:
        arguments, called = _of(tuple, self._stack.pop()), self._stack.pop()
        if type(called) not in (Named, Foreign):
            raise Refused(f"it calls a {type(called).__name__}")
        if type(called) is Named and called.name in self._calls:
            made = self._calls[called.name](*arguments)
        elif type(called) is Named and called.name in CONTAINERS:
            made = self._container(CONTAINERS[called.name], *arguments)
        else:
            made = Foreign(called.name)
        self._stack.append(made)

    def _newobj(self, _: object) -> None:
        self._reduce(None)

    def _newobj_ex(self, _: object) -> None:
        self._stack.pop()  # keywords
        self._reduce(None)

    def _build(self, _: object) -> None:
        """The state of an object, such as a state dict's _metadata: dropped."""
        self._stack.pop()

    def _container(self, kind: type, items: Sequence[Any] = ()) -> Any:
        self._copied += len(items)
        if self._copied > COPIED:
            raise Refused(f"it makes containers from more than {COPIED} items")
        return kind(_hashable(items) if kind in (set, frozenset) else items)


def _hashable(keys: Iterable[Any]) -> list[Any]:
    """Keys that are hashed at once: tuples in tuples can take as long as they like, or overflow the C stack."""
    told = list(keys)
    for key in told:
        for one in key if type(key) is tuple else (key,):
            if type(one) not in (str, int, float, bool, bytes, type(None), Named, Foreign):
                raise Refused(f"it has a key of type {type(one).__name__}")
            if type(one) is int and abs(one) >= LARGE:
                raise Refused(f"it has a key of {one.bit_length()} bits")
    return told


def _of(kind: type, thing: Any) -> Any:
    if type(thing) is not kind:
        raise Refused(f"a {type(thing).__name__} stands where a {kind.__name__} belongs")
    return thing
