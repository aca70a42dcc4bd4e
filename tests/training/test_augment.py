import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2

from training import augment, data, recipe
from training.augment import Augmenter, Parameters

CPU = torch.device("cpu")
COUNT = 6000


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return data.load_sample().train.pixels


def augmenter(*operations: str, name: str = "A1") -> Augmenter:
    loaded = recipe.load(name, [f"augment=[{', '.join(operations)}]"] if operations else [])
    return Augmenter(loaded, COUNT, 3, CPU)


def draw(operation: str, seed: int = 0) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    (drawn,) = augmenter(operation).draw(torch.arange(COUNT), 0, generator)
    return drawn


JITTER = "{op='color_jitter', brightness=0.3, contrast=0.2, saturation=0.4, hue=0.1}"


def test_jitter_has_torchvisions_distribution() -> None:
    drawn = draw(JITTER)
    reference = v2.ColorJitter(0.3, 0.2, 0.4, 0.1)
    torch.manual_seed(0)
    theirs = [reference.make_params([]) for _ in range(COUNT)]
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    for index, name in enumerate(names):
        expected = [drawn_one[name] for drawn_one in theirs]
        assert stats.ks_2samp(drawn["values"][:, index], expected).pvalue > 1e-3
    orders = (drawn["order"] * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = torch.unique(orders, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_jitter_has_torchvisions_pixels(pixels: Tensor) -> None:
    """The four changes in each image's own order."""
    step = augmenter(JITTER)
    images = pixels[:200].permute(0, 3, 1, 2)
    (drawn,) = step.draw(torch.arange(200), 0, torch.Generator().manual_seed(0))
    changes = [
        v2.functional.adjust_brightness,
        v2.functional.adjust_contrast,
        v2.functional.adjust_saturation,
        v2.functional.adjust_hue,
    ]
    expected = []
    for image, values, order in zip(images, drawn["values"], drawn["order"], strict=True):
        for index in order.tolist():
            image = changes[index](image, values[index].item())
        expected.append(image)
    normalize = augment.Normalize(*(recipe.load("A1").data.mean, recipe.load("A1").data.std))
    levels = (step.apply(pixels[:200], [drawn], 0) - normalize(torch.stack(expected))).abs() * 255 * 0.26
    # A level that is cut off differently by the first change can grow by the others.
    assert (levels > 0.5).double().mean() < 2e-3
    assert levels.max() < 4.5


def test_no_change_of_jitter_is_left_out() -> None:
    drawn = draw("{op='color_jitter', brightness=0.0, contrast=0.2, saturation=1.5, hue=0.0}")
    assert drawn["values"].shape == (COUNT, 2)
    assert drawn["values"][:, 1].min() >= 0


@pytest.mark.parametrize("degrees", [10.0, 20.0])
def test_rotation_has_torchvisions_distribution(degrees: float) -> None:
    reference = v2.RandomRotation(degrees)
    torch.manual_seed(0)
    expected = [reference.make_params([])["angle"] for _ in range(COUNT)]
    drawn = draw(f"{{op='rotation', degrees={degrees}}}")["degrees"]
    assert stats.ks_2samp(drawn, expected).pvalue > 1e-3


def test_translation_has_torchvisions_distribution() -> None:
    reference = v2.RandomAffine(0, translate=(0.1, 0.1))
    image = torch.zeros(3, 32, 32)
    torch.manual_seed(0)
    theirs = torch.tensor([reference.make_params([image])["translate"] for _ in range(COUNT)])
    drawn = draw("{op='translate', fraction=0.1}")["shifts"]
    for axis in range(2):
        counts = [torch.bincount(shifts[:, axis].long() + 3, minlength=7) for shifts in (drawn, theirs)]
        assert stats.chi2_contingency(torch.stack(counts)).pvalue > 1e-3


def test_crop_has_torchvisions_distribution() -> None:
    reference = v2.RandomCrop(32, padding=4)
    image = torch.zeros(3, 32, 32)
    torch.manual_seed(0)
    made = [reference.make_params([image]) for _ in range(COUNT)]
    theirs = torch.tensor([[one["top"], one["left"]] for one in made])
    drawn = draw("{op='random_crop', padding=4, border='black'}")["shifts"] + 4
    for axis in range(2):
        counts = [torch.bincount(places[:, axis], minlength=9) for places in (drawn, theirs)]
        assert stats.chi2_contingency(torch.stack(counts)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("operation", "p"),
    [
        ("{op='horizontal_flip', p=0.5}", 0.5),
        ("{op='sharpness', factor=2.0, p=0.2}", 0.2),
    ],
)
def test_chosen_share(operation: str, p: float) -> None:
    chosen = int(draw(operation)["chosen"].sum())
    assert stats.binomtest(chosen, COUNT, p).pvalue > 1e-3


@pytest.mark.parametrize(
    "operation",
    [
        "{op='random_erasing', p=0.2, scale=[0.02, 0.1], ratio=[0.3, 3.3], value=1.0}",
        "{op='cutout', size=8, p=0.2}",
    ],
)
def test_hidden_share(operation: str) -> None:
    boxes = draw(operation)["boxes"]
    hidden = int(((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).sum())
    assert stats.binomtest(hidden, COUNT, 0.2).pvalue > 1e-3


def test_sharpness_touches_the_chosen_only(pixels: Tensor) -> None:
    step = augmenter("{op='sharpness', factor=2.0, p=0.2}")
    generator = torch.Generator().manual_seed(0)
    (drawn,) = step.draw(torch.arange(100), 0, generator)
    data_part = recipe.load("A1").data
    normalize = augment.Normalize(data_part.mean, data_part.std)
    images = pixels[:100].permute(0, 3, 1, 2)
    expected = [
        v2.functional.adjust_sharpness(image, 2.0) if chosen else image
        for image, chosen in zip(images, drawn["chosen"], strict=True)
    ]
    torch.testing.assert_close(
        step.apply(pixels[:100], [drawn], 0), normalize(torch.stack(expected)), atol=0.02, rtol=0
    )


def test_alternating_flip_shows_both_sides_in_two_epochs(pixels: Tensor) -> None:
    step = augmenter("{op='alternating_flip'}")
    indices = torch.arange(len(pixels))
    first, second, third = (
        step.apply(pixels, step.draw(indices, epoch, torch.Generator()), epoch) for epoch in range(3)
    )
    assert torch.equal(second, first.flip(-1))
    assert torch.equal(third, first)
    data_part = recipe.load("A1").data
    plain = augment.Normalize(data_part.mean, data_part.std)(pixels.permute(0, 3, 1, 2))
    mirrored = (first != plain).flatten(1).any(1).float().mean().item()
    assert 0.4 < mirrored < 0.6


@pytest.mark.parametrize("name", recipe.names())
def test_batches_are_normalised_images(pixels: Tensor, name: str) -> None:
    loaded = recipe.load(name)
    step = Augmenter(loaded, len(pixels), 0, CPU)
    indices, before = torch.arange(40), pixels.clone()
    drawn = step.draw(indices, loaded.epochs - 1, torch.Generator().manual_seed(1))
    batch = step.apply(pixels[:40], drawn, loaded.epochs - 1)
    assert torch.equal(pixels, before), "the data set is left alone"
    assert batch.shape == (40, 3, 32, 32)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert batch.isfinite().all()
    assert batch.mean().abs() < 1
    plain = augment.Normalize(loaded.data.mean, loaded.data.std)(pixels[:40].permute(0, 3, 1, 2))
    assert not torch.equal(batch, plain)

    again = step.draw(indices, loaded.epochs - 1, torch.Generator().manual_seed(1))
    assert torch.equal(step.apply(pixels[:40], again, loaded.epochs - 1), batch)
    # A share of the batch is augmented as in the whole.
    rows = [{key: values[25:] for key, values in part.items()} for part in drawn]
    assert torch.equal(step.apply(pixels[25:40], rows, loaded.epochs - 1), batch[25:])


def test_nothing_to_do_is_normalisation(pixels: Tensor) -> None:
    a1 = recipe.load("A1", ["augment=[]"])
    step = Augmenter(a1, 10, 0, CPU)
    batch = step.apply(pixels[:10], step.draw(torch.arange(10), 0, torch.Generator()), 0)
    normalize = augment.Normalize(a1.data.mean, a1.data.std)
    assert torch.equal(batch, normalize(pixels[:10].permute(0, 3, 1, 2)))


def test_what_hides_comes_last() -> None:
    cutout, flip = "{op='cutout', size=8, p=1.0}", "{op='horizontal_flip', p=0.5}"
    with pytest.raises(recipe.RecipeError, match="work on normalised pixels and come last"):
        augmenter(cutout, flip)
    augmenter(flip, cutout, cutout)


def test_resolution_changes_with_the_epoch(pixels: Tensor) -> None:
    fast = recipe.load("fast")
    step = Augmenter(fast, len(pixels), 0, CPU)
    for part in fast.resolution:
        drawn = step.draw(torch.arange(4), part.from_epoch, torch.Generator())
        batch = step.apply(pixels[:4], drawn, part.from_epoch)
        assert batch.shape[-2:] == (part.size, part.size)
    assert step.image_size(fast.epochs - 1) == 32


def test_normalize_is_torchvisions(pixels: Tensor) -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    images = pixels.permute(0, 3, 1, 2)
    expected = v2.functional.normalize(images.float() / 255, list(mean), list(std))
    torch.testing.assert_close(augment.Normalize(mean, std)(images), expected)
