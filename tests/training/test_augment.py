import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from training import augment, data, recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return data.load_sample().train.pixels


@pytest.fixture(scope="module")
def images(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2)


@pytest.mark.parametrize("border", ["black", "reflect"])
def test_each_image_is_cropped_from_its_padded_self(images: Tensor, border: str) -> None:
    padded = v2.functional.pad(images, [4], padding_mode="constant" if border == "black" else "reflect")
    torch.manual_seed(0)
    cropped = augment.random_crop(images, 4, border)
    places = set()
    for index, crop in enumerate(cropped):
        found = {
            (top, left)
            for top in range(9)
            for left in range(9)
            if torch.equal(padded[index, :, top : top + 32, left : left + 32], crop)
        }
        assert found
        places |= found
    assert len(places) == 81


def test_flip_mirrors_about_half(images: Tensor) -> None:
    chosen = torch.arange(len(images)) % 2 == 0
    flipped = augment.mirror(images, chosen)
    assert torch.equal(flipped[::2], images[::2].flip(-1))
    assert torch.equal(flipped[1::2], images[1::2])


def test_alternating_flip_shows_both_sides_in_two_epochs(pixels: Tensor) -> None:
    fast = recipe.load("fast").model_copy(
        update={
            "augment": (recipe.AlternatingFlip(op="alternating_flip"),),
            "resolution": (),
        }
    )
    augmenter = augment.Augmenter(fast, len(pixels), 3, CPU)
    indices = torch.arange(len(pixels))
    first, second, third = (augmenter(pixels, indices, epoch) for epoch in range(3))
    assert torch.equal(second, first.flip(-1))
    assert torch.equal(third, first)
    plain = augment.Normalize(fast.data.mean, fast.data.std)(pixels.permute(0, 3, 1, 2))
    mirrored = (first != plain).flatten(1).any(1).float().mean().item()
    assert 0.4 < mirrored < 0.6


def test_erasing_fills_rectangles_of_the_asked_size() -> None:
    torch.manual_seed(0)
    count = 4000
    erased = augment.random_erasing(torch.zeros(count, 3, 32, 32), 0.5, (0.02, 0.33), (0.3, 3.3), 1.0)
    assert torch.equal(erased[:, 0], erased[:, 1])
    masks = erased[:, 0]
    areas = masks.sum((1, 2))
    hit = areas > 0
    assert hit.float().mean().item() == pytest.approx(0.5, abs=0.03)
    heights, widths = masks.amax(2).sum(1)[hit], masks.amax(1).sum(1)[hit]
    assert torch.equal(heights * widths, areas[hit])
    assert areas[hit].min() >= 0.02 * 1024 * 0.8
    assert areas[hit].max() <= 0.33 * 1024 * 1.1
    # torchvision's own, image by image, has the same mean area, height and width.
    reference = v2.RandomErasing(1.0, (0.02, 0.33), (0.3, 3.3), 1.0)
    expected = torch.stack([reference(torch.zeros(1, 32, 32))[0] for _ in range(2000)])
    assert areas[hit].mean().item() == pytest.approx(expected.sum((1, 2)).mean().item(), rel=0.06)
    assert heights.mean().item() == pytest.approx(expected.amax(2).sum(1).mean().item(), rel=0.06)


def test_erasing_leaves_the_rest_alone(images: Tensor) -> None:
    torch.manual_seed(0)
    normalised = images.float()
    erased = augment.random_erasing(normalised, 1.0, (0.1, 0.2), (0.5, 2.0), -9.0)
    kept = erased != -9.0
    assert torch.equal(erased[kept], normalised[kept])
    assert (~kept).flatten(1).any(1).all()


@pytest.mark.parametrize("name", recipe.names())
def test_batches_are_normalised_images(pixels: Tensor, name: str) -> None:
    loaded = recipe.load(name)
    augmenter = augment.Augmenter(loaded, len(pixels), 0, CPU)
    indices = torch.arange(40)
    torch.manual_seed(1)
    batch = augmenter(pixels[indices], indices, loaded.epochs - 1)
    torch.manual_seed(1)
    again = augmenter(pixels[indices], indices, loaded.epochs - 1)
    assert batch.shape == (40, 3, 32, 32)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, again)
    assert batch.isfinite().all()
    assert batch.mean().abs() < 1
    plain = augment.Normalize(loaded.data.mean, loaded.data.std)(pixels[indices].permute(0, 3, 1, 2))
    assert not torch.equal(batch, plain)


def test_resolution_changes_with_the_epoch(pixels: Tensor) -> None:
    fast = recipe.load("fast")
    augmenter = augment.Augmenter(fast, len(pixels), 0, CPU)
    indices = torch.arange(4)
    for part in fast.resolution:
        batch = augmenter(pixels[indices], indices, part.from_epoch)
        assert batch.shape[-2:] == (part.size, part.size)
    assert augmenter.image_size(fast.epochs - 1) == 32


def test_normalize_is_torchvisions(images: Tensor) -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    expected = v2.functional.normalize(images.float() / 255, list(mean), list(std))
    torch.testing.assert_close(augment.Normalize(mean, std)(images), expected)
