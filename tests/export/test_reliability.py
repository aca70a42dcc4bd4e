from pathlib import Path

import numpy as np
import pytest

from export import reliability
from training.plots import PlotError


def logits(confidence: float, count: int) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """Logits that give class 0 the probability ``confidence``, and each other class an equal share."""
    rest = np.full((count, 10), np.log((1 - confidence) / 9))
    rest[:, 0] = np.log(confidence)
    return rest


def test_error_is_the_gap_between_confidence_and_accuracy() -> None:
    # 60 images with probability 0.9, two thirds of them right, and 40 with 0.5, half of them right.
    both = np.concatenate([logits(0.9, 60), logits(0.5, 40)])
    labels = np.array([0] * 40 + [1] * 20 + [0] * 20 + [1] * 20)
    bins = reliability.measure(both, labels)
    assert bins.share[bins.share > 0].tolist() == [0.4, 0.6]
    np.testing.assert_allclose(bins.confidence[bins.share > 0], [0.5, 0.9])
    np.testing.assert_allclose(bins.accuracy[bins.share > 0], [0.5, 2 / 3])
    assert bins.error == pytest.approx(0.6 * (0.9 - 2 / 3))


def test_bins_have_the_same_width() -> None:
    middles = (np.arange(2, reliability.BINS) + 0.5) / reliability.BINS
    each = np.concatenate([logits(middle, 1) for middle in middles])
    bins = reliability.measure(each, np.zeros(len(middles), np.int64))
    np.testing.assert_allclose(bins.confidence[2:], middles)


def test_certainty_has_a_bin() -> None:
    certain = np.zeros((4, 10))
    certain[:, 2] = 1000
    bins = reliability.measure(certain, np.array([2, 2, 2, 3]))
    assert (bins.share[-1], bins.confidence[-1], bins.accuracy[-1]) == (1, 1, 0.75)


def test_plot_is_the_kind_of_file_that_its_name_says(tmp_path: Path) -> None:
    bins = reliability.measure(logits(0.9, 10), np.zeros(10, np.int64))
    for name, start in (("plot.png", b"\x89PNG"), ("plot.svg", b"<?xml"), ("plot.pdf", b"%PDF")):
        reliability.plot({"before": bins, "after": bins}, "title", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(PlotError, match=r"plot\.txt"):
        reliability.plot({"before": bins}, "title", tmp_path / "plot.txt")


def test_plot_has_a_point_for_each_bin_that_is_not_empty(tmp_path: Path) -> None:
    path, points = tmp_path / "plot.svg", []
    for confidences in ([0.9], [0.9, 0.5]):
        some = np.concatenate([logits(confidence, 5) for confidence in confidences])
        bins = reliability.measure(some, np.zeros(len(some), np.int64))
        reliability.plot({"all": bins}, "title", path)
        points.append(path.read_text().count("<use "))
    assert points[1] == points[0] + 1


def test_title_is_shown_as_it_is(tmp_path: Path) -> None:
    bins = reliability.measure(logits(0.9, 10), np.zeros(10, np.int64))
    reliability.plot({"all": bins}, "$^$.onnx on the test images", tmp_path / "plot.svg")
    assert "<!-- $^$.onnx on the test images -->" in (tmp_path / "plot.svg").read_text()
