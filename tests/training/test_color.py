"""Against torchvision.transforms.v2.functional, image by image, on real images.

The same arithmetic in float32, but in another order here and there: a sum may fall just below a whole
number and is cut off to one level less. So: one level at most, on at most one pixel in a thousand.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from training import color, data

FACTORS = torch.tensor([0.0, 0.1, 0.5, 0.7, 0.9, 0.999, 1.0, 1.1, 1.3, 1.9, 3.0])
CASES: list[tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, float], Tensor], Tensor]] = [
    (color.brightness, functional.adjust_brightness, FACTORS),
    (color.contrast, functional.adjust_contrast, FACTORS),
    (color.saturation, functional.adjust_saturation, FACTORS),
    (color.sharpness, functional.adjust_sharpness, FACTORS),
    (color.hue, functional.adjust_hue, torch.linspace(-0.5, 0.5, 21)),
    (color.posterize, lambda image, bits: functional.posterize(image, int(bits)), torch.arange(9)),
    (color.solarize, functional.solarize, torch.linspace(0, 255, 10)),
]


def assert_same_pixels(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.uint8
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() <= 1e-3


@pytest.mark.parametrize(
    ("ours", "theirs", "values"), CASES, ids=lambda case: getattr(case, "__name__", "")
)
def test_each_image_has_its_own_parameter(
    ours: Callable[[Tensor, Tensor], Tensor],
    theirs: Callable[[Tensor, float], Tensor],
    values: Tensor,
) -> None:
    images = data.load_sample().train.pixels[:200].permute(0, 3, 1, 2)
    values = values.repeat(200)[:200]
    before = images.clone()
    changed = ours(images, values)
    assert torch.equal(images, before), "the input is left alone"
    expected = [theirs(image, value.item()) for image, value in zip(images, values, strict=True)]
    assert_same_pixels(changed, torch.stack(expected))


def test_hue_of_every_corner_of_the_cube() -> None:
    """Greys, primaries, ties between channels: where the circle's cases meet."""
    levels = torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8)
    colors = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 5, 25)
    for turn in (-0.5, -1 / 6, 0.0, 0.1, 1 / 3, 0.5):
        ours = color.hue(colors, torch.tensor([turn]))
        difference = (ours.int() - functional.adjust_hue(colors, turn).int()).abs()
        assert difference.max() <= 1
