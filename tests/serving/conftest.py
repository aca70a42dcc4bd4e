"""Real images and small model files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from serving.model import Model
from serving.settings import BUNDLED_MODEL
from tests.serving.server import ROOT

CLASSES = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]
METADATA = {
    "contract": "1",
    "name": "tiny",
    "version": "12e456789012",
    "classes": json.dumps(CLASSES),
    "precision": "fp32",
    "parameters": "30720",
    "parity": json.dumps({"images": 1000, "top1_agreement": 1.0}),
}


@pytest.fixture(scope="session")
def images() -> npt.NDArray[np.uint8]:
    """uint8 [1000, 32, 32, 3]: CIFAR-10 test images."""
    with np.load(ROOT / "training" / "cifar10_sample.npz", allow_pickle=False) as sample:
        images: npt.NDArray[np.uint8] = sample["test_images"]
        return images


@pytest.fixture(scope="session")
def model() -> Model:
    return Model(BUNDLED_MODEL, "cpu", 1)


@pytest.fixture
def model_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small linear model that keeps the contract, but for what the caller changes."""

    def write(
        metadata: dict[str, str] | None = None,
        *,
        input_name: str = "images",
        input_type: int = TensorProto.UINT8,
        input_shape: tuple[Any, ...] = ("N", 32, 32, 3),
        outputs: int = 10,
        operator: tuple[str, str] = ("", "Relu"),
        scale: float = 1 / 255,
        name: str = "tiny.onnx",
    ) -> Path:
        weights = np.random.default_rng(0).normal(size=(3072, outputs)).astype(np.float32) * scale
        domain, kind = operator  # on pixels, which are positive, Relu does nothing
        graph = helper.make_graph(
            [
                helper.make_node("Cast", [input_name], ["floats"], to=TensorProto.FLOAT),
                helper.make_node("Flatten", ["floats"], ["rows"]),
                helper.make_node(kind, ["rows"], ["pixels"], domain=domain),
                helper.make_node("MatMul", ["pixels", "weights"], ["logits"]),
            ],
            "tiny",
            [helper.make_tensor_value_info(input_name, input_type, input_shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (input_shape[0], outputs))],
            [numpy_helper.from_array(weights, "weights")],
        )
        opsets = {"": 17, domain: 17 if domain == "" else 1}
        imports = [helper.make_opsetid(*item) for item in opsets.items()]
        model = helper.make_model(graph, opset_imports=imports, ir_version=9)
        helper.set_model_props(model, METADATA if metadata is None else metadata)
        path = tmp_path / name
        onnx.save(model, path)
        return path

    return write
