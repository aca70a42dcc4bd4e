"""Real images to try operations on, and torchvision's results for them, image by image."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from training import data
from training.autoaugment import OPERATIONS

PIXELS = data.load_sample().train.pixels
AUTO_AUGMENT = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
THEIR_NAMES = {
    name: next(key for key in AUTO_AUGMENT._AUGMENTATION_SPACE if key.lower() == name.replace("_", ""))
    for name in OPERATIONS
    if name != "identity"
}


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def difference(ours: Tensor, theirs: Callable[[int, Tensor], Any], pixels: Tensor = PIXELS) -> Tensor:
    """Levels between ``ours``, uint8 [N, H, W, 3], and ``theirs(index, image)``, uint8 [3, H, W]."""
    images = pixels[: len(ours)].permute(0, 3, 1, 2)
    expected = torch.stack([theirs(index, image) for index, image in enumerate(images)])
    assert ours.dtype == expected.dtype == torch.uint8
    return (ours.int() - expected.permute(0, 2, 3, 1).int()).abs()


def torchvisions_operation(name: str, image: Tensor, magnitude: float) -> Tensor:
    """Apply torchvision's operation of AutoAugment, by our name, to one image, uint8 [3, 32, 32]."""
    if name == "identity":
        return image
    changed: Tensor = AUTO_AUGMENT._apply_image_or_video_transform(
        image, THEIR_NAMES[name], magnitude, InterpolationMode.NEAREST, AUTO_AUGMENT._fill
    )
    return changed
