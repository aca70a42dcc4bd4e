"""Files that clients send: images and pickles, as different programs and attackers write them."""

import collections
import datetime
import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tests.serving.corpus.make import Call


def encoded(pixels: npt.NDArray[np.uint8], kind: str = "PNG", **options: Any) -> bytes:
    """An image file of uint8 [height, width, 3] pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


PurePickler: Any = pickle._Pickler  # in Python, so that what it writes can be changed


class OldPickler(PurePickler):  # type: ignore[misc]
    """Writes pickles as NumPy 1 did."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """Name a NumPy function by the module it had in NumPy 1."""
        module = getattr(obj, "__module__", None) or ""
        if not module.startswith("numpy._core"):
            super().save_global(obj, name)
            return
        module = module.replace("numpy._core", "numpy.core")
        if self.proto >= 4:
            self.save(module)
            self.save(obj.__name__)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(b"c" + module.encode() + b"\n" + obj.__name__.encode() + b"\n")
        self.memoize(obj)

    def save_picklebuffer(self, buffer: pickle.PickleBuffer) -> None:
        """Write an array's bytes as an object of their own.

        Python's own method takes an empty bytearray and every `b""` for the same object, so that what
        it writes cannot be read if that is a key.
        """
        with buffer.raw() as content:
            self.save(bytes(content) if content.readonly else bytearray(content))

    dispatch = PurePickler.dispatch | {pickle.PickleBuffer: save_picklebuffer}


class Python2Pickler(OldPickler):
    """Writes bytes as Python 2 wrote a str."""

    def save_str(self, text: bytes) -> None:
        """Write a Python 2 str."""
        self.write(b"T" + struct.pack("<i", len(text)) + text)
        self.memoize(text)

    dispatch = OldPickler.dispatch | {bytes: save_str}


def pickled(content: Any, protocol: int = 4, *, old: bool = False, python2: bool = False) -> bytes:
    """A pickle as of this Python and NumPy, NumPy 1 (`old`), or Python 2 with NumPy 1 (`python2`)."""
    if not old and not python2:
        return pickle.dumps(content, protocol)
    buffer = io.BytesIO()
    (Python2Pickler if python2 else OldPickler)(buffer, protocol).dump(content)
    return buffer.getvalue()


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal and have equal types, also inside and in arrays."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        native = [array.dtype.newbyteorder("=") for array in (a, b)]  # NumPy itself converts to it
        return native[0] == native[1] and np.array_equal(a, b)
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# What must be refused. If anything in these ran, a file `ran` would appear.


class Stateful:
    def __init__(self) -> None:
        self.x = 1


COMMAND = "touch ran"
EVIL = {
    "os.system": pickle.dumps(Call(os.system, COMMAND)),
    "os.system, protocol 2": pickle.dumps(Call(os.system, COMMAND), 2),
    "eval": pickle.dumps(Call(eval, f"__import__('os').system({COMMAND!r})")),
    "inside data": pickle.dumps({"data": [Call(os.system, COMMAND)]}),
    "instance": pickle.dumps(Stateful()),
    "Path": pickle.dumps(Path("ran")),
    "date": pickle.dumps(datetime.date(2020, 1, 1)),
    "set": pickle.dumps({1, 2}),
    "ordered dict": pickle.dumps(collections.OrderedDict(a=1)),
    "defaultdict": pickle.dumps(collections.defaultdict(list)),
    "object array": pickle.dumps(np.array([Call(os.system, COMMAND)], object)),
    "text array": pickle.dumps(np.array(["a", "b"])),
    "structured array": pickle.dumps(np.zeros(2, [("a", "u1"), ("b", "i8")])),
    "masked array": pickle.dumps(np.ma.masked_array([1, 2], [False, True])),
    "datetime array": pickle.dumps(np.array(["2020-01-01"], "M8[D]")),
    "complex array": pickle.dumps(np.zeros(2, complex)),
    "nested global": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.tofile.x\x93.",
    "dtype attribute": b"\x80\x04\x8c\x05numpy\x8c\x0bdtype.mro\x93.",
    "INST": b"\x80\x02(X\x09\x00\x00\x00touch ranios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\nX\x09\x00\x00\x00touch rano.",
    "NEWOBJ": b"\x80\x02cnumpy\nndarray\n(K\x02t\x81.",
    "NEWOBJ_EX": b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93(K\x02t}\x92.",
    "PERSID": b"\x80\x02Pran\n.",
    "BINPERSID": b"\x80\x02X\x03\x00\x00\x00ranQ.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "BUILD on a dict": b"\x80\x02}}b.",
    "BUILD on a global": b"\x80\x02cnumpy\nndarray\n}b.",
    "BUILD with a slot state": b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R}}\x86b.",
    "REDUCE of a string": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "REDUCE of a result": b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R)R.",
    "REDUCE of ndarray": b"\x80\x02cnumpy\nndarray\nK\x02\x85R.",
    "encode with another codec": b"\x80\x02c_codecs\nencode\n"
    b"X\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.",
    "bytes of a number": b"\x80\x02c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.",
    "subclass for reconstruct": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n"
    b"cnumpy\ndtype\nK\x00\x85C\x01b\x87R.",
}
