"""Compare with torchvision.transforms.v2.AutoAugment's CIFAR-10 policy: tables, pixels, choices.

Tolerances are those of test_color.py and test_geometry.py.
"""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from tests.training.parity import AUTO_AUGMENT, PIXELS, THEIR_NAMES, difference, torchvisions_operation
from training import autoaugment
from training.autoaugment import OPERATIONS, POLICY
from training.batch import Parameters

INEXACT = {"brightness", "contrast", "color", "sharpness", "rotate", "shear_x", "shear_y"}


def magnitudes(name: str) -> list[float]:
    """All magnitudes of an operation in torchvision, with both signs if it has them."""
    of_level, signed = AUTO_AUGMENT._AUGMENTATION_SPACE[THEIR_NAMES[name]]
    values = of_level(10, 32, 32)
    positive = [0.0] if values is None else [float(value) for value in values]
    return positive + [-value for value in positive] if signed else positive


def test_policy_is_torchvisions() -> None:
    ours = tuple(tuple((THEIR_NAMES[name], *rest) for name, *rest in pair) for pair in POLICY)
    assert ours == tuple(AUTO_AUGMENT._policies)


@pytest.mark.parametrize("name", THEIR_NAMES)
def test_operation_is_torchvisions(name: str) -> None:
    values = np.repeat(magnitudes(name), 20)
    count = len(values)
    operations = np.tile([OPERATIONS.index(name), OPERATIONS.index("identity")], (count, 1))
    changed = autoaugment.apply(PIXELS[:count], operations, np.stack([values, 0 * values], 1))
    apart = difference(changed, lambda i, x: torchvisions_operation(name, x, values[i].item()))
    if name in ("rotate", "shear_x", "shear_y"):
        assert (apart > 0).any(-1).double().mean() <= 1e-3
    else:
        assert apart.max() <= (1 if name in INEXACT else 0)
        assert (apart > 0).double().mean() <= 1e-3


def test_sub_policies_are_torchvisions() -> None:
    """As drawn: both operations in order, for each image its own."""
    before = PIXELS.clone()
    equal = 0.0
    for seed in range(3):
        drawn = autoaugment.draw(len(PIXELS), torch.Generator().manual_seed(seed))

        def theirs(i: int, image: Tensor, drawn: Parameters = drawn) -> Tensor:
            for index, magnitude in zip(drawn["operations"][i], drawn["magnitudes"][i], strict=True):
                image = torchvisions_operation(OPERATIONS[index], image, magnitude.item())
            return image

        apart = difference(autoaugment.apply(PIXELS, **drawn), theirs)
        equal += (apart == 0).double().mean().item() / 3
        # Equalising can turn one level into several, and a neighbouring pixel may have any value.
        assert (apart > 1).any(-1).double().mean() <= 1e-3
    assert equal >= 0.999
    assert torch.equal(PIXELS, before)


def test_choices_have_torchvisions_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is, which operations come together, in order, with which magnitudes and signs."""
    count = 20_000
    drawn = autoaugment.draw(count, torch.Generator().manual_seed(0))
    ours = Counter(
        tuple(
            (THEIR_NAMES[OPERATIONS[index]], magnitude + 0.0)
            for index, magnitude in zip(indices, values, strict=True)
            if OPERATIONS[index] != "identity"
        )
        for indices, values in zip(
            drawn["operations"].tolist(), drawn["magnitudes"].tolist(), strict=True
        )
    )
    chosen: list[tuple[str, float]] = []

    def record(image: Tensor, name: str, magnitude: float, **_: object) -> Tensor:
        chosen.append((name, magnitude + 0.0))
        return image

    monkeypatch.setattr(AUTO_AUGMENT, "_apply_image_or_video_transform", record)
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    torch.manual_seed(0)
    theirs: Counter[tuple[tuple[str, float], ...]] = Counter()
    for _ in range(count):
        AUTO_AUGMENT(image)
        theirs[tuple(chosen)] += 1
        chosen.clear()
    kinds = sorted(ours.keys() | theirs.keys())
    frequent = [kind for kind in kinds if ours[kind] + theirs[kind] >= 20]
    assert len(frequent) > 80
    counts = [[each[kind] for kind in frequent] for each in (ours, theirs)]
    rare = [count - sum(each) for each in counts]
    table = np.array([[*each, rest] for each, rest in zip(counts, rare, strict=True)])
    assert stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-3


def test_shares_are_the_policys() -> None:
    """Sub-policies are uniform, operations have their probabilities, and half of the signs are minus."""
    count = 50_000
    drawn = autoaugment.draw(count, torch.Generator().manual_seed(1))
    for slot in range(2):
        expected: defaultdict[tuple[str, bool], float] = defaultdict(float)
        for pair in POLICY:
            name, p, _ = pair[slot]
            signs = [False, True] if min(magnitudes(name)) < 0 else [False]
            for negative in signs:
                expected[name, negative] += p / len(POLICY) / len(signs)
            expected["identity", False] += (1 - p) / len(POLICY)
        operations, values = drawn["operations"][:, slot].tolist(), drawn["magnitudes"][:, slot]
        minus = np.signbit(values).tolist()
        seen = Counter(
            (OPERATIONS[index], sign and OPERATIONS[index] != "identity")
            for index, sign in zip(operations, minus, strict=True)
        )
        kinds = [kind for kind in expected if expected[kind] > 0]
        assert seen.keys() <= set(kinds)
        test = stats.chisquare(
            [seen[kind] for kind in kinds], [count * expected[kind] for kind in kinds]
        )
        assert test.pvalue > 1e-3
