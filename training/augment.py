"""Augmentation of whole batches on the training device, with random parameters for each image.

Parameters are drawn on the CPU from one generator, whatever the device; applying them depends only on
the pixels and the parameters. So runs on a CPU and on GPUs see the same images, and a GPU never waits to
learn what was drawn.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, assert_never

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from training import autoaugment, color, geometry, occlusion, recipe
from training.batch import SIZE, Array, Parameters, uniform
from training.recipe import ON_NORMALISED

Draw = Callable[[Array, int, Generator], Parameters]


class Operation(NamedTuple):
    """An augmentation operation of a recipe, as two functions.

    Attributes:
        draw: draws parameters, given the images' indices in the training set, the epoch and a generator.
        apply: maps images [N, 32, 32, 3], uint8 or normalised, and the parameters to new images.
    """

    draw: Draw
    apply: Callable[..., Tensor]


class Augmenter:
    """Turns batches of uint8 images into normalised, augmented ones by a recipe's ``augment`` list.

    Args:
        recipe: gives the operations, mean and std, and the image size of each epoch.
        count: number of images in the training set; batches refer to them by index (0..count-1).
        seed: of the run; decides which half ``alternating_flip`` mirrors first.
        device: that of the batches.
    """

    def __init__(self, recipe: recipe.Recipe, count: int, seed: int, device: torch.device) -> None:
        self._resolution = sorted(recipe.resolution, key=lambda part: part.from_epoch)
        first_half = uniform(Generator().manual_seed(seed), count) < 0.5
        self._operations = [_operation(part, first_half) for part in recipe.augment]
        self._on_pixels = sum(part.op not in ON_NORMALISED for part in recipe.augment)
        # As in Normalize, but on whole rows (red, green, blue, red, ...): several times faster on a CPU.
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (recipe.data.mean, recipe.data.std))
        self._scale = (1 / (255 * std)).repeat(SIZE).float().to(device)
        self._bias = (-mean / std).repeat(SIZE).float().to(device)

    def draw(self, indices: Tensor, epoch: int, generator: Generator) -> list[Parameters]:
        """Draw the parameters of every operation for a batch.

        Args:
            indices: int64 [N] on the CPU, the images' indices in the training set.
            epoch: the current one; the first is 0.
            generator: on the CPU; all randomness comes from it.

        Returns:
            One entry for each operation, for ``apply``. All arrays have N rows, one for each image, so
            the same rows of all of them are the parameters of a part of the batch.
        """
        places = indices.numpy()
        return [operation.draw(places, epoch, generator) for operation in self._operations]

    def apply(self, pixels: Tensor, parameters: Sequence[Parameters], epoch: int) -> Tensor:
        """Augment a batch; the same pixels and parameters always give the same result.

        Args:
            pixels: uint8 [N, 32, 32, 3], contiguous, on the augmenter's device; they are not changed.
            parameters: those of the same images, from ``draw``.
            epoch: the current one; the first is 0.

        Returns:
            float32 [N, 3, S, S], normalised, in channels-last memory; S is the epoch's image size.
        """
        steps = list(zip(self._operations, parameters, strict=True))
        for operation, drawn in steps[: self._on_pixels]:
            pixels = operation.apply(pixels, **drawn)
        images = pixels.flatten(2).float().mul_(self._scale).add_(self._bias).view(pixels.shape)
        for operation, drawn in steps[self._on_pixels :]:
            images = operation.apply(images, **drawn)
        images = images.permute(0, 3, 1, 2)
        size = self.image_size(epoch)
        if size != SIZE:
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        return images.contiguous(memory_format=torch.channels_last)

    def image_size(self, epoch: int) -> int:
        """The side of the training images in ``epoch``, in pixels."""
        return next((p.size for p in reversed(self._resolution) if p.from_epoch <= epoch), SIZE)


def _operation(part: recipe.Augmentation, first_half: Array) -> Operation:
    match part:
        case recipe.AlternatingFlip():
            return Operation(
                lambda places, epoch, _: {"chosen": first_half[places] ^ (epoch % 2 == 1)},
                geometry.mirror,
            )
        case recipe.HorizontalFlip():
            return Operation(_drawing(geometry.draw_mirror, part), geometry.mirror)
        case recipe.RandomCrop():
            shift = partial(geometry.shift, margin=part.padding, border=part.border)
            return Operation(_drawing(geometry.draw_crop, part), shift)
        case recipe.Translate():
            shift = partial(geometry.shift, margin=math.ceil(part.fraction * SIZE), border="black")
            return Operation(_drawing(geometry.draw_translation, part), shift)
        case recipe.Rotation():
            return Operation(_drawing(geometry.draw_rotation, part), geometry.rotate)
        case recipe.ColorJitter():
            return Operation(_drawing(color.draw_jitter, part), color.jitter)
        case recipe.Sharpness():
            return Operation(_drawing(color.draw_sharpness, part), color.sharpen)
        case recipe.AutoAugment():
            return Operation(_drawing(autoaugment.draw), autoaugment.apply)
        case recipe.RandomErasing():
            hide = partial(occlusion.hide, value=part.value)
            return Operation(_drawing(occlusion.draw_erasing, part), hide)
        case recipe.Cutout():
            return Operation(_drawing(occlusion.draw_cutout, part), partial(occlusion.hide, value=0.0))
        case _:
            assert_never(part)


def _drawing(draw: Callable[..., Parameters], *part: recipe.Augmentation) -> Draw:
    """Make a ``Draw`` of a function that needs only the number of images."""
    return lambda places, _, generator: draw(*part, len(places), generator)


class Normalize(nn.Module):
    """Maps uint8 images [N, 3, H, W] to float32: (x / 255 - mean) / std in each channel."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        normalised: Tensor = (images.float() / 255 - self.mean) / self.std
        return normalised
