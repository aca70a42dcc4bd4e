import numpy as np
import torch
from numpy.typing import NDArray

from export import comparison
from training.data import Images


def test_figures_of_a_comparison() -> None:
    expected: NDArray[np.float32] = np.zeros((1000, 10), np.float32)
    expected[:, 3] = 8
    actual = expected.copy()
    actual[:3, 4] = 10  # three images change their class
    labels = torch.full((1000,), 3)
    labels[0] = 4  # and for one of them that is right
    images = Images(torch.zeros(1000, 32, 32, 3, dtype=torch.uint8), labels)
    found = comparison.TestImages(images, "sample").compare(expected, actual, "fp32", "CPU")
    assert (found.images, found.top1_agreement) == (1000, 0.997)
    assert found.max_scaled_difference == 10 / 8
    assert (found.accuracy, found.accuracy_loss) == (0.998, 0.001)
