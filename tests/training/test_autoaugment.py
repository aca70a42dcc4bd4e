"""Against torchvision.transforms.v2.AutoAugment: its tables, its operations, its choices."""

import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from training import autoaugment, data
from training.autoaugment import MAGNITUDES, OPERATIONS, POLICY, SIGNED

REFERENCE = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
THEIR_NAMES = {name.replace("_", ""): name for name in OPERATIONS}


def ours(their_name: str) -> str:
    return THEIR_NAMES[their_name.lower()]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return data.load_sample().train.pixels[:60].permute(0, 3, 1, 2)


def test_policy_is_torchvisions() -> None:
    theirs = tuple(
        tuple((ours(name), p, level if level is not None else 0) for name, p, level in pair)
        for pair in REFERENCE._policies
    )
    assert theirs == POLICY


def test_magnitudes_and_signs_are_torchvisions() -> None:
    for their_name, (magnitudes, signed) in REFERENCE._AUGMENTATION_SPACE.items():
        if their_name == "ShearX":  # in no sub-policy of CIFAR-10's
            continue
        name = ours(their_name)
        assert (name in SIGNED) == signed
        values = magnitudes(10, 32, 32)
        if values is None:
            assert name not in MAGNITUDES
        else:
            torch.testing.assert_close(MAGNITUDES[name], torch.as_tensor(values).float())


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_has_torchvisions_pixels(name: str, images: Tensor) -> None:
    (their_name,) = [
        key for key in REFERENCE._AUGMENTATION_SPACE if THEIR_NAMES.get(key.lower()) == name
    ]
    signs = (1, -1) if name in SIGNED else (1,)
    for level in (0, 1, 3, 5, 7, 9) if name in MAGNITUDES else (0,):
        for sign in signs:
            magnitude = sign * MAGNITUDES[name][level].item() if name in MAGNITUDES else 0.0
            changed = autoaugment.operate(name, images, torch.full((len(images),), magnitude).double())
            expected = torch.stack(
                [
                    REFERENCE._apply_image_or_video_transform(
                        image, their_name, magnitude, InterpolationMode.NEAREST, REFERENCE._fill
                    )
                    for image in images
                ]
            )
            difference = (changed.int() - expected.int()).abs()
            # Geometry takes pixels between two from either; colours may differ by a rounded level.
            geometric = name in ("shear_y", "translate_x", "translate_y", "rotate")
            assert (difference > 0).double().mean() <= (2e-3 if geometric else 1e-3), (level, sign)
            assert geometric or difference.max() <= 1, (level, sign)


def test_both_slots_apply_in_order(images: Tensor) -> None:
    for first, second in (("posterize", "solarize"), ("equalize", "auto_contrast"), ("invert", "color")):
        operations = torch.tensor([[OPERATIONS.index(first), OPERATIONS.index(second)]] * 60)
        operations[::3, 0] = -1
        operations[1::3, 1] = -1
        magnitudes = torch.tensor([[4.0, 0.5]]).double().repeat(60, 1)
        before = images.clone()
        changed = autoaugment.apply(images, operations, magnitudes)
        assert torch.equal(images, before)
        once = autoaugment.operate(first, images, magnitudes[:, 0])
        twice = autoaugment.operate(second, once, magnitudes[:, 1])
        assert torch.equal(changed[1::3], once[1::3])
        assert torch.equal(changed[2::3], twice[2::3])
        assert torch.equal(changed[::3], autoaugment.operate(second, images, magnitudes[:, 1])[::3])


def test_choices_have_torchvisions_distribution() -> None:
    """Each operation with its magnitude and sign comes as often as the policy's table says."""
    count = 50_000
    operations, magnitudes = autoaugment.draw(count, torch.Generator().manual_seed(0))
    for slot in range(2):
        expected: dict[tuple[str, float], float] = {}
        for pair in POLICY:
            name, p, level = pair[slot]
            size = MAGNITUDES[name][level].item() if name in MAGNITUDES else 0.0
            signs = (1, -1) if name in SIGNED else (1,)
            for sign in signs:
                key = (name, round(sign * size, 4) + 0.0)
                expected[key] = expected.get(key, 0) + p / len(POLICY) / len(signs)
            expected[("none", 0.0)] = expected.get(("none", 0.0), 0) + (1 - p) / len(POLICY)
        seen = dict.fromkeys(expected, 0)
        for index, value in zip(operations[:, slot].tolist(), magnitudes[:, slot].tolist(), strict=True):
            seen[(OPERATIONS[index], round(value, 4) + 0.0) if index >= 0 else ("none", 0.0)] += 1
        keys = [key for key in expected if expected[key] > 0]
        assert sum(seen.values()) == sum(seen[key] for key in keys)
        test = stats.chisquare([seen[key] for key in keys], [count * expected[key] for key in keys])
        assert test.pvalue > 1e-3
