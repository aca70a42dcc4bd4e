from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from tests.training.parity import PIXELS, source, torchvisions_operation
from training import augment, autoaugment, recipe
from training.augment import Augmenter
from training.batch import Parameters
from training.recipe import Augmentation

CPU = torch.device("cpu")
FLIP = "{op='horizontal_flip', p=0.5}"
CUTOUT = "{op='cutout', size=8, p=0.7}"
ERASING = "{op='random_erasing', p=0.5, scale=[0.02, 0.2], ratio=[0.3, 3.3], value=1.0}"
EVERY_OPERATION = [
    "{op='random_crop', padding=4, border='reflect'}",
    FLIP,
    "{op='alternating_flip'}",
    "{op='color_jitter', brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1}",
    "{op='rotation', degrees=20.0}",
    "{op='translate', fraction=0.1}",
    "{op='sharpness', factor=2.0, p=0.2}",
    "{op='auto_augment'}",
    CUTOUT,
    ERASING,
]


def with_operations(*operations: str) -> recipe.Recipe:
    return recipe.load("A1", [f"augment=[{', '.join(operations)}]"])


def plain(loaded: recipe.Recipe, pixels: Tensor) -> Tensor:
    normalize = augment.Normalize(loaded.data.mean, loaded.data.std)
    normalised: Tensor = normalize(pixels.permute(0, 3, 1, 2))
    return normalised


def torchvisions(part: Augmentation, image: Tensor, of: Parameters) -> Any:
    """Apply torchvision's transform for ``part`` to an image, uint8 [3, 32, 32], with its parameters."""
    match part:
        case recipe.HorizontalFlip():
            return functional.horizontal_flip(image) if of["chosen"] else image
        case recipe.RandomCrop():
            top, left = (part.padding - of["offsets"]).tolist()
            return functional.crop(functional.pad(image, [part.padding]), top, left, 32, 32)
        case recipe.ColorJitter():
            transform = v2.ColorJitter(part.brightness, part.contrast, part.saturation, part.hue)
            factors = dict(
                zip(("brightness", "contrast", "saturation", "hue"), of["amounts"].tolist(), strict=True)
            )
            if part.hue == 0:
                factors["hue"] = None
            named = {f"{name}_factor": factor for name, factor in factors.items()}
            return transform.transform(image, {"fn_idx": torch.from_numpy(of["order"]), **named})
        case recipe.Rotation():
            return v2.RandomRotation(part.degrees).transform(image, {"angle": of["angles"].item()})
        case recipe.Translate():
            down, right = of["offsets"].tolist()
            given = {"angle": 0.0, "translate": (right, down), "scale": 1.0, "shear": (0.0, 0.0)}
            return v2.RandomAffine(0).transform(image, given)
        case recipe.Sharpness():
            return functional.adjust_sharpness(image, of["factors"].item())
        case recipe.AutoAugment():
            for index, magnitude in zip(of["operations"], of["magnitudes"].tolist(), strict=True):
                image = torchvisions_operation(autoaugment.OPERATIONS[index], image, magnitude)
            return image
    raise AssertionError(f"{part.op} is no report's operation on pixels")


@pytest.mark.parametrize("name", [name for name in recipe.names() if recipe.load(name).report])
def test_recipes_of_reports_are_torchvisions(name: str) -> None:
    """A whole recipe gives what torchvision's transforms give one after the other, image by image.

    A level that is truncated differently may become another one later, so at most 0.1 % of the values
    may be more than half a level apart.
    """
    loaded = recipe.load(name)
    step = Augmenter(loaded, len(PIXELS), 0, CPU)
    drawn = step.draw(torch.arange(len(PIXELS)), 0, source())
    mean, std = list(loaded.data.mean), list(loaded.data.std)
    expected = []
    for index, pixels in enumerate(PIXELS):
        image, of = pixels.permute(2, 0, 1), [{k: v[index] for k, v in each.items()} for each in drawn]
        for part, parameters in zip(loaded.augment, of, strict=True):
            if not isinstance(part, recipe.RandomErasing):
                image = torchvisions(part, image, parameters)
        image = functional.normalize(image / 255, mean, std)
        if isinstance(part, recipe.RandomErasing):
            top, left, bottom, right = parameters["rectangles"].tolist()
            image[:, top:bottom, left:right] = part.value
        expected.append(image)
    ours = step.apply(PIXELS, drawn, 0)
    apart = (ours - torch.stack(expected)).abs() * torch.tensor(std).view(3, 1, 1) * 255
    assert (apart > 0.5).double().mean() <= 1e-3


@pytest.mark.parametrize("name", [*recipe.names(), "every operation"])
def test_batches_are_normalised_images(name: str) -> None:
    loaded = with_operations(*EVERY_OPERATION) if name == "every operation" else recipe.load(name)
    step = Augmenter(loaded, len(PIXELS), 0, CPU)
    indices, before, last = torch.arange(40), PIXELS.clone(), loaded.epochs - 1
    drawn = step.draw(indices, last, source(1))
    batch = step.apply(PIXELS[:40], drawn, last)
    assert torch.equal(PIXELS, before), "the data set is left alone"
    assert batch.shape == (40, 3, 32, 32)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert batch.isfinite().all()
    assert batch.mean().abs() < 1
    assert not torch.isclose(batch, plain(loaded, PIXELS[:40]), atol=1e-5).all()

    again = step.apply(PIXELS[:40], step.draw(indices, last, source(1)), last)
    assert torch.equal(again, batch)
    other = step.apply(PIXELS[:40], step.draw(indices, last, source(2)), last)
    assert not torch.equal(other, batch) or loaded.augment == ()
    # A share of the batch, even a single image, is augmented as in the whole batch.
    for rows in (slice(0, 25), slice(25, 40), slice(7, 8), np.array([3, 30, 4])):
        share = [{key: values[rows] for key, values in part.items()} for part in drawn]
        assert torch.equal(step.apply(PIXELS[:40][rows], share, last), batch[rows])


def test_nothing_to_do_is_normalisation() -> None:
    loaded = with_operations()
    step = Augmenter(loaded, 10, 0, CPU)
    batch = step.apply(PIXELS[:10], step.draw(torch.arange(10), 0, source()), 0)
    torch.testing.assert_close(batch, plain(loaded, PIXELS[:10]))


def test_no_value_is_asked_of_the_device() -> None:
    """A meta tensor has no values, so whatever needs one to go on fails."""
    loaded = with_operations(*EVERY_OPERATION)
    step = Augmenter(loaded, 40, 0, torch.device("meta"))
    batch = step.apply(PIXELS[:40].to("meta"), step.draw(torch.arange(40), 0, source()), 0)
    assert batch.shape == (40, 3, 32, 32)
    with pytest.raises(RuntimeError):
        batch[batch > 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_sees_the_same_and_is_never_waited_for() -> None:
    loaded = with_operations(*EVERY_OPERATION)
    drawn = Augmenter(loaded, 500, 0, CPU).draw(torch.arange(500), 0, source())
    step = Augmenter(loaded, 500, 0, torch.device("cuda"))
    pixels = PIXELS.cuda()
    step.apply(pixels, drawn, 0)  # the first call also loads the libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = step.apply(pixels, drawn, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    apart = (batch.cpu() - Augmenter(loaded, 500, 0, CPU).apply(PIXELS, drawn, 0)).abs()
    assert (apart > 0.5 / 255 / 0.25).double().mean() <= 2e-3


def test_alternating_flip_shows_both_sides_in_two_epochs() -> None:
    loaded = with_operations("{op='alternating_flip'}")
    step = Augmenter(loaded, len(PIXELS), 3, CPU)
    order = torch.randperm(len(PIXELS), generator=source())
    first, second, third = (
        step.apply(PIXELS[order], step.draw(order, epoch, source()), epoch) for epoch in range(3)
    )
    assert torch.equal(second, first.flip(-1))
    assert torch.equal(third, first)
    # Which half is flipped depends on an image's place in the training set, not in the epoch.
    back = step.apply(PIXELS, step.draw(torch.arange(len(PIXELS)), 0, source()), 0)
    assert torch.equal(back[order], first)
    other = Augmenter(loaded, len(PIXELS), 4, CPU)
    assert not torch.equal(
        other.apply(PIXELS, other.draw(torch.arange(len(PIXELS)), 0, source()), 0), back
    )
    mirrored = ~torch.isclose(back, plain(loaded, PIXELS), atol=1e-5).flatten(1).all(1)
    assert 0.4 < mirrored.double().mean() < 0.6


def test_what_hides_comes_last_and_in_its_order() -> None:
    for part in (CUTOUT, ERASING):
        with pytest.raises(recipe.RecipeError, match="random_erasing and cutout work on normalised"):
            with_operations(part, FLIP)
    for hiding in ([CUTOUT, ERASING], [ERASING, CUTOUT]):
        loaded = with_operations(FLIP, *hiding)
        step = Augmenter(loaded, 200, 0, CPU)
        drawn = step.draw(torch.arange(200), 0, source())
        batch = step.apply(PIXELS[:200], drawn, 0)
        for image, rectangle in zip(batch, drawn[2]["rectangles"], strict=True):
            top, left, bottom, right = rectangle.tolist()
            last = image[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
            assert (last == (1.0 if hiding[1] == ERASING else 0.0)).all()


def test_resolution_changes_with_the_epoch() -> None:
    fast = recipe.load("fast", ["augment=[]"])
    step = Augmenter(fast, len(PIXELS), 0, CPU)
    for part in fast.resolution:
        drawn = step.draw(torch.arange(4), part.from_epoch, source())
        batch = step.apply(PIXELS[:4], drawn, part.from_epoch)
        assert batch.shape[-2:] == (part.size, part.size)
        resized = functional.resize(plain(fast, PIXELS[:4]), [part.size, part.size], antialias=True)
        torch.testing.assert_close(batch, resized)
        assert batch.is_contiguous(memory_format=torch.channels_last)
    assert step.image_size(fast.epochs - 1) == 32


def test_normalize_is_torchvisions() -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    images = PIXELS.permute(0, 3, 1, 2)
    expected = functional.normalize(images.float() / 255, list(mean), list(std))
    torch.testing.assert_close(augment.Normalize(mean, std)(images), expected)
