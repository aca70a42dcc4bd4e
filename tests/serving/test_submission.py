import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from serving.errors import PickleError, TooLargeError
from serving.submission import Submission, read_submission
from tests.serving.samples import pickled

COMPETITION_BYTES = 30_800_263
COMPETITION_CSV_BYTES = 68_900


def read(content: Any, max_rows: int = 20_000) -> Submission:
    if not isinstance(content, bytes):
        content = pickle.dumps(content)
    return read_submission(io.BytesIO(content), max_rows)


def shuffled(count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).permutation(count)


def test_the_competition_file(images: npt.NDArray[np.uint8]) -> None:
    """Ten thousand images with shuffled ids, byte for byte as NumPy 1 wrote them."""
    data, ids = np.tile(images, (10, 1, 1, 1)), shuffled(10_000)
    content = pickled({b"data": data, b"ids": ids}, 4, old=True)
    assert len(content) == COMPETITION_BYTES
    submission = read(content)
    np.testing.assert_array_equal(submission.images, data)
    assert submission.ids == ids.tolist()
    csv = submission.csv([7] * 10_000)
    assert len(csv) == COMPETITION_CSV_BYTES
    assert csv.startswith(f"ID,Labels\n{ids[0]},7\n".encode())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("old", [False, True], ids=["numpy2", "numpy1"])
@pytest.mark.parametrize("key", [str, str.encode], ids=["str", "bytes"])
def test_protocols_and_keys(images: npt.NDArray[np.uint8], protocol: int, old: bool, key: Any) -> None:
    ids = shuffled(20)
    content = pickled({key("data"): images[:20], key("ids"): ids}, protocol, old=old)
    submission = read(content)
    np.testing.assert_array_equal(submission.images, images[:20])
    assert list(submission.ids) == ids.tolist()


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "NHWC": lambda x: x,
    "NHWC, Fortran order": np.asfortranarray,
    "NHWC, strided": lambda x: np.repeat(x, 2, axis=0)[::2],
    "NCHW": lambda x: np.ascontiguousarray(x.transpose(0, 3, 1, 2)),
    "NCHW, view of NHWC": lambda x: x.transpose(0, 3, 1, 2),
    "flat": lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), 3072),
    "flat, Fortran order": lambda x: np.asfortranarray(x.transpose(0, 3, 1, 2).reshape(len(x), 3072)),
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("count", [1, 3, 32])
def test_layouts(images: npt.NDArray[np.uint8], layout: Any, protocol: int, count: int) -> None:
    data = images[:count]
    submission = read(pickle.dumps({"data": layout(data)}, protocol))
    np.testing.assert_array_equal(submission.images, data)
    assert list(submission.ids) == list(range(count))


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i4", "<u4", ">i8", "<u8"])
def test_id_types(images: npt.NDArray[np.uint8], dtype: str) -> None:
    ids = shuffled(20).astype(dtype)
    assert read({"data": images[:20], "ids": ids}).ids == ids.tolist()


@pytest.mark.parametrize(
    ("shape", "planes", "right"),
    [
        ((-1, 3072), False, (-1, 32, 32, 3)),
        ((-1, 3, 32, 32), False, (-1, 32, 32, 3)),
        ((-1, 32, 32, 3), True, (-1, 3, 32, 32)),
    ],
)
@pytest.mark.parametrize("seed", range(20))
def test_images_reshaped_instead_of_transposed_are_refused(
    images: npt.NDArray[np.uint8],
    shape: tuple[int, ...],
    planes: bool,
    right: tuple[int, ...],
    seed: int,
) -> None:
    some = np.random.default_rng(seed).permutation(images)[:10]
    values = some.transpose(0, 3, 1, 2) if planes else some
    with pytest.raises(PickleError, match=re.escape(f"right would be `data.reshape{right}`")):
        read({"data": np.ascontiguousarray(values).reshape(shape)})
    np.testing.assert_array_equal(
        read({"data": np.ascontiguousarray(values).reshape(right)}).images, some
    )


def test_many_images_in_the_wrong_order_are_refused_too(images: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(PickleError, match="its values lie as in"):
        read({"data": np.concatenate([images, images]).reshape(-1, 3072)})


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_order_is_no_matter_of_what_the_images_show(
    images: npt.NDArray[np.uint8], layout: Any
) -> None:
    """Ten times the same image: of the thousand, none makes the order look wrong."""
    for image in images:
        read({"data": layout(np.repeat(image[np.newaxis], 10, axis=0))})


def test_ids_as_a_list_and_out_of_the_ordinary(images: npt.NDArray[np.uint8]) -> None:
    ids = [2**64 - 1, -(2**63), 0]
    submission = read({"data": images[:3], "ids": ids})
    assert submission.csv([1, 2, 3]) == (
        b"ID,Labels\n18446744073709551615,1\n-9223372036854775808,2\n0,3\n"
    )


def test_a_batch_file_of_cifar_10(images: npt.NDArray[np.uint8]) -> None:
    content = pickled(
        {
            b"batch_label": b"testing batch 1 of 1",
            b"labels": [3] * 50,
            b"data": LAYOUTS["flat"](images[:50]),
            b"filenames": [b"domestic_cat_s_000907.png"] * 50,
        },
        2,
        python2=True,
    )
    np.testing.assert_array_equal(read(content).images, images[:50])


ONE = np.zeros((1, 32, 32, 3), np.uint8)
TWO = np.zeros((2, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds a list; right would be a dict"),
        (ONE, "holds a ndarray; right would be a dict"),
        ({"Data": ONE, b"ids": [1]}, r"no key data \(.* are: 'Data', b'ids'\); right would be data"),
        ({}, r"no key data \(.* are: none\)"),
        ({"data": None}, "data is of type NoneType; right would be a NumPy array"),
        ({"data": ONE, b"data": ONE}, "data twice"),
        ({"data": b"x"}, "data is of type bytes; right would be a NumPy array of uint8"),
        (
            {"data": ONE + np.float32(0.5)},
            r"an array of float32; right would be .*\(data \* 255\)\.round",
        ),
        ({"data": ONE + np.array(9)}, r"an array of int64; right would be .*`data\.round\(\)\.astype"),
        (
            {"data": ONE - 1.5},
            "an array of float64; .* from 0 to 255, while these are from -1.5 to -1.5",
        ),
        ({"data": ONE * np.nan}, "an array of float64; .* while these are from nan to nan"),
        (
            {"data": ONE.astype(float)[:0]},
            r"an array of float64; right would be a NumPy array of uint8\.$",
        ),
        ({"data": ONE[:0]}, "no images"),
        ({"data": ONE[0]}, r"shape \[32, 32, 3\]; right would be"),
        ({"data": np.zeros((2, 28, 28, 1), np.uint8)}, r"shape \[2, 28, 28, 1\]"),
        ({"data": TWO, "ids": np.arange(3)}, "3 ids for 2 images"),
        ({"data": TWO, "ids": np.array([4, 4])}, "1 of the 2 ids occur again"),
        ({"data": TWO, "ids": np.array([4.0, 5.0])}, "ids is an array of float64"),
        ({"data": TWO, "ids": np.array([True, False])}, "ids is an array of bool"),
        ({"data": TWO, "ids": np.array([[1, 2]])}, r"ids is an array of int64, its shape \[1, 2\]"),
        ({"data": TWO, "ids": [True, False]}, "ids has a value of type bool that is no 64-bit integer"),
        ({"data": TWO, "ids": [1, "2"]}, "ids has a value of type str that is no 64-bit integer"),
        ({"data": TWO, "ids": [1, 2**64]}, "ids has a value of type int that is no 64-bit integer"),
        (
            {"data": TWO, "ids": [1, -(2**63) - 1]},
            "ids has a value of type int that is no 64-bit integer",
        ),
        ({"data": TWO, "id": [1, 2]}, "has the key 'id'; right would be ids"),
        ({"data": TWO, b"Image_IDs": [1, 2]}, "has the key 'Image_IDs'; right would be ids"),
        ({"data": TWO, "index": [1, 2]}, "has the key 'index'; right would be ids"),
        ({"data": TWO, "imageID": [1, 2]}, "has the key 'imageID'; right would be ids"),
        ({"data": TWO, "imageids": [1, 2]}, "has the key 'imageids'; right would be ids"),
        ({"data": [[1]]}, r"data is of type list; right would be .*np.asarray\(data, 'uint8'\)"),
        (b"PK\3\4any", "is a zip archive, .* right would be what `pickle.dump"),
        (b"\x93NUMPY\1", "is an array that numpy.save has written; right would be"),
        (b"<!DOCTYPE html><html>", "text, which begins '<!DOCTYPE html><html'; right would be"),
        (b"BM\0\0", "The file is not a pickle of protocol 2 to 5; right would be"),
        ({"data": TWO, "ids": None}, "ids is of type NoneType; right would be an array or list"),
        ({"data": TWO, "ids": 5}, "ids is of type int; right would be an array or list"),
    ],
)
def test_message_says_what_would_be_right(content: Any, message: str) -> None:
    with pytest.raises(PickleError, match=message):
        read(content)


@pytest.mark.parametrize("key", ["valid", "is_valid", "grid", "fid", "labels", "index\n", b"\xff", 5])
def test_other_keys_are_ignored(key: Any) -> None:
    assert read({"data": TWO, key: [1, 2]}).ids == range(2)


def test_beside_ids_a_key_that_looks_like_them_is_ignored() -> None:
    assert read({"data": TWO, "ids": [3, 4], "index": [1, 2]}).ids == [3, 4]


def test_too_many_rows() -> None:
    assert len(read({"data": TWO}, max_rows=2)) == 2
    with pytest.raises(TooLargeError, match="2 images; the limit is 1"):
        read({"data": TWO}, max_rows=1)
