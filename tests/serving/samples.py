"""Files that clients send: images and pickles, as different programs write them."""

import io
import pickle
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


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
