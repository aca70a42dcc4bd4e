"""The competition's files: images and ids in as a pickle, labels out as CSV."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from serving.errors import PickleError, TooLargeError
from serving.pickles import read_pickle

IDS = range(-(2**63), 2**64)  # what an int64 or a uint64 can hold
LONGEST_NAME = 100  # characters of a key that a person would have written
# Images by which the order of their values is told; with fewer it would be a guess.
COMPARED = range(10, 1001)
# Keys that are probably meant to be `ids`, such as Image_ID, imageIds and index, but not valid or grid.
LIKE_IDS = re.compile(
    r"(.*[\W\d_]|image|img|sample|row|test)?(ids?|idx|index|indices)|.*[a-z](?-i:I[Dd]s?|Index)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Submission:
    """Images to label.

    Attributes:
        images: uint8 [N, 32, 32, 3], RGB, N at least 1; a view of the file's bytes with any strides.
        ids: the id of each image, all different.
    """

    images: npt.NDArray[np.uint8]
    ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.ids)

    def csv(self, labels: Sequence[int]) -> bytes:
        """Return the submission file: a header and a line per image in file order, with LF line ends."""
        rows = zip(self.ids, labels, strict=True)
        return "".join(["ID,Labels\n", *(f"{id_},{label}\n" for id_, label in rows)]).encode()


def read_submission(file: IO[bytes], max_rows: int) -> Submission:
    """Read a pickled dict with `data`, and `ids` if there are any.

    Other keys are ignored, except that without `ids` a key that seems to be meant as it is an error.

    `data` is uint8 [N, 32, 32, 3], [N, 3, 32, 32] or [N, 3072] (the three colour planes one after
    the other, as in CIFAR-10's own batches). Without `ids` the images are numbered from 0.

    Raises:
        PickleError: the file is not such a pickle.
        TooLargeError: it has more than `max_rows` images.
    """
    content = read_pickle(file)
    if not isinstance(content, dict):
        raise PickleError(
            f"The pickle holds a {type(content).__name__}; "
            "right would be a dict with the keys data and, optionally, ids."
        )
    data = _key(content, "data")
    if data is None:
        keys = ", ".join(repr(key)[:LONGEST_NAME] for key in list(content)[:10]) or "none"
        raise PickleError(
            f"The pickle's dict has no key data (of its keys the first are: {keys}); "
            "right would be data: uint8 [N, 32, 32, 3]."
        )
    images = _images(content[data])
    if len(images) > max_rows:
        raise TooLargeError(f"The pickle has {len(images)} images; the limit is {max_rows}.")
    ids = _key(content, "ids")
    if ids is None:
        _check_other_keys(content)
        return Submission(images, range(len(images)))
    return Submission(images, _ids(content[ids], len(images)))


def _key(content: dict[Any, Any], name: str) -> str | bytes | None:
    """Return the key of this name as it is there: str or, from Python 2, bytes; None if it is not."""
    found = [key for key in (name, name.encode()) if key in content]
    if len(found) > 1:
        raise PickleError(f"The pickle has {name} twice, as str and as bytes; once would be right.")
    return found[0] if found else None


def _check_other_keys(content: dict[Any, Any]) -> None:
    """Raise `PickleError` for ids under another key: the CSV would silently have row numbers instead."""
    for key in content:
        if not isinstance(key, str | bytes) or len(key) > LONGEST_NAME:
            continue
        name = key.decode(errors="replace") if isinstance(key, bytes) else key
        if LIKE_IDS.fullmatch(name):
            raise PickleError(f"The pickle's dict has the key {name!r}; right would be ids.")


def _images(data: Any) -> npt.NDArray[np.uint8]:
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        array = isinstance(data, np.ndarray)
        found = f"an array of {data.dtype}" if array else f"of type {type(data).__name__}"
        raise PickleError(f"data is {found}; right would be a NumPy array of uint8{_remedy(data)}.")
    match data.shape:
        case (0, *_):
            raise PickleError("data has no images (its first extent is 0).")
        case (_, 32, 32, 3):
            _check_order(data, in_planes=False)
            return data
        case (_, 3, 32, 32) | (_, 3072):
            _check_order(data, in_planes=True)
            return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    raise PickleError(
        f"data has the shape {list(data.shape)}; "
        "right would be [N, 32, 32, 3], [N, 3, 32, 32] or [N, 3072]."
    )


def _remedy(data: Any) -> str:
    """Tell how to turn an array that is not of uint8, or a list of arrays, into pixels."""
    if not isinstance(data, np.ndarray):
        return ": `np.asarray(data, 'uint8')`, of values from 0 to 255"
    if not data.size or data.dtype.kind not in "biuf":
        return ""
    low, high = data.min(), data.max()
    if low >= 0 and high <= 1:
        return ": `(data * 255).round().astype('uint8')`, as its values are from 0 to 1"
    if low >= 0 and high <= 255:
        return ": `data.round().astype('uint8')`"
    return f", with the pixels as they were, from 0 to 255, while these are from {low:g} to {high:g}"


def _check_order(data: npt.NDArray[np.uint8], *, in_planes: bool) -> None:
    """Raise `PickleError` if images have been reshaped where they had to be transposed.

    In a picture, a pixel is most like the one below it, which is 32 values further where each colour
    has a plane of its own, and 96 where a pixel's three colours are side by side. Measured at the right
    distance, CIFAR-10's images differ by less than 0.6 of what they do at the wrong one (ten by ten in
    their order; one by one, by less than 1.1 of it).
    """
    rows = data[: COMPARED[-1]].reshape(-1, 3072).astype(np.int16)
    if len(rows) not in COMPARED:
        return
    plane, pixel = (np.abs(rows[:, step:] - rows[:, :-step]).mean() for step in (32, 96))
    if in_planes and pixel < 0.8 * plane:
        raise PickleError(
            f"data has the shape {list(data.shape)}, but its values lie as in [N, 32, 32, 3], each "
            "pixel's red, green and blue side by side; right would be `data.reshape(-1, 32, 32, 3)`."
        )
    if not in_planes and plane < 0.8 * pixel:
        raise PickleError(
            f"data has the shape {list(data.shape)}, but its values lie as in [N, 3, 32, 32], first all "
            "red ones of an image, then green, then blue; right would be `data.reshape(-1, 3, 32, 32)`."
        )


def _ids(ids: Any, count: int) -> list[int]:
    if isinstance(ids, np.ndarray):
        if ids.dtype.kind not in "iu" or ids.ndim != 1:
            raise PickleError(
                f"ids is an array of {ids.dtype}, its shape {list(ids.shape)}; "
                "right would be integers of shape [N]."
            )
    elif not isinstance(ids, list | tuple):
        raise PickleError(
            f"ids is of type {type(ids).__name__}; right would be an array or list of integers."
        )
    if len(ids) != count:
        raise PickleError(f"There are {len(ids)} ids for {count} images; one an image is right.")
    if isinstance(ids, np.ndarray):
        ids = ids.tolist()  # only now that they are counted: Python's integers take far more memory
    wrong = [type(id_).__name__ for id_ in ids if type(id_) is not int or id_ not in IDS]
    if wrong:
        raise PickleError(
            f"ids has a value of type {wrong[0]} that is no 64-bit integer; all must be such."
        )
    if len(set(ids)) != count:
        raise PickleError(
            f"{count - len(set(ids))} of the {count} ids occur again; all must be different."
        )
    return list(ids)
