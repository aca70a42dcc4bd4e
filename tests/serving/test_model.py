import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper

from export.metadata import version
from serving.errors import ModelError
from serving.model import Model
from serving.settings import BUNDLED_MODEL
from tests.serving.models import CLASSES, METADATA, write_model

ModelFile = Callable[..., Path]


def load(path: Path) -> Model:
    return Model(path, "cpu", 1)


def test_bundled_model(images: npt.NDArray[np.uint8]) -> None:
    model = load(BUNDLED_MODEL)
    assert model.classes == tuple(CLASSES)
    logits = model.logits(images[:7])
    assert logits.shape == (7, 10)
    assert logits.dtype == np.float32
    one_by_one = np.concatenate([model.logits(image[np.newaxis]) for image in images[:7]])
    np.testing.assert_allclose(logits, one_by_one, atol=1e-3)


def test_single_images_wait_for_fewer_others_than_a_chunk_has(model_file: ModelFile) -> None:
    path = model_file()
    for most, expected in {64: (8, 32), 16: (8, 8), 6: (3, 3), 1: (1, 1)}.items():
        model = Model(path, "cpu", 2, runs=2, max_batch_size=most)
        assert (model.batch_size, model.chunk_size) == expected
        assert model.runs * model.chunk_size <= most


def test_takes_views_in_any_strides(model_file: ModelFile, images: npt.NDArray[np.uint8]) -> None:
    model = load(model_file())
    planes = np.ascontiguousarray(images[:3].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(model.logits(planes.transpose(0, 2, 3, 1)), model.logits(images[:3]))


def test_metadata_is_decoded_but_texts_stay_texts(model_file: ModelFile) -> None:
    path = model_file()
    model = load(path)
    assert model.version == version(onnx.load(path))
    assert model.metadata["commit"] == "12e456789012"
    assert model.metadata["parameters"] == 30720
    assert model.metadata["parity"] == {"images": 1000, "top1_agreement": 1.0}
    assert model.provider == "CPUExecutionProvider"


@pytest.mark.parametrize("text", ["NaN", "1e999", '["\\ud800"]'])
def test_metadata_that_json_cannot_tell_again_are_texts(model_file: ModelFile, text: str) -> None:
    model = load(model_file({**METADATA, "parity": text}))
    assert model.metadata["parity"] == text


def test_weights_in_another_file_are_refused(
    model_file: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of the file that a replacement worker may need would lack them."""
    whole = onnx.load(model_file())
    path = tmp_path / "parts.onnx"
    onnx.save(whole, path, save_as_external_data=True, location="beside.bin", size_threshold=0)
    assert (tmp_path / "beside.bin").stat().st_size > 100_000
    for folder in (Path.cwd(), tmp_path):
        monkeypatch.chdir(folder)
        with pytest.raises(ModelError, match=r"parts\.onnx is not an ONNX model that can be loaded"):
            load(path)


def test_as_many_logits_as_images(tmp_path: Path, images: npt.NDArray[np.uint8]) -> None:
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], ["product"]),
        helper.make_node("Slice", ["product", "start", "end"], ["logits"]),
    ]
    tensors: dict[str, npt.NDArray[Any]] = {
        "weights": np.zeros((3072, 10), np.float32),
        "start": np.zeros(1, np.int64),
        "end": np.full(1, 2),
    }
    model = load(write_model(tmp_path / "two.onnx", nodes, tensors))
    assert model.logits(images[:2]).shape == (2, 10)
    with pytest.raises(ModelError, match=r"gave logits \[2, 10\] for 5 images"):
        model.logits(images[:5])


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a+ cannot be read: .*File name too long"):
        Model(tmp_path / ("a" * 300), "cpu", 1)
    link = tmp_path / "model.onnx"
    link.symlink_to("/proc/self/mem")  # whose first bytes nobody can read
    with pytest.raises(ModelError, match=r"model\.onnx cannot be read: .*Input/output error"):
        Model(link, "cpu", 1)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model file at .*none\.onnx; right would be an ONNX file"):
        load(tmp_path / "none.onnx")


def test_a_folder_is_no_model_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no file; right would be an ONNX file"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", BUNDLED_MODEL.read_bytes()[:1_000_000], bytes(1000)],
    ids=["empty", "text", "truncated", "zeros"],
)
def test_not_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"some\.onnx is not an ONNX model that can be loaded"):
        load(path)


def test_damaged_bytes_inside(tmp_path: Path) -> None:
    """The damage hits the list of nodes, which comes first; in the weights any bytes could be right."""
    content = bytearray(BUNDLED_MODEL.read_bytes())
    content[200:1200] = np.random.default_rng(0).bytes(1000)
    path = tmp_path / "damaged.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"damaged\.onnx is not an ONNX model that can be loaded"):
        load(path)


def test_damaged_bytes_in_the_metadata(damaged_model: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(damaged_model)
    with pytest.raises(ModelError, match=r"damaged\.onnx cannot be used: .*utf-8"):
        load(path)


def test_metadata_as_deep_as_no_json_is(model_file: ModelFile) -> None:
    with pytest.raises(ModelError, match=r"tiny\.onnx cannot be used: .*(recursion|Stack overflow)"):
        load(model_file({**METADATA, "parity": "[" * 200_000}))


def test_a_graph_for_small_batches_only(tmp_path: Path) -> None:
    """It runs on one and two images, but not on the larger batches that will come."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], ["product"]),
        helper.make_node("Shape", ["product"], ["count"], start=0, end=1),
        helper.make_node("Gather", ["table", "count"], ["none"]),
        helper.make_node("Add", ["product", "none"], ["logits"]),
    ]
    tensors = {"weights": np.zeros((3072, 10), np.float32), "table": np.zeros(3, np.float32)}
    path = write_model(tmp_path / "small.onnx", nodes, tensors)
    load(path)
    with pytest.raises(ModelError, match=r"small\.onnx cannot be used: "):
        Model(path, "cpu", 1, max_batch_size=64)


@pytest.mark.parametrize("part", ["weights", "opset"])
def test_a_graph_that_is_not_of_its_version(model_file: ModelFile, part: str) -> None:
    path = model_file()
    model = onnx.load(path)
    before = version(model)
    if part == "weights":
        (weights,) = model.graph.initializer
        weights.raw_data = weights.raw_data[:-1] + bytes([weights.raw_data[-1] ^ 1])
    else:
        model.opset_import[0].version += 1
    onnx.save(model, path)
    told = f"says that it is version {before}, but its graph is {version(model)}: it was changed or"
    with pytest.raises(ModelError, match=told):
        load(path)


def test_damaged_weights_whose_logits_are_no_numbers(model_file: ModelFile) -> None:
    with pytest.raises(ModelError, match="logits that are no finite numbers"):
        load(model_file(scale=float("nan")))


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (("com.microsoft", "QuickGelu"), "has the operators com.microsoft:QuickGelu, which only some"),
        (
            ("com.microsoft", "Nothing"),
            "is not an ONNX model that can be loaded .*com.microsoft:Nothing",
        ),
        (("elsewhere", "Relu"), "is not an ONNX model that can be loaded .*elsewhere:Relu"),
    ],
)
def test_operators_of_other_domains(
    model_file: ModelFile, operator: tuple[str, str], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load(model_file(operator=operator))


@pytest.mark.parametrize("key", ["contract", "name", "version", "classes", "precision"])
def test_missing_metadata_is_named(model_file: ModelFile, key: str) -> None:
    metadata = {name: value for name, value in METADATA.items() if name != key}
    with pytest.raises(ModelError, match=f"lacks the metadata {key}"):
        load(model_file(metadata))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("contract", "2", "contract '2'; this service reads contract 1"),
        ("classes", "airplane", "JSON list"),
        ("classes", "{}", "JSON list"),
        ("classes", json.dumps(["a"] * 10), "JSON list of different names"),
        ("classes", json.dumps(CLASSES[:9]), r"one output, logits float32 \[N, 9\]"),
    ],
)
def test_unusable_metadata(model_file: ModelFile, key: str, value: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(model_file({**METADATA, key: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_name": "input"}, r"one input, images uint8 \[N, 32, 32, 3\]"),
        ({"input_type": TensorProto.FLOAT}, r"one input, images uint8 \[N, 32, 32, 3\]"),
        ({"input_shape": ("N", 3, 32, 32)}, r"one input, images uint8 \[N, 32, 32, 3\]"),
        ({"input_shape": (1, 32, 32, 3)}, "the batch must be dynamic"),
        ({"outputs": 100}, r"one output, logits float32 \[N, 10\]"),
    ],
)
def test_wrong_graph(model_file: ModelFile, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(model_file(**changes))


def test_a_graph_that_does_another_thing_with_one_image(model_file: ModelFile) -> None:
    with pytest.raises(ModelError, match=r"gives logits \[10\] for 1 images; right would be \[1, 10\]"):
        load(model_file(operator=("", "Squeeze")))
