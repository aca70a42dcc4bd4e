"""Checkpoints to export: of runs of a few steps, and one with the bundled model's weights."""

import functools
import math
import tomllib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch.onnx._internal.exporter._registration import ONNXRegistry

from export import parity, quantize
from export.__main__ import main as export
from export.parity import Limits, Precision
from export.provider import CPU
from tests import ROOT
from training import checkpoint, data, model, recipe
from training.__main__ import main
from training.checkpoint import Checkpoint

TRAIN, TEST = 500, 100
WIDTHS = {"D1": [8, 16, 16, 32], "fast": [16, 16, 16]}  # narrow networks, which export sooner
BUNDLED = ROOT / "models" / "default.onnx"
WHOLE_SAMPLE = data.SAMPLE  # while tests run, ``data.SAMPLE`` has few test images

Train = Callable[..., Path]
Bundled = Callable[..., Path]


@pytest.fixture(scope="package", autouse=True)
def _few_images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A sample with only the first test images of the bundled one, in its place: a sixth of the time."""
    path = tmp_path_factory.mktemp("images") / "few.npz"
    with np.load(data.SAMPLE) as sample:
        np.savez(path, **{name: sample[name][: TRAIN if "train" in name else TEST] for name in sample})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SAMPLE", path)
        patch.setenv(data.ROOT_VARIABLE, str(path))
        yield


@pytest.fixture(scope="package", autouse=True)
def _few_may_differ() -> Iterator[None]:
    """Set limits for so few images, of which the real ones would allow none to be lost."""
    few: dict[Precision, Limits] = {
        "fp16": Limits(math.inf, 0.99, 0.01),
        "int8": Limits(math.inf, 0.97, 0.02),
    }
    with pytest.MonkeyPatch.context() as patch:
        for precision, limits in few.items():
            patch.setitem(parity.LIMITS, precision, limits)
            patch.setitem(parity.ELSEWHERE, precision, limits)
        patch.setitem(parity.ELSEWHERE, "fp32", few["fp16"])
        yield


class FewTrainingImages(quantize.TrainingImages):
    """The first two batches only: calibration on all of them takes most of an export's time."""

    def __init__(self) -> None:
        super().__init__()
        self._batches = islice(self._batches, 2)


@pytest.fixture(scope="package", autouse=True)
def _calibrated_on_few() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "TrainingImages", FewTrainingImages)
        yield


@pytest.fixture(scope="package", autouse=True)
def _operators_collected_once() -> Iterator[None]:
    """Otherwise the exporter collects its operators for each graph, a third of a small graph's time."""
    with pytest.MonkeyPatch.context() as patch:
        collect = functools.cache(ONNXRegistry.from_torchlib)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(collect))
        yield


class OffByOne:
    """A provider that gives each class the logit of the class before it."""

    name = "OffByOneExecutionProvider"

    def logits(self, content: bytes, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.roll(CPU.logits(content, pixels), 1, axis=1)


@pytest.fixture
def off_by_one(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a provider that computes wrong logits, made the only one here besides the CPU's."""
    monkeypatch.setattr("export.comparison.others", lambda content: iter([OffByOne()]))
    return OffByOne.name


@pytest.fixture(scope="package")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains a few steps on a few images, once per recipe and seed, and returns the checkpoint's path.

    ``fast`` is a complete run, with a test accuracy; the others are trials.
    """
    made: dict[tuple[str, int], Path] = {}

    def checkpoint(name: str, seed: int = 0) -> Path:
        if (name, seed) not in made:
            out = tmp_path_factory.mktemp(name)
            narrow = [f"model.widths={WIDTHS[name]}"] if name in WIDTHS else []
            arguments = [name, "--epochs", "1", "--limit", "40", "--set", "batch_size=20", *narrow]
            if name == "fast":
                path = out / "fast.toml"
                path.write_text(recipe.load("fast", ["epochs=1", "batch_size=250", *narrow]).to_toml())
                arguments = [str(path)]
            with pytest.MonkeyPatch.context() as patch:  # the test that asks first may use other images
                patch.setenv(data.ROOT_VARIABLE, str(data.SAMPLE))
                assert main(["run", *arguments, "--seed", str(seed), "--out", str(out)]) == 0
            made[name, seed] = out / "checkpoint.pt"
        return made[name, seed]

    return checkpoint


def _floats(file: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """A model file's constants by name; int8 ones as the floats that they stand for."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    floats = {name: array.copy() for name, array in constants.items()}
    for node in file.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            numbers, scale, zero = (constants[name] for name in node.input)
            by_channel = (-1, *(1,) * (numbers.ndim - 1))
            centred = numbers.astype(np.float32) - zero.astype(np.float32).reshape(by_channel)
            name = node.input[0].removesuffix("_quantized")
            floats[name] = (centred * scale.reshape(by_channel)).astype(np.float32)
    return floats


@pytest.fixture(scope="package")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Bundled:
    """Writes a checkpoint of the bundled model's weights and views, with ``changes`` to its recipe.

    A bias that the exporter folded into a convolution becomes the bias of the BatchNorm after it.
    """
    file = onnx.load(BUNDLED)
    values = {entry.key: entry.value for entry in file.metadata_props}
    weights = {
        name.rpartition("model.")[2]: torch.from_numpy(array)
        for name, array in _floats(file).items()
        if "model." in name
    }

    def write(validation: float = 0.0, epoch: int | None = None, **changes: Any) -> Path:
        described = tomllib.loads(values["recipe"]) | {"views": values["views"]} | changes
        described["data"] = described["data"] | {"validation": validation}
        state = model.build(recipe.parse(described, "bundled").model).state_dict()
        state |= {name: tensor for name, tensor in weights.items() if name in state}
        for name, tensor in weights.items():
            if name.endswith(".weight_bias"):
                place, _, index = name.removesuffix(".weight_bias").rpartition(".")
                state[f"{place}.{int(index) + 1}.bias"] = tensor
        path = tmp_path_factory.mktemp("bundled") / "checkpoint.pt"
        made = Checkpoint(
            recipe=described,
            recipe_name=values["name"],
            classes=list(model.CLASSES),
            run={
                "seed": 0,
                "limit": None,
                "complete": False,
                "data": "sample",
                "commit": values["commit"],
            },
            model=state,
            optimizers=[],
            scaler={},
            epoch=described["epochs"] if epoch is None else epoch,
        )
        checkpoint.save(made, path)
        return path

    return write


@pytest.fixture(scope="package")
def trained(bundled: Bundled) -> Path:
    """A checkpoint with the bundled model's weights, of a run that held no images out."""
    return bundled()


@pytest.fixture(scope="package")
def files(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model files of ``trained`` by precision, all written by one command."""
    out = tmp_path_factory.mktemp("files") / "model.onnx"
    assert export(["write", str(trained), str(out), "--precision", "all"]) == 0
    return {
        "fp32": out,
        "fp16": out.with_name("model.fp16.onnx"),
        "int8": out.with_name("model.int8.onnx"),
    }


def described(path: Path) -> dict[str, str]:
    """A model file's metadata, as strings."""
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def calibrated(logits: NDArray[np.float32], temperature: float, exponent: float) -> NDArray[np.float32]:
    """Calibrated logits, the largest of which is 0; written without torch."""
    distances: NDArray[np.float32] = logits.max(1, keepdims=True) - logits
    return -((distances / temperature) ** exponent)
