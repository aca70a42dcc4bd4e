"""Compare with torchvision, image by image.

Flips and shifts are exact. Where a position lies between two pixels, rounding in float32 decides which
is taken, and a processor may fuse operations: rotations and shears agree on at least 99.9 % of pixels.
"""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from tests.training.parity import PIXELS, difference, source
from training import geometry, recipe

COUNT = 6000


def test_mirror() -> None:
    chosen = np.arange(100) % 3 == 0
    mirrored = geometry.mirror(PIXELS[:100], chosen)
    theirs = difference(mirrored, lambda i, x: functional.horizontal_flip(x) if chosen[i] else x)
    assert theirs.max() == 0


def test_share_of_mirrored() -> None:
    part = recipe.HorizontalFlip(op="horizontal_flip", p=0.3)
    chosen = geometry.draw_mirror(part, COUNT, source())["chosen"]
    assert stats.binomtest(int(chosen.sum()), COUNT, 0.3).pvalue > 1e-3


@pytest.mark.parametrize("border", ["black", "reflect"])
@pytest.mark.parametrize("padding", [1, 4, 31])
def test_crop(border: Literal["black", "reflect"], padding: int) -> None:
    part = recipe.RandomCrop(op="random_crop", padding=padding, border=border)
    offsets = geometry.draw_crop(part, 100, source())["offsets"]
    offsets[:2] = [[-padding, padding], [padding, -padding]]
    mode = "constant" if border == "black" else "reflect"

    def theirs(i: int, image: Tensor) -> Any:
        top, left = (padding - offsets[i]).tolist()
        padded = functional.pad(image, [padding], padding_mode=mode)
        return functional.crop(padded, top, left, 32, 32)

    assert difference(geometry.shift(PIXELS[:100], offsets, padding, border), theirs).max() == 0


def test_crop_has_torchvisions_distribution() -> None:
    part = recipe.RandomCrop(op="random_crop", padding=4, border="black")
    ours = 4 - geometry.draw_crop(part, COUNT, source())["offsets"]
    reference, image = v2.RandomCrop(32, padding=4), torch.zeros(3, 32, 32)
    torch.manual_seed(0)
    made = [reference.make_params([image]) for _ in range(COUNT)]
    theirs = np.array([[one["top"], one["left"]] for one in made])
    counts = [np.bincount(places @ [9, 1], minlength=81) for places in (ours, theirs)]
    assert stats.chi2_contingency(counts).pvalue > 1e-3
    assert stats.chisquare(counts[0]).pvalue > 1e-3


@pytest.mark.parametrize("fraction", [0.1, 0.25, 1.0])
def test_translation_has_torchvisions_distribution(fraction: float) -> None:
    part = recipe.Translate(op="translate", fraction=fraction)
    ours = geometry.draw_translation(part, COUNT, source())["offsets"]
    reference, image = v2.RandomAffine(0, translate=(fraction, fraction)), torch.zeros(3, 32, 32)
    torch.manual_seed(0)
    theirs = np.array([reference.make_params([image])["translate"] for _ in range(COUNT)])
    farthest = math.floor(32 * fraction)
    for axis in range(2):
        counts = [
            np.bincount(offsets[:, axis] + farthest, minlength=2 * farthest + 1)
            for offsets in (ours, theirs[:, ::-1])
        ]
        assert stats.chi2_contingency(counts).pvalue > 1e-3


def test_translation() -> None:
    offsets = geometry.draw_translation(recipe.Translate(op="translate", fraction=0.5), 100, source())
    moved = geometry.shift(PIXELS[:100], **offsets, margin=16, border="black")

    def theirs(i: int, image: Tensor) -> Any:
        down, right = offsets["offsets"][i].tolist()
        return functional.affine(image, angle=0.0, translate=[right, down], scale=1.0, shear=[0.0, 0.0])

    assert difference(moved, theirs).max() == 0


@pytest.mark.parametrize("degrees", [10.0, 20.0, 180.0])
def test_rotation(degrees: float) -> None:
    part = recipe.Rotation(op="rotation", degrees=degrees)
    angles = geometry.draw_rotation(part, 150, source())["angles"]
    angles[:3] = [0, -degrees, degrees]
    rotated = geometry.rotate(PIXELS[:150], angles)
    apart = difference(rotated, lambda i, x: functional.rotate(x, angles[i].item(), fill=0))
    assert (apart > 0).any(-1).double().mean() <= 1e-3


def test_rotation_has_torchvisions_distribution() -> None:
    angles = geometry.draw_rotation(recipe.Rotation(op="rotation", degrees=15.0), COUNT, source())
    reference = v2.RandomRotation(15.0)
    torch.manual_seed(0)
    theirs = [reference.make_params([])["angle"] for _ in range(COUNT)]
    assert stats.ks_2samp(angles["angles"], theirs).pvalue > 1e-3


@pytest.mark.parametrize("axis", [0, 1])
def test_shear(axis: int) -> None:
    slopes = np.linspace(-0.4, 0.4, 101)
    along = [np.zeros(101), np.zeros(101)]
    along[axis] = slopes

    def theirs(i: int, image: Tensor) -> Any:
        shear = [0.0, 0.0]
        shear[axis] = math.degrees(math.atan(slopes[i]))
        return functional.affine(image, 0.0, [0, 0], 1.0, shear, center=[0.0, 0.0])

    apart = difference(geometry.shear(PIXELS[:101], *along), theirs)
    assert (apart > 0).any(-1).double().mean() <= 1e-3
