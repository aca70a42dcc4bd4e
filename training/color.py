"""Changes of colour and sharpness in uint8 images [N, H, W, 3], with parameters for each image.

After each change, results are those of ``torchvision.transforms.v2`` on single uint8 images but for a
few values, a level apart: the same float32 arithmetic, except for the hue, and the same rounding
(mostly down) to a level after every step.
"""

import numpy as np
import torch
from torch import Generator, Tensor

from training import recipe
from training.batch import Array, Parameters, beside, by_group, uniform

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def draw_jitter(part: recipe.ColorJitter, count: int, generator: Generator) -> Parameters:
    """Draw the parameters of ``jitter`` for ``count`` images: uniform ``order`` and ``amounts``."""
    spread = np.array([part.brightness, part.contrast, part.saturation, part.hue], np.float32)
    centre = np.array([1, 1, 1, 0], np.float32)
    low = np.maximum(centre - spread, np.array([0, 0, 0, -part.hue], np.float32))
    return {
        "order": uniform(generator, count, 4).argsort(1),
        "amounts": low + (centre + spread - low) * uniform(generator, count, 4),
    }


def jitter(images: Tensor, order: Array, amounts: Array) -> Tensor:
    """Change brightness, contrast, saturation and hue, in each image's own order.

    Args:
        images: uint8 [N, H, W, 3].
        order: integers [N, 4], each row a permutation of ``BRIGHTNESS`` to ``HUE``.
        amounts: float [N, 4], columns in that numbering: factors as in ``adjust``, and for the hue the
            fraction of the colour circle to turn it by, -0.5 to 0.5.
    """
    planes = _planes(images)
    for what, amount in zip(order.T, np.take_along_axis(amounts, order, 1).T, strict=True):
        turns = np.where(what == HUE, amount, 0)
        planes = _adjust(planes, what, np.where(what == HUE, 1, amount))
        planes = by_group(
            planes, turns != 0, lambda turned, *of: _turn_hue(*of) if turned else of[0], turns
        )
    return _pixels(planes)


def adjust(images: Tensor, what: Array, factors: Array) -> Tensor:
    """Change one property of each image.

    Args:
        images: uint8 [N, H, W, 3].
        what: integers [N]: ``BRIGHTNESS`` (a factor of 0 gives black), ``CONTRAST`` (the image's mean
            grey) or ``SATURATION`` (each pixel's grey).
        factors: float [N], not negative; 1 leaves the image as it is.
    """
    return _pixels(_adjust(_planes(images), what, factors))


def draw_sharpness(part: recipe.Sharpness, count: int, generator: Generator) -> Parameters:
    """Draw the parameters of ``sharpen`` for ``count`` images."""
    return {"factors": np.where(uniform(generator, count) < part.p, part.factor, 1.0)}


def sharpen(images: Tensor, factors: Array) -> Tensor:
    """Change sharpness by ``factors``, float [N], not negative: 0 blurs, 1 leaves the image as it is."""
    planes = _planes(images)
    inner = planes[..., 1:-1, 1:-1]
    lines = planes[..., :-2, :] + planes[..., 1:-1, :] + planes[..., 2:, :]
    sums = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:]
    blurred = (sums + 4 * inner).div_(13).round_()
    inner.add_(blurred.sub_(inner).mul_(_column(planes, 1 - factors.astype(np.float64))))
    return _pixels(planes.clamp_(0, 255))


def posterize(images: Tensor, bits: Array) -> Tensor:
    """Keep the ``bits`` highest bits, integers [N] from 0 to 8, of each level."""
    kept = (256 - (256 >> bits)).astype(np.uint8)
    return images & beside(images, kept).view(-1, 1, 1, 1)


def solarize(images: Tensor, thresholds: Array) -> Tensor:
    """Invert levels at or above ``thresholds``, float [N]; a threshold of 0 inverts the whole image."""
    return torch.where(images >= _column(images, thresholds), 255 - images, images)


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel of each image to 0..255; a channel of a single level stays as it is."""
    planes = _planes(images)
    low, high = planes.amin((2, 3), keepdim=True), planes.amax((2, 3), keepdim=True)
    flat = low == high
    step = ((high - low) * (1 / 255)).masked_fill_(flat, 1)
    return _pixels(planes.sub_(low.masked_fill_(flat, 0)).div_(step).clamp_(0, 255))


def equalize(images: Tensor) -> Tensor:
    """Equalize the histogram of each channel of each image, as PIL does."""
    _, height, width, _ = images.shape
    levels = images.flatten(1, 2).transpose(1, 2).long()
    histogram = torch.zeros(*levels.shape[:2], 256, dtype=torch.int32, device=images.device)
    histogram.scatter_add_(2, levels, torch.ones_like(histogram[..., :1]).expand_as(levels))
    darker = histogram.cumsum(2) - histogram
    brightest = levels.amax(2, keepdim=True)
    step = (height * width - histogram.gather(2, brightest)) // 255
    table = ((darker + step // 2) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step == 0, torch.arange(256, device=images.device), table)
    return _pixels(table.gather(2, levels).unflatten(2, (height, width)))


def _planes(images: Tensor) -> Tensor:
    """Convert uint8 [N, H, W, 3] to float32 [N, 3, H, W], contiguous for fast arithmetic on a CPU."""
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def _pixels(planes: Tensor) -> Tensor:
    """Convert levels [N, 3, H, W], rounded down, to uint8 [N, H, W, 3]."""
    return torch.stack(planes.to(torch.uint8).unbind(1), -1)


def _column(images: Tensor, parameters: Array) -> Tensor:
    """``parameters`` [N] as float32 [N, 1, 1, 1] on the device of ``images``."""
    return beside(images, parameters.astype(np.float32)).view(-1, 1, 1, 1)


def _adjust(planes: Tensor, what: Array, factors: Array) -> Tensor:
    rest = 1 - factors.astype(np.float64)
    parameters = np.stack([factors, rest, what == CONTRAST, what == SATURATION]).astype(np.float32)
    own, rest_of, to_mean, to_grey = beside(planes, parameters)[..., None, None, None]
    red, green, blue = planes.split(1, 1)
    grey = (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()
    base = grey.mean((2, 3), keepdim=True) * to_mean + grey * to_grey
    adjusted: Tensor = (planes * own).addcmul_(base, rest_of).clamp_(0, 255).floor_()
    return adjusted


def _turn_hue(planes: Tensor, turns: Array) -> Tensor:
    red, green, blue = planes.unbind(1)
    high = planes.amax(1)
    chroma = high - planes.amin(1)
    divisor = chroma.clamp(min=1)  # where the chroma is 0, the hue does not matter
    sixth = torch.where(
        high == red,
        (green - blue) / divisor,
        torch.where(high == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sixth += beside(planes, 6 * turns.astype(np.float32))[:, None, None]
    # How far each channel is below the highest one, as a share of the chroma, by its angle to the hue.
    angles = torch.stack([sixth + 5, sixth + 3, sixth + 1], 1).remainder_(6)
    below = torch.minimum(angles, 4 - angles).clamp_(0, 1)
    turned = high[:, None] - chroma[:, None] * below
    return turned.mul_(255.999 / 255).trunc_()  # torchvision's conversion from 0..1 to a level
