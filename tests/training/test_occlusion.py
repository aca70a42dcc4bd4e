import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from training import occlusion

SCALE, RATIO = (0.02, 0.33), (0.3, 3.3)


def test_fill_hides_the_box_and_nothing_else() -> None:
    images = torch.randn(3, 3, 32, 32)
    boxes = torch.tensor([[2, 3, 5, 9], [0, 0, 0, 0], [-4, 30, 4, 38]])
    filled = occlusion.fill(images, boxes, 7.0)
    expected = images.clone()
    expected[0, :, 2:5, 3:9] = 7.0
    expected[2, :, :4, 30:] = 7.0
    assert torch.equal(filled, expected)


@pytest.mark.parametrize(
    ("scale", "ratio"), [(SCALE, RATIO), ((0.02, 0.1), RATIO), ((0.5, 1.0), (0.2, 5.0))]
)
def test_erasing_has_torchvisions_distribution(
    scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    count = 3000
    generator = torch.Generator().manual_seed(0)
    boxes = occlusion.erasing_boxes(count, 32, scale, ratio, generator)
    torch.manual_seed(0)
    reference = v2.RandomErasing(1.0, scale, ratio)
    image = torch.zeros(3, 32, 32)
    theirs = []
    for _ in range(count):
        drawn = reference.make_params([image])
        box = [0, 0, 0, 0]
        if drawn["v"] is not None:
            box = [drawn["i"], drawn["j"], drawn["i"] + drawn["h"], drawn["j"] + drawn["w"]]
        theirs.append(box)
    expected = torch.tensor(theirs)
    for side in range(4):
        assert stats.ks_2samp(boxes[:, side], expected[:, side]).pvalue > 1e-3
    areas = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes, expected)]
    assert stats.ks_2samp(*areas).pvalue > 1e-3


def test_cutout_is_a_square_around_any_pixel() -> None:
    boxes = occlusion.cutout_boxes(20_000, 32, 8, torch.Generator().manual_seed(0))
    assert torch.equal(boxes[:, 2:] - boxes[:, :2], torch.full((20_000, 2), 8))
    for axis in range(2):
        centers = boxes[:, axis] + 4
        assert stats.chisquare(torch.bincount(centers, minlength=32)).pvalue > 1e-3
