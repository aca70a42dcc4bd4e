import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from export import comparison
from export.__main__ import main
from export.ensemble import ROUNDED
from export.provider import CPU
from serving.providers import OPENVINO
from tests.export.conftest import Train, described
from tests.openvino import needs_openvino
from training import checkpoint, data
from training.data import Images


def test_figures_of_a_comparison() -> None:
    expected: NDArray[np.float32] = np.zeros((1000, 10), np.float32)
    expected[:, 3] = 8
    actual = expected.copy()
    actual[:3, 4] = 10  # the class of three images changes
    labels = torch.full((1000,), 3)
    labels[0] = 4  # which is right for one of them
    images = Images(torch.zeros(1000, 32, 32, 3, dtype=torch.uint8), labels)
    found = comparison.TestImages(images, "sample").compare(expected, actual, "fp32", "CPU")
    assert (found.images, found.top1_agreement) == (1000, 0.997)
    assert found.max_scaled_difference == 10 / 8
    assert (found.accuracy, found.accuracy_loss) == (0.998, 0.001)


def test_logits_that_are_all_zero_are_equal() -> None:
    zeros: NDArray[np.float32] = np.zeros((20, 10), np.float32)
    found = comparison.TestImages(data.load_sample().test.first(20), "sample").compare(
        zeros, zeros, "PyTorch", "CPU"
    )
    assert (found.max_scaled_difference, found.top1_agreement) == (0, 1)


@pytest.mark.parametrize(
    ("provider", "package"),
    [pytest.param(OPENVINO, "openvino", marks=needs_openvino), (ROUNDED, "torch")],
)
def test_a_comparison_names_what_has_computed(provider: str, package: str) -> None:
    zeros: NDArray[np.float32] = np.zeros((20, 10), np.float32)
    images = comparison.TestImages(data.load_sample().test.first(20), "sample")
    name, number = images.compare(zeros, zeros, CPU.name, provider).software.split()
    assert name == package
    assert number.startswith(version(package))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_network_that_diverged_is_told_as_such(
    value: str, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = checkpoint.load(train("A1"))
    list(state.model.values())[-1].fill_(float(value))  # the biases of the classes
    checkpoint.save(state, tmp_path / "checkpoint.pt")
    out = tmp_path / "model.onnx"
    assert main(["write", str(tmp_path / "checkpoint.pt"), str(out)]) == 1
    told = "error: the logits of PyTorch are no finite numbers: of a network that diverged\n"
    assert capsys.readouterr().err == told
    assert not out.exists()


class Rounding:
    """A provider that computes in a shorter type."""

    name = "RoundingExecutionProvider"

    def logits(self, content: bytes, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return CPU.logits(content, pixels) * np.float32(1.002)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_other_providers_are_compared_with_the_cpu_by_limits_of_their_own(
    precision: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.comparison.others", lambda content: iter([Rounding()]))
    out = tmp_path / "model.onnx"
    assert main(["write", str(train("A1")), str(out), "--precision", precision]) == 0
    assert described(out)["full_precision"] == "false"
    (other,) = json.loads(described(out)["providers"])
    assert (other["provider"], other["reference"]) == (Rounding.name, CPU.name)
    assert other["max_scaled_difference"] == pytest.approx(0.002, rel=0.1)
    assert main(["verify", str(out)]) == 0


class Shortening:
    """A provider that computes in a type far too short, unless the file asks for full precision."""

    name = "ShorteningExecutionProvider"

    def logits(self, content: bytes, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        values = {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}
        exact = CPU.logits(content, pixels)
        return exact if values["full_precision"] == "true" else np.round(exact / exact.max())


def test_a_provider_whose_shorter_type_is_beyond_the_limits_is_asked_for_full_precision(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("export.comparison.others", lambda content: iter([Shortening()]))
    out = tmp_path / "model.onnx"
    assert main(["write", str(train("A1")), str(out)]) == 0
    assert "it asks for full precision: in a shorter type it is beyond the limits" in (
        " ".join(capsys.readouterr().out.split())
    )
    values = described(out)
    (other,) = json.loads(values["providers"])
    assert (values["full_precision"], other["top1_agreement"]) == ("true", 1.0)
    assert main(["verify", str(out)]) == 0


def test_accuracy_on_the_sample_is_that_of_its_own_images(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = data.load_sample().test
    few = comparison.TestImages(images.first(50), "cifar10")
    with monkeypatch.context() as patch:
        patch.setattr(comparison.TestImages, "load", lambda: few)
        out = tmp_path / "model.onnx"
        assert main(["write", str(train("A1")), str(out)]) == 0
    values = described(out)
    logits = CPU.logits(out.read_bytes(), images.pixels.numpy())
    sample = comparison.TestImages(images, "sample").accuracy(logits)
    assert float(values["sample_accuracy"]) == sample != few.accuracy(logits[:50])
    # Without the data set, the sample's images are run, and compared with the accuracy on the sample.
    monkeypatch.setenv(data.ROOT_VARIABLE, str(data.SAMPLE))
    assert main(["verify", str(out)]) == 0
