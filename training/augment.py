"""Augmentation of whole batches on the training device, each image with its own random parameters.

All randomness comes from torch's global generators, which the training loop seeds for every step.
Operations that torchvision has only per image or with one set of parameters a batch run image by
image through torchvision itself, so that they are by definition what the reports ran.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from training import recipe


class Augmenter:
    """Turns a batch of uint8 images into a normalised, augmented one by a recipe's ``augment`` list.

    Args:
        recipe: gives the operations, mean and std, and the image size of each epoch.
        count: images in the training set, whose indices (0..count-1) come with each batch.
        seed: of the run; decides which half ``alternating_flip`` mirrors first.
        device: where the batches lie.
    """

    def __init__(self, recipe: recipe.Recipe, count: int, seed: int, device: torch.device) -> None:
        self._resolution = sorted(recipe.resolution, key=lambda part: part.from_epoch)
        self._normalize = Normalize(recipe.data.mean, recipe.data.std).to(device)
        halves = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
        self._first_half = halves.to(device)
        self._operations = [self._operation(part) for part in recipe.augment]
        self._erase_last = bool(recipe.augment) and recipe.augment[-1].op == "random_erasing"

    def __call__(self, pixels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """Augment one batch.

        Args:
            pixels: uint8 [N, 32, 32, 3].
            indices: int64 [N], the images' places in the training set.
            epoch: the current one; the first is 0.

        Returns:
            float32 [N, 3, S, S], normalised, in channels-last memory; S is the epoch's image size.
        """
        images = pixels.permute(0, 3, 1, 2)
        on_pixels = self._operations[:-1] if self._erase_last else self._operations
        for operation in on_pixels:
            images = operation(images, indices, epoch)
        images = self._normalize(images)
        if self._erase_last:
            images = self._operations[-1](images, indices, epoch)
        size = self.image_size(epoch)
        if size != images.shape[-1]:
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        return images.contiguous(memory_format=torch.channels_last)

    def image_size(self, epoch: int) -> int:
        """The side of the training images in ``epoch``, in pixels."""
        return next((p.size for p in reversed(self._resolution) if p.from_epoch <= epoch), 32)

    def _operation(self, part: recipe.Augmentation) -> Callable[[Tensor, Tensor, int], Tensor]:
        match part:
            case recipe.AlternatingFlip():
                return lambda images, indices, epoch: mirror(
                    images, self._first_half[indices] ^ (epoch % 2 == 1)
                )
            case recipe.HorizontalFlip():
                return lambda images, *_: mirror(
                    images, torch.rand(len(images), device=images.device) < part.p
                )
            case recipe.RandomCrop():
                return lambda images, *_: random_crop(images, part.padding, part.border)
            case recipe.RandomErasing():
                return lambda images, *_: random_erasing(
                    images, part.p, part.scale, part.ratio, part.value
                )
            case _:
                transform = _torchvision_transform(part)
                return lambda images, *_: torch.stack([transform(image) for image in images])


class Normalize(nn.Module):
    """uint8 images [N, 3, H, W] to float32 with (x / 255 - mean) / std, a channel at a time."""

    def __init__(self, mean: recipe.Triple, std: recipe.Triple) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        normalised: Tensor = (images.float() / 255 - self.mean) / self.std
        return normalised


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the ``chosen`` (bool [N]) of ``images`` [N, 3, H, W] left to right."""
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def random_crop(images: Tensor, padding: int, border: str) -> Tensor:
    """Pad ``images`` [N, 3, H, W] by ``padding`` pixels a side and crop each at a random place.

    The border is ``black`` (as in torchvision's RandomCrop with padding) or ``reflect`` (mirrored,
    the edge itself not repeated).
    """
    count, _, height, width = images.shape
    rows, row_inside = _shifted(count, height, padding, border, images.device)
    columns, column_inside = _shifted(count, width, padding, border, images.device)
    batch = torch.arange(count, device=images.device)[:, None, None]
    out = images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]]
    if border == "black":
        out *= (row_inside[:, :, None] & column_inside[:, None, :])[..., None]
    return out.permute(0, 3, 1, 2)


def _shifted(
    count: int, length: int, padding: int, border: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    shift = torch.randint(-padding, padding + 1, (count, 1), device=device)
    places = torch.arange(length, device=device) + shift
    inside = (places >= 0) & (places < length)
    if border == "reflect":
        places = (length - 1) - (length - 1 - places.abs()).abs()
    return places.clamp(0, length - 1), inside


def random_erasing(
    images: Tensor,
    p: float,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    value: float,
) -> Tensor:
    """Fill a random rectangle of each image, float [N, 3, H, W], with probability ``p``.

    As torchvision's RandomErasing: area ``scale`` as a fraction of the image, height to width
    ``ratio`` uniform in its logarithm, ten tries for a rectangle smaller than the image.
    """
    count, _, height, width = images.shape
    device, tries = images.device, 10
    area = height * width * torch.empty(count, tries, device=device).uniform_(*scale)
    low, high = torch.tensor(ratio).log().tolist()
    aspect = torch.empty(count, tries, device=device).uniform_(low, high).exp()
    heights, widths = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (heights < height) & (widths < width)
    chosen = fits.int().argmax(1, keepdim=True)  # the first try that fits
    h, w = heights.gather(1, chosen), widths.gather(1, chosen)
    top = (torch.rand(count, 1, device=device) * (height - h + 1)).floor()
    left = (torch.rand(count, 1, device=device) * (width - w + 1)).floor()
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    erase = ((y >= top) & (y < top + h))[:, :, None] & ((x >= left) & (x < left + w))[:, None, :]
    erase &= (fits.any(1) & (torch.rand(count, device=device) < p))[:, None, None]
    return images.masked_fill(erase[:, None], value)


def _torchvision_transform(part: recipe.Augmentation) -> v2.Transform:
    match part:
        case recipe.ColorJitter():
            return v2.ColorJitter(part.brightness, part.contrast, part.saturation, part.hue)
        case recipe.Rotation():
            return v2.RandomRotation(part.degrees)
        case recipe.Translate():
            return v2.RandomAffine(0, translate=(part.fraction, part.fraction))
        case recipe.Sharpness():
            return v2.RandomAdjustSharpness(part.factor, part.p)
        case recipe.AutoAugment():
            return v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
        case _:
            raise AssertionError(f"{part.op} is done on whole batches")
