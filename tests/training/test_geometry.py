"""Against torchvision, image by image; a pixel that lies between two may be taken from either."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from training import data, geometry


@pytest.fixture(scope="module")
def images() -> Tensor:
    return data.load_sample().train.pixels[:120].permute(0, 3, 1, 2)


def assert_same_places(ours: Tensor, theirs: list[Tensor]) -> None:
    different = (ours != torch.stack(theirs)).any(1)
    assert different.double().mean() <= 2e-3


def test_rotation(images: Tensor) -> None:
    degrees = torch.linspace(-180, 180, len(images))
    ours = geometry.affine(images, geometry.rotations(degrees))
    assert_same_places(
        ours,
        [functional.rotate(image, angle.item()) for image, angle in zip(images, degrees, strict=True)],
    )


def test_translation_is_exact(images: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    right, down = torch.randint(-32, 33, (2, len(images)), generator=generator)
    ours = geometry.affine(images, geometry.translations(right, down))
    for image, moved, x, y in zip(images, ours, right.tolist(), down.tolist(), strict=True):
        expected = functional.affine(image, angle=0.0, translate=[x, y], scale=1.0, shear=[0.0, 0.0])
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_shear_keeps_the_corner(images: Tensor, axis: int) -> None:
    factors = torch.linspace(-0.3, 0.3, len(images))
    along = [torch.zeros_like(factors), torch.zeros_like(factors)]
    along[axis] = factors
    ours = geometry.affine(images, geometry.shears(along[0], along[1], 32))
    expected = []
    for image, factor in zip(images, factors.tolist(), strict=True):
        shear = [0.0, 0.0]
        shear[axis] = math.degrees(math.atan(factor))
        expected.append(
            functional.affine(
                image, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0.0, 0.0]
            )
        )
    assert_same_places(ours, expected)


@pytest.mark.parametrize("border", ["black", "reflect"])
def test_crop_is_of_the_padded_image(images: Tensor, border: str) -> None:
    padded = functional.pad(images, [4], padding_mode="constant" if border == "black" else "reflect")
    generator = torch.Generator().manual_seed(0)
    down, right = torch.randint(-4, 5, (2, len(images)), generator=generator)
    ours = geometry.crop(images, down, right, border)
    for index, crop in enumerate(ours):
        top, left = 4 + down[index], 4 + right[index]
        assert torch.equal(crop, padded[index, :, top : top + 32, left : left + 32])


def test_mirror(images: Tensor) -> None:
    chosen = torch.arange(len(images)) % 3 == 0
    ours = geometry.mirror(images, chosen)
    assert torch.equal(ours[chosen], v2.functional.horizontal_flip(images[chosen]))
    assert torch.equal(ours[~chosen], images[~chosen])
