"""Rectangles that hide a part of each image: random erasing and Cutout.

Rectangles are integers [N, 4]: the first row and column hidden, then the first row and column after the
rectangle. They may reach beyond the image; one without rows or columns hides nothing.
"""

import math

import numpy as np
import torch
from torch import Generator, Tensor

from training import recipe
from training.batch import SIZE, Array, Parameters, beside, uniform

TRIES = 10
_HEIGHT_AND_WIDTH = np.array([1, -1])[:, None, None]


def draw_erasing(part: recipe.RandomErasing, count: int, generator: Generator) -> Parameters:
    """Draw the parameters of ``hide`` for random erasing (Zhong et al., 2017, arXiv:1708.04896).

    As in torchvision's RandomErasing: the area is a uniform fraction of the image within ``scale``, the
    ratio of height to width within ``ratio`` is uniform in its logarithm, and there are ten tries to get
    a rectangle smaller than the image.
    """
    drawn = uniform(generator, 2, count, TRIES)
    root = np.sqrt(SIZE**2 * (part.scale[0] + (part.scale[1] - part.scale[0]) * drawn[0]))
    low, high = (math.log(ratio) / 2 for ratio in part.ratio)
    sides = np.rint(root * np.exp(_HEIGHT_AND_WIDTH * (low + (high - low) * drawn[1])))
    fits = (sides < SIZE).all(0)
    chosen = fits.argmax(1)  # the first try that fits
    tries = np.arange(count), chosen
    side = sides[:, *tries]
    chance, *places = uniform(generator, 3, count)
    first = np.floor(places * (SIZE - side + 1))
    hidden = fits[tries] & (chance < part.p)
    return {"rectangles": np.concatenate([first, first + side * hidden]).T.astype(np.int64)}


def draw_cutout(part: recipe.Cutout, count: int, generator: Generator) -> Parameters:
    """Draw the parameters of ``hide`` for Cutout (DeVries & Taylor, 2017, arXiv:1708.04552).

    The squares' centres lie anywhere in the image, so the squares may reach beyond it.
    """
    first = torch.randint(SIZE, (count, 2), generator=generator).numpy() - part.size // 2
    hidden = uniform(generator, count, 1) < part.p
    return {"rectangles": np.concatenate([first, first + part.size * hidden], 1)}


def hide(images: Tensor, rectangles: Array, value: float) -> Tensor:
    """Fill the rectangles of normalised ``images``, float [N, H, W, 3], with ``value``."""
    _, height, width, channels = images.shape
    first, after = rectangles.reshape(-1, 2, 2, 1).transpose(1, 0, 2, 3)
    places = np.arange(max(height, width)).repeat(channels)
    inside = beside(images, (first <= places) & (places < after)).float()
    rows, columns = inside[:, 0, : height * channels : channels], inside[:, 1, : width * channels]
    # Arithmetic on rows of W x 3 values: on a CPU far faster than a broadcast mask of bools.
    filled = torch.full((), value, device=images.device)
    return images.flatten(2).lerp(filled, rows[:, :, None] * columns[:, None]).view(images.shape)
