"""Colour operations on batches, each image with its own parameter.

Images are uint8 [N, 3, H, W], in and out, in any memory format; parameters are float [N] on their
device. Results are those of torchvision.transforms.v2.functional on each image, but for a level where a
sum falls on the other side of the whole number that it is cut off to. Operations without parameters
are torchvision's own, which take batches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply the pixels."""
    return _pixels(images * _each(factors))


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Move the pixels away from (above 1), or to, the mean of the image's grey values."""
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), factors)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Move the pixels away from (above 1), or to, their grey value."""
    return _blend(images, _grey(images), factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Move the pixels away from (above 1), or to, those of the smoothed image; the border stays."""
    kernel = torch.tensor([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]], device=images.device) / 13
    pixels = images.float()
    smooth = F.conv2d(pixels, kernel.expand(3, 1, 3, 3), groups=3).round()
    inside = pixels[..., 1:-1, 1:-1]
    inside.addcmul_(smooth.sub_(inside), _each(1 - factors))
    return _pixels(pixels)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue by a part of the full circle, from -0.5 to 0.5."""
    pixels = images.float() / 255
    red, green, blue = pixels.unbind(1)
    value, low = pixels.amax(1), pixels.amin(1)
    chroma = value - low
    span = torch.where(chroma > 0, chroma, 1.0)
    # The place on the circle, in sixths: by which channel is the highest, red before green before blue.
    place = torch.where(
        value == red,
        (green - blue) / span,
        torch.where(value == green, 2 + (blue - red) / span, 4 + (red - green) / span),
    )
    place = place + 6 * turns.view(-1, 1, 1)
    # A channel falls from the value by its distance on the circle (A. R. Smith's HSV, unfolded).
    start = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1)
    distance = (start + place[:, None]).remainder(6)
    fall = torch.minimum(distance, 4 - distance).clamp(0, 1)
    shifted = value[:, None] - chroma[:, None] * fall
    return (shifted * (256 - 1e-3)).to(torch.uint8)  # as torchvision scales float images to uint8


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep only the highest ``bits`` (a whole number, 0 to 8) of each pixel."""
    masks = _each(256 - 2 ** (8 - bits)).to(torch.uint8)
    return torch.bitwise_and(images, masks)


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Invert the pixels from a threshold, 0 to 255, on."""
    return torch.where(images >= _each(thresholds), 255 - images, images)


def _each(values: Tensor) -> Tensor:
    return values.float().view(-1, 1, 1, 1)


def _grey(images: Tensor) -> Tensor:
    pixels = images.float()
    red, green, blue = pixels[:, :1], pixels[:, 1:2], pixels[:, 2:]
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    return _pixels((images * _each(factors)).addcmul_(others, _each(1 - factors)))


def _pixels(values: Tensor) -> Tensor:
    return values.clamp(0, 255).to(torch.uint8)
