"""Operations that hide a part of each normalised image, float [N, 3, H, W]."""

import torch
from torch import Tensor


def fill(images: Tensor, boxes: Tensor, value: float) -> Tensor:
    """Fill a box of each image; ``boxes``, int64 [N, 4], are top, left, bottom, right, ends excluded."""
    _, _, height, width = images.shape
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    hidden = ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]
    return images.masked_fill(hidden[:, None], value)


def erasing_boxes(
    count: int,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Random boxes, int64 [count, 4], of torchvision's RandomErasing (Zhong et al., 2017).

    Area ``scale`` as a fraction of the image, height to width ``ratio`` uniform in its logarithm, ten
    tries for a box smaller than the image, which has ``size`` pixels a side; else an empty one.
    """
    tries = 10
    area = size**2 * torch.empty(count, tries).uniform_(*scale, generator=generator)
    low, high = torch.tensor(ratio).log().tolist()
    aspect = torch.empty(count, tries).uniform_(low, high, generator=generator).exp()
    heights, widths = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (heights < size) & (widths < size)
    first = fits.int().argmax(1, keepdim=True)
    h, w = heights.gather(1, first), widths.gather(1, first)
    top = (torch.rand(count, 1, generator=generator) * (size - h + 1)).floor()
    left = (torch.rand(count, 1, generator=generator) * (size - w + 1)).floor()
    return torch.cat([top, left, top + h, left + w], 1).long() * fits.any(1, keepdim=True)


def cutout_boxes(count: int, size: int, side: int, generator: torch.Generator) -> Tensor:
    """Squares of ``side`` pixels around a random pixel, int64 [count, 4] (DeVries & Taylor, 2017).

    They may stick out of the image, which has ``size`` pixels a side.
    """
    corner = torch.randint(size, (count, 2), generator=generator) - side // 2
    return torch.cat([corner, corner + side], 1)
