"""Operations that move pixels, on batches of images [N, 3, H, W], each with its own parameters.

The pixel nearest to a place is taken, as in torchvision; outside of the image is black. Images are
gathered from channels-last memory, so that a pixel's three bytes move together.
"""

import torch
from torch import Tensor


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the ``chosen`` (bool [N]) of ``images`` left to right."""
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def crop(images: Tensor, down: Tensor, right: Tensor, border: str) -> Tensor:
    """Move the window on each image by ``down`` and ``right`` pixels, int64 [N].

    The border is ``black`` (as in torchvision's RandomCrop with padding) or ``reflect`` (mirrored,
    the edge itself not repeated).
    """
    height, width = images.shape[2:]
    rows, row_inside = _shifted(down, height, border)
    columns, column_inside = _shifted(right, width, border)
    inside = row_inside[:, :, None] & column_inside[:, None, :] if border == "black" else None
    return _gather(images, rows[:, :, None] * width + columns[:, None, :], inside)


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Fill each pixel (x, y) from its place M (x, y, 1), with (0, 0) in the middle of the image.

    Args:
        images: of any dtype.
        matrices: float32 [N, 2, 3], from the result's coordinates to the source's, in pixels.
    """
    _, _, height, width = images.shape
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    first, second, third = (part[:, :, None, None] for part in matrices.unbind(2))
    places = first * x + second * y + third
    columns = (places[:, 0] + (width - 1) / 2).round()
    rows = (places[:, 1] + (height - 1) / 2).round()
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    source = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    return _gather(images, source.long(), inside)


def rotations(degrees: Tensor) -> Tensor:
    """Matrices, float32 [N, 2, 3], that turn images counter-clockwise by ``degrees``, float [N]."""
    angle = degrees.double().deg2rad()
    zero = torch.zeros_like(angle)
    rows = [angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero]
    return torch.stack(rows, 1).view(-1, 2, 3).float()


def translations(right: Tensor, down: Tensor) -> Tensor:
    """Matrices, float32 [N, 2, 3], that move images by whole pixels, int or float [N]."""
    one, zero = torch.ones_like(right), torch.zeros_like(right)
    return torch.stack([one, zero, -right, zero, one, -down], 1).view(-1, 2, 3).float()


def shears(along_x: Tensor, along_y: Tensor, size: int) -> Tensor:
    """Matrices, float32 [N, 2, 3], that shift each row (or column) by a factor of its place.

    The corner at the top left, of images with a side of ``size`` pixels, stays where it is.
    """
    one = torch.ones_like(along_x)
    half = size / 2
    rows = [one, along_x, along_x * half, along_y, one, along_y * half]
    return torch.stack(rows, 1).view(-1, 2, 3).float()


def _shifted(shift: Tensor, length: int, border: str) -> tuple[Tensor, Tensor]:
    places = torch.arange(length, device=shift.device) + shift[:, None]
    inside = (places >= 0) & (places < length)
    if border == "reflect":
        places = (length - 1) - (length - 1 - places.abs()).abs()
    return places.clamp(0, length - 1), inside


def _gather(images: Tensor, source: Tensor, inside: Tensor | None) -> Tensor:
    """Pixels of each image at ``source``, int64 [N, H, W] into its H * W; 0 where not ``inside``."""
    count, channels, height, width = images.shape
    pixels = images.permute(0, 2, 3, 1).reshape(count * height * width, channels)
    offsets = torch.arange(count, device=images.device).view(-1, 1, 1) * (height * width)
    taken = pixels.index_select(0, (source + offsets).flatten())
    if inside is not None:
        taken *= inside.flatten()[:, None]
    return taken.view(count, height, width, channels).permute(0, 3, 1, 2)
