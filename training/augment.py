"""Augmentation of whole batches on the training device, each image with its own random parameters.

All random parameters are drawn on the host: a CPU and a GPU see the same augmentation, and which images
an operation is for is known without asking the device. Applying them is a function of pixels and
parameters alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import autoaugment, color, geometry, occlusion, recipe

SIZE = 32

Parameters = dict[str, Tensor]


class Augmenter:
    """Turns batches of uint8 images into normalised, augmented ones by a recipe's ``augment`` list.

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
        self._operations = [_operation(part, halves) for part in recipe.augment]

    def draw(self, indices: Tensor, epoch: int, generator: torch.Generator) -> list[Parameters]:
        """Random parameters for a batch, on the host: a dictionary of tensors [N, ...] an operation.

        Args:
            indices: int64 [N] on the host, the images' places in the training set.
            epoch: the current one; the first is 0.
            generator: of the host, that all randomness comes from.
        """
        return [operation.draw(indices, epoch, generator) for operation in self._operations]

    def apply(self, pixels: Tensor, parameters: Sequence[Parameters], epoch: int) -> Tensor:
        """Augment one batch.

        Args:
            pixels: uint8 [N, 32, 32, 3] on the device; they stay as they are.
            parameters: what ``draw`` gave, or the same rows of each of its tensors.
            epoch: the current one.

        Returns:
            float32 [N, 3, S, S], normalised, in channels-last memory; S is the epoch's image size.
        """
        images = pixels.permute(0, 3, 1, 2)
        for operation, drawn in zip(self._operations, parameters, strict=True):
            if operation.on_normalised and images.dtype == torch.uint8:
                images = self._normalize(images)
            images = operation.apply(images, drawn)
        if images.dtype == torch.uint8:
            images = self._normalize(images)
        size = self.image_size(epoch)
        if size != images.shape[-1]:
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        return images.contiguous(memory_format=torch.channels_last)

    def image_size(self, epoch: int) -> int:
        """The side of the training images in ``epoch``, in pixels."""
        return next((p.size for p in reversed(self._resolution) if p.from_epoch <= epoch), SIZE)


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


class Operation(ABC):
    """An operation of a recipe: what it draws for each image, and what it does with that."""

    on_normalised = False

    @abstractmethod
    def draw(self, indices: Tensor, epoch: int, generator: torch.Generator) -> Parameters: ...

    @abstractmethod
    def apply(self, images: Tensor, drawn: Parameters) -> Tensor: ...


class HorizontalFlip(Operation):
    def __init__(self, part: recipe.HorizontalFlip) -> None:
        self._p = part.p

    def draw(self, indices: Tensor, epoch: int, generator: torch.Generator) -> Parameters:
        return {"chosen": torch.rand(len(indices), generator=generator) < self._p}

    def apply(self, images: Tensor, drawn: Parameters) -> Tensor:
        return geometry.mirror(images, _there(drawn["chosen"], images))


class AlternatingFlip(Operation):
    def __init__(self, first_half: Tensor) -> None:
        self._first_half = first_half

    def draw(self, indices: Tensor, epoch: int, generator: torch.Generator) -> Parameters:
        return {"chosen": self._first_half[indices] ^ (epoch % 2 == 1)}

    def apply(self, images: Tensor, drawn: Parameters) -> Tensor:
        return geometry.mirror(images, _there(drawn["chosen"], images))


class RandomCrop(Operation):
    def __init__(self, part: recipe.RandomCrop) -> None:
        self._part = part

    def draw(self, indices: Tensor, epoch: int, generator: torch.Generator) -> Parameters:
        padding = self._part.padding
        shifts = torch.randint(-padding, padding + 1, (len(indices), 2), generator=generator)
        return {"shifts": shifts}

    def apply(self, images: Tensor, drawn: Parameters) -> Tensor:
        down, right = _there(drawn["shifts"], images).unbind(1)
        return geometry.crop(images, down, right, self._part.border)


class ColorJitter(Operation):
    """As in torchvision, the four changes come in a random order for each image."""

    def __init__(self, part: recipe.ColorJitter) -> None:
        changes: list[tuple[Callable[[Tensor, Tensor], Tensor], float, float]] = [
            (color.brightness, max(0.0, 1 - part.brightness), 1 + part.brightness),
            (color.contrast, max(0.0, 1 - part.contrast), 1 + part.contrast),
            (color.saturation, max(0.0, 1 - part.saturation), 1 + part.saturation),
            (color.hue, -part.hue, part.hue),
        ]
        # As in torchvision, a change that can only be none is left out.
        self._changes = [change for change in changes if change[1] < change[2]]

    def draw(self, indices: Tensor, epoch: int, generator: torch.Generator) -> Parameters:
        count = len(indices)
        values = [
            torch.empty(count).uniform_(low, high, generator=generator) for _, low, high in self._changes
        ]
        order = torch.rand(count, len(self._changes), generator=generator).argsort(1)
        return {"values": torch.stack(values, 1), "order": order}

    def apply(self, images: Tensor, drawn: Parameters) -> Tensor:
        images = images.clone()
        for place in range(len(self._changes)):
            for index, (change, *_) in enumerate(self._changes):
                rows = (drawn["order"][:, place] == index).nonzero().flatten()
                values = _there(drawn["values"][rows, index], images)
                rows = _there(rows, images)
                images[rows] = change(images[rows], values)
        return images


class Sharpness(Operation):
    def __init__(self, part: recipe.Sharpness) -> None:
        self._part = part

    def draw(self, indices: Tensor, epoch: int, generator: torch.Generator) -> Parameters:
        return {"chosen": torch.rand(len(indices), generator=generator) < self._part.p}

    def apply(self, images: Tensor, drawn: Parameters) -> Tensor:
        rows = _there(drawn["chosen"].nonzero().flatten(), images)
        images = images.clone()
        factors = torch.full((len(rows),), self._part.factor, device=images.device)
        images[rows] = color.sharpness(images[rows], factors)
        return images


class Rotation(Operation):
    def __init__(self, part: recipe.Rotation) -> None:
        self._degrees = part.degrees

    def draw(self, indices: Tensor, epoch: int, generator: torch.Generator) -> Parameters:
        degrees = torch.empty(len(indices)).uniform_(-self._degrees, self._degrees, generator=generator)
        return {"degrees": degrees}

    def apply(self, images: Tensor, drawn: Parameters) -> Tensor:
        return geometry.affine(images, _there(geometry.rotations(drawn["degrees"]), images))


class Translate(Operation):
    """As in torchvision, by whole pixels: a uniform part of the side, rounded."""

    def __init__(self, part: recipe.Translate) -> None:
        self._pixels = part.fraction * SIZE

    def draw(self, indices: Tensor, epoch: int, generator: torch.Generator) -> Parameters:
        shifts = torch.empty(len(indices), 2).uniform_(-self._pixels, self._pixels, generator=generator)
        return {"shifts": shifts.round()}

    def apply(self, images: Tensor, drawn: Parameters) -> Tensor:
        right, down = drawn["shifts"].unbind(1)
        return geometry.affine(images, _there(geometry.translations(right, down), images))


class AutoAugment(Operation):
    def draw(self, indices: Tensor, epoch: int, generator: torch.Generator) -> Parameters:
        operations, magnitudes = autoaugment.draw(len(indices), generator)
        return {"operations": operations, "magnitudes": magnitudes}

    def apply(self, images: Tensor, drawn: Parameters) -> Tensor:
        return autoaugment.apply(images, drawn["operations"], drawn["magnitudes"])


class RandomErasing(Operation):
    on_normalised = True

    def __init__(self, part: recipe.RandomErasing) -> None:
        self._part = part

    def draw(self, indices: Tensor, epoch: int, generator: torch.Generator) -> Parameters:
        count = len(indices)
        boxes = occlusion.erasing_boxes(count, SIZE, self._part.scale, self._part.ratio, generator)
        return {"boxes": boxes * (torch.rand(count, 1, generator=generator) < self._part.p)}

    def apply(self, images: Tensor, drawn: Parameters) -> Tensor:
        return occlusion.fill(images, _there(drawn["boxes"], images), self._part.value)


class Cutout(Operation):
    on_normalised = True

    def __init__(self, part: recipe.Cutout) -> None:
        self._part = part

    def draw(self, indices: Tensor, epoch: int, generator: torch.Generator) -> Parameters:
        count = len(indices)
        boxes = occlusion.cutout_boxes(count, SIZE, self._part.size, generator)
        return {"boxes": boxes * (torch.rand(count, 1, generator=generator) < self._part.p)}

    def apply(self, images: Tensor, drawn: Parameters) -> Tensor:
        return occlusion.fill(images, _there(drawn["boxes"], images), 0.0)


def _operation(part: recipe.Augmentation, halves: Tensor) -> Operation:
    match part:
        case recipe.HorizontalFlip():
            return HorizontalFlip(part)
        case recipe.AlternatingFlip():
            return AlternatingFlip(halves)
        case recipe.RandomCrop():
            return RandomCrop(part)
        case recipe.ColorJitter():
            return ColorJitter(part)
        case recipe.Sharpness():
            return Sharpness(part)
        case recipe.Rotation():
            return Rotation(part)
        case recipe.Translate():
            return Translate(part)
        case recipe.AutoAugment():
            return AutoAugment()
        case recipe.RandomErasing():
            return RandomErasing(part)
        case recipe.Cutout():
            return Cutout(part)


def _there(parameter: Tensor, images: Tensor) -> Tensor:
    return parameter.to(images.device, non_blocking=True)
