"""Compare with torchvision.transforms.v2, image by image.

The arithmetic is torchvision's, in float32. A product that is a whole number may come out just below it
where a processor fuses the multiplication with an addition, and is truncated to one level less; the hue
is computed in another way. So after a change of brightness, contrast, saturation, hue or sharpness,
values are at most one level apart, and at least 99.9 % are equal. Operations without such sums are
exactly equal.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from tests.training.parity import PIXELS, difference
from training import color, recipe
from training.batch import Array
from training.color import BRIGHTNESS, CONTRAST, HUE, SATURATION

COUNT = 6000
FACTORS = np.resize([0.0, 0.1, 0.5, 0.7, 0.9, 0.999, 1.0, 1.1, 1.3, 1.9, 3.0], 220)
# Levels from 0 to 255 in all combinations: greys, primaries, ties between channels.
LEVELS = torch.tensor([0, 1, 2, 85, 127, 128, 254, 255], dtype=torch.uint8)
CUBE = torch.cartesian_prod(LEVELS, LEVELS, LEVELS).view(1, 16, 32, 3)


def assert_nearly_equal(apart: Tensor) -> None:
    assert apart.max() <= 1
    assert (apart > 0).double().mean() <= 1e-3


def only_hue(images: Tensor, turns: Array) -> Tensor:
    amounts = np.stack([*np.ones((3, len(turns))), turns], 1)
    return color.jitter(images, np.tile(np.arange(4), (len(turns), 1)), amounts)


@pytest.mark.parametrize(
    ("what", "theirs"),
    [
        (BRIGHTNESS, functional.adjust_brightness),
        (CONTRAST, functional.adjust_contrast),
        (SATURATION, functional.adjust_saturation),
    ],
)
def test_adjust(what: int, theirs: Callable[[Tensor, float], Tensor]) -> None:
    changed = color.adjust(PIXELS[:220], np.full(220, what), FACTORS)
    assert_nearly_equal(difference(changed, lambda i, x: theirs(x, FACTORS[i].item())))


def test_sharpen() -> None:
    changed = color.sharpen(PIXELS[:220], FACTORS)
    theirs = difference(changed, lambda i, x: functional.adjust_sharpness(x, FACTORS[i].item()))
    assert_nearly_equal(theirs)


def test_hue() -> None:
    turns = np.linspace(-0.5, 0.5, 201)
    changed = only_hue(PIXELS[:201], turns)
    assert_nearly_equal(difference(changed, lambda i, x: functional.adjust_hue(x, turns[i].item())))


@pytest.mark.parametrize("turn", [-0.5, -1 / 6, 1e-9, 0.1, 1 / 3, 0.5])
def test_hue_of_the_whole_cube(turn: float) -> None:
    changed = only_hue(CUBE, np.array([turn]))
    assert difference(changed, lambda _, x: functional.adjust_hue(x, turn), CUBE).max() <= 1
    if turn == 1e-9:
        assert torch.equal(changed, CUBE)


def test_nothing_changes_at_a_factor_of_one() -> None:
    one = np.ones(300)
    for what in (BRIGHTNESS, CONTRAST, SATURATION):
        assert torch.equal(color.adjust(PIXELS[:300], np.full(300, what), one), PIXELS[:300])
    assert torch.equal(color.sharpen(PIXELS[:300], one), PIXELS[:300])
    assert torch.equal(only_hue(PIXELS[:300], 0 * one), PIXELS[:300])


JITTER = recipe.ColorJitter(op="color_jitter", brightness=0.3, contrast=0.2, saturation=0.4, hue=0.1)


def test_jitter() -> None:
    """The four changes in each image's own order; a later contrast may widen a gap of one level."""
    drawn = color.draw_jitter(JITTER, 500, torch.Generator().manual_seed(0))
    changes = {
        BRIGHTNESS: functional.adjust_brightness,
        CONTRAST: functional.adjust_contrast,
        SATURATION: functional.adjust_saturation,
        HUE: functional.adjust_hue,
    }

    def theirs(i: int, image: Tensor) -> Tensor:
        for what in drawn["order"][i].tolist():
            image = changes[what](image, drawn["amounts"][i, what].item())
        return image

    apart = difference(color.jitter(PIXELS, **drawn), theirs)
    assert apart.max() <= 2
    assert (apart > 0).double().mean() <= 1e-3


def test_jitter_has_torchvisions_distribution() -> None:
    drawn = color.draw_jitter(JITTER, COUNT, torch.Generator().manual_seed(0))
    reference = v2.ColorJitter(0.3, 0.2, 0.4, 0.1)
    torch.manual_seed(0)
    theirs = [reference.make_params([]) for _ in range(COUNT)]
    for what, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        expected = [one[f"{name}_factor"] for one in theirs]
        assert stats.ks_2samp(drawn["amounts"][:, what], expected).pvalue > 1e-3
    assert np.abs(np.corrcoef(drawn["amounts"].T)[~np.eye(4, dtype=bool)]).max() < 0.06
    _, counts = np.unique(drawn["order"] @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_amounts_of_jitter_are_possible_ones() -> None:
    part = recipe.ColorJitter(op="color_jitter", brightness=0.0, contrast=1.5, saturation=0.0, hue=0.0)
    amounts = color.draw_jitter(part, COUNT, torch.Generator().manual_seed(0))["amounts"]
    assert (amounts[:, [BRIGHTNESS, SATURATION]] == 1).all()
    assert (amounts[:, HUE] == 0).all()
    contrast = amounts[:, CONTRAST]
    assert 0 <= contrast.min() < 0.01
    assert 2.49 < contrast.max() <= 2.5


def test_share_of_sharpened() -> None:
    part = recipe.Sharpness(op="sharpness", factor=2.0, p=0.2)
    factors = color.draw_sharpness(part, COUNT, torch.Generator().manual_seed(0))["factors"]
    assert set(factors) == {1.0, 2.0}
    assert stats.binomtest(int((factors == 2).sum()), COUNT, 0.2).pvalue > 1e-3


def test_posterize() -> None:
    bits = np.resize(np.arange(9), 180)
    changed = color.posterize(PIXELS[:180], bits)
    assert difference(changed, lambda i, x: functional.posterize(x, bits[i].item())).max() == 0


def test_solarize() -> None:
    thresholds = np.linspace(0, 255, 181)
    changed = color.solarize(PIXELS[:181], thresholds)
    assert difference(changed, lambda i, x: functional.solarize(x, thresholds[i].item())).max() == 0
    assert torch.equal(color.solarize(PIXELS[:9], np.zeros(9)), 255 - PIXELS[:9])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(color.autocontrast, functional.autocontrast), (color.equalize, functional.equalize)],
)
def test_stretched_histograms(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]
) -> None:
    dark, flat, two = PIXELS[:50] // 40, torch.full_like(PIXELS[:2], 77), PIXELS[:50] // 128 * 9
    pixels = torch.cat([PIXELS[:300], dark, flat, two])
    before = pixels.clone()
    assert difference(ours(pixels), lambda _, image: theirs(image), pixels).max() == 0
    assert torch.equal(pixels, before)
