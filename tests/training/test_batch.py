import numpy as np
import torch
from torch import Tensor

from training.batch import Array, by_group


def test_each_group_gets_its_images_and_parameters_once() -> None:
    images = torch.arange(6.0)[:, None]
    before = images.clone()
    calls = []

    def function(group: int, part: Tensor, factors: Array) -> Tensor:
        calls.append((group, part.flatten().tolist()))
        return part * torch.from_numpy(factors)[:, None] + 100 * group

    groups, factors = np.array([2, 0, 2, 5, 0, 2]), np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    changed = by_group(images, groups, function, factors)
    assert changed.flatten().tolist() == [200, 2, 206, 512, 20, 230]
    assert calls == [(0, [1, 4]), (2, [0, 2, 5]), (5, [3])]
    assert torch.equal(images, before)


def test_one_group_is_the_whole_batch() -> None:
    images = torch.arange(3.0)
    changed = by_group(images, np.array([True] * 3), lambda group, part: part + group)
    assert changed.tolist() == [1, 2, 3]
