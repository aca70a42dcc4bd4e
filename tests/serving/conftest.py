"""Real images and small model files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import TensorProto, helper

from serving.model import Model
from serving.settings import BUNDLED_MODEL
from tests import ROOT
from tests.serving.models import METADATA, write_model


@pytest.fixture(scope="session")
def images() -> npt.NDArray[np.uint8]:
    """uint8 [1000, 32, 32, 3]: CIFAR-10 test images."""
    with np.load(ROOT / "training" / "cifar10_sample.npz", allow_pickle=False) as sample:
        images: npt.NDArray[np.uint8] = sample["test_images"]
        return images


@pytest.fixture(scope="session")
def model() -> Model:
    return Model(BUNDLED_MODEL, "cpu", 1)


@pytest.fixture(scope="session")
def damaged_model() -> bytes:
    """The bundled file with one bit of its metadata flipped: they are not UTF-8, but the file opens."""
    content = bytearray(BUNDLED_MODEL.read_bytes())
    content[content.rindex(b"airplane")] ^= 0x80
    return bytes(content)


@pytest.fixture
def model_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small linear model that keeps the contract, except for what the caller changes."""

    def write(
        metadata: dict[str, str] = METADATA,
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
        domain, kind = operator  # Relu does nothing to pixels, which are not negative
        nodes = [
            helper.make_node("Cast", [input_name], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["floats"], ["rows"]),
            helper.make_node(kind, ["rows"], ["pixels"], domain=domain),
            helper.make_node("MatMul", ["pixels", "weights"], ["logits"]),
        ]
        return write_model(
            tmp_path / name,
            nodes,
            {"weights": weights},
            metadata=metadata,
            input_name=input_name,
            input_type=input_type,
            input_shape=input_shape,
            outputs=outputs,
        )

    return write
