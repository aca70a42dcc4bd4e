"""Mirroring, shifts and affine maps of uint8 images [N, H, W, 3], with parameters for each image.

All take the nearest pixel, as the reports' torchvision transforms do, so every result is a gather of
whole pixels or rows: exact, and fast on a CPU too.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from training import recipe
from training.batch import SIZE, Array, Parameters, beside, uniform


def draw_mirror(part: recipe.HorizontalFlip, count: int, generator: Generator) -> Parameters:
    """Draw the parameters of ``mirror`` for ``count`` images."""
    return {"chosen": uniform(generator, count) < part.p}


def mirror(images: Tensor, chosen: Array) -> Tensor:
    """Mirror the ``chosen`` images, bool [N], left to right."""
    count = len(images)
    both = torch.cat([images, images.flip(2)])
    return both.index_select(0, beside(images, np.arange(count) + count * chosen))


def draw_crop(part: recipe.RandomCrop, count: int, generator: Generator) -> Parameters:
    """Draw the parameters of ``shift`` that crop ``count`` padded images."""
    low, high = -part.padding, part.padding + 1
    return {"offsets": torch.randint(low, high, (count, 2), generator=generator).numpy()}


def draw_translation(part: recipe.Translate, count: int, generator: Generator) -> Parameters:
    """Draw the parameters of ``shift`` for ``count`` images: uniform parts of the side, in pixels."""
    farthest = part.fraction * SIZE
    return {"offsets": np.rint(farthest * (2 * uniform(generator, count, 2) - 1)).astype(np.int64)}


def shift(images: Tensor, offsets: Array, margin: int, border: recipe.Border) -> Tensor:
    """Move the contents of each image by whole pixels.

    Args:
        images: uint8 [N, H, W, 3].
        offsets: integers [N, 2], pixels down and to the right, at most ``margin`` either way.
        margin: pixels of border to add on each side.
        border: its content: ``black``, or ``reflect``, the image mirrored at its outermost pixels.
    """
    count, height, width, channels = images.shape
    if border == "black":
        padded = F.pad(images, (0, 0, margin, margin, margin, margin))
    else:
        rows, columns = (beside(images, _reflected(size, margin)) for size in (height, width))
        padded = images.index_select(1, rows).index_select(2, columns)
    # A row of the result is a contiguous piece of a padded row: one index for W pixels.
    piece, row = width * channels, (width + 2 * margin) * channels
    pieces = padded.view(-1).as_strided((padded.numel() - piece + 1, piece), (1, 1))
    down, right = (margin - offsets).T
    first = (np.arange(count) * (height + 2 * margin) + down) * row + right * channels
    starts = first[:, None] + np.arange(0, height * row, row)
    return pieces.index_select(0, beside(images, starts.reshape(-1))).view(images.shape)


def _reflected(size: int, margin: int) -> Array:
    places = np.abs(np.arange(-margin, size + margin))
    reflected: Array = (size - 1) - np.abs(size - 1 - places)
    return reflected


def affine(images: Tensor, matrices: Array) -> Tensor:
    """Transform each image by its matrix; pixels from outside the image are black.

    Args:
        images: uint8 [N, H, W, 3].
        matrices: float [N, 2, 3], each mapping a position in the result to that in the image whose
            nearest pixel it shows, as (right, down, 1) in pixels from the centre.
    """
    count, height, width, channels = images.shape
    # Positions outside the image end in a black border of one pixel around it.
    padded = F.pad(images, (0, 0, 1, 1, 1, 1))
    of = beside(images, matrices.astype(np.float32))[..., None, None]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    # The same steps in float32 as torchvision, so a position between two pixels goes to the same one.
    columns, rows = (
        (of[:, axis, 0] * x + of[:, axis, 1] * y)
        .add_(of[:, axis, 2])
        .add_(size / 2)
        .sub_(0.5)
        .round_()
        .clamp_(-1, size)
        for axis, size in enumerate((width, height))
    )
    places = (rows + 1).mul_(width + 2).add_(columns + 1).int()
    first = torch.arange(count, device=images.device, dtype=torch.int32) * ((height + 2) * (width + 2))
    places += first[:, None, None]
    return padded.view(-1, channels).index_select(0, places.view(-1)).view(images.shape)


def draw_rotation(part: recipe.Rotation, count: int, generator: Generator) -> Parameters:
    """Draw the parameters of ``rotate`` for ``count`` images."""
    return {"angles": part.degrees * (2 * uniform(generator, count) - 1)}


def rotate(images: Tensor, angles: Array) -> Tensor:
    """Rotate each image anticlockwise by ``angles``, float [N], in degrees; the corners are black."""
    radians = np.deg2rad(angles, dtype=np.float64)
    cosine, sine, zero = np.cos(radians), np.sin(radians), np.zeros(len(angles))
    return affine(images, np.stack([cosine, -sine, zero, sine, cosine, zero], 1).reshape(-1, 2, 3))


def shear(images: Tensor, right: Array, down: Array) -> Tensor:
    """Shear each image about its upper left corner; pixels from outside the image are black.

    Args:
        images: uint8 [N, H, W, 3], H and W the same.
        right, down: float [N]; a pixel shows the one that is to its right by ``right`` times its
            distance from the upper edge, or below it by ``down`` times that from the left edge. One of
            the two is 0.
    """
    one, half = np.ones(len(images)), images.shape[1] / 2
    return affine(
        images, np.stack([one, right, half * right, down, one, half * down], 1).reshape(-1, 2, 3)
    )
