import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from tests.training.parity import PIXELS, source
from training import occlusion, recipe

COUNT = 6000


def erasing(**values: object) -> recipe.RandomErasing:
    given = {"p": 0.5, "scale": (0.02, 0.33), "ratio": (0.3, 3.3), "value": 0.0} | values
    return recipe.RandomErasing.model_validate({"op": "random_erasing", **given})


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_erasing_is_torchvisions(value: float) -> None:
    images = torch.randn(PIXELS.shape, generator=source())
    before = images.clone()
    rectangles = occlusion.draw_erasing(erasing(), len(images), source())["rectangles"]
    hidden = occlusion.hide(images, rectangles, value)
    for image, ours, (top, left, bottom, right) in zip(images, hidden, rectangles.tolist(), strict=True):
        filled = torch.full((3, 1, 1), value)
        theirs = functional.erase(image.permute(2, 0, 1), top, left, bottom - top, right - left, filled)
        assert torch.equal(ours.permute(2, 0, 1), theirs)
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("scale", "ratio"),
    [((0.02, 0.33), (0.3, 3.3)), ((0.02, 0.1), (0.3, 3.3)), ((0.5, 1.0), (0.2, 5.0))],
)
def test_erasing_has_torchvisions_distribution(
    scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    part = erasing(p=1.0, scale=scale, ratio=ratio)
    ours = occlusion.draw_erasing(part, COUNT, source())["rectangles"]
    torch.manual_seed(0)
    reference, image = v2.RandomErasing(1.0, scale, ratio), torch.zeros(3, 32, 32)
    made = [reference.make_params([image]) for _ in range(COUNT)]
    theirs = np.array(
        [
            [one["i"], one["j"], one["i"] + one["h"], one["j"] + one["w"]]
            for one in made
            if one["v"] is not None
        ]
    )
    hidden = ours[(ours[:, :2] < ours[:, 2:]).all(1)]
    counts = [[len(part), COUNT - len(part)] for part in (hidden, theirs)]
    if len(theirs) < COUNT:  # for some, torchvision found no rectangle in ten tries
        assert stats.chi2_contingency(counts).pvalue > 1e-3
    else:
        assert len(hidden) == COUNT
    for side in range(4):
        assert stats.ks_2samp(hidden[:, side], theirs[:, side]).pvalue > 1e-3
    lengths = [rectangles[:, 2:] - rectangles[:, :2] for rectangles in (hidden, theirs)]
    for axis in range(2):
        assert stats.ks_2samp(*(length[:, axis] for length in lengths)).pvalue > 1e-3
    assert stats.ks_2samp(*(length.prod(1) for length in lengths)).pvalue > 1e-3


def cutout(size: int, p: float) -> recipe.Cutout:
    return recipe.Cutout(op="cutout", size=size, p=p)


@pytest.mark.parametrize("size", [1, 7, 16, 32])
def test_cutout_is_a_square_around_any_pixel(size: int) -> None:
    rectangles = occlusion.draw_cutout(cutout(size, 1.0), COUNT, source())["rectangles"]
    assert (rectangles[:, 2:] - rectangles[:, :2] == size).all()
    centres = rectangles[:, :2] + size // 2
    assert stats.chisquare(np.bincount(centres @ [32, 1], minlength=1024)).pvalue > 1e-3
    images = torch.ones(200, 32, 32, 3)
    hidden = occlusion.hide(images, rectangles[:200], 0.0)
    for ours, (top, left, bottom, right) in zip(hidden, rectangles.tolist(), strict=False):
        expected = torch.ones(32, 32, 3)
        expected[max(top, 0) : bottom, max(left, 0) : right] = 0
        assert torch.equal(ours, expected)


def test_share_of_hidden() -> None:
    for rectangles in (
        occlusion.draw_erasing(erasing(p=0.2), COUNT, source())["rectangles"],
        occlusion.draw_cutout(cutout(8, 0.2), COUNT, source())["rectangles"],
    ):
        hidden = (rectangles[:, :2] < rectangles[:, 2:]).all(1)
        assert stats.binomtest(int(hidden.sum()), COUNT, 0.2).pvalue > 1e-3
