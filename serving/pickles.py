"""Read a pickle as data: plain values and NumPy arrays of numbers, and nothing else.

`pickle` is not used at all. The opcodes' arguments are read by the standard library's `pickletools`, and
a small stack machine follows those that build plain data. The few globals that NumPy writes
(`_reconstruct`, `dtype`, ...) are names in a table here; none is ever looked up or called, so
there is nothing that a file could execute. An opcode or a name that is not in the tables ends
the reading.

Memory stays in proportion to the file: a payload is never read past the end of the file, an array is a
view of bytes that are there (its declared shape must fit them exactly), a long text has one byte per
character, and the number of opcodes is limited.
"""

import math
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from serving.errors import PickleError

OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
PROTOCOLS = range(2, 6)
RIGHT = "right would be what `pickle.dump(..., protocol=4)` writes"
# How files begin that are sent by mistake instead of a pickle.
OTHERS = {
    b"\x1f\x8b": "is packed by gzip",
    b"PK\3\4": "is a zip archive, as those of numpy.savez and torch.save are",
    b"\x93NUMPY": "is an array that numpy.save has written",
    b"BZh": "is packed by bzip2",
    b"\xfd7zXZ": "is packed by xz",
}
SHOWN = 20  # bytes in an error message of a text that is sent instead of a pickle
TEXT = re.compile(rb"[\t\n\r -~]+")
MAX_OPCODES = 400_000  # twenty for each of the 20,000 rows that the settings allow by default
MAX_LINE = 512  # bytes of an argument that is a line: the module or the name of a global
MAX_DIMENSIONS = 32
# Longer ones are the bytes of arrays in protocol 2. Other characters would take four times the file's
# size in memory.
MAX_TEXT = 2**16  # bytes of a text that has characters beyond Latin-1
TEXTS = {"SHORT_BINUNICODE": "<B", "BINUNICODE": "<I", "BINUNICODE8": "<Q"}  # and their length's format
LATIN_1 = 0xC3  # the highest byte that Latin-1's characters have in UTF-8
INT_KEYS = range(-(2**31), 2**31)  # larger ones could be chosen to collide in a dict

NUMBERS = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})

# The globals that NumPy 1 and 2 and Python 2 and 3 write for an array, a NumPy scalar or bytes.
SYMBOLS = {
    (f"{package}.{module}", name): symbol
    for package in ("numpy.core", "numpy._core")
    for module, name, symbol in (
        ("multiarray", "_reconstruct", "reconstruct"),
        ("multiarray", "scalar", "scalar"),
        ("numeric", "_frombuffer", "frombuffer"),
    )
} | {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
    ("__builtin__", "bytes"): "bytes",
    ("builtins", "bytes"): "bytes",
}


@dataclass(frozen=True)
class _Symbol:
    name: str


@dataclass
class _DType:
    kind: str
    byte_order: str = "|"

    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.byte_order + self.kind)


class _Empty:
    """What `_reconstruct` makes; BUILD replaces it by the array, on the stack and in the memo."""

    def __init__(self) -> None:
        self.memo_indices: list[int] = []


class _Parts(tuple[Any, ...]):
    """A tuple that has parts of an array in it, such as the arguments of a call."""


PARTS = _Symbol | _DType | _Empty | _Parts

_MARK = object()


def read_pickle(file: IO[bytes]) -> Any:
    """Read the one value in a pickle of protocol 2 to 5.

    Args:
        file: a seekable binary file.

    Returns:
        None, bool, int, float, str, bytes, bytearray, list, tuple, dict (keys str, bytes or int) and
        `np.ndarray` of bool, integers or floats, nested as in the file. Python 2's str is bytes.
        Arrays are read-only views of the file's bytes.

    Raises:
        PickleError: the file is not such a pickle, is truncated, or holds anything else.
    """
    source = _Source(file)
    source.check_start()
    machine = _Machine(source.size)
    try:
        while not machine.stopped:
            machine.step(*source.opcode())
    except PickleError as error:
        raise PickleError(f"{error} (Found at byte {source.tell()}; nothing was run.)") from None
    except (ValueError, OverflowError, struct.error) as error:
        # pickletools: a malformed argument or the end of the file
        detail = str(error)[:200]
        raise PickleError(f"The pickle is damaged at byte {source.tell()}: {detail}.") from None
    return machine.result


class _Source:
    """A file that refuses to read past its end, whatever length an opcode claims."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = file.seek(0, 2)
        self._position = file.seek(0)
        self._frame_end = 0

    def check_start(self) -> None:
        start = self._file.read(SHOWN)
        self._file.seek(0)
        if not start:
            raise PickleError("The file is empty (0 bytes); send a pickle.")
        for begin, what in OTHERS.items():
            if start.startswith(begin):
                raise PickleError(f"The file {what}; {RIGHT}.")
        if start[:1] != b"\x80" or len(start) == 1 or start[1] not in PROTOCOLS:
            text = f" but text, which begins {start.decode()!r}" if TEXT.fullmatch(start) else ""
            raise PickleError(f"The file is not a pickle of protocol 2 to 5{text}; {RIGHT}.")

    def tell(self) -> int:
        return self._position

    def _check_left(self, count: int) -> None:
        if count > self.size - self._position:
            raise PickleError(
                f"The pickle is truncated: {count} bytes are announced, "
                f"{self.size - self._position} are left."
            )

    def read(self, count: int) -> bytes:
        self._check_left(count)
        self._advance(count)
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline(MAX_LINE)
        self._advance(len(line))
        return line

    def opcode(self) -> tuple[str, Any]:
        """Read the next opcode: its name, which is a key of `_STEPS`, and its argument."""
        if self._position == self.size:
            raise PickleError("The pickle is truncated: it ends without a STOP.")
        code = self.read(1)
        opcode = OPCODES.get(code)
        if opcode is None:
            raise ValueError(f"there is no opcode {code!r}")
        name = opcode.name
        if name not in _STEPS:
            raise PickleError(f"The opcode {name} builds more than plain data and is not allowed.")
        if name in TEXTS:
            return name, self._text(TEXTS[name])
        # The readers only call methods that this class has too.
        argument = None if opcode.arg is None else opcode.arg.reader(cast(IO[bytes], self))
        if name == "FRAME":
            self._begin_frame(cast(int, argument))
        return name, argument

    def _begin_frame(self, count: int) -> None:
        if self._position < self._frame_end:
            raise PickleError("The pickle begins a frame within a frame.")
        self._check_left(count)
        self._frame_end = self._position + count

    def _advance(self, count: int) -> None:
        start, self._position = self._position, self._position + count
        if start < self._frame_end < self._position:  # in this case pickle's own readers differ
            raise PickleError("The pickle has a value that goes on behind the end of its frame.")

    def _text(self, length: str) -> str:
        (count,) = struct.unpack(length, self.read(struct.calcsize(length)))
        encoded = self.read(count)
        if count > MAX_TEXT and np.frombuffer(encoded, np.uint8).max() > LATIN_1:
            raise PickleError(f"A text of {count} bytes has characters beyond Latin-1.")
        return str(encoded, "utf-8", "surrogatepass")


class _Machine:
    """The stack machine; one method per group of opcodes, looked up in `_STEPS`."""

    def __init__(self, budget: int) -> None:
        self.result: Any = None
        self.stopped = False
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._opcodes = 0
        # `encode` copies; without a budget a few bytes could ask for the same copy many times.
        self._budget = budget

    def step(self, name: str, argument: Any) -> None:
        self._opcodes += 1
        if self._opcodes > MAX_OPCODES:
            raise PickleError(
                f"The pickle has more than {MAX_OPCODES} opcodes; right would be images in a NumPy "
                "array, which takes few, and not in lists of numbers."
            )
        _STEPS[name](self, argument)

    def protocol(self, number: int) -> None:
        if number not in PROTOCOLS:
            raise PickleError(f"The pickle changes to protocol {number}; right would be 2 to 5.")

    # Values and the stack

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def string(self, text: str) -> None:
        self.push(text.encode("latin-1"))  # pickletools decodes a Python 2 str as Latin-1

    def pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise PickleError("The pickle takes a value from an empty stack.")
        return self._stack.pop()

    def pop_to_mark(self) -> list[Any]:
        values: list[Any] = []
        while self._stack:
            value = self._stack.pop()
            if value is _MARK:
                return values[::-1]
            values.append(value)
        raise PickleError("The pickle lacks a MARK.")

    def push_tuple(self, values: list[Any]) -> None:
        kind = _Parts if any(isinstance(value, PARTS) for value in values) else tuple
        self.push(kind(values))

    def tuple_of(self, count: int) -> None:
        self.push_tuple([self.pop() for _ in range(count)][::-1])

    def top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise PickleError(f"The pickle adds to something that is not a {kind.__name__}.")
        return self._stack[-1]

    def append(self, values: list[Any]) -> None:
        self.top(list).extend(map(_finished, values))

    def set_items(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise PickleError("The pickle has a dict key without a value.")
        target = self.top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not (type(key) in (str, bytes) or (type(key) is int and key in INT_KEYS)):
                raise PickleError(
                    f"A dict key is of type {type(key).__name__}; keys must be str, bytes or small ints."
                )
            target[key] = _finished(value)

    def stop(self) -> None:
        self.result = _finished(self.pop())
        self.stopped = True

    # The memo

    def remember(self, index: int) -> None:
        value = self.pop()
        if isinstance(value, _Empty):
            value.memo_indices.append(index)
        self._memo[index] = value
        self.push(value)

    def memoize(self) -> None:
        self.remember(len(self._memo))

    def recall(self, index: int) -> None:
        if index not in self._memo:
            raise PickleError("The pickle refers to a value that it has not stored.")
        self.push(self._memo[index])

    # Arrays

    def name(self, module: Any, name: Any) -> None:
        # Anything but text is never shown: a small pickle can nest tuples whose text would be endless.
        if not (isinstance(module, str) and isinstance(name, str)):
            raise PickleError("The pickle names something by values that are not text.")
        symbol = SYMBOLS.get((module, name))
        if symbol is None:
            shown = f"{module}.{name}"[:100]
            raise PickleError(
                f"The pickle names {shown!r}; only NumPy arrays of numbers and plain data "
                "(dict, list, tuple, str, bytes, numbers) are allowed."
            )
        self.push(_Symbol(symbol))

    def reduce(self) -> None:
        match self.pop(), self.pop():
            case (_Symbol("ndarray"), (0,), b"b" | "b"), _Symbol("reconstruct"):
                self.push(_Empty())
            case (str() | bytes() as kind, *_), _Symbol("dtype"):
                self.push(_dtype(kind))
            case (buffer, _DType() as dtype, shape, ("C" | "F") as order), _Symbol("frombuffer"):
                self.push(_array(buffer, dtype, shape, order))
            case (buffer, _DType() as dtype, shape, "K", axes), _Symbol("frombuffer"):
                self.push(_transposed(_array(buffer, dtype, shape, "C"), axes))
            case (_DType() as dtype, bytes() as buffer), _Symbol("scalar"):
                self.push(_array(buffer, dtype, (), "C").item())
            case (str() as text, "latin1" | "latin-1"), _Symbol("encode"):
                self.push(self._encoded(text))
            case (), _Symbol("bytes"):
                self.push(b"")
            case _, _Symbol(name):
                raise PickleError(f"The arguments of {name} are not those that NumPy writes.")
            case _:
                raise PickleError("The pickle calls something that is not a name of NumPy's.")

    def _encoded(self, text: str) -> bytes:
        self._budget -= len(text)
        if self._budget < 0:
            raise PickleError("The pickle asks for more bytes than it holds.")
        return text.encode("latin-1")

    def build(self) -> None:
        match self.pop(), self._stack[-1] if self._stack else None:
            case (1, shape, _DType() as dtype, bool() as fortran, buffer), _Empty() as empty:
                array = _array(buffer, dtype, shape, "F" if fortran else "C")
                self._stack[-1] = array
                self._memo.update(dict.fromkeys(empty.memo_indices, array))
                empty.memo_indices.clear()
            case (3, str() | bytes() as order, None, None, None, -1, -1, 0), _DType() as dtype:
                dtype.byte_order = _byte_order(order)
            case _:
                raise PickleError("The pickle sets a state that is not one of an array of numbers.")


def _finished(value: Any) -> Any:
    """Return a value that may be in the result; raise `PickleError` for a mere part of an array."""
    if isinstance(value, PARTS):
        raise PickleError("The pickle holds a name, a dtype or an unfinished array as a value.")
    return value


def _dtype(kind: str | bytes) -> _DType:
    text = kind.decode("latin-1") if isinstance(kind, bytes) else kind
    if text not in NUMBERS:
        raise PickleError(
            f"An array has the dtype {text[:20]!r}; only booleans, integers and floats are allowed."
        )
    return _DType(text)


def _byte_order(order: str | bytes) -> str:
    text = order.decode("latin-1") if isinstance(order, bytes) else order
    if text not in ("<", ">", "|", "="):
        raise PickleError(f"An array has the byte order {text[:20]!r}, which does not exist.")
    return text


def _array(buffer: Any, dtype: _DType, shape: Any, order: Literal["C", "F"]) -> npt.NDArray[Any]:
    """Return an array that is a view of the bytes, which must fill it exactly; it allocates nothing."""
    if not isinstance(buffer, bytes | bytearray):
        raise PickleError(f"An array's contents are a {type(buffer).__name__}, not bytes.")
    if not (
        isinstance(shape, tuple)
        and len(shape) <= MAX_DIMENSIONS
        and all(type(extent) is int and 0 <= extent < 2**31 for extent in shape)
    ):
        raise PickleError(
            f"An array's shape is not a tuple of at most {MAX_DIMENSIONS} natural numbers."
        )
    kind = dtype.dtype()
    wanted = math.prod(shape, start=kind.itemsize)
    if wanted != len(buffer):
        raise PickleError(
            f"An array of shape {shape} and dtype {kind} has {wanted} bytes, "
            f"the pickle holds {len(buffer)} for it."
        )
    array = np.frombuffer(buffer, kind).reshape(shape, order=order)
    array.flags.writeable = False
    return array


def _transposed(array: npt.NDArray[Any], axes: Any) -> npt.NDArray[Any]:
    if not (
        isinstance(axes, tuple)
        and all(type(axis) is int for axis in axes)
        and sorted(axes) == list(range(array.ndim))
    ):
        raise PickleError("An array's order of axes is not a permutation of them.")
    return array.transpose(axes)


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.protocol,
    "FRAME": lambda machine, _: None,  # `_Source` has dealt with it
    "STOP": lambda machine, _: machine.stop(),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(
        (
            *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
            *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
            *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        ),
        _Machine.push,
    ),
    "SHORT_BINSTRING": _Machine.string,
    "BINSTRING": _Machine.string,
    "MARK": lambda machine, _: machine.push(_MARK),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "TUPLE": lambda machine, _: machine.push_tuple(machine.pop_to_mark()),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "MEMOIZE": lambda machine, _: machine.memoize(),
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "GLOBAL": lambda machine, names: machine.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*[machine.pop(), machine.pop()][::-1]),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
}
