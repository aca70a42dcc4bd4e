import math

import pytest
import torch

from training import recipe
from training.schedule import learning_rate, plateaus


def rates(name: str, epochs: int) -> list[float]:
    loaded = recipe.load(name)
    assert not isinstance(loaded.optimizer, recipe.Muon)
    base = loaded.optimizer.lr
    return [learning_rate(loaded.schedule, base, epoch, loaded.epochs) for epoch in range(epochs)]


def torch_rates(
    lr: float, epochs: int, schedule: type[torch.optim.lr_scheduler.LRScheduler], **options: object
) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = schedule(optimizer, **options)  # type: ignore[arg-type]
    seen = []
    for _ in range(epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_a3_is_cosine_annealing() -> None:
    expected = torch_rates(
        0.112202, 200, torch.optim.lr_scheduler.CosineAnnealingLR, T_max=200, eta_min=1e-4
    )
    assert rates("A3", 200) == pytest.approx(expected, rel=1e-6)


def test_c1_has_milestones() -> None:
    expected = torch_rates(
        0.1, 75, torch.optim.lr_scheduler.MultiStepLR, milestones=[30, 40, 60, 80], gamma=0.1
    )
    assert rates("C1", 75) == pytest.approx(expected)


def test_d1_has_steps() -> None:
    expected = torch_rates(0.01, 40, torch.optim.lr_scheduler.StepLR, step_size=10, gamma=0.1)
    assert rates("D1", 40) == pytest.approx(expected)


def test_e1_follows_its_report() -> None:
    expected = [
        0.01 * min(1, (e + 2) / 5)
        if e < 5
        else 1e-5 + 0.00999 * (1 + math.cos(math.pi * (e - 4) / 50)) / 2
        for e in range(50)
    ]
    assert rates("E1", 50) == pytest.approx(expected)


def test_linear_falls_with_every_step_to_zero() -> None:
    linear = recipe.Linear(kind="linear")
    assert [learning_rate(linear, 2.0, e, 4) for e in (0, 0.5, 3, 4)] == [2.0, 1.75, 0.5, 0.0]


@pytest.mark.parametrize("name", ["A3", "C1", "D1", "E1"])
def test_the_others_change_between_epochs_only(name: str) -> None:
    loaded = recipe.load(name)
    for epoch, rate in enumerate(rates(name, loaded.epochs)):
        later = learning_rate(loaded.schedule, loaded.optimizer.lr, epoch + 0.75, loaded.epochs)
        assert later == rate


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("lr", "factor", "patience"),
    # The first one is the schedule of B1 and B2.
    [(0.001, 0.1, 5), (1.0, 0.5, 3), (0.003, 0.1, 3), (2e-6, 0.7, 3), (1.5e-8, 0.5, 3), (1e-8, 0.1, 3)],
)
def test_plateau_is_torchs(lr: float, factor: float, patience: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses = (1 / (1 + torch.arange(75.0)) + 0.2 * torch.rand(75, generator=generator)).tolist()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=factor, patience=patience)
    plateau = recipe.Plateau(kind="plateau", factor=factor, patience=patience)
    for done in range(len(losses) + 1):
        expected = optimizer.param_groups[0]["lr"]
        actual = learning_rate(plateau, lr, done, 75, losses[:done])
        assert actual == pytest.approx(expected, rel=1e-9, abs=0)
        if done < len(losses):
            scheduler.step(losses[done])
    assert plateaus(losses, patience) >= 4


def test_a_loss_that_hardly_falls_is_a_plateau() -> None:
    assert plateaus([1.0, 0.99995, 0.99991], patience=1) == 1
    assert plateaus([1.0, 0.99985, 0.9997], patience=1) == 0
