"""Learning rates as a pure function of the recipe, the place in the run and the ``val`` losses."""

import math
from collections.abc import Sequence
from typing import assert_never

from training import recipe

EPS, THRESHOLD = 1e-8, 1e-4  # defaults of torch's ReduceLROnPlateau


def learning_rate(
    schedule: recipe.Schedule,
    base_lr: float,
    epoch: float,
    epochs: int,
    val_losses: Sequence[float] = (),
) -> float:
    """The learning rate of one step.

    Args:
        schedule: the recipe's schedule.
        base_lr: the optimizer's (or one parameter group's) rate in the recipe.
        epoch: epochs done, with the fraction of the current one (0.5: in the middle of the first).
            Only ``linear`` uses the fraction.
        epochs: number of epochs in the whole run.
        val_losses: those of the epochs done, for ``plateau``.
    """
    whole = math.floor(epoch)
    match schedule:
        case recipe.Constant():
            return base_lr
        case recipe.Linear():
            return base_lr * (1 - epoch / epochs)
        case recipe.Cosine():
            # torch's CosineAnnealingLR with T_max = epochs.
            return _cosine(base_lr, schedule.min_lr, whole / epochs)
        case recipe.ShiftedWarmupCosine():
            if whole < schedule.warmup_epochs:
                return base_lr * min(1.0, (whole + 2) / schedule.warmup_epochs)
            shifted = whole - schedule.warmup_epochs + 1
            return _cosine(base_lr, schedule.min_lr, shifted / epochs)
        case recipe.Step():
            return base_lr * schedule.gamma ** (whole // schedule.step_epochs)
        case recipe.MultiStep():
            passed = sum(whole >= milestone for milestone in schedule.milestones)
            return base_lr * schedule.gamma**passed
        case recipe.Plateau():
            count = plateaus(val_losses, schedule.patience)
            # torch does not make a change this small, nor those that would follow it.
            while count and base_lr * schedule.factor ** (count - 1) * (1 - schedule.factor) <= EPS:
                count -= 1
            return base_lr * schedule.factor**count
        case _:
            assert_never(schedule)


def plateaus(losses: Sequence[float], patience: int) -> int:
    """How many plateaus torch's ReduceLROnPlateau (mode ``min``) would have found in these ``losses``.

    An epoch is better if its loss is below the best one by more than a relative 1e-4; more than
    ``patience`` epochs in a row that are not better are a plateau, after which their count restarts.
    """
    best, waited, count = math.inf, 0, 0
    for loss in losses:
        if loss < best * (1 - THRESHOLD):
            best, waited = loss, 0
        else:
            waited += 1
        if waited > patience:
            waited, count = 0, count + 1
    return count


def _cosine(high: float, low: float, progress: float) -> float:
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2
