from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, nn

from export import graph
from export.ensemble import Ensemble, half, rounded
from export.member import load
from export.provider import CPU
from tests.export.conftest import Train, calibrated
from training import data, recipe
from training.evaluate import Classifier

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = data.load_sample().test.pixels[:50].numpy()
    return pixels


def exported(ensemble: Ensemble) -> Run:
    """A function that runs the ensemble's graph."""
    return partial(CPU.logits, graph.build(ensemble).SerializeToString())


@pytest.fixture(scope="module")
def flipped(trained: Path) -> Run:
    """Runs the checkpoint's graph with its own views: the image and its mirror image."""
    return exported(Ensemble([load(trained, None).classifier()]))


@pytest.fixture(scope="module")
def single(trained: Path) -> Run:
    """Runs the checkpoint's graph with the image alone as its view."""
    return exported(Ensemble([load(trained, "none").classifier()]))


def test_probabilities_of_members_are_averaged(train: Train, pixels: NDArray[np.uint8]) -> None:
    members = [load(path, None) for path in (train("A1"), train("fast"))]
    with torch.no_grad():
        each = [part.classifier().eval()(torch.from_numpy(pixels)).softmax(1) for part in members]
    together = exported(Ensemble([part.classifier() for part in members]))(pixels)
    expected = torch.stack(each).mean(0).numpy()
    np.testing.assert_allclose(np.exp(together), expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(np.exp(together), each[1].numpy(), atol=1e-2)


def test_the_calibration_is_that_of_numpy(
    trained: Path, flipped: Run, pixels: NDArray[np.uint8]
) -> None:
    found = exported(Ensemble([load(trained, None).classifier()], 2.5, 1.6))(pixels)
    np.testing.assert_allclose(found, calibrated(flipped(pixels), 2.5, 1.6), rtol=1e-4, atol=1e-5)


def test_a_temperature_alone_divides_the_logits(
    trained: Path, flipped: Run, pixels: NDArray[np.uint8]
) -> None:
    """As in files of earlier versions, which are compared with their checkpoints."""
    warm = exported(Ensemble([load(trained, None).classifier()], 2.5))(pixels)
    np.testing.assert_allclose(warm * 2.5, flipped(pixels), rtol=1e-4, atol=1e-5)


def test_calibrated_logits_are_finite_only_if_the_networks_are(trained: Path) -> None:
    """By these, the service knows a network that fails."""
    for value, finite in ((0.0, True), (float("inf"), False), (float("nan"), False)):
        classifier = load(trained, None).classifier()
        list(classifier.parameters())[-1].data.fill_(value)
        images: NDArray[np.uint8] = np.zeros((1, 32, 32, 3), np.uint8)
        logits = exported(Ensemble([classifier], 2.5, 1.6))(images)
        assert np.isfinite(logits).all() == finite


def test_views_average_the_image_and_its_mirror_image(
    flipped: Run, single: Run, pixels: NDArray[np.uint8]
) -> None:
    mirrored: NDArray[np.uint8] = np.ascontiguousarray(pixels[:, :, ::-1])
    np.testing.assert_allclose(flipped(mirrored), flipped(pixels), rtol=1e-4, atol=1e-5)
    both = [single(view) for view in (pixels, mirrored)]
    np.testing.assert_allclose(flipped(pixels), (both[0] + both[1]) / 2, rtol=1e-4, atol=1e-5)
    assert not np.allclose(both[0], both[1], atol=1e-2)


def test_shifted_views_weigh_half(trained: Path, single: Run, pixels: NDArray[np.uint8]) -> None:
    averaged = exported(Ensemble([load(trained, "flip_shift").classifier()]))
    padded: NDArray[np.uint8] = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    expected = np.zeros((len(pixels), 10), np.float32)
    for view, share in ((pixels, 0.25), (padded[:, :32, :32], 0.125), (padded[:, 2:, 2:], 0.125)):
        for seen in (view, view[:, :, ::-1]):
            expected += share * single(np.ascontiguousarray(seen))
    np.testing.assert_allclose(averaged(pixels), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(expected, single(pixels), atol=1e-2)


def test_any_batch_size_gives_the_same_logits(flipped: Run, pixels: NDArray[np.uint8]) -> None:
    one_by_one = np.concatenate([flipped(pixels[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(flipped(pixels[:7]), one_by_one, rtol=1e-4, atol=1e-5)


def test_rounded_is_half_within_the_rounding_of_sums(trained: Path, pixels: NDArray[np.uint8]) -> None:
    ensemble = Ensemble([load(trained, "none").classifier()]).eval()
    few = torch.from_numpy(pixels[:2])  # a CPU's fp16 is slow
    with torch.no_grad():
        exact, in_half, in_float = (
            part.eval()(few) for part in (ensemble, half(ensemble), rounded(ensemble))
        )
    error = (in_half - exact).abs().max()
    assert error > 0
    assert 0 < (in_float - exact).abs().max() < 3 * error
    assert (in_float - in_half).abs().max() < 3 * error


class Sum(nn.Module):
    """Gives each class ``weight`` times the sum of ``count`` outputs of a layer, each of ``value``."""

    def __init__(self, value: float, count: int, weight: float) -> None:
        super().__init__()
        self.count, self.first, self.last = count, nn.Linear(32, 1), nn.Linear(1, 10)
        for parameter, each in zip(self.parameters(), (0, value, weight, 0), strict=True):
            nn.init.constant_(parameter, each)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.count * self.first(x[:, 0, 0]))
        return logits


@pytest.mark.parametrize(
    ("value", "count", "weight"),
    [(4e4, 1, 2), (4e4, 2, 0.5), (0.1, 1, 1e5)],
    ids=["output", "input", "weight"],
)
def test_rounded_overflows_where_half_does(
    value: float, count: int, weight: float, pixels: NDArray[np.uint8]
) -> None:
    ensemble = Ensemble([Classifier(Sum(value, count, weight), recipe.load("A1", ["views=none"]))])
    with torch.no_grad():
        exact, in_half, in_float = (
            part.eval()(torch.from_numpy(pixels[:2]))
            for part in (ensemble, half(ensemble), rounded(ensemble))
        )
    assert exact.isfinite().all()
    assert in_half.isinf().all()
    assert in_float.isinf().all()


def test_half_has_its_weights_in_fp16_and_leaves_the_original(trained: Path) -> None:
    ensemble = Ensemble([load(trained, None).classifier()])
    kinds = {
        precision: {
            tensor.name.rpartition("model.")[2].removeprefix("network."): tensor.data_type
            for tensor in graph.build(part).graph.initializer
            if tensor.name.endswith(("conv.weight", "normalize.mean"))
        }
        for precision, part in (("fp16", half(ensemble)), ("fp32", ensemble))
    }
    assert kinds["fp16"]["stages.0.conv.weight"] == TensorProto.FLOAT16
    assert kinds["fp16"]["members.0.normalize.mean"] == TensorProto.FLOAT
    assert set(kinds["fp32"].values()) == {TensorProto.FLOAT}
