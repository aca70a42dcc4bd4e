"""Batches in which each image has its own parameters.

Images are tensors on any device; parameters are NumPy arrays with one row for each image, always on the
host. So it is known without waiting for a device which images an operation changes, and computing the
parameters of a small batch costs little.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

Array = NDArray[Any]
Parameters = dict[str, Array]  # of one operation, by argument name

SIZE = 32  # pixels a side of CIFAR-10's images


def uniform(generator: Generator, *shape: int) -> Array:
    """Random numbers, uniform in [0, 1), float32 of ``shape``."""
    return torch.rand(shape, generator=generator).numpy()


def beside(images: Tensor, parameters: Array) -> Tensor:
    """``parameters`` as a tensor on the device of ``images``.

    The copy does not wait for a GPU, as a copy from pageable memory might.
    """
    tensor = torch.from_numpy(parameters)
    return (tensor.pin_memory() if images.is_cuda else tensor).to(images.device, non_blocking=True)


def by_group(
    images: Tensor, groups: Array, function: Callable[..., Tensor], *parameters: Array
) -> Tensor:
    """Apply ``function`` to each group of images.

    Args:
        images: [N, ...].
        groups: bools or integers from 0 up, [N]: the group of each image.
        function: called once for each group that occurs, with the group, its images [K, ...] and their
            parameters; returns the new images, in the same shape and dtype.
        parameters: arrays [N, ...] of the images' parameters.

    Returns:
        The new images in the order of ``images``, which are not changed.
    """
    counts = np.bincount(groups)
    present = counts.nonzero()[0].tolist()
    if len(present) == 1:
        return function(present[0], images, *parameters)
    # Whole images are gathered and joined, never scattered: on a CPU those are plain memory copies.
    order = groups.argsort(kind="stable")
    parts = images.index_select(0, beside(images, order)).split(counts[present].tolist())
    rows = np.split(order, counts[present].cumsum()[:-1])
    joined = torch.cat(
        [
            function(group, part, *(each[of] for each in parameters))
            for group, part, of in zip(present, parts, rows, strict=True)
        ]
    )
    return joined.index_select(0, beside(images, order.argsort()))
